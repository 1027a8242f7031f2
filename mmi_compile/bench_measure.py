"""How ``mmi bench`` measures: device time apart from host time, memory, and the error of sampled rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmi_compile.kernels.plan import Plan

T = TypeVar("T")

BUDGET = 6.0
"""Seconds after which a measurement is not repeated further."""

FILLER_LIMIT = 0.25
"""Longest that the device is kept busy while the host queues the work to be timed, in seconds."""

_CYCLES_PER_SECOND = 2e9  # of torch.cuda._sleep; a device with a slower clock sleeps longer, which does no harm


@dataclass(frozen=True)
class Timing:
    """Medians over ``repeats`` calls, in milliseconds.

    Attributes:
        device_ms: time on the device, queued behind other work, so that it holds no gaps in which the device waits for
            the host (as far as launches can be queued up). On the CPU: the time of the call.
        host_ms: time the host takes to queue the call. On the CPU: the same as ``device_ms``.
    """

    device_ms: float
    host_ms: float
    repeats: int


def time_call(run: Callable[[], Any], device: torch.device, repeats: int) -> Timing:
    """Time ``run`` after warming up; fewer repeats when they would take longer than ``BUDGET``."""
    once = _once_on_gpu if device.type == "cuda" else _once_on_cpu
    run()
    _wait(device)
    begin = time.perf_counter()
    first = once(run, 0.0)
    _wait(device)
    repeats = min(repeats, int(BUDGET / max(1e-9, time.perf_counter() - begin)))
    if repeats < 2:
        return Timing(*first, 1)
    times = [once(run, first[1] / 1e3) for _ in range(repeats)]
    device_ms, host_ms = (statistics.median(column) for column in zip(*times, strict=True))
    return Timing(device_ms, host_ms, repeats)


def _once_on_gpu(run: Callable[[], Any], host: float) -> tuple[float, float]:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # Without it the device would wait between short kernels, and the host would be measured instead.
    torch.cuda._sleep(int(min(FILLER_LIMIT, 1.5 * host + 2e-4) * _CYCLES_PER_SECOND))
    begin.record()
    started = time.perf_counter()
    run()
    host_ms = (time.perf_counter() - started) * 1e3
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)), host_ms


def _once_on_cpu(run: Callable[[], Any], host: float) -> tuple[float, float]:
    begin = time.perf_counter()
    run()
    taken = (time.perf_counter() - begin) * 1e3
    return taken, taken


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(run: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """What ``run`` returns, and the most memory it held beyond what was held before (bytes; None where not counted)."""
    if device.type != "cuda":
        return run(), None
    _wait(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = run()
    _wait(device)
    return result, torch.cuda.max_memory_allocated(device) - before


def sampled_rows(length: int, seed: int, count: int = 6) -> list[int]:
    """The first and last rows, both sides of the middle, and ``count`` random ones."""
    drawn = torch.randint(0, length, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted({0, length // 2 - 1, length // 2, length - 1, *drawn} - {-1})


def relative_error(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, rows: list[int], plan: Plan | None
) -> float:
    """``|out - exact| / |exact|`` over sampled rows, the largest of the first, a middle and the last head.

    Exact is softmax attention in float32 over the pairs of ``plan``, or over all causal ones when it is None.
    """
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    worst = 0.0
    for b in {0, q.shape[0] - 1}:
        for h in {0, heads // 2, heads - 1}:
            keys, values = k[b, h // group].float(), v[b, h // group].float()
            index = torch.tensor(rows, device=q.device)
            keep = torch.stack([_row_keys(plan, b, h, row, keys) for row in rows])
            scores = (q[b, h, index].float() @ keys.T * scale).masked_fill(~keep, -torch.inf)
            exact = torch.softmax(scores, -1) @ values
            difference = out[b, h, index].float() - exact
            worst = max(worst, float(difference.norm() / exact.norm().clamp(min=1e-30)), key=_nan_last)
    return worst


def _nan_last(x: float) -> float:
    return float("inf") if x != x else x


def _row_keys(plan: Plan | None, b: int, h: int, row: int, keys: Tensor) -> Tensor:
    """The keys of one row by the definition of a plan, bool ``[N]``: plain causal geometry only."""
    j = torch.arange(keys.shape[0], device=keys.device)
    if plan is None:
        return j <= row
    tile = row // plan.block_m
    if plan.row_order is not None:
        tile = int((plan.row_order[b, h] == row).nonzero()[0]) // plan.block_m
    keep = torch.zeros_like(j, dtype=torch.bool)
    for region in range(plan.regions):
        record = {name: int(value[b, h, tile, region]) for name, value in plan.record._asdict().items()}
        order = plan.key_order[b].long() if plan.key_order is not None and record["grouped"] else j
        visited = order[_visited(plan, record, torch.arange(order.numel(), device=j.device) // plan.block_n)]
        columns = plan.columns[b, h, record["column_start"] :][: record["num_columns"]].long()
        keep = keep | torch.isin(j, torch.cat([visited, columns]))  # -1, an empty slot, is no key
    return keep & (j <= row)


def _visited(plan: Plan, record: dict[str, int], block: Tensor) -> Tensor:
    """Whether window, sinks or list of a region hold ``block``, integers of any shape."""
    listed = plan.lists[record["list_start"] : record["list_start"] + record["num_blocks"]] + record["list_base"]
    window = (block >= record["window_start"]) & (block < record["window_stop"])
    return window | (block >= record["sink_start"]) & (block < record["sink_stop"]) | torch.isin(block, listed.long())
