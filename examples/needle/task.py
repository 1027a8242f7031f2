"""Needles in a video: what the model was trained on, made anew from photographs and digits that Python packages ship.

A video drifts over a photograph. Four of its frames show a digit, each tinted in a colour of its own; after a fifth
frame stands a note with a code. Every frame follows its number, so that text and image alternate all along::

    <|im_start|>user
    Video:
    0000 [36 image tokens]
    0001 [36 image tokens]
    [note: code 4821]
    ...
    Q: red time? A: 0001
    Q: note code? A: 4821

``time`` asks in which frame a colour is (a visual needle), ``code`` what the note says (a needle of text). Answers are
part of the prompt: the model is asked for the next token at every place of an answer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from needle.packages import need

Kind: TypeAlias = Literal["time", "code"]
KINDS: tuple[Kind, ...] = ("time", "code")
Split: TypeAlias = Literal["train", "test"]
Encode: TypeAlias = Callable[[str], Sequence[int]]
"""Token ids of a text, without special tokens."""

SIDE = 48
"""Pixels along a side of a frame."""
FRAME_TOKENS = 36
"""Image tokens of a frame."""
MOST_FRAMES = 168
"""Frames of the longest videos that the model was trained on."""
TEXT, VIDEO = 0, 2
"""Modality ids, as ``mmi_compile.modality`` takes them."""
COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (1.0, 0.1, 0.1), "green": (0.1, 1.0, 0.1), "blue": (0.2, 0.3, 1.0), "yellow": (1.0, 1.0, 0.1),
}  # fmt: skip

_DIGIT_SIDE = 24
_MEAN, _SPREAD = 0.45, 0.25  # of pixel values, as the vision tower was trained
_PHOTOGRAPHS: Mapping[Split, tuple[str, ...]] = {
    "train": ("coffee", "astronaut", "retina", "rocket", "grass", "brick", "page", "china.jpg"),
    "test": ("chelsea", "gravel", "camera", "flower.jpg"),
}


@dataclass(frozen=True)
class Sources:
    """What videos are made of.

    Attributes:
        photographs: float32 ``[3, height, width]`` in 0 … 1, larger than a frame.
        digits: float32 ``[count, 24, 24]`` in 0 … 1.
    """

    photographs: tuple[Tensor, ...]
    digits: Tensor


@dataclass(frozen=True)
class Answer:
    """Where an answer stands in its prompt: ``tokens`` at positions ``start …``."""

    kind: Kind
    start: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """One video with its questions and their answers.

    Attributes:
        input_ids: int64 ``[1, N]``.
        pixel_values: float32 ``[frames, 3, 48, 48]``, normalized.
        modality: int8 ``[1, N]``, ``TEXT`` or ``VIDEO``.
        answers: in the order of the prompt.
    """

    input_ids: Tensor
    pixel_values: Tensor
    modality: Tensor
    answers: tuple[Answer, ...]

    @property
    def asked(self) -> Tensor:
        """Positions whose next token belongs to an answer, int64 ``[answer tokens]``, in the order of ``answers``."""
        places = [torch.arange(len(a.tokens)) + a.start - 1 for a in self.answers]
        return torch.cat(places).to(self.input_ids.device)

    def on(self, device: torch.device | str, dtype: torch.dtype) -> Prompt:
        """The prompt on a device, frames in ``dtype``."""
        ids, modality = self.input_ids.to(device), self.modality.to(device)
        return dataclasses.replace(
            self, input_ids=ids, pixel_values=self.pixel_values.to(device, dtype), modality=modality
        )


def load_sources(split: Split) -> Sources:
    """Photographs of scikit-image and scikit-learn, and scikit-learn's handwritten digits.

    Args:
        split: ``"train"``: what the weights were trained on; take it to calibrate. ``"test"``: other photographs and
            digits.

    Raises:
        MissingPackage: scikit-image or scikit-learn is not installed.
    """
    datasets = need("sklearn.datasets")
    images = datasets.load_digits().images
    first_test = int(0.8 * len(images))
    mine = slice(0, first_test) if split == "train" else slice(first_test, None)
    small = torch.tensor(images[mine] / 16.0, dtype=torch.float32)
    digits = F.interpolate(small[:, None], size=_DIGIT_SIDE, mode="bilinear")[:, 0].clamp(0, 1)
    return Sources(tuple(_photograph(name) for name in _PHOTOGRAPHS[split]), digits)


def _photograph(name: str) -> Tensor:
    if name.endswith(".jpg"):
        array: Any = need("sklearn.datasets").load_sample_image(name)
    else:
        array = getattr(need("skimage.data"), name)()
    pixels = torch.tensor(array, dtype=torch.float32)
    pixels = pixels[..., None].expand(-1, -1, 3) if pixels.dim() == 2 else pixels[..., :3]
    return pixels.permute(2, 0, 1) / 255


def make_prompt(
    encode: Encode, image_token: int, sources: Sources, frames: int, seed: int, *, kinds: Sequence[Kind] = KINDS
) -> Prompt:
    """A video of ``frames`` frames, hidden needles, and a question for each of them in random order.

    Args:
        encode: the tokenizer.
        image_token: the id that stands for a piece of a frame.
        seed: of everything that is random here.
        kinds: which needles to ask for.

    Raises:
        ValueError: fewer frames than needles, or more than four digits can number.
    """
    if not len(COLOURS) < frames <= 9999:
        raise ValueError(f"frames is {frames}; give {len(COLOURS) + 1} to 9999")
    generator = torch.Generator().manual_seed(seed)
    video = _drift(sources.photographs[_below(len(sources.photographs), generator)], frames, generator)
    *shown, noted = torch.randperm(frames, generator=generator)[: len(COLOURS) + 1].tolist()
    times = dict(zip(COLOURS, shown, strict=True))
    for colour, frame in times.items():
        _paste(video[frame], sources.digits[_below(len(sources.digits), generator)], COLOURS[colour], generator)
    code = str(1000 + _below(9000, generator))
    ids = _video_tokens(encode, image_token, frames, noted, code)
    questions: list[tuple[Kind, str, str]] = [("time", f"{c} time", f"{at:04d}") for c, at in times.items()]
    questions = [q for q in [*questions, ("code", "note code", code)] if q[0] in kinds]
    answers = []
    for place in torch.randperm(len(questions), generator=generator).tolist():
        kind, question, answer = questions[place]
        ids += encode(f"Q: {question}? A: ")
        answers.append(Answer(kind, len(ids), tuple(encode(answer))))
        ids += [*answers[-1].tokens, *encode("\n")]
    tokens = torch.tensor([ids])
    modality = torch.where(tokens == image_token, VIDEO, TEXT).to(torch.int8)
    return Prompt(tokens, (video - _MEAN) / _SPREAD, modality, tuple(answers))


def _video_tokens(encode: Encode, image_token: int, frames: int, noted: int, code: str) -> list[int]:
    ids = list(encode("<|im_start|>user\nVideo:"))
    for frame in range(frames):
        ids += [*encode(f"\n{frame:04d} "), *[image_token] * FRAME_TOKENS]
        if frame == noted:
            ids += encode(f"\n[note: code {code}]")
    return ids + list(encode("\n"))


def _drift(photograph: Tensor, frames: int, generator: torch.Generator) -> Tensor:
    """A frame-sized window that wanders over the photograph, float32 ``[frames, 3, 48, 48]``."""
    top, left = (_path(size, frames, generator) for size in photograph.shape[1:])
    ramp = torch.arange(SIDE)
    rows, columns = top[:, None, None] + ramp[:, None], left[:, None, None] + ramp
    return photograph[:, rows, columns].movedim(1, 0).contiguous()


def _path(size: int, frames: int, generator: torch.Generator) -> Tensor:
    """Where the window begins on one axis in each frame: a sum of slow waves over all of the photograph, int64."""
    time, waves = torch.linspace(0, 1, frames), torch.rand(3, generator=generator)
    turns = [(n + 1) * time * (1 + waves[0]) + waves[n] for n in range(3)]
    place = sum(wave * torch.sin(2 * math.pi * turn) for wave, turn in zip(waves, turns, strict=True))
    assert isinstance(place, Tensor)
    place = (place - place.min()) / (place.max() - place.min() + 1e-6)
    return (place * (size - SIDE - 1)).long()


def _paste(frame: Tensor, digit: Tensor, colour: tuple[float, float, float], generator: torch.Generator) -> None:
    """Put a tinted digit on a nearly black square anywhere in the frame, in place."""
    top, left = (_below(SIDE - _DIGIT_SIDE + 1, generator) for _ in range(2))
    tint = torch.tensor(colour)[:, None, None]
    frame[:, top : top + _DIGIT_SIDE, left : left + _DIGIT_SIDE] = tint * digit + 0.05 * (1 - digit)


def _below(stop: int, generator: torch.Generator) -> int:
    return int(torch.randint(stop, (), generator=generator))
