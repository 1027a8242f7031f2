"""What the operators saw when they last ran, kept for reports without making the device wait.

Only small device tensors are kept (one number per head); they are copied to the host when a report is read.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from mmi_compile.profiling import Stopwatch
from mmi_compile.visual_segments import VisualSegment

if TYPE_CHECKING:
    from mmi_compile.kernels.geometry import Geometry


@dataclass
class GuardRun:
    """What the guard saw in one attention call.

    Attributes:
        rows: query rows it looked at. min_recall: what was asked, 0 for nothing.
        recall: of each head before any was moved, ``[B, HQ]``. error: relative, of what ran; None where not verified.
        moved: heads moved to dense, bool ``[B, HQ]``; None where nothing was asked.
        watch: the time it took. call: how many calls of this attention came before.
    """

    rows: int
    min_recall: float = 0.0
    recall: Tensor | None = None
    error: Tensor | None = None
    moved: Tensor | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)
    call: int = 0


@dataclass
class AttentionRun:
    """The last run of one attention.

    Attributes:
        q_len, kv_len: tokens of that run.
        path: how it ran, in words: a kernel's name, or ``dense`` and why.
        choice: the adaptive policy's choice per head (device tensors), or None.
        density: pairs computed ÷ pairs of full causal attention, per ``[B, HQ]`` (device tensor), or a number.
        calls: how often this attention has run.
        heads: under a head config, what each query head ran, in words; else empty.
        notes: what the reader of a report should know of this run, in words.
        guard: what the guard saw the last time it looked; None when it never did.
    """

    q_len: int
    kv_len: int
    path: str
    choice: Any = None
    density: Tensor | float = 1.0
    calls: int = 1
    heads: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    guard: GuardRun | None = None


@dataclass
class ModalityRun:
    """The prompt that a graph last ran on.

    Attributes:
        source: where its modality was learned, in words.
        ids: int8 ``[B, S]`` on the device.
        labels: id → name, where it is not the standard one.
        segments: its images and videos with their strides, where their grids are known (host data).
        grid_note: what is not known about them, in words.
        known: whether anything told the modality; if not, ``ids`` call every token text.
    """

    source: str
    ids: Tensor
    labels: dict[int, str] = field(default_factory=dict)
    segments: tuple[VisualSegment, ...] = ()
    grid_note: str = ""
    known: bool = True


class AttentionCall(NamedTuple):
    """One prefill attention that is about to be computed.

    Attributes:
        key: names the attention, as in reports. layer: its decoder layer; None where the graph does not tell.
        q: ``[B, HQ, q_len, D]``; k, v: ``[B, HKV, kv_len, D]``, views of the model's own tensors.
        geometry: what the model's mask allows. scale: factor on the scores.
        modality: int8 ``[B, kv_len]``, or None where the graph has none.
        names: name of each modality id that the prompt's record names, standard ids included.
        known: whether anything told the modality; if not, every token counts as text.
    """

    key: str
    layer: int | None
    q: Tensor
    k: Tensor
    v: Tensor
    geometry: Geometry
    scale: float
    modality: Tensor | None
    names: Mapping[int, str]
    known: bool


AttentionObserver = Callable[[AttentionCall], "Tensor | None"]
"""Gets every call before it is computed; what it returns, ``[B, HQ, q_len, D]`` in q's dtype, is the output instead."""


class _Here(threading.local):
    def __init__(self) -> None:
        self.prompts: OrderedDict[tuple[str, int, int], Prompt] = OrderedDict()
        self.observers: list[AttentionObserver] = []


_PROMPTS_KEPT = 64
_here = _Here()


@contextmanager
def observing_attention(callback: AttentionObserver) -> Iterator[None]:
    """Show ``callback`` every prefill attention that compiled graphs run in this thread, until the block ends.

    Of nested observers only the innermost is asked. Its exceptions pass through to whoever runs the model.
    """
    _here.observers.append(callback)
    try:
        yield
    finally:
        _here.observers.pop()


def attention_observer() -> AttentionObserver | None:
    """Who observes the attentions of this thread."""
    return _here.observers[-1] if _here.observers else None


_lock = threading.Lock()
_attention: dict[str, AttentionRun] = {}
_modality: dict[str, ModalityRun] = {}


def record_attention(key: str, run: AttentionRun) -> None:
    """Note the latest run of the attention called ``key``, and count it."""
    with _lock:
        before = _attention.get(key)
        if before is not None:
            run.calls = before.calls + 1
        if run.guard is not None:
            run.guard.call = run.calls
        elif before is not None:
            run.guard = before.guard
        _attention[key] = run


def record_modality(graph_key: str, run: ModalityRun) -> None:
    """Note the prompt that the graph called ``graph_key`` ran on."""
    with _lock:
        _modality[graph_key] = run
    here, batch, tokens = _here.prompts, run.ids.shape[0], run.ids.shape[1]
    here[graph_key, batch, tokens] = Prompt(run.known, run.labels)
    here.move_to_end((graph_key, batch, tokens))
    while len(here) > _PROMPTS_KEPT:
        here.popitem(last=False)


class Prompt(NamedTuple):
    """What the host knows of the modalities of a prompt: whether they are known at all, and id → name where it is not
    the standard one."""

    known: bool = True
    names: Mapping[int, str] = {}


def prompt_here(graph_key: str, batch: int, tokens: int) -> Prompt:
    """The prompt of this shape that the graph called ``graph_key`` is running on in this thread; where the graph had
    its modality from elsewhere than ``mmi::modality``, it counts as known."""
    return _here.prompts.get((graph_key, batch, tokens), Prompt())


def is_due(key: str, share: float) -> bool:
    """Whether the next call of an attention is one of the ``share`` that are verified: the first, then evenly."""
    if share <= 0:
        return False
    run = _attention.get(key)
    calls = 0 if run is None else run.calls
    return calls == 0 or int((calls + 1) * share) > int(calls * share)


def attention_run(key: str) -> AttentionRun | None:
    """The latest run of the attention called ``key``; None when it has not run."""
    return _attention.get(key)


def modality_run(graph_key: str) -> ModalityRun | None:
    """The latest prompt of the graph called ``graph_key``; None when it has not run."""
    return _modality.get(graph_key)


def forget() -> None:
    """Drop everything recorded."""
    with _lock:
        _attention.clear()
        _modality.clear()
    _here.prompts.clear()
