"""Check and time the generated attention kernels on this machine's GPU, for several candidate tile shapes.

Run it once on a new GPU to learn which entries the tables in ``kernels/spec.py`` should have:

    python examples/bench_kernels.py            # 16 K and 128 K tokens, a few minutes
    python examples/bench_kernels.py --quick    # 16 K only, two candidates
    python examples/bench_kernels.py --json results.json

Plans are built directly here, so the planner is not involved. TFLOP/s count the pairs that the plan computes in whole
tiles, 4 * D FLOPs each. Without a GPU there is nothing to measure, and the script says so.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.plan import Plan
from mmi_compile.kernels.spec import KernelSpec, choose_spec
from mmi_compile.kernels.triton_attention import attention_triton, device_arch, plan_features

# block_m, block_n, num_warps, num_stages, descriptors
CANDIDATES = [
    (128, 128, 8, 3, True),
    (128, 128, 8, 2, True),
    (128, 64, 8, 3, True),
    (128, 64, 4, 3, True),
    (64, 64, 4, 3, True),
    (128, 128, 8, 2, False),
    (128, 64, 4, 3, False),
    (128, 64, 8, 3, False),
]
QUICK_CANDIDATES = [(128, 128, 8, 3, True), (128, 64, 4, 3, False)]
PLANS = ("dense", "a_shape", "columns", "blocks")


@dataclass(frozen=True)
class Result:
    """One line of the table; ``error`` is relative to the largest fp32 output of the checked rows."""

    tokens: int
    head_dim: int
    plan: str
    kernel: str
    milliseconds: float
    tflops: float
    error: float
    note: str = ""


def build_plan(name: str, g: Geometry, block_m: int, block_n: int, device: torch.device) -> Plan:
    """One of ``PLANS``, the same for all heads except that columns and blocks are random per head.

    dense: a window from block 0. a_shape: sink 128 and local 4096. columns: local 1024 and 4096 columns.
    blocks: local 1024 and 32 x 128 keys in listed blocks.
    """
    tiles, head = -(-g.q_len // block_m), (g.batch, g.q_heads)
    first = torch.arange(tiles, device=device, dtype=torch.int32) * block_m
    local = {"dense": g.kv_len, "a_shape": 4096, "columns": 1024, "blocks": 1024}[name]
    start = ((first - local).clamp(min=0) // block_n).expand(*head, tiles).contiguous()
    none = torch.zeros(*head, tiles, dtype=torch.int32, device=device)
    plan = Plan(
        g, block_m, block_n, start, none, torch.zeros(*head, tiles, 0, dtype=torch.int32, device=device),
        none, torch.zeros(*head, 0, dtype=torch.int32, device=device),
    )  # fmt: skip
    if name == "a_shape":
        sinks = 128 // block_n
        listed = torch.arange(sinks, device=device, dtype=torch.int32).expand(*head, tiles, sinks).contiguous()
        return replace(plan, num_blocks=start.clamp(max=sinks), block_indices=listed)
    if name == "columns":
        columns = _spread(g, 4096, device)
        count = torch.searchsorted(columns, (start * block_n).contiguous())
        return replace(plan, columns=columns, num_columns=count.int())
    if name == "blocks":
        wanted = 32 * 128 // block_n
        # Evenly spread over what is left of the window, so that the list is ascending and has no duplicates.
        step = torch.arange(wanted, device=device)
        listed = (step * start[..., None] // wanted).int()
        few = start[..., None] <= wanted
        listed = torch.where(few, step.int(), listed)
        return replace(plan, num_blocks=start.clamp(max=wanted), block_indices=listed.contiguous())
    return plan


def _spread(g: Geometry, count: int, device: torch.device) -> Tensor:
    """Sorted columns, a random one in each of at most ``count`` equal stretches: int32 ``[B, HQ, count]``."""
    count = min(count, g.kv_len // 4)
    stretch = g.kv_len // count
    offset = torch.randint(0, stretch, (g.batch, g.q_heads, count), device=device)
    return (torch.arange(count, device=device) * stretch + offset).int()


def computed_pairs(plan: Plan) -> int:
    """Pairs of all heads that the kernel computes, in whole tiles."""
    g = plan.geometry
    last = (torch.arange(1, plan.query_tiles + 1, device=plan.window_start.device) * plan.block_m).clamp(max=g.q_len)
    window = -(-last // plan.block_n) - plan.window_start
    tiles = window + plan.num_blocks + -(-plan.num_columns // plan.block_n)
    return int(tiles.sum()) * plan.block_m * plan.block_n


def rows_error(q: Tensor, k: Tensor, v: Tensor, out: Tensor, plan: Plan, rows: list[int], scale: float) -> float:
    """Largest error of ``out`` in some rows of three heads, relative to the largest fp32 output there."""
    g, device = plan.geometry, q.device
    worst = 0.0
    for h in {0, g.q_heads // 2, g.q_heads - 1}:
        keys, values = k[0, h // g.group].float(), v[0, h // g.group].float()
        for row in rows:
            keep = _row_mask(plan, h, row, device)
            scores = (keys @ q[0, h, row].float() * scale).masked_fill(~keep, float("-inf"))
            want = torch.softmax(scores, 0) @ values
            worst = max(worst, float((out[0, h, row].float() - want).abs().max() / want.abs().max()))
    return worst


def _row_mask(plan: Plan, h: int, row: int, device: torch.device) -> Tensor:
    """Keys of one row of head ``h`` of batch element 0, from the plan's definition: bool ``[KV]``."""
    t, j = row // plan.block_m, torch.arange(plan.geometry.kv_len, device=device)
    block = j // plan.block_n
    keep = block >= plan.window_start[0, h, t]
    keep |= torch.isin(block, plan.block_indices[0, h, t, : int(plan.num_blocks[0, h, t])])
    keep |= torch.isin(j, plan.columns[0, h, : int(plan.num_columns[0, h, t])])
    return keep & (j <= row)


