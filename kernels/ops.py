"""The operators that rewritten graphs call.

==========================  =======================================================================================
``mmi::attention``          prefill attention, exact or sparse; the model's mask is described by arguments, not built
``mmi::key_bounds``         once per graph: where each batch element's live keys begin and end, on the host
``mmi::modality``           once per graph: which token is text, image or video
``mmi::tag_modality``       returns a modality mask and records it for the graphs that run later in this forward
``mmi::begin_prompt``       returns the prompt's ids and begins a new record
==========================  =======================================================================================

All are opaque to the inner backend, have exact fakes, and carry everything that changes their behaviour as arguments,
so that compiled code may be cached on disk.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mmi_compile import record, runtime
from mmi_compile.decision import MMIError
from mmi_compile.kernels import dispatch
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.record import ANY_VISION

ABI = 1
"""Version of the operators' meaning. It is an argument of every call, so that a cached graph of another version is
never mistaken for one of this."""


_HOST_CODE = (torch.Tag.cudagraph_unsafe,)
"""All operators run host code (records, choices by length) that the replay of a CUDA graph would leave out."""


@torch.library.custom_op("mmi::attention", mutates_args=(), tags=_HOST_CODE)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    key_bounds: Tensor | None,
    modality: Tensor | None,
    scale: float,
    q_offset: int,
    window: int,
    policy: str,
    recall: float,
    max_density: float,
    min_tokens: int,
    layout: str,
    key: str,
    abi: int,
) -> Tensor:
    """Causal attention of a prefill.

    Row ``r`` of ``q`` stands at position ``r + q_offset`` and sees key ``j`` when ``j`` is not later, not further
    back than ``window`` (0: no window) and live. Under ``policy="exact"`` every such pair counts; under
    ``"adaptive"`` each head keeps the cheapest pattern that reaches ``recall`` on the probe, or everything.

    Args:
        q: ``[B, HQ, q_len, D]``; k, v: ``[B, HKV, kv_len, D]``, HQ a multiple of HKV; any strides.
        key_padding: ``[B, keys]``, non-zero where the key is live; keys beyond ``kv_len`` are ignored.
        key_bounds: what ``mmi::key_bounds`` says of ``key_padding``.
        modality: int8 ``[B, kv_len]``.
        scale: factor on the scores.
        max_density: adaptive heads that would compute a larger share of the pairs stay dense.
        min_tokens: below this many keys every head stays dense; negative for the device's own number.
        layout: memory order of the output, ``"bshd"`` or ``"bhsd"``.
        key: names this attention in reports; abi: must be this module's ``ABI``.

    Returns:
        ``[B, HQ, q_len, D]`` in q's dtype. Rows that may see no key are zero.

    Raises:
        MMIError: the graph was rewritten by an incompatible version, or ``key_padding`` has not one row per batch
            element or too few keys.
    """
    if abi != ABI:
        raise MMIError(f"this graph was rewritten for operators of version {abi}, these have {ABI}; compile it again")
    geometry = _geometry(q, k, key_padding, key_bounds, q_offset, window)
    kv_len = geometry.kv_len
    out, run = dispatch.attention(
        q, k[:, :, :kv_len], v[:, :, :kv_len], geometry, scale, partial(_empty, q, v, layout),
        policy=policy, recall=recall, max_density=max_density, min_tokens=min_tokens,
    )  # fmt: skip
    runtime.record_attention(key, run)
    promised = _empty(q.to("meta"), v.to("meta"), layout)
    return out if out.stride() == promised.stride() else torch.empty_strided(
        out.shape, promised.stride(), dtype=out.dtype, device=out.device
    ).copy_(out)  # fmt: skip


def _empty(q: Tensor, v: Tensor, layout: str) -> Tensor:
    batch, heads, tokens, _ = q.shape
    if layout == "bshd":
        return q.new_empty(batch, tokens, heads, v.shape[3]).transpose(1, 2)
    return q.new_empty(batch, heads, tokens, v.shape[3])


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None, key_bounds: Tensor | None, modality: Tensor | None,
    scale: float, q_offset: int, window: int, policy: str, recall: float, max_density: float, min_tokens: int,
    layout: str, key: str, abi: int,
) -> Tensor:  # fmt: skip
    return _empty(q, v, layout)


def _geometry(
    q: Tensor, k: Tensor, key_padding: Tensor | None, key_bounds: Tensor | None, q_offset: int, window: int
) -> Geometry:
    """Padding that leaves every key live is no padding; padding on one side is a range; only holes need the mask."""
    kv_len = min(k.shape[2], q.shape[2] + q_offset)
    start = stop = holes = None
    if key_padding is not None:
        _check_padding(key_padding, q.shape[0], kv_len)
        if key_bounds is None:
            key_bounds = key_bounds_of(key_padding)
        begins, ends, broken = key_bounds.unbind(1)
        begins, ends = begins.clamp(max=kv_len), ends.clamp(max=kv_len)
        if bool((begins > 0).any()) or bool((ends < kv_len).any()) or bool(broken.any()):
            start, stop = (x.to(torch.int32).to(q.device, non_blocking=True) for x in (begins, ends))
        if bool(broken.any()):
            holes = key_padding[:, :kv_len] != 0
    return Geometry(
        batch=q.shape[0], q_heads=q.shape[1], kv_heads=k.shape[1], q_len=q.shape[2], kv_len=kv_len,
        q_offset=q_offset, window=window, kv_start=start, kv_stop=stop, key_padding=holes,
    )  # fmt: skip


def _check_padding(key_padding: Tensor, batch: int, kv_len: int) -> None:
    shape = tuple(key_padding.shape)
    if len(shape) != 2 or shape[0] != batch or shape[1] < kv_len:
        raise MMIError(
            f"the attention mask has shape {shape}, and this attention needs ({batch}, {kv_len}) or more keys;"
            " pass a mask with one row per batch element and one entry per token, past ones included"
        )


@torch.library.custom_op("mmi::key_bounds", mutates_args=(), tags=_HOST_CODE)
def key_bounds_of(key_padding: Tensor) -> Tensor:
    """First live key, one past the last, and whether dead keys lie between: int32 ``[B, 3]`` on the host.

    This is the one place where a prefill waits for the device, once per graph, so that all of its layers know
    without asking whether there is any padding at all. A row without live keys gives ``(0, 0, 0)``.
    """
    live = key_padding != 0
    tokens = live.shape[1]
    if tokens == 0:
        return torch.zeros(live.shape[0], 3, dtype=torch.int32)
    position = torch.arange(tokens, device=live.device)
    start = torch.where(live, position, tokens).amin(1)
    stop = torch.where(live, position + 1, 0).amax(1)
    start = torch.minimum(start, stop)
    holes = live.sum(1) != stop - start
    return torch.stack([start, stop, holes.to(start.dtype)], 1).to(torch.int32).cpu()


@key_bounds_of.register_fake
def _(key_padding: Tensor) -> Tensor:
    return torch.empty(key_padding.shape[0], 3, dtype=torch.int32, device="cpu")


@torch.library.custom_op("mmi::modality", mutates_args=(), tags=_HOST_CODE)
def modality_of(
    like: Tensor, masks: list[Tensor], labels: str, after: Tensor | None, batch: int, tokens: int, graph_key: str
) -> Tensor:
    """Modality ids of a prompt, int8 ``[batch, tokens]`` on the device of ``like``: 0 text, 1 image, 2 video and so on.

    What a user gave by hand comes first, then ``masks`` (bool ``[B, S]``, named by the comma-separated ``labels``) of
    the same graph, then what a hook or an earlier graph recorded for this forward. A mask that only knows that its
    tokens are vision comes last. Without any, every token is text. With the ids, the run that is kept for reports
    (:func:`mmi_compile.runtime.modality_run`) holds the grids of the prompt's images and videos where a hook read them.

    Args:
        after: a value that must be computed first (``mmi::begin_prompt``), or None.
        graph_key: names the reading graph; no graph reads the same record twice.
    """
    words, note = record.told_apart(labels.split(",") if masks else [])
    usable = bool(masks) and all(mask.shape == (batch, tokens) for mask in masks)
    found = record.given(batch, tokens, like.device)
    by_hand = found.source
    if found.ids is None and not (usable and ANY_VISION not in words):
        found = record.read(graph_key, batch, tokens, like.device)
    if found.ids is None and usable:
        ids, names = record.merge(masks, words)
        source = f"masks in the graph ({note})" if note else "masks in the graph"
        found = record.Reading(ids, "; ".join(filter(None, [source, by_hand])), names)
    if found.ids is None:
        found.ids = torch.zeros(batch, tokens, dtype=torch.int8, device=like.device)
    runtime.record_modality(
        graph_key,
        runtime.ModalityRun(found.source, found.ids.clone(), found.names, found.segments, found.grid_note),
    )
    return found.ids


@modality_of.register_fake
def _(
    like: Tensor, masks: list[Tensor], labels: str, after: Tensor | None, batch: int, tokens: int, graph_key: str
) -> Tensor:
    return torch.empty(batch, tokens, dtype=torch.int8, device=like.device)


@torch.library.custom_op("mmi::tag_modality", mutates_args=(), tags=_HOST_CODE)
def tag_modality(mask: Tensor, label: str) -> Tensor:
    """Return ``mask`` (bool ``[B, S]``) unchanged and record it under ``label``, which is ``kind`` or ``kind@token id``
    (see :func:`mmi_compile.record.told_apart`). It is an operator with a result, since one without would be removed as
    dead code."""
    record.tag(mask.clone(), label)
    return mask.clone()


@tag_modality.register_fake
def _(mask: Tensor, label: str) -> Tensor:
    return torch.empty_like(mask)


@torch.library.custom_op("mmi::begin_prompt", mutates_args=(), tags=_HOST_CODE)
def begin_prompt(ids: Tensor) -> Tensor:
    """Return the prompt's token ids ``[B, S]`` unchanged and begin a new modality record."""
    record.begin_prompt()
    return ids.clone()


@begin_prompt.register_fake
def _(ids: Tensor) -> Tensor:
    return torch.empty_like(ids)
