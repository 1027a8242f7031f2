"""Which token is what, for the forward that is running now in this thread.

The language model's graph often does not hold ``input_ids``; what another graph or a hook knows about the prompt is
recorded here and read when the language model runs. A record belongs to one forward of one thread. It ends when the
hook that made it is left, or when the next prompt's embedding lookup begins another; and no graph reads the same record
twice, so a second forward of the same graph can never see the first one's prompt.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmi_compile.decision import MMIError

LABELS = ("text", "image", "video", "audio")
"""Names of the first modality ids; a label outside this list gets the next free id of its record."""
MAX_MODALITIES = 16


@dataclass(eq=False)
class Record:
    """The modality of every token of one prompt. Two records are equal only when they are the same one.

    Attributes:
        source: who recorded it, for the report.
        ids: integer ``[B, S]`` given whole, or None when it is put together from ``masks``.
        masks: label → bool ``[B, S]``, as tagged by compiled graphs.
        readers: keys of the graphs that have read it.
        owner: the hook that made it, which alone may end it.
    """

    source: str
    ids: Tensor | None = None
    masks: dict[str, Tensor] = field(default_factory=dict)
    readers: set[str] = field(default_factory=set)
    owner: object = None


class _State(threading.local):
    def __init__(self) -> None:
        self.given: list[Record] = []  # modality(ids), the innermost last
        self.hooked: list[Record] = []  # forward hooks, the innermost last
        self.tagged: Record | None = None  # compiled graphs


_state = _State()


@contextmanager
def modality(ids: Tensor) -> Iterator[None]:
    """Say which tokens are text, image or video, for every compiled model that runs inside the ``with`` block.

    Args:
        ids: integer or bool tensor ``[batch, tokens]`` on any device; 0 text, 1 image, 2 video, 3 audio, up to 15 for
            modalities of your own. A model whose prompt has another shape ignores it, with a note in the report.

    Raises:
        MMIError: wrong rank or dtype, or an id outside 0 … 15.
    """
    record = Record("given by hand", ids=checked_ids(ids))
    _state.given.append(record)
    try:
        yield
    finally:
        _state.given.remove(record)


@contextmanager
def hooked(record: Record) -> Iterator[None]:
    """Hold a hook's record for one forward."""
    push_hooked(record)
    try:
        yield
    finally:
        if record in _state.hooked:
            del _state.hooked[_state.hooked.index(record) :]
        _forget_tagged()


def push_hooked(record: Record) -> None:
    """Begin a forward hook's record. Every push is paired with a :func:`pop_hooked` by the record's owner."""
    _forget_tagged()
    _state.hooked.append(record)


def pop_hooked(owner: object) -> None:
    """End the innermost record if it is ``owner``'s: one whose hook never got to run is not there to be ended."""
    if _state.hooked and _state.hooked[-1].owner is owner:
        _state.hooked.pop()
    _forget_tagged()


def _forget_tagged() -> None:
    """Outside all hooked forwards, what compiled graphs recorded belongs to a forward that is over."""
    if not _state.hooked:
        _state.tagged = None


def checked_ids(ids: Tensor) -> Tensor:
    """Validate modality ids ``[B, S]`` given by a user."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.is_complex():
        found = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise MMIError(f"modality ids are {found}; pass an integer tensor of shape [batch, tokens]")
    if ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < MAX_MODALITIES):
        raise MMIError(f"modality ids must be 0 … {MAX_MODALITIES - 1}, found {int(ids.min())} … {int(ids.max())}")
    return ids


def begin_prompt() -> None:
    """A new prompt's embedding lookup runs: whatever compiled graphs recorded before belongs to another forward."""
    _state.tagged = Record("compiled graphs")


def tag(mask: Tensor, label: str) -> None:
    """Record a mask ``[B, S]`` found by a compiled graph."""
    if _state.tagged is None or _state.tagged.readers:
        _state.tagged = Record("compiled graphs")
    _state.tagged.masks[label] = mask


def given(batch: int, tokens: int, device: torch.device) -> tuple[Tensor | None, str]:
    """The ids int8 ``[batch, tokens]`` that the user gave with :func:`modality`, and their source (or why not)."""
    return _fitting(_state.given[-1:], batch, tokens, device)


def read(reader: str, batch: int, tokens: int, device: torch.device) -> tuple[Tensor | None, str]:
    """The ids int8 ``[batch, tokens]`` that hold for the calling graph, and their source (or why there are none).

    In order of trust: given by hand, a hook's, tagged by compiled graphs.
    """
    ids, notes = _fitting([*_state.given[-1:], *_state.hooked[-1:]], batch, tokens, device)
    if ids is not None:
        return ids, notes
    ids, source = _read_tagged(reader, batch, tokens, device)
    return ids, "; ".join(filter(None, [source if ids is not None or not notes else "", notes]))


def _fitting(records: Sequence[Record], batch: int, tokens: int, device: torch.device) -> tuple[Tensor | None, str]:
    notes: list[str] = []
    for record in records:
        if record.ids is None:
            notes.append(record.source)
        elif record.ids.shape != (batch, tokens):
            notes.append(f"{record.source}, ignored: shape {tuple(record.ids.shape)} is not ({batch}, {tokens})")
        else:
            return record.ids.to(device=device, dtype=torch.int8, copy=True), "; ".join([record.source, *notes])
    return None, "; ".join(notes)


def _read_tagged(reader: str, batch: int, tokens: int, device: torch.device) -> tuple[Tensor | None, str]:
    tagged = _state.tagged
    if tagged is None or not tagged.masks:
        return None, "none found"
    if reader in tagged.readers:
        _state.tagged = None  # the same graph again: another forward has begun
        return None, "none found"
    tagged.readers.add(reader)
    if any(mask.shape != (batch, tokens) for mask in tagged.masks.values()):
        return None, f"{tagged.source}, ignored: recorded for another shape than ({batch}, {tokens})"
    return merge(list(tagged.masks.values()), list(tagged.masks)).to(device), tagged.source


def merge(masks: Sequence[Tensor], labels: Sequence[str]) -> Tensor:
    """One int8 id per token from one bool mask ``[B, S]`` per label."""
    ids = torch.zeros(masks[0].shape, dtype=torch.int8, device=masks[0].device)
    for mask, label in zip(masks, label_ids(labels), strict=True):
        ids = ids.masked_fill(mask, label)
    return ids


def label_ids(labels: Sequence[str]) -> list[int]:
    """The id of each label: the standard one, or the next free one from 4 on."""
    ids, free = [], len(LABELS)
    for label in labels:
        if label in LABELS:
            ids.append(LABELS.index(label))
        else:
            ids.append(min(free, MAX_MODALITIES - 1))
            free += 1
    return ids
