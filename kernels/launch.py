"""What every family of generated kernels shares: checks of a call, strides, and small arguments.

Nothing here waits for the device. Triton is imported when a kernel is first launched, never with this module.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.plan import RECORD, Plan
from mmi_compile.kernels.spec import Features, padded_head_dim, supported

_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
LOG2_E = 1.0 / math.log(2.0)
HIDDEN = 2**31 - 1
"""A key position that no row reaches."""
_INTERPRETER_ARCH = "sm_80"  # pointers only; any table would do
COMPACT_ROWS = 64
"""Columns that one program of ``compact_columns`` copies."""


def dtype_name(dtype: torch.dtype) -> str:
    """The word that specs use for ``dtype`` (``"bf16"``); dtypes without a kernel keep PyTorch's name."""
    return _DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def device_arch(device: torch.device) -> str:
    """The architecture name of a device, for example ``"sm_90"`` or ``"gfx942"``; ``"cpu"`` has no kernel."""
    if device.type != "cuda":
        return _INTERPRETER_ARCH if device.type == "cpu" and interpreting() else device.type
    return _cuda_arch(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=64)
def _cuda_arch(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU (``TRITON_INTERPRET=1``, set before Triton is first imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why no generated kernel can run on these tensors, or None when one can. Never waits for the device."""
    if not (q.device == k.device == v.device):
        return f"q, k, v are on different devices ({q.device}, {k.device}, {v.device})"
    if not (q.dtype == k.dtype == v.dtype):
        return f"q, k, v have different dtypes ({q.dtype}, {k.dtype}, {v.dtype})"
    if q.device.type == "cpu" and interpreting() and q.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bf16 matrices as if their bits were integers; use fp16 or fp32 there"
    return supported(dtype_name(q.dtype), q.shape[-1], v.shape[-1], device_arch(q.device))


def plan_features(plan: Plan) -> Features:
    """The loops and masks that ``plan`` needs, read from shapes and from what is None: no value is looked at."""
    g = plan.geometry
    has_blocks, has_columns = plan.lists.numel() > 0, plan.columns.shape[-1] > 0
    return Features(
        has_sinks=plan.has_sinks,
        has_blocks=has_blocks,
        has_columns=has_columns,
        has_block_bits=has_blocks and has_columns and plan.list_bits is not None,
        has_row_order=plan.row_order is not None,
        # With fewer keys than positions a block left of the window may end beyond the last key.
        has_bounds=g.kv_start is not None or g.kv_stop is not None or g.kv_len < g.q_len + g.q_offset,
        has_key_padding=g.key_padding is not None,
        has_window=g.window > 0,
        has_row_bounds=g.has_rows,
        has_regions=plan.regions > 1,
        has_key_order=plan.key_order is not None,
    )


def check_call(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, out: Tensor | None) -> None:
    """Raise ValueError unless shapes, dtypes, devices, plan and scale fit together."""
    g = plan.geometry
    if k.dim() != 4 or k.shape[:3] != (g.batch, g.kv_heads, g.kv_len) or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must be [B, HKV, KV, D] = "
            f"[{g.batch}, {g.kv_heads}, {g.kv_len}, D]"
        )
    if q.dim() != 4 or q.shape[:3] != (g.batch, g.q_heads, g.q_len) or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)} must be [B, HQ, Q, D] = [{g.batch}, {g.q_heads}, {g.q_len}, {k.shape[3]}]"
        )
    if g.batch * g.q_heads > 65535:
        raise ValueError(f"{g.batch} x {g.q_heads} batch elements x heads: a launch grid holds at most 65535")
    if (g.q_heads % g.kv_heads) or (g.kv_len > g.q_len + g.q_offset and not g.has_rows) or g.kv_len < 1:
        raise ValueError(f"not a valid geometry: {g}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    _check_plan(plan)
    if plan.tiles.device != q.device:
        raise ValueError(f"the plan is on {plan.tiles.device}, q on {q.device}")
    if out is not None and (out.shape != q.shape or out.dtype != q.dtype or out.device != q.device):
        raise ValueError(f"out must have the shape, dtype and device of q, {tuple(q.shape)}, {q.dtype}, {q.device}")
    if out is not None and not rows_aligned(out):
        raise ValueError(f"out needs a contiguous last dimension and strides that are multiples of 8: {out.stride()}")
    reason = why_not(q, k, v)
    if reason is not None:
        raise ValueError(reason)


def _check_plan(plan: Plan) -> None:
    """Shapes and dtypes only, but all of them: a kernel reads beyond a tensor that is too short without noticing."""
    g, tiles = plan.geometry, plan.query_tiles
    head = (g.batch, g.q_heads)
    if plan.key_order is not None and plan.list_bits is not None and plan.column_slots is None:
        raise ValueError("a plan with grouped keys, columns and block lists needs column_slots")
    wanted: dict[str, tuple[int, ...]] = {
        "tiles": (*head, tiles, plan.tiles.shape[3] if plan.tiles.dim() == 5 else 1, RECORD),
        "columns": (*head, plan.columns.shape[-1]),
        "column_slots": (*head, plan.columns.shape[-1]),
        "row_order": (*head, tiles * plan.block_m),
        "key_order": (g.batch, 0 if plan.key_order is None else plan.key_order.shape[-1]),
    }
    for name, shape in wanted.items():
        tensor = getattr(plan, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"plan.{name} is {tuple(tensor.shape)}, must be {shape}")
    for name in ("tiles", "lists", "columns", "row_order", "list_bits", "key_order", "column_slots"):
        tensor = getattr(plan, name)
        if tensor is not None and name in ("lists", "list_bits") and tensor.dim() != 1:
            raise ValueError(f"plan.{name} is {tuple(tensor.shape)}, must be one flat row")
        if tensor is not None and (tensor.dtype != torch.int32 or not tensor.is_contiguous()):
            raise ValueError(f"plan.{name} must be a contiguous int32 tensor, is {tensor.dtype} {tensor.stride()}")
    if tiles * plan.block_m < g.q_len:
        raise ValueError(f"{tiles} tiles of {plan.block_m} rows do not hold {g.q_len} query rows")
    sizes: dict[str, tuple[int, ...]] = {
        "kv_start": (g.batch,),
        "kv_stop": (g.batch,),
        "key_padding": (g.batch, g.kv_len),
    }
    sizes |= {"row_start": (g.batch, g.q_len), "row_stop": (g.batch, g.q_len)}
    for name, shape in sizes.items():
        tensor = getattr(g, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"geometry.{name} is {tuple(tensor.shape)}, must be {shape}")


def rows_aligned(t: Tensor) -> bool:
    """Last dimension contiguous, and every row at a multiple of 8 elements from the first one."""
    return t.stride(-1) == 1 and all(s % 8 == 0 for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True) if n > 1)


def aligned(t: Tensor) -> Tensor:
    """``t``, or a copy of it whose rows kernels can read in groups of 8 elements."""
    # Kernels multiply a row stride by less than 256 rows in 32 bits.
    if rows_aligned(t) and t.stride(-2) < 2**22:
        return t
    return t.contiguous()


def describable(t: Tensor) -> bool:
    """Whether a tensor descriptor can be made of ``t``: a 16-byte aligned address and positive strides."""
    return t.data_ptr() % 16 == 0 and all(s > 0 for n, s in zip(t.shape, t.stride(), strict=True) if n > 1)


def row_strides(t: Tensor) -> list[int]:
    """Strides of the first three dimensions in groups of 8 elements; 0 where a dimension has a single entry."""
    return [s // 8 if n > 1 else 0 for n, s in zip(t.shape[:3], t.stride()[:3], strict=True)]


def bounds(g: Geometry, device: torch.device) -> tuple[Tensor, Tensor]:
    """First live key and one past the last, int32 ``[B]`` each, also where the geometry gives none."""
    start = g.kv_start if g.kv_start is not None else torch.zeros(g.batch, dtype=torch.int32, device=device)
    stop = g.kv_stop if g.kv_stop is not None else torch.full((g.batch,), g.kv_len, dtype=torch.int32, device=device)
    return int32(start), int32(stop)


def int32(t: Tensor) -> Tensor:
    """``t`` as contiguous int32."""
    return t.to(torch.int32).contiguous()


def plan_arguments(plan: Plan, scale: float, features: Features) -> dict[str, Any]:
    """What the kernels of every family read of a plan, by name; None where the plan has no such part."""
    g = plan.geometry
    arguments: dict[str, Any] = {
        "tiles": plan.tiles, "lists": plan.lists, "columns": plan.columns, "column_slots": plan.column_slots,
        "list_bits": plan.list_bits, "row_order": plan.row_order, "max_columns": plan.columns.shape[-1],
        "q_heads": g.q_heads, "group": g.group, "q_len": g.q_len, "kv_len": g.kv_len, "q_offset": g.q_offset,
        "window": g.window, "regions": plan.regions,
        # -inf * 0 would be NaN in masked pairs, and scores this small are all equal in fp32.
        "scale": max(scale * LOG2_E, 1e-30),
    }  # fmt: skip
    if features.has_bounds:
        arguments["kv_start"], arguments["kv_stop"] = bounds(g, plan.tiles.device)
    if g.row_start is not None and g.row_stop is not None:
        arguments["row_start"], arguments["row_stop"] = int32(g.row_start), int32(g.row_stop)
    if plan.key_order is not None:
        arguments["key_positions"] = torch.where(plan.key_order < 0, HIDDEN, plan.key_order)
        arguments["slots"] = plan.key_order.shape[-1]
    return arguments


def descriptor_strides(t: Tensor) -> list[int]:
    """Strides of a ``[B, H, N, D]`` tensor for a tensor descriptor."""
    # PyTorch leaves the stride of a dimension of one entry arbitrary; a descriptor wants it aligned all the same.
    return [s if n > 1 else 8 for n, s in zip(t.shape[:3], t.stride()[:3], strict=True)] + [1]


def compact_columns(k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """The K and V rows of each head's columns, ``[B, HQ, MAX_COLUMNS, D]`` each, in one launch."""
    return _gathered(k, v, plan.columns, plan.geometry.group)


def group_keys(k: Tensor, v: Tensor, key_order: Tensor) -> tuple[Tensor, Tensor]:
    """K and V in the slots of ``key_order`` (int32 ``[B, SLOTS]``), ``[B, HKV, SLOTS, D]`` each, in one launch.

    An empty slot holds a copy of some key, which no query may see.
    """
    return _gathered(k, v, key_order[:, None].expand(-1, k.shape[1], -1).contiguous(), 1)


def _gathered(k: Tensor, v: Tensor, keys: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Rows ``keys`` (int32 ``[B, heads, COUNT]``, heads = HKV * group) of k and v: ``[B, heads, COUNT, D]`` each."""
    from mmi_compile.kernels.compact_kernels import compact_columns as kernel

    batch, heads, count = keys.shape
    dim = k.shape[-1]
    buffers = torch.empty((2, batch, heads, count, dim), dtype=k.dtype, device=k.device)
    with on_device(k):
        kernel[(-(-count // COMPACT_ROWS), batch * heads)](
            k, v, keys, buffers[0], buffers[1], *row_strides(k), *row_strides(v), heads, group, k.shape[2], count,
            HEAD_DIM=dim, BLOCK_D=padded_head_dim(dim), BLOCK_N=COMPACT_ROWS,
        )  # fmt: skip
    return buffers[0], buffers[1]


def on_device(t: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the one that holds the tensors."""
    return torch.cuda.device(t.device) if t.device.type == "cuda" else nullcontext()


def compile_kernel_ahead(
    kernel: Any, arch: str, constants: Mapping[str, Any], type_of: Callable[[str], str], options: Mapping[str, int]
) -> Any:
    """Triton's compiled form of one kernel for ``arch``, on a machine that need not have it.

    Args:
        arch: a key of ``SHARED_MEMORY``. constants: values of constexpr arguments; those the kernel has are used.
        type_of: Triton's type of any other argument. options: ``num_warps`` and ``num_stages``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    hip = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if hip else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in used else type_of(name) for name in kernel.arg_names}
    # torch allocates at multiples of 512 bytes; a view may start at any row, which `aligned` keeps at 16.
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    source = ASTSource(kernel, signature, used, {(i,): [["tt.divisibility", 16]] for i in pointers})
    return triton.compile(source, target=target, options=dict(options))
