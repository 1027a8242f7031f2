"""Find attention by what it computes: SDPA calls, and ``matmul → softmax → matmul`` written out by hand."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mmi_compile.decision import Reason
from mmi_compile.passes.base import AttentionSite, PassContext
from mmi_compile.passes.canonicalize import SDPA, sdpa_arguments
from mmi_compile.passes.canonicalize_products import ENCODER_LAYER, MULTIHEAD, multihead_arguments
from mmi_compile.passes.dataflow import may_alias, mutated_between, mutates
from mmi_compile.passes.flex import site_of_flex
from mmi_compile.passes.location import layer_of, module_of, source_of
from mmi_compile.passes.mask_aliasing import changed
from mmi_compile.passes.nodes import (
    argument,
    insert_call,
    is_call,
    node_argument,
    operands,
    same,
    same_shape,
    tensor_of,
    value_of,
)

_MATMUL = (torch.matmul, torch.bmm, operator.matmul)
_MATMUL_METHODS = ("matmul", "bmm", "__matmul__")
_SOFTMAX = (torch.nn.functional.softmax, torch.softmax)
_ADD = (operator.add, operator.iadd, torch.add)
_MULTIPLY = (operator.mul, operator.imul, torch.mul)
_DIVIDE = (operator.truediv, operator.itruediv, torch.div, torch.true_divide)
_CASTS = ("to", "float", "half", "bfloat16", "double", "type_as")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_AUTOCASTS = (torch.float16, torch.bfloat16)
_AUTOCAST = (torch.float16, torch.bfloat16, torch.float32)
_DROPOUT = (torch.nn.functional.dropout, torch.dropout)


@dataclass(frozen=True)
class FindAttention:
    """Make an :class:`AttentionSite` of every attention, with grouped heads recognised behind ``repeat_kv``.

    ::

        scores = q @ k.transpose(2, 3) * scale + mask
        out = softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v
        → one site with q, k, v, mask, scale
        k = kv[:, :, None].expand(B, HKV, n, S, D).reshape(B, HKV * n, S, D)
        → the site's k is kv: the kernel shares it between n query heads
        with torch.autocast(device, torch.bfloat16): scaled_dot_product_attention(q, k, v), with q and k in float32
        → the site's q is to(q, bfloat16), its k to(k, bfloat16)
    """

    name: str = "find_attention"

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        known = set(gm.graph.nodes)
        for node in list(gm.graph.nodes):
            site = _from_sdpa(node) or _from_softmax(node) or site_of_flex(node) or _from_closed(node)
            if site is None:
                continue
            _describe(site, context)
            _check_shapes(site)
            if site.open:
                _fold_repeated_heads(site)
                _write_out_casts(site)
            site.shapes = describe_shapes(site)
            context.sites.append(site)
        # What was inserted to read a mask goes again unless the rewritten attention reads it too.
        context.dead_candidates |= set(gm.graph.nodes) - known


def _from_sdpa(node: fx.Node) -> AttentionSite | None:
    if not is_call(node, (SDPA,)):
        return None
    given = sdpa_arguments(node)
    q, k, v, mask, causal = given["query"], given["key"], given["value"], given["attn_mask"], given["is_causal"]
    if not (isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)):
        return None
    causal = value_of(causal)
    site = AttentionSite(
        node=node, q=q, k=k, v=v, form="sdpa", mask=mask if isinstance(mask, fx.Node) else None,
        is_causal=causal is True, scale=given["scale"], dropout_p=given["dropout_p"],
    )  # fmt: skip
    site.autocast = _autocast_of(node)
    if not (mask is None or isinstance(mask, fx.Node)):
        site.leave(Reason.UNKNOWN_MASK, f"attn_mask is {mask!r}")
    if not isinstance(causal, bool):
        site.leave(Reason.UNKNOWN_MASK, "is_causal is not a constant")
    return site


def _from_closed(node: fx.Node) -> AttentionSite | None:
    """Attention inside an operator that does more than attention: found, so that the report can say why it stays."""
    if is_call(node, (MULTIHEAD,)):
        given = multihead_arguments(node)
        inputs = [given[name] for name in ("query", "key", "value")]
        reason, detail = _why_closed(node, given)
    elif is_call(node, (ENCODER_LAYER,)):
        inputs = [argument(node, 0, "src")] * 3
        reason, detail = Reason.SHAPE, "PyTorch's fused nn.TransformerEncoderLayer"
    else:
        return None
    if not all(isinstance(x, fx.Node) for x in inputs):
        return None
    site = AttentionSite(node=node, q=inputs[0], k=inputs[1], v=inputs[2], form="closed")
    site.leave(reason, detail)
    return site


def _why_closed(node: fx.Node, given: dict[str, Any]) -> tuple[Reason, str]:
    """What keeps ``nn.MultiheadAttention`` from being written out."""
    name = "nn.MultiheadAttention"
    if any(user.users and argument(user, 1, "index") == 1 for user in node.users):
        return Reason.WEIGHTS_USED, name
    if given["training"] is not False and given["dropout_p"] != 0:
        return Reason.DROPOUT, f"{name}, dropout_p={value_of(given['dropout_p'])}"
    return Reason.SHAPE, f"{name} with inputs without a batch, extra keys or several projections"


# --- matmul → softmax → matmul -----------------------------------------------------------------------------------


@dataclass
class _Scores:
    """``q @ kᵀ``, scaled and masked; ``path`` are the nodes from the product to what the softmax reads."""

    q: fx.Node
    k: fx.Node
    mask: fx.Node | None
    scale: Any
    path: list[fx.Node]
    unread: str = ""


@dataclass
class _Weights:
    """From the softmax to ``weights @ v``; ``used`` says who else reads or changes the weights."""

    path: list[fx.Node]
    output: fx.Node
    v: fx.Node
    dropout_p: Any = 0.0
    used: str = ""


def _from_softmax(node: fx.Node) -> AttentionSite | None:
    if not is_call(node, _SOFTMAX, ("softmax",)):
        return None
    source = node_argument(node, 0, "input")
    tensor = tensor_of(source)
    if source is None or tensor is None or argument(node, 1, "dim") not in (-1, tensor.dim() - 1):
        return None
    weights = _follow_weights([node])
    if weights is None:
        return None
    scores = _read_scores(source) or _read_unknown_scores(source)
    if scores is None:
        return None
    site = AttentionSite(
        node=weights.output, q=scores.q, k=scores.k, v=weights.v, form="eager", mask=scores.mask, scale=scores.scale,
        dropout_p=weights.dropout_p,
    )  # fmt: skip
    path = [*scores.path, *weights.path]
    site.autocast = _autocast_of(scores.path[0], weights.output)
    _split_heads(site, path)
    if weights.used:
        site.leave(Reason.WEIGHTS_USED, weights.used)
    if scores.unread:
        site.leave(Reason.UNKNOWN_MASK, scores.unread)
    _check_stable(site, path)
    return site


def _split_heads(site: AttentionSite, path: list[fx.Node]) -> None:
    """Where batch and heads share one dimension, see it as the two that the surrounding views tell apart; as heads of
    one batch element where there is no such view.

    ::

        out = bmm(softmax(bmm(q, kᵀ)), v)                                [B * H, N, D]
        → the site computes out.unflatten(0, (-1, H)) of q.unflatten(0, (-1, H)), …
    """
    output, tensors = site.node, [tensor_of(node) for node in (site.node, site.q, site.k, site.v)]
    if not all(tensor is not None and tensor.dim() == 3 for tensor in tensors):
        return
    views = [node for node in [*path, *output.users, site.q, site.k, site.v] if _is_head_view(node)]
    seen = [tensor_of(other) for node in views for other in (node, node.args[0])]
    heads = next((t.shape[1] for t in seen if t is not None and t.dim() == 4 and isinstance(t.shape[1], int)), None)
    for name in ("q", "k", "v"):
        setattr(site, name, _split(getattr(site, name), heads, output))
    after = output.next
    site.node = _seen_apart(output, heads, after)
    flat = insert_call(after, torch.flatten, site.node, 0, 1)
    output.replace_all_uses_with(flat, delete_user_cb=lambda user: user is not site.node)


def _split(flat: fx.Node, heads: int | None, before: fx.Node) -> fx.Node:
    """``flat`` with batch and heads apart; what it was merged from, if that still holds the same."""
    whole = flat.args[0] if _is_head_view(flat) else None
    if isinstance(whole, fx.Node) and not mutated_between(flat, before, whole):
        tensor = tensor_of(whole)
        if tensor is not None and heads is not None and same(tensor.shape[1], heads):
            return whole
    return _seen_apart(flat, heads, before)


def _seen_apart(flat: fx.Node, heads: int | None, before: fx.Node) -> fx.Node:
    if heads is None:
        return insert_call(before, torch.unsqueeze, flat, 0)
    return insert_call(before, torch.unflatten, flat, 0, (-1, heads))


def _check_stable(site: AttentionSite, path: list[fx.Node]) -> None:
    """The rewritten attention reads q, k and the mask where the old one ended, so nothing may write to them, nor to
    the scores, in between. The path's own in-place steps were read as what they compute."""
    watched = [node for node in (site.q, site.k, site.mask, *path) if node is not None]
    node = path[0].next
    while node is not site.node:
        if node not in path and any(may_alias(target, w) for target in changed(node) for w in watched):
            return site.leave(Reason.MUTATED, node.name)
        node = node.next
    return None


