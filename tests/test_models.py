"""Whole models: exact logits, no N x N tensor in any rewritten graph, and the right modality of every token."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import mmi_compile
from mmi_compile import report, runtime
from tests import harness, models

pytestmark = pytest.mark.fresh_dynamo

TOKENS = 530
"""More than the widest tensor of any model, two batch elements of 256 logits, so that squares stand out."""

CONTEXTS: dict[str, type[AbstractContextManager[None]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


class Case(NamedTuple):
    model: str
    attn: str
    padding: str
    context: str
    dynamic: bool
    through: str


FACTORS: Case = Case(
    model=("plain_causal", "qwen2", "llama", "mistral", "llava", "qwen2_5_vl"),
    attn=("sdpa", "eager"),
    padding=("none", "left", "right"),
    context=tuple(CONTEXTS),
    dynamic=(False, True),
    through=("bare", "compile"),
)  # type: ignore[arg-type]  # here each field holds all of its levels


def pairs(case: Sequence[object]) -> set[tuple[int, object, int, object]]:
    """Every two factors of a case with their levels."""
    return {(a, case[a], b, case[b]) for a, b in itertools.combinations(range(len(case)), 2)}


def pairwise(factors: Sequence[Sequence[Any]]) -> list[Case]:
    """Few cases in which any two levels of any two factors meet: always the one that covers most of what is left."""
    everything = [Case(*levels) for levels in itertools.product(*factors)]
    left = set().union(*map(pairs, everything))
    chosen = []
    while left:
        best = max(everything, key=lambda case: len(pairs(case) & left))
        chosen.append(best)
        left -= pairs(best)
    return chosen


def build(case: Case, **arguments: Any) -> tuple[nn.Module, dict[str, Any]]:
    arguments |= {"tokens": TOKENS, "batch": 1 if case.padding == "none" else 2, "padding": case.padding}
    if case.model == "plain_causal":
        mask = "additive" if case.padding == "none" else "padding"
        # Rows without a visible key give NaN, which a second layer would spread.
        shape = models.Shape(layers=1 if case.padding == "left" else 2)
        return models.plain_causal(mask=mask, form=case.attn, gqa="expand", shape=shape, **arguments)
    if case.model == "qwen2_5_vl":
        arguments |= {"images": 1, "frames": 2}
    return models.build(case.model, attn=case.attn, **arguments)


def live_rows(inputs: dict[str, Any], output: Tensor) -> Tensor:
    live = inputs.get("attention_mask", inputs.get("padding", torch.ones(output.shape[:2])))
    return live.bool()


def run(model: Any, inputs: dict[str, Any]) -> Tensor:
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output.logits


def compiled(model: nn.Module, through: str, dynamic: bool, **options: Any) -> Any:
    if through == "bare":
        return torch.compile(model, backend="mminference", dynamic=dynamic, options=options)
    return mmi_compile.compile(model, dynamic=dynamic, **options)


def rewritten_graphs() -> list[report.GraphReport]:
    made = mmi_compile.last_report()
    assert made is not None
    assert not [graph.failure for graph in made.graphs if graph.failure]
    done = [graph for graph in made.graphs if any(site.decision.rewritten for site in graph.sites)]
    # Inductor may ask Dynamo to trace again (it does so to make a float input a constant); what ran is the last.
    return [graph for graph in done if runtime.attention_run(graph.sites[-1].key) is not None]


def runs_of(types: Tensor) -> list[list[list[object]]]:
    """Run-length encoding of each row, in the words of the report."""
    names = ("text", "image", "video")
    return [[[names[value], len(list(run))] for value, run in itertools.groupby(row.tolist())] for row in types]


def assert_modality_is_the_truth(inputs: dict[str, Any]) -> None:
    ids = inputs["input_ids"]
    truth = (ids == models.IMAGE_ID).long() + 2 * (ids == models.VIDEO_ID).long()
    graphs = rewritten_graphs()
    assert graphs
    for graph in graphs:
        prompt = graph.to_json()["modality"]["prompt"]
        assert prompt["runs"] == runs_of(truth)
        counts = {name: int((truth == value).sum()) for value, name in enumerate(("text", "image", "video"))}
        assert prompt["tokens"] == {name: count for name, count in counts.items() if count}


def test_the_chosen_cases_cover_every_pair():
    cases = pairwise(FACTORS)
    assert set().union(*map(pairs, cases)) == set().union(*map(pairs, itertools.product(*FACTORS)))
    assert len(cases) <= 24


@pytest.mark.parametrize("case", pairwise(FACTORS), ids=lambda case: "-".join(map(str, case)))
def test_exact_logits_equal_the_eager_models(case):
    model, inputs = build(case)
    with torch.no_grad():
        expected = run(model, inputs)
    report.forget()
    fast = compiled(model, case.through, case.dynamic, policy="exact", inner="eager")
    with CONTEXTS[case.context]():
        actual = run(fast, inputs)
    live = live_rows(inputs, expected)
    assert harness.relative_error(actual[live], expected[live]) < 1e-5

    graphs = rewritten_graphs()
    prefills = [site for graph in graphs for site in graph.sites if site.phase == "prefill"]
    layers = len(model.attention) if case.model == "plain_causal" else model.config.get_text_config().num_hidden_layers
    assert len(prefills) == layers
    assert all(site.decision.rewritten for site in prefills)
    for graph in graphs:
        harness.max_square(graph.rewritten, TOKENS)
    if case.model in ("llava", "qwen2_5_vl"):
        assert_modality_is_the_truth(inputs)


def test_max_square_would_have_seen_the_masks():
    """The check above means something: the graphs as captured do hold N x N tensors."""
    model, inputs = build(Case("qwen2", "sdpa", "left", "no_grad", False, "compile"))
    report.forget()
    with torch.no_grad():
        run(compiled(model, "compile", False, policy="exact", inner="eager"), inputs)
    (graph,) = rewritten_graphs()
    with pytest.raises(AssertionError, match="530 x 530"):
        harness.max_square(graph.original, TOKENS)


def test_many_images_and_a_video_in_a_padded_batch():
    model, inputs = models.qwen2_5_vl(images=3, frames=2, batch=2, padding="left", shape=models.Shape(layers=1))
    report.forget()
    with torch.no_grad():
        expected = run(model, inputs)
        actual = run(compiled(model, "compile", True, policy="exact", inner="eager"), inputs)
    live = live_rows(inputs, expected)
    assert harness.relative_error(actual[live], expected[live]) < 1e-5
    assert_modality_is_the_truth(inputs)


def test_without_the_processors_token_types():
    """The config's token ids are enough; positions then need not know images, so the outputs are not compared."""
    model, inputs = models.qwen2_5_vl(images=2, with_token_types=False, shape=models.Shape(layers=1))
    report.forget()
    with torch.no_grad():
        run(compiled(model, "compile", False, policy="exact", inner="eager"), inputs)
    assert_modality_is_the_truth(inputs)


