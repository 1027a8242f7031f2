"""The tools of the other tests: graphs are recorded untouched, squares are seen, models run as they promise."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, product

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from tests import harness, models
from tests.pairs import pairwise

pytestmark = pytest.mark.fresh_dynamo

SDPA = F.scaled_dot_product_attention


@dataclass(frozen=True)
class Negate:
    """Negates the first output, in place or on a new graph module."""

    name: str = "negate"
    returns: bool = True

    def run(self, graph_module: fx.GraphModule, context: object) -> fx.GraphModule | None:
        output = graph_module.graph.output_node()
        with graph_module.graph.inserting_before(output):
            first = graph_module.graph.call_function(torch.neg, (output.args[0][0],))
        output.args = ((first, *output.args[0][1:]),)
        return graph_module if self.returns else None


@pytest.mark.parametrize("returns", [True, False])
def test_passes_run_on_a_copy(returns):
    model, inputs = models.plain_causal()
    recorder = harness.capture(model, **inputs)
    (gm,) = recorder.graphs
    (result,) = harness.run_passes(gm, [Negate(returns=returns)])
    assert harness.count_ops(gm, torch.neg) == 0
    assert harness.count_ops(result, torch.neg) == 1
    with torch.no_grad():
        torch.testing.assert_close(result(*recorder.inputs[0])[0], -gm(*recorder.inputs[0])[0])


def test_recorder_hands_its_inner_backend_a_copy():
    def inner(gm: fx.GraphModule, example_inputs: list[object]) -> fx.GraphModule:
        return harness.run_passes(gm, [Negate()])[-1]

    model, inputs = models.plain_causal()
    recorder = harness.Recorder(inner=inner)
    with torch.no_grad():
        actual = torch.compile(model, backend=recorder)(**inputs)
        torch.testing.assert_close(actual, -model(**inputs))
    assert harness.count_ops(recorder.graphs[0], torch.neg) == 0
    assert harness.count_ops(recorder.outputs[0], torch.neg) == 1


def test_count_ops_knows_functions_methods_and_packets():
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.ops.aten.add.Tensor, (x, x))
    graph.output(graph.call_method("view", (y, -1)))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    assert harness.count_ops(gm, torch.ops.aten.add) == 1
    assert harness.count_ops(gm, torch.ops.aten.add.Tensor) == 1
    assert harness.count_ops(gm, torch.ops.aten.add.Scalar) == 0
    assert harness.count_ops(gm, "view") == 1
    assert harness.count_ops(gm, "x") == 0


@pytest.mark.parametrize("dynamic", [False, True])
def test_max_square_sees_a_mask_and_passes_its_absence(dynamic):
    n, shape = 160, models.Shape(layers=1)
    for mask, has_square in (("bool", True), ("flag", False)):
        model, inputs = models.plain_causal(mask=mask, tokens=n, shape=shape)
        (gm,) = harness.capture(model, dynamic=dynamic, **inputs).graphs
        assert harness.count_ops(gm, SDPA) == 1
        if has_square:
            with pytest.raises(AssertionError, match="160 x 160"):
                harness.max_square(gm, n)
        else:
            assert 0 < harness.max_square(gm, n) < n * n


def test_max_square_refuses_a_graph_without_values():
    gm = fx.symbolic_trace(lambda x: x + 1)
    with pytest.raises(AssertionError, match="no node"):
        harness.max_square(gm, 4)


def test_relative_error():
    expected = torch.tensor([1.0, -4.0])
    assert harness.relative_error(expected, expected) == 0
    assert harness.relative_error(torch.tensor([1.0, -2.0]), expected) == 0.5
    with pytest.raises(AssertionError, match="shape"):
        harness.relative_error(expected[:1], expected)


@pytest.mark.parametrize("name", sorted({*models.BUILDERS} - {"plain_causal"}))
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_models_agree_between_attention_implementations(name, padding):
    logits = []
    for attn in ("sdpa", "eager"):
        model, inputs = models.build(name, attn=attn, batch=2, padding=padding)
        with torch.no_grad():
            logits.append(model(**inputs).logits)
    live = inputs["attention_mask"].bool()
    assert live.all() == (padding == "none")
    assert harness.relative_error(logits[1][live], logits[0][live]) < 1e-5


@pytest.mark.parametrize("mask", models.MASK_FORMS)
def test_plain_forms_agree(mask):
    outputs = []
    for form in ("sdpa", "eager"):
        for gqa in models.GQA_FORMS:
            model, inputs = models.plain_causal(mask=mask, form=form, gqa=gqa, batch=2)
            with torch.no_grad():
                outputs.append(model(**inputs))
    assert all(harness.relative_error(output, outputs[0]) < 1e-5 for output in outputs)


def test_models_are_the_same_every_time_and_leave_the_random_state_alone():
    before = torch.get_rng_state()
    first, second = (models.qwen2_5_vl(frames=2, seed=3) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first[0].parameters(), second[0].parameters(), strict=True))
    assert all(torch.equal(first[1][key], second[1][key]) for key in first[1])


def test_padding_without_a_mask_is_refused():
    with pytest.raises(ValueError, match="attention mask"):
        models.qwen2(padding="left", with_attention_mask=False)


def test_any_two_values_come_together():
    axes = ["abc", [0, 1], "xyzw", [True, False]]
    found = pairwise(*axes)
    assert len(found) == 12
    for a, b in combinations(range(4), 2):
        assert {(case[a], case[b]) for case in found} == set(product(axes[a], axes[b]))
