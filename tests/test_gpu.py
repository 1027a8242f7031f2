"""What only a GPU can show: compiled kernels against float64, the operators on CUDA tensors, and whole models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmi_compile import compile as mmi_compile_model
from mmi_compile import last_report, report
from mmi_compile.kernels import grouped_ops, ops  # noqa: F401  registers mmi::…
from mmi_compile.kernels.boundaries import build_bounded_plan
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.groups import parse_clauses, visible
from mmi_compile.kernels.launch import device_arch
from mmi_compile.kernels.patterns import AShape, ByModality, Grid, VerticalSlash
from mmi_compile.kernels.plan import Plan
from mmi_compile.kernels.planner import build_plan, dense_plan
from mmi_compile.kernels.reference import attention_reference
from mmi_compile.kernels.run import Family, families, family_tiles, run_plan
from mmi_compile.kernels.segments import segment
from mmi_compile.kernels.structured import Structure, structured_qkv
from tests import models
from tests.random_plans import masked_attention, random_plan, random_qkv

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16]
ROUNDING = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double().cpu(), want.double().cpu()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def to_cuda(g: Geometry) -> Geometry:
    values = {name: getattr(g, name) for name in g.__dataclass_fields__}
    return Geometry(**{name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in values.items()})


def on_gpu(plan: Plan) -> Plan:
    moved = {}
    for name in plan.__dataclass_fields__:
        value = getattr(plan, name)
        moved[name] = to_cuda(value) if isinstance(value, Geometry) else value
        moved[name] = value.cuda() if isinstance(value, torch.Tensor) else moved[name]
    return Plan(**moved)


@pytest.mark.parametrize("family", ["hopper", "portable"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_kernels_equal_float64_attention_over_the_plans_mask(head_dim: int, dtype: torch.dtype, family: Family) -> None:
    device = torch.device("cuda", 0)
    if family not in families(device, dtype, head_dim):
        pytest.skip(f"{family} kernels do not run on {device_arch(device)}")
    tiles = family_tiles(family, device, dtype, head_dim)
    for seed in range(6):
        plan = random_plan(seed, block_m=tiles.block_m, block_n=tiles.block_n, max_len=700)
        q, k, v = random_qkv(seed, plan.geometry, head_dim, dtype)
        want = masked_attention(q, k, v, plan.to_mask(), 0.1)
        live = plan.geometry.live_keys("cpu")
        if live is not None:
            v = v.masked_fill(~live[:, None, :, None], float("nan"))
        out = torch.full(q.shape, float("nan"), dtype=dtype, device="cuda")
        again = torch.full_like(out, float("nan"))
        for target in (out, again):
            run_plan(q.cuda(), k.cuda(), v.cuda(), on_gpu(plan), 0.1, family=family, out=target)
        assert not out.isnan().any(), f"seed {seed}"
        assert torch.equal(out, again), f"seed {seed}: two runs differ"
        if want.numel() and want.norm() > 0:
            assert relative_error(out, want) < ROUNDING[dtype], f"seed {seed}"


@pytest.mark.parametrize("family", ["hopper", "portable"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_dense_errors_are_those_of_flash_attention(head_dim: int, dtype: torch.dtype, family: Family) -> None:
    device, tokens, scale = torch.device("cuda", 0), 2000, head_dim**-0.5
    if family not in families(device, dtype, head_dim):
        pytest.skip(f"{family} kernels do not run on {device_arch(device)}")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, tokens, head_dim, device=device, dtype=dtype) for _ in range(3))
    g = Geometry(1, 4, 4, tokens, tokens)
    plan = dense_plan(g, family_tiles(family, device, dtype, head_dim), device)
    want = attention_reference(q.double(), k.double(), v.double(), g.to_mask(device)[:, None], scale)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        flash = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    ours = run_plan(q, k, v, plan, scale, family=family)
    assert relative_error(ours, want) <= 2 * relative_error(flash, want)


@pytest.mark.parametrize("family", ["hopper", "portable"])
@pytest.mark.parametrize("tokens", [640, 2048, 5000])
def test_boundaries_run_as_they_are_planned(tokens: int, family: Family) -> None:
    device, dtype, dim = torch.device("cuda", 0), torch.bfloat16, 128
    if family not in families(device, dtype, dim):
        pytest.skip(f"{family} kernels do not run on {device_arch(device)}")
    tiles = family_tiles(family, device, dtype, dim)
    g = Geometry(1, 4, 2, tokens, tokens)
    q, k, v = random_qkv(0, g, dim, dtype)
    ids = (torch.arange(tokens, device=device) % 5 > 1).to(torch.int8)[None]
    heads = [
        ByModality("q", AShape(8, 64), ((1, VerticalSlash(30, 20)),)),
        ByModality("2d", AShape(8, 64), (((1, 1), VerticalSlash(30, 20)), ((0, 1), VerticalSlash(9, 1)))),
        VerticalSlash(30, 20),
        Grid(32, 0, 64),
    ]
    groups = segment(ids, (0, 1), g, tiles)
    plan = build_bounded_plan(heads, q.cuda(), k.cuda(), g, 0.1, tiles, groups)
    want = masked_attention(q, k, v, plan.to_mask().cpu(), 0.1)
    out = run_plan(q.cuda(), k.cuda(), v.cuda(), plan, 0.1, family=family)
    assert relative_error(out, want) < ROUNDING[dtype]


@pytest.mark.parametrize("family", ["hopper", "portable"])
def test_offsets_beyond_32_bits_are_right(family: Family) -> None:
    device, dtype, dim = torch.device("cuda", 0), torch.bfloat16, 128
    if family not in families(device, dtype, dim):
        pytest.skip(f"{family} kernels do not run on {device_arch(device)}")
    g = Geometry(1, 20, 20, 900_001, 900_001)
    q, k, v = (torch.randn(1, 20, g.q_len, dim, device=device, dtype=dtype) for _ in range(3))
    assert q.numel() > 2**31
    plan = build_plan([AShape(64, 256)] * 20, q, k, g, dim**-0.5, family_tiles(family, device, dtype, dim))
    out = run_plan(q, k, v, plan, dim**-0.5, family=family)
    record, bn = plan.record, plan.block_n
    for head in (0, 19):
        for row in (0, 77, 500_000, g.q_len - 1):
            tile = row // plan.block_m
            start, stop = (int(x[0, head, tile, 0]) * bn for x in (record.window_start, record.sink_stop))
            keys = torch.cat([torch.arange(0, min(stop, start)), torch.arange(start, row + 1)]).to(device)
            scores = (k[0, head, keys].double() @ q[0, head, row].double()) * dim**-0.5
            want = torch.softmax(scores, 0) @ v[0, head, keys].double()
            assert relative_error(out[0, head, row], want) < ROUNDING[dtype], (head, row)


def run_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: torch.Tensor | None = None, *,
    policy: str = "exact", offset: int = 0, window: int = 0, min_tokens: int = 0,
) -> torch.Tensor:  # fmt: skip
    bounds = None if padding is None else ops.key_bounds_of(padding)
    return torch.ops.mmi.attention(
        q, k, v, padding, bounds, None, [], q.shape[3] ** -0.5, offset, window, policy, 0.95, 0.5, min_tokens, True, "",
        None, "bshd", "gpu-test", ops.ABI,
    )  # fmt: skip


@pytest.mark.parametrize("case", ["causal", "left", "right", "holes", "window", "offset"])
def test_exact_policy_equals_the_reference(case: str) -> None:
    torch.manual_seed(0)
    batch, heads, groups, tokens, dim = 2, 6, 2, 777, 64
    kv_len = tokens + (200 if case == "offset" else 0)
    q = torch.randn(batch, tokens, heads, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    k, v = (torch.randn(batch, groups, kv_len, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    padding = torch.ones(batch, kv_len, dtype=torch.bool, device="cuda")
    if case == "left":
        padding[1, :100] = False
    if case == "right":
        padding[0, 600:] = False
    if case == "holes":
        padding[1, 50:90] = False
    offset, window = (200 if case == "offset" else 0), (64 if case == "window" else 0)
    out = run_op(q, k, v, padding, offset=offset, window=window)
    geometry = Geometry(batch, heads, groups, tokens, kv_len, offset, window, key_padding=padding)
    mask = geometry.to_mask("cuda")[:, None].expand(-1, heads, -1, -1)
    want = attention_reference(q.double(), k.double(), v.double(), mask, dim**-0.5)
    assert relative_error(out, want) < ROUNDING[torch.bfloat16]
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
def test_adaptive_policy_finds_planted_structure_and_stays_close(dtype: torch.dtype) -> None:
    structures = [Structure(columns=(0, 700, 3000)), Structure(distances=(0,)), Structure(stride=128, phase=3)]
    x = structured_qkv(structures, 8192, kv_heads=3, head_dim=64, dtype=dtype, device="cuda")
    report.forget()
    sparse = run_op(x.q, x.k, x.v, policy="adaptive")
    dense = run_op(x.q, x.k, x.v, policy="exact")
    assert relative_error(sparse, dense) < 0.3
    report.forget()


@pytest.mark.fresh_dynamo
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_whole_model_keeps_its_logits(name: str, padding: str) -> None:
    shape = models.Shape(head_dim=64)
    batch = 1 if padding == "none" else 2
    model, inputs = models.build(name, shape=shape, padding=padding, batch=batch, dtype=torch.bfloat16)
    model, inputs = model.cuda(), {n: x.cuda() for n, x in inputs.items()}
    live = inputs["attention_mask"].bool()
    with torch.inference_mode():
        want = model(**inputs).logits
        report.forget()
        got = mmi_compile_model(model, policy="exact")(**inputs).logits
    compiled = last_report()
    assert compiled is not None
    assert len(compiled.rewritten) == len(compiled.sites) > 0
    assert relative_error(got[live], want[live]) < 3e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_portable_kernels_with_an_interval_for_every_row(head_dim: int, dtype: torch.dtype) -> None:
    tiles = family_tiles("portable", torch.device("cuda", 0), dtype, head_dim)
    for seed in range(12):
        plan = random_plan(seed, block_m=tiles.block_m, block_n=tiles.block_n, max_len=700, intervals=True)
        if plan.geometry.has_rows and seed % 2:
            plan = dense_plan(plan.geometry, tiles, "cpu")
        q, k, v = random_qkv(seed, plan.geometry, head_dim, dtype)
        want = masked_attention(q, k, v, plan.to_mask(), head_dim**-0.5)
        got = run_plan(q.cuda(), k.cuda(), v.cuda(), on_gpu(plan), head_dim**-0.5, family="portable")
        assert relative_error(got, want) < ROUNDING[dtype]


@pytest.mark.parametrize("clauses", ["causal & same:0", "causal|same:0:1 & window:300", "causal & same:0 & window:64"])
@pytest.mark.parametrize("torn", [False, True])
def test_attention_of_documents_and_blocks(clauses: str, torn: bool) -> None:
    tokens, scale = 1500, 64**-0.5
    random = torch.Generator().manual_seed(1)
    ids = (torch.rand(2, tokens, generator=random) < 0.01).cumsum(1)
    ids = ids % 3 if torn else ids
    q, k, v = (torch.randn(2, heads, tokens, 64, generator=random).bfloat16() for heads in (4, 2, 2))
    mask = visible(parse_clauses(clauses), ids[None], torch.arange(tokens), 0)
    want = attention_reference(q.double(), k.double(), v.double(), mask[:, None], scale)
    rows = torch.ops.mmi.row_bounds([ids.cuda()], clauses, [not torn], 2, tokens, tokens, 0, ops.ABI)
    got = torch.ops.mmi.grouped_attention(
        q.cuda(), k.cuda(), v.cuda(), None, None, rows, clauses, scale, 0, "bshd", "gpu/0", ops.ABI
    )
    assert relative_error(got, want) < ROUNDING[torch.bfloat16]
