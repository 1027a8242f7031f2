"""Queries and keys whose attention structure is planted, hence known: for tests, examples and benchmarks.

Keys carry features, and queries ask for them:

* one feature per query head of a group marks the columns and lines of that head;
* rotations ``(cos w i, sin w i)``, as in rotary embeddings, whose product depends on the distance alone. Arbitrary
  frequencies peak at one distance, low ones make a window, and harmonics of one period peak at all of its multiples;
* one feature per modality, where a head stays inside it.

Inputs are made on the device, a stretch of rows at a time, so that a million tokens need no more than themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

CHUNK = 1 << 16
"""Rows made at a time. Part of what a seed means: other sizes draw other numbers."""

HIDE = 24.0
"""How far the score of a pair across modalities lies below others, for heads that stay inside theirs."""

FADE = 3.0
"""How far the score of a window has fallen at its edge: a pair there weighs ``exp(-3)`` of one at distance 0."""

SHARES = {"columns": 0.7, "local": 0.25, "far": 0.05}
"""How the mass of a head with a window is divided over what else it has."""


@dataclass(frozen=True)
class Structure:
    """Where one head puts its attention. Empty means (nearly) uniform attention, which no pattern can thin out.

    Attributes:
        columns: keys that every later row attends to.
        distances: distances ``i - j`` that every row attends to; 0 plants locality.
        stride, phase: key lines ``j = phase (mod stride)``; stride 0 for none.
        local: a window of that many nearest keys, fading towards its edge; 0 for none.
        period, offset: diagonals at all distances ``offset (mod period)``; period 0 for none.
        same_modality: rows attend to keys of their own modality only.
    """

    columns: tuple[int, ...] = ()
    distances: tuple[int, ...] = ()
    stride: int = 0
    phase: int = 0
    local: int = 0
    period: int = 0
    offset: int = 0
    same_modality: bool = False

    def keys(self, length: int, device: torch.device | str = "cpu") -> Tensor:
        """The planted key columns and lines, bool ``[length]``."""
        j = torch.arange(length, device=device)
        lines = j % self.stride == self.phase if self.stride else torch.zeros_like(j, dtype=torch.bool)
        inside = [column for column in self.columns if 0 <= column < length]
        lines[torch.tensor(inside, dtype=torch.int64, device=device)] = True
        return lines

    def mask(self, length: int, modality: Tensor | None = None) -> Tensor:
        """Planted pairs with ``j <= i``, bool ``[length, length]``; quadratic.

        Args:
            modality: int ``[length]``, needed by ``same_modality``.
        """
        i, j = torch.arange(length)[:, None], torch.arange(length)
        pairs = self.keys(length).expand(length, -1) | (i - j < self.local)
        for distance in self.distances:
            pairs = pairs | (i - j == distance)
        if self.period:
            pairs = pairs | ((i - j) % self.period == self.offset)
        if self.same_modality and modality is not None:
            pairs = pairs & (modality[:, None] == modality)
        return pairs & (j <= i)


ByModality: TypeAlias = "dict[int, Structure]"
"""Another structure for the rows of each modality; rows of modalities that are not named attend uniformly."""


@dataclass(frozen=True)
class StructuredInput:
    """``q [B, HQ, N, D]``, ``k, v [B, HKV, N, D]`` and what was planted in each query head.

    Attributes:
        modality: int64 ``[N]`` or None. scale: the factor for which the scores are made.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    structures: tuple[Structure | ByModality, ...]
    scale: float
    modality: Tensor | None = None

    def planted(self, head: int) -> Tensor:
        """The planted pairs of a query head, bool ``[N, N]`` on the CPU; quadratic."""
        length, structure = self.q.shape[2], self.structures[head]
        modality = None if self.modality is None else self.modality.cpu()
        if isinstance(structure, Structure):
            return structure.mask(length, modality)
        pairs = torch.zeros(length, length, dtype=torch.bool)
        for value, part in structure.items():
            assert modality is not None
            pairs |= part.mask(length, modality) & (modality == value)[:, None]
        return pairs

    def recall(self, mask: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Share of full causal attention's mass on ``mask``, averaged over rows: float32 ``[B, HQ]``.

        Args:
            mask: bool, broadcastable to ``[B, HQ, R, N]``, one row for each of ``rows``.
            rows: query rows to look at; all of them when None.
        """
        length = self.q.shape[2]
        i = torch.arange(length) if rows is None else torch.tensor(list(rows))
        causal = torch.arange(length) <= i[:, None]
        kept = mask.expand(*self.q.shape[:2], i.numel(), length)
        shares = torch.empty(self.q.shape[:2])
        group = self.q.shape[1] // self.k.shape[1]
        for b in range(self.q.shape[0]):
            for h in range(self.q.shape[1]):
                scores = self.q[b, h, i.to(self.q.device)].float() @ self.k[b, h // group].float().T * self.scale
                weights = torch.softmax(scores.cpu().masked_fill(~causal, -torch.inf), -1)
                shares[b, h] = (weights * kept[b, h].cpu()).sum(-1).mean()
        return shares


def structured_qkv(
    structures: Sequence[Structure | ByModality],
    length: int,
    *,
    batch: int = 1,
    kv_heads: int | None = None,
    head_dim: int = 64,
    scale: float | None = None,
    peak: float | None = None,
    noise: float = 0.02,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    modality: Tensor | None = None,
    token_major: bool = False,
) -> StructuredInput:
    """Inputs whose query head ``h`` attends as ``structures[h]`` says, with nearly all of its mass.

    The same arguments and seed give the same inputs on one kind of device.

    Args:
        peak: score (after ``scale``) of a planted pair, ``log(length) + 8`` by default; background pairs have 0 on
            average, so that together they hold well below one hundredth of the mass. A structure with ``local`` or
            ``period`` divides that mass over all of its pairs by ``SHARES`` instead of giving it to each.
        scale: the factor attention will use, ``head_dim ** -0.5`` by default.
        modality: int ``[length]``, small numbers from 0 on.
        token_major: return transposed views of ``[B, N, H, D]`` memory, as models pass them.

    Raises:
        ValueError: the heads do not divide, ``head_dim`` has no room for the features, or a modality is missing.
    """
    heads = len(structures)
    kv_heads = heads if kv_heads is None else kv_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} structures cannot share {kv_heads} kv_heads; give a divisor of {heads}")
    scale = head_dim**-0.5 if scale is None else scale
    device = torch.device(device)
    maker = _Maker(
        tuple(structures), length, heads // kv_heads, head_dim, scale, peak, noise,
        torch.Generator(device).manual_seed(seed), torch.float64 if dtype == torch.float64 else torch.float32,
        device, None if modality is None else modality.to(device, torch.int64),
    )  # fmt: skip
    made = []
    for kind, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
        t = _empty(batch, count, length, head_dim, dtype, device, token_major)
        for h in range(count):
            group = maker.group_of(h // maker.group if kind == "q" else h)
            for b in range(batch):
                for start in range(0, length, CHUNK):
                    rows = slice(start, min(start + CHUNK, length))
                    t[b, h, rows] = maker.rows(kind, h, group, rows).to(dtype)
        made.append(t)
    q, k, v = made
    return StructuredInput(q, k, v, tuple(structures), scale, maker.modality)


def _empty(
    batch: int, heads: int, length: int, dim: int, dtype: torch.dtype, device: torch.device, token_major: bool
) -> Tensor:
    if token_major:
        return torch.empty(batch, length, heads, dim, dtype=dtype, device=device).transpose(1, 2)
    return torch.empty(batch, heads, length, dim, dtype=dtype, device=device)


@dataclass(frozen=True)
class _Group:
    """Where the features of one key/value head lie.

    Attributes:
        marks: ``(head, modality or None, structure, feature)`` for every structure of the group.
        turns: frequencies ``[P]`` of each kind of rotation and the first of its ``2 P`` features.
        modalities: first of the features of the modalities, and their number.
    """

    marks: tuple[tuple[int, int | None, Structure, int], ...]
    turns: dict[tuple[str, int], tuple[Tensor, int]]
    modalities: tuple[int, int]


@dataclass(frozen=True)
class _Maker:
    """The arguments of ``structured_qkv``, and how rows of q, k and v follow from them."""

    structures: tuple[Structure | ByModality, ...]
    length: int
    group: int
    head_dim: int
    scale: float
    peak: float | None
    noise: float
    generator: torch.Generator
    work: torch.dtype
    device: torch.device
    modality: Tensor | None

    def group_of(self, kv_head: int) -> _Group:
        """Lay out the features of a key/value head. Its frequencies depend on the structures alone."""
        marks: list[tuple[int, int | None, Structure, int]] = []
        for head in range(kv_head * self.group, (kv_head + 1) * self.group):
            structure = self.structures[head]
            parts = [(None, structure)] if isinstance(structure, Structure) else list(structure.items())
            marks += [(head, value, part, len(marks) + i) for i, (value, part) in enumerate(parts)]
        if self.modality is None and any(value is not None or part.same_modality for _, value, part, _ in marks):
            raise ValueError("a structure depends on the modality; pass modality, one small integer a token")
        apart = any(part.same_modality for _, _, part, _ in marks)
        classes = int(self.modality.max()) + 1 if apart and self.modality is not None else 0
        used = len(marks) + classes
        kinds = sorted({kind for _, _, part, _ in marks for kind in _rotations(part)}) or [("free", 0)]
        pairs = (self.head_dim - used) // (2 * len(kinds))
        if pairs < 4:
            least = used + 8 * len(kinds)
            raise ValueError(
                f"head_dim {self.head_dim} is too small for {self.group} heads per group with {len(kinds)} kinds of "
                f"diagonals; give {least} or more"
            )
        turns = {kind: (self._frequencies(kind, pairs), used + 2 * pairs * i) for i, kind in enumerate(kinds)}
        return _Group(tuple(marks), turns, (len(marks), classes))

    def _frequencies(self, kind: tuple[str, int], pairs: int) -> Tensor:
        generator = torch.Generator().manual_seed(1 + 1000 * kind[1] + len(kind[0]))
        if kind[0] == "local":
            # The product of normally distributed frequencies fades like exp(-(w d)² / 2); see FADE for its width.
            top = self._score("local", kind[1], 0.25)
            width = kind[1] * math.sqrt(top / (2 * FADE))
            values = torch.randn(pairs, generator=generator, dtype=torch.float64) / width
        elif kind[0] == "period":
            harmonics = torch.randint(1, max(2, kind[1] // 2), (pairs,), generator=generator)
            values = harmonics.double() * (2 * math.pi / kind[1])
        else:
            # One in each of equal stretches, so that the nearest distances cancel best.
            place = torch.arange(pairs) + torch.rand(pairs, generator=generator, dtype=torch.float64)
            values = math.pi * place / pairs
        return values.to(self.device)

    def _score(self, part: str, pairs: int, share: float) -> float:
        """The score at which ``pairs`` pairs of a row hold ``share`` of the mass of all that is planted."""
        top = math.log(max(1, self.length)) + 8 if self.peak is None else self.peak
        return max(1.0, top + math.log(share / max(1, pairs)))

    def _scores(self, structure: Structure) -> dict[str, float]:
        """Scores of the columns and lines, the window, the single diagonals and the periodic ones."""
        top = math.log(max(1, self.length)) + 8 if self.peak is None else self.peak
        if not structure.local and not structure.period:
            return {"columns": top, "free": top}
        columns = len(structure.columns) + (self.length // structure.stride if structure.stride else 0)
        far = len(structure.distances) + (self.length // structure.period if structure.period else 0)
        return {
            "columns": self._score("columns", columns, SHARES["columns"]),
            "local": self._score("local", structure.local, SHARES["local"]),
            "free": self._score("far", far, SHARES["far"]),
            "period": self._score("far", far, SHARES["far"]),
        }

    def rows(self, kind: str, head: int, group: _Group, rows: slice) -> Tensor:
        """Rows of one head of q, k or v, ``[rows, D]`` in working precision."""
        shape = (rows.stop - rows.start, self.head_dim)
        drawn = torch.randn(shape, generator=self.generator, device=self.device, dtype=self.work)
        if kind == "v":
            return drawn
        drawn *= self.noise
        if kind == "k":
            self._fill_keys(drawn, group, rows)
            return drawn
        for owner, value, structure, own in group.marks:
            if owner == head:
                self._fill_queries(drawn, value, structure, own, group, rows)
        return drawn

    def _fill_keys(self, target: Tensor, group: _Group, rows: slice) -> None:
        plain = torch.ones(target.shape[0], 1, dtype=torch.bool, device=self.device)
        for _, _, structure, own in group.marks:
            score = self._scores(structure)["columns"]
            lines = structure.keys(self.length, self.device)[rows]
            target[:, own] += lines * math.sqrt(score / self.scale)
            if structure.local or structure.period:
                plain &= ~lines[:, None]
        for (name, _), (frequencies, first) in group.turns.items():
            turn = self._turn(frequencies, rows, 0)
            # A line that also lay in a window or on a diagonal would get both scores, and then nearly all of the mass.
            target[:, first : first + 2 * frequencies.numel()] += turn if name == "free" else turn * plain
        first, classes = group.modalities
        if classes:
            assert self.modality is not None
            target[:, first : first + classes] += torch.nn.functional.one_hot(self.modality[rows], classes)

    def _fill_queries(
        self, target: Tensor, value: int | None, structure: Structure, own: int, group: _Group, rows: slice
    ) -> None:
        scores = self._scores(structure)
        asks = torch.zeros_like(target)
        if structure.columns or structure.stride:
            # The strength is shared out between q and k so that neither leaves the range of half precision.
            asks[:, own] += math.sqrt(scores["columns"] / self.scale)
        for (name, size), distance in _rotations(structure).items():
            frequencies, first = group.turns[name, size]
            strength = scores[name] / self.scale / frequencies.numel()
            for shift in distance:
                turn = self._turn(frequencies, rows, shift)
                asks[:, first : first + 2 * frequencies.numel()] += turn * strength
        if structure.same_modality:
            assert self.modality is not None
            first, classes = group.modalities
            other = 1 - torch.nn.functional.one_hot(self.modality[rows], classes)
            asks[:, first : first + classes] -= other * ((HIDE + max(scores.values())) / self.scale)
        if value is not None:
            assert self.modality is not None
            asks *= (self.modality[rows] == value)[:, None]
        target += asks

    def _turn(self, frequencies: Tensor, rows: slice, shift: int) -> Tensor:
        """Rotations of the rows, moved by ``shift``: ``[rows, 2 P]``. Angles grow with the row: float64."""
        position = torch.arange(rows.start, rows.stop, device=self.device, dtype=torch.float64) - shift
        angles = position[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], -1).to(self.work)


def _rotations(structure: Structure) -> dict[tuple[str, int], tuple[int, ...]]:
    """The kinds of rotation that a structure asks for, and the distances at which it does."""
    asked: dict[tuple[str, int], tuple[int, ...]] = {}
    if structure.distances:
        asked["free", 0] = structure.distances
    if structure.local:
        asked["local", structure.local] = (0,)
    if structure.period:
        asked["period", structure.period] = (structure.offset,)
    return asked


def long_context_structure(name: str, length: int, *, stride: int = 256, seed: int = 0) -> Structure:
    """What a head that the named pattern fits looks like in long prompts, sized for ``length`` tokens.

    Every one has sinks and a window that fades within 1536 tokens. ``vertical_slash`` adds about 1000 columns and at
    most 32 far diagonals, ``grid`` key lines at every ``stride`` tokens; ``a_shape`` and ``dense`` add nothing.

    Raises:
        ValueError: the name is none of these.
    """
    local = max(1, min(1536, length // 8))
    sinks = tuple(range(min(4, length)))
    if name in ("dense", "a_shape", "block_topk", "tri_shape"):
        return Structure(columns=sinks, local=local)
    if name == "grid":
        return Structure(stride=stride, phase=(7 * seed + 3) % stride, local=local)
    if name != "vertical_slash":
        raise ValueError(f"no structure is known for {name!r}; take dense, a_shape, vertical_slash or grid")
    count = min(1000, length // 16)
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(0, max(1, length), (count,), generator=generator).tolist()
    period = max(8192, length // 32)
    return Structure(columns=tuple(sorted({*sinks, *places})), local=local, period=period, offset=period // 2)
