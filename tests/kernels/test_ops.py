"""The operators: what they promise to the compiler (schema, fakes), and what they compute."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmi_compile import record, runtime
from mmi_compile.decision import MMIError
from mmi_compile.kernels import grouped_ops  # noqa: F401  registers mmi::row_bounds
from mmi_compile.kernels.cpu import attention_cpu
from mmi_compile.kernels.dense import dense_attention
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.ops import ABI
from mmi_compile.kernels.planner import TileShape, dense_plan
from mmi_compile.kernels.reference import attention_reference
from tests.harness import relative_error

mmi = torch.ops.mmi
PADDINGS = ("none", "all live", "left", "right", "holes", "dead")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def qkv(
    q_len: int = 37, kv_len: int | None = None, *, batch: int = 2, heads: int = 4, kv_heads: int = 2, dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q as a strided view of [B, S, H, D], as models have it; k and v contiguous."""
    random = torch.Generator().manual_seed(q_len)
    kv_len = q_len if kv_len is None else kv_len
    q = torch.randn(batch, q_len, heads, dim, generator=random, dtype=torch.float64).transpose(1, 2)
    k, v = (torch.randn(batch, kv_heads, kv_len, dim, generator=random, dtype=torch.float64) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def padding_of(kind: str, batch: int, keys: int) -> Tensor | None:
    """bool [B, keys]; the first batch element always stays whole, except where all keys are dead."""
    if kind == "none":
        return None
    live = torch.ones(batch, keys, dtype=torch.bool)
    if kind == "left":
        live[-1, : keys // 3] = False
    elif kind == "right":
        live[-1, keys - keys // 3 :] = False
    elif kind == "holes":
        live[-1, keys // 3 : keys // 2] = False
    elif kind == "dead":
        live[-1] = False
    return live


def run(
    q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None, bounds: Tensor | None = None, *,
    offset: int = 0, window: int = 0, policy: str = "exact", recall: float = 0.95, max_density: float = 0.5,
    min_tokens: int = 0, layout: str = "bshd", key: str = "test_ops", abi: int = ABI,
) -> Tensor:  # fmt: skip
    scale = 1 / math.sqrt(q.shape[3])
    return mmi.attention(
        q, k, v, padding, bounds, None, [], scale, offset, window, policy, recall, max_density, min_tokens, True, "",
        None, layout, key, abi,
    )  # fmt: skip


def expected(
    q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None, *, offset: int = 0, window: int = 0
) -> Tensor:
    """The reference in float64, under the mask written out from its definition."""
    kv_len = k.shape[2]
    geometry = Geometry(
        batch=q.shape[0], q_heads=q.shape[1], kv_heads=k.shape[1], q_len=q.shape[2], kv_len=kv_len,
        q_offset=offset, window=window, key_padding=None if padding is None else padding[:, :kv_len].bool(),
    )  # fmt: skip
    return attention_reference(q.double(), k.double(), v.double(), geometry.to_mask()[:, None], q.shape[3] ** -0.5)


# --- what the compiler relies on ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("padding", "given_bounds", "offset", "window", "policy", "layout"),
    [
        ("none", False, 0, 0, "exact", "bshd"),
        ("left", True, 0, 0, "exact", "bhsd"),
        ("right", False, 0, 0, "adaptive", "bshd"),
        ("holes", True, 3, 8, "exact", "bhsd"),
        ("left", True, 3, 0, "adaptive", "bhsd"),
        ("none", False, 0, 8, "adaptive", "bhsd"),
        ("dead", True, 3, 8, "exact", "bshd"),
    ],
)
def test_opcheck_attention(padding, given_bounds, offset, window, policy, layout):
    q, k, v = qkv(21, 21 + offset)
    live = padding_of(padding, 2, 21 + offset)
    bounds = mmi.key_bounds(live) if given_bounds and live is not None else None
    modality = torch.zeros(2, 21 + offset, dtype=torch.int8)
    torch.library.opcheck(
        mmi.attention.default,
        (
            q, k, v, live, bounds, modality, [], 0.25, offset, window, policy, 0.95, 0.5, 0, True, "", None, layout,
            "test_ops", ABI,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("masks", [0, 2])
def test_opcheck_modality(masks):
    ids = torch.arange(10).view(2, 5)
    arguments = (torch.randn(2, 5, 8), [ids == 3, ids == 7][:masks], "image,video" if masks else "", ids, 2, 5, "graph")
    torch.library.opcheck(mmi.modality.default, arguments)


def test_opcheck_small_operators():
    ids = torch.arange(10).view(2, 5)
    torch.library.opcheck(mmi.key_bounds.default, (ids > 2,))
    torch.library.opcheck(mmi.key_bounds.default, ((ids > 2).long(),))
    torch.library.opcheck(mmi.tag_modality.default, (ids > 2, "image"))
    torch.library.opcheck(mmi.begin_prompt.default, (ids,))
    record.begin_prompt()


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("padding", ["none", "left", "holes"])
@pytest.mark.parametrize(("q_len", "batch"), [(37, 2), (1, 2), (37, 1), (0, 2)])
def test_fake_has_the_shape_dtype_and_strides_of_the_real_result(layout, padding, q_len, batch):
    q, k, v = qkv(q_len, batch=batch, dtype=torch.bfloat16)
    live = padding_of(padding, batch, q_len)
    real = run(q, k, v, live, layout=layout)
    with FakeTensorMode() as mode:
        fakes = [None if x is None else mode.from_tensor(x) for x in (q, k, v, live)]
        fake = run(*fakes, layout=layout)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    if layout == "bhsd":
        assert real.is_contiguous()
    else:
        assert real.transpose(1, 2).is_contiguous()


def test_operators_are_kept_out_of_cuda_graphs():
    for name in ("attention", "key_bounds", "modality", "segments", "tag_modality", "begin_prompt"):
        assert torch.Tag.cudagraph_unsafe in getattr(mmi, name).default.tags


@pytest.mark.parametrize("scale", [0.0, -0.25, 1e-46, math.inf, math.nan])
def test_a_scale_that_is_not_positive_is_refused(scale):
    q, k, v = qkv()
    mend = "give its absolute value, and the sign to the queries"
    for policy in ("exact", "adaptive"):
        with pytest.raises(ValueError, match=mend):
            mmi.attention(
                q, k, v, None, None, None, [], scale, 0, 0, policy, 0.95, 0.5, 0, True, "", None, "bshd", "test_ops",
                ABI,
            )  # fmt: skip
    rows = mmi.row_bounds([torch.arange(37) // 5], "causal & same:0", [True], 2, 37, 37, 0, ABI)
    with pytest.raises(ValueError, match=mend):
        mmi.grouped_attention(q, k, v, None, None, rows, "causal & same:0", scale, 0, "bshd", "test_ops", ABI)
    geometry = Geometry(batch=2, q_heads=4, kv_heads=2, q_len=37, kv_len=37)
    tiles = TileShape(16, 16)
    with pytest.raises(ValueError, match=mend):
        dense_attention(q, k, v, geometry, scale, tiles)
    with pytest.raises(ValueError, match=mend):
        attention_cpu(q, k, v, dense_plan(geometry, tiles, "cpu"), scale)


def test_a_graph_of_another_version_is_refused():
    with pytest.raises(MMIError, match="compile it again"):
        run(*qkv(5), abi=ABI + 1)


# --- what they compute --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("window", [0, 5])
def test_exact_equals_the_reference(dtype, padding, window):
    q, k, v = qkv(133, dtype=dtype)
    live = padding_of(padding, 2, 133)
    actual = run(q, k, v, live, window=window)
    assert actual.dtype == dtype
    assert relative_error(actual, expected(q, k, v, live, window=window)) < TOLERANCE[dtype]


@given(
    q_len=st.sampled_from([0, 1, 2, 63, 64, 65, 127, 129]),
    past=st.sampled_from([0, 1, 70]),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (8, 1)]),
    batch=st.integers(1, 3),
    padding=st.sampled_from(PADDINGS),
    window=st.sampled_from([0, 1, 40]),
    bounds=st.booleans(),
)
def test_exact_equals_the_reference_for_any_geometry(q_len, past, heads, batch, padding, window, bounds):
    q, k, v = qkv(q_len, past + q_len, batch=batch, heads=heads[0], kv_heads=heads[1], dim=8, dtype=torch.float64)
    live = padding_of(padding, batch, past + q_len)
    given_bounds = mmi.key_bounds(live) if bounds and live is not None else None
    actual = run(q, k, v, live, given_bounds, offset=past, window=window)
    assert relative_error(actual, expected(q, k, v, live, offset=past, window=window)) < 1e-12


@given(
    q_len=st.sampled_from([1, 64, 130, 193]),
    past=st.sampled_from([0, 70]),
    padding=st.sampled_from(PADDINGS),
    window=st.sampled_from([0, 40]),
)
def test_adaptive_with_everything_required_equals_the_reference(q_len, past, padding, window):
    """With a recall of 1 nothing may be dropped."""
    q, k, v = qkv(q_len, past + q_len, dtype=torch.float64)
    live = padding_of(padding, 2, past + q_len)
    actual = run(q, k, v, live, offset=past, window=window, policy="adaptive", recall=1.0)
    assert relative_error(actual, expected(q, k, v, live, offset=past, window=window)) < 1e-12


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_adaptive_runs_on_every_dtype_and_padding_and_kills_no_live_row(padding, dtype):
    q, k, v = qkv(200, dtype=dtype)
    v = v.abs() + 1  # a sum over no key is the only way to a zero
    live = padding_of(padding, 2, 200)
    actual = run(q, k, v, live, policy="adaptive", recall=0.5)
    assert actual.isfinite().all()
    dead = (expected(q, k, v, live) == 0).all(-1)
    assert torch.equal((actual == 0).all(-1), dead)


@pytest.mark.parametrize("policy", ["exact", "adaptive"])
@pytest.mark.parametrize(("q_len", "kv_len", "offset"), [(9, 5, 0), (5, 12, 4), (5, 5, 3), (5, 9, 20), (0, 5, 5)])
def test_keys_and_rows_need_not_match(policy, q_len, kv_len, offset):
    """Keys that no row may see (a static cache) and rows past the last key."""
    q, k, v = qkv(q_len, kv_len, dtype=torch.float64)
    actual = run(q, k, v, offset=offset, policy=policy, recall=1.0)
    visible = min(kv_len, q_len + offset)
    keys, values = k[:, :, :visible], v[:, :, :visible]
    assert relative_error(actual, expected(q, keys, values, offset=offset)) < 1e-12


@pytest.mark.parametrize("policy", ["exact", "adaptive"])
@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 0), (5, 0)])
def test_nothing_to_attend_to_gives_zeros(policy, q_len, kv_len):
    actual = run(*qkv(q_len, kv_len), policy=policy)
    assert actual.shape == (2, 4, q_len, 16)
    assert not actual.any()


def test_arguments_are_left_alone():
    q, k, v = qkv(70)
    live = padding_of("holes", 2, 70)
    before = [x.clone() for x in (q, k, v, live)]
    for policy in ("exact", "adaptive"):
        run(q, k, v, live, policy=policy)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v, live), before, strict=True))


