"""Which candidate every head runs: one budget of kernel time, spent where it lowers the error most."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mmi_compile.head_measure import HeadSearchError
from mmi_compile.kernels.patterns import HeadPattern

Mode: TypeAlias = Literal["share", "equal"]

Point: TypeAlias = "tuple[float, float]"
"""Cost and squared error."""


@dataclass(frozen=True)
class Scored:
    """A candidate of one head.

    Attributes:
        pattern: what the head would run.
        error: relative error of its output against exact attention, weighted over rows as asked for.
        recall: share of the probability mass on its pairs, over sampled rows.
        density: tiles ÷ tiles of dense attention. cost: predicted kernel time ÷ that of a dense head.
    """

    pattern: HeadPattern
    error: float
    recall: float
    density: float
    cost: float


@dataclass(frozen=True)
class LayerResult:
    """What is known of a layer: for each head the candidates that no other beats in both error and cost, the cheapest
    first and dense last.

    Attributes:
        weights: each head's share of the layer's output (squared norm), times the number of heads.
    """

    heads: tuple[tuple[Scored, ...], ...]
    weights: tuple[float, ...]


def lower_hull(points: Sequence[Point]) -> list[int]:
    """Places of the points from the cheapest to the one with the least error, such that every step buys less error for
    its cost than the one before. Of equal points the first counts."""
    order = sorted(range(len(points)), key=lambda i: (*points[i], i))
    hull: list[int] = []
    for i in order:
        if hull and points[i][1] >= points[hull[-1]][1]:
            continue  # costs more and is no better
        while len(hull) > 1 and slope(points[hull[-2]], points[hull[-1]]) <= slope(points[hull[-1]], points[i]):
            hull.pop()
        hull.append(i)
    return hull


def slope(a: Point, b: Point) -> float:
    """Error bought per cost from ``a`` to ``b``."""
    return (a[1] - b[1]) / max(b[0] - a[0], 1e-12)


def walk(hulls: Sequence[Sequence[Point]]) -> list[tuple[int, ...]]:
    """All steps from the cheapest of every hull to the best of every hull, the best bargain first."""
    at = [0] * len(hulls)
    steps = [tuple(at)]
    while True:
        open_ = [n for n, hull in enumerate(hulls) if at[n] + 1 < len(hull)]
        if not open_:
            return steps
        best = max(open_, key=lambda n: (slope(hulls[n][at[n]], hulls[n][at[n] + 1]), -n))
        at[best] += 1
        steps.append(tuple(at))


def pareto(scored: Sequence[Scored]) -> tuple[Scored, ...]:
    """Those that no other beats in both cost and error, cheapest first. Of equals the first: no boundary before ``q``
    before ``2d``."""
    found: list[Scored] = []
    for i in sorted(range(len(scored)), key=lambda i: (scored[i].cost, scored[i].error, i)):
        if not found or scored[i].error < found[-1].error:
            found.append(scored[i])
    return tuple(found)


@dataclass(frozen=True)
class Choice:
    """What every head of every layer runs.

    Attributes:
        heads: ``[layers][heads]``. cost: their mean cost, dense = 1. error: the layers' mean squared error, as root.
    """

    heads: tuple[tuple[Scored, ...], ...]
    cost: float
    error: float


def choose(layers: Sequence[LayerResult], budget: float, *, mode: Mode = "share") -> Choice:
    """Spend a budget of kernel time.

    Args:
        budget: share of dense attention's cost, in (0, 1]; kernel time under the cost model of the device.
        mode: ``share``: one budget for all heads of all layers, spent where it lowers the error of a layer's output
            most, so that sensitive heads get more; ``equal``: the same budget for each head.

    Raises:
        HeadSearchError: the cheapest candidates cost more than the budget.
        ValueError: the budget is out of range, or the mode unknown.
    """
    if not 0 < budget <= 1:
        raise ValueError(
            f"budget is {budget}; give a share of dense attention's cost above 0 and up to 1, such as 0.12"
        )
    if mode not in ("share", "equal"):
        raise ValueError(f'mode {mode!r}: give "share" or "equal"')
    curves = [(layer, h) for layer in range(len(layers)) for h in range(len(layers[layer].heads))]
    picked = _equal(layers, curves, budget) if mode == "equal" else _shared(layers, curves, budget)
    heads = tuple(
        tuple(layers[layer].heads[h][picked[layer, h]] for h in range(len(layers[layer].heads)))
        for layer in range(len(layers))
    )
    return _choice(heads, layers)


def _choice(heads: Sequence[Sequence[Scored]], layers: Sequence[LayerResult]) -> Choice:
    flat = [(w, s) for row, layer in zip(heads, layers, strict=True) for s, w in zip(row, layer.weights, strict=True)]
    count, error = max(1, len(flat)), sum(w * s.error**2 for w, s in flat)
    return Choice(tuple(map(tuple, heads)), sum(s.cost for _, s in flat) / count, math.sqrt(error / count))


def choose_uniform(
    options: Sequence[Sequence[Sequence[Scored]]], layers: Sequence[LayerResult], budget: float, *, mode: Mode = "share"
) -> Choice | None:
    """The best of ``options``, ``[P][layers][heads]``, that the budget allows; None where it allows none.

    Args:
        layers: whose weights count. budget, mode: see :func:`choose`.
    """
    choices = [_choice(heads, layers) for heads in options]
    fits = [
        c for c in choices
        if (max(s.cost for row in c.heads for s in row) if mode == "equal" else c.cost) <= budget
    ]  # fmt: skip
    return min(fits, key=lambda c: c.error, default=None)


def _equal(
    layers: Sequence[LayerResult], curves: Sequence[tuple[int, int]], budget: float
) -> dict[tuple[int, int], int]:
    picked = {}
    for layer, h in curves:
        scored = layers[layer].heads[h]
        fitting = [i for i, s in enumerate(scored) if s.cost <= budget]
        if not fitting:
            raise _too_small(budget, max(layers[n].heads[m][0].cost for n, m in curves))
        picked[layer, h] = fitting[-1]  # the front falls: the dearest is the best
    return picked


def _shared(
    layers: Sequence[LayerResult], curves: Sequence[tuple[int, int]], budget: float
) -> dict[tuple[int, int], int]:
    """Along each head's lower hull, the best bargain of all heads first; then what is left over, along the fronts."""
    left = budget * len(curves) * (1 + 1e-12)
    hulls: dict[tuple[int, int], list[int]] = {}
    at: dict[tuple[int, int], int] = {}
    waiting: list[tuple[float, int, int]] = []

    def weighted(place: tuple[int, int], i: int) -> Point:
        layer, h = place
        scored = layers[layer].heads[h][i]
        return scored.cost, layers[layer].weights[h] * scored.error**2

    def offer(place: tuple[int, int]) -> None:
        hull, step = hulls[place], at[place]
        if step + 1 < len(hull):
            gain = slope(weighted(place, hull[step]), weighted(place, hull[step + 1]))
            heapq.heappush(waiting, (-gain, *place))

    for place in curves:
        hulls[place] = lower_hull([weighted(place, i) for i in range(len(layers[place[0]].heads[place[1]]))])
        at[place] = 0
        left -= weighted(place, hulls[place][0])[0]
        offer(place)
    if left < 0:
        raise _too_small(budget, sum(weighted(p, hulls[p][0])[0] for p in curves) / len(curves))
    while waiting:
        _, layer, h = heapq.heappop(waiting)
        place = (layer, h)
        step = weighted(place, hulls[place][at[place] + 1])[0] - weighted(place, hulls[place][at[place]])[0]
        if step <= left:
            left -= step
            at[place] += 1
            offer(place)
    picked = {place: hulls[place][at[place]] for place in curves}
    return _spend_rest(picked, left, weighted, lambda place: len(layers[place[0]].heads[place[1]]))


