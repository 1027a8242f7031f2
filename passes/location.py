"""Where a node comes from, in the user's words: module path, layer number, source lines."""

from __future__ import annotations

import re

from torch import fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')


def module_of(node: fx.Node) -> str:
    """Dotted module path such as ``model.layers.3.self_attn``; empty when Dynamo recorded none."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    # ``args[0]`` is ``self`` where a decorator of the forward passes on whatever it is given.
    path = re.sub(r"^L\['args'\]\[\d+\]\.?|^L\['\w+'\]\.?|^L__self___?|^self\.?", "", path)
    path = re.sub(r"\._modules\['([^']+)'\]|\[['\"]?(\w+)['\"]?\]", lambda m: "." + (m.group(1) or m.group(2)), path)
    return path.replace(".slice(None, None, None)", "").strip(".")


def layer_of(node: fx.Node) -> int | None:
    """The first number in the module path: a label, never a fact that a decision rests on."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?:\.|$)", module_of(node))
    return int(numbers[0]) if numbers else None


def source_of(node: fx.Node) -> str:
    """The two innermost source lines, outermost first: ``modeling_x.py:658 in forward → sdpa_attention.py:193 …``."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return " → ".join(f"{path.rsplit('/', 1)[-1]}:{line} in {function}" for path, line, function in frames[-2:])
