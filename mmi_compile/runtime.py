"""What the operators saw when they last ran, kept for reports without making the device wait.

Only small device tensors are kept (one number per head); they are copied to the host when a report is read.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mmi_compile.visual_segments import VisualSegment


@dataclass
class AttentionRun:
    """The last run of one attention.

    Attributes:
        q_len, kv_len: tokens of that run.
        path: how it ran, in words: a kernel's name, or ``dense`` and why.
        choice: the adaptive policy's choice per head (device tensors), or None.
        density: pairs computed ÷ pairs of full causal attention, per ``[B, HQ]`` (device tensor), or a number.
        calls: how often this attention has run.
    """

    q_len: int
    kv_len: int
    path: str
    choice: Any = None
    density: Tensor | float = 1.0
    calls: int = 1


@dataclass
class ModalityRun:
    """The prompt that a graph last ran on.

    Attributes:
        source: where its modality was learned, in words.
        ids: int8 ``[B, S]`` on the device.
        labels: id → name, where it is not the standard one.
        segments: its images and videos with their strides, where their grids are known (host data).
        grid_note: what is not known about them, in words.
    """

    source: str
    ids: Tensor
    labels: dict[int, str] = field(default_factory=dict)
    segments: tuple[VisualSegment, ...] = ()
    grid_note: str = ""


_lock = threading.Lock()
_attention: dict[str, AttentionRun] = {}
_modality: dict[str, ModalityRun] = {}


def record_attention(key: str, run: AttentionRun) -> None:
    """Note the latest run of the attention called ``key``, and count it."""
    with _lock:
        before = _attention.get(key)
        if before is not None:
            run.calls = before.calls + 1
        _attention[key] = run


def record_modality(graph_key: str, run: ModalityRun) -> None:
    """Note the prompt that the graph called ``graph_key`` ran on."""
    with _lock:
        _modality[graph_key] = run


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
