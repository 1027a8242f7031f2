"""The warp-specialised attention kernel for Hopper GPUs: its spec, its arguments and its launch.

It runs the same plans as ``triton_attention.py`` with the same results, and is written in Gluon, the part of Triton
that gives explicit control of warps, barriers and shared memory. It takes what Hopper's tensor cores take: fp16, bf16.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.hopper_spec import (
    BLOCK_M,
    HopperSpec,
    choose_hopper_spec,
    hopper_block_n,
    hopper_supported,
)
from mmi_compile.kernels.launch import (
    aligned,
    check_call,
    compact_columns,
    describable,
    descriptor_strides,
    dtype_name,
    group_keys,
    on_device,
    plan_arguments,
    plan_features,
    row_strides,
)
from mmi_compile.kernels.plan import Plan
from mmi_compile.kernels.render import kernel_module
from mmi_compile.kernels.spec import Features

WARPS = 4
"""Warps of the first partition; the second warp group and the loading warp come on top."""


def attention_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    scale: float,
    *,
    spec: HopperSpec | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Softmax attention over exactly ``plan.to_mask()``; rows that see no key are zero. Never waits for the device.

    Args and errors are those of ``attention_triton``; the plan has tiles of ``BLOCK_M`` rows and
    ``hopper_block_n(head_dim)`` keys. Dead values (padding) are read as zeros, from a copy of v when there are any.
    """
    check_call(q, k, v, plan, scale, out)
    reason = hopper_supported(dtype_name(q.dtype), q.shape[-1], v.shape[-1])
    if reason is not None:
        raise ValueError(reason)
    if (plan.block_m, plan.block_n) != (BLOCK_M, hopper_block_n(q.shape[-1])):
        raise ValueError(
            f"the plan has {plan.block_m} x {plan.block_n} tiles, the Hopper kernel needs "
            f"{BLOCK_M} x {hopper_block_n(q.shape[-1])} for head dim {q.shape[-1]}"
        )
    g = plan.geometry
    q, k, v = _describable(q), _describable(k), _describable(_without_dead_values(v, g))
    if scale < 0:
        q, scale = -q, -scale
    features = plan_features(plan)
    if spec is None:
        spec = choose_hopper_spec(
            dtype_name(q.dtype), q.shape[-1], features=features, scheduled=features.has_row_order,
            pair_loop=_pair_loop(plan, features),
        )  # fmt: skip
    result = torch.empty_like(q) if out is None else out
    if q.numel() == 0:
        return result
    target = result if describable(result) else torch.empty_like(q)
    kernel = kernel_module(spec).attention
    arguments = _arguments(q, k, v, target, plan, scale, spec)
    programs = min(_multiprocessors(q.device), plan.query_tiles * g.batch * g.q_heads)
    with on_device(q):
        kernel[(programs,)](**{name: arguments[name] for name in kernel.arg_names}, num_warps=WARPS)
    return result if target is result else result.copy_(target)


def _pair_loop(plan: Plan, f: Features) -> bool:
    """False where causality cuts one key tile of every query tile, the first, and nothing else needs such a test."""
    cut = f.has_bounds or f.has_key_padding or f.has_window or f.has_row_order or f.has_regions or f.has_key_order
    return cut or plan.block_m != plan.block_n or plan.geometry.q_offset % plan.block_n != 0


def _describable(t: Tensor) -> Tensor:
    t = aligned(t)
    return t if describable(t) else t.clone(memory_format=torch.contiguous_format)


def _without_dead_values(v: Tensor, g: Geometry) -> Tensor:
    """Zeros where no query may look: a tile is loaded whole, and 0 * NaN of a dead value would reach every output."""
    live = g.live_keys(v.device)
    return v if live is None else v.masked_fill(~live[:, None, :, None], 0.0)


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, plan: Plan, scale: float, spec: HopperSpec
) -> dict[str, Any]:
    """Every argument that some spec's kernel may take, by name."""
    g = plan.geometry
    arguments = plan_arguments(plan, scale, spec) | {
        "q": q, "out": out, "heads": g.batch * g.q_heads, "query_tiles": plan.query_tiles, "beyond": plan.key_blocks,
        "counter": torch.zeros(1, dtype=torch.int32, device=q.device),
        "k_desc": _descriptor(k, spec.block_n, spec), "v_desc": _descriptor(v, spec.block_n, spec),
    }  # fmt: skip
    if spec.has_row_order:
        for letter, tensor in {"q": q, "o": out}.items():
            names = [f"stride_{letter}{axis}" for axis in "bhm"]
            arguments |= dict(zip(names, row_strides(tensor), strict=True))
    else:
        arguments |= {"q_desc": _descriptor(q, BLOCK_M // 2, spec), "o_desc": _descriptor(out, BLOCK_M // 2, spec)}
    if spec.has_key_padding:
        assert g.key_padding is not None
        arguments["key_padding"] = g.key_padding.contiguous().view(torch.uint8)
    if spec.has_columns:
        for name, tensor in zip("kv", compact_columns(k, v, plan), strict=True):
            arguments[f"{name}_column_desc"] = _descriptor(tensor, spec.block_n, spec)
    if plan.key_order is not None:
        for name, tensor in zip("kv", group_keys(k, v, plan.key_order), strict=True):
            arguments[f"{name}_group_desc"] = _descriptor(tensor, spec.block_n, spec)
    if spec.has_schedule:
        arguments["schedule"] = plan.schedule()
    return arguments


def _descriptor(t: Tensor, rows: int, spec: HopperSpec) -> Any:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(t, list(t.shape), descriptor_strides(t), [1, 1, rows, spec.block_d], _layout(rows, spec))


@lru_cache(maxsize=64)
def _layout(rows: int, spec: HopperSpec) -> Any:
    """How a tile of ``rows`` lies in shared memory."""
    import triton.experimental.gluon.language as gl

    element = {"bf16": gl.bfloat16, "fp16": gl.float16}[spec.dtype]
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, spec.block_d], element)


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def compile_hopper_ahead(spec: HopperSpec) -> Any:
    """Compile the kernel of ``spec`` for sm_90 on any machine; ``metadata.shared`` of the result is in bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel = kernel_module(spec).attention
    signature = {name: _signature(name, spec) for name in kernel.arg_names}
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    source = GluonASTSource(kernel, signature, {}, {(i,): [["tt.divisibility", 16]] for i in pointers})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})


_INT32_POINTERS = frozenset(
    {"tiles", "counter", "schedule", "lists", "list_bits", "columns", "column_slots", "key_positions"}
    | {"row_order", "kv_start", "kv_stop"}
)


def _signature(argument: str, spec: HopperSpec) -> str:
    if argument.endswith("_desc"):
        rows = BLOCK_M // 2 if argument in ("q_desc", "o_desc") else spec.block_n
        return f"tensordesc<{spec.dtype}[1, 1, {rows}, {spec.block_d}],{_layout(rows, spec)!r}>"
    if argument in ("q", "out"):
        return f"*{spec.dtype}"
    if argument in _INT32_POINTERS:
        return "*i32"
    if argument == "key_padding":
        return "*u8"
    if argument == "scale":
        return "fp32"
    return "i64" if argument.startswith("stride_") else "i32"
