"""Find where the graph says which tokens are text, image or video, by what it does with token ids."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from mmi_compile.passes.base import PassContext
from mmi_compile.passes.nodes import argument, insert_call, is_call, node_argument, tensor_of
from mmi_compile.record import ANY_VISION

_EQ = (operator.eq, torch.eq)
_WIDENING = (operator.getitem, torch.unsqueeze)
_INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True)
class FindModality:
    """Four sources, in order of trust; each is found by what the graph computes, never by a model's name.

    1. The graph that attends also compares token ids: its masks are wired into the attention as arguments.
    2. A graph without attention compares ``input_ids == id`` and makes an embedding mask of it. The comparison is
       wrapped in ``mmi::tag_modality``, which returns it and records it for the graphs that run later in this
       forward. The embedding lookup of the prompt begins a new record, so that nothing outlives its forward.
       The label carries the id: where one id is called image here and video there, the graphs do not tell which.
    3. A graph that attends but only places features knows which tokens are vision; the kind is read as in 4.
    4. Otherwise the attention reads, when it runs, what was recorded: by ``mmi_compile.modality``, by the pre-hook of
       ``mmi_compile.compile``, or by 2.
    """

    name: str = "find_modality"

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        if any(is_call(node, (torch.ops.mmi.attention.default,)) for node in gm.graph.nodes):
            return  # already rewritten: the pipeline is idempotent
        fact = context.modality
        sites = context.open_sites()
        masks = _compared_ids(gm.graph)
        if sites:
            masks = masks or _scattered_features(gm.graph)
            position = {node: i for i, node in enumerate(gm.graph.nodes)}
            first = min((site.node for site in sites), key=position.__getitem__)
            usable = {label: mask for label, mask in masks.items() if position[mask] < position[first]}
            fact.source = "graph" if usable else "record"
            fact.labels, fact.masks = list(usable), list(usable.values())
        else:
            for label, mask in masks.items():
                _tag(mask, label)
                fact.tagged.append(label.partition("@")[0])
                context.changed = True
        if _begin_prompt(gm.graph):
            context.changed = True


def _compared_ids(graph: fx.Graph) -> dict[str, fx.Node]:
    """``kind@id`` → bool ``[B, S]`` mask ``input_ids == id`` of the tokens that stand for a modality."""
    found: dict[str, fx.Node] = {}
    comparisons = [n for n in graph.nodes if _compares_ids(n)]
    embedded = {node_argument(n, 0, "input") for n in comparisons if _becomes_embedding_mask(n)}
    for node in comparisons:
        tagged = any(is_call(user, (torch.ops.mmi.tag_modality.default,)) for user in node.users)
        if node_argument(node, 0, "input") in embedded and not tagged:
            token = argument(node, 1, "other")
            found.setdefault(f"{_label(node, f'id {token}')}@{token}", node)
    return found


def _scattered_features(graph: fx.Graph) -> dict[str, fx.Node]:
    """Label → bool ``[B, S]`` mask of the tokens whose embeddings are replaced by features."""
    found: dict[str, fx.Node] = {}
    for node in graph.nodes:
        assigned = _assigned(node)
        if assigned is not None:
            found.setdefault(_label(assigned, ANY_VISION), assigned)
        if not is_call(node, (torch.masked_scatter,), ("masked_scatter",)):
            continue
        placed = node_argument(node, 1, "mask")
        mask = _token_mask(placed) if placed is not None else None
        if placed is not None and mask is not None:
            found.setdefault(_label(placed, _label(node, ANY_VISION)), mask)
    return found


def _assigned(node: fx.Node) -> fx.Node | None:
    """The bool ``[B, S]`` mask of ``embeddings[mask] = features`` or ``embeddings[mask, :] = features``."""
    if not is_call(node, (operator.setitem,)):
        return None
    target, index = tensor_of(node.args[0]), node.args[1]
    mask = index[0] if isinstance(index, tuple) and index[1:] == (slice(None),) else index
    known = tensor_of(mask) if isinstance(mask, fx.Node) else None
    if target is None or target.dim() != 3 or known is None or known.dtype is not torch.bool or known.dim() != 2:
        return None
    return mask if isinstance(mask, fx.Node) else None


def _compares_ids(node: fx.Node) -> bool:
    if not is_call(node, _EQ, ("eq", "__eq__")) or not isinstance(argument(node, 1, "other"), int):
        return False
    ids = tensor_of(node_argument(node, 0, "input"))
    return ids is not None and ids.dtype in _INTEGERS and ids.dim() == 2 and not _is_one(ids.shape[1])


def _becomes_embedding_mask(node: fx.Node) -> bool:
    """The ``[B, S]`` comparison is widened to ``[B, S, 1]``, the shape that selects embeddings."""
    for user in node.users:
        if is_call(user, (torch.unsqueeze,), ("unsqueeze",)) and argument(user, 1, "dim") in (-1, 2):
            return True
        if is_call(user, (operator.getitem,)) and isinstance(user.args[1], tuple) and user.args[1][-1] is None:
            return True
        if is_call(user, (torch.masked_scatter,), ("masked_scatter",)):
            return True
    return False


def _token_mask(mask: fx.Node) -> fx.Node | None:
    """The ``[B, S]`` mask behind the ``[B, S, hidden]`` one that ``masked_scatter`` takes."""
    node = mask
    while is_call(node, (torch.unsqueeze,), ("unsqueeze", "expand", "expand_as", "to")):
        parent = node_argument(node, 0, "input")
        if parent is None:
            return None
        node = parent
        tensor = tensor_of(node)
        if tensor is not None and tensor.dim() == 2 and tensor.dtype is torch.bool:
            return node
    tensor = tensor_of(mask)
    if tensor is None or tensor.dim() != 3 or tensor.dtype is not torch.bool:
        return None
    return insert_call(_after(mask), torch.select, mask, -1, 0)


def _after(node: fx.Node) -> fx.Node:
    """The first node before which something that reads ``node`` may be inserted."""
    after: fx.Node = node.next
    while after.op == "placeholder":
        after = after.next
    return after


def _label(node: fx.Node, otherwise: str) -> str:
    """Names carry no proof, but they make good labels: the node's own, or that of a widened form of it."""
    named = [node]
    for known in named:
        named += [user for user in known.users if is_call(user, _WIDENING, ("unsqueeze", "expand", "expand_as", "to"))]
    names = " ".join(known.name.lower() for known in named)
    return next((word for word in ("image", "video", "audio") if word in names), otherwise)


def _tag(mask: fx.Node, label: str) -> None:
    users = list(mask.users)
    tagged = insert_call(mask.next, torch.ops.mmi.tag_modality.default, mask, label)
    for user in users:
        user.replace_input_with(mask, tagged)


def _begin_prompt(graph: fx.Graph) -> bool:
    """Mark the embedding lookup of a prompt: it is where one forward's record ends and the next begins."""
    for node in graph.nodes:
        if not is_call(node, (torch.nn.functional.embedding, torch.embedding)):
            continue
        position, name = (0, "input") if node.target is torch.nn.functional.embedding else (1, "indices")
        ids = node_argument(node, position, name)
        tensor = tensor_of(ids)
        if (
            ids is None
            or tensor is None
            or tensor.dim() != 2
            or tensor.dtype not in _INTEGERS
            or _is_one(tensor.shape[1])
        ):
            continue
        if is_call(ids, (torch.ops.mmi.begin_prompt.default,)):
            return False
        begun = insert_call(node, torch.ops.mmi.begin_prompt.default, ids)
        node.replace_input_with(ids, begun)
        return True
    return False


def _is_one(size: object) -> bool:
    return isinstance(size, int) and size == 1
