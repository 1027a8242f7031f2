"""What an attention becomes, what layers share, and what is erased afterwards."""

from __future__ import annotations

import math
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mmi_compile.backend import rewrite_graph
from mmi_compile.decision import Reason
from mmi_compile.kernels.ops import ABI
from mmi_compile.options import Options
from mmi_compile.passes.dataflow import cone, erase_dead, is_pure, may_alias, mutated_between, mutates
from mmi_compile.report import GraphReport
from tests import harness

OPS = torch.ops.mmi
N = 15
ARGUMENTS = (
    "q", "k", "v", "key_padding", "key_bounds", "modality", "segments", "scale", "q_offset", "window", "policy",
    "recall", "max_density", "min_tokens", "dense_tail", "heads", "layer", "layout", "key", "abi",
)  # fmt: skip


def heads(n: int = N, count: int = 2) -> Tensor:
    return torch.randn(2, count, n, 8, generator=torch.Generator().manual_seed(n))


def rewritten(
    function: Any, *inputs: Tensor, dynamic: bool = False, **options: Any
) -> tuple[fx.GraphModule, GraphReport]:
    recorder = harness.capture(function, *inputs, dynamic=dynamic, fullgraph=True)
    result, report = rewrite_graph(recorder.graphs[0], Options(**{"policy": "exact", "inner": "eager", **options}))
    assert not report.failure, report.failure
    return result, report


def calls(gm: fx.GraphModule, target: object) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target is target]


def arguments_of(gm: fx.GraphModule) -> dict[str, Any]:
    (node,) = calls(gm, OPS.attention.default)
    return dict(zip(ARGUMENTS, node.args, strict=True))


def masked(q: Tensor, k: Tensor, live: Tensor | None = None, window: int = 0) -> Tensor:
    n, m = q.shape[2], k.shape[2]
    i, j = torch.arange(n)[:, None] + (m - n), torch.arange(m)[None, :]
    keep = j <= i
    if window:
        keep = keep & (i - j < window)
    keep = keep[None, None]
    if live is not None:
        keep = keep & live[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, k, attn_mask=keep)


def test_the_example_of_the_docstring():
    gm, report = rewritten(masked, heads(), heads(), torch.ones(2, N, dtype=torch.bool))
    given = arguments_of(gm)
    assert [given[name].name for name in ("q", "k", "v", "key_padding")] == ["l_q_", "l_k_", "l_k_", "l_live_"]
    assert given["key_bounds"].target is OPS.key_bounds.default
    assert given["modality"].target is OPS.modality.default
    assert given["scale"] == pytest.approx(8**-0.5)
    assert (given["q_offset"], given["window"], given["abi"]) == (0, 0, ABI)
    assert (given["policy"], given["recall"], given["min_tokens"]) == ("exact", 0.95, -1)
    assert given["key"] == report.sites[0].key == f"{report.key}/0"
    assert {node.op for node in gm.graph.nodes} == {"placeholder", "call_function", "output"}
    assert len([n for n in gm.graph.nodes if n.op == "call_function"]) == 3


@pytest.mark.parametrize("scale", [None, 0.5, 2])
def test_the_scale(scale):
    gm, _ = rewritten(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=scale), heads())
    assert arguments_of(gm)["scale"] == pytest.approx(8**-0.5 if scale is None else float(scale))
    assert isinstance(arguments_of(gm)["scale"], float)


def test_window_and_constant_offset():
    gm, _ = rewritten(lambda q, k: masked(q, k, window=5), heads(), heads(N + 4))
    assert (arguments_of(gm)["window"], arguments_of(gm)["q_offset"]) == (5, 4)


def test_the_options_are_arguments():
    gm, report = rewritten(
        lambda q: masked(q, q), heads(), policy="adaptive", recall=0.5, max_density=0.25, min_tokens=7
    )
    given = arguments_of(gm)
    assert [given[k] for k in ("policy", "recall", "max_density", "min_tokens")] == ["adaptive", 0.5, 0.25, 7]
    assert report.sites[0].pattern == "adaptive(recall 0.5)"


