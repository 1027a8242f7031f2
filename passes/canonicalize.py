"""Bring every way of writing the same call into one form, so that later passes match one form only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mmi_compile.passes.base import PassContext
from mmi_compile.passes.nodes import argument, is_call, tensor_of

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
        dropout(x, p=0.0, training=False), x.to(x.dtype)
        → x
    """

    name: str = "canonicalize"

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        for node in list(gm.graph.nodes):
            if is_call(node, _SDPA_FORMS):
                _spell_out(node)
            elif _returns_argument(node):
                node.replace_all_uses_with(node.args[0])
                gm.graph.erase_node(node)


def _spell_out(node: fx.Node) -> None:
    values = [argument(node, i, name, default) for i, (name, default) in enumerate(_SDPA_ARGUMENTS)]
    node.target = SDPA
    node.args = tuple(values[:3])
    node.kwargs = {name: value for (name, _), value in list(zip(_SDPA_ARGUMENTS, values, strict=True))[3:]}


def _returns_argument(node: fx.Node) -> bool:
    """Provably the identity: an inactive dropout, or a conversion to the dtype and device that the tensor has."""
    if is_call(node, _DROPOUT):
        training = argument(node, 2, "training" if node.target is _DROPOUT[0] else "train", True)
        return (argument(node, 1, "p", 0.5) == 0 or training is False) and not node.kwargs.get("inplace", False)
    if is_call(node, methods=("to", "float", "half", "bfloat16", "double", "bool", "type_as")):
        if node.kwargs.get("copy") or node.kwargs.get("memory_format") or len(node.args) > 3:
            return False
        before, after = tensor_of(node.args[0]), tensor_of(node)
        return (
            before is not None
            and after is not None
            and before.dtype == after.dtype
            and before.device == after.device
            and before.stride() == after.stride()
        )
    return False
