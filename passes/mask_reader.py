"""Abstract interpretation: what every element of a mask tensor is, as an expression over its indices.

Each operator has one transfer function. Where none applies, the tensor itself becomes the atom: "the data of this
node at these indices" is always a true statement about it, and the reason is remembered for whoever asks why.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy
import torch
from torch import fx

from mmi_compile.passes.mask_aliasing import Changes
from mmi_compile.passes.mask_elements import Unread, axes
from mmi_compile.passes.mask_makers import MAKERS
from mmi_compile.passes.mask_movement import MOVEMENT
from mmi_compile.passes.mask_operators import Operands, Transfer, operator_name
from mmi_compile.passes.mask_pointwise import POINTWISE
from mmi_compile.passes.mask_scans import SCANS
from mmi_compile.passes.mask_symbols import (
    Datum,
    Element,
    Live,
    SymbolicTensor,
    Truth,
    axis,
    example,
    hidden_axis,
    reindex,
    symbolic,
)
from mmi_compile.passes.nodes import hidden_levels

TRANSFERS: Mapping[str, Transfer] = {**MAKERS, **MOVEMENT, **POINTWISE, **SCANS}
# Operators whose result never shares memory with an argument.
FRESH = frozenset([*MAKERS, *POINTWISE, "clone"]) - {"tensor", "scalar_tensor"}


class Unsound(Exception):
    """Nothing may be concluded at all, for the reason given (data changed in place, no traced value)."""


class Reader:
    """Reads the tensors of one graph; each node is read once."""

    def __init__(self, graph: fx.Graph) -> None:
        self._changes = Changes(graph, FRESH)
        self._memo: dict[fx.Node, SymbolicTensor] = {}
        self._operands = Operands(self._memo)
        self.reasons: dict[str, str] = {}

    @property
    def known(self) -> dict[fx.Node, SymbolicTensor]:
        """Every node read so far, inputs first."""
        return self._memo

    def read(self, node: fx.Node) -> SymbolicTensor:
        """What the elements of ``node`` are.

        Raises:
            Unsound: some tensor on the way changes in place, or has no traced value.
        """
        stack = [node]
        while stack:
            top = stack[-1]
            if top in self._memo:
                stack.pop()
                continue
            pending = [n for n in self._inputs(top) if n not in self._memo]
            if pending:
                stack.extend(pending)
            else:
                self._memo[top] = self._evaluate(top)
                stack.pop()
        return self._memo[node]

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        if operator_name(node) not in TRANSFERS:
            return []
        return [n for n in node.all_input_nodes if isinstance(example(n), torch.Tensor)]

    def _evaluate(self, node: fx.Node) -> SymbolicTensor:
        value = example(node)
        if not isinstance(value, torch.Tensor):
            raise Unsound(f"`{node.name}` has no traced tensor value")
        if value.layout is not torch.strided:
            raise Unsound(f"`{node.name}` is not a strided tensor")
        if self._changes.touch(node):
            raise Unsound(f"`{node.name}` is changed in place")
        try:
            shape = tuple(symbolic(size) for size in value.shape)
        except TypeError as error:
            raise Unsound(f"`{node.name}` has a size that is {error}") from None
        index = (*axes(shape), *(hidden_axis(level) for level in hidden_levels(value)))
        atom: Element = Datum(node.name, index, not (value.is_floating_point() or value.is_complex()))
        if value.dtype is torch.bool:
            atom = Truth(Live(node.name, *index))
        result = SymbolicTensor(shape, value.dtype, atom)
        name = operator_name(node)
        if name not in TRANSFERS:
            self.reasons[node.name] = _why_not_read(node)
            return result
        try:
            element = TRANSFERS[name](self._operands, node, result)
        except Unread as reason:
            self.reasons[node.name] = f"`{name}`, which is not read: {reason}"
            return result
        single = {axis(n): sympy.Integer(0) for n, size in enumerate(reversed(shape)) if size == 1}
        return SymbolicTensor(shape, value.dtype, reindex(element, single))


def _why_not_read(node: fx.Node) -> str:
    if node.op in ("placeholder", "get_attr"):
        return "an input of the graph"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    return f"`{name}`, which is not read"
