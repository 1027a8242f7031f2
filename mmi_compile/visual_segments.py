"""Where images and videos lie in a prompt, and the strides of their rows and frames, from grid metadata.

A processor writes one token per merged patch: a medium of grid ``(t, h, w)`` patches with merge size ``m`` becomes
``t`` frames of ``h / m`` rows of ``w / m`` tokens. What stands between frames (separators, time stamps) is in no
metadata; it is measured as the distance between the first tokens of neighbouring frames in the prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mmi_compile.decision import MMIError


@dataclass(frozen=True)
class VisualSegment:
    """One image or one video of a prompt.

    Attributes:
        batch: element of the batch.
        start, stop: its first token, and one past its last; what separates its frames lies between them.
        modality: id of its tokens (1 image, 2 video).
        frames, rows, tokens_per_row: its tokens, ``frames × rows × tokens_per_row`` of them. The tokens of one frame
            are contiguous.
        frame_stride: tokens from the start of a frame to the start of the next, separators included; None where there
            is one frame, or where the distance varies.
        source: the argument that described it.
    """

    batch: int
    start: int
    stop: int
    modality: int
    frames: int
    rows: int
    tokens_per_row: int
    frame_stride: int | None
    source: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Grids:
    """What a forward was told of its images, or of its videos.

    Attributes:
        name: the argument, such as ``video_grid_thw``.
        modality: id of the tokens that it describes.
        sizes: ``(t, h, w)`` of each medium in patches, in the order of the prompt, batch element by batch element.
        merges: patches along each side of a token, per medium.
        kept: how many tokens were left over where the model drops some, or None.
    """

    name: str
    modality: int
    sizes: tuple[tuple[int, int, int], ...]
    merges: tuple[int, ...]
    kept: int | None = None

    def tokens(self) -> list[int]:
        return [t * (h // m) * (w // m) for (t, h, w), m in zip(self.sizes, self.merges, strict=True)]


class GridMismatch(MMIError):
    """Grid metadata does not describe the prompt that it came with."""


def find_segments(ids: Tensor, grids: Grids) -> tuple[list[VisualSegment], str]:
    """Lay the media of ``grids`` over the tokens of their modality.

    Args:
        ids: modality ids ``[B, S]`` on the host.

    Returns:
        One segment per medium, and what is not known about them, in words (empty when all is known). Where the model
        drops tokens, rows and frames have no fixed length, and there are no segments.

    Raises:
        GridMismatch: the metadata describes another number of tokens than the prompt holds, or a medium that would
            spread over two batch elements.
    """
    batches, positions = (ids == grids.modality).nonzero().unbind(1)
    counts = grids.tokens()
    if grids.kept is not None and grids.kept != sum(counts) and grids.kept == positions.numel():
        return [], f"{grids.name}: the model dropped {sum(counts) - grids.kept} of {sum(counts)} tokens"
    if sum(counts) != positions.numel():
        raise GridMismatch(
            f"{grids.name} describes {sum(counts)} tokens, the prompt holds {positions.numel()} of modality"
            f" {grids.modality}; pass the grids of exactly this prompt, or leave strict off to go on without strides"
        )
    segments, notes = [], []
    at = 0
    for (frames, height, width), merge, count in zip(grids.sizes, grids.merges, counts, strict=True):
        if not count:
            continue
        where = positions[at : at + count]
        if batches[at] != batches[at + count - 1]:
            raise GridMismatch(
                f"{grids.name} describes a medium of {count} tokens, of which batch element {int(batches[at])} holds"
                f" {int((batches[at : at + count] == batches[at]).sum())}; pass the grids in the order of the prompts"
            )
        at += count
        firsts, whole = _frames(where, frames)
        if not whole:
            notes.append(f"{grids.name}: a frame of {count // frames} tokens is interrupted at {int(where[0])}")
            continue
        stride, note = _stride(firsts, grids.name)
        notes.append(note)
        segments.append(
            VisualSegment(
                batch=int(batches[at - 1]), start=int(where[0]), stop=int(where[-1]) + 1, modality=grids.modality,
                frames=frames, rows=height // merge, tokens_per_row=width // merge, frame_stride=stride,
                source=grids.name,
            )
        )  # fmt: skip
    return segments, _joined(notes)


def _frames(where: Tensor, frames: int) -> tuple[Tensor, bool]:
    """The first token of each frame, and whether the tokens of every frame are contiguous."""
    table = where.view(frames, -1)
    return table[:, 0], bool((table[:, -1] - table[:, 0] == table.shape[1] - 1).all())


def _stride(firsts: Tensor, name: str) -> tuple[int | None, str]:
    distances = firsts.diff()
    if not distances.numel():
        return None, ""
    least, most = int(distances.min()), int(distances.max())
    if least == most:
        return least, ""
    return None, f"{name}: frames at {int(firsts[0])} lie {least} to {most} tokens apart"


def _joined(notes: Iterable[str]) -> str:
    """A few notes, and how many more there are."""
    told = list(dict.fromkeys(note for note in notes if note))
    return "; ".join(told[:2]) + (f"; and {len(told) - 2} more" if len(told) > 2 else "")


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Integer tensors as int64 on the host. However many lie on a device, it is waited for once."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return [tensor.to(torch.int64) for tensor in tensors]
    device = next(tensor.device for tensor in tensors if tensor.device.type != "cpu")
    # Token ids and grids fit in 32 bits, and a prompt of a million tokens is worth halving.
    flat = torch.cat([tensor.to(device=device, dtype=torch.int32).flatten() for tensor in tensors]).cpu()
    parts = flat.to(torch.int64).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
