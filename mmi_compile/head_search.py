"""Offline head search on the q, k and v of one layer: which pattern each head should run (MMInference, section 3.4).

The paper's three steps, each measured with the planner and the kernels that will run:

1. every head tries every pattern on the whole matrix (boundary ``none``), and inside each query modality (``q``);
2. every ordered pair of modalities tries every pattern while all other pairs stay dense (``2d``);
3. the best of steps 1 and 2 are combined over modalities into candidates with boundaries.

Query rows of different modalities do not influence each other, so errors and costs of ``q`` and ``2d`` add up over
query modalities exactly; only what the pairs of one query modality come to together is measured anew. All heads that
try the same thing run as one plan.

:func:`mmi_compile.head_choice.choose` then spends one budget of kernel time on all heads of all layers.
"""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mmi_compile.cost_file import CostModel, cost_model
from mmi_compile.head_choice import LayerResult, Scored, lower_hull, pareto, walk
from mmi_compile.head_measure import LayerInput, Measured, Measuring, Prompt, Rows
from mmi_compile.kernels.cost import expected_density
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.patterns import (
    AShape,
    BlockTopK,
    ByModality,
    Dense,
    Grid,
    HeadPattern,
    Pattern,
    TriShape,
    VerticalSlash,
    from_json,
)

Merge: TypeAlias = Literal["mean", "max"]

BOUNDARIES = ("none", "q", "2d")

MOST_DENSITY = 0.75
"""Candidates that are expected to compute more than this share are not tried."""

COMBINATIONS = 6
"""Combinations of pairs that each query modality of a ``2d`` head tries."""


