"""Decide from facts of the graph which attentions are a language model's prefill that a kernel can serve."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._triton import has_triton

from mmi_compile.decision import Reason
from mmi_compile.kernels.geometry import is_usable_scale
from mmi_compile.passes.base import AttentionSite, PassContext
from mmi_compile.passes.mask_fact import MaskFact
from mmi_compile.passes.nodes import has_room, is_call, node_argument, same, tensor_of, value_of

MAX_HEAD_DIM = 256
_DTYPES = {
    "cpu": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "cuda": (torch.float16, torch.bfloat16),
}


@dataclass(frozen=True)
class ClassifyPhase:
    """Prefill is attention that is proved causal and has more than one query token; all else keeps its reason."""

    name: str = "classify_phase"

    def run(self, gm: fx.GraphModule, context: PassContext) -> None:
        for site in context.sites:
            if site.open:
                _classify(site, context)
            site.phase = _phase(site)


def _classify(site: AttentionSite, context: PassContext) -> None:
    q, k, fact = tensor_of(site.q), tensor_of(site.k), site.mask_fact
    assert q is not None, "find_attention closes sites without tensors"
    assert k is not None, "find_attention closes sites without tensors"
    if fact is None:
        return site.leave(Reason.SKIPPED, "prove_mask")
    if isinstance(q.shape[2], int) and q.shape[2] == 1:
        return site.leave(Reason.DECODE if _may_be_cached(site.k) else Reason.ONE_ROW)
    if not fact.known:
        given = _given_mask(site, q.shape[2], k.shape[2])
        if given is not None:
            return site.leave(Reason.MASK_IS_INPUT, given)
        return site.leave(Reason.UNKNOWN_MASK, fact.detail)
    if not fact.prefill:
        return site.leave(Reason.BIDIRECTIONAL, fact.expression)
    if not _offset_is_usable(fact, q.shape[2], k.shape[2]):
        return site.leave(Reason.UNKNOWN_OFFSET, f"offset {fact.offset}, q_len {q.shape[2]}, kv_len {k.shape[2]}")
    for window in fact.windows:
        if not _fix_window(site, window):
            return site.leave(Reason.UNKNOWN_MASK, f"window {window} is not a constant")
    dropout = value_of(site.dropout_p)
    if dropout != 0.0:
        return site.leave(Reason.DROPOUT, f"dropout_p={dropout}")
    if context.needs_grad:
        return site.leave(Reason.GRAD_ENABLED)
    scale = value_of(site.scale)
    if scale is not None and not _is_usable(scale):
        return site.leave(Reason.SCALE, f"scale={scale}")
    return _check_kernel(site, q)


_PRODUCTS = (
    torch.nn.functional.linear, torch.matmul, operator.matmul, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum,
    torch.conv1d, torch.conv2d, torch.nn.functional.embedding,
)  # fmt: skip


def _may_be_cached(keys: fx.Node) -> bool:
    """Whether keys may come from a cache: an input of the graph that is no vector of weights is among what they are
    made of, on this side of products with weights."""
    todo, seen = [keys], set()
    while todo:
        node = todo.pop()
        if node in seen or is_call(node, _PRODUCTS):
            continue
        seen.add(node)
        tensor = tensor_of(node)
        if node.op in ("placeholder", "get_attr") and (tensor is None or tensor.dim() > 1):
            return True
        todo += node.all_input_nodes
    return False


def _is_usable(scale: Any) -> bool:
    """With ``dynamic=True`` it may be a symbol; the graph is then guarded to run for scales of the same kind."""
    if isinstance(scale, (torch.SymFloat, torch.SymInt)) and not scale.node.has_hint():
        return False
    return bool(is_usable_scale(scale))


_SEEN_THROUGH = (
    "getitem", "to", "type_as", "float", "half", "bfloat16", "bool", "expand", "expand_as", "unsqueeze", "view",
    "reshape", "contiguous", "logical_not",
)  # fmt: skip


def _given_mask(site: AttentionSite, q_len: Any, kv_len: Any) -> str | None:
    """Which input of the graph is the whole mask, ``[…, q_len, keys]``, in words; None where the graph makes it."""
    node = site.mask
    while node is not None and node.op in ("call_method", "call_function"):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        node = node_argument(node, 0, "input") if name in _SEEN_THROUGH else None
    mask = tensor_of(node)
    if node is None or mask is None or node.op != "placeholder" or mask.dim() < 2 or not same(mask.shape[-2], q_len):
        return None
    return f"`{node.name}`, {list(mask.shape)} for {q_len} query rows and {kv_len} keys"


def _fix_window(site: AttentionSite, window: sympy.Expr) -> bool:
    """Take the window as a constant. With ``dynamic=True`` it is a symbol, as every number of a model's Python code; a
    model has one, so this takes its value, and Dynamo then guards it."""
    if window.is_Integer:
        return True
    for node in site.node.graph.find_nodes(op="placeholder"):
        value = value_of(node)
        if isinstance(value, torch.SymInt) and value.node.expr in window.free_symbols and value.node.has_hint():
            changes = {value.node.expr: sympy.Integer(int(value))}
            window = sympy.expand(window.xreplace(changes))
            assert site.mask_fact is not None
            site.mask_fact = site.mask_fact.with_sizes(changes)
    return bool(window.is_Integer)


def _check_kernel(site: AttentionSite, q: torch.Tensor) -> None:
    k, v, out = tensor_of(site.k), tensor_of(site.v), tensor_of(site.node)
    dtypes = _DTYPES.get(q.device.type)
    if dtypes is None:
        return site.leave(Reason.DEVICE, q.device.type)
    if q.dtype not in dtypes:
        return site.leave(Reason.DTYPE, f"{_name(q)} on {q.device.type}")
    # Casts between the two products, or autocast, may make them differ; the kernel works in one dtype.
    others = [tensor for tensor in (k, v, out) if tensor is not None]
    if len(others) < 3 or any(tensor.dtype != q.dtype for tensor in others):
        dtypes_seen = ", ".join(_name(tensor) for tensor in (q, *others))
        return site.leave(Reason.DTYPE, f"q, k, v and the result are {dtypes_seen}: the kernel works in one dtype")
    return _check_head_dim(site, q.shape[3], others[1].shape[3], q.device)


def _check_head_dim(site: AttentionSite, head_dim: Any, v_dim: Any, device: torch.device) -> None:
    # With ``dynamic=True`` Dynamo may make symbols of all sizes of an input. A model has one head dimension, so this
    # takes it as the constant it is; Dynamo then guards it, as it does for what Inductor specialises.
    sizes = [int(size) for size in (head_dim, v_dim) if isinstance(size, int) or size.node.has_hint()]
    if len(sizes) < 2:
        return site.leave(Reason.HEAD_DIM, f"head dim {head_dim} depends on data")
    if not 0 < sizes[0] <= MAX_HEAD_DIM or sizes[0] % 8 or sizes[1] != sizes[0]:
        return site.leave(Reason.HEAD_DIM, f"head dim {sizes[0]}, values {sizes[1]}")
    if device.type == "cuda" and not has_triton():
        return site.leave(Reason.TRITON_MISSING)
    return None


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _offset_is_usable(fact: MaskFact, q_len: Any, kv_len: Any) -> bool:
    """The rewrite can name this offset: a constant ≥ 0, or ``kv_len - q_len`` where that is ≥ 0 (the graph is then
    guarded). Rows behind the last key see what causality and a window leave them; a mask that groups tokens says
    nothing of them, since it compares keys with the row's own position."""
    if offset_is_suffix(fact.offset, q_len, kv_len):
        return has_room(kv_len - q_len)
    if not (fact.offset.is_Integer and fact.offset >= 0):
        return False
    return not fact.clauses or has_room(kv_len - q_len - int(fact.offset))


def offset_is_suffix(offset: sympy.Expr, q_len: object, kv_len: object) -> bool:
    """Proved: the query rows are the last ``q_len`` positions, ``offset == kv_len - q_len``."""
    sizes = [s.node.expr if isinstance(s, torch.SymInt) else sympy.Integer(s) for s in (q_len, kv_len)]
    return bool(sympy.expand(offset - (sizes[1] - sizes[0])) == 0)


def _phase(site: AttentionSite) -> str:
    if site.decision is None:
        return "prefill"
    if site.decision.reason is Reason.DECODE:
        return "decode"
    if site.decision.reason is Reason.BIDIRECTIONAL:
        return "encoder"
    return "unclassified" if site.mask_fact is None or not site.mask_fact.prefill else "prefill"