def test_symbolic_offsets_are_computed_in_the_graph():
    gm, report = rewritten(masked, heads(), heads(N + 4), dynamic=True)
    assert report.sites[0].decision.rewritten
    assert arguments_of(gm)["q_offset"].target is operator.sub
    torch._dynamo.reset()
    options = {"policy": "exact", "inner": "eager"}
    compiled = torch.compile(masked, backend="mminference", options=options, dynamic=True)
    for n, m in ((N, N + 4), (6, 31)):
        with torch.no_grad():
            assert harness.relative_error(compiled(heads(n), heads(m)), masked(heads(n), heads(m))) < 1e-5


def layers(q: Tensor, k: Tensor, live: Tensor) -> Tensor:
    keep = (torch.arange(N)[None, :] <= torch.arange(N)[:, None])[None, None] & live[:, None, None, :]
    for _ in range(3):
        q = F.scaled_dot_product_attention(q, k, k, attn_mask=keep)
    return q


def test_layers_share_what_is_equal_for_all():
    gm, report = rewritten(layers, heads(), heads(), torch.ones(2, N, dtype=torch.bool))
    assert len(calls(gm, OPS.attention.default)) == 3
    assert len(calls(gm, OPS.key_bounds.default)) == len(calls(gm, OPS.modality.default)) == 1
    assert len({node.args[ARGUMENTS.index("key")] for node in calls(gm, OPS.attention.default)}) == 3
    assert len({site.key for site in report.sites}) == 3
    assert harness.count_ops(gm, F.scaled_dot_product_attention) == 0


def test_an_attention_may_read_another_ones_output_as_its_keys():
    def function(q, k):
        k = masked(q, k)
        wide = k.repeat_interleave(2, dim=1)
        return F.scaled_dot_product_attention(torch.cat([q, q], 1), wide, wide, is_causal=True)

    gm, report = rewritten(function, heads(), heads())
    first, second = calls(gm, OPS.attention.default)
    assert second.args[1] is second.args[2] is first
    assert all(site.decision.rewritten for site in report.sites)


def test_lengths_that_differ_have_a_modality_each():
    def function(q, k):
        return masked(q, q), masked(q, k)

    gm, _ = rewritten(function, heads(), heads(N + 4))
    assert [node.args[5] for node in calls(gm, OPS.modality.default)] == [N, N + 4]


def test_the_new_nodes_know_their_values_and_their_source():
    gm, _ = rewritten(masked, heads(), heads(), torch.ones(2, N, dtype=torch.bool))
    (node,) = calls(gm, OPS.attention.default)
    assert node.meta["example_value"].shape == (2, 2, N, 8)
    assert "in masked" in node.meta["stack_trace"]
    assert all("example_value" in n.meta for n in gm.graph.nodes if n.op == "call_function")


# --- cleanup ------------------------------------------------------------------------------------------------------


def test_masks_scores_and_repeated_heads_are_erased():
    def function(q, k):
        k = k[:, :, None].expand(2, 1, 2, N, 8).reshape(2, 2, N, 8)
        scores = torch.zeros(N, N).masked_fill_(torch.ones(N, N, dtype=torch.bool).triu_(1), -math.inf)
        return torch.softmax((q @ k.mT).mul_(0.5).add_(scores), -1) @ k

    gm, report = rewritten(function, heads(), heads(count=1))
    assert report.sites[0].decision.rewritten, report.sites[0].decision
    targets = [n.target for n in gm.graph.nodes if n.op.startswith("call")]
    assert targets == [OPS.modality.default, OPS.attention.default]


def test_an_unused_call_outside_of_the_attention_stays():
    def function(q, x):
        x.sin_()
        return masked(q, q)

    gm, _ = rewritten(function, heads(), torch.ones(3))
    assert harness.count_ops(gm, "sin_") == 1


def test_a_checked_condition_stays():
    def function(q, live):
        torch._assert_async(live.all())
        return masked(q, q, live)

    gm, _ = rewritten(function, heads(), torch.ones(2, N, dtype=torch.bool))
    assert harness.count_ops(gm, torch._assert_async) + harness.count_ops(gm, torch.ops.aten._assert_async) == 1


# --- dataflow -----------------------------------------------------------------------------------------------------


def graph_of(function: Any, *inputs: Tensor) -> dict[str, fx.Node]:
    gm = harness.capture(function, *inputs, dynamic=False, fullgraph=True).graphs[0]
    return {node.name: node for node in gm.graph.nodes}


