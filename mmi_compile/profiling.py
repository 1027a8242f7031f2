"""Named ranges in profiles, and a stopwatch that does not make the device wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import torch


@contextmanager
def span(name: str) -> Iterator[None]:
    """A named range in profiles (in NVTX under ``torch.autograd.profiler.emit_nvtx``); free when none is taken."""
    if not torch._C._autograd._profiler_enabled():
        yield
        return
    with torch.profiler.record_function(name):
        yield


@dataclass
class Stopwatch:
    """Adds up the time of some stretches of work, on the device where there is one."""

    seconds: float = 0.0
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Count what happens inside."""
        if device.type != "cuda":
            started = perf_counter()
            yield
            self.seconds += perf_counter() - started
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(torch.cuda.current_stream(device))
        yield
        end.record(torch.cuda.current_stream(device))
        self.events.append((begin, end))

    def total(self) -> float:
        """Seconds; waits for the device."""
        for _, end in self.events:
            end.synchronize()
        return self.seconds + sum(float(begin.elapsed_time(end)) for begin, end in self.events) / 1e3
