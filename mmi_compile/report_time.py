"""Time by stage: what the cost model predicts, and what a profile of one run measures where someone asks for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from mmi_compile.decision import MMIError

if TYPE_CHECKING:
    from mmi_compile.report import Report

STAGES = {
    "mmi::attention": "attention, all stages",
    "mmi::plan": "probe and plan",
    "mmi::probe": "probes alone",
    "mmi::kernel": "sparse kernel",
    "mmi::guard": "guard",
    "mmi::key_bounds": "padding",
    "mmi::modality": "modality of the prompt",
    "mmi::segments": "grouping by modality",
}
"""Ranges of a profile: the operators of rewritten graphs, and the parts of a sparse attention (``profiling.span``)."""


@dataclass(frozen=True)
class StageTime:
    """What a profile says of one stage, over all calls.

    Attributes:
        name: of its range. what: in words. calls: how often it ran.
        host_milliseconds: of the Python thread. device_milliseconds: of the GPU kernels inside; None without a GPU.
    """

    name: str
    what: str
    calls: int
    host_milliseconds: float
    device_milliseconds: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def stage_times() -> Iterator[list[StageTime]]:
    """Profile what runs inside the block; the list is filled when it ends. The first run of a graph compiles kernels:
    profile a later one."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    found: list[StageTime] = []
    with torch.profiler.profile(activities=activities) as profile:
        yield found
    # The dispatcher passes a custom operator more than once, each time inside the last: the outermost counts.
    events = [event for event in profile.events() if event.name in STAGES and not _is_nested(event)]
    for name, what in STAGES.items():
        mine = [event for event in events if event.name == name]
        if mine:
            host, device = (sum(getattr(e, f"{kind}_time_total") for e in mine) / 1e3 for kind in ("cpu", "device"))
            found.append(StageTime(name, what, len(mine), round(host, 3), round(device, 3) if on_gpu else None))


def _is_nested(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name == event.name:
            return True
        parent = parent.cpu_parent
    return False


def explain_timed(model: torch.nn.Module, options: Mapping[str, Any], inputs: Mapping[str, Any]) -> Report:
    """Like :func:`mmi_compile.explain`, but the model runs twice: the first run compiles, the second is profiled, and
    what it took is the report's ``stages``.

    Raises:
        OptionError, MMIError: as for ``explain``, inside Dynamo's own exception where a backend raises them.
    """
    from mmi_compile import record
    from mmi_compile.backend import compile_graph
    from mmi_compile.frontend import for_once
    from mmi_compile.options import Options
    from mmi_compile.prompt_hook import PromptHook
    from mmi_compile.report import GraphReport, Report

    chosen = Options.from_mapping({**options, "inner": "eager"})
    graphs: list[GraphReport] = []

    def observing(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        return compile_graph(gm, example_inputs, chosen, None, graphs.append)

    hook = PromptHook(model, strict=chosen.strict)
    with torch.no_grad(), for_once(model, observing) as compiled:
        with record.hooked(hook.read((), inputs)):
            compiled(**inputs)
        with record.hooked(hook.read((), inputs)), stage_times() as stages:
            compiled(**inputs)
    return Report(graphs, stages)


@dataclass(frozen=True)
class KernelFacts:
    """What the cost of an attention's kernel depends on beside its plan; sizes that the graph leaves open are None."""

    device: str
    dtype: torch.dtype
    head_dim: int | None


def predicted(facts: KernelFacts | None, run: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the kernel of an attention's last run should take by the cost model, for each batch element.

    Returns:
        ``share_of_dense``: time ÷ that of dense attention on the same kernels; ``milliseconds`` and
        ``dense_milliseconds``: None unless this device was calibrated (``mmi bench --calibrate``); ``source``: of the
        coefficients. None where the attention has not run, or ran on none of our kernels.
    """
    from mmi_compile.cost_file import cost_model
    from mmi_compile.kernels.cost import Work
    from mmi_compile.kernels.geometry import Geometry
    from mmi_compile.kernels.plan import causal_tiles

    if run is None or facts is None or facts.head_dim is None or run["path"].startswith("dense"):
        return None
    try:
        model = cost_model(torch.device(facts.device), facts.dtype, facts.head_dim)
    except (ValueError, MMIError):  # no kernel, or a file of measurements that cannot be read
        return None
    q_len, kv_len = run["q_len"], run["kv_len"]
    geometry = Geometry(1, 1, 1, q_len, kv_len, q_offset=kv_len - q_len)
    rows, dense_tiles = (
        -(-q_len // model.tiles.block_m),
        causal_tiles(geometry, model.tiles.block_m, model.tiles.block_n),
    )
    heads = run["density_per_head"]
    sparse = [density for density in heads if density < 1]
    every = len(heads)
    work = Work(rows=rows * every, tiles=dense_tiles * sum(sparse), dense=dense_tiles * (every - len(sparse)))
    everything = Work(rows=rows * every, dense=dense_tiles * every)
    seconds, dense = float(model.seconds(work)), float(model.seconds(everything))
    calibrated = model.source.startswith("calibrated")
    return {
        "share_of_dense": round(seconds / dense, 4) if dense else 1.0,
        "milliseconds": round(1e3 * seconds, 4) if calibrated else None,
        "dense_milliseconds": round(1e3 * dense, 4) if calibrated else None,
        "source": model.source,
    }