def _follow_weights(path: list[fx.Node], dropout_p: Any = 0.0, used: str = "") -> _Weights | None:
    """Walk from the softmax through casts, dropout and what else keeps the shape, to the product with values."""
    node = path[-1]
    for user in node.users:
        v = _values_of(user, node)
        if v is not None:
            others = [other.name for other in node.users if other is not user]
            return _Weights(path, user, v, dropout_p, used or _read_by(others))
    for user in node.users:
        others = [other.name for other in node.users if other is not user]
        if _is_cast(user) or _is_head_view(user) or is_call(user, methods=("contiguous",)):
            found = _follow_weights([*path, user], dropout_p, used or _read_by(others))
        elif is_call(user, _DROPOUT) and argument(user, 0, "input") is node:
            found = _follow_weights([*path, user], argument(user, 1, "p", 0.5), used or _read_by(others))
        elif len(path) < _LONGEST and _keeps_shape(user, node):
            found = _follow_weights([*path, user], dropout_p, used or f"changed by {user.name}")
        else:
            found = None
        if found is not None:
            return found
    return None


_LONGEST = 6
"""Steps between product, softmax and product that are followed: more than any attention takes."""


def _read_by(names: list[str]) -> str:
    return f"read by {', '.join(names)}" if names else ""


def _keeps_shape(node: fx.Node, source: fx.Node) -> bool:
    before, after = tensor_of(source), tensor_of(node)
    return before is not None and after is not None and same_shape(before, after) and not is_call(node, _SOFTMAX)


