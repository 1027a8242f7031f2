"""``mmi bench --calibrate``: measure what work costs on this device, and keep it for head search and dispatch.

The bench's patterns are planned and run at several lengths; coefficients of the cost model (``kernels/cost.py``) are
fitted to the times by least squares without negative values. The prediction error that is reported is one on
measurements that the fit has not seen. Results are kept per device in the user's cache folder (``MMI_CACHE_DIR``).
"""

from __future__ import annotations

import datetime
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

import numpy as np
import torch
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor

from mmi_compile.bench_cases import TEXT, VIDEO, Case, make_inputs, parse_cases, video_prompt
from mmi_compile.bench_measure import time_call
from mmi_compile.bench_peers import Family, kernel_families
from mmi_compile.bench_rows import DTYPES
from mmi_compile.cost_file import Calibration, Entry, device_name
from mmi_compile.environment import versions
from mmi_compile.kernels.boundaries import build_bounded_plan
from mmi_compile.kernels.cost import Coefficients, Work, default_coefficients, plan_work
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.plan import Plan
from mmi_compile.kernels.segments import segment

CASES = (
    "dense", "a_shape(128,4096)", "a_shape(128,1024)", "a_shape(64,256)", "tri_shape(128,1024,512)",
    "grid(stride=256,local=1024)", "grid(stride=64,local=256)", "vertical_slash(1000,1024)", "vertical_slash(500,100)",
    "block_topk(k=16)", "block_topk(k=4)", "q", "2d", "mix",
)  # fmt: skip
"""What is measured: the bench's patterns, and smaller ones of each kind."""

PRIOR = 0.02
"""Weight of the built-in ratios against one measurement: it decides only what the measurements leave open."""

FOLDS = 4

OUTLIER, ROUNDS = 0.1, 4
"""Relative error beyond which a measurement loses weight (something else ran meanwhile), and how often weights are
found anew."""


@dataclass(frozen=True)
class Measurement:
    """One call of a kernel: its work over all heads, and its time in seconds."""

    tokens: int
    case: str
    work: Work
    seconds: float


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


@dataclass(frozen=True)
class CalibrationOptions:
    """What to measure; ``for_device`` fills in what fits the machine.

    Attributes:
        tokens: prompt lengths. heads, kv_heads, head_dims: of q, k, v. dtype: as in ``BenchOptions``.
        cases: what to plan. repeats: timed calls for every median.
        limit: seconds after which no further measurement begins, not counting the first length, at which kernels are
            compiled. families: kernel families at most, best first.
    """

    tokens: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dims: tuple[int, ...]
    dtype: str
    cases: tuple[Case, ...]
    repeats: int = 3
    seed: int = 0
    limit: float = 50.0
    families: int = 1

    def __post_init__(self) -> None:
        if self.heads < 1 or self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} heads cannot share {self.kv_heads} kv heads; give a divisor of {self.heads}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        if self.repeats < 1 or min(self.head_dims, default=0) < 1 or not self.tokens:
            raise ValueError("repeats and head dims must be 1 or more, and there must be a length")

    @classmethod
    def for_device(cls, device: torch.device, **given: Any) -> CalibrationOptions:
        """The options in ``given`` that are not None, and defaults for the others."""
        gpu = device.type == "cuda"
        chosen: dict[str, Any] = {
            "tokens": (8192, 16384, 32768, 65536, 131072) if gpu else (512, 1024, 2048, 4096),
            "heads": 28 if gpu else 8,
            "kv_heads": 4 if gpu else 2,
            "head_dims": (128,) if gpu else (64,),
            "dtype": "bf16" if gpu else "fp32",
            "cases": parse_cases(CASES),
        }
        return cls(**chosen | {key: value for key, value in given.items() if value is not None})


def calibrate(
    device: torch.device, options: CalibrationOptions, *, on_step: Callable[[str], None] = lambda what: None
) -> Calibration:
    """Measure and fit; nothing is written.

    Raises:
        ValueError: no kernel serves the device, or the time limit left too few measurements.
    """
    entries = []
    for head_dim in options.head_dims:
        started = math.inf
        known = kernel_families(device, DTYPES[options.dtype], head_dim)[: options.families]
        if not known:
            raise ValueError(f"no kernel for {device}, {options.dtype} and head dim {head_dim}")
        measured: dict[str, list[Measurement]] = {family.name: [] for family in known}
        for tokens in options.tokens:
            for name, found in _measure(device, options, head_dim, tokens, known, started, on_step):
                measured[name].append(found)
            started = min(started, time.perf_counter())
        entries += [entry_of(family, head_dim, measured[family.name]) for family in known]
    return Calibration(device_name(device), tuple(entries), versions(), _today())


def _measure(
    device: torch.device, options: CalibrationOptions, head_dim: int, tokens: int, families: Sequence[Family],
    started: float, on_step: Callable[[str], None],
) -> Iterator[tuple[str, Measurement]]:  # fmt: skip
    kinds: object = None
    for case in sorted(options.cases, key=lambda case: case.input_kinds(options.heads)):
        if time.perf_counter() - started > options.limit:
            return
        on_step(f"head dim {head_dim}, {tokens} tokens, {case.name}")
        if kinds != case.input_kinds(options.heads):
            kinds = case.input_kinds(options.heads)
            x = make_inputs(
                case, tokens, heads=options.heads, kv_heads=options.kv_heads, head_dim=head_dim, batch=1,
                dtype=DTYPES[options.dtype], device=device, seed=options.seed,
            )  # fmt: skip
        for family in families:
            yield family.name, _one(case, x.q, x.k, x.v, family, options.repeats)


