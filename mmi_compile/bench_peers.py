"""Whom ``mmi bench`` compares with, and our own kernels in the same form: something to run on q, k, v and a plan."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmi_compile.bench_blocks import NotFeasible, block_lists, flex_block_mask
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.plan import Plan

MOST_BLOCKS = 4.0
"""A peer that would compute this many times our tiles for the same mask is no comparison, and is left out."""


@dataclass(frozen=True)
class Call:
    """One attention to be measured: ``q [B, HQ, N, D]``, ``k, v [B, HKV, N, D]`` and, for sparse peers, our plan."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    plan: Plan | None = None


@dataclass(frozen=True)
class Peer:
    """Another implementation.

    Attributes:
        name: for tables. sparse: whether it follows a plan; else it is dense and causal.
        prepare: from a call to what is timed, which returns ``[B, HQ, N, D]``. Raises NotFeasible with the reason.
    """

    name: str
    sparse: bool
    prepare: Callable[[Call], Callable[[], Tensor]]


@dataclass(frozen=True)
class Family:
    """One of our kernel families: the tiles its plans have, and ``run(q, k, v, plan, scale, out)``."""

    name: str
    tiles: TileShape
    run: Callable[[Tensor, Tensor, Tensor, Plan, float, Tensor], Tensor]


def kernel_families(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[Family]:
    """Our kernels for this device, best first.

    Raises:
        ValueError: there is none.
    """
    if device.type == "cpu":
        from mmi_compile.kernels.cpu import attention_cpu
        from mmi_compile.kernels.dispatch import tiles_for

        return [Family("cpu", tiles_for(device, dtype, head_dim), attention_cpu)]
    from mmi_compile.kernels.run import families, family_tiles, run_plan

    def bound(name: Literal["hopper", "portable"]) -> Family:
        def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, out: Tensor) -> Tensor:
            return run_plan(q, k, v, plan, scale, family=name, out=out)

        return Family(name, family_tiles(name, device, dtype, head_dim), run)

    return [bound(name) for name in families(device, dtype, head_dim)]


def _sdpa(backend: SDPBackend | None) -> Callable[[Call], Callable[[], Tensor]]:
    def prepare(call: Call) -> Callable[[], Tensor]:
        def run() -> Tensor:
            grouped = call.q.shape[1] != call.k.shape[1]
            return F.scaled_dot_product_attention(
                call.q, call.k, call.v, is_causal=True, scale=call.scale, enable_gqa=grouped
            )

        def chosen() -> Tensor:
            assert backend is not None
            with sdpa_kernel(backend):
                return run()

        return run if backend is None else chosen

    return prepare


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    return compiled


def _flex(call: Call) -> Callable[[], Tensor]:
    assert call.plan is not None
    if call.q.device.type != "cuda":
        raise NotFeasible("compared on GPUs only: without compilation it builds all N x N scores")
    mask = flex_block_mask(call.plan, most=MOST_BLOCKS)
    flex = _compiled_flex()
    return lambda: flex(call.q, call.k, call.v, block_mask=mask, scale=call.scale, enable_gqa=True)


def _flash4_reason() -> str:
    """Why flash-attn-4 cannot be used here, or ""."""
    try:
        importlib.import_module("flash_attn.cute.interface")
    except Exception as error:  # a package that compiles at import may fail in any way
        return f"not importable ({type(error).__name__}: {str(error).partition(chr(10))[0][:80]})"
    return ""


def _flash4(call: Call, **sparse: Any) -> Callable[[], Tensor]:
    reason = _flash4_reason()
    if reason:
        raise NotFeasible(reason)
    function: Any = importlib.import_module("flash_attn.cute.interface").flash_attn_func
    q, k, v = (t.transpose(1, 2) for t in (call.q, call.k, call.v))

    def run() -> Tensor:
        result = function(q, k, v, softmax_scale=call.scale, **(sparse or {"causal": True}))
        out: Tensor = result[0] if isinstance(result, tuple) else result
        return out.transpose(1, 2)

    return run


def _flash4_sparse(call: Call) -> Callable[[], Tensor]:
    assert call.plan is not None
    reason = _flash4_reason()
    if reason:
        raise NotFeasible(reason)
    lists = block_lists(call.plan, most=MOST_BLOCKS)
    if lists.has_columns:
        raise NotFeasible("its mask would have to be written in its own language for every column")
    from mmi_compile.bench_flash4 import causal_mask_mod

    sparsity: Any = importlib.import_module("flash_attn.cute.block_sparsity")
    tensors = sparsity.BlockSparseTensorsTorch(
        mask_block_cnt=lists.partial_count,
        mask_block_idx=lists.partial_blocks,
        full_block_cnt=lists.full_count,
        full_block_idx=lists.full_blocks,
        block_size=(call.plan.block_m, call.plan.block_n),
    )
    # Packing heads into one tile would need lists that are equal for all of a group.
    return _flash4(call, mask_mod=causal_mask_mod(), block_sparse_tensors=tensors, pack_gqa=False)


PEERS = {
    "sdpa": Peer("PyTorch SDPA", False, _sdpa(None)),
    "cudnn": Peer("cuDNN", False, _sdpa(SDPBackend.CUDNN_ATTENTION)),
    "fa2": Peer("FlashAttention-2", False, _sdpa(SDPBackend.FLASH_ATTENTION)),
    "fa4": Peer("flash-attn-4", False, _flash4),
    "flex": Peer("FlexAttention", True, _flex),
    "fa4_sparse": Peer("flash-attn-4 sparse", True, _flash4_sparse),
}
"""All peers by the name that ``--peers`` takes."""


def peers_for(device: torch.device, dtype: str) -> tuple[str, ...]:
    """The peers that a device can have for a dtype (``"bf16"``), the dense one to compare with first."""
    if device.type == "cpu" or dtype == "fp32":
        return ("sdpa", "flex")
    return ("cudnn", "fa2", "fa4", "flex", "fa4_sparse")
