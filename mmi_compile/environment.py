"""What this machine and this Python environment are: for benchmarks, head configs and bug reports."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

PACKAGES = ("mmi-compile", "triton", "transformers", "flash-attn-4", "nvidia-cutlass-dsl")
"""Packages beside torch whose versions matter to results."""


def versions() -> dict[str, str]:
    """Versions of everything that takes part and is installed, by name."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    if torch.backends.cudnn.is_available():
        found["cudnn"] = str(torch.backends.cudnn.version())
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name, architecture and memory of the device."""
    if device.type != "cuda":
        return {"type": device.type, "name": "CPU", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    from mmi_compile.kernels.launch import device_arch

    return {
        "type": "cuda",
        "name": properties.name,
        "arch": device_arch(device),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
    }
