"""``flex_attention``: what its mask and score functions compute, written out where the prover can read it."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.nn.attention import flex_attention as flex_module

from mmi_compile.decision import Reason
from mmi_compile.passes.base import AttentionSite
from mmi_compile.passes.dataflow import cone, mutated_between
from mmi_compile.passes.mask_operators import operator_name
from mmi_compile.passes.mask_pointwise import POINTWISE
from mmi_compile.passes.nodes import argument, insert_call, is_call, tensor_of

FLEX = torch.ops.higher_order.flex_attention
_FRAME = re.compile(r'File "([^"]+)", line \d+, in (\S+)')
_VMAP = ("_add_batch_dim", "_remove_batch_dim")
_CONSTANTS = ("new_ones", "new_zeros", "new_full", "ones_like", "zeros_like", "full_like", "ones", "zeros", "full")
_ELEMENTWISE = frozenset(
    [*POINTWISE, *_CONSTANTS, "getitem", "floordiv", "mod", "remainder", "abs", "to", "bool", "int", "long", "clone"]
)
"""Operators that compute for tensors of indices, element by element, what they compute for one index."""


class _Unread(Exception):
    """Why the functions, or the block mask, are not understood."""


def site_of_flex(node: fx.Node) -> AttentionSite | None:
    """The attention that a call of ``flex_attention`` computes, with its mask as a node of the graph; None for any
    other node.

    ::

        out, … = flex_attention(q, k, v, score_mod=λ s, b, h, i, j: s, block_mask=(…, λ b, h, i, j: i >= j))
        → one site with q, k, v and the mask arange(q_len)[:, None] >= arange(kv_len)

    Kernels run the mask function on the blocks that the block mask lists, and on no others. So the function alone
    proves the mask only where the lists are made of it: by ``create_block_mask``, in this graph, of this function.
    Lists that come from elsewhere may leave blocks out (``BlockMask.from_kv_blocks``).
    """
    if not is_call(node, (FLEX,)):
        return None
    inputs = node.args[:3]
    if len(inputs) != 3 or not all(isinstance(x, fx.Node) for x in inputs):
        return None
    q, k, v = (x for x in inputs if isinstance(x, fx.Node))
    outputs = [user for user in node.users if user.users and argument(user, 1, "index") == 0]
    site = AttentionSite(node=outputs[0] if outputs else node, q=q, k=k, v=v, form="flex")
    if len(outputs) != 1 or not is_call(outputs[0], (operator.getitem,)):
        site.leave(Reason.SHAPE, "flex_attention, whose output is not read once")
    elif any(user.users and user is not outputs[0] for user in node.users):
        site.leave(Reason.WEIGHTS_USED, "flex_attention, whose log-sum-exp or largest scores are read")
    elif any(mutated_between(node, outputs[0], x) for x in (q, k, v)):
        site.leave(Reason.MUTATED, node.name)
    else:
        try:
            site.mask, site.scale = _mask_of(node, q, k), node.args[5]
        except _Unread as reason:
            site.leave(Reason.UNKNOWN_MASK, f"flex_attention: {reason}")
    return site


def _mask_of(node: fx.Node, q: fx.Node, k: fx.Node) -> fx.Node | None:
    """A bool mask that broadcasts to ``[B, HQ, q_len, kv_len]``; None where every pair is visible."""
    arguments: tuple[Any, ...] = node.args
    if len(arguments) != 9 or node.kwargs or not isinstance(arguments[4], tuple):
        raise _Unread("its arguments are of a PyTorch that is not known")
    _, _, _, score_mod, blocks, _, _, score_others, mask_others = arguments
    score, mask = _graph_of(node, score_mod), _graph_of(node, blocks[-1])
    score_inputs, mask_inputs = _placeholders(score), _placeholders(mask)
    condition = _score_condition(score, score_inputs[0])
    _check_blocks(node, blocks, mask, dict(zip(mask_inputs[4:], _nodes(mask_others), strict=False)))
    positions = _Positions(node, q, k)
    parts = []
    root = _root(mask)
    if not _is_always_true(root):
        outer = positions.for_inputs(mask_inputs) | dict(zip(mask_inputs[4:], _nodes(mask_others), strict=True))
        parts.append(_written_out(root, outer, node))
    if condition is not None:
        outer = positions.for_inputs(score_inputs[1:]) | dict(zip(score_inputs[5:], _nodes(score_others), strict=True))
        parts.append(_written_out(condition, outer, node))
    for part in parts:
        tensor = tensor_of(part)
        if tensor is None or tensor.dtype is not torch.bool:
            raise _Unread("its mask function does not give a bool")
    return None if not parts else parts[0] if len(parts) == 1 else insert_call(node, torch.logical_and, *parts)


def _graph_of(node: fx.Node, attribute: Any) -> fx.Graph:
    module = node.graph.owning_module
    found = getattr(module, str(attribute.target), None) if isinstance(attribute, fx.Node) and module else None
    if not isinstance(found, fx.GraphModule):
        raise _Unread("its functions are not in the graph")
    return found.graph


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return list(graph.find_nodes(op="placeholder"))


def _root(graph: fx.Graph) -> fx.Node:
    (output,) = graph.find_nodes(op="output")
    value = output.args[0]
    value = value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value
    if not isinstance(value, fx.Node):
        raise _Unread("its mask function gives no tensor")
    return value


def _nodes(values: Any) -> list[Any]:
    return list(values) if isinstance(values, (tuple, list)) else []


def _score_condition(graph: fx.Graph, score: fx.Node) -> fx.Node | None:
    """The condition of a score function that only hides pairs; None for one that does nothing."""
    root = _root(graph)
    if root is score:
        return None
    if is_call(root, (torch.where,)) and len(root.args) == 3 and not root.kwargs:
        condition, kept, hidden = root.args
        if kept is score and hidden == float("-inf") and isinstance(condition, fx.Node):
            if score not in cone(graph, [condition]):
                return condition
    raise _Unread("its score function changes scores")


def _is_always_true(root: fx.Node) -> bool:
    return operator_name(root) in ("new_ones", "ones") and root.kwargs.get("dtype") is torch.bool


# --- the block mask ---------------------------------------------------------------------------------------------------


def _check_blocks(node: fx.Node, blocks: tuple[Any, ...], mask: fx.Graph, captured: Mapping[fx.Node, Any]) -> None:
    """Raise where the lists of blocks are not made of the mask function in this graph."""
    # Numbers and indices of partial and of full blocks, row by row. The other lists are for gradients.
    lists = [x for x in blocks[2:6] if isinstance(x, fx.Node)]
    if not lists:
        raise _Unread("its block mask has no lists")
    if any(x.op in ("placeholder", "get_attr") for x in lists):
        raise _Unread(
            "its block mask is an input of the graph, and may leave out blocks that its mask function shows; make it"
            " with create_block_mask where the model is compiled"
        )
    if any(mutated_between(x, node, x) for x in lists):
        raise _Unread("the lists of its block mask may have been changed")
    makers = [_makers(x) for x in lists]
    if len(lists) == 2 and all("_create_empty_block_mask" in found for found in makers):
        return  # no block mask was given: one block holds everything
    if not all("create_block_mask" in found for found in makers) or not _is_whole(lists):
        raise _Unread("its block mask is not made by create_block_mask alone")
    graph = lists[0].graph
    ancestors = cone(graph, lists)
    mapped = [n for n in graph.nodes if n in ancestors and _short(n) == _VMAP[0]]
    ends = [n.args[0] for n in graph.nodes if n in ancestors and _short(n) == _VMAP[1]]
    bodies = [n for n in ends if isinstance(n, fx.Node) and _short(n) != _VMAP[1]]
    # create_mask maps over batch, heads, rows and keys, one inside the other; what is not read is not mapped.
    levels = [n.args[2] for n in mapped if n.args[1] == 0 and operator_name(_first(n)) == "arange"]
    if len(bodies) != 1 or len(levels) != len(mapped) or len(set(levels)) != len(levels) or set(levels) - {1, 2, 3, 4}:
        raise _Unread("its block mask is not made by create_block_mask alone")
    ranges = {n: "bhij"[n.args[2] - 1] for n in mapped}
    ranges |= {outer: f"%{outer}" for outer in captured.values() if isinstance(outer, fx.Node)}
    inputs = _placeholders(mask)
    names = dict(zip(inputs[:4], "bhij", strict=True)) | {n: f"%{outer}" for n, outer in captured.items()}
    if _spelled(bodies[0], ranges) != _spelled(_root(mask), names):
        raise _Unread("its block mask is not seen to be made of its mask function")


def _is_whole(lists: Sequence[fx.Node]) -> bool:
    """Whether these are all four lists of one block mask, in order: for partial and then for full blocks, how many of
    them a row has, and which. Lists that are dropped, doubled or swapped are not."""
    if len(lists) != 4:
        return False
    counts, indices = ([_before_casts(x) for x in lists[n::2]] for n in (0, 1))
    if {operator_name(x) for x in counts} != {"sum"} or {operator_name(x) for x in indices} != {"argsort"}:
        return False
    dense = [_first(x) for x in counts]
    ordered = list(lists[0].graph.nodes)
    return dense == [_first(x) for x in indices] and ordered.index(dense[0]) < ordered.index(dense[1])


def _before_casts(node: fx.Node) -> fx.Node:
    while operator_name(node) in ("to", "contiguous") and isinstance(_first(node), fx.Node):
        node = _first(node)
    return node


def _makers(node: fx.Node) -> set[str]:
    """The functions of PyTorch's flex_attention module in which a node was traced."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return {function for path, function in frames if path == flex_module.__file__}


