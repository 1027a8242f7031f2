"""Products of attention in one form: ``matmul`` of tensors whose last two dimensions are multiplied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mmi_compile.passes.dataflow import mutates
from mmi_compile.passes.nodes import argument, insert_call, is_autocast, is_call, tensor_of

_SOFTMAX = (torch.nn.functional.softmax, torch.softmax)
_ZEROS = (torch.zeros, torch.zeros_like)
_REACH = 8
"""Steps from a product to the softmax, more than any attention takes."""


def spell_out_product(node: fx.Node) -> fx.Node | None:
    """What an ``einsum`` or ``baddbmm`` next to a softmax computes, in other words; None for anything else.

    ::

        einsum("bqhd,bkhd->bhqk", q, k)
        → matmul(q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1))
        baddbmm(zeros, q, k, beta=1, alpha=scale)
        → bmm(q, k) * scale
    """
    if is_call(node, (torch.functional.einsum, torch.einsum)):
        return _einsum(node) if _is_near_softmax(node) else None
    if is_call(node, (torch.baddbmm,), ("baddbmm",)):
        return _baddbmm(node) if _is_near_softmax(node) else None
    return None


def _is_near_softmax(node: fx.Node) -> bool:
    return _reaches(node, lambda n: list(n.users)) or _reaches(node, lambda n: n.all_input_nodes)


def _reaches(node: fx.Node, following: Callable[[fx.Node], list[fx.Node]]) -> bool:
    seen = front = {node}
    for _ in range(_REACH):
        front = {other for n in front for other in following(n)} - seen
        if any(is_call(n, _SOFTMAX, ("softmax",)) for n in front):
            return True
        seen = seen | front
    return False


def _einsum(node: fx.Node) -> fx.Node | None:
    equation, factors = node.args[0], node.args[1:]
    if len(factors) == 1 and isinstance(factors[0], (tuple, list)):
        factors = tuple(factors[0])
    if not isinstance(equation, str) or node.kwargs or len(factors) != 2:
        return None
    terms, arrow, out = equation.replace(" ", "").partition("->")
    names = terms.split(",")
    if not arrow or len(names) != 2 or not all(_is_plain(name) for name in (*names, out)):
        return None
    pairs = [(name, factor) for name, factor in zip(names, factors, strict=True) if isinstance(factor, fx.Node)]
    if len(pairs) != 2 or any((t := tensor_of(factor)) is None or t.dim() != len(name) for name, factor in pairs):
        return None
    left, right = (set(name) for name in names)
    if len(left & right - set(out)) != 1 or len(left - right) != 1 or len(right - left) != 1:
        return None
    if set(out) != (left | right) - (left & right - set(out)):
        return None
    # The factor whose own letter comes first in the result is the left one.
    pairs.sort(key=lambda pair: min(out.index(x) for x in set(pair[0]) - (left & right)))
    return _as_matmul(node, pairs, out)


def _is_plain(name: str) -> bool:
    return name.isalpha() and len(set(name)) == len(name) and len(name) in (3, 4)


def _as_matmul(node: fx.Node, pairs: list[tuple[str, fx.Node]], out: str) -> fx.Node:
    (left, a), (right, b) = pairs
    (summed,) = set(left) & set(right) - set(out)
    (row,), (column,) = set(left) - set(right), set(right) - set(left)
    shared = [x for x in (out if out.endswith(row + column) else left) if x in left and x in right and x != summed]
    first = _permute(node, a, left, [*shared, row, summed])
    second = _permute(node, b, right, [*shared, summed, column])
    return _permute(node, insert_call(node, torch.matmul, first, second), "".join([*shared, row, column]), list(out))


def _permute(before: fx.Node, node: fx.Node, names: str, wanted: list[str]) -> fx.Node:
    order = [names.index(x) for x in wanted]
    return node if order == sorted(order) else insert_call(before, torch.permute, node, order)


def _baddbmm(node: fx.Node) -> fx.Node | None:
    given = {name: argument(node, i, name) for i, name in enumerate(("input", "batch1", "batch2"))}
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    if set(node.kwargs) - {*given, "beta", "alpha"} or not all(isinstance(x, (int, float)) for x in (beta, alpha)):
        return None
    if not all(isinstance(x, fx.Node) for x in given.values()):
        return None
    plain = beta == 0 or _is_zero(given["input"])
    if not plain and _dtype(given["input"]) is not _dtype(node):  # autocast casts what is added, and a sum would not
        return None
    product = insert_call(node, torch.bmm, given["batch1"], given["batch2"])
    if alpha != 1:
        product = insert_call(node, torch.mul, product, alpha)
    if plain:
        return product
    bias = given["input"] if beta == 1 else insert_call(node, torch.mul, given["input"], beta)
    return insert_call(node, torch.add, product, bias)


def _dtype(node: Any) -> torch.dtype | None:
    tensor = tensor_of(node)
    return None if tensor is None else tensor.dtype


def _is_zero(node: Any) -> bool:
    return is_call(node, _ZEROS) and not any(mutates(user) for user in node.users)


# --- nn.MultiheadAttention -------------------------------------------------------------------------------------------

MULTIHEAD = torch.nn.functional.multi_head_attention_forward
_NAMES = (
    "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v",
    "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", "training", "key_padding_mask", "need_weights",
    "attn_mask", "use_separate_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "static_k", "static_v",
    "average_attn_weights", "is_causal",
)  # fmt: skip
_DEFAULTS = {"training": True, "need_weights": True, "average_attn_weights": True}


def multihead_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of ``multi_head_attention_forward`` by name."""
    return {name: argument(node, i, name, _DEFAULTS.get(name)) for i, name in enumerate(_NAMES)}