# --- padding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "bounds"),
    [
        ([1, 1, 1, 1], (0, 4, 0)),
        ([0, 0, 1, 1], (2, 4, 0)),
        ([1, 1, 0, 0], (0, 2, 0)),
        ([0, 1, 1, 0], (1, 3, 0)),
        ([0, 1, 0, 1], (1, 4, 1)),
        ([0, 0, 0, 1], (3, 4, 0)),
        ([0, 0, 0, 0], (0, 0, 0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_key_bounds(row, bounds, dtype):
    found = mmi.key_bounds(torch.tensor([[1, 1, 1, 1], row]).to(dtype))
    assert found.dtype == torch.int32
    assert found.device.type == "cpu"
    assert found.tolist() == [[0, 4, 0], list(bounds)]


@given(st.lists(st.booleans(), max_size=12))
def test_key_bounds_by_brute_force(row):
    first, last, broken = mmi.key_bounds(torch.tensor([row], dtype=torch.bool).view(1, len(row)))[0].tolist()
    live = [j for j, alive in enumerate(row) if alive]
    assert (first, last) == ((live[0], live[-1] + 1) if live else (0, 0))
    assert bool(broken) == (len(live) != last - first)


@given(
    rows=st.lists(st.lists(st.booleans(), min_size=14, max_size=14), min_size=2, max_size=2),
    kv_len=st.sampled_from([1, 5, 13, 14]),
    bounds=st.booleans(),
)
def test_key_padding_beyond_the_keys_is_ignored(rows, kv_len, bounds):
    """A static cache's mask covers its whole length."""
    q, k, v = qkv(kv_len, dtype=torch.float64)
    live = torch.tensor(rows)
    actual = run(q, k, v, live, mmi.key_bounds(live) if bounds else None)
    assert relative_error(actual, expected(q, k, v, live)) < 1e-12


@pytest.mark.parametrize("shape", [(2, 8), (1, 9), (3, 9), (9,), (2, 1, 9)])
def test_key_padding_of_another_shape_is_refused(shape):
    with pytest.raises(MMIError, match=r"needs \(2, 9\)"):
        run(*qkv(9), torch.ones(shape))


# --- modality -----------------------------------------------------------------------------------------------------


def test_masks_of_the_graph_become_ids():
    tokens = torch.tensor([[7, 1, 1, 2, 9], [2, 2, 7, 7, 1]])
    masks = [tokens == 1, tokens == 2, tokens == 9]
    ids = mmi.modality(tokens.float(), masks, "image,video,depth", None, 2, 5, "labels")
    assert ids.tolist() == [[0, 1, 1, 2, 4], [2, 2, 0, 0, 1]]
    assert ids.dtype == torch.int8
    ran = runtime.modality_run("labels")
    assert ran is not None
    assert (ran.source, ran.labels[4]) == ("masks in the graph", "depth")


def test_masks_of_another_shape_are_not_used():
    like = torch.zeros(1)
    ids = mmi.modality(like, [torch.ones(1, 4, dtype=torch.bool)], "image", None, 1, 5, "other shape")
    assert ids.tolist() == [[0] * 5]


def test_what_is_reported_outlives_the_graphs_buffers():
    """A compiler may reuse the result's memory once its last reader has run."""
    mask = torch.tensor([[True, False]])
    mmi.modality(torch.zeros(1), [mask], "image", None, 1, 2, "buffers").fill_(9)
    ran = runtime.modality_run("buffers")
    assert ran is not None
    assert ran.ids.tolist() == [[1, 0]]


def test_identities_return_copies_and_record():
    ids = torch.tensor([[5, 6, 6]])
    begun = mmi.begin_prompt(ids)
    mask = begun == 6
    tagged = mmi.tag_modality(mask, "image")
    assert torch.equal(begun, ids)
    assert torch.equal(tagged, mask)
    assert begun.data_ptr() != ids.data_ptr()
    tagged.zero_()  # what a graph does with its buffer does not change the record
    assert mmi.modality(ids, [], "", begun, 1, 3, "tagged").tolist() == [[0, 1, 1]]
    record.begin_prompt()


def test_a_vague_mask_is_the_last_resort():
    mask = torch.tensor([[True, False, True]])
    known = torch.tensor([[2, 0, 1]])
    like = torch.zeros(1)
    assert mmi.modality(like, [mask], "vision", None, 1, 3, "vague").tolist() == [[4, 0, 4]]
    with record.hooked(record.Record("a hook", ids=known)):
        assert mmi.modality(like, [mask], "vision", None, 1, 3, "vague").tolist() == known.tolist()
        assert mmi.modality(like, [mask], "image", None, 1, 3, "sure").tolist() == [[1, 0, 1]]