def milliseconds(run: Callable[[], Any], repeats: int) -> float:
    """Median of ``repeats`` timed calls after two warm-up calls."""
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return float(statistics.median(times))


def random_inputs(g: Geometry, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 q, k, v as transposed views of ``[B, S, H, D]``, as models pass them."""

    def tokens(heads: int) -> Tensor:
        return torch.randn(g.batch, g.q_len, heads, head_dim, device=device, dtype=torch.bfloat16).transpose(1, 2)

    return tokens(g.q_heads), tokens(g.kv_heads), tokens(g.kv_heads)


def dense_baseline(g: Geometry, head_dim: int, qkv: tuple[Tensor, Tensor, Tensor], repeats: int) -> Result:
    """cuDNN's causal attention on the same tensors."""
    q, k, v = qkv
    pairs = g.batch * g.q_heads * g.q_len * (g.q_len + 1) // 2
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            time = milliseconds(
                lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), repeats
            )
    except RuntimeError as error:
        return Result(g.q_len, head_dim, "dense", "cuDNN", float("nan"), float("nan"), float("nan"), str(error)[:60])
    return Result(g.q_len, head_dim, "dense", "cuDNN", time, 4 * head_dim * pairs / time / 1e9, float("nan"))


def measure(
    name: str, g: Geometry, qkv: tuple[Tensor, Tensor, Tensor], candidate: tuple[int, int, int, int, bool], repeats: int
) -> Result:
    """One plan with one candidate; a candidate that does not build or run becomes a line with the reason."""
    q, k, v = qkv
    head_dim, scale = q.shape[-1], q.shape[-1] ** -0.5
    block_m, block_n, warps, stages, descriptors = candidate
    label = f"{block_m}x{block_n} w{warps} s{stages} {'desc' if descriptors else 'ptr'}"
    failed = Result(g.q_len, head_dim, name, label, float("nan"), float("nan"), float("nan"))
    plan = build_plan(name, g, block_m, block_n, q.device)
    try:
        spec = choose_spec(
            device_arch(q.device), "bf16", head_dim, features=plan_features(plan),
            block_m=block_m, block_n=block_n, descriptors=descriptors,
        )  # fmt: skip
        if spec.use_descriptors != descriptors:
            return replace(failed, note="no tensor descriptors on this architecture")
        spec = replace(spec, num_warps=warps, num_stages=stages)
        out = torch.full_like(q, float("nan"))
        attention_triton(q, k, v, plan, scale, spec=spec, out=out)
        rows = [0, 1, block_m - 1, g.q_len // 2 + 3, g.q_len - block_m - 1, g.q_len - 1]
        error = rows_error(q, k, v, out, plan, rows, scale)
        time = milliseconds(lambda: attention_triton(q, k, v, plan, scale, spec=spec, out=out), repeats)
    except Exception as failure:  # the other candidates are still worth measuring
        reason = str(failure).partition("\n")[0][:70]
        return replace(failed, note=f"{type(failure).__name__}: {reason}")
    tflops = 4 * head_dim * computed_pairs(plan) / time / 1e9
    return Result(g.q_len, head_dim, name, label, time, tflops, error, "" if error < 0.02 else "WRONG")


def chosen(head_dim: int, device: torch.device) -> tuple[int, int, int, int, bool]:
    """What the tables choose today."""
    spec: KernelSpec = choose_spec(device_arch(device), "bf16", head_dim)
    return spec.block_m, spec.block_n, spec.num_warps, spec.num_stages, spec.use_descriptors


def line(result: Result) -> str:
    return (
        f"{result.tokens:>8} {result.head_dim:>4} {result.plan:<8} {result.kernel:<22} {result.milliseconds:>9.3f} "
        f"{result.tflops:>8.1f} {result.error:>9.1e} {result.note}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16 K tokens and two candidates only")
    parser.add_argument("--tokens", type=int, nargs="*", help="prompt lengths, default 16384 131072")
    parser.add_argument("--plans", nargs="*", choices=PLANS, default=list(PLANS))
    parser.add_argument("--repeats", type=int, default=5, help="timed calls per line (median)")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        print("bench_kernels needs a GPU; torch.cuda.is_available() is False here. Nothing was measured.")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    results: list[Result] = []

    def add(result: Result) -> None:
        results.append(result)
        print(line(result), flush=True)

    print(f"{torch.cuda.get_device_name(device)}, {device_arch(device)}, torch {torch.__version__}")
    for head_dim in (64, 80, 96, 256):
        small = Geometry(1, 8, 2, 4000, 4000)
        qkv = random_inputs(small, head_dim, device)
        add(dense_baseline(small, head_dim, qkv, options.repeats))
        for name in ("dense", "columns"):
            if name == "columns" and options.quick:
                continue
            add(measure(name, replace(small), qkv, chosen(head_dim, device), options.repeats))
    candidates = QUICK_CANDIDATES if options.quick else CANDIDATES
    for tokens in options.tokens or ([16384] if options.quick else [16384, 131072]):
        g = Geometry(1, 28, 4, tokens, tokens)
        qkv = random_inputs(g, 128, device)
        add(dense_baseline(g, 128, qkv, options.repeats))
        for name in options.plans:
            for candidate in candidates:
                add(measure(name, g, qkv, candidate, options.repeats))
        del qkv

    print("\nbest of each:")
    for key in dict.fromkeys((r.tokens, r.head_dim, r.plan) for r in results):
        fit = [r for r in results if (r.tokens, r.head_dim, r.plan) == key and r.kernel != "cuDNN" and not r.note]
        dense = next(r for r in results if (r.tokens, r.head_dim, r.kernel) == (*key[:2], "cuDNN"))
        if fit:
            best = min(fit, key=lambda r: r.milliseconds)
            ratio = dense.milliseconds / best.milliseconds
            print(f"{line(best)}  {ratio:.2f} x as fast as dense cuDNN ({dense.tflops:.0f} TFLOP/s)")
    wrong = [r for r in results if r.note]
    print(f"{len(results)} lines, {len(wrong)} with a note" + "".join(f"\n  {line(r)}" for r in wrong))
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in results], indent=1))


if __name__ == "__main__":
    main()
