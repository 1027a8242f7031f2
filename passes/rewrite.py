"""Replace every prefill attention by ``mmi::attention``."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mmi_compile.decision import Decision
from mmi_compile.kernels.ops import ABI
from mmi_compile.passes.base import AttentionSite, PassContext
from mmi_compile.passes.classify_phase import offset_is_suffix
from mmi_compile.passes.dataflow import cone
from mmi_compile.passes.nodes import insert_call, is_call, tensor_of

@dataclass(frozen=True)
class Rewrite:
    """The mask is not an argument any more; what it was proved to mean is.

    ::

        scaled_dot_product_attention(q, k, v, attn_mask=mask[B, 1, S, S])
        → mmi.attention(q, k, v, key_padding[B, S], key_bounds[B, 3], modality[B, S], scale, offset, window, …)
    """

    name: str = "rewrite"

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        shared: dict[Any, fx.Node] = {}
        for site in context.open_sites():
            context.dead_candidates |= cone(gm.graph, [site.node])
            _rewrite(site, context, shared)
            context.changed = True


def _rewrite(site: AttentionSite, context: PassContext, shared: dict[Any, fx.Node]) -> None:
    options, fact, node = context.options, site.mask_fact, site.node
    assert fact is not None
    padding = bounds = None
    if fact.padding is not None:
        padding = fact.padding
        bounds = _once(shared, ("bounds", padding), node, torch.ops.mmi.key_bounds.default, padding)
    offset = _offset(site, shared)
    modality = _modality(site, context, shared)
    new = insert_call(
        node, torch.ops.mmi.attention.default, site.q, site.k, site.v, padding, bounds, modality,
        _scale(site), offset, 0 if fact.window is None else int(fact.window), options.policy,
        float(options.recall), float(options.max_density), options.min_tokens, _layout(node), site.key, ABI,
    )  # fmt: skip
    site.decision = Decision(rewritten=True, what=f"mmi::attention, {site.pattern}, {fact}")
    node.replace_all_uses_with(new)
    site.node = new


def _once(shared: dict[Any, fx.Node], key: Any, before: fx.Node, target: Any, *args: Any) -> fx.Node:
    """What is equal for all layers is computed once per graph, before the first of them."""
    if key not in shared:
        shared[key] = insert_call(before, target, *args)
    return shared[key]


def _size(shared: dict[Any, fx.Node], node: fx.Node, dim: int, before: fx.Node) -> int | fx.Node:
    tensor = tensor_of(node)
    assert tensor is not None
    size = tensor.shape[dim]
    if isinstance(size, int):
        return size
    return _once(shared, ("size", str(size)), before, torch.ops.aten.sym_size.int, node, dim)


def _offset(site: AttentionSite, shared: dict[Any, fx.Node]) -> int | fx.Node:
    fact, q, k = site.mask_fact, tensor_of(site.q), tensor_of(site.k)
    assert fact is not None and q is not None and k is not None
    if fact.offset.is_Integer:
        return int(fact.offset)
    assert offset_is_suffix(fact.offset, q.shape[2], k.shape[2])
    q_len = _size(shared, site.q, 2, site.node)
    kv_len = _size(shared, site.k, 2, site.node)
    return _once(shared, ("offset", q_len, kv_len), site.node, operator.sub, kv_len, q_len)


def _modality(site: AttentionSite, context: PassContext, shared: dict[Any, fx.Node]) -> fx.Node:
    """One int8 ``[B, kv_len]`` tensor of modality ids for all layers of the graph."""
    fact = context.modality
    kv_len = _size(shared, site.k, 2, site.node)
    key = ("modality", kv_len)
    if key not in shared:
        batch = _size(shared, site.q, 0, site.node)
        begun = [n for n in site.node.graph.nodes if is_call(n, (torch.ops.mmi.begin_prompt.default,))]
        shared[key] = insert_call(
            site.node, torch.ops.mmi.modality.default, site.q, fact.masks, ",".join(fact.labels),
            begun[0] if begun else None, batch, kv_len, context.graph_key,
        )  # fmt: skip
    return shared[key]


def _scale(site: AttentionSite) -> Any:
    """SDPA's default is ``1 / sqrt(head_dim)``."""
    if site.scale is not None:
        return site.scale if isinstance(site.scale, fx.Node) else float(site.scale)
    q = tensor_of(site.q)
    assert q is not None
    return float(q.shape[3]) ** -0.5


def _layout(node: fx.Node) -> str:
    """Memory order of the output. ``[B, S, H, D]`` saves the copy that follows in nearly every model, but a reader
    that calls ``view`` may count on the strides that the original call gave."""
    return "bhsd" if any(is_call(user, methods=("view",)) for user in node.users) else "bshd"