def spell_out_multihead(node: fx.Node, attention: Any) -> bool:
    """Write ``multi_head_attention_forward`` out as projections around ``attention``, PyTorch's SDPA, where nobody
    reads its weights; say whether that was done.

    ::

        y, _ = multi_head_attention_forward(x, x, x, E, H, weight, bias, …, attn_mask=mask)
        → q, k, v = linear(x, weight, bias) in H heads
          y = linear(scaled_dot_product_attention(q, k, v, attn_mask=mask), out_weight, out_bias)
    """
    given = multihead_arguments(node)
    outputs = {user: user.args[1] if len(user.args) > 1 else None for user in node.users}
    if any(index not in (0, 1) or (index == 1 and user.users) for user, index in outputs.items()):
        return False
    if not _is_usual(given) or not isinstance(heads := given["num_heads"], int):
        return False
    masked, mask = _merged_mask(node, given, heads)
    if not masked:
        return False
    split = [insert_call(node, torch.unflatten, x, -1, (heads, -1)) for x in _projections(node, given)]
    q, k, v = (insert_call(node, torch.permute, x, (1, 2, 0, 3)) for x in split)
    rest = {"dropout_p": 0.0, "is_causal": _is_causal(given), "scale": None, "enable_gqa": False}
    y = insert_call(node, attention, q, k, v, attn_mask=mask, **rest)
    y = insert_call(node, torch.flatten, insert_call(node, torch.permute, y, (2, 0, 1, 3)), 2)
    y = insert_call(node, torch.nn.functional.linear, y, given["out_proj_weight"], given["out_proj_bias"])
    for user, index in outputs.items():
        if index == 0:
            user.replace_all_uses_with(y)
        node.graph.erase_node(user)
    node.graph.erase_node(node)
    return True


def _is_usual(given: dict[str, Any]) -> bool:
    """One packed projection, no extra keys, no dropout, and ``[N, B, E]`` inputs."""
    unusual = ("bias_k", "bias_v", "add_zero_attn", "use_separate_proj_weight", "static_k", "static_v")
    drops = given["training"] is not False and given["dropout_p"] != 0
    ranks = [None if (t := tensor_of(given[name])) is None else t.dim() for name in ("query", "key", "value")]
    return not drops and not any(given[name] for name in unusual) and ranks == [3, 3, 3]


def _is_causal(given: dict[str, Any]) -> bool:
    """PyTorch lets the flag replace the mask where weights and padding do not need it."""
    return bool(given["is_causal"]) and given["key_padding_mask"] is None and not given["need_weights"]


def _merged_mask(node: fx.Node, given: dict[str, Any], heads: int) -> tuple[bool, fx.Node | None]:
    """Whether the masks are understood, and the one that SDPA gets."""
    mask, padding = given["attn_mask"], given["key_padding_mask"]
    if _is_causal(given):
        return True, None
    parts = []
    for part in (mask, padding):
        tensor = tensor_of(part)
        if part is None:
            continue
        if tensor is None or (tensor.dtype is not torch.bool and not tensor.dtype.is_floating_point):
            return False, None
        # Here True hides a key; for SDPA it shows one.
        parts.append(insert_call(node, torch.logical_not, part) if tensor.dtype is torch.bool else part)
    if mask is not None and tensor_of(mask).dim() == 3:  # type: ignore[union-attr]
        parts[0] = insert_call(node, torch.unflatten, parts[0], 0, (-1, heads))
    if padding is not None:
        parts[-1] = insert_call(node, torch.unsqueeze, insert_call(node, torch.unsqueeze, parts[-1], 1), 1)
    if len(parts) < 2:
        return True, parts[0] if parts else None
    kinds = {tensor_of(part).dtype for part in parts}  # type: ignore[union-attr]
    if len(kinds) > 1:
        return False, None
    join = torch.logical_and if kinds == {torch.bool} else torch.add
    return True, insert_call(node, join, *parts)


