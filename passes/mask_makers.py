"""Tensors made from numbers and sizes, and the triangles cut out of them."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from mmi_compile.passes.mask_elements import EXACT_INTEGERS, Unread, axes, compute, exact, join, select
from mmi_compile.passes.mask_operators import Operands, Transfers, bind, operator_name
from mmi_compile.passes.mask_symbols import AtLeastZero, Element, Position, Scalar, SymbolicTensor

MAKERS = Transfers()


def _fill(operands: Operands, value: Any, out: SymbolicTensor) -> Element:
    scalar = operands.read(value)
    if isinstance(scalar, SymbolicTensor):
        raise Unread("filled with a tensor")
    if isinstance(scalar, sympy.Expr) and not scalar.is_number:
        if out.dtype not in EXACT_INTEGERS:
            raise Unread("filled with a size")
        return Position(scalar)
    number = scalar if isinstance(scalar, (bool, int, float)) else int(scalar)

    def make(v: Scalar) -> torch.Tensor:
        return torch.full((), v, dtype=out.dtype, device="cpu")

    return join([(compute(make, [number], out.dtype), sympy.true)], out.dtype)


@MAKERS.of("ones", "ones_like", "new_ones")
def _ones(operands: Operands, node: fx.Node, out: SymbolicTensor) -> Element:
    return _fill(operands, 1, out)


@MAKERS.of("zeros", "zeros_like", "new_zeros")
def _zeros(operands: Operands, node: fx.Node, out: SymbolicTensor) -> Element:
    return _fill(operands, 0, out)


@MAKERS.of("full", "new_full", "full_like")
def _full(operands: Operands, node: fx.Node, out: SymbolicTensor) -> Element:
    place = 2 if operator_name(node) == "new_full" else 1
    value = node.kwargs.get("fill_value", node.args[place] if len(node.args) > place else None)
    return _fill(operands, value, out)


@MAKERS.of("tensor", "scalar_tensor")
def _scalar(operands: Operands, node: fx.Node, out: SymbolicTensor) -> Element:
    if out.shape or len(node.args) != 1:
        raise Unread("more than one number")
    return _fill(operands, node.args[0], out)


@MAKERS.of("arange")
def _arange(operands: Operands, node: fx.Node, out: SymbolicTensor) -> Element:
    if out.dtype not in EXACT_INTEGERS:
        raise Unread(f"positions of {out.dtype}")
    given = (
        {"end": node.args[0]} if len(node.args) == 1 else dict(zip(("start", "end", "step"), node.args, strict=False))
    )
    given |= {k: v for k, v in node.kwargs.items() if k in ("start", "end", "step")}
    start, step = (operands.integer(given.get(k, d)) for k, d in (("start", 0), ("step", 1)))
    operands.integer(given["end"])  # a float end would make a different length, and is not an integer range
    (index,) = axes(out.shape)
    return exact(start + step * index, out.dtype)


@MAKERS.of("tril", "triu")
def _triangle(operands: Operands, node: fx.Node, out: SymbolicTensor) -> Element:
    source, diagonal = bind(node, "input diagonal", diagonal=0)
    tensor, shift = operands.tensor(source), operands.integer(diagonal)
    *_, row, column = axes(out.shape)
    above = column - row - shift
    keep = AtLeastZero(above) if operator_name(node) == "triu" else AtLeastZero(-above)
    zero = SymbolicTensor(out.shape, out.dtype, _fill(operands, 0, out))
    return select(keep, tensor, zero, out)
