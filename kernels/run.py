"""Which family of generated kernels runs a plan on a GPU, and the tiles that its plans must have.

``hopper``: warp-specialised Gluon, for compute capability 9.0. ``portable``: plain Triton, everywhere else.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.hopper import attention_hopper
from mmi_compile.kernels.hopper_spec import BLOCK_M, hopper_block_n, hopper_supported
from mmi_compile.kernels.launch import device_arch, dtype_name
from mmi_compile.kernels.own_tiles import own_tiles
from mmi_compile.kernels.plan import Plan
from mmi_compile.kernels.spec import choose_spec, supported
from mmi_compile.kernels.triton_attention import attention_triton

Family: TypeAlias = Literal["hopper", "portable"]


def families(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Family, ...]:
    """The families that serve this device, dtype and head dim, fastest first; empty when there is none."""
    known = _families(device, dtype, head_dim)
    return known if own_tiles() is None else known[-1:]  # only the portable kernels take any tiles


@lru_cache(maxsize=256)
def _families(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Family, ...]:
    arch, name = device_arch(device), dtype_name(dtype)
    if supported(name, head_dim, arch=arch) is not None:
        return ()
    hopper = arch == "sm_90" and hopper_supported(name, head_dim) is None
    return ("hopper", "portable") if hopper else ("portable",)


def family_tiles(family: Family, device: torch.device, dtype: torch.dtype, head_dim: int) -> TileShape:
    """Query rows and keys per tile of the plans that ``family`` runs.

    Raises:
        ValueError: no kernel can be built; the message says why.
    """
    if family == "hopper":
        return TileShape(BLOCK_M, hopper_block_n(head_dim))
    asked = own_tiles()
    if asked is not None:
        return asked
    spec = choose_spec(device_arch(device), dtype_name(dtype), head_dim)
    return TileShape(spec.block_m, spec.block_n)


def run_plan(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, *, family: Family | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Softmax attention over exactly ``plan.to_mask()``; arguments and errors are those of ``attention_triton``.

    Args:
        family: the kernels to use; None takes the fastest that has the tiles of the plan.
    """
    if family is None:
        tiles = TileShape(plan.block_m, plan.block_n)
        known = families(q.device, q.dtype, q.shape[-1])
        fitting = [f for f in known if family_tiles(f, q.device, q.dtype, q.shape[-1]) == tiles]
        family = fitting[0] if fitting and not plan.geometry.has_rows else "portable"
    run = attention_hopper if family == "hopper" else attention_triton
    return run(q, k, v, plan, scale, out=out)