@torch.no_grad()
def _one(case: Case, q: Tensor, k: Tensor, v: Tensor, family: Family, repeats: int) -> Measurement:
    plan, scale, out = _plan(case, q, k, family.tiles), q.shape[-1] ** -0.5, torch.empty_like(q)
    seconds = _seconds(lambda: family.run(q, k, v, plan, scale, out), q.device, repeats)
    work = Work(*(float(torch.as_tensor(part).sum()) for part in plan_work(plan)))
    return Measurement(q.shape[2], case.name, work, seconds)


def _seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds on the device. On a CPU the shortest call: other processes only ever add to it."""
    if device.type == "cuda":
        return time_call(run, device, repeats).device_ms / 1e3
    found = math.inf
    for _ in range(repeats + 1):  # the first call warms up
        begin = time.perf_counter()
        run()
        found = min(found, time.perf_counter() - begin)
    return found


def _plan(case: Case, q: Tensor, k: Tensor, tiles: TileShape) -> Plan:
    batch, heads, tokens, head_dim = q.shape
    g = Geometry(batch, heads, k.shape[1], tokens, tokens)
    patterns = case.patterns(heads)
    if patterns is None:
        raise ValueError(f"case {case.name}: its plan is chosen at run time; calibrate with patterns")
    segments = segment(video_prompt(tokens, batch, q.device), (TEXT, VIDEO), g, tiles)
    return build_bounded_plan(patterns, q, k, g, head_dim**-0.5, tiles, segments)


def steps(options: CalibrationOptions) -> int:
    """How often ``calibrate`` will call ``on_step``, at most."""
    return len(options.head_dims) * len(options.tokens) * len(options.cases)


# ---------------------------------------------------------------------------------------------------------------------
# Fitting


def entry_of(family: Family, head_dim: int, measured: Sequence[Measurement]) -> Entry:
    """Fit one family, and predict every measurement from a fit that has not seen it.

    Raises:
        ValueError: there are too few measurements.
    """
    if len(measured) < 2 * FOLDS:
        raise ValueError(f"{len(measured)} measurements are too few to fit costs; give a longer limit or more tokens")
    prior = default_coefficients(family.name, head_dim, family.tiles)
    errors = held_out_errors(measured, prior)
    bm, bn = family.tiles.block_m, family.tiles.block_n
    return Entry(
        family.name, head_dim, bm, bn, fit(measured, prior), statistics.median(errors), max(errors), len(measured)
    )


def held_out_errors(measured: Sequence[Measurement], prior: Coefficients) -> list[float]:
    """Relative error of each measurement's prediction by a fit to the other folds."""
    errors = []
    for number, one in enumerate(measured):
        others = [m for i, m in enumerate(measured) if i % FOLDS != number % FOLDS]
        errors.append(abs(float(fit(others, prior).seconds(one.work)) / one.seconds - 1))
    return errors


def fit(measured: Sequence[Measurement], prior: Coefficients) -> Coefficients:
    """Non-negative coefficients with the least relative errors: squared, and beyond ``OUTLIER`` as they are.

    Args:
        prior: ratios that hold where the measurements do not decide.
    """
    names = [field.name for field in fields(Coefficients)]
    seconds = np.array([m.seconds for m in measured])
    amounts = np.array([[1.0, *map(float, m.work)] for m in measured])
    ratios = np.array([getattr(prior, name) for name in names])
    level = float(np.median(seconds / (amounts @ ratios)))
    # In units of the prior, all unknowns are near 1.
    design = np.concatenate([amounts * (ratios * level) / seconds[:, None], PRIOR * np.eye(len(names))])
    target = np.concatenate([np.ones(len(measured)), PRIOR * np.ones(len(names))])
    weight = np.ones(len(target))
    for _ in range(ROUNDS):
        x = non_negative_least_squares(design * weight[:, None], target * weight)
        residual = np.abs(design @ x - target)
        weight = np.sqrt(np.minimum(1.0, OUTLIER / np.maximum(residual, 1e-12)))
        weight[len(measured) :] = 1.0
    return Coefficients(*(float(value) for value in x * ratios * level))


def non_negative_least_squares(design: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The non-negative ``x`` with the least ``|design x - target|``, for a few unknowns.

    At the optimum, the unknowns that are not 0 solve the plain problem, so the best of all subsets that give no
    negative value is it.
    """
    count = design.shape[1]
    best, found = math.inf, np.zeros(count)
    for size in range(count, 0, -1):
        for subset in combinations(range(count), size):
            some = list(subset)
            x = np.linalg.lstsq(design[:, some], target, rcond=None)[0]
            residual = float(((design[:, some] @ x - target) ** 2).sum())
            if (x >= 0).all() and residual < best:
                best = residual
                found = np.zeros(count)
                found[some] = x
        if math.isfinite(best) and size == count:
            break  # without constraints in the way, nothing is better
    return found


def cost_table(calibration: Calibration) -> RenderableType:
    """What work costs, in microseconds, and how well that predicts what the fit has not seen."""
    names = [field.name for field in fields(Coefficients)]
    table = Table(title=f"{calibration.device}: microseconds a unit of work", title_justify="left", box=None)
    for heading in ("kernel", "head dim", "tile", *names, "median error", "worst", "samples"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    for e in calibration.entries:
        costs = [f"{getattr(e.coefficients, name) * 1e6:.4g}" for name in names]
        table.add_row(
            e.family, str(e.head_dim), f"{e.block_m}×{e.block_n}", *costs, f"{e.error:.1%}", f"{e.worst:.1%}",
            str(e.samples),
        )  # fmt: skip
    return table


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()
