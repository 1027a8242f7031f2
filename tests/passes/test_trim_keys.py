"""Keys that causality hides from every query are dropped, and nothing else is."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mmi_compile.options import Options
from mmi_compile.passes.nodes import tensor_of
from mmi_compile.report import GraphReport
from tests import harness
from tests.passes.test_pipeline import rewrite_graph

ROOM = 29
OPTIONS = Options(policy="exact", inner="eager")


def heads(n: int) -> Tensor:
    return torch.randn(1, 2, n, 8, generator=torch.Generator().manual_seed(n))


def masked(offset: int, window: int = 0) -> Any:
    def function(q: Tensor, k: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None] + offset, torch.arange(k.shape[2])
        visible = (j <= i) & (i - j < window) if window else j <= i
        return F.scaled_dot_product_attention(q, k, k, attn_mask=visible)

    return function


def rewritten(function: Any, *inputs: Any, dynamic: bool = False) -> tuple[fx.GraphModule, GraphReport]:
    """The last graph of the captured ones after all passes, which was seen to compute the same."""
    recorder = harness.capture(function, *inputs, dynamic=dynamic)
    gm = recorder.graphs[-1]
    after, report = rewrite_graph(gm, OPTIONS)
    assert not report.failure
    given = [x.node.hint if isinstance(x, torch.SymInt) else x for x in recorder.inputs[-1]]
    old, new = (graph(*given)[0] for graph in (gm, after))
    assert harness.relative_error(new, old) < 1e-5
    return after, report


def keys(gm: fx.GraphModule) -> Any:
    (call,) = [node for node in gm.graph.nodes if node.target is torch.ops.mmi.attention.default]
    tensor = tensor_of(call.args[1])
    assert tensor is not None
    return tensor.shape[2]


@pytest.mark.parametrize(
    ("q_len", "offset", "window"), [(7, 0, 0), (7, 5, 0), (7, 5, 3), (7, ROOM - 7, 0), (ROOM, 0, 4)]
)
def test_room_behind_the_prompt_is_dropped(q_len, offset, window):
    after, report = rewritten(masked(offset, window), heads(q_len), heads(ROOM))
    assert keys(after) == q_len + offset
    assert f"k [1, 2, {q_len + offset}, 8]" in report.sites[0].shapes
    assert (harness.count_ops(after, torch.ops.mmi.attention.default), len(report.sites)) == (1, 1)


def test_the_flag_counts_rows_from_the_first_key():
    after, _ = rewritten(lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True), heads(7), heads(ROOM))
    assert keys(after) == 7


def test_queries_beyond_the_last_key_need_all_keys():
    after, _ = rewritten(masked(5), heads(ROOM), heads(ROOM))
    assert keys(after) == ROOM


def test_the_offset_may_be_a_number_of_the_graph():
    def function(q: Tensor, k: Tensor, seen: int) -> Tensor:
        return masked(seen)(q, k)

    after, report = rewritten(function, heads(7), heads(ROOM), 9, dynamic=True)
    assert "causal with offset s" in report.sites[0].mask
    size = keys(after)
    assert size.node.hint == 16
    assert report.sites[0].decision.rewritten


def test_one_slice_serves_layers_that_share_keys():
    def function(q: Tensor, k: Tensor) -> Tensor:
        return masked(3)(masked(3)(q, k), k)

    recorder = harness.capture(function, heads(7), heads(ROOM))
    after, report = rewrite_graph(recorder.graphs[0], OPTIONS)
    calls = [node for node in after.graph.nodes if node.target is torch.ops.mmi.attention.default]
    assert len(calls) == len(report.sites) == 2
    assert len({call.args[1] for call in calls}) == 1


@pytest.mark.parametrize("offset", [-1, -7])
def test_positions_below_zero_are_no_prompt(offset):
    recorder = harness.capture(masked(offset), heads(7), heads(ROOM))
    after, report = rewrite_graph(recorder.graphs[0], OPTIONS)
    assert not report.sites[0].decision.rewritten
    assert harness.count_ops(after, torch.ops.mmi.attention.default) == 0


def test_decode_steps_stay():
    recorder = harness.capture(masked(5), heads(1), heads(ROOM))
    after, report = rewrite_graph(recorder.graphs[0], OPTIONS)
    assert after is recorder.graphs[0]
    assert report.sites[0].phase == "decode"


def test_what_is_left_alone_leaves_no_trace():
    """Keys are sliced before it turns out that dropout keeps an attention as it is."""

    def function(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        dropped = F.scaled_dot_product_attention(q, k, k, is_causal=True, dropout_p=0.5)
        return dropped, F.scaled_dot_product_attention(q + 1, k * 2, k * 2, is_causal=True)

    recorder = harness.capture(function, heads(7), heads(ROOM))
    after, report = rewrite_graph(recorder.graphs[0], OPTIONS)
    assert [site.decision.rewritten for site in report.sites] == [False, True]
    assert harness.count_ops(after, operator.getitem) == 2  # of k * 2 and of its twin
    assert all(node.users for node in after.graph.nodes if node.target is operator.getitem)
