"""Replace every prefill attention by ``mmi::attention``."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mmi_compile.decision import GROUPED_ATTENTION, Decision, Reason
from mmi_compile.kernels import grouped_ops, groups  # noqa: F401  registers mmi::row_bounds
from mmi_compile.kernels.layer_heads import names_to_text
from mmi_compile.kernels.ops import ABI
from mmi_compile.options import Options
from mmi_compile.passes.base import AttentionSite, PassContext
from mmi_compile.passes.classify_phase import offset_is_suffix
from mmi_compile.passes.dataflow import cone
from mmi_compile.passes.mask_fact import MaskFact, MaskGroup, Term
from mmi_compile.passes.nodes import argument, insert_call, is_call, same, tensor_of


@dataclass(frozen=True)
class Rewrite:
    """The mask is not an argument any more; what it was proved to mean is.

    ::

        scaled_dot_product_attention(q, k, v, attn_mask=mask[B, 1, S, S])
        → mmi.attention(q, k, v, key_padding[B, S], key_bounds[B, 3], modality[B, S], segments, scale, offset, …)
    """

    name: str = "rewrite"

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        shared: dict[Any, fx.Node] = {}
        # In graph order: what layers share is inserted before the first of them.
        position = {node: i for i, node in enumerate(gm.graph.nodes)}
        for site in sorted(context.open_sites(), key=lambda site: position[site.node]):
            context.dead_candidates |= cone(gm.graph, [site.node])
            old = site.node
            _rewrite(site, context, shared)
            _follow(old, site.node, context)
            context.changed = True


def _rewrite(site: AttentionSite, context: PassContext, shared: dict[Any, fx.Node]) -> None:
    options, fact, node = context.options, site.mask_fact, site.node
    assert fact is not None
    padding = bounds = None
    if fact.padding is not None:
        padding = _padding(fact.padding, fact.padding_hides, shared, node)
        bounds = _once(shared, ("bounds", padding), node, torch.ops.mmi.key_bounds.default, padding)
    offset = _offset(site, shared)
    if fact.clauses:
        return _rewrite_grouped(site, shared, padding, bounds, offset)
    modality = _modality(site, context, shared)
    if not site.policy:  # the pass that assigns it was skipped
        site.policy = "exact" if options.policy == "config" else options.policy
        site.fallback = (Reason.SKIPPED, "assign_patterns") if options.policy == "config" else None
    segments = _segments(site, context, shared, (padding, bounds, offset), modality)
    new = insert_call(
        node, torch.ops.mmi.attention.default, site.q, site.k, site.v, padding, bounds, modality, segments,
        _scale(site), offset, 0 if fact.window is None else int(fact.window), site.policy,
        float(options.recall), float(options.max_density), _min_tokens(options), options.dense_tail,
        "" if site.heads is None else site.heads.to_text(), site.index, _layout(node), site.key, ABI,
        *_asked(options, ",".join(_boundaries(site, options))),
    )  # fmt: skip
    _replace(site, new, "mmi::attention")
    return None


def _padding(node: fx.Node, hides: bool, shared: dict[Any, fx.Node], before: fx.Node) -> fx.Node:
    """A padding ``[B, N]`` or ``[B, 1, 1, N]`` as ``[B, N]``, non-zero where a key is live."""
    tensor = tensor_of(node)
    assert tensor is not None, "what is proved has a traced value"
    if tensor.dim() == 4:
        node = _once(shared, ("padding", node), before, operator.getitem, node, (slice(None), 0, 0))
    return _once(shared, ("live", node), before, torch.logical_not, node) if hides else node


def _replace(site: AttentionSite, new: fx.Node, operator_name: str) -> None:
    reason, detail = site.fallback or (None, "")
    what = f"{operator_name}, {site.pattern}, {site.mask_fact}"
    site.decision = Decision(rewritten=True, what=what, reason=reason, detail=detail)
    site.node.replace_all_uses_with(new)
    site.node = new


def _rewrite_grouped(
    site: AttentionSite, shared: dict[Any, fx.Node], padding: fx.Node | None, bounds: fx.Node | None,
    offset: int | fx.Node,
) -> None:  # fmt: skip
    """The mask as an interval per row, which all layers share, and an exact attention over it."""
    fact, node = site.mask_fact, site.node
    assert fact is not None
    site.policy, site.pattern = "exact", "dense"
    text, found = _clauses(fact), list(fact.groups)
    sizes = [_size(shared, *place, node) for place in ((site.q, 0), (site.q, 2), (site.k, 2))]
    rows = _once(
        shared, ("rows", text, tuple(found), *sizes, offset), node, torch.ops.mmi.row_bounds.default,
        [group.node for group in found], text, [group.together for group in found], *sizes, offset, ABI,
    )  # fmt: skip
    new = insert_call(
        node, torch.ops.mmi.grouped_attention.default, site.q, site.k, site.v, padding, bounds, rows, text,
        _scale(site), offset, _layout(node), site.key, ABI,
    )  # fmt: skip
    _replace(site, new, GROUPED_ATTENTION)


def _clauses(fact: MaskFact) -> str:
    """The whole mask but its padding."""
    plain: list[list[groups.Term]] = [[groups.CAUSAL]] if fact.causal else []
    if fact.window is not None:
        plain.append([groups.Window(int(fact.window))])
    return groups.clauses_to_text([*plain, *([_term(term, fact) for term in clause] for clause in fact.clauses)])


def _term(term: Term, fact: MaskFact) -> groups.Term:
    if isinstance(term, MaskGroup):
        return groups.Same(fact.groups.index(term), term.least)
    return groups.CAUSAL if isinstance(term, str) else groups.Window(int(term))


def _follow(old: fx.Node, new: fx.Node, context: PassContext) -> None:
    """An attention may read another one's output directly: what was noted of it must not keep the old node alive."""
    for site in context.open_sites():
        for name in ("q", "k", "v"):
            if getattr(site, name) is old:
                setattr(site, name, new)