@pytest.mark.parametrize(("name", "attn"), [("llava", "sdpa"), ("qwen2_5_vl", "eager")])
def test_adaptive_with_everything_required_is_exact_too(name, attn):
    model, inputs = models.build(name, attn=attn, tokens=200, shape=models.Shape(layers=1))
    report.forget()
    with torch.no_grad():
        expected = run(model, inputs)
        fast = compiled(model, "compile", False, policy="adaptive", recall=1.0, min_tokens=0, inner="eager")
        assert harness.relative_error(run(fast, inputs), expected) < 1e-5
    (graph,) = rewritten_graphs()
    assert graph.sites[0].to_json()["run"]["path"] == "tile-sparse PyTorch"


@pytest.mark.parametrize(
    ("name", "through"),
    [("qwen2_5_vl", "compile"), ("qwen2", "bare"), pytest.param("llava", "bare", marks=pytest.mark.slow)],
)
def test_whole_model_through_inductor(name, through):
    model, inputs = models.build(name, batch=2, padding="left", shape=models.Shape(layers=1))
    report.forget()
    with torch.no_grad():
        expected = run(model, inputs)
        actual = run(compiled(model, through, True, policy="exact"), inputs)
    live = live_rows(inputs, expected)
    assert harness.relative_error(actual[live], expected[live]) < 1e-5
    assert_modality_is_the_truth(inputs)


@pytest.mark.slow
def test_modality_crosses_the_graphs_that_inductor_compiles():
    """Bare compilation of Qwen2.5-VL: the masks are found in one graph and read in another, in compiled code."""
    model, inputs = models.qwen2_5_vl(images=2, frames=2, shape=models.Shape(layers=1))
    report.forget()
    fast = compiled(model, "bare", False, policy="exact")
    with torch.no_grad():
        expected = run(model, inputs)
        for _ in range(2):
            assert harness.relative_error(run(fast, inputs), expected) < 1e-5
            assert_modality_is_the_truth(inputs)
