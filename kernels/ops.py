"""The operators that rewritten graphs call.

==========================  =======================================================================================
``mmi::attention``          prefill attention, exact or sparse; the model's mask is described by arguments, not built
``mmi::key_bounds``         once per graph: where each batch element's live keys begin and end, on the host
``mmi::modality``           once per graph: which token is text, image or video
``mmi::segments``           once per graph, where some head treats modalities apart: tokens grouped by modality
``mmi::tag_modality``       returns a modality mask and records it for the graphs that run later in this forward
``mmi::begin_prompt``       returns the prompt's ids and begins a new record
``mmi::grouped_attention``  attention under a mask that groups tokens (:mod:`mmi_compile.kernels.grouped_ops`)
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
from mmi_compile.kernels.frames import TileShape, constant
from mmi_compile.kernels.geometry import Geometry, check_scale
from mmi_compile.kernels.guard import Guard
from mmi_compile.kernels.layer_heads import labels_of, parse_heads, parse_names, translated
from mmi_compile.kernels.segments import Segments, segment, segment_shapes
from mmi_compile.record import ANY_VISION, LABELS

ABI = 2
"""Version of the operators' meaning. It is an argument of every call, so that a cached graph of another version is
never mistaken for one of this."""


HOST_CODE = (torch.Tag.cudagraph_unsafe,)
"""All operators run host code (records, choices by length) that the replay of a CUDA graph would leave out."""


@torch.library.custom_op("mmi::attention", mutates_args=(), tags=HOST_CODE)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding: Tensor | None,
    key_bounds: Tensor | None,
    modality: Tensor | None,
    segments: list[Tensor],
    scale: float,
    q_offset: int,
    window: int,
    policy: str,
    recall: float,
    max_density: float,
    min_tokens: int,
    dense_tail: bool,
    heads: str,
    layer: int | None,
    layout: str,
    key: str,
    abi: int,
    verify: float = 0.0,
    min_recall: float = 0.0,
    guard_rows: int = 64,
    boundaries: str = "",
) -> Tensor:
    """Causal attention of a prefill.

    Row ``r`` of ``q`` stands at position ``r + q_offset`` and sees key ``j`` when ``j`` is not later, not further
    back than ``window`` (0: no window) and live. Under ``policy="exact"`` every such pair counts; under
    ``"adaptive"`` each head keeps the cheapest pattern that reaches ``recall`` on the probe, or everything; under
    ``"config"`` each head keeps the pattern of ``heads``.

    Args:
        q: ``[B, HQ, q_len, D]``; k, v: ``[B, HKV, kv_len, D]``, HQ a multiple of HKV; any strides.
        key_padding: ``[B, keys]``, non-zero where the key is live; keys beyond ``kv_len`` are ignored.
        key_bounds: what ``mmi::key_bounds`` says of ``key_padding``.
        modality: int8 ``[B, keys]``; keys beyond ``kv_len`` are ignored.
        segments: what ``mmi::segments`` says of ``modality``; empty where no head treats modalities apart (it is then
            made here if one does after all).
        scale: factor on the scores, positive.
        max_density: adaptive heads that would compute a larger share of the pairs stay dense.
        min_tokens: below this many keys every head stays dense; negative for the device's own number.
        dense_tail: sparse heads keep every key for the tiles of the last 64 live rows.
        heads: what :meth:`mmi_compile.kernels.layer_heads.LayerHeads.to_text` says of this layer; empty under other
            policies than ``"config"``.
        layer: number of the decoder layer, where the graph tells. Only observers read it.
        layout: memory order of the output, ``"bshd"`` or ``"bhsd"``.
        key: names this attention in reports; abi: must be this module's ``ABI``.
        verify: share of the sparse calls that are compared with exact attention on some rows, for the report.
        min_recall: sparse heads that keep a smaller share of the probability on those rows run densely; 0 asks nothing.
        guard_rows: how many rows, spread over the whole prompt.
        boundaries: under ``"adaptive"``, "q", "2d" or "q,2d" where heads may also treat text and everything else apart.

    Returns:
        ``[B, HQ, q_len, D]`` in q's dtype. Rows that may see no key are zero.

    Raises:
        MMIError: the graph was rewritten by an incompatible version, or ``key_padding`` has not one row per batch
            element or too few keys.
        ValueError: ``scale`` is not a positive float32.
    """
    check_abi(abi)
    check_scale(scale)
    geometry = _geometry(q, k, key_padding, key_bounds, q_offset, window)
    kv_len = geometry.kv_len
    k, v = k[:, :, :kv_len], v[:, :, :kv_len]
    prompt = runtime.Prompt()
    if modality is not None:
        prompt = runtime.prompt_here(key.rpartition("/")[0], *modality.shape)
        modality = modality[:, :kv_len]
    # The graph has cast q, k and v where autocast asks for it; probe, plan and kernels choose their own dtypes.
    with torch._C._DisableAutocast():
        found = _observed(key, layer, q, k, v, geometry, scale, modality, prompt)
        if found is None:
            configured = _configured(heads, dense_tail, modality, segments, geometry, prompt) if heads else None
            apart = _apart(boundaries, modality, segments, geometry, prompt) if boundaries else None
            found = dispatch.attention(
                q, k, v, geometry, scale, partial(empty_output, q, v, layout), policy=policy, recall=recall,
                max_density=max_density, min_tokens=min_tokens, dense_tail=dense_tail, configured=configured,
                apart=apart, guard=Guard(runtime.is_due(key, verify), min_recall, guard_rows),
            )  # fmt: skip
    out, run = found
    runtime.record_attention(key, run)
    return in_promised_layout(out, q, v, layout)


def check_abi(abi: int) -> None:
    """Refuse a graph that was rewritten for operators of another meaning."""
    if abi != ABI:
        raise MMIError(f"this graph was rewritten for operators of version {abi}, these have {ABI}; compile it again")


def in_promised_layout(out: Tensor, q: Tensor, v: Tensor, layout: str) -> Tensor:
    """``out`` with the strides that the fake of an attention promises for ``layout``."""
    promised = empty_output(q.to("meta"), v.to("meta"), layout)
    return out if out.stride() == promised.stride() else torch.empty_strided(
        out.shape, promised.stride(), dtype=out.dtype, device=out.device
    ).copy_(out)  # fmt: skip


def _observed(
    key: str, layer: int | None, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, scale: float,
    modality: Tensor | None, prompt: runtime.Prompt,
) -> tuple[Tensor, runtime.AttentionRun] | None:  # fmt: skip
    """What an observer of this thread gives as the output, and how it ran; None where it is to be computed."""
    observer = runtime.attention_observer()
    if observer is None:
        return None
    names = {**dict(enumerate(LABELS)), **prompt.names}
    out = observer(runtime.AttentionCall(key, layer, q, k, v, geometry, scale, modality, names, prompt.known))
    if out is None:
        return None
    if out.shape != (*q.shape[:3], v.shape[3]) or out.dtype != q.dtype or out.device != q.device:
        wanted = f"{q.dtype} {(*q.shape[:3], v.shape[3])} on {q.device}"
        raise MMIError(f"an observer gave {out.dtype} {tuple(out.shape)} on {out.device}; give {wanted} or None")
    if any(out is x for x in (q, k, v)):  # an operator's result may be none of its arguments
        out = out.clone()
    return out, runtime.AttentionRun(geometry.q_len, geometry.kv_len, "given by an observer")


def _configured(
    heads: str, dense_tail: bool, modality: Tensor | None, segments: list[Tensor], geometry: Geometry,
    prompt: runtime.Prompt,
) -> dispatch.ConfiguredHeads:  # fmt: skip
    """The heads of a layer, with the prompt grouped by modality where one of them needs it."""
    layer = parse_heads(heads)
    if not layer.bounded:
        return dispatch.ConfiguredHeads(layer, dense_tail)
    if modality is None or not prompt.known:
        return dispatch.ConfiguredHeads(layer, dense_tail, notes=(_ALL_TEXT,))
    ids, (_, note) = modality, translated(layer.modalities, prompt.names)

    def grouped(tiles: TileShape) -> Segments:
        shared = _shared(segments, layer.labels, geometry, tiles)
        return shared or segment(_config_ids(ids, layer.modalities, prompt), layer.labels, geometry, tiles)

    return dispatch.ConfiguredHeads(layer, dense_tail, grouped, (note,) if note else ())


def _shared(segments: list[Tensor], labels: tuple[int, ...], geometry: Geometry, tiles: TileShape) -> Segments | None:
    """The grouping that the layers of a graph share; None where it was not made, or not for these lengths and tiles."""
    shared = Segments.of(labels, segments) if segments else None
    return shared if shared is not None and shared.fits(geometry, tiles) else None


def _apart(
    boundaries: str, modality: Tensor | None, segments: list[Tensor], geometry: Geometry, prompt: runtime.Prompt
) -> dispatch.ApartHeads:
    """What heads may choose among, with the prompt grouped into text and everything else."""
    names = tuple(boundaries.split(","))
    if modality is None or not prompt.known:
        return dispatch.ApartHeads(names, note="the modality of this prompt is not known: boundaries were not tried")
    ids = modality

    def grouped(tiles: TileShape) -> Segments:
        shared = _shared(segments, VISION_LABELS, geometry, tiles)
        return shared or segment(_is_vision(ids), VISION_LABELS, geometry, tiles)

    return dispatch.ApartHeads(names, grouped)


VISION_LABELS = (0, 1)
"""What policy ``adaptive`` tells apart: text, and everything else."""


def _is_vision(ids: Tensor) -> Tensor:
    return (ids != 0).to(torch.int8)


_ALL_TEXT = "the modality of this prompt is not known: every token counts as text"


def _config_ids(ids: Tensor, modalities: tuple[tuple[int, str], ...], prompt: runtime.Prompt) -> Tensor:
    """The ids of a prompt as the head config numbers them."""
    table, _ = translated(modalities, prompt.names)
    if all(number == table[number] for number in range(len(table))):
        return ids
    return constant(table, ids.device)[ids.long()]


def empty_output(q: Tensor, v: Tensor, layout: str) -> Tensor:
    """An attention's output ``[B, HQ, q_len, D]`` in memory order ``layout``, ``"bshd"`` or ``"bhsd"``."""
    batch, heads, tokens, _ = q.shape
    if layout == "bshd":
        return q.new_empty(batch, tokens, heads, v.shape[3]).transpose(1, 2)
    return q.new_empty(batch, heads, tokens, v.shape[3])


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None, key_bounds: Tensor | None, modality: Tensor | None,
    segments: list[Tensor], scale: float, q_offset: int, window: int, policy: str, recall: float, max_density: float,
    min_tokens: int, dense_tail: bool, heads: str, layer: int | None, layout: str, key: str, abi: int,
    verify: float = 0.0, min_recall: float = 0.0, guard_rows: int = 64, boundaries: str = "",
) -> Tensor:  # fmt: skip
    return empty_output(q, v, layout)