@dataclass(frozen=True)
class Candidates:
    """What heads may run, besides dense.

    Attributes:
        plain: patterns for the whole matrix. regions: for the rows of a modality, and for pairs of modalities.
        boundaries: which of ``none``, ``q`` and ``2d`` to try.
    """

    plain: tuple[Pattern, ...]
    regions: tuple[Pattern, ...] = ()
    boundaries: tuple[str, ...] = BOUNDARIES

    def __post_init__(self) -> None:
        for name in self.boundaries:
            if name not in BOUNDARIES:
                raise ValueError(f"boundary {name!r}: give some of {', '.join(BOUNDARIES)}")
        for pattern in self.regions:
            ByModality("q", pattern)  # refuses what no region can hold

    @property
    def choices(self) -> tuple[Pattern, ...]:
        """What a region may run: the candidates for regions, and dense."""
        return (*self.regions, Dense())

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "plain": [p.to_json() for p in self.plain], "regions": [p.to_json() for p in self.regions],
            "boundaries": list(self.boundaries),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Candidates:
        """What :meth:`to_json` wrote."""
        plain, regions = (tuple(from_json(p) for p in data[name]) for name in ("plain", "regions"))
        return cls(plain, regions, tuple(data["boundaries"]))

    @classmethod
    def ladder(
        cls,
        q_len: int,
        kv_len: int,
        tiles: TileShape,
        *,
        strides: Sequence[int] = (),
        region_strides: Sequence[int] = (),
        boundaries: Sequence[str] = BOUNDARIES,
    ) -> Candidates:
        """Sizes of every pattern from a few tokens up to the published ones, as far as they are sparse at this length.

        Args:
            strides: of grids, in tokens, besides an estimated one: tokens per image row or video frame.
            region_strides: the same where only the tokens of one modality count.
        """

        def sparse(pattern: Pattern) -> bool:
            return expected_density(pattern, q_len, kv_len, tiles) <= MOST_DENSITY

        sink = 128 if kv_len >= 8192 else 64
        local = [size for size in (64, 128, 256, 512, 1024, 2048, 4096, 8192) if size < kv_len]
        shapes: list[Pattern] = [AShape(sink, size) for size in local]
        shapes += [TriShape(sink, size, 128) for size in local[::2]]
        shapes += [VerticalSlash(*size) for size in _VERTICAL_SLASH if max(size) < kv_len]

        def grids(known: Sequence[int]) -> list[Pattern]:
            found: list[Pattern] = []
            for stride in (None, *dict.fromkeys(s for s in known if 2 <= s <= kv_len // 4)):
                found += [Grid(stride, sink, size) for size in (64, 256, 1024) if size < kv_len // 2]
                if stride is not None and stride >= 4 * tiles.block_n:
                    found.append(Grid(stride, sink, 64, same_phase=True))
            return found

        blocks: list[Pattern] = [BlockTopK(k=k, sink=sink) for k in (4, 8, 16, 32, 64)]
        plain = [p for p in (*shapes, *grids(strides), *blocks) if sparse(p)]
        regions = [p for p in (*shapes, *grids(region_strides or strides)) if sparse(p)]
        return cls(tuple(plain), tuple(regions), tuple(boundaries))


_VERTICAL_SLASH = (
    (16, 8), (16, 32), (32, 16), (64, 32), (64, 64), (128, 64), (64, 256), (256, 64), (256, 256), (500, 700),
    (1000, 128), (1000, 1024), (2000, 512), (3500, 200),
)  # fmt: skip


@dataclass(frozen=True)
class Survey:
    """Steps 1 and 2 on one prompt, or merged over several. float64, squared errors.

    Attributes:
        energy: ``[HQ]``, squared norm of each head's output.
        plain: ``[P, HQ, 4]``: error, recall, density, cost of each plain candidate.
        by_rows: ``[R + 1, HQ, M, 4]``, of each of ``Candidates.choices`` for the rows of each modality.
        pairs: ``[R + 1, M keys, HQ, M queries, 2]``: error and cost of each of them for one pair while the others are
            dense.
    """

    energy: Tensor
    plain: Tensor
    by_rows: Tensor
    pairs: Tensor

    def to_json(self) -> dict[str, Any]:
        return {f.name: pack(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Survey:
        return cls(**{f.name: unpack(data[f.name]) for f in dataclasses.fields(cls)})


def pack(x: Tensor) -> dict[str, Any]:
    """JSON values of a float64 tensor; nothing is lost."""
    values = base64.b64encode(x.double().contiguous().numpy().astype("<f8").tobytes()).decode()
    return {"shape": list(x.shape), "values": values}


def unpack(data: Mapping[str, Any]) -> Tensor:
    """What :func:`pack` wrote."""
    values = np.frombuffer(base64.b64decode(data["values"]), dtype="<f8").astype(np.float64)
    return torch.from_numpy(values).view(data["shape"])


@dataclass(frozen=True)
class Searcher:
    """How layers are searched; the same for all of them.

    Attributes:
        candidates: what heads may run. how: how they are measured.
        merge: what several prompts come to: the ``mean`` of their squared errors, or the ``max``.
    """

    candidates: Candidates
    how: Measuring
    merge: Merge = "mean"

    def survey(self, x: LayerInput) -> Survey:
        """Steps 1 and 2 on one prompt."""
        return self.survey_of(self.prompt(x))

    def prompt(self, x: LayerInput) -> Prompt:
        """The prompt with exact attention computed.

        Raises:
            HeadSearchError: it is too short, or holds NaN.
        """
        return Prompt.of(x, self.how)

    def survey_of(self, prompt: Prompt) -> Survey:
        """Steps 1 and 2 on a prompt that is ready."""
        heads, groups = prompt.heads, prompt.groups
        asked = self.candidates
        energy = prompt.full[:, :groups].sum(-1)
        plain = [_totals(prompt.measure([p] * heads)) for p in (asked.plain if "none" in asked.boundaries else ())]
        split = prompt.segments is not None
        by_rows = [
            _columns(prompt.measure([ByModality("q", p)] * heads))
            for p in (asked.choices if split and "q" in asked.boundaries else ())
        ]
        pairs = self._pairs(prompt) if split and "2d" in asked.boundaries else torch.zeros(0, groups, heads, groups, 2)
        return Survey(
            energy,
            torch.stack(plain) if plain else torch.zeros(0, heads, 4, dtype=torch.float64),
            torch.stack(by_rows) if by_rows else torch.zeros(0, heads, groups, 4, dtype=torch.float64),
            pairs.double(),
        )

    def _pairs(self, prompt: Prompt) -> Tensor:
        """``Survey.pairs``."""
        labels = prompt.x.labels
        found = []
        for pattern in self.candidates.choices:
            of_keys = []
            for place, key in enumerate(labels):
                head = ByModality("2d", Dense(), tuple(((query, key), pattern) for query in labels))
                measured = prompt.measure([head] * prompt.heads, region=place)
                of_keys.append(torch.stack([measured.error, measured.cost], -1))
            found.append(torch.stack(of_keys))
        return torch.stack(found)

    def merged(self, surveys: Sequence[Survey]) -> Survey:
        """Several prompts as one: costs, recalls and densities are means."""

        def one(name: str, errors_first: bool) -> Tensor:
            parts = torch.stack([getattr(s, name) for s in surveys])
            mean = parts.mean(0)
            if errors_first and self.merge == "max" and mean.numel():
                mean[..., 0] = parts[..., 0].amax(0)
            return mean

        return Survey(one("energy", False), *(one(name, True) for name in ("plain", "by_rows", "pairs")))

    def combinations(self, survey: Survey, labels: tuple[int, ...]) -> list[list[ByModality]]:
        """Step 3 for ``2d``: what to measure, ``[C][HQ]``; in each, every query modality of a head tries one
        combination of its pairs."""
        if not survey.pairs.numel():
            return []
        _, _, heads, groups, _ = survey.pairs.shape
        choices = self.candidates.choices
        result: list[list[ByModality]] = [[] for _ in range(COMBINATIONS)]
        for h in range(heads):
            by_query = [self._of_query(survey.pairs[:, :, h, m]) for m in range(groups)]
            for c in range(COMBINATIONS):
                named = []
                for m, options in enumerate(by_query):
                    chosen = options[min(c, len(options) - 1)]
                    named += [((labels[m], labels[n]), choices[p]) for n, p in enumerate(chosen)]
                result[c].append(_two_d(named))
        return result

    def _of_query(self, pairs: Tensor) -> list[tuple[int, ...]]:
        """Combinations of one head and query modality, cheapest first: for each key modality a place in the choices.

        Args:
            pairs: ``[R + 1, M keys, 2]``.
        """
        hulls = []
        for n in range(pairs.shape[1]):
            order = _dense_first(pairs.shape[0])
            points = [(float(pairs[p, n, 1]), float(pairs[p, n, 0])) for p in order]
            hulls.append([order[place] for place in lower_hull(points)])
        walked = walk([[(float(pairs[p, n, 1]), float(pairs[p, n, 0])) for p in hull] for n, hull in enumerate(hulls)])
        every = [tuple(hull[step] for hull, step in zip(hulls, steps, strict=True)) for steps in walked]
        if len(every) <= COMBINATIONS:
            return every
        last = len(every) - 1
        return [every[round(i * last / (COMBINATIONS - 1))] for i in range(COMBINATIONS)]

    def measure_combinations(self, x: LayerInput | Prompt, combinations: Sequence[Sequence[ByModality]]) -> Tensor:
        """Error, recall, density and cost of each, float64 ``[C, HQ, M, 4]``."""
        prompt = x if isinstance(x, Prompt) else self.prompt(x)
        if not combinations or prompt.segments is None:
            return torch.zeros(0, prompt.heads, prompt.groups, 4, dtype=torch.float64)
        return torch.stack([_columns(prompt.measure(list(heads))) for heads in combinations])

    def merged_combinations(self, measured: Sequence[Tensor]) -> Tensor:
        """Several prompts as one, as in :meth:`merged`."""
        parts = torch.stack(list(measured))
        mean = parts.mean(0)
        if self.merge == "max" and mean.numel():
            mean[..., 0] = parts[..., 0].amax(0)
        return mean

    def uniform(self, survey: Survey) -> list[list[Scored]]:
        """Each plain candidate for all heads, ``[P][HQ]``."""
        return [[_scored(p, row) for row in rows] for p, rows in zip(self.candidates.plain, survey.plain, strict=False)]

    def result(
        self, survey: Survey, combinations: Sequence[Sequence[ByModality]], measured: Tensor, labels: tuple[int, ...]
    ) -> LayerResult:
        """All candidates of each head, those that others beat left out."""
        heads = survey.energy.shape[0]
        found = []
        for h in range(heads):
            scored = [_scored(p, survey.plain[i, h]) for i, p in enumerate(self.candidates.plain[: len(survey.plain)])]
            if survey.by_rows.numel():
                choices = self.candidates.choices
                options = [(choices[i], survey.by_rows[i, h]) for i in _dense_first(len(choices))]
                scored += _q_heads(options, labels)
            if measured.numel():
                scored += _two_d_heads([(combinations[c][h], measured[c, h]) for c in range(len(measured))], labels)
            found.append(pareto([*scored, Scored(Dense(), 0.0, 1.0, 1.0, 1.0)]))
        total = float(survey.energy.sum())
        weights = [heads * float(e) / total if total > 0 else 1.0 for e in survey.energy]
        return LayerResult(tuple(found), tuple(weights))


def search_layer(
    inputs: LayerInput | Sequence[LayerInput],
    *,
    candidates: Candidates | None = None,
    costs: CostModel | None = None,
    strides: Sequence[int] = (),
    rows: Rows = "both",
    merge: Merge = "mean",
    rows_at_most: int = 1 << 30,
    dense_tail: bool = True,
) -> LayerResult:
    """Search one layer on one or several prompts: all three steps, for all heads.

    Args:
        inputs: q, k, v and modalities of each prompt; heads, head dim and ``labels`` are the same.
        candidates: what to try; None for :meth:`Candidates.ladder` of the longest prompt, with grid ``strides``.
        costs: None for what is known of the device; see ``mmi bench --calibrate``.
        rows, rows_at_most, dense_tail: see :class:`Measuring`. merge: see :class:`Searcher`.

    Raises:
        HeadSearchError: a prompt is too short, or its attention gives NaN.
        ValueError: no prompt, or no kernel for its device, dtype and head dim.
    """
    prompts = [inputs] if isinstance(inputs, LayerInput) else list(inputs)
    if not prompts:
        raise ValueError("no prompt to search on; give at least one LayerInput")
    first = max(prompts, key=lambda x: x.geometry.kv_len)
    costs = costs or cost_model(first.q.device, first.q.dtype, first.q.shape[-1])
    if candidates is None:
        g = first.geometry
        candidates = Candidates.ladder(g.q_len, g.kv_len, costs.tiles, strides=strides)
    searcher = Searcher(candidates, Measuring(costs, rows, rows_at_most, dense_tail), merge)
    with torch.no_grad():
        ready = [searcher.prompt(x) for x in prompts]
        survey = searcher.merged([searcher.survey_of(prompt) for prompt in ready])
        combinations = searcher.combinations(survey, first.labels)
        measured = searcher.merged_combinations([searcher.measure_combinations(p, combinations) for p in ready])
    return searcher.result(survey, combinations, measured, first.labels)


def _dense_first(choices: int) -> list[int]:
    """Places of the choices of a region with dense, the last one, first: it wins where nothing costs anything, for
    modalities and pairs that the prompts do not have."""
    return [choices - 1, *range(choices - 1)]


def _columns(measured: Measured) -> Tensor:
    """Error, recall, density and cost by query modality, float64 ``[HQ, M, 4]``."""
    return torch.stack([measured.error, measured.recall, measured.density, measured.cost], -1)


def _totals(measured: Measured) -> Tensor:
    """The same of whole heads, ``[HQ, 4]``."""
    return torch.stack([part.sum(-1) for part in dataclasses.astuple(measured)], -1)


def _scored(pattern: HeadPattern, values: Tensor) -> Scored:
    error, recall, density, cost = values.tolist()
    return Scored(pattern, math.sqrt(max(0.0, error)), min(1.0, max(0.0, recall)), density, cost)


def _q_heads(options: Sequence[tuple[Pattern, Tensor]], labels: tuple[int, ...]) -> list[Scored]:
    """Heads with boundary ``q``: from the cheapest pattern for each modality up, one step at a time.

    Args:
        options: each region candidate with its ``[M, 4]`` values.
    """
    values = torch.stack([v for _, v in options])  # [R, M, 4]
    hulls = [lower_hull([(float(v[m, 3]), float(v[m, 0])) for v in values]) for m in range(len(labels))]
    points = [[(float(values[p, m, 3]), float(values[p, m, 0])) for p in hull] for m, hull in enumerate(hulls)]
    found = []
    for steps in walk(points):
        chosen = [hull[step] for hull, step in zip(hulls, steps, strict=True)]
        pattern = ByModality("q", Dense(), tuple((labels[m], options[p][0]) for m, p in enumerate(chosen)))
        found.append(_scored(pattern, torch.stack([values[p, m] for m, p in enumerate(chosen)]).sum(0)))
    return found


def _two_d_heads(options: Sequence[tuple[ByModality, Tensor]], labels: tuple[int, ...]) -> list[Scored]:
    """The same for ``2d``, where each query modality chooses among the measured combinations."""
    values = torch.stack([v for _, v in options])  # [C, M, 4]
    hulls = [lower_hull([(float(v[m, 3]), float(v[m, 0])) for v in values]) for m in range(len(labels))]
    points = [[(float(values[c, m, 3]), float(values[c, m, 0])) for c in hull] for m, hull in enumerate(hulls)]
    found = []
    for steps in walk(points):
        chosen = [hull[step] for hull, step in zip(hulls, steps, strict=True)]
        named = [
            ((query, key), options[c][0].pattern(query, key))
            for query, c in zip(labels, chosen, strict=True)
            for key in labels
        ]
        found.append(_scored(_two_d(named), torch.stack([values[c, m] for m, c in enumerate(chosen)]).sum(0)))
    return found


def _two_d(named: Sequence[tuple[tuple[int, int], Pattern]]) -> ByModality:
    """Pairs that no pattern is named for stay dense, as do modalities that calibration has not seen."""
    return ByModality("2d", Dense(), tuple((place, p) for place, p in named if not isinstance(p, Dense)))
