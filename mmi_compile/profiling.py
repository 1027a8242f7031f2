"""Named ranges in profiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def span(name: str) -> Iterator[None]:
    """A named range in profiles (in NVTX under ``torch.autograd.profiler.emit_nvtx``); free when none is taken."""
    if not torch.autograd._profiler_enabled():
        yield
        return
    with torch.profiler.record_function(name):
        yield
