"""``mmi bench``: our kernels and their peers side by side on the same tensors.

Inputs have the structure that a case is made for (``kernels/structured.py``): random q and k have none, and any plan
for them is dense. Times are medians; probe, plan and kernel are timed apart, and together as the whole operator.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor

from mmi_compile.bench_blocks import NotFeasible
from mmi_compile.bench_cases import TEXT, VIDEO, Case, is_dense, make_inputs, video_prompt
from mmi_compile.bench_measure import peak_bytes, relative_error, sampled_rows, time_call
from mmi_compile.bench_peers import PEERS, Call, Family, kernel_families
from mmi_compile.bench_rows import DTYPES, FAILED, SKIPPED, TOLERANCE, BenchOptions, Results, Row
from mmi_compile.environment import describe_device, versions
from mmi_compile.kernels.boundaries import build_bounded_plan
from mmi_compile.kernels.dispatch import attention
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.patterns import ByModality
from mmi_compile.kernels.plan import Plan
from mmi_compile.kernels.segments import Segments, segment
from mmi_compile.runtime import AttentionRun

T = TypeVar("T")

REMEASURE_BELOW = 500.0
"""Milliseconds below which the dense peer is timed again on the tensors of every case, else once a length."""


def run_bench(
    options: BenchOptions,
    device: torch.device,
    *,
    on_step: Callable[[str], None] = lambda what: None,
    on_row: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Measure everything that ``options`` names.

    Args:
        on_step: told what is measured next. on_row: told after every new row, the last of ``results.rows``.

    A measurement that fails, for lack of memory or otherwise, becomes a row with the reason; the others go on.
    """
    results = Results(options, describe_device(device), versions())
    bench = _Bench(options, device, on_step)
    for tokens in options.tokens:
        rows = bench.length(tokens)
        while (row := _next(rows)) is not None:
            results.rows.append(row)
            on_row(results)
    return results


@torch.no_grad()
def _next(rows: Iterator[Row]) -> Row | None:
    return next(rows, None)


def count_steps(options: BenchOptions, device: torch.device) -> int:
    """How often ``run_bench`` will call ``on_step``, at most."""
    kernels = 10 if options.tune else len(options.peers) + 3
    return len(options.tokens) * len(options.cases) * kernels