def _projections(node: fx.Node, given: dict[str, Any]) -> list[fx.Node]:
    linear, weight, bias = torch.nn.functional.linear, given["in_proj_weight"], given["in_proj_bias"]
    sources = [given[name] for name in ("query", "key", "value")]
    width = given["embed_dim_to_check"]
    if sources[0] is sources[1] is sources[2]:
        whole = insert_call(node, linear, sources[0], weight, bias)
        return [insert_call(node, torch.narrow, whole, -1, i * width, width) for i in range(3)]
    made = []
    for i, source in enumerate(sources):
        parts = [None if x is None else insert_call(node, torch.narrow, x, 0, i * width, width) for x in (weight, bias)]
        made.append(insert_call(node, linear, source, *parts))
    return made


# --- nn.TransformerEncoderLayer --------------------------------------------------------------------------------------

ENCODER_LAYER = torch._transformer_encoder_layer_fwd
_LAYER_NAMES = (
    "src", "embed_dim", "num_heads", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "use_gelu", "norm_first",
    "eps", "norm_weight_1", "norm_bias_1", "norm_weight_2", "norm_bias_2", "ffn_weight_1", "ffn_bias_1",
    "ffn_weight_2", "ffn_bias_2", "mask", "mask_type",
)  # fmt: skip


def spell_out_encoder_layer(node: fx.Node, attention: Any) -> bool:
    """Write PyTorch's fused ``nn.TransformerEncoderLayer`` out as its parts around ``attention``; say whether that was
    done.

    ::

        _transformer_encoder_layer_fwd(x, …, mask, mask_type)
        → x = x + linear(scaled_dot_product_attention(q, k, v, attn_mask=mask == 0))
          x = x + linear(gelu(linear(layer_norm(x))))
    """
    given = {name: argument(node, i, name) for i, name in enumerate(_LAYER_NAMES)}
    source, width, heads, eps = (given[name] for name in ("src", "embed_dim", "num_heads", "eps"))
    tensor = tensor_of(source)
    if tensor is None or tensor.dim() != 3 or not isinstance(heads, int) or not isinstance(width, int):
        return False
    if given["mask"] is not None and given["mask_type"] not in (1, 2):
        return False
    # Under autocast the fused layer works in the lower precision throughout, and its parts would not.
    if is_autocast(node, tensor.device):
        return False

    def norm(x: fx.Node, part: int) -> fx.Node:
        weights = (given[f"norm_weight_{part}"], given[f"norm_bias_{part}"])
        return insert_call(node, torch.nn.functional.layer_norm, x, (width,), *weights, eps)

    def linear(x: fx.Node, name: str, part: str = "") -> fx.Node:
        weights = (given[f"{name}_weight{part}"], given[f"{name}_bias{part}"])
        return insert_call(node, torch.nn.functional.linear, x, *weights)

    def attend(x: fx.Node) -> fx.Node:
        whole = linear(x, "qkv")
        parts = [insert_call(node, torch.narrow, whole, -1, i * width, width) for i in range(3)]
        split = [insert_call(node, torch.unflatten, part, -1, (heads, -1)) for part in parts]
        q, k, v = (insert_call(node, torch.transpose, part, 1, 2) for part in split)
        rest = {"dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
        y = insert_call(node, attention, q, k, v, attn_mask=_layer_mask(node, given), **rest)
        return linear(insert_call(node, torch.flatten, insert_call(node, torch.transpose, y, 1, 2), 2), "proj")

    def feed(x: fx.Node) -> fx.Node:
        act = torch.nn.functional.gelu if given["use_gelu"] else torch.nn.functional.relu
        return linear(insert_call(node, act, linear(x, "ffn", "_1")), "ffn", "_2")

    x = source
    for part, block in ((1, attend), (2, feed)):
        inner = block(norm(x, part) if given["norm_first"] else x)
        x = insert_call(node, torch.add, x, inner)
        x = x if given["norm_first"] else norm(x, part)
    node.replace_all_uses_with(x)
    node.graph.erase_node(node)
    return True


def _layer_mask(node: fx.Node, given: dict[str, Any]) -> fx.Node | None:
    """The layer hides what its mask does not have 0 for, whatever it is: it takes no biases."""
    mask = given["mask"]
    if mask is None:
        return None
    if given["mask_type"] == 1:
        mask = insert_call(node, torch.unsqueeze, insert_call(node, torch.unsqueeze, mask, 1), 1)
    return insert_call(node, torch.eq, mask, 0)
