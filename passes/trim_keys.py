"""Drop keys that no query may see, so that a prompt in a cache with room to spare looks like any other."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from mmi_compile.passes.base import AttentionSite, PassContext
from mmi_compile.passes.find_attention import describe_shapes
from mmi_compile.passes.mask_algebra import symbolic
from mmi_compile.passes.nodes import has_room, insert_call, same, tensor_of, value_of


@dataclass(frozen=True)
class TrimKeys:
    """Behind the last query's position, causality hides every key: a static cache holds such keys from the start.

    ::

        attention(q[B, H, 16, D], k[B, H, 4096, D], v, causal with offset s)
        → attention(q, k[:, :, : s + 16], v[:, :, : s + 16], causal with offset s)

    The offset is then ``kv_len - q_len``, whatever the cache's room, and prompt and keys are equally long at the first
    use of a cache. Decode steps stay as they are.
    """

    name: str = "trim_keys"

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        known = set(gm.graph.nodes)
        made: dict[Any, fx.Node] = {}
        # In graph order: what layers share is inserted before the first of them.
        position = {node: i for i, node in enumerate(gm.graph.nodes)}
        for site in sorted(context.open_sites(), key=lambda site: position[site.node]):
            _trim(site, made)
        # They go again unless a rewritten attention reads them.
        context.dead_candidates |= set(gm.graph.nodes) - known


def _trim(site: AttentionSite, made: dict[Any, fx.Node]) -> None:
    fact, q, k = site.mask_fact, tensor_of(site.q), tensor_of(site.k)
    if fact is None or not (fact.known and fact.causal) or q is None or k is None or same(q.shape[2], 1):
        return
    end, kv_len = sympy.expand(fact.offset + symbolic(q.shape[2])), symbolic(k.shape[2])
    if sympy.expand(kv_len - end).is_nonpositive:
        return
    stop = _size(end, site.node, made)
    if stop is None or not (has_room(value_of(stop) - q.shape[2]) and has_room(k.shape[2] - value_of(stop))):
        return
    for name in ("k", "v"):
        whole = getattr(site, name)
        if (whole, stop) not in made:
            index = (slice(None), slice(None), slice(None, stop))
            made[whole, stop] = insert_call(site.node, operator.getitem, whole, index)
        setattr(site, name, made[whole, stop])
    site.shapes = describe_shapes(site)


def _size(expr: sympy.Expr, before: fx.Node, made: dict[Any, fx.Node]) -> int | fx.Node | None:
    """A sum of the graph's sizes as a number or a node; None where it is something else, or no node has a size."""
    if expr.is_Integer:
        return int(expr)
    if expr in made:
        return made[expr]
    constant, rest = expr.as_coeff_Add()
    total: int | fx.Node = int(constant)
    for term in sympy.Add.make_args(rest):
        factor, symbol = term.as_coeff_Mul()
        node = _symbol(symbol, before, made)
        if node is None or not factor.is_Integer or not constant.is_Integer:
            return None
        part = node if factor == 1 else insert_call(before, operator.mul, node, int(factor))
        total = part if total == 0 else insert_call(before, operator.add, total, part)
    assert isinstance(total, fx.Node)
    made[expr] = total
    return total


def _symbol(symbol: sympy.Expr, before: fx.Node, made: dict[Any, fx.Node]) -> fx.Node | None:
    """A node whose value is ``symbol``: a size that the graph is given, or that one of its inputs has."""
    if symbol not in made:
        for node in before.graph.find_nodes(op="placeholder"):
            value = value_of(node)
            if isinstance(value, torch.SymInt) and value.node.expr == symbol:
                made[symbol] = node
            elif isinstance(value, torch.Tensor):
                for dim, size in enumerate(value.shape):
                    if symbol not in made and isinstance(size, torch.SymInt) and size.node.expr == symbol:
                        made[symbol] = insert_call(before, torch.ops.aten.sym_size.int, node, dim)
    return made.get(symbol)