@dataclass
class _Bench:
    """Measures one length after the other; keeps the tensors of the last case for the next one that can use them."""

    options: BenchOptions
    device: torch.device
    on_step: Callable[[str], None]
    kept: tuple[object, tuple[Tensor, Tensor, Tensor]] | None = None
    dense_ms: float | None = None

    def length(self, tokens: int) -> Iterator[Row]:
        """All rows of one prompt length."""
        self.kept, self.dense_ms = None, None
        for case in self.options.cases:
            start = Row(tokens, case.name, "inputs", True)
            qkv = yield from self._caught(start, self._inputs, case, tokens)
            if qkv is None:
                continue
            measured = self._tune(case, qkv) if self.options.tune else self._side_by_side(case, qkv)
            yield from measured
            del qkv

    def _inputs(self, case: Case, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        o = self.options
        key = (tokens, case.input_kinds(o.heads))
        if self.kept is None or self.kept[0] != key:
            self.on_step(f"{tokens} tokens: inputs for {case.name}")
            self.kept = None
            self._free()
            x = make_inputs(
                case, tokens, heads=o.heads, kv_heads=o.kv_heads, head_dim=o.head_dim, batch=o.batch,
                dtype=DTYPES[o.dtype], device=self.device, seed=o.seed,
            )  # fmt: skip
            self.kept = (key, (x.q, x.k, x.v))
        return self.kept[1]

    def _side_by_side(self, case: Case, qkv: tuple[Tensor, Tensor, Tensor]) -> Iterator[Row]:
        tokens, names = qkv[0].shape[2], self.options.peers
        yield from self._dense_peers(case, qkv, is_dense(case.patterns(self.options.heads)))
        if case.kind == "dispatch":
            yield from self._dispatch(case, qkv)
            return
        if case.bounded:
            yield from self._segmentation(case, qkv)
        plan: Plan | None = None
        for family in self._families(qkv[0]):
            if isinstance(family, str):
                yield Row(tokens, case.name, "ours", True, FAILED, family)
                continue
            self.on_step(f"{tokens} tokens, {case.name}: {family.name}")
            row = Row(tokens, case.name, f"mmi {family.name}", True)
            made = yield from self._caught(row, self._ours, row, case, qkv, family)
            if made is not None:
                yield made[0]
                plan = made[1] if plan is None else plan
        if plan is None:
            return
        for name in names:
            if PEERS[name].sparse:
                self.on_step(f"{tokens} tokens, {case.name}: {PEERS[name].name}")
                row = Row(tokens, case.name, PEERS[name].name, False)
                found = yield from self._caught(row, self._time_peer, row, name, qkv, plan)
                if found is not None:
                    yield found

    def _segmentation(self, case: Case, qkv: tuple[Tensor, Tensor, Tensor]) -> Iterator[Row]:
        """What grouping the tokens costs, once for all layers."""
        q, k, _ = qkv
        for family in self._families(q)[:1]:
            if not isinstance(family, str):
                planner = _Planner(case, q, k, q.shape[-1] ** -0.5, family)
                timing = time_call(planner.segment, self.device, self.options.repeats)
                yield Row(
                    q.shape[2], case.name, "segmentation", True, kernel_ms=timing.device_ms, op_ms=timing.device_ms,
                    host_ms=timing.host_ms, repeats=timing.repeats, speedup=self._speedup(timing.device_ms),
                )  # fmt: skip

    def _dispatch(self, case: Case, qkv: tuple[Tensor, Tensor, Tensor]) -> Iterator[Row]:
        """The operator under the policies ``exact`` and ``adaptive``: which kernel runs is its own choice."""
        for policy in ("exact", "adaptive"):
            row = Row(qkv[0].shape[2], case.name, f"mmi {policy}", True)
            self.on_step(f"{row.tokens} tokens, {case.name}: {row.kernel}")
            made = yield from self._caught(row, self._time_dispatch, row, qkv, policy)
            if made is not None:
                yield made

    def _time_dispatch(self, row: Row, qkv: tuple[Tensor, Tensor, Tensor], policy: str) -> Row:
        q, k, v = qkv
        (batch, heads, tokens), scale = q.shape[:3], q.shape[-1] ** -0.5
        geometry = Geometry(batch, heads, k.shape[1], tokens, tokens)

        def run() -> tuple[Tensor, AttentionRun]:
            return attention(
                q, k, v, geometry, scale, lambda: torch.empty_like(q), policy=policy, recall=0.95, max_density=0.5,
                min_tokens=-1,
            )  # fmt: skip

        timing = time_call(run, self.device, self.options.repeats)
        (out, ran), memory = peak_bytes(run, self.device)
        dense = not isinstance(ran.density, Tensor)
        row = dataclasses.replace(
            row, kernel=f"{row.kernel}: {'dense' if dense else 'sparse'}", op_ms=timing.device_ms,
            density=1.0 if dense else float(torch.as_tensor(ran.density).mean()), host_ms=timing.host_ms,
            speedup=self._speedup(timing.device_ms), repeats=timing.repeats,
            scratch=None if memory is None else _share(memory - _bytes(q), qkv),
        )  # fmt: skip
        return self._judged(row, qkv, out, None) if dense else row

    def _families(self, q: Tensor) -> list[Family | str]:
        try:
            found: list[Family | str] = list(kernel_families(self.device, q.dtype, q.shape[-1]))
        except ValueError as error:
            return [str(error)]
        return found or ["no kernel for this device, dtype and head dim"]

    def _caught(self, row: Row, measure: Callable[..., T], *arguments: Any) -> Generator[Row, None, T | None]:
        """What ``measure`` returns; None after yielding a row with the reason when it raises."""
        try:
            return measure(*arguments)
        except NotFeasible as reason:
            yield dataclasses.replace(row, status=SKIPPED, reason=str(reason))
        except torch.OutOfMemoryError:
            yield dataclasses.replace(row, status=FAILED, reason="out of memory")
        except Exception as error:  # compilers and foreign kernels fail in any way; other rows are worth having
            first = str(error).strip().partition("\n")[0][:160]
            yield dataclasses.replace(row, status=FAILED, reason=f"{type(error).__name__}: {first}")
        self._free()
        return None

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _dense_peers(self, case: Case, qkv: tuple[Tensor, Tensor, Tensor], all_of_them: bool) -> Iterator[Row]:
        """The dense peer that ratios refer to, which is the first one, or all of them."""
        names = [name for name in self.options.peers if not PEERS[name].sparse]
        for name in names if all_of_them else names[:1]:
            row = Row(qkv[0].shape[2], case.name, PEERS[name].name, False)
            self.on_step(f"{row.tokens} tokens, {case.name}: {row.kernel}")
            yield from self._dense_peer(row, name, qkv, name == names[0])

    def _dense_peer(self, row: Row, name: str, qkv: tuple[Tensor, Tensor, Tensor], reference: bool) -> Iterator[Row]:
        if reference and self.dense_ms is not None and self.dense_ms > REMEASURE_BELOW:
            return
        found = yield from self._caught(row, self._time_peer, row, name, qkv, None)
        if found is not None:
            if reference:
                self.dense_ms = found.op_ms
                found = dataclasses.replace(found, speedup=1.0)
            yield found

    def _time_peer(self, row: Row, name: str, qkv: tuple[Tensor, Tensor, Tensor], plan: Plan | None) -> Row:
        q, k, v = qkv
        scale = q.shape[-1] ** -0.5
        run = PEERS[name].prepare(Call(q, k, v, scale, plan))
        timing = time_call(run, self.device, self.options.repeats)
        out, memory = peak_bytes(run, self.device)
        pairs = dense_pairs(q) if plan is None or _is_dense_plan(plan) else plan_pairs(plan)
        row = dataclasses.replace(
            row, density=1.0 if plan is None else float(plan.density().mean()), pairs=pairs,
            kernel_ms=timing.device_ms, op_ms=timing.device_ms, host_ms=timing.host_ms, repeats=timing.repeats,
            tflops=_tflops(pairs, q, timing.device_ms), speedup=self._speedup(timing.device_ms),
            scratch=None if memory is None else _share(memory - _bytes(q), qkv),
        )  # fmt: skip
        return self._judged(row, qkv, out, plan)

    def _ours(self, row: Row, case: Case, qkv: tuple[Tensor, Tensor, Tensor], family: Family) -> tuple[Row, Plan]:
        q, k, v = qkv
        scale, repeats, device = q.shape[-1] ** -0.5, self.options.repeats, self.device
        planner = _Planner(case, q, k, scale, family)
        out = torch.empty_like(q)
        plan = planner.plan()

        def whole() -> None:
            family.run(q, k, v, planner.plan(), scale, out)

        kernel = time_call(lambda: family.run(q, k, v, plan, scale, out), device, repeats)
        probe = planner.probe()
        probing = None if probe is None else time_call(probe, device, repeats).device_ms
        planning = time_call(planner.plan, device, repeats).device_ms
        op = time_call(whole, device, repeats)
        _, memory = peak_bytes(whole, device)
        pairs = dense_pairs(q) if _is_dense_plan(plan) else plan_pairs(plan)
        row = dataclasses.replace(
            row, density=float(plan.density().mean()), pairs=pairs, probe_ms=probing,
            plan_ms=max(0.0, planning - (probing or 0.0)), kernel_ms=kernel.device_ms, op_ms=op.device_ms,
            host_ms=op.host_ms, tflops=_tflops(pairs, q, kernel.device_ms), speedup=self._speedup(op.device_ms),
            scratch=None if memory is None else _share(memory, qkv), repeats=op.repeats,
        )  # fmt: skip
        out.fill_(float("nan"))
        family.run(q, k, v, plan, scale, out)
        return self._judged(row, qkv, out, plan), plan

    def _tune(self, case: Case, qkv: tuple[Tensor, Tensor, Tensor]) -> Iterator[Row]:
        from mmi_compile.bench_tune import candidates

        yield from self._dense_peers(case, qkv, False)
        for family in candidates(self.device, self.options.dtype, self.options.head_dim, quick=self.options.quick):
            row = Row(qkv[0].shape[2], case.name, family.name, True)
            self.on_step(f"{row.tokens} tokens, {case.name}: {family.name}")
            # A tile that does not fit is what tuning is there to find out, so it is no failure.
            made = yield from self._caught(dataclasses.replace(row, ours=False), self._ours, row, case, qkv, family)
            if made is not None:
                yield made[0]

    def _judged(self, row: Row, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, plan: Plan | None) -> Row:
        q, k, v = qkv
        rows = sampled_rows(q.shape[2], self.options.seed)
        error = relative_error(q, k, v, out, q.shape[-1] ** -0.5, rows, plan)
        row = dataclasses.replace(row, error=error)
        limit = TOLERANCE[self.options.dtype]
        if error <= limit:
            return row
        return dataclasses.replace(row, status=FAILED, reason=f"wrong result: relative error {error:.1e} > {limit:.0e}")

    def _speedup(self, ms: float) -> float | None:
        return None if self.dense_ms is None else self.dense_ms / ms


@dataclass(frozen=True)
class _Planner:
    """Makes the plan of a case, all of it or the probe alone."""

    case: Case
    q: Tensor
    k: Tensor
    scale: float
    family: Family
    made: dict[object, Any] = field(default_factory=dict)

    @property
    def geometry(self) -> Geometry:
        batch, heads, tokens, _ = self.q.shape
        return Geometry(batch, heads, self.k.shape[1], tokens, tokens)

    def segment(self) -> Segments:
        """The prompt of the cases with boundaries, grouped; the ids are made once."""
        g = self.geometry
        key = ("ids", g.batch, g.kv_len)
        if key not in self.made:
            self.made[key] = video_prompt(g.kv_len, g.batch, self.q.device, self.case.segments)
        return segment(self.made[key], (TEXT, VIDEO), g, self.family.tiles)

    def plan(self) -> Plan:
        if self.case.bounded:
            # Grouped once for all layers of a model, so it is no part of planning one of them.
            if "segments" not in self.made:
                self.made["segments"] = self.segment()
            heads = self.case.patterns(self.q.shape[1])
            assert heads is not None
            tiles = self.family.tiles
            return build_bounded_plan(heads, self.q, self.k, self.geometry, self.scale, tiles, self.made["segments"])
        return self._plain_plan()

    def _plain_plan(self) -> Plan:
        patterns = self.case.patterns(self.q.shape[1])
        if patterns is None:
            from mmi_compile.kernels.adaptive import adaptive_plan

            return adaptive_plan(self.q, self.k, self.geometry, self.scale, self.family.tiles)[0]
        from mmi_compile.kernels.planner import build_plan

        plain = [p for p in patterns if not isinstance(p, ByModality)]
        return build_plan(plain, self.q, self.k, self.geometry, self.scale, self.family.tiles)

    def probe(self) -> Callable[[], Any] | None:
        """The probes that ``plan`` makes, with the same arguments; None when it makes none."""
        from mmi_compile.kernels import probe

        original, calls = probe.run_probe, list[tuple[tuple[Any, ...], dict[str, Any]]]()

        def record(*arguments: Any, **named: Any) -> Any:
            calls.append((arguments, named))
            return original(*arguments, **named)

        with ExitStack() as stack:
            for name, module in list(sys.modules.items()):
                if name.startswith("mmi_compile.kernels.") and getattr(module, "run_probe", None) is original:
                    stack.enter_context(patch.object(module, "run_probe", record))
            self.plan()
        return (lambda: [original(*arguments, **named) for arguments, named in calls]) if calls else None


def dense_pairs(q: Tensor) -> int:
    """Pairs of causal attention over all heads: ``N (N + 1) / 2`` each."""
    batch, heads, tokens, _ = q.shape
    return batch * heads * tokens * (tokens + 1) // 2


def plan_pairs(plan: Plan) -> int:
    """Pairs in all tiles that a plan visits, whole tiles counted whole. Waits for the device."""
    return int(plan.work().sum(dtype=torch.int64)) * plan.block_m * plan.block_n


def _is_dense_plan(plan: Plan) -> bool:
    return bool((plan.density() == 1).all()) and not plan.columns.shape[-1] and not plan.lists.numel()


def _tflops(pairs: int, q: Tensor, ms: float) -> float:
    return 4 * q.shape[-1] * pairs / ms / 1e9


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _share(memory: int, qkv: tuple[Tensor, Tensor, Tensor]) -> float:
    return max(0, memory) / _bytes(*qkv)
