"""What is found as attention, what is not, and what a site says."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmi_compile import report
from mmi_compile.decision import Reason
from mmi_compile.options import Options
from mmi_compile.passes import AttentionSite, PassContext
from mmi_compile.passes.canonicalize import Canonicalize
from mmi_compile.passes.find_attention import FindAttention
from mmi_compile.passes.nodes import tensor_of
from tests import harness

N = 11


def heads(count: int = 4, n: int = N, dim: int = 8) -> Tensor:
    return torch.randn(2, count, n, dim, generator=torch.Generator().manual_seed(count))


def found(function, *inputs: Tensor, dynamic: bool = False) -> list[AttentionSite]:
    recorder = harness.capture(function, *inputs, dynamic=dynamic, fullgraph=True)
    context = PassContext(options=Options(), graph_key="graph")
    harness.run_passes(recorder.graphs[0], [Canonicalize(), FindAttention()], context)
    return context.sites


def keep() -> Tensor:
    return torch.ones(N, N, dtype=torch.bool).tril()


def soft(scores: Tensor) -> Tensor:
    return torch.softmax(scores, -1)


def test_the_example_of_the_docstring():
    def function(q, kv, v, mask):
        k = kv[:, :, None].expand(2, 2, 2, N, 8).reshape(2, 4, N, 8)
        v = v[:, :, None].expand(2, 2, 2, N, 8).reshape(2, 4, N, 8)
        scores = q @ k.transpose(2, 3) * 0.25 + mask
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v

    q, k, v = heads(4).half(), heads(2).half(), heads(2).half() * 2
    (site,) = found(function, q, k, v, torch.zeros(N, N, dtype=torch.float16))
    assert site.open
    assert (site.form, site.scale, site.dropout_p, site.is_causal) == ("eager", 0.25, 0.0, False)
    assert [n.name for n in (site.q, site.k, site.v, site.mask)] == ["l_q_", "l_kv_", "l_v_", "l_mask_"]
    assert site.key == "graph/0"
    assert "q [2, 4, 11, 8] · k [2, 2, 11, 8] · float16" in site.shapes
    assert "test_find_attention.py" in site.source


def test_sdpa_gives_its_arguments():
    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5, dropout_p=0.1, enable_gqa=True)

    (site,) = found(function, heads(4), heads(2), heads(2))
    assert (site.form, site.scale, site.dropout_p, site.is_causal, site.mask) == ("sdpa", 0.5, 0.1, True, None)
    assert tensor_of(site.k).shape[1] == 2


def test_sizes_may_be_symbols():
    def function(q, k, v):
        group = q.shape[1] // k.shape[1]
        batch, count, n, dim = k.shape
        k, v = (a[:, :, None].expand(batch, count, group, n, dim).reshape(batch, -1, n, dim) for a in (k, v))
        return soft(q @ k.mT) @ v

    (site,) = found(function, heads(4), heads(2), heads(2), dynamic=True)
    assert tensor_of(site.q) is not None


@pytest.mark.parametrize("form", ["native", "repeated"])
def test_heads_that_are_symbols_are_taken_as_constants(form):
    def function(q, k, v):
        if form == "repeated":
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=form == "native")

    options = {"policy": "exact", "inner": "eager"}
    compiled = torch.compile(function, backend="mminference", options=options, dynamic=True)
    report.forget()
    with torch.no_grad():
        for q_heads, k_heads in ((6, 2), (6, 3), (5, 1), (7, 7)):
            inputs = heads(q_heads), heads(k_heads), heads(k_heads)
            torch.testing.assert_close(compiled(*inputs), function(*inputs))
    assert all(graph.sites[0].decision.rewritten for graph in report.remembered())


def test_the_scale_of_a_division():
    (site,) = found(lambda q, k: soft(q @ k.mT / math.sqrt(8)) @ k, heads(4), heads(4))
    assert site.scale == 1 / math.sqrt(8)


def test_a_fill_mask_becomes_what_sdpa_would_take():
    def function(q, k, mask):
        return soft((q @ k.mT).masked_fill(mask, -math.inf)) @ k

    (site,) = found(function, heads(4), heads(4), ~keep())
    assert site.mask.target is torch.logical_not


NOT_ATTENTION = {
    "softmax over channels": lambda q, k, m: torch.softmax(q, -1) * k,
    "softmax over queries": lambda q, k, m: torch.softmax(q @ k.mT, -2) @ k,
    "two products": lambda q, k, m: (q @ k.mT) @ k,
    "softmax of an input": lambda q, k, m: torch.softmax(m.float(), -1) @ k,
    "weights only": lambda q, k, m: soft(q @ k.mT),
    "a router": lambda q, k, m: soft(q @ k[0, 0].mT) @ k[0, 0],
    "a gate before a linear layer": lambda q, k, m: (q + soft(q + q @ k[0, 0, :8])) @ k[0, 0, :8],
    "weights on the right": lambda q, k, m: k.mT @ soft(q @ k.mT),
}


@pytest.mark.parametrize("name", NOT_ATTENTION)
def test_what_is_no_attention(name):
    assert found(NOT_ATTENTION[name], heads(4), heads(4), keep()) == []


UNREAD = {
    "soft cap": lambda q, k, m: soft(torch.tanh(q @ k.mT / 30.0) * 30.0) @ k,
    "a fill that hides nothing": lambda q, k, m: soft((q @ k.mT).masked_fill(m, -9.0)) @ k,
    "a scale for each head": lambda q, k, m: soft(q @ k.mT * torch.arange(4)[:, None, None]) @ k,
    "a mask before the scale": lambda q, k, m: soft((q @ k.mT + m) * 0.5) @ k,
    "a difference": lambda q, k, m: soft(q @ k.mT - m.float()) @ k,
    "twice the mask": lambda q, k, m: soft(torch.add(q @ k.mT, m, alpha=2)) @ k,
    "two masks": lambda q, k, m: soft((q @ k.mT).masked_fill(m, -math.inf).masked_fill(m.mT, -math.inf)) @ k,
    "scores as integers": lambda q, k, m: soft((q @ k.mT).to(torch.int64).float()) @ k,
}


@pytest.mark.parametrize("name", UNREAD)
def test_scores_that_cannot_be_read_are_reported(name):
    (site,) = found(UNREAD[name], heads(4), heads(4), keep())
    assert site.decision.reason is Reason.UNKNOWN_MASK
    assert "changes the scores" in site.decision.detail


def test_a_bias_is_a_mask_for_the_prover_to_refuse():
    (site,) = found(lambda q, k, b: soft(q @ k.mT + b) @ k, heads(4), heads(4), torch.randn(4, N, N))
    assert site.open
    assert site.mask.name == "l_b_"


def _returned(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    weights = soft(q @ k.mT)
    return weights @ k, weights


def _returned_before_the_cast(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    weights = soft(q @ k.mT)
    return weights.double() @ k.double(), weights


def _used_twice(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    weights = soft(q @ k.mT)
    return weights @ k, weights @ (k + 1)


def _changed(q: Tensor, k: Tensor) -> Tensor:
    return (soft(q @ k.mT) * torch.arange(4)[:, None, None]) @ k


@pytest.mark.parametrize("function", [_returned, _returned_before_the_cast, _used_twice, _changed])
def test_weights_that_somebody_else_uses(function):
    (site,) = found(function, heads(4), heads(4))
    assert site.decision.reason is Reason.WEIGHTS_USED
    assert "by" in site.decision.detail


SHAPES = {
    "two dimensions": ((N, 8), (N, 8), None),
    "broadcast batch": ((2, 4, N, 8), (1, 4, N, 8), None),
    "a mask of more heads": ((2, 1, N, 8), (2, 1, N, 8), (2, 3, N, N)),
    "one query head": ((2, 1, N, 8), (2, 3, N, 8), None),
}


@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes_are_left_alone(name):
    q, k, m = SHAPES[name]
    mask = torch.zeros(m or (N, N))
    (site,) = found(lambda q, k, m: soft(q @ k.mT + m) @ k, torch.randn(q), torch.randn(k), mask)
    assert site.decision.reason is Reason.SHAPE


def _merged(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:])


MERGED = {
    "views of the operands": lambda q, k: torch.bmm(soft(torch.bmm(_merged(q), _merged(k).mT)), _merged(k)),
    "a view of the scores": lambda q, k: torch.bmm(
        _merged(soft(torch.bmm(_merged(q), _merged(k).mT).view(2, 4, N, N) / 2.0)), _merged(k)
    ),
    "scaled in baddbmm": lambda q, k: torch.bmm(
        soft(torch.baddbmm(torch.zeros(8, N, N), _merged(q), _merged(k).mT, alpha=0.5)), _merged(k)
    ),
    "empty in baddbmm": lambda q, k: torch.bmm(
        soft(torch.baddbmm(torch.empty(8, N, N), _merged(q), _merged(k).mT, beta=0.0, alpha=0.5)), _merged(k)
    ),
}


@pytest.mark.parametrize("name", MERGED)
def test_heads_merged_with_the_batch_are_told_apart(name):
    (site,) = found(MERGED[name], heads(4), heads(4))
    assert site.open
    assert site.scale == (1.0 if name == "views of the operands" else 0.5)
    assert [node.name for node in (site.q, site.k, site.v)] == ["l_q_", "l_k_", "l_k_"]
    assert tensor_of(site.node).shape[1] == 4


def test_without_a_view_all_are_heads_of_one_batch_element():
    (site,) = found(lambda q, k: soft(q @ k.mT) @ k, heads(4)[0], heads(4)[0])
    assert site.open
    assert [tuple(tensor_of(node).shape) for node in (site.node, site.q, site.k)] == [(1, 4, N, 8)] * 3


def test_what_was_merged_may_have_changed_since():
    def function(q, k):
        flat = _merged(q)
        q.mul_(2.0)
        return soft(flat @ _merged(k).mT) @ _merged(k)

    (site,) = found(function, heads(4), heads(4))
    assert not site.open or site.q.name != "l_q_"


def _multihead(**arguments: Any) -> torch.nn.MultiheadAttention:
    return torch.nn.MultiheadAttention(16, 2, batch_first=True, **arguments).eval()


CLOSED = {
    "weights that are read": (_multihead(), lambda m, x: m(x, x, x), Reason.WEIGHTS_USED),
    "no batch": (_multihead(), lambda m, x: m(x[0], x[0], x[0], need_weights=False)[0], Reason.SHAPE),
    "an extra key": (_multihead(add_zero_attn=True), lambda m, x: m(x, x, x, need_weights=False)[0], Reason.SHAPE),
    "dropout": (_multihead(dropout=0.5).train(), lambda m, x: m(x, x, x, need_weights=False)[0], Reason.DROPOUT),
}


@pytest.mark.parametrize("name", CLOSED)
def test_a_closed_operator_is_named(name):
    module, call, reason = CLOSED[name]
    (site,) = found(lambda x: call(module, x), torch.randn(2, N, 16))
    assert (site.form, site.decision.reason) == ("closed", reason)
    assert "nn.MultiheadAttention" in site.decision.detail


def test_one_key_head_serves_all_query_heads():
    (site,) = found(lambda q, k: soft(q @ k.mT) @ k, heads(4), heads(1))
    assert site.open


NOT_REPEATED = {
    "other order": lambda x: x[:, None].expand(2, 2, 2, N, 8).reshape(2, 4, N, 8),
    "tiled": lambda x: x.repeat(1, 2, 1, 1),
    "interleaved tokens": lambda x: x.repeat_interleave(2, dim=2)[:, :, :N].repeat(1, 2, 1, 1),
    "per-head counts": lambda x: x.repeat_interleave(torch.tensor([1, 3]), dim=1, output_size=4),
    "part of the tokens": lambda x: x[:, :, None, :5].expand(2, 2, 2, 5, 8).reshape(2, 4, 5, 8),
}


@pytest.mark.parametrize("name", NOT_REPEATED)
def test_what_is_no_repetition_of_heads_is_not_folded(name):
    repeat = NOT_REPEATED[name]
    (site,) = found(lambda q, k: F.scaled_dot_product_attention(q, repeat(k), repeat(k)), heads(4), heads(2))
    assert site.open
    assert tensor_of(site.k).shape[1] == 4


def test_keys_repeated_otherwise_than_values_are_not_folded():
    def function(q, k):
        return F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), k.repeat(1, 2, 1, 1))

    (site,) = found(function, heads(4), heads(2))
    assert tensor_of(site.k).shape[1] == tensor_of(site.v).shape[1] == 4


class Layer(torch.nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(2))

    def forward(self, q: Tensor) -> Tensor:
        for layer in self.layers:
            q = layer(q)
        return q


def passing_on(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that names no argument, so that the module is ``args[0]``."""

    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return wrapper


class Decorated(Model):
    forward = passing_on(Model.forward)


@pytest.mark.parametrize("kind", [Model, Decorated])
def test_the_module_and_the_layer_of_a_site(kind: type[Model]) -> None:
    sites = found(kind(), heads(4))
    assert [(site.where, site.layer, site.key) for site in sites] == [
        ("layers.0", 0, "graph/0"), ("layers.1", 1, "graph/1"),
    ]  # fmt: skip
    assert all("in forward" in site.source for site in sites)
