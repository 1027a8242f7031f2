"""The cost model: what a pattern computes, as formulas in lengths, and what that takes, as time.

Two halves that are checked apart:

* ``expected_work``: visited tiles of each pattern as sympy formulas in the number of keys, the pattern's parameters
  and the tile shape, so that candidates can be compared before anything is planned. ``plan_work`` counts the same of a
  real plan.
* ``Coefficients``: time as an affine function of that work. They are measured on the device, for each kernel family
  and head dim, by ``mmi bench --calibrate`` (``mmi_compile/calibrate.py``); ``default_coefficients`` stand in.

**Coordinates of the formulas.** Tile ``t`` of a head holds the positions ``O + t S ... O + (t + 1) S - 1``. Rows in
order have ``S = block_m``. Rows of one modality among others are further apart: grouped by modality (boundary ``q``)
``S = block_m N / n``, and in a region of ``2d`` ``S = block_m n_key / n_query``, as if the modalities were mixed evenly
(section 3 of MMInference). What depends on data is an expectation:

* a share ``Spread.late`` of the columns lies among the last keys, where hardly any tile sees them; the others are
  spread evenly, but for the first keys, which are always among them;
* a share ``Spread.far`` of the diagonals lie singly and evenly over all distances, the others next to the main one;
* a ``mass`` target of ``block_topk`` takes all that its lists may hold.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mmi_compile.kernels.block_topk import list_width
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.patterns import (
    BlockTopK,
    ByModality,
    Dense,
    Grid,
    HeadPattern,
    OwnPattern,
    Pattern,
    VerticalSlash,
)
from mmi_compile.kernels.plan import Plan, TileRecord, causal_tiles
from mmi_compile.kernels.rules import FORCED_COLUMNS, FORCED_DISTANCES, MIN_STRIDE

if TYPE_CHECKING:
    import sympy


class Spread(NamedTuple):
    """Where the columns and diagonals of ``vertical_slash`` lie, as shares of their number.

    The defaults are what heads with planted columns, a fading window and few far diagonals came to at 4 K to 16 K
    tokens: 3 to 10 % of the diagonals far, 50 to 80 % of the columns late.
    """

    far: float = 1 / 16
    late: float = 0.6


USUAL = Spread()


class Work(NamedTuple):
    """What a kernel does: numbers for one head or a whole call, or float tensors ``[B, HQ]``. Key tiles are counted in
    tiles of ``block_m`` rows and ``block_n`` keys.

    Attributes:
        rows: query tiles that visit anything.
        tiles: key tiles of windows and sinks, of heads that are not dense.
        listed: key tiles from block lists.
        columns: key tiles of columns, each query tile's rounded up.
        gathered: tiles of keys that are gathered into column buffers, once per head.
        dense: key tiles of heads that keep everything.
    """

    rows: float | Tensor = 0.0
    tiles: float | Tensor = 0.0
    listed: float | Tensor = 0.0
    columns: float | Tensor = 0.0
    gathered: float | Tensor = 0.0
    dense: float | Tensor = 0.0

    @property
    def visited(self) -> float | Tensor:
        """Key tiles that are computed, as ``Plan.work`` counts them."""
        return self.tiles + self.listed + self.columns + self.dense

    def pairs(self, tiles: TileShape) -> float | Tensor:
        """(query, key) pairs that are computed, whole tiles counted whole."""
        return self.visited * (tiles.block_m * tiles.block_n)

    def traffic(self, tiles: TileShape, head_dim: int, item_size: int) -> float | Tensor:
        """Bytes that the kernel moves, if no cache holds anything: each query tile reads Q and writes the output, each
        key tile reads K and V, and each gathered tile reads and writes them."""
        per_row = 2 * tiles.block_m * head_dim * item_size
        per_tile = 2 * tiles.block_n * head_dim * item_size
        return self.rows * per_row + (self.visited + 2 * self.gathered) * per_tile

    def plus(self, other: Work) -> Work:
        """The work of both, field by field."""
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


def plan_work(plan: Plan, groups: Tensor | None = None, count: int = 1, region: int | None = None) -> Work:
    """The work of a plan, float32 tensors ``[B, HQ]`` on its device. Waits for nothing.

    Args:
        groups: integers ``[B, QT]`` below ``count``: count the tiles of each group apart, ``[B, HQ, count]``.
        region: only this region.
    """
    r = plan.record
    if region is not None:
        r = TileRecord(*(field[..., region : region + 1] for field in r))
    plain = plan.row_order is None and plan.regions == 1
    whole = float(causal_tiles(plan.geometry, plan.block_m, plan.block_n)) if plain else None
    if groups is not None:
        return record_work(r, plan.block_n, groups, count, whole=whole)
    one = torch.zeros(1, plan.query_tiles, dtype=torch.int32, device=plan.tiles.device)
    return Work(*(torch.as_tensor(part)[..., 0] for part in record_work(r, plan.block_n, one, 1, whole=whole)))


def record_work(record: TileRecord, block_n: int, groups: Tensor, count: int, *, whole: float | None = None) -> Work:
    """The work of tiles ``[B, HQ, QT, R]``, float32 ``[B, HQ, count]``: for each group of tiles apart.

    Args:
        groups: integers ``[B or 1, QT]`` below ``count``.
        whole: tiles of causal attention, where heads that visit as many in plain windows run as dense ones.
    """
    r, bn = record, block_n
    windows = (r.window_stop - r.window_start + r.sink_stop - r.sink_start).sum(3).float()
    listed = r.num_blocks.sum(3).float()
    columns = ((r.num_columns + (bn - 1)) // bn).sum(3).float()
    work = windows + listed + columns
    member = groups[..., None] == torch.arange(count, device=work.device)  # [B or 1, QT, count]
    used = (r.num_columns[..., None] * member[:, None, :, None]).amax(2)  # [B, HQ, R, count]
    is_dense = torch.zeros(*work.shape[:2], 1, dtype=torch.bool, device=work.device)
    if whole is not None:
        is_dense = ((windows.sum(-1) == whole) & ((listed + columns).sum(-1) == 0))[..., None]

    def grouped(amount: Tensor) -> Tensor:
        return (amount[..., None] * member[:, None]).sum(2)

    return Work(
        rows=grouped((work > 0).float()),
        tiles=grouped(windows.masked_fill(is_dense, 0.0)),
        listed=grouped(listed),
        columns=grouped(columns),
        gathered=((used + (bn - 1)) // bn).sum(2).float(),
        dense=grouped(windows.masked_fill(~is_dense, 0.0)),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Formulas


@dataclass(frozen=True)
class Region:
    """Query tiles against the keys of one region, in the coordinates of the formulas (module docstring).

    Attributes:
        rows: query rows. keys: keys that the last row may see, in tokens.
        span: ``S``, keys' positions from one tile to the next.
        offset: ``O``, position of the first row.
        tiles: tile shape.
        ordered: rows are in order, so that all tiles begin at the same places of key blocks.
    """

    rows: float
    keys: float
    span: float
    offset: float
    tiles: TileShape
    ordered: bool = True

    @property
    def step(self) -> float:
        """Common divisor of ``span`` and ``block_n``; 1 where tiles begin anywhere."""
        return float(math.gcd(int(self.span), self.tiles.block_n)) if self.ordered else 1.0

    @property
    def reach(self) -> int:
        """Distances beyond its own at which a diagonal meets a tile somewhere, as ``planner.block_offsets`` has it."""
        bm, bn = self.tiles.block_m, self.tiles.block_n
        if not self.ordered:
            return 2 * bm + 1 + bn - 1
        return bm - 1 if bm % bn == 0 else bm - 1 + bn - 1

    def values(self) -> dict[str, float]:
        return {
            "Q": self.rows, "N": self.keys, "S": self.span, "O": self.offset, "G": self.step, "R": self.reach,
            "M": self.tiles.block_m, "B": self.tiles.block_n,
        }  # fmt: skip


Terms: TypeAlias = "dict[str, sympy.Expr]"
"""Formulas of some fields of ``Work``."""


@lru_cache(maxsize=1)
def formulas() -> dict[str, Terms]:
    """The formulas of every pattern by name: sympy expressions of fields of ``Work``; missing fields are zero.

    Symbols: ``Q`` rows, ``N`` keys, ``S`` span of a tile, ``O`` offset, ``M`` and ``B`` the tile shape, ``G`` and ``R``
    as in ``Region``; the pattern's own parameters by name; ``forced`` columns, ``near`` and ``far`` diagonals, and the
    common divisor ``even`` of stride and ``B``.
    """
    from sympy import Max, Min, S, ceiling, floor, symbols

    q, n, span, offset, bm, bn, g, reach = symbols("Q N S O M B G R", positive=True)
    sink, local, last, vertical, forced, near, far, stride, even, k = symbols(
        "sink local last n_vertical forced near far stride even k", nonnegative=True
    )
    count = ceiling(q / bm)
    rise = span / bn

    def over(edge: Any) -> Any:
        """Mean of ``edge % B`` over all tiles: their edges fall on what is equal modulo G, alike."""
        return edge % g + (bn - g) / 2

    first_end = (offset + span + over(-offset)) / bn
    first_base = (offset - over(offset)) / bn

    def ramp(start: Any, number: Any) -> Any:
        """Sum over tiles of a count that begins at ``start`` and rises by ``rise``."""
        return number * start + rise * number * (number - 1) / 2

    def capped(start: Any, cap: Any, number: Any) -> Any:
        """The same where no tile counts more than ``cap``."""
        below = Min(Max(floor((cap - start) / rise) + 1, 0), number)
        return ramp(start, below) + (number - below) * cap

    def tiles_of_columns(start: Any, stop: Any, slope: Any) -> Any:
        """Sum over tiles of ``ceil(columns / B)`` where columns rise evenly from ``start`` to ``stop``."""

        def integral(x: Any) -> Any:
            blocks = ceiling(x / bn)
            return blocks * x - bn * blocks * (blocks - 1) / 2

        return (integral(Max(stop, 0)) - integral(Max(start, 0))) / slope

    unfilled = (count * bm - q) * span / bm / bn  # the last tile ends with the rows
    everything = ramp(first_end, count) - unfilled
    window = (span + local - 1 + over(-offset) + over(offset + 1 - local)) / bn
    reached = window + ceiling(sink / bn)
    kept = capped(first_end, reached, count)
    whole = Min(1, last) * (count - Max(floor((q - last) / bm), 0))
    tail = (ramp(first_end, count) - ramp(first_end, count - whole)) - (
        kept - capped(first_end, reached, count - whole)
    )

    def line_columns(every: Any) -> Any:
        left = 1 - local - over(offset + 1 - local) - ceiling(sink / bn) * bn
        start, stop = ((offset + (t - S.Half) * span + left) / every for t in (S.Zero, count))
        return tiles_of_columns(start, stop, span / every)

    slope = Max((vertical - forced) * span / n, bn * 1e-9)
    begins = forced + (vertical - forced) * Max(offset - span / 2, 0) / n
    chosen = tiles_of_columns(begins, begins + slope * count, slope) * Min(1, vertical)
    adjacent = capped(first_base, ceiling(Max(near - 1, 0) / bn), count)
    blocks = Max((offset + q * span / bm) / bn, 1)
    covered = 1 - (1 - Min(1, (1 + reach / bn) / blocks)) ** far
    between = Max(ramp(first_base, count) - adjacent, 0)
    diagonals = adjacent + covered * between
    same = Min(1, (bn + reach - reach % even) / stride)  # the distances are multiples of `even` into a key block
    line_tiles = ceiling(q / stride / bm)
    dense_lines = (line_tiles * offset + (line_tiles + 1) / 2 * q * span / bm) / bn
    return {
        "dense": {"rows": count, "dense": everything},
        "a_shape": {"rows": count, "tiles": kept},
        "tri_shape": {"rows": count, "tiles": kept + tail},
        "vertical_slash": {
            "rows": count,
            "tiles": capped(first_end, window.subs({local: S.One}), count),
            "listed": diagonals,
            "columns": chosen,
            "gathered": ceiling(vertical / bn),
        },
        "grid": {
            "rows": count,
            "tiles": kept,
            "columns": line_columns(stride),
            "gathered": ceiling(n / stride / bn),
        },
        "grid_same_phase": {"listed": same * Max(ramp(first_base, count) - capped(first_base, window, count), 0)},
        "grid_query_lines": {"rows": line_tiles, "tiles": dense_lines},
        "block_topk": {
            "rows": count,
            "tiles": kept,
            "listed": capped(first_end, reached + k, count) - kept,
        },
    }


@lru_cache(maxsize=64)
def _compiled(name: str, fields: tuple[str, ...]) -> tuple[tuple[str, ...], Callable[..., Sequence[float]]]:
    """Names of the symbols of a formula, sorted, and a function of their values."""
    import sympy

    terms = formulas()[name]
    wanted = [terms[field] for field in fields]
    names = tuple(sorted({str(symbol) for term in wanted for symbol in term.free_symbols}))
    arguments = [next(s for term in wanted for s in term.free_symbols if str(s) == name) for name in names]
    # A symbol may carry one set of assumptions only, so equal names are equal symbols.
    return names, sympy.lambdify(arguments, wanted, modules="math")


def _evaluate(name: str, values: dict[str, float]) -> Work:
    fields = tuple(formulas()[name])
    names, function = _compiled(name, fields)
    found = function(*(values[symbol] for symbol in names))
    return Work(**{field: max(0.0, float(value)) for field, value in zip(fields, found, strict=True)})


def region_work(pattern: Pattern, region: Region, *, spread: Spread = USUAL) -> Work:
    """Expected work of one head that follows ``pattern`` in one region."""
    values = region.values()
    if region.rows <= 0 or region.keys <= 0:
        return Work()
    if isinstance(pattern, OwnPattern):
        raise ValueError(f"the cost of {pattern.name} is known from its plan alone; make one and ask plan_work")
    if not region.ordered and region.span > 2 * region.tiles.block_m and _has_diagonals(pattern):
        pattern = Dense()  # rows too far apart for a list of block diagonals
    if isinstance(pattern, VerticalSlash):
        slash = min(pattern.n_slash, int(region.keys))
        vertical = min(pattern.n_vertical, int(region.keys))
        forced = min(FORCED_COLUMNS, (vertical + 1) // 2)
        seen = forced + (vertical - forced) * (1 - spread.late)
        far = min((slash - min(FORCED_DISTANCES, (slash + 1) // 2)), slash * spread.far)
        values |= {"n_vertical": seen, "forced": forced, "near": slash - far, "far": far}
    elif not isinstance(pattern, Dense):
        values |= {
            name: float(min(value, region.keys)) for name, value in asdict(pattern).items() if type(value) is int
        }
    if isinstance(pattern, Grid):
        stride = pattern.stride or max(MIN_STRIDE, round(region.keys**0.5))
        even = math.gcd(math.gcd(stride, region.tiles.block_n), int(region.offset))
        values |= {"stride": stride, "even": even if region.ordered else 1}
        if pattern.query_lines and stride > 1:
            # The lines have tiles of their own; the other rows close the gaps that they leave.
            others = region.rows * (1 - 1 / stride)
            rest = Region(others, region.keys, region.span * region.rows / others, region.offset, region.tiles, False)
            lines = _evaluate("grid_query_lines", values)
            plain = dataclasses.replace(pattern, query_lines=False)
            return lines.plus(region_work(plain, rest, spread=spread))
    if isinstance(pattern, BlockTopK):
        values["k"] = float(list_width([pattern], -(-int(region.keys) // region.tiles.block_n)))
    work = _evaluate(pattern.name, values)
    if isinstance(pattern, Grid) and pattern.same_phase:
        work = work.plus(_evaluate("grid_same_phase", values))
    return work


def _has_diagonals(pattern: Pattern) -> bool:
    return isinstance(pattern, VerticalSlash) or (isinstance(pattern, Grid) and pattern.same_phase)


def expected_work(
    pattern: HeadPattern,
    q_len: int,
    kv_len: int,
    tiles: TileShape,
    *,
    counts: dict[int, int] | None = None,
    spread: Spread = USUAL,
) -> Work:
    """Expected work of one head on one prompt.

    Args:
        q_len, kv_len: query rows and keys, in tokens; the rows are the last ones of ``kv_len`` positions.
        counts: modality id → tokens, for boundaries; their sum is ``kv_len``. Modalities are taken as mixed evenly.
        spread: where columns and diagonals lie.

    Raises:
        ValueError: a pattern with boundaries and no ``counts``.
    """
    offset = kv_len - q_len
    if not isinstance(pattern, ByModality):
        region = Region(q_len, kv_len, tiles.block_m, offset, tiles)
        return region_work(pattern, region, spread=spread)
    if not counts:
        raise ValueError(f"the cost of boundary {pattern.boundary} depends on the modalities; pass counts")
    share = q_len / kv_len
    total = Work()
    for query, rows in counts.items():
        if not rows:
            continue
        total = total._replace(rows=total.rows + math.ceil(rows * share / tiles.block_m))
        every: list[tuple[int | None, int]] = [(None, kv_len)] if pattern.boundary == "q" else [*counts.items()]
        for key, keys in every:
            span, place = tiles.block_m * keys / rows, offset * keys / kv_len
            region = Region(rows * share, keys, span, place, tiles, ordered=False)
            work = region_work(pattern.pattern(query, key), region, spread=spread)
            # The regions of a tile share its rows, and no tile runs as plain dense attention.
            total = total.plus(work._replace(rows=0.0, tiles=work.tiles + work.dense, dense=0.0))
    return total


def expected_density(
    pattern: HeadPattern, q_len: int, kv_len: int, tiles: TileShape, *, counts: dict[int, int] | None = None
) -> float:
    """Expected tiles ÷ tiles of dense causal attention."""
    dense = expected_work(Dense(), q_len, kv_len, tiles).visited
    return float(expected_work(pattern, q_len, kv_len, tiles, counts=counts).visited / max(1.0, float(dense)))


# ---------------------------------------------------------------------------------------------------------------------
# Time


@dataclass(frozen=True)
class Coefficients:
    """Seconds for a call and for each unit of ``Work`` of one kernel family, head dim and tile shape.

    Attributes:
        launch: of a call. The others: of the field of ``Work`` with that name.
    """

    launch: float
    rows: float
    tiles: float
    listed: float
    columns: float
    gathered: float
    dense: float

    def seconds(self, work: Work, *, calls: int = 1) -> float | Tensor:
        """Predicted time; a tensor where ``work`` holds tensors."""
        total: float | Tensor = self.launch * calls
        for name, amount in work._asdict().items():
            total = total + getattr(self, name) * amount
        return total

    def scaled(self, factor: float) -> Coefficients:
        """The same kernel with ``factor`` times the work in each tile."""
        rest = {name: value * factor for name, value in asdict(self).items() if name != "launch"}
        return Coefficients(self.launch, **rest)


EVEN = Coefficients(launch=0.0, rows=0.0, tiles=1.0, listed=1.0, columns=1.0, gathered=0.0, dense=1.0)
"""Under these every key tile counts alike."""

TILE_NS = {"hopper": 11.4, "portable": 16.0, "cpu": 62_000.0}
"""Nanoseconds of a tile of 128 rows and 128 keys at head dim 128: an H100, and two cores of a desktop."""


def default_coefficients(family: str, head_dim: int, tiles: TileShape) -> Coefficients:
    """What stands in for a device that has not been calibrated: ratios of costs as measured on one H100, and on a CPU
    for ``"cpu"``. Good for shares of dense time, not for times."""
    tile = TILE_NS.get(family, TILE_NS["portable"]) * 1e-9 * tiles.block_m * tiles.block_n * head_dim / 128**3
    if family == "cpu":
        return Coefficients(1e-3, rows=2.5 * tile, tiles=tile, listed=tile, columns=tile, gathered=tile, dense=tile)
    return Coefficients(
        launch=2e-5, rows=1.2 * tile, tiles=tile, listed=1.03 * tile, columns=1.1 * tile, gathered=20 * tile, dense=tile
    )