def _geometry(
    q: Tensor, k: Tensor, key_padding: Tensor | None, key_bounds: Tensor | None, q_offset: int, window: int
) -> Geometry:
    kv_len = min(k.shape[2], q.shape[2] + q_offset)
    start, stop, holes = live_keys(q, kv_len, key_padding, key_bounds)
    return Geometry(
        batch=q.shape[0], q_heads=q.shape[1], kv_heads=k.shape[1], q_len=q.shape[2], kv_len=kv_len,
        q_offset=q_offset, window=window, kv_start=start, kv_stop=stop, key_padding=holes,
    )  # fmt: skip


def live_keys(
    q: Tensor, kv_len: int, key_padding: Tensor | None, key_bounds: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``kv_start``, ``kv_stop`` and ``key_padding`` of a geometry.

    Padding that leaves every key live is no padding; padding on one side is a range; only holes need the mask.
    """
    if key_padding is None:
        return None, None, None
    start = stop = holes = None
    _check_padding(key_padding, q.shape[0], kv_len)
    if key_bounds is None:
        key_bounds = key_bounds_of(key_padding)
    begins, ends, broken = key_bounds.unbind(1)
    begins, ends = begins.clamp(max=kv_len), ends.clamp(max=kv_len)
    if bool((begins > 0).any()) or bool((ends < kv_len).any()) or bool(broken.any()):
        start, stop = (x.to(torch.int32).to(q.device, non_blocking=True) for x in (begins, ends))
    if bool(broken.any()):
        holes = key_padding[:, :kv_len] != 0
    return start, stop, holes


def _check_padding(key_padding: Tensor, batch: int, kv_len: int) -> None:
    shape = tuple(key_padding.shape)
    if len(shape) != 2 or shape[0] != batch or shape[1] < kv_len:
        raise MMIError(
            f"the attention mask has shape {shape}, and this attention needs ({batch}, {kv_len}) or more keys;"
            " pass a mask with one row per batch element and one entry per token, past ones included"
        )


@torch.library.custom_op("mmi::key_bounds", mutates_args=(), tags=HOST_CODE)
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


@torch.library.custom_op("mmi::modality", mutates_args=(), tags=HOST_CODE)
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
    known = found.ids is not None
    if found.ids is None:
        found.ids = torch.zeros(batch, tokens, dtype=torch.int8, device=like.device)
    runtime.record_modality(
        graph_key,
        runtime.ModalityRun(found.source, found.ids.clone(), found.names, found.segments, found.grid_note, known),
    )
    return found.ids


@modality_of.register_fake
def _(
    like: Tensor, masks: list[Tensor], labels: str, after: Tensor | None, batch: int, tokens: int, graph_key: str
) -> Tensor:
    return torch.empty(batch, tokens, dtype=torch.int8, device=like.device)


@torch.library.custom_op("mmi::segments", mutates_args=(), tags=HOST_CODE)
def segments_of(
    q: Tensor,
    modality: Tensor,
    key_padding: Tensor | None,
    key_bounds: Tensor | None,
    q_offset: int,
    names: str,
    graph_key: str,
    abi: int,
) -> list[Tensor]:
    """A prompt grouped by modality (MMInference, section 3): the tensors of
    :class:`mmi_compile.kernels.segments.Segments`, for the tiles of the kernel that serves ``q``'s device, dtype and
    head dim. Its cost does not depend on the number of segments, and nothing waits for the device.

    Args:
        q: of the first attention that reads the result. modality: int8 ``[B, keys]``.
        key_padding, key_bounds, q_offset: as for ``mmi::attention``.
        names: modalities that the head config tells apart, as
            :func:`mmi_compile.kernels.layer_heads.names_to_text` writes them; none for text and everything else.
        graph_key: the reading graph, whose prompt says what its ids are called.
    """
    check_abi(abi)
    kv_len = min(modality.shape[1], q.shape[2] + q_offset)
    start, stop, holes = live_keys(q, kv_len, key_padding, key_bounds)
    geometry = Geometry(
        batch=q.shape[0], q_heads=1, kv_heads=1, q_len=q.shape[2], kv_len=kv_len, q_offset=q_offset,
        kv_start=start, kv_stop=stop, key_padding=holes,
    )  # fmt: skip
    modalities = parse_names(names)
    tiles = dispatch.tiles_for(q.device, q.dtype, q.shape[3])
    if not modalities:
        return segment(_is_vision(modality[:, :kv_len]), VISION_LABELS, geometry, tiles).tensors()
    ids = _config_ids(modality[:, :kv_len], modalities, runtime.prompt_here(graph_key, *modality.shape))
    return segment(ids, labels_of(modalities), geometry, tiles).tensors()


@segments_of.register_fake
def _(
    q: Tensor, modality: Tensor, key_padding: Tensor | None, key_bounds: Tensor | None, q_offset: int, names: str,
    graph_key: str, abi: int,
) -> list[Tensor]:  # fmt: skip
    kv_len = torch.sym_min(modality.shape[1], q.shape[2] + q_offset)
    tiles = dispatch.tiles_for(q.device, q.dtype, int(q.shape[3]))
    modalities = parse_names(names)
    count = len(labels_of(modalities) if modalities else VISION_LABELS)
    shapes = segment_shapes(q.shape[0], q.shape[2], kv_len, count, tiles)
    return [
        q.new_empty(shape, dtype=torch.int32 if index < len(shapes) - 1 else torch.bool)
        for index, shape in enumerate(shapes)
    ]


@torch.library.custom_op("mmi::tag_modality", mutates_args=(), tags=HOST_CODE)
def tag_modality(mask: Tensor, label: str) -> Tensor:
    """Return ``mask`` (bool ``[B, S]``) unchanged and record it under ``label``, which is ``kind`` or ``kind@token id``
    (see :func:`mmi_compile.record.told_apart`). It is an operator with a result, since one without would be removed as
    dead code."""
    record.tag(mask.clone(), label)
    return mask.clone()


@tag_modality.register_fake
def _(mask: Tensor, label: str) -> Tensor:
    return torch.empty_like(mask)


@torch.library.custom_op("mmi::begin_prompt", mutates_args=(), tags=HOST_CODE)
def begin_prompt(ids: Tensor) -> Tensor:
    """Return the prompt's token ids ``[B, S]`` unchanged and begin a new modality record."""
    record.begin_prompt()
    return ids.clone()


@begin_prompt.register_fake
def _(ids: Tensor) -> Tensor:
    return torch.empty_like(ids)
