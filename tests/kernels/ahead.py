"""What every kernel that was compiled ahead of time must meet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmi_compile.kernels.spec import SHARED_MEMORY


def assert_runs_on(compiled: Mapping[str, Any], arch: str) -> None:
    """All of the compiled kernels are machine code for ``arch`` and fit its shared memory."""
    for kernel in compiled.values():
        assert kernel.metadata.shared <= SHARED_MEMORY[arch]
        assert ("hsaco" if arch.startswith("gfx") else "cubin") in kernel.asm