def _factors(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Both factors of a product of tensors of one rank, two at least: a product with a weight matrix is none."""
    if not is_call(node, _MATMUL, _MATMUL_METHODS):
        return None
    factors = operands(node, "input", "other") or operands(node, "input", "mat2") or ()
    ranks = {-1 if (tensor := tensor_of(factor)) is None else tensor.dim() for factor in factors}
    if len(ranks) != 1 or min(ranks) < 2 or not all(isinstance(factor, fx.Node) for factor in factors):
        return None
    return factors[0], factors[1]


def _values_of(node: fx.Node, weights: fx.Node) -> fx.Node | None:
    factors = _factors(node)
    return factors[1] if factors is not None and factors[0] is weights and factors[1] is not weights else None


def _read_scores(node: fx.Node) -> _Scores | None:
    """``cast(q @ kᵀ · scale + mask)``; every part but the product may be missing."""
    path: list[fx.Node] = []
    node = _skip_casts(node, path)
    mask = None
    product = _read_product(node, path)
    if product is None:
        masked = _split_mask(node)
        if masked is None:
            return None
        path.append(node)
        scores, mask = masked
        product = _read_product(scores, path)
    if product is None:
        return None
    q, k, scale = product
    return _Scores(q, k, mask, scale, path[::-1])


def _read_unknown_scores(node: fx.Node) -> _Scores | None:
    """Attention all the same, though its scores pass through something that cannot be expressed (soft caps, biases
    of two parts, a fill that hides nothing): found, so that the report can say why it stays."""
    path = [node]
    while len(path) < _LONGEST:
        product = _read_product(path[-1], [])
        if product is not None:
            q, k, scale = product
            return _Scores(q, k, None, scale, path[::-1], f"{path[0].name} changes the scores")
        parent = next((arg for arg in path[-1].all_input_nodes if _keeps_shape(path[-1], arg)), None)
        if parent is None:
            return None
        path.append(parent)
    return None


def _read_product(node: fx.Node, path: list[fx.Node]) -> tuple[fx.Node, fx.Node, Any] | None:
    """``q, k, scale`` of ``cast(cast(q @ kᵀ) · scale)``; ``path`` gets the nodes passed, if it is one."""
    passed: list[fx.Node] = []
    scale: Any = 1.0
    node = _skip_casts(node, passed)
    scaled = _split_scale(node)
    if scaled is not None:
        passed.append(node)
        node, scale = scaled
        node = _skip_casts(node, passed)
    factors = _factors(node)
    if factors is None:
        return None
    passed.append(node)
    path.extend(passed)
    return factors[0], _untranspose(factors[1]) or insert_call(node, torch.transpose, factors[1], -1, -2), scale


def _is_product(node: fx.Node) -> bool:
    node = _skip_casts(node, [])
    scaled = _split_scale(node)
    return _factors(node if scaled is None else _skip_casts(scaled[0], [])) is not None


def _is_cast(node: fx.Node) -> bool:
    if not is_call(node, methods=_CASTS):
        return False
    before, after = tensor_of(node.args[0]), tensor_of(node)
    return before is not None and after is not None and after.dtype in _FLOATS and after.device == before.device


def _is_head_view(node: fx.Node) -> bool:
    """``[B * H, N, S]`` seen as ``[B, H, N, S]``, or the other way round."""
    if not is_call(node, (torch.reshape, torch.flatten, torch.unflatten), ("view", "reshape", "flatten", "unflatten")):
        return False
    before, after = tensor_of(node.args[0]), tensor_of(node)
    if before is None or after is None or {before.dim(), after.dim()} != {3, 4} or before.dtype is not after.dtype:
        return False
    if not all(same(before.shape[d], after.shape[d]) for d in (-2, -1)):
        return False
    flat, split = (before, after) if before.dim() == 3 else (after, before)
    return same(flat.shape[0], split.shape[0] * split.shape[1])


def _skip_casts(node: fx.Node, path: list[fx.Node]) -> fx.Node:
    while (_is_cast(node) or _is_head_view(node)) and isinstance(node.args[0], fx.Node):
        path.append(node)
        node = node.args[0]
    return node


def _split_mask(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """``(scores, mask)`` of an additive, filled or selected mask. A keep-mask is made where the graph has its
    opposite, so that the mask is always what SDPA would take."""
    if is_call(node, _ADD, ("add", "add_")):
        return _split_sum(node)
    if is_call(node, (torch.masked_fill,), ("masked_fill", "masked_fill_")):
        filled = operands(node, "input", "mask", "value")
        return _selected(node, filled[0], filled[1], filled[2], opposite=True) if filled is not None else None
    if is_call(node, (torch.where,), ("where",)):
        chosen = operands(node, "condition", "input", "other") if node.op == "call_function" else None
        if node.op == "call_method" and len(node.args) == 3:
            chosen = (node.args[1], node.args[0], node.args[2])
        if chosen is None:
            return None
        condition, this, that = chosen
        if isinstance(this, float):
            return _selected(node, that, condition, this, opposite=True)
        return _selected(node, this, condition, that, opposite=False)
    return None


def _split_sum(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    terms = operands(node, "input", "other")
    if terms is None:
        return None
    # An in-place sum writes to its first term, which must then be the scores.
    for scores, mask in (terms,) if mutates(node) else (terms, terms[::-1]):
        if isinstance(scores, fx.Node) and isinstance(mask, fx.Node) and _is_product(scores):
            return scores, mask
    return None


def _selected(node: fx.Node, scores: Any, mask: Any, fill: Any, *, opposite: bool) -> tuple[fx.Node, fx.Node] | None:
    if not (isinstance(scores, fx.Node) and isinstance(mask, fx.Node) and _is_product(scores) and _hides(fill, node)):
        return None
    return scores, insert_call(node, torch.logical_not, mask) if opposite else mask


def _hides(fill: Any, scores: fx.Node) -> bool:
    tensor = tensor_of(scores)
    return (
        isinstance(fill, float)
        and tensor is not None
        and tensor.dtype.is_floating_point
        and fill <= torch.finfo(tensor.dtype).min
    )


def _split_scale(node: fx.Node) -> tuple[fx.Node, Any] | None:
    """``(scores, scale)`` of ``scores * scale``, ``scale * scores`` or ``scores / divisor``."""
    if is_call(node, _MULTIPLY, ("mul", "mul_")):
        for scores, scale in (factors := operands(node, "input", "other") or (None, None), factors[::-1]):
            if isinstance(scores, fx.Node) and tensor_of(scores) is not None and _is_scalar(scale):
                return scores, scale
    elif is_call(node, _DIVIDE, ("div", "div_")):
        scores, divisor = operands(node, "input", "other") or (None, None)
        if isinstance(scores, fx.Node) and isinstance(divisor, (int, float)) and divisor != 0:
            return scores, 1.0 / divisor
    return None


def _is_scalar(value: Any) -> bool:
    return isinstance(value_of(value), (int, float, torch.SymFloat)) and not isinstance(value_of(value), bool)


def _untranspose(node: fx.Node) -> fx.Node | None:
    """``k`` of ``k.transpose(-1, -2)``, ``k.mT`` or a ``permute`` that swaps the last two dimensions."""
    tensor, source = tensor_of(node), node_argument(node, 0, "input")
    if tensor is None or source is None:
        return None
    rank = tensor.dim()
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    if is_call(node, (torch.transpose, torch.swapaxes), ("transpose", "swapaxes")):
        dims = [argument(node, 1, "dim0"), argument(node, 2, "dim1")]
        return source if sorted(d % rank for d in dims if isinstance(d, int)) == sorted(swapped[-2:]) else None
    if is_call(node, (torch.permute,), ("permute",)):
        order = argument(node, 1, "dims")
        order = order if isinstance(order, (tuple, list)) else node.args[1:]
        return source if [d % rank for d in order if isinstance(d, int)] == swapped else None
    return source if is_call(node, (getattr,)) and node.args[1] == "mT" else None


# --- shapes and grouped heads ------------------------------------------------------------------------------------


def _describe(site: AttentionSite, context: PassContext) -> None:
    site.where = module_of(site.node)
    site.layer = layer_of(site.node)
    site.source = source_of(site.node)
    site.key = f"{context.graph_key}/{len(context.sites)}"


def _check_shapes(site: AttentionSite) -> None:
    q, k, v, out = (tensor_of(node) for node in (site.q, site.k, site.v, site.node))
    if q is None or k is None or v is None or out is None:
        return site.leave(Reason.SHAPE, "an operand is not a tensor")
    if not q.dim() == k.dim() == v.dim() == out.dim() == 4:
        return site.leave(Reason.SHAPE, f"ranks {q.dim()}, {k.dim()}, {v.dim()}")
    # That k and v are equally long needs no proof (their sizes may carry different symbols): the call demands it.
    if not (_share_heads(k.shape[1], v.shape[1], grouped=False) and same(q.shape[3], k.shape[3])):
        return site.leave(Reason.SHAPE, f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit q {tuple(q.shape)}")
    if not (same(q.shape[0], k.shape[0]) and same(q.shape[0], v.shape[0])):
        return site.leave(Reason.SHAPE, "batch sizes differ")
    if not _share_heads(q.shape[1], k.shape[1], grouped=True):
        return site.leave(Reason.SHAPE, f"{q.shape[1]} query heads over {k.shape[1]} key heads")
    # A mask with more batch elements or heads than q would widen the result.
    if not all(same(x, y) for x, y in zip(out.shape[:2], q.shape[:2], strict=True)):
        return site.leave(Reason.SHAPE, f"the mask widens the result to {tuple(out.shape)}")
    return None


def _share_heads(many: Any, few: Any, *, grouped: bool) -> bool:
    """Is the one number of heads the other one, or with ``grouped`` a multiple of it?

    With ``dynamic=True`` they may be symbols. A model has one number of heads, so where it matters this takes them as
    the constants they are; Dynamo then guards them.
    """
    if same(many, few):
        return True
    known = [int(size) for size in (many, few) if isinstance(size, int) or size.node.has_hint()]
    if len(known) < 2 or known[1] < 1:
        return False
    return known[0] % known[1] == 0 if grouped else known[0] == known[1]


def _autocast_of(*products: fx.Node) -> torch.dtype | None:
    """The dtype of the products' results, if autocast may have made it."""
    found = {None if (tensor := tensor_of(product)) is None else tensor.dtype for product in products}
    return next((dtype for dtype in _AUTOCASTS if found == {dtype}), None)


def _write_out_casts(site: AttentionSite) -> None:
    """Give the site the operands that the products see under autocast.

    Without autocast a product has the dtype that all of its operands have. Where the result has another, autocast cast
    the operands to it, as it does with all floating-point numbers but float64.
    """
    tensors = {name: tensor_of(getattr(site, name)) for name in ("q", "k", "v")}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    if site.autocast is None or len(dtypes) < 3 or not all(dtype in _AUTOCAST for dtype in dtypes.values()):
        return
    for name, dtype in dtypes.items():
        if dtype is not site.autocast:
            cast = insert_call(site.node, torch.ops.aten.to.dtype, getattr(site, name), site.autocast)
            setattr(site, name, cast)


def _fold_repeated_heads(site: AttentionSite) -> None:
    k, v = _unrepeat(site.k, site.node), _unrepeat(site.v, site.node)
    if k is None or v is None:
        return
    left, right = tensor_of(k), tensor_of(v)
    if left is not None and right is not None and same(left.shape[1], right.shape[1]):
        site.k, site.v = k, v


def _unrepeat(node: fx.Node, attention: fx.Node) -> fx.Node | None:
    """``kv`` when ``node`` repeats each head of ``kv`` a whole number of times in place, and still holds what it
    was made of when the attention runs."""
    chain = _interleaved(node) or _expanded(node)
    if chain is None:
        return None
    first, base = chain
    if mutated_between(first, attention, base) or mutated_between(first, attention, node):
        return None
    return base


def _interleaved(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """``(node, kv)`` of ``kv.repeat_interleave(n, dim=1)``."""
    if not is_call(node, (torch.repeat_interleave,), ("repeat_interleave",)):
        return None
    source = node_argument(node, 0, "input")
    if source is None or tensor_of(source) is None:
        return None
    one_dim = argument(node, 2, "dim") in (1, -3) and isinstance(argument(node, 1, "repeats"), int)
    return (node, source) if one_dim else None


def _expanded(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """``(first view, kv)`` of ``kv[:, :, None].expand(B, H, n, S, D).reshape(B, H * n, S, D)``."""
    if not is_call(node, (torch.reshape, torch.flatten), ("reshape", "view", "flatten")):
        return None
    expanded = node_argument(node, 0, "input")
    if expanded is None or not is_call(expanded, (torch.broadcast_to,), ("expand", "repeat", "broadcast_to")):
        return None
    inserted = node_argument(expanded, 0, "input")
    if inserted is None or not _inserts_at_two(inserted):
        return None
    source = node_argument(inserted, 0, "input")
    values = [tensor_of(n) for n in (node, expanded, inserted, source)]
    out, wide, thin, base = ([] if value is None else list(value.shape) for value in values)
    if source is None or [len(out), len(wide), len(thin), len(base)] != [4, 5, 5, 4]:
        return None
    repeats_only_new = all(same(w, t) for d, (w, t) in enumerate(zip(wide, thin, strict=True)) if d != 2)
    keeps_base = all(same(a, b) for a, b in zip([*thin[:2], *thin[3:]], base, strict=True)) and same(thin[2], 1)
    merges = same(out[1], wide[1] * wide[2]) and all(same(out[d], base[d]) for d in (0, 2, 3))
    return (inserted, source) if repeats_only_new and keeps_base and merges else None


def _inserts_at_two(node: fx.Node) -> bool:
    """``x[:, :, None]`` (and nothing but full slices after it), or ``x.unsqueeze(2)``."""
    if is_call(node, (operator.getitem,)):
        index, full = node.args[1], slice(None, None, None)
        if not isinstance(index, tuple) or list(index[:3]) != [full, full, None]:
            return False
        return all(i is Ellipsis or (isinstance(i, slice) and i == full) for i in index[3:])
    return is_call(node, (torch.unsqueeze,), ("unsqueeze",)) and argument(node, 1, "dim") in (2, -3)


def describe_shapes(site: AttentionSite) -> str:
    """Shapes of q and k and the dtype, as reports show them."""

    def text(node: fx.Node) -> str:
        tensor = tensor_of(node)
        return "?" if tensor is None else "[" + ", ".join(str(s) for s in tensor.shape) + "]"

    dtype = getattr(tensor_of(site.q), "dtype", None)
    return f"q {text(site.q)} · k {text(site.k)} · {str(dtype).removeprefix('torch.')}"
