"""Which token is what, for the forward that is running now in this thread.

The language model's graph often does not hold ``input_ids``; what another graph or a hook knows about the prompt is
recorded here and read when the language model runs. A record belongs to one forward of one thread. A hook's ends when
that hook is left. What compiled graphs tag ends with the call of the compiled function that they run in, whoever reads
it or not, or when the next prompt's embedding lookup begins another; and no graph reads the same record twice, so that
a second forward inside one compiled call cannot see the first one's prompt either.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmi_compile.compiled_call import CompiledCall, enclosing_calls
from mmi_compile.decision import MMIError
from mmi_compile.visual_segments import VisualSegment

LABELS = ("text", "image", "video", "audio")
"""Names of the first modality ids; a label outside this list gets the next free id of its record."""
MAX_MODALITIES = 16
ANY_VISION = "vision"
"""Label of tokens that are known to hold features, but not of which kind."""


@dataclass(eq=False)
class Record:
    """The modality of every token of one prompt. Two records are equal only when they are the same one.

    Attributes:
        source: who recorded it, for the report.
        ids: integer ``[B, S]`` given whole, or None when it is put together from ``masks``.
        names: id → label, where it is not the standard one.
        masks: label → bool ``[B, S]``, as tagged by compiled graphs; see :func:`told_apart` for the labels.
        segments: the images and videos of the prompt, where their grids are known.
        grid_note: what is not known about them, in words.
        readers: keys of the graphs that have read it.
        owner: the hook that made it, which alone may end it.
        call: the call of a compiled function in which it was made; it is read nowhere else.
    """

    source: str
    ids: Tensor | None = None
    names: dict[int, str] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    segments: tuple[VisualSegment, ...] = ()
    grid_note: str = ""
    readers: set[str] = field(default_factory=set)
    owner: object = None
    call: weakref.ref[CompiledCall] | None = None


@dataclass
class Reading:
    """What holds for the graph that asked.

    Attributes:
        ids: int8 ``[batch, tokens]``, the caller's own; None when nothing is known.
        source: where it was learned, or why it was not.
        names: id → label, where it is not the standard one.
        segments, grid_note: as in :class:`Record`; only of the record that ``ids`` came from.
    """

    ids: Tensor | None = None
    source: str = ""
    names: dict[int, str] = field(default_factory=dict)
    segments: tuple[VisualSegment, ...] = ()
    grid_note: str = ""


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
            modalities of your own. A model whose prompt has another shape ignores it, with a note in the report; one
            compiled with ``strict=True`` by :func:`mmi_compile.compile` refuses it.

    Raises:
        MMIError: wrong rank or dtype, an id outside 0 … 15, or a tensor without values (device "meta").
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


def pop_hooked(owner: object) -> Record | None:
    """End the innermost record if it is ``owner``'s, and return it: one whose hook never got to run is not there to be
    ended."""
    ended = _state.hooked.pop() if _state.hooked and _state.hooked[-1].owner is owner else None
    _forget_tagged()
    return ended


def _forget_tagged() -> None:
    """Outside all hooked forwards, what compiled graphs recorded belongs to a forward that is over."""
    if not _state.hooked:
        _state.tagged = None


def checked_ids(ids: Tensor) -> Tensor:
    """Validate modality ids ``[B, S]`` given by a user. Waits for their device once."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.is_complex():
        found = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise MMIError(f"modality ids are {found}; pass an integer tensor of shape [batch, tokens]")
    if ids.is_meta:
        raise MMIError('modality ids on the device "meta" hold no values; pass them on the CPU or the model\'s device')
    if ids.numel():
        least, most = torch.stack(torch.aminmax(ids.to(torch.int64))).tolist()
        check_range("modality ids", least, most)
    return ids


def check_range(what: str, least: int, most: int) -> None:
    """Raise MMIError where ids lie outside 0 … 15."""
    if least < 0 or most >= MAX_MODALITIES:
        raise MMIError(
            f"{what} must be 0 … {MAX_MODALITIES - 1}, found {least} … {most};"
            f" number your own modalities from {len(LABELS)} on, and text 0"
        )


def given_misfit(batch: int, tokens: int) -> str:
    """Why the ids that the user gave with :func:`modality` do not fit this prompt; empty when they do, or none are."""
    record = _state.given[-1] if _state.given else None
    if record is None or record.ids is None or record.ids.shape == (batch, tokens):
        return ""
    return f"shape {tuple(record.ids.shape)} is not ({batch}, {tokens})"


def begin_prompt() -> None:
    """A new prompt's embedding lookup runs: whatever compiled graphs recorded before belongs to another forward."""
    _state.tagged = _tagged_record()


def tag(mask: Tensor, label: str) -> None:
    """Record a mask ``[B, S]`` found by a compiled graph; ``label`` as in :func:`told_apart`."""
    tagged = _state.tagged
    if tagged is None or tagged.readers or not _is_of_this_call(tagged):
        tagged = _state.tagged = _tagged_record()
    tagged.masks[label] = mask


