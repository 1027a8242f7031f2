"""Candidate tiles for ``mmi bench --tune``: what to try on a new GPU before ``kernels/spec.py`` gets its row."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mmi_compile.bench_blocks import NotFeasible
from mmi_compile.bench_peers import Family
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.plan import Plan

# block_m, block_n, num_warps, num_stages, descriptors
CANDIDATES = (
    (128, 128, 8, 3, True),
    (128, 128, 8, 2, True),
    (128, 64, 8, 3, True),
    (128, 64, 4, 3, True),
    (64, 64, 4, 3, True),
    (128, 128, 8, 2, False),
    (128, 64, 4, 3, False),
    (128, 64, 8, 3, False),
)
QUICK = (CANDIDATES[0], CANDIDATES[6])


def candidates(device: torch.device, dtype: str, head_dim: int, *, quick: bool = False) -> list[Family]:
    """The portable kernel with each candidate's tiles, warps, pipeline stages and way of loading.

    Raises:
        NotFeasible: when run, if the architecture has no such kernel.
    """
    return [_family(device, dtype, head_dim, *candidate) for candidate in (QUICK if quick else CANDIDATES)]


def _family(
    device: torch.device, dtype: str, head_dim: int, block_m: int, block_n: int, warps: int, stages: int,
    descriptors: bool,
) -> Family:  # fmt: skip
    def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, out: Tensor) -> Tensor:
        from mmi_compile.kernels.launch import device_arch, plan_features
        from mmi_compile.kernels.spec import choose_spec
        from mmi_compile.kernels.triton_attention import attention_triton

        spec = choose_spec(
            device_arch(device), dtype, head_dim, features=plan_features(plan), block_m=block_m, block_n=block_n,
            descriptors=descriptors,
        )  # fmt: skip
        if spec.use_descriptors != descriptors:
            raise NotFeasible("no tensor descriptors on this architecture")
        return attention_triton(q, k, v, plan, scale, spec=replace(spec, num_warps=warps, num_stages=stages), out=out)

    name = f"{block_m}x{block_n} w{warps} s{stages} {'desc' if descriptors else 'ptr'}"
    return Family(name, TileShape(block_m, block_n), run)
