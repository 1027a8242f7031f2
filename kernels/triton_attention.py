"""Runs a plan on a GPU: picks the kernel, prepares its arguments without waiting for the device, and launches it.

Triton is imported when a kernel is first launched or compiled, never when this module is imported.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmi_compile.kernels.launch import (
    COMPACT_ROWS,
    aligned,
    check_call,
    compact_columns,
    compile_kernel_ahead,
    describable,
    descriptor_strides,
    device_arch,
    dtype_name,
    group_keys,
    int32,
    on_device,
    plan_arguments,
    plan_features,
    row_strides,
)
from mmi_compile.kernels.plan import Plan
from mmi_compile.kernels.render import kernel_module
from mmi_compile.kernels.spec import KernelSpec, canonical_arch, choose_spec, supported


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
    check_call(q, k, v, plan, scale, out)
    q, k, v = aligned(q), aligned(k), aligned(v)
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
            descriptors=None if describable(k) and describable(v) else False,
        )
    else:
        _check_spec(spec, q, k, v, plan)
    if out is None:
        out = torch.empty_like(q)
    if q.numel() == 0:
        return out
    kernel = kernel_module(spec).attention
    arguments = _arguments(q, k, v, out, plan, scale, spec)
    g = plan.geometry
    with on_device(q):
        kernel[(plan.query_tiles, g.batch * g.q_heads)](
            **{name: arguments[name] for name in kernel.arg_names}, num_warps=spec.num_warps, num_stages=spec.num_stages
        )
    return out


def compile_ahead(spec: KernelSpec, arch: str) -> dict[str, Any]:
    """Compile the kernels of ``spec`` for ``arch`` on any machine, with or without a GPU.

    Returns:
        Triton's compiled kernel by function name; ``metadata.shared`` is the shared memory it uses, in bytes.

    Raises:
        ValueError: the architecture is unknown.
    """
    known = canonical_arch(arch)
    if known is None:
        raise ValueError(supported(spec.dtype, spec.head_dim, arch=arch))
    constants = {"HEAD_DIM": spec.head_dim, "BLOCK_D": spec.block_d, "BLOCK_N": COMPACT_ROWS}
    kernels = {"attention": kernel_module(spec).attention}
    if spec.has_columns or spec.has_key_order:
        from mmi_compile.kernels.compact_kernels import compact_columns as compact

        kernels["compact_columns"] = compact
    launched = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    return {
        name: compile_kernel_ahead(
            kernel,
            known,
            constants,
            lambda argument: _signature(argument, spec),
            launched if name == "attention" else {},
        )
        for name, kernel in kernels.items()
    }


_INT32_POINTERS = frozenset(
    {"tiles", "lists", "columns", "column_slots", "list_bits", "key_positions", "row_order"}
    | {"kv_start", "kv_stop", "key_padding", "row_start", "row_stop"}
)
_ELEMENT_POINTERS = frozenset({"q", "k", "v", "out", "k_columns", "v_columns", "k_groups", "v_groups"})


def _signature(argument: str, spec: KernelSpec) -> str:
    if argument in _ELEMENT_POINTERS:
        return f"*{spec.dtype}"
    if argument in _INT32_POINTERS:
        return "*i32"
    if argument == "scale":
        return "fp32"
    if argument.endswith("_desc"):
        leading = "1, " if "column" in argument else "1, 1, "
        return f"tensordesc<{spec.dtype}[{leading}{spec.block_n}, {spec.block_d}]>"
    return "i64" if argument.startswith("stride_") else "i32"


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
    if spec.use_descriptors and not (describable(k) and describable(v)):
        raise ValueError("use_descriptors needs k and v at 16-byte aligned addresses with positive strides")


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, plan: Plan, scale: float, spec: KernelSpec
) -> dict[str, Any]:
    """Every argument that some spec's kernel may take, by name."""
    arguments = plan_arguments(plan, scale, spec) | {"q": q, "k": k, "v": v, "out": out}
    for letter, tensor in {"q": q, "k": k, "v": v, "o": out}.items():
        row = "m" if letter in "qo" else "n"
        arguments |= {f"stride_{letter}{axis}": s for axis, s in zip(f"bh{row}", row_strides(tensor), strict=True)}
    if plan.geometry.key_padding is not None:
        # Not bytes: from their width Triton would infer slower tensor core operands for all that they mask.
        arguments["key_padding"] = int32(plan.geometry.key_padding)
    if spec.has_columns:
        arguments["k_columns"], arguments["v_columns"] = compact_columns(k, v, plan)
    if plan.key_order is not None:
        arguments["k_groups"], arguments["v_groups"] = group_keys(k, v, plan.key_order)
    if spec.use_descriptors:
        arguments |= _descriptors(arguments, spec)
    return arguments


def _descriptors(arguments: dict[str, Any], spec: KernelSpec) -> dict[str, Any]:
    from triton.tools.tensor_descriptor import TensorDescriptor

    tile = [spec.block_n, spec.block_d]
    made = {}
    for name in ("k", "v"):
        t: Tensor = arguments[name]
        made[f"{name}_desc"] = TensorDescriptor(t, list(t.shape), descriptor_strides(t), [1, 1, *tile])
        if spec.has_columns:
            t = arguments[f"{name}_columns"].flatten(0, 1)
            made[f"{name}_column_desc"] = TensorDescriptor(t, list(t.shape), list(t.stride()), [1, *tile])
        if spec.has_key_order:
            t = arguments[f"{name}_groups"]
            made[f"{name}_group_desc"] = TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, *tile])
    return made
