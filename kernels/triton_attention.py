"""Runs a plan on a GPU: picks the kernel, prepares its arguments without waiting for the device, and launches it.

Triton is imported when a kernel is first launched or compiled, never when this module is imported.
"""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.plan import Plan
from mmi_compile.kernels.render import kernel_module
from mmi_compile.kernels.spec import (
    Features,
    KernelSpec,
    canonical_arch,
    choose_spec,
    supported,
)

_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_LOG2_E = 1.0 / math.log(2.0)
_INTERPRETER_ARCH = "sm_80"  # pointers only; any table would do


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
    """Why the generated kernels cannot run on these tensors, or None when they can. Never waits for the device."""
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
    has_blocks, has_columns = plan.block_indices.shape[-1] > 0, plan.columns.shape[-1] > 0
    return Features(
        has_blocks=has_blocks,
        has_columns=has_columns,
        has_block_bits=has_blocks and has_columns and plan.block_bits is not None,
        has_row_order=plan.row_order is not None,
        # With fewer keys than positions a block left of the window may end beyond the last key.
        has_bounds=g.kv_start is not None or g.kv_stop is not None or g.kv_len < g.q_len + g.q_offset,
        has_key_padding=g.key_padding is not None,
        has_window=g.window > 0,
    )


def attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    scale: float,
    *,
    spec: KernelSpec | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Softmax attention over exactly ``plan.to_mask()``; rows that see no key are zero. Never waits for the device.

    Args:
        q: ``[B, HQ, Q, D]``, bf16, fp16 or fp32, any strides. A last dimension that is not contiguous, or rows that
            do not start at multiples of 8 elements, cost one copy; the transposed view of ``[B, Q, HQ, D]`` does not.
        k, v: ``[B, HKV, KV, D]``, likewise.
        plan: which keys each query tile visits; its tensors are on the device of q.
        scale: factor of the scores before the softmax, finite, usually ``D ** -0.5``.
        spec: the kernel to run; None takes the best known for the device. Its tiles must be those of the plan.
        out: ``[B, HQ, Q, D]`` to write to, rows at multiples of 8 elements; None allocates in the memory layout of q.

    Returns:
        ``[B, HQ, Q, D]`` in the dtype of q.

    Raises:
        ValueError: shapes, dtypes, plan and spec do not fit together, or there is no kernel for them.
    """
    _check(q, k, v, plan, scale, out)
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    if scale < 0:
        q, scale = -q, -scale
    if spec is None:
        spec = choose_spec(
            device_arch(q.device),
            dtype_name(q.dtype),
            q.shape[-1],
            features=plan_features(plan),
            block_m=plan.block_m,
            block_n=plan.block_n,
            descriptors=None if _describable(k) and _describable(v) else False,
        )
    else:
        _check_spec(spec, q, k, v, plan)
    if out is None:
        out = torch.empty_like(q)
    if q.numel() == 0:
        return out
    module = kernel_module(spec)
    arguments = _arguments(q, k, v, out, plan, scale, spec, module)
    names = module.attention.arg_names
    g = plan.geometry
    with _on_device(q):
        module.attention[(plan.query_tiles, g.batch * g.q_heads)](
            **{name: arguments[name] for name in names}, num_warps=spec.num_warps, num_stages=spec.num_stages
        )
    return out


def compile_ahead(spec: KernelSpec, arch: str) -> dict[str, Any]:
    """Compile the kernels of ``spec`` for ``arch`` on any machine, with or without a GPU.

    Returns:
        Triton's compiled kernel by function name; ``metadata.shared`` is the shared memory it uses, in bytes.

    Raises:
        ValueError: the architecture is unknown.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    known = canonical_arch(arch)
    if known is None:
        raise ValueError(supported(spec.dtype, spec.head_dim, arch=arch))
    target = GPUTarget("hip", known, 64) if known.startswith("gfx") else GPUTarget("cuda", int(known[3:]), 32)
    module, compiled = kernel_module(spec), {}
    for name in ("attention", "compact_columns"):
        kernel = getattr(module, name, None)
        if kernel is None:
            continue
        signature = {argument: _signature(argument, spec) for argument in kernel.arg_names}
        # torch allocates at multiples of 512 bytes; a view may start at any row, which _aligned keeps at 16.
        pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
        source = ASTSource(kernel, signature, {}, {(i,): [["tt.divisibility", 16]] for i in pointers})
        options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
        compiled[name] = triton.compile(source, target=target, options=options)
    return compiled


_INT32_POINTERS = frozenset(
    {"window_start", "num_blocks", "block_indices", "num_columns", "columns"}
    | {"block_bits", "row_order", "kv_start", "kv_stop"}
)
_ELEMENT_POINTERS = frozenset({"q", "k", "v", "out", "k_columns", "v_columns"})