def _tagged_record() -> Record:
    record = Record("compiled graphs")
    calls = enclosing_calls()
    if calls:
        # When the call returns, nobody can read the masks any more: free them.
        record.call = weakref.ref(calls[0], lambda _, masks=record.masks: masks.clear())  # type: ignore[misc]
    return record


def _is_of_this_call(record: Record) -> bool:
    """Graphs that are not run by a compiled function (called directly) share what such graphs recorded."""
    calls = enclosing_calls()
    if record.call is None:
        return not calls
    return record.call() in calls


def given(batch: int, tokens: int, device: torch.device) -> Reading:
    """The ids int8 ``[batch, tokens]`` that the user gave with :func:`modality`."""
    return _fitting(_state.given[-1:], batch, tokens, device)


def read(reader: str, batch: int, tokens: int, device: torch.device) -> Reading:
    """The ids int8 ``[batch, tokens]`` that hold for the calling graph, and their source (or why there are none).

    In order of trust: given by hand, a hook's, tagged by compiled graphs.
    """
    found = _fitting([*_state.given[-1:], *_state.hooked[-1:]], batch, tokens, device)
    if found.ids is not None:
        return found
    tagged = _read_tagged(reader, batch, tokens, device)
    told = tagged.source if tagged.ids is not None or not found.source else ""
    tagged.source = "; ".join(filter(None, [told, found.source]))
    return tagged


def _fitting(records: Sequence[Record], batch: int, tokens: int, device: torch.device) -> Reading:
    notes: list[str] = []
    for record in records:
        if record.ids is None:
            notes.append(record.source)
        elif record.ids.shape != (batch, tokens):
            notes.append(f"{record.source}, ignored: shape {tuple(record.ids.shape)} is not ({batch}, {tokens})")
        else:
            ids = record.ids.to(device=device, dtype=torch.int8, copy=True)
            source = "; ".join([record.source, *notes])
            return Reading(ids, source, record.names, record.segments, record.grid_note)
    return Reading(source="; ".join(notes))


def _read_tagged(reader: str, batch: int, tokens: int, device: torch.device) -> Reading:
    tagged = _state.tagged
    if tagged is None or not tagged.masks:
        return Reading(source="none found")
    if reader in tagged.readers or not _is_of_this_call(tagged):
        _state.tagged = None  # another forward has begun
        return Reading(source="none found")
    tagged.readers.add(reader)
    if any(mask.shape != (batch, tokens) for mask in tagged.masks.values()):
        return Reading(source=f"{tagged.source}, ignored: recorded for another shape than ({batch}, {tokens})")
    labels, note = told_apart(list(tagged.masks))
    ids, names = merge(list(tagged.masks.values()), labels)
    return Reading(ids.to(device), f"{tagged.source} ({note})" if note else tagged.source, names)


def told_apart(labels: Sequence[str]) -> tuple[list[str], str]:
    """Which kind each mask is of, and what cannot be told, in words.

    Args:
        labels: ``kind`` or ``kind@token``, with the token id that the mask compares with. Where masks of one id are
            called image here and video there, the id alone does not tell which.
    """
    kinds: dict[str, set[str]] = {}
    for label in labels:
        kind, _, token = label.partition("@")
        if token and kind in LABELS:
            kinds.setdefault(token, set()).add(kind)
    shared = {token: sorted(found) for token, found in kinds.items() if len(found) > 1}
    named = []
    for label in labels:
        kind, _, token = label.partition("@")
        named.append(ANY_VISION if token in shared else next(iter(kinds.get(token, ())), kind))
    notes = [f"{' and '.join(found)} tokens share id {token}: not told apart" for token, found in shared.items()]
    if "image" in named and "video" not in named and ANY_VISION not in named:
        notes.append(IMAGE_ONLY)
    return named, "; ".join(notes)


IMAGE_ONLY = "no video token is known: frames of a video would count as images"


def merge(masks: Sequence[Tensor], labels: Sequence[str]) -> tuple[Tensor, dict[int, str]]:
    """One int8 id per token from bool masks ``[B, S]`` and their labels, and the label of every id.

    What is known only to be vision gives way to a mask that knows more.
    """
    ids = torch.zeros(masks[0].shape, dtype=torch.int8, device=masks[0].device)
    numbered = list(zip(masks, labels, label_ids(labels), strict=True))
    for mask, _, number in sorted(numbered, key=lambda item: item[1] != ANY_VISION):
        ids = ids.masked_fill(mask, number)
    return ids, {number: label for _, label, number in numbered}


def label_ids(labels: Sequence[str]) -> list[int]:
    """The id of each label: the standard one, or the next free one from 4 on."""
    own = [label for label in dict.fromkeys(labels) if label not in LABELS]
    free = {label: min(len(LABELS) + i, MAX_MODALITIES - 1) for i, label in enumerate(own)}
    return [LABELS.index(label) if label in LABELS else free[label] for label in labels]
