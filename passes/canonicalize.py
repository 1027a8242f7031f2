"""Bring every way of writing the same call into one form, so that later passes match one form only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mmi_compile.passes.base import PassContext
from mmi_compile.passes.canonicalize_products import (
    ENCODER_LAYER,
    MULTIHEAD,
    spell_out_encoder_layer,
    spell_out_multihead,
    spell_out_product,
)
from mmi_compile.passes.nodes import argument, is_call, node_argument, tensor_of

SDPA = torch.nn.functional.scaled_dot_product_attention

_SDPA_FORMS = (
    SDPA,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
_SDPA_ARGUMENTS: tuple[tuple[str, Any], ...] = (
    ("query", None),
    ("key", None),
    ("value", None),
    ("attn_mask", None),
    ("dropout_p", 0.0),
    ("is_causal", False),
    ("scale", None),
    ("enable_gqa", False),
)
_DROPOUT = (torch.nn.functional.dropout, torch.dropout)


@dataclass(frozen=True)
class Canonicalize:
    """SDPA gets one argument form; calls that return their argument unchanged disappear.

    ::

        scaled_dot_product_attention(q, k, v, None, 0.0, True)
        → scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True, scale=None, …)
        dropout(x, p=0.1, training=False), dropout(x, p=0.0), x.to(x.dtype)
        → x
        einsum("bhid,bhjd->bhij", q, k), next to a softmax
        → matmul(q, k.permute(0, 1, 3, 2))
    """

    name: str = "canonicalize"

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        for node in list(gm.graph.nodes):
            if is_call(node, _SDPA_FORMS):
                _spell_out(node)
            elif is_call(node, (MULTIHEAD,)):
                spell_out_multihead(node, SDPA)
            elif is_call(node, (ENCODER_LAYER,)):
                spell_out_encoder_layer(node, SDPA)
            elif (same := _identity_of(node) or spell_out_product(node)) is not None:
                node.replace_all_uses_with(same)
                gm.graph.erase_node(node)


def sdpa_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an SDPA call in any form, by name and with defaults filled in."""
    return {name: argument(node, i, name, default) for i, (name, default) in enumerate(_SDPA_ARGUMENTS)}


def _spell_out(node: fx.Node) -> None:
    arguments = sdpa_arguments(node)
    node.target = SDPA
    node.args = tuple(arguments.pop(name) for name in ("query", "key", "value"))
    node.kwargs = arguments


def _identity_of(node: fx.Node) -> fx.Node | None:
    """The argument that ``node`` provably returns as it is: the input of an inactive dropout, or of a conversion to
    the dtype and device that the tensor has."""
    if is_call(node, _DROPOUT):
        training = argument(node, 2, "training" if node.target is _DROPOUT[0] else "train", True)
        inactive = argument(node, 1, "p", 0.5) == 0 or training is False
        return node_argument(node, 0, "input") if inactive else None
    if is_call(node, methods=("to", "float", "half", "bfloat16", "double", "bool", "type_as")):
        if node.kwargs.get("copy") or node.kwargs.get("memory_format") or len(node.args) > 3:
            return None
        source = node_argument(node, 0, "self")
        before, after = tensor_of(source), tensor_of(node)
        if before is None or after is None or before.dtype != after.dtype or before.device != after.device:
            return None
        return source if before.stride() == after.stride() else None
    return None