def _asked(options: Options, boundaries: str) -> tuple[Any, ...]:
    """``verify``, ``min_recall``, ``guard_rows`` and ``boundaries``, as far as they ask for anything."""
    guard = float(options.verify), float(options.min_recall or 0), options.guard_rows
    if boundaries:
        return (*guard, boundaries)
    return guard if options.verify or options.min_recall is not None else ()


def _boundaries(site: AttentionSite, options: Options) -> tuple[str, ...]:
    """Boundaries that the policy may choose beside ``none``."""
    return tuple(name for name in options.boundaries if name != "none") if site.policy == "adaptive" else ()


def _min_tokens(options: Options) -> int:
    return -1 if options.min_tokens is None else options.min_tokens


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
    assert fact is not None, "an open site has a proved mask"
    assert q is not None, "find_attention closes sites without tensors"
    assert k is not None, "find_attention closes sites without tensors"
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
    batch = _size(shared, site.q, 0, site.node)
    key = ("modality", batch, kv_len)
    if key not in shared:
        begun = [n for n in site.node.graph.nodes if is_call(n, (torch.ops.mmi.begin_prompt.default,))]
        shared[key] = insert_call(
            site.node, torch.ops.mmi.modality.default, site.q, fact.masks, ",".join(fact.labels),
            begun[0] if begun else None, batch, kv_len, context.graph_key,
        )  # fmt: skip
    return shared[key]


def _segments(
    site: AttentionSite, context: PassContext, shared: dict[Any, fx.Node], masked: tuple[Any, Any, Any],
    modality: fx.Node,
) -> fx.Node | list[fx.Node]:  # fmt: skip
    """The prompt grouped by modality, for all layers of the graph whose heads need it; no tensors for the others."""
    if site.heads is not None and site.heads.bounded:
        modalities = site.heads.modalities
    elif _boundaries(site, context.options):
        modalities = ()
    else:
        return []
    q = tensor_of(site.q)
    assert q is not None
    padding, bounds, offset = masked
    # Tiles, and with them the sizes of the tensors, follow from device, dtype and head dim.
    key = ("segments", padding, offset, modality, str(q.shape[2]), q.dtype, q.device, int(q.shape[3]), modalities)
    return _once(
        shared, key, site.node, torch.ops.mmi.segments.default, site.q, modality, padding, bounds, offset,
        names_to_text(modalities), context.graph_key, ABI,
    )  # fmt: skip


def _scale(site: AttentionSite) -> Any:
    """SDPA's default is ``1 / sqrt(head_dim)``."""
    if site.scale is not None:
        return site.scale if isinstance(site.scale, fx.Node) else float(site.scale)
    q = tensor_of(site.q)
    assert q is not None
    return float(q.shape[3]) ** -0.5


def _layout(node: fx.Node) -> str:
    """Memory order of the output. ``[B, S, H, D]`` saves the copy that follows in nearly every model; ``[B, H, S, D]``
    is kept where the old output had it and something else than such a copy might count on it."""
    old = tensor_of(node)
    if old is None or _is_contiguous(old.transpose(1, 2)):
        return "bshd"
    return "bshd" if node.users and all(_is_swap_before_copy(user) for user in node.users) else "bhsd"


def _is_contiguous(tensor: torch.Tensor) -> bool:
    """Contiguous for every input; adds no guard."""
    expected: Any = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not same(size, 1) and not same(stride, expected):
            return False
        expected = expected * size
    return True


def _is_swap_before_copy(node: fx.Node) -> bool:
    if is_call(node, (torch.transpose,), ("transpose",)):
        swaps = sorted(d % 4 for d in node.args[1:] if isinstance(d, int)) == [1, 2]
    else:
        order = argument(node, 1, "dims") if is_call(node, (torch.permute,), ("permute",)) else None
        swaps = list(order if isinstance(order, (tuple, list)) else node.args[1:]) == [0, 2, 1, 3]
    copies = ("contiguous", "reshape", "flatten")
    return swaps and all(is_call(user, (torch.reshape, torch.flatten), copies) for user in node.users)
