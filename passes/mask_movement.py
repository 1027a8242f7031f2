"""Operators that only move elements: casts, broadcasts, reshapes, permutations, indexing and joining."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from mmi_compile.passes.mask_elements import Unread, align, axes, cast, position_of, select
from mmi_compile.passes.mask_operators import Operands, Transfers, bind, operator_name
from mmi_compile.passes.mask_symbols import (
    AtLeastZero,
    Element,
    SymbolicTensor,
    axis,
    example,
    hidden_axis,
    provably_nonnegative,
    reindex,
    same,
)

MOVEMENT = Transfers()


@MOVEMENT.of(
    "to", "type", "type_as", "bool", "float", "half", "bfloat16", "double", "int", "long", "short", "byte", "char",
    "contiguous", "clone", "detach", "cpu", "cuda",
)  # fmt: skip
def _convert(operands: Operands, node: fx.Node, out: SymbolicTensor) -> Element:
    source = operands.tensor(node.args[0])
    if len(source.shape) != len(out.shape):
        raise Unread("the shape changes")
    return cast(source, out.dtype)


@MOVEMENT.of("expand", "expand_as", "broadcast_to", "repeat", "tile")
def _broadcast(operands: Operands, node: fx.Node, out: SymbolicTensor) -> Element:
    # repeat and tile are broadcasts exactly where every repeated dimension has size 1, which is what align asks.
    return align(operands.tensor(node.args[0]), out.shape).element


@MOVEMENT.of("view", "reshape", "view_as", "reshape_as", "unsqueeze", "squeeze", "flatten", "unflatten")
def _reshape(operands: Operands, node: fx.Node, out: SymbolicTensor) -> Element:
    """All of these keep row-major order, so equal sizes (ones aside) mean equal elements."""
    source = operands.tensor(node.args[0])
    if source.dtype is not out.dtype:
        raise Unread("reinterprets bits")
    old = [(axis(len(source.shape) - 1 - n), s) for n, s in enumerate(source.shape) if s != 1]
    new = [(axis(len(out.shape) - 1 - n), s) for n, s in enumerate(out.shape) if s != 1]
    if len(old) != len(new) or not all(same(a[1], b[1]) for a, b in zip(old, new, strict=False)):
        raise Unread("does more than add or drop dimensions of size 1")
    return reindex(source.element, {a[0]: b[0] for a, b in zip(old, new, strict=False)})


@MOVEMENT.of("transpose", "swapaxes", "swapdims", "permute", "t")
def _permute(operands: Operands, node: fx.Node, out: SymbolicTensor) -> Element:
    source = operands.tensor(node.args[0])
    rank = len(source.shape)
    order = _order(node, rank)
    return reindex(source.element, {axis(rank - 1 - old): axis(rank - 1 - new) for new, old in enumerate(order)})


def _order(node: fx.Node, rank: int) -> list[int]:
    dims: list[Any] = list(node.args[1:])
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = list(dims[0])
    if node.kwargs or not all(isinstance(d, int) for d in dims):
        raise Unread("unexpected arguments")
    dims = [d % rank for d in dims] if rank else []
    if operator_name(node) == "permute":
        return dims
    order = list(range(rank))
    if operator_name(node) == "t":
        return order[::-1]
    order[dims[0]], order[dims[1]] = order[dims[1]], order[dims[0]]
    return order


@MOVEMENT.of("getitem")
def _getitem(operands: Operands, node: fx.Node, out: SymbolicTensor) -> Element:
    if not isinstance(node.args[0], fx.Node) or not isinstance(example(node.args[0]), torch.Tensor):
        raise Unread("an item of something that is not a tensor")
    source = operands.tensor(node.args[0])
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if any(isinstance(n, fx.Node) and isinstance(example(n), torch.Tensor) for n in index):
        return _gather(operands, source, list(index), out)
    entries = _without_ellipsis(list(index), len(source.shape))
    mapping: dict[sympy.Symbol, sympy.Expr] = {}
    places = iter(zip(axes(out.shape), out.shape, strict=False))
    dims = iter(enumerate(source.shape))
    for entry in entries:
        if entry is None:
            next(places)
            continue
        dim, size = next(dims)
        if isinstance(entry, slice):
            place, extent = next(places)
            start, step = _slice(operands, entry, size, extent)
            chosen = start + step * place
        else:
            chosen = _nonnegative(operands.integer(entry), size)
        if size != 1:
            mapping[axis(len(source.shape) - 1 - dim)] = chosen
    return reindex(source.element, mapping)


def _without_ellipsis(index: list[Any], rank: int) -> list[Any]:
    missing = rank - sum(e is not None and e is not Ellipsis for e in index)
    if sum(e is Ellipsis for e in index) > 1 or missing < 0:
        raise Unread("an index that torch would refuse")
    if Ellipsis not in index:
        return index + [slice(None)] * missing
    place = index.index(Ellipsis)
    return index[:place] + [slice(None)] * missing + index[place + 1 :]


def _nonnegative(index: sympy.Expr, size: sympy.Expr) -> sympy.Expr:
    """A Python index counted from the front, if its sign is known."""
    if provably_nonnegative(index):
        return index
    if provably_nonnegative(-index - 1) and provably_nonnegative(size + index):
        return size + index
    raise Unread(f"the sign of index {index} is not proved")


def _slice(operands: Operands, entry: slice, size: sympy.Expr, extent: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """Start and step of a slice of a dimension of ``size`` that keeps ``extent`` entries."""
    step = operands.integer(1 if entry.step is None else entry.step)
    start = operands.integer(0 if entry.start is None else entry.start)
    if provably_nonnegative(start):
        return start, step
    if entry.stop is None and step == 1:
        return size - extent, step  # whatever was clamped, the slice ends at the end
    return _nonnegative(start, size), step


def _gather(operands: Operands, source: SymbolicTensor, index: list[Any], out: SymbolicTensor) -> Element:
    """Indexing by tensors: whole dimensions first, then one tensor for each of the next dimensions."""
    whole = 0
    while isinstance(index[whole], slice) and index[whole] == slice(None):
        whole += 1
    tensors = [operands.tensor(n) for n in index[whole:] if isinstance(n, fx.Node)]
    if len(tensors) != len(index) - whole or whole + len(tensors) > len(source.shape):
        raise Unread("index tensors mixed with slices, numbers or None")
    trailing = len(source.shape) - whole - len(tensors)
    broadcast = out.shape[whole : len(out.shape) - trailing]
    mapping: dict[sympy.Symbol, sympy.Expr] = {}
    for n, tensor in enumerate(tensors):
        expr = position_of(align(tensor, broadcast))
        if expr is None or not provably_nonnegative(expr):
            raise Unread("an index tensor is not a range of non-negative positions")
        shifted = {axis(k): axis(k + trailing) for k in range(len(broadcast))}
        if source.shape[whole + n] != 1:
            mapping[axis(len(source.shape) - 1 - whole - n)] = expr.xreplace(shifted)
    for n in range(whole):
        mapping[axis(len(source.shape) - 1 - n)] = axis(len(out.shape) - 1 - n)
    return reindex(source.element, mapping)


@MOVEMENT.of("index")
def _index(operands: Operands, node: fx.Node, out: SymbolicTensor) -> Element:
    source, index = bind(node, "input indices")
    if not isinstance(index, (tuple, list)):
        raise Unread("unexpected arguments")
    return _gather(operands, operands.tensor(source), [slice(None) if n is None else n for n in index], out)


@MOVEMENT.of("_add_batch_dim")
def _hide(operands: Operands, node: fx.Node, out: SymbolicTensor) -> Element:
    """``vmap`` takes one dimension out of sight."""
    source, dim, level = bind(node, "input dim level")
    tensor = operands.tensor(source)
    if not isinstance(dim, int) or not isinstance(level, int) or not tensor.shape:
        raise Unread("unexpected arguments")
    rank = len(tensor.shape)
    kept = [n for n in range(rank) if n != dim % rank]
    places: dict[sympy.Symbol, sympy.Expr] = {axis(rank - 1 - dim % rank): hidden_axis(level)}
    places |= {axis(rank - 1 - old): axis(rank - 2 - new) for new, old in enumerate(kept)}
    return reindex(tensor.element, places)


@MOVEMENT.of("_remove_batch_dim")
def _show(operands: Operands, node: fx.Node, out: SymbolicTensor) -> Element:
    """``vmap`` brings a hidden dimension back."""
    source, level, _, dim = bind(node, "input level size dim")
    tensor = operands.tensor(source)
    if not isinstance(dim, int) or not isinstance(level, int) or len(out.shape) != len(tensor.shape) + 1:
        raise Unread("unexpected arguments")
    rank = len(out.shape)
    kept = [n for n in range(rank) if n != dim % rank]
    places: dict[sympy.Symbol, sympy.Expr] = {hidden_axis(level): axis(rank - 1 - dim % rank)}
    places |= {axis(rank - 2 - old): axis(rank - 1 - new) for old, new in enumerate(kept)}
    return reindex(tensor.element, places)


@MOVEMENT.of("cat", "concat", "concatenate")
def _cat(operands: Operands, node: fx.Node, out: SymbolicTensor) -> Element:
    tensors, dim = bind(node, "tensors dim", dim=0)
    if not isinstance(dim, int) or not isinstance(tensors, (tuple, list)):
        raise Unread("unexpected arguments")
    place = len(out.shape) - 1 - dim % len(out.shape)
    where, start = axis(place), sympy.Integer(0)
    pieces: list[tuple[SymbolicTensor, sympy.Expr]] = []
    for piece in (operands.tensor(t) for t in tensors):
        if len(piece.shape) != len(out.shape):
            raise Unread("operands of different rank")
        moved = SymbolicTensor(piece.shape, piece.dtype, reindex(piece.element, {where: where - start}))
        start = start + piece.shape[-1 - place]
        pieces.append((SymbolicTensor(out.shape, out.dtype, cast(moved, out.dtype)), start))
    result = pieces[-1][0]
    for tensor, stop in reversed(pieces[:-1]):
        result = SymbolicTensor(out.shape, out.dtype, select(AtLeastZero(stop - 1 - where), tensor, result, out))
    return result.element