def _signature(argument: str, spec: KernelSpec) -> str:
    if argument in _ELEMENT_POINTERS:
        return f"*{spec.dtype}"
    if argument in _INT32_POINTERS:
        return "*i32"
    if argument == "key_padding":
        return "*u8"
    if argument == "scale":
        return "fp32"
    if argument.endswith("_desc"):
        leading = "1, " if "column" in argument else "1, 1, "
        return f"tensordesc<{spec.dtype}[{leading}{spec.block_n}, {spec.block_d}]>"
    return "i64" if argument.startswith("stride_") else "i32"


def _check(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, out: Tensor | None) -> None:
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
    if (g.q_heads % g.kv_heads) or g.kv_len > g.q_len + g.q_offset or g.kv_len < 1:
        raise ValueError(f"not a valid geometry: {g}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    _check_plan(plan)
    if plan.window_start.device != q.device:
        raise ValueError(f"the plan is on {plan.window_start.device}, q on {q.device}")
    if out is not None and (out.shape != q.shape or out.dtype != q.dtype or out.device != q.device):
        raise ValueError(f"out must have the shape, dtype and device of q, {tuple(q.shape)}, {q.dtype}, {q.device}")
    if out is not None and not _rows_aligned(out):
        raise ValueError(f"out needs a contiguous last dimension and strides that are multiples of 8: {out.stride()}")
    reason = why_not(q, k, v)
    if reason is not None:
        raise ValueError(reason)


def _check_plan(plan: Plan) -> None:
    """Shapes only, but all of them: a kernel reads beyond a tensor that is too short without noticing."""
    g, tiles = plan.geometry, plan.window_start.shape[-1]
    head = (g.batch, g.q_heads)
    wanted = {
        "window_start": (*head, tiles),
        "num_blocks": (*head, tiles),
        "block_indices": (*head, tiles, plan.block_indices.shape[-1]),
        "num_columns": (*head, tiles),
        "columns": (*head, plan.columns.shape[-1]),
        "row_order": (*head, tiles * plan.block_m),
        "block_bits": (*head, tiles, -(-plan.key_blocks // 32)),
    }
    for name, shape in wanted.items():
        tensor = getattr(plan, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"plan.{name} is {tuple(tensor.shape)}, must be {shape}")
    if tiles * plan.block_m < g.q_len:
        raise ValueError(f"{tiles} tiles of {plan.block_m} rows do not hold {g.q_len} query rows")
    for name, shape in {"kv_start": (g.batch,), "kv_stop": (g.batch,), "key_padding": (g.batch, g.kv_len)}.items():
        tensor = getattr(g, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"geometry.{name} is {tuple(tensor.shape)}, must be {shape}")


def _check_spec(spec: KernelSpec, q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> None:
    if (spec.head_dim, spec.dtype) != (q.shape[-1], dtype_name(q.dtype)):
        raise ValueError(f"spec is for head dim {spec.head_dim} in {spec.dtype}, q is {tuple(q.shape)} in {q.dtype}")
    if (spec.block_m, spec.block_n) != (plan.block_m, plan.block_n):
        raise ValueError(
            f"spec has {spec.block_m} x {spec.block_n} tiles, the plan {plan.block_m} x {plan.block_n}; "
            "pass block_m and block_n of the plan to choose_spec"
        )
    if replace(spec.features, use_descriptors=False) != plan_features(plan):
        raise ValueError(f"spec has {spec.features}, the plan needs {plan_features(plan)}")
    if spec.use_descriptors and not (_describable(k) and _describable(v)):
        raise ValueError("use_descriptors needs k and v at 16-byte aligned addresses with positive strides")


def _rows_aligned(t: Tensor) -> bool:
    """Last dimension contiguous, and every row at a multiple of 8 elements from the first one."""
    return t.stride(-1) == 1 and all(s % 8 == 0 for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True) if n > 1)


def _aligned(t: Tensor) -> Tensor:
    # The kernel multiplies a row stride by less than 256 rows in 32 bits.
    if _rows_aligned(t) and t.stride(-2) < 2**22:
        return t
    return t.contiguous()


def _describable(t: Tensor) -> bool:
    return t.data_ptr() % 16 == 0 and all(s > 0 for n, s in zip(t.shape, t.stride(), strict=True) if n > 1)


def _row_strides(t: Tensor) -> list[int]:
    """Strides of the first three dimensions in groups of 8 elements; 0 where a dimension has a single entry."""
    return [s // 8 if n > 1 else 0 for n, s in zip(t.shape[:3], t.stride()[:3], strict=True)]


def _bounds(g: Geometry, device: torch.device) -> tuple[Tensor, Tensor]:
    start = g.kv_start if g.kv_start is not None else torch.zeros(g.batch, dtype=torch.int32, device=device)
    stop = g.kv_stop if g.kv_stop is not None else torch.full((g.batch,), g.kv_len, dtype=torch.int32, device=device)
    return _int32(start), _int32(stop)


def _int32(t: Tensor) -> Tensor:
    return t.to(torch.int32).contiguous()


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, plan: Plan, scale: float, spec: KernelSpec, module: ModuleType
) -> dict[str, Any]:
    """Every argument that some spec's kernel may take, by name."""
    g = plan.geometry
    arguments: dict[str, Any] = {
        "q": q, "k": k, "v": v, "out": out,
        "window_start": _int32(plan.window_start),
        "q_heads": g.q_heads, "group": g.group,
        "q_len": g.q_len, "kv_len": g.kv_len, "q_offset": g.q_offset, "window": g.window,
        # -inf * 0 would be NaN in masked pairs, and scores this small are all equal in fp32.
        "scale": max(scale * _LOG2_E, 1e-30),
    }  # fmt: skip
    for letter, tensor in {"q": q, "k": k, "v": v, "o": out}.items():
        row = "m" if letter in "qo" else "n"
        arguments |= {f"stride_{letter}{axis}": s for axis, s in zip(f"bh{row}", _row_strides(tensor), strict=True)}
    if spec.has_blocks:
        arguments |= {
            "num_blocks": _int32(plan.num_blocks),
            "block_indices": _int32(plan.block_indices),
            "max_blocks": plan.block_indices.shape[-1],
        }
    if spec.has_block_bits:
        assert plan.block_bits is not None
        arguments |= {"block_bits": _int32(plan.block_bits), "bit_words": plan.block_bits.shape[-1]}
    if spec.has_row_order:
        assert plan.row_order is not None
        arguments["row_order"] = _int32(plan.row_order)
    if spec.has_bounds:
        arguments["kv_start"], arguments["kv_stop"] = _bounds(g, q.device)
    if spec.has_key_padding:
        assert g.key_padding is not None
        arguments["key_padding"] = g.key_padding.contiguous().view(torch.uint8)
    if spec.has_columns:
        arguments |= {
            "num_columns": _int32(plan.num_columns),
            "columns": _int32(plan.columns),
            "max_columns": plan.columns.shape[-1],
        }
        arguments["k_columns"], arguments["v_columns"] = _compact(arguments, g, spec, module)
    if spec.use_descriptors:
        arguments |= _descriptors(arguments, spec)
    return arguments


def _compact(arguments: dict[str, Any], g: Geometry, spec: KernelSpec, module: ModuleType) -> tuple[Tensor, Tensor]:
    """The K and V rows of each head's columns, ``[B, HQ, MAX_COLUMNS, D]`` each, in one launch."""
    k: Tensor = arguments["k"]
    shape = (g.batch, g.q_heads, arguments["max_columns"], spec.head_dim)
    buffers = torch.empty((2, *shape), dtype=k.dtype, device=k.device)
    given = arguments | {"k_columns": buffers[0], "v_columns": buffers[1]}
    grid = (-(-shape[2] // spec.block_n), g.batch * g.q_heads)
    with _on_device(k):
        module.compact_columns[grid](**{name: given[name] for name in module.compact_columns.arg_names})
    return buffers[0], buffers[1]


def _descriptors(arguments: dict[str, Any], spec: KernelSpec) -> dict[str, Any]:
    from triton.tools.tensor_descriptor import TensorDescriptor

    tile = [spec.block_n, spec.block_d]
    made = {}
    for name in ("k", "v"):
        t: Tensor = arguments[name]
        made[f"{name}_desc"] = TensorDescriptor(t, list(t.shape), _descriptor_strides(t), [1, 1, *tile])
        if spec.has_columns:
            columns: Tensor = arguments[f"{name}_columns"].flatten(0, 1)
            made[f"{name}_column_desc"] = TensorDescriptor(
                columns, list(columns.shape), list(columns.stride()), [1, *tile]
            )
    return made


def _descriptor_strides(t: Tensor) -> list[int]:
    # PyTorch leaves the stride of a dimension of one entry arbitrary; a descriptor wants it aligned all the same.
    return [s if n > 1 else 8 for n, s in zip(t.shape[:3], t.stride()[:3], strict=True)] + [1]


def _on_device(t: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the one that holds the tensors."""
    return torch.cuda.device(t.device) if t.device.type == "cuda" else nullcontext()