def _spend_rest(
    picked: dict[tuple[int, int], int],
    left: float,
    weighted: Callable[[tuple[int, int], int], Point],
    size: Callable[[tuple[int, int]], int],
) -> dict[tuple[int, int], int]:
    """Heads whose next step was too dear may find a smaller one between the corners of their hull."""
    waiting: list[tuple[float, tuple[int, int], int]] = []

    def offer(place: tuple[int, int]) -> None:
        now = weighted(place, picked[place])
        points = ((weighted(place, i), i) for i in range(picked[place] + 1, size(place)))
        steps = [(-slope(now, point), place, i) for point, i in points if point[0] - now[0] <= left]
        if steps:
            heapq.heappush(waiting, min(steps))

    for place in picked:
        offer(place)
    while waiting:
        _, place, i = heapq.heappop(waiting)
        step = weighted(place, i)[0] - weighted(place, picked[place])[0]
        if step <= left:
            left -= step
            picked[place] = i
        offer(place)  # the next step, or a smaller one that still fits
    return picked


def _too_small(budget: float, least: float) -> HeadSearchError:
    return HeadSearchError(
        f"a budget of {budget:.3g} cannot be met: the cheapest candidates take {least:.3g} of dense attention's cost at"
        f" this length; give {math.ceil(least * 100) / 100:.2f} or more, or longer calibration prompts"
    )