def test_what_writes_and_what_is_pure():
    def function(x, y):
        a = x + 1
        a[0] = y
        b = a.clone().add_(1)
        c = torch.relu_(b.clone())
        d = F.relu(c.clone(), inplace=True)
        e = torch.add(a, y, out=torch.empty(3))
        return a, b, c, d, e

    nodes = graph_of(function, torch.ones(3), torch.ones(()))
    writing = {name for name, node in nodes.items() if mutates(node)}
    assert {nodes[name].target for name in writing} >= {operator.setitem, "add_"}
    assert len(writing) == 5
    pure = {name for name, node in nodes.items() if is_pure(node)}
    assert not pure & writing
    assert {"a"} <= pure


def test_views_alias_and_copies_do_not():
    def function(x):
        view = x.transpose(0, 1)[1:]
        copied = x.clone()
        parts = x.split(1)
        return view.view(2, 1, 2), copied, parts[1] + 1

    nodes = graph_of(function, torch.ones(2, 3))
    x = nodes["l_x_"]
    assert may_alias(x, nodes["view"])
    assert may_alias(nodes["parts"] if "parts" in nodes else nodes["split"], x)
    assert not may_alias(x, nodes["copied"])
    assert not may_alias(nodes["view"], nodes["copied"])


def test_writes_between_two_nodes():
    def function(x, y):
        a = x + 1
        b = a.view(-1)
        c = a * 2
        b.mul_(3)
        d = y * 2
        return a, c, d

    nodes = graph_of(function, torch.ones(2, 3), torch.ones(2))
    assert mutated_between(nodes["a"], nodes["d"], nodes["a"])
    assert mutated_between(nodes["c"], nodes["d"], nodes["a"])
    assert not mutated_between(nodes["a"], nodes["c"], nodes["a"])
    assert not mutated_between(nodes["a"], nodes["d"], nodes["c"])


def test_cones_and_dead_nodes():
    def function(x):
        a = x + 1
        b = a * 2
        b.add_(1)
        c = x * 3
        return c

    gm = harness.capture(function, torch.ones(2), dynamic=False, fullgraph=True).graphs[0]
    nodes = {node.name: node for node in gm.graph.nodes}
    assert cone(gm.graph, [nodes["b"]]) == {nodes["l_x_"], nodes["a"], nodes["b"]}
    candidates = set(gm.graph.nodes)
    # The sum is in place, but into memory that nobody sees.
    assert erase_dead(gm.graph, candidates) == 3
    assert [n.op for n in gm.graph.nodes] == ["placeholder", "call_function", "output"]


@pytest.mark.parametrize("seen", ["input", "view", "result"])
def test_in_place_calls_that_somebody_sees_are_not_dead(seen):
    def function(x):
        a = x if seen == "input" else x + 1
        b = a.view(-1)
        a.add_(1)
        return (b * 2 if seen == "view" else x * 2), (a if seen == "result" else x)

    gm = harness.capture(function, torch.ones(2), dynamic=False, fullgraph=True).graphs[0]
    erase_dead(gm.graph, set(gm.graph.nodes))
    assert harness.count_ops(gm, "add_") == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_padding_that_names_dead_keys_is_negated_once(dynamic: bool) -> None:
    layer = torch.nn.TransformerDecoderLayer(16, 2, 24, batch_first=True, norm_first=True)
    decoder = torch.nn.TransformerDecoder(layer, 2).eval()

    def function(x: Tensor, memory: Tensor, dead: Tensor) -> Tensor:
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        out: Tensor = decoder(x, memory, tgt_mask=later, tgt_key_padding_mask=dead, tgt_is_causal=False)
        return out

    x, memory, dead = torch.randn(2, N, 16), torch.randn(2, 5, 16), torch.zeros(2, N, dtype=torch.bool)
    dead[1, N - 4 :] = True
    gm, report = rewritten(function, x, memory, dead, dynamic=dynamic)
    reasons = [site.decision.reason for site in report.sites if site.decision is not None]
    assert reasons.count(None) == reasons.count(Reason.BIDIRECTIONAL) == 2  # attention to the memory is not causal
    assert len(calls(gm, OPS.key_bounds.default)) == 1
    compiled = torch.compile(function, backend="mminference", options={"policy": "exact", "inner": "eager"})
    with torch.no_grad():
        assert harness.relative_error(compiled(x, memory, dead)[~dead], function(x, memory, dead)[~dead]) < 1e-5