def erase_dead_block_masks(graph: fx.Graph) -> None:
    """Erase what ``create_block_mask`` computes, its ``[q_len, kv_len]`` masks included, once no attention reads it. It
    writes to tensors of its own alone. What begins and ends ``vmap`` stays."""
    made = {n for n in graph.nodes if n.op.startswith("call") and "create_block_mask" in _makers(n)}
    dead = {n for n in made if "nesting" not in _short(n) and _short(n) != "lazy_load_decompositions"}
    if all(dead.issuperset(n.users) for n in dead):
        for node in reversed(list(graph.nodes)):
            if node in dead:
                graph.erase_node(node)


def _first(node: fx.Node) -> fx.Node:
    source = node.args[0]
    return source if isinstance(source, fx.Node) else node


def _short(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""


def _spelled(value: Any, names: Mapping[fx.Node, str]) -> str:
    """An expression as text, so that two graphs can be compared."""
    if not isinstance(value, fx.Node):
        if isinstance(value, (tuple, list)):
            return f"({', '.join(_spelled(x, names) for x in value)})"
        return repr(value)
    if value in names:
        return names[value]
    name = operator_name(value)
    if value.target is torch.ops.aten.index and len(value.args) == 2 and isinstance(value.args[1], (tuple, list)):
        # What vmap makes of indexing by tensors.
        source, index = value.args[0], tuple(value.args[1])
        return f"getitem({_spelled(source, names)}, {_spelled(index[0] if len(index) == 1 else index, names)})"
    if not name:
        return f"%{value}"
    kwargs = [f"{key}={_spelled(x, names)}" for key, x in sorted(value.kwargs.items())]
    return f"{name}({', '.join([*(_spelled(x, names) for x in value.args), *kwargs])})"


# --- mask functions, written out --------------------------------------------------------------------------------------


class _Positions:
    """The four indices of a mask function as tensors that broadcast to ``[B, HQ, q_len, kv_len]``."""

    def __init__(self, before: fx.Node, q: fx.Node, k: fx.Node) -> None:
        self._before = before
        self._sizes = ((q, 0), (q, 1), (q, 2), (k, 2))
        self._made: dict[int, fx.Node] = {}

    def for_inputs(self, inputs: list[fx.Node]) -> dict[fx.Node, Any]:
        return {node: self._position(axis, node) for axis, node in enumerate(inputs[:4]) if node.users}

    def _position(self, axis: int, like: fx.Node) -> fx.Node:
        if axis not in self._made:
            source, dim = self._sizes[axis]
            tensor, index = tensor_of(source), tensor_of(like)
            if tensor is None or tensor.dim() != 4 or index is None:
                raise _Unread("its operands are not [batch, heads, tokens, head dim]")
            size: Any = tensor.shape[dim]
            if not isinstance(size, int):
                size = insert_call(self._before, torch.ops.aten.sym_size.int, source, dim)
            line = insert_call(self._before, torch.arange, size, dtype=index.dtype, device=tensor.device)
            shape = [-1 if axis == place else 1 for place in range(4)]
            self._made[axis] = insert_call(self._before, torch.reshape, line, shape)
        return self._made[axis]


def _written_out(root: fx.Node, outer: Mapping[fx.Node, Any], before: fx.Node) -> fx.Node:
    """Copy a function's graph before ``before``, with whole ranges in the place of one index each."""
    needed = cone(root.graph, [root])
    made: dict[fx.Node, Any] = dict(outer)
    for node in root.graph.nodes:
        if node not in needed or node.op == "placeholder":
            continue
        name, tensor = operator_name(node), tensor_of(node)
        if name not in _ELEMENTWISE or tensor is None or tensor.dim():
            raise _Unread(f"its mask function calls `{name or node.target}`, which is not read")
        target = getattr(torch.Tensor, str(node.target), None) if node.op == "call_method" else node.target
        if target is None or not all(n in made for n in node.all_input_nodes):
            raise _Unread(f"its mask function calls `{name}`, which is not read")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), made.__getitem__)
        made[node] = insert_call(before, target, *args, **kwargs)
    found = made.get(root)
    if not isinstance(found, fx.Node):
        raise _Unread("its mask function is one of its inputs")
    return found
