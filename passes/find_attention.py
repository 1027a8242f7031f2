"""Find attention by what it computes: SDPA calls, and ``matmul → softmax → matmul`` written out by hand."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mmi_compile.decision import Reason
from mmi_compile.passes.base import AttentionSite, PassContext
from mmi_compile.passes.canonicalize import SDPA
from mmi_compile.passes.dataflow import mutated_between
from mmi_compile.passes.location import layer_of, module_of, source_of
from mmi_compile.passes.nodes import argument, insert_call, is_call, same, tensor_of, value_of

_MATMUL = (torch.matmul, torch.bmm, operator.matmul)
_MATMUL_METHODS = ("matmul", "bmm", "__matmul__")
_SOFTMAX = (torch.nn.functional.softmax, torch.softmax)
_ADD = (operator.add, torch.add)
_MULTIPLY = (operator.mul, torch.mul)
_DIVIDE = (operator.truediv, torch.div, torch.true_divide)
_CASTS = ("to", "float", "half", "bfloat16", "type_as")


@dataclass(frozen=True)
class FindAttention:
    """Make an :class:`AttentionSite` of every attention, with grouped heads recognised behind ``repeat_kv``.

    ::

        scores = q @ k.transpose(2, 3) * scale + mask
        out = softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
        → one site with q, k, v, mask, scale
        k = kv[:, :, None].expand(B, HKV, n, S, D).reshape(B, HKV * n, S, D)
        → the site's k is kv: the kernel shares it between n query heads
    """

    name: str = "find_attention"

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        for node in list(gm.graph.nodes):
            site = _from_sdpa(node) or _from_softmax(node)
            if site is None:
                continue
            _describe(site, context)
            _check_shapes(site)
            if site.open:
                _fold_repeated_heads(site)
            site.shapes = _shapes(site)
            context.sites.append(site)


def _from_sdpa(node: fx.Node) -> AttentionSite | None:
    if not is_call(node, (SDPA,)):
        return None
    q, k, v = node.args
    if not (isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)):
        return None
    causal = value_of(node.kwargs["is_causal"])
    site = AttentionSite(
        node=node, q=q, k=k, v=v, form="sdpa", mask=node.kwargs["attn_mask"], is_causal=causal is True,
        scale=node.kwargs["scale"], dropout_p=node.kwargs["dropout_p"],
    )  # fmt: skip
    if not isinstance(causal, bool):
        site.leave(Reason.UNKNOWN_MASK, "is_causal is not a constant")
    return site


# --- matmul → softmax → matmul -----------------------------------------------------------------------------------


def _from_softmax(node: fx.Node) -> AttentionSite | None:
    if not is_call(node, _SOFTMAX, ("softmax",)) or not isinstance(node.args[0], fx.Node):
        return None
    scores = tensor_of(node.args[0])
    if scores is None or argument(node, 1, "dim") not in (-1, scores.dim() - 1):
        return None
    found = _read_scores(node.args[0])
    weights, output, dropout_p = _follow_weights(node)
    if found is None:
        return None
    q, k, mask, scale = found
    if output is None:
        # Something reads the weights; it is attention only if one of the readers multiplies them with values.
        if not any(_weights_times_values(user, weights) for user in weights.users):
            return None
        output = next(user for user in weights.users if _weights_times_values(user, weights))
        site = AttentionSite(node=output, q=q, k=k, v=output.args[1], form="eager", mask=mask, scale=scale)
        site.leave(Reason.WEIGHTS_USED, f"read by {', '.join(u.name for u in weights.users if u is not output)}")
        return site
    return AttentionSite(
        node=output, q=q, k=k, v=output.args[1], form="eager", mask=mask, scale=scale, dropout_p=dropout_p
    )


def _follow_weights(softmax: fx.Node) -> tuple[fx.Node, fx.Node | None, Any]:
    """Walk from the softmax through casts and dropout to ``weights @ v``; None where someone else reads the weights."""
    node, dropout_p = softmax, 0.0
    while len(node.users) == 1:
        user = next(iter(node.users))
        if _weights_times_values(user, node):
            return node, user, dropout_p
        if is_call(user, methods=(*_CASTS, "contiguous")):
            node = user
        elif is_call(user, (torch.nn.functional.dropout, torch.dropout)) and user.args[0] is node:
            dropout_p = argument(user, 1, "p", 0.5)
            node = user
        else:
            break
    return node, None, dropout_p


def _weights_times_values(node: fx.Node, weights: fx.Node) -> bool:
    return (
        is_call(node, _MATMUL, _MATMUL_METHODS)
        and len(node.args) == 2
        and node.args[0] is weights
        and isinstance(node.args[1], fx.Node)
    )


def _read_scores(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, Any] | None:
    """``q, k, mask, scale`` of ``cast(q @ kᵀ · scale + mask)``; every part but the product may be missing."""
    node = _skip_casts(node)
    mask: fx.Node | None = None
    masked = _split_mask(node)
    if masked is not None:
        node, mask = masked
    scale: Any = 1.0
    scaled = _split_scale(_skip_casts(node))
    if scaled is not None:
        node, scale = scaled
    product = _skip_casts(node)
    if not is_call(product, _MATMUL, _MATMUL_METHODS) or len(product.args) != 2:
        return None
    q, transposed = product.args
    k = _untranspose(transposed)
    if not isinstance(q, fx.Node) or k is None:
        return None
    return q, k, mask, scale


def _skip_casts(node: fx.Node) -> fx.Node:
    while is_call(node, methods=_CASTS) and isinstance(node.args[0], fx.Node) and len(node.users) == 1:
        node = node.args[0]
    return node


def _split_mask(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """``(scores, mask)`` of an additive, filled or selected mask. A keep-mask is made where the graph has its
    opposite, so that the mask is always what SDPA would take."""
    if is_call(node, _ADD, ("add", "add_")) and len(node.args) == 2 and not node.kwargs:
        for scores, mask in (node.args, node.args[::-1]):
            if isinstance(scores, fx.Node) and isinstance(mask, fx.Node) and _is_scores(scores):
                return scores, mask
        return None
    if is_call(node, (torch.masked_fill,), ("masked_fill", "masked_fill_")) and len(node.args) == 3:
        scores, hidden, fill = node.args
        if isinstance(scores, fx.Node) and isinstance(hidden, fx.Node) and _hides(fill, node):
            return scores, insert_call(node, torch.logical_not, hidden)
        return None
    if is_call(node, (torch.where,)) and len(node.args) == 3:
        keep, scores, fill = node.args
        if isinstance(keep, fx.Node) and isinstance(scores, fx.Node) and _is_scores(scores) and _hides(fill, node):
            return scores, keep
    return None


def _hides(fill: Any, scores: fx.Node) -> bool:
    tensor = tensor_of(scores)
    return (
        isinstance(fill, float)
        and tensor is not None
        and tensor.dtype.is_floating_point
        and fill <= torch.finfo(tensor.dtype).min
    )


def _is_scores(node: fx.Node) -> bool:
    node = _skip_casts(node)
    scaled = _split_scale(node)
    product = _skip_casts(scaled[0]) if scaled is not None else node
    return is_call(product, _MATMUL, _MATMUL_METHODS)


def _split_scale(node: fx.Node) -> tuple[fx.Node, Any] | None:
    """``(scores, scale)`` of ``scores * scale``, ``scale * scores`` or ``scores / divisor``."""
    if len(node.args) != 2 or node.kwargs:
        return None
    if is_call(node, _MULTIPLY, ("mul",)):
        for scores, scale in (node.args, node.args[::-1]):
            if isinstance(scores, fx.Node) and _is_scalar(scale):
                return scores, scale
    elif is_call(node, _DIVIDE, ("div",)):
        scores, divisor = node.args
        if isinstance(scores, fx.Node) and isinstance(divisor, (int, float)) and divisor != 0:
            return scores, 1.0 / divisor
    return None


def _is_scalar(value: Any) -> bool:
    return isinstance(value_of(value), (int, float, torch.SymFloat)) and not isinstance(value_of(value), bool)


def _untranspose(node: Any) -> fx.Node | None:
    """``k`` of ``k.transpose(-1, -2)``, ``k.mT`` or a ``permute`` that swaps the last two dimensions."""
    tensor = tensor_of(node)
    if tensor is None or not isinstance(node, fx.Node):
        return None
    rank, last = tensor.dim(), {tensor.dim() - 2, tensor.dim() - 1}
    if is_call(node, (torch.transpose, torch.swapaxes), ("transpose", "swapaxes")):
        dims = {argument(node, 1, "dim0"), argument(node, 2, "dim1")}
        if {d % rank for d in dims if isinstance(d, int)} == last and isinstance(node.args[0], fx.Node):
            return node.args[0]
    if is_call(node, (torch.permute,), ("permute",)):
        dims_list = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        if [d % rank for d in dims_list] == [*range(rank - 2), rank - 1, rank - 2]:
            return node.args[0]  # type: ignore[return-value]
    if node.op == "call_function" and node.target is getattr and node.args[1] in ("mT", "T"):
        return node.args[0] if node.args[1] == "mT" and isinstance(node.args[0], fx.Node) else None
    return None


# --- shapes and grouped heads ------------------------------------------------------------------------------------


def _describe(site: AttentionSite, context: PassContext) -> None:
    site.where = module_of(site.node)
    site.layer = layer_of(site.node)
    site.source = source_of(site.node)
    site.key = f"{context.graph_key}/{len(context.sites)}"


def _check_shapes(site: AttentionSite) -> None:
    q, k, v = tensor_of(site.q), tensor_of(site.k), tensor_of(site.v)
    if q is None or k is None or v is None:
        return site.leave(Reason.SHAPE, "an operand is not a tensor")
    if not q.dim() == k.dim() == v.dim() == 4:
        return site.leave(Reason.SHAPE, f"ranks {q.dim()}, {k.dim()}, {v.dim()}")
    # That k and v are equally long needs no proof (their sizes may carry different symbols): the call itself demands it.
    if not (same(k.shape[1], v.shape[1]) and same(q.shape[3], k.shape[3])):
        return site.leave(Reason.SHAPE, f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit q {tuple(q.shape)}")
    if not (same(q.shape[0], k.shape[0]) and same(q.shape[0], v.shape[0])):
        return site.leave(Reason.SHAPE, "batch sizes differ")
    if not (same(q.shape[1], k.shape[1]) or _divides(k.shape[1], q.shape[1])):
        return site.leave(Reason.SHAPE, f"{q.shape[1]} query heads over {k.shape[1]} key heads")
    return None


def _divides(small: Any, large: Any) -> bool:
    return isinstance(small, int) and isinstance(large, int) and small > 0 and large % small == 0


def _fold_repeated_heads(site: AttentionSite) -> None:
    k, v = _unrepeat(site.k, site.node), _unrepeat(site.v, site.node)
    if k is not None and v is not None and tensor_of(k).shape[1] == tensor_of(v).shape[1]:  # type: ignore[union-attr]
        site.k, site.v = k, v


def _unrepeat(node: fx.Node, attention: fx.Node) -> fx.Node | None:
    """``kv`` when ``node`` repeats each head of ``kv`` a whole number of times in place."""
    out = tensor_of(node)
    chain = list(_view_chain(node))
    base = chain[-1]
    first = chain[-2] if len(chain) > 1 else None
    x = tensor_of(base)
    if out is None or x is None or first is None or mutated_between(first, attention, base):
        return None
    return base


def _view_chain(node: fx.Node) -> Iterator[fx.Node]:
    """``node`` and, if it repeats heads, the nodes down to the tensor whose heads are repeated."""
    yield node
    if is_call(node, (torch.repeat_interleave,), ("repeat_interleave",)):
        source, out = node.args[0], tensor_of(node)
        if argument(node, 2, "dim") in (1, -3) and isinstance(argument(node, 1, "repeats"), int) and out is not None:
            yield source  # type: ignore[misc]
        return
    if not is_call(node, (torch.reshape,), ("reshape", "view", "flatten")):
        return
    expanded = node.args[0]
    if not is_call(expanded, (), ("expand", "repeat")):
        return
    inserted = expanded.args[0]  # type: ignore[union-attr]
    source = inserted.args[0] if isinstance(inserted, fx.Node) and inserted.args else None
    shapes = [tensor_of(n) for n in (node, expanded, inserted, source)]
    if any(s is None for s in shapes):
        return
    out, wide, thin, base = (list(s.shape) for s in shapes)  # type: ignore[union-attr]
    if not (len(out) == 4 and len(wide) == 5 and len(thin) == 5 and len(base) == 4):
        return
    inserts = is_call(inserted, (operator.getitem, torch.unsqueeze), ("unsqueeze",))
    repeats_only_new = all(same(w, t) for d, (w, t) in enumerate(zip(wide, thin, strict=True)) if d != 2)
    keeps_base = all(same(a, b) for a, b in zip([*thin[:2], *thin[3:]], base, strict=True)) and same(thin[2], 1)
    merges = same(out[1], wide[1] * wide[2]) and all(same(out[d], base[d]) for d in (0, 2, 3))
    if inserts and _inserts_at_two(inserted) and repeats_only_new and keeps_base and merges:
        yield expanded  # type: ignore[misc]
        yield inserted
        yield source  # type: ignore[misc]


def _inserts_at_two(node: fx.Node) -> bool:
    if is_call(node, (operator.getitem,)):
        index = node.args[1]
        full = slice(None, None, None)
        return isinstance(index, tuple) and [i for i in index if i is not None and i is not Ellipsis] == [
            full for i in index if i is not None and i is not Ellipsis
        ] and list(index[:3]) == [full, full, None]  # fmt: skip
    return argument(node, 1, "dim") in (2, -3)


def _shapes(site: AttentionSite) -> str:
    def text(node: fx.Node) -> str:
        tensor = tensor_of(node)
        return "?" if tensor is None else "[" + ", ".join(str(s) for s in tensor.shape) + "]"

    dtype = getattr(tensor_of(site.q), "dtype", None)
    return f"q {text(site.q)} · k {text(site.k)} · {str(dtype).removeprefix('torch.')}"
