"""Every reason for leaving an attention alone, each from a program that a user could write."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmi_compile.backend import rewrite_graph
from mmi_compile.decision import Reason
from mmi_compile.options import Options
from mmi_compile.passes.classify_phase import offset_is_suffix
from mmi_compile.report import SiteReport
from tests import harness

N = 19
EXACT = Options(policy="exact", inner="eager")


def heads(n: int = N, dim: int = 8, count: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, count, n, dim, generator=torch.Generator().manual_seed(n)).to(dtype)


def captured(function: Callable[..., Any], *inputs: Tensor, dynamic: bool | None = False) -> torch.fx.GraphModule:
    return harness.capture(function, *inputs, dynamic=dynamic, fullgraph=True).graphs[0]


def site_of(function: Callable[..., Any], *inputs: Tensor, options: Options = EXACT, **arguments: Any) -> SiteReport:
    gm = captured(function, *inputs)
    result, report = rewrite_graph(gm, options, **arguments)
    assert not report.failure, report.failure
    (site,) = report.sites
    if not site.decision.rewritten:
        assert result is gm
        assert site.decision.reason.mend
    return site


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def masked(shift: int = 0, q_len: int = N, kv_len: int = N, extra: Callable[..., Tensor] | None = None) -> Any:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)[None, :]
        keep = j <= i + shift
        if extra is not None:
            keep = extra(keep, i, j)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)

    return function


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.arange(N)[None, :] <= torch.arange(N)[:, None]
    return torch.softmax((q @ k.mT).masked_fill(~keep, -math.inf), -1) @ v


def test_prefill_is_rewritten():
    site = site_of(causal, heads(), heads(), heads())
    assert site.decision.rewritten
    assert (site.phase, site.decision.reason) == ("prefill", None)


@pytest.mark.parametrize("mask", ["none", "causal", "bool"])
def test_one_query_token_is_a_decode_step(mask):
    function = {
        "none": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        "causal": causal,
        "bool": masked(N - 1, q_len=1),
    }[mask]
    site = site_of(function, heads(1), heads(), heads())
    assert (site.decision.reason, site.phase) == (Reason.DECODE, "decode")


@pytest.mark.parametrize("past", [False, True])
def test_one_row_over_keys_that_the_graph_computes_is_no_decode_step(past):
    """A pooling head; with ``past`` keys before its own, a decode step."""

    def function(q, x, weight, scale, *before):
        k = (x @ weight * scale).unflatten(-1, (2, -1)).transpose(1, 2)
        k = torch.cat([*before, k], 2) if before else k
        return F.scaled_dot_product_attention(q, k, k)

    made = torch.randn(1, N, 6), torch.randn(6, 16), torch.randn(16)
    site = site_of(function, heads(1), *made, *[heads()] * past)
    expected = (Reason.DECODE, "decode") if past else (Reason.ONE_ROW, "unclassified")
    assert (site.decision.reason, site.phase) == expected


def test_attention_without_a_mask_is_bidirectional():
    site = site_of(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), heads(), heads(), heads())
    assert (site.decision.reason, site.phase) == (Reason.BIDIRECTIONAL, "encoder")


def test_a_padding_mask_alone_is_bidirectional():
    def function(q, k, v, live):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=live[:, None, None, :])

    site = site_of(function, heads(), heads(), heads(), torch.ones(1, N, dtype=torch.bool))
    assert site.decision.reason is Reason.BIDIRECTIONAL


UNKNOWN = {
    "an input": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
    "a bias": lambda q, k, v, m: torch.softmax(q @ k.mT + m.float() * 0.5, -1) @ v,
    "data": lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=q @ k.mT > 0),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_masks_that_are_not_proved(name):
    site = site_of(UNKNOWN[name], heads(), heads(), heads(), torch.ones(N, N, dtype=torch.bool).tril())
    reason = Reason.MASK_IS_INPUT if name == "an input" else Reason.UNKNOWN_MASK
    assert (site.decision.reason, site.phase) == (reason, "unclassified")
    assert site.decision.detail


@pytest.mark.parametrize("shift", [-1, -3])
def test_rows_before_the_first_key_have_no_usable_offset(shift):
    site = site_of(masked(shift), heads(), heads(), heads())
    assert site.decision.reason is Reason.UNKNOWN_OFFSET
    assert str(shift) in site.decision.detail


@pytest.mark.parametrize(("q_len", "kv_len", "shift"), [(N, N + 5, 5), (N, N + 5, 0), (N, N + 5, 3), (N, 7, 0)])
def test_constant_offsets_are_served(q_len, kv_len, shift):
    site = site_of(masked(shift, q_len, kv_len), heads(q_len), heads(kv_len), heads(kv_len))
    assert site.decision.rewritten


@pytest.mark.parametrize("shift", [0, 2])
def test_symbolic_offsets_are_served_where_the_rows_are_the_last_positions(shift):
    def function(q, k, v):
        n, m = q.shape[2], k.shape[2]
        first = m - n if shift == 0 else m - n + 2
        keep = torch.arange(m)[None, :] <= torch.arange(n)[:, None] + first
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)

    gm = captured(function, heads(), heads(30), heads(30), dynamic=True)
    _, report = rewrite_graph(gm, EXACT)
    assert report.sites[0].decision.reason is (Reason.UNKNOWN_OFFSET if shift else None)


SCALED = {
    "causal": lambda q, k, v, s: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=s),
    "masked": lambda q, k, v, s: F.scaled_dot_product_attention(
        q, k, v, attn_mask=torch.arange(N)[None] <= torch.arange(N)[:, None], scale=s
    ),
    "eager": lambda q, k, v, s: (
        torch.softmax((q @ k.mT * s).masked_fill(torch.arange(N)[None] > torch.arange(N)[:, None], -math.inf), -1) @ v
    ),
}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("scale", [0.0, -0.25, -1e-3, 1e-46, math.inf, math.nan])
def test_a_scale_that_is_not_positive_is_left_alone(name, scale):
    site = site_of(lambda q, k, v: SCALED[name](q, k, v, scale), heads(), heads(), heads())
    assert site.decision.reason is Reason.SCALE
    assert str(scale) in site.decision.detail
    assert site.phase == "prefill"


def test_a_scale_that_is_a_symbol_is_guarded():
    def function(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(N, N).tril() > 0, scale=scale)

    q, k, v = heads(), heads(), heads()
    compiled = torch.compile(function, backend="mminference", options=EXACT.to_json(), dynamic=True)
    with torch.no_grad():
        for scale in (0.25, 0.5, -0.25, 0.0, 0.75):
            assert harness.relative_error(compiled(q, k, v, scale), function(q, k, v, scale)) < 1e-5


def documents(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, offset: int) -> Tensor:
    """Causal attention within documents; rows that stand behind the last key read another number than -1 there."""
    i, j = torch.arange(q.shape[2])[:, None] + offset, torch.arange(k.shape[2])[None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i) & (ids[i] == ids[j]))


@pytest.mark.parametrize(
    ("q_len", "kv_len", "offset", "served"), [(9, 9, 0, True), (9, 14, 0, True), (9, 5, 0, False), (9, 9, 2, False)]
)
def test_rows_behind_the_last_key_belong_to_no_group(q_len, kv_len, offset, served):
    q, k, v = heads(q_len), heads(kv_len), heads(kv_len)
    ids = torch.arange(40) // 4
    site = site_of(lambda *inputs: documents(*inputs, offset), q, k, v, ids)
    if served:
        assert site.decision.rewritten
    else:
        assert site.decision.reason in (Reason.UNKNOWN_OFFSET, Reason.UNKNOWN_MASK)


@pytest.mark.parametrize("grouped", [False, True])
def test_more_rows_than_keys_later_on(grouped):
    """The graph was rewritten for fewer rows than keys; another call has more."""

    def function(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        n, m = q.shape[2], k.shape[2]
        i, j = torch.arange(n)[:, None] + (m - n), torch.arange(m)[None, :]
        keep = j <= i
        if grouped:
            keep = keep & (ids[i % 40] == ids[j])
        keep = keep | (i < 0)  # such rows see everything: not what an offset of fewer than 0 says
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)

    compiled = torch.compile(function, backend="mminference", options=EXACT.to_json(), dynamic=True)
    ids = torch.arange(40) // 4
    with torch.no_grad():
        for q_len, kv_len in ((9, 14), (8, 8), (9, 5), (12, 7), (5, 20)):
            q, k, v = heads(q_len), heads(kv_len), heads(kv_len)
            assert harness.relative_error(compiled(q, k, v, ids), function(q, k, v, ids)) < 1e-5


def test_offsets_are_compared_as_formulas():
    import sympy

    assert offset_is_suffix(sympy.Integer(3), 4, 7)
    assert not offset_is_suffix(sympy.Integer(2), 4, 7)


@pytest.mark.parametrize("form", ["sdpa", "eager"])
def test_dropout_in_training(form):
    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.25, is_causal=True)

    def by_hand(q, k, v):
        keep = torch.arange(N)[None, :] <= torch.arange(N)[:, None]
        weights = torch.softmax((q @ k.mT).masked_fill(~keep, -math.inf), -1)
        return F.dropout(weights, 0.25, training=True) @ v

    site = site_of(sdpa if form == "sdpa" else by_hand, heads(), heads(), heads())
    assert site.decision.reason is Reason.DROPOUT
    assert "0.25" in site.decision.detail


class Dropping(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0.0, is_causal=True)


@pytest.mark.parametrize("training", [False, True])
def test_dropout_follows_the_mode_of_the_model(training):
    site = site_of(Dropping().train(training), heads(), heads(), heads())
    assert site.decision.reason is (Reason.DROPOUT if training else None)


def test_gradients():
    assert site_of(causal, heads(), heads(), heads(), needs_grad=True).decision.reason is Reason.GRAD_ENABLED


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_with_a_kernel(dtype):
    assert site_of(causal, *[heads(dtype=dtype)] * 3).decision.rewritten


def test_casts_that_leave_more_than_one_dtype():
    def function(q, k, v):
        keep = torch.arange(N)[None, :] <= torch.arange(N)[:, None]
        scores = q.double() @ k.double().mT
        return torch.softmax(scores.masked_fill(~keep, -math.inf), -1).float() @ v

    site = site_of(function, heads(), heads(), heads())
    assert site.decision.reason is Reason.DTYPE
    assert "float64" in site.decision.detail


def test_autocast_that_changes_the_dtype():
    def function(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return causal(q, k, v)

    site = site_of(function, heads(), heads(), heads())
    assert site.decision.rewritten
    assert "bfloat16" in site.shapes


@pytest.mark.parametrize("dim", [8, 80, 256])
def test_head_dims_with_a_kernel(dim):
    assert site_of(causal, *[heads(dim=dim)] * 3).decision.rewritten


@pytest.mark.parametrize(("dim", "v_dim"), [(264, 264), (12, 12), (16, 8), (8, 16)])
def test_head_dims_without_a_kernel(dim, v_dim):
    site = site_of(causal, heads(dim=dim), heads(dim=dim), heads(dim=v_dim))
    assert site.decision.reason is Reason.HEAD_DIM
    assert str(dim) in site.decision.detail


def test_three_dimensions():
    inputs = [heads()[0] for _ in range(3)]
    assert site_of(causal, *inputs).decision.reason is Reason.SHAPE
    assert site_of(eager, *inputs).decision.rewritten


def test_weights_that_are_returned():
    def function(q, k, v):
        keep = torch.arange(N)[None, :] <= torch.arange(N)[:, None]
        weights = torch.softmax((q @ k.mT).masked_fill(~keep, -math.inf), -1)
        return weights @ v, weights

    site = site_of(function, heads(), heads(), heads())
    assert site.decision.reason is Reason.WEIGHTS_USED


def test_a_device_without_a_kernel():
    site = site_of(causal, *[heads().to("meta")] * 3)
    assert site.decision.reason is Reason.DEVICE
    assert site.decision.detail == "meta"


@pytest.mark.parametrize("name", ["prove_mask", "rewrite"])
def test_passes_that_were_skipped(name):
    options = Options(policy="exact", inner="eager", skip_passes=(name,))
    site = site_of(causal, heads(), heads(), heads(), options=options)
    assert site.decision.reason is Reason.SKIPPED
    assert site.decision.detail == name


def test_the_first_reason_stands():
    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, is_causal=True)

    site = site_of(function, *[heads(dim=12)] * 3, needs_grad=True)
    assert site.decision.reason is Reason.DROPOUT


def test_windows_of_symbolic_size_are_left_alone():
    def function(q, k, v):
        n = q.shape[2]
        i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i) & (i - j < n // 2))

    gm = captured(function, heads(), heads(), heads(), dynamic=True)
    _, report = rewrite_graph(gm, EXACT)
    assert report.sites[0].decision.reason is Reason.UNKNOWN_MASK


def merged(mask: Callable[[Tensor, Tensor], Tensor], where: str) -> Any:
    """Batch and heads in one dimension for the products, apart (or not) for the mask."""

    def function(q: Tensor, k: Tensor, live: Tensor) -> Tensor:
        b, h, n, d = q.shape
        q3, k3 = q.reshape(b * h, n, d), k.reshape(b * h, n, d)
        scores = torch.bmm(q3, k3.transpose(1, 2))
        visible = mask(torch.ones(n, n, dtype=torch.bool).tril(), live)
        if where == "apart":
            scores = scores.view(b, h, n, n).masked_fill(~visible, -math.inf).view(b * h, n, n)
        else:
            scores = scores.masked_fill(~visible, -math.inf)
        return torch.bmm(torch.softmax(scores, -1), k3).view(b, h, n, d)

    return function


def test_padding_belongs_to_the_batch_where_heads_are_told_apart_for_the_mask():
    live = torch.ones(2, N, dtype=torch.bool)
    live[0, N - 4 :] = False
    q, k = (torch.cat([heads(), heads() + n]) for n in (1, 2))
    function = merged(lambda causal, live: causal & live[:, None, None, :], "apart")
    gm = captured(function, q, k, live)
    after, report = rewrite_graph(gm, EXACT)
    assert report.sites[0].decision.rewritten
    assert report.sites[0].mask == "causal and padding"
    assert harness.relative_error(after(q, k, live)[0], gm(q, k, live)[0]) < 1e-5


def test_padding_repeated_for_merged_heads_is_left_alone():
    live = torch.ones(2, N, dtype=torch.bool)
    q = torch.cat([heads(), heads() + 1])
    function = merged(lambda causal, live: causal & live.repeat_interleave(2, 0)[:, None, :], "together")
    site = site_of(function, q, q + 1, live)
    assert site.decision.reason is Reason.UNKNOWN_MASK
