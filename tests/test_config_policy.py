"""Head configs end to end: every head of a compiled model keeps exactly the pairs that its plan says."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmi_compile
from mmi_compile import report, runtime
from mmi_compile.decision import MMIError, Reason
from mmi_compile.head_config import Fingerprint, HeadConfig, HeadEntry, Provenance
from mmi_compile.kernels import dispatch
from mmi_compile.kernels.boundaries import build_bounded_plan
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.patterns import AShape, ByModality, Dense, Grid, HeadPattern, TriShape, VerticalSlash
from mmi_compile.kernels.reference import attention_reference
from mmi_compile.kernels.segments import segment
from tests import harness, models

pytestmark = pytest.mark.fresh_dynamo

TILES = TileShape(16, 16)
"""Small ones, so that short prompts have many."""
SHAPE = models.Shape()
NAMES = {0: "text", 1: "image", 2: "video"}

BY_ROWS = ByModality("q", AShape(4, 16), ((1, VerticalSlash(10, 4)), (2, Grid(16, 0, 8))))
BY_REGION = ByModality("2d", AShape(2, 16), (((1, 1), VerticalSlash(4, 6)), ((0, 1), AShape(8, 1)), ((2, 0), Dense())))
MIXED: list[list[HeadPattern]] = [
    [AShape(4, 20), BY_ROWS, BY_REGION, VerticalSlash(12, 8)],
    [BY_REGION, TriShape(4, 16, 20), Grid(None, 4, 16), BY_ROWS],
]
DENSE: list[list[HeadPattern]] = [[Dense()] * 4] * 2


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "CPU_TILES", TILES)
    report.forget()
    yield
    report.forget()


def config_of(
    layers: list[list[HeadPattern]] = MIXED, shape: models.Shape = SHAPE, names: dict[int, str] | None = None
) -> HeadConfig:
    fingerprint = Fingerprint(len(layers), shape.heads, shape.kv_heads, shape.head_dim)
    entries = tuple(tuple(HeadEntry(pattern) for pattern in layer) for layer in layers)
    return HeadConfig(fingerprint, entries, NAMES if names is None else names, Provenance("search", 1, 300))


def reference(
    model: nn.Module, inputs: dict[str, Any], layers: list[list[HeadPattern]], ids: Tensor, live: Tensor | None = None,
    dense_tail: bool = True,
) -> Tensor:  # fmt: skip
    """The model run eagerly, each of its causal attentions over the mask of its own plan."""
    sdpa, numbers = F.scaled_dot_product_attention, itertools.count()

    def masked(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        if q.shape[1:3] != (SHAPE.heads, ids.shape[1]):
            return sdpa(q, k, v, **rest)
        step = k.shape[1] // SHAPE.kv_heads
        k, v = k[:, ::step], v[:, ::step]
        g = Geometry(q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.shape[2], key_padding=live)
        heads, scale, groups = layers[next(numbers)], q.shape[3] ** -0.5, segment(ids, (0, 1, 2), g, TILES)
        plan = build_bounded_plan(heads, q, k, g, scale, TILES, groups, dense_tail=dense_tail)
        mask = plan.to_mask()
        assert dense_tail == bool(mask[0, :, -1].all()) or live is not None or heads[0] == Dense()
        return attention_reference(q, k, v, mask, scale)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", masked)
        out = run(model, inputs)
    assert next(numbers) == len(layers)
    return out


def run(model: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output.logits


def compiled(model: nn.Module, through: str = "bare", dynamic: bool = False, **options: Any) -> Any:
    chosen = {"policy": "config", "min_tokens": 0, "inner": "eager", **options}
    if through == "bare":
        return torch.compile(model, backend="mminference", dynamic=dynamic, options=chosen)
    return mmi_compile.compile(model, dynamic=dynamic, **chosen)


def sites() -> list[report.SiteReport]:
    made = mmi_compile.last_report()
    assert made is not None
    assert not [graph.failure for graph in made.graphs if graph.failure]
    return [site for site in made.sites if site.phase == "prefill"]


def plain(**arguments: Any) -> tuple[nn.Module, dict[str, Any], Tensor]:
    """A decoder without tokens, and the ids of a prompt of frames with a text stamp after each."""
    model, inputs = models.plain_causal(tokens=150, **arguments)
    length = inputs["x"].shape[1]
    ids = torch.where(torch.arange(length) % 30 < 24, 1 + torch.arange(length) // 90, 0)
    return model, inputs, ids.expand(inputs["x"].shape[0], -1).contiguous()


# --- what is computed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "padding", "through", "dynamic"),
    [
        ("llava", "none", "compile", False),
        ("llava", "left", "bare", False),
        ("qwen2_5_vl", "left", "compile", True),
        ("qwen2_5_vl", "right", "compile", False),
        ("qwen2_5_vl", "none", "bare", False),
    ],
)
def test_a_model_keeps_exactly_the_pairs_of_its_plans(name, padding, through, dynamic):
    arguments = {"images": 2, "frames": 2} if name == "qwen2_5_vl" else {}
    model, inputs = models.build(
        name, tokens=150, batch=1 if padding == "none" else 2, padding=padding, **arguments
    )  # fmt: skip
    tokens = inputs["input_ids"]
    ids = (tokens == models.IMAGE_ID).long() + 2 * (tokens == models.VIDEO_ID).long()
    live = None if padding == "none" else inputs["attention_mask"].bool()
    with torch.no_grad():
        dense = run(model, inputs)
    expected = reference(model, inputs, MIXED, ids, live)
    fast = compiled(model, through, dynamic, head_config=config_of(), strict=name == "llava" or through == "compile")
    with torch.no_grad():
        actual = run(fast, inputs)
    rows = torch.ones_like(tokens, dtype=torch.bool) if live is None else live
    assert harness.relative_error(actual[rows], expected[rows]) < 1e-5
    assert harness.relative_error(dense[rows], expected[rows]) > 1e-2, "the patterns dropped something"
    assert len(sites()) == 2
    for number, site in enumerate(sites()):
        assert site.decision is not None
        assert site.decision.rewritten
        assert not site.decision.fell_back
        assert site.pattern.startswith(f"config layer {number} (none: ")


@pytest.mark.parametrize("form", ["sdpa", "eager"])
@pytest.mark.parametrize("dense_tail", [True, False])
def test_ids_given_by_hand(dense_tail, form):
    model, inputs, ids = plain()
    expected = reference(model, inputs, MIXED, ids, dense_tail=dense_tail)
    other, _, _ = plain(form=form, gqa="enable_gqa" if form == "sdpa" else "expand")
    fast = compiled(other, head_config=config_of(), dense_tail=dense_tail, strict=True)
    with torch.no_grad(), mmi_compile.modality(ids):
        assert harness.relative_error(fast(**inputs), expected) < 1e-5
    with torch.no_grad(), mmi_compile.modality(torch.zeros_like(ids)):
        assert harness.relative_error(fast(**inputs), expected) > 1e-2, "other ids, other pairs"


def test_a_dense_config_is_exact():
    model, inputs, _ = plain(mask="padding", batch=2, padding="right")
    with torch.no_grad():
        expected = compiled(model, policy="exact")(**inputs)
        actual = compiled(model, head_config=config_of(DENSE))(**inputs)
    assert harness.relative_error(actual, expected) < 1e-6


def test_short_prompts_are_dense():
    model, inputs, _ = plain()
    with torch.no_grad():
        expected = model(**inputs)
        assert (
            harness.relative_error(compiled(model, head_config=config_of(), min_tokens=151)(**inputs), expected) < 1e-5
        )
    assert all(site.to_json()["run"]["path"] == "dense (150 tokens < min_tokens 151)" for site in sites())


def test_through_inductor_with_symbolic_lengths():
    model, inputs, ids = plain(shape=models.Shape(layers=1))
    fast = compiled(model, dynamic=True, head_config=config_of(MIXED[:1]), inner="inductor", strict=True)
    for length in (150, 93):
        short = {"x": inputs["x"][:, :length]}
        expected = reference(model, short, MIXED[:1], ids[:, :length])
        with torch.no_grad(), mmi_compile.modality(ids[:, :length]):
            assert harness.relative_error(fast(**short), expected) < 1e-5


def test_the_model_numbers_its_modalities_in_its_own_way():
    """Modalities are matched by name: here the config calls video 1, and the prompt's record 2."""
    model, inputs, ids = plain()
    video = torch.where(ids > 0, 2, 0)
    ours = [[ByModality("q", AShape(4, 16), ((1, VerticalSlash(10, 4)),))] * 4] * 2
    theirs = [[ByModality("q", AShape(4, 16), ((2, VerticalSlash(10, 4)),))] * 4] * 2
    expected = reference(model, inputs, theirs, video)
    fast = compiled(model, head_config=config_of(ours, names={0: "text", 1: "video"}))
    with torch.no_grad(), mmi_compile.modality(video):
        assert harness.relative_error(fast(**inputs), expected) < 1e-5


def test_what_the_config_does_not_know_is_text_and_said():
    model, inputs, ids = plain()
    config = config_of([[BY_ROWS] * 4] * 2, names={0: "text", 1: "image", 2: "depth"})
    with torch.no_grad(), mmi_compile.modality(torch.where(ids > 0, 3, 0)):
        actual = compiled(model, head_config=config)(**inputs)
    assert "the head config does not know audio: these tokens count as text" in str(mmi_compile.last_report())
    text = torch.zeros_like(ids)
    assert harness.relative_error(actual, reference(model, inputs, [[BY_ROWS] * 4] * 2, text)) < 1e-5


def test_without_any_modality_all_is_text_and_said():
    model, inputs, ids = plain()
    with torch.no_grad():
        actual = compiled(model, head_config=config_of())(**inputs)
    expected = reference(model, inputs, [[p if not isinstance(p, ByModality) else p.pattern(0, 0) for p in layer]
                                         for layer in MIXED], torch.zeros_like(ids))  # fmt: skip
    assert harness.relative_error(actual, expected) < 1e-5
    for site in sites():
        assert site.to_json()["run"]["notes"] == [
            "the modality of this prompt is not known: every token counts as text"
        ]
    assert "every token counts as text" in str(mmi_compile.last_report())


# --- which layer is which, and does the config fit ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"heads": 8, "kv_heads": 2}, "q_heads is 8 in the config and 4 in the model"),
        ({"kv_heads": 1}, "kv_heads is 1 in the config and 2 in the model"),
        ({"head_dim": 32}, "head_dim is 32 in the config and 16 in the model"),
        ({"layers": 1}, "layers is 1 in the config and 2 in the model"),
    ],
)
def test_a_config_of_another_model_is_not_used(change, text):
    model, inputs, _ = plain()
    shape = dataclasses.replace(SHAPE, **change)
    config = config_of([[AShape(1, 1)] * shape.heads] * shape.layers, shape)
    with torch.no_grad():
        expected = model(**inputs)
        assert harness.relative_error(compiled(model, head_config=config)(**inputs), expected) < 1e-5
    for site in sites():
        assert site.decision is not None
        assert site.decision.rewritten
        assert site.decision.reason is Reason.HEAD_CONFIG_MISFIT
        assert text in site.decision.detail
        assert site.to_json()["mend"]
    made = str(mmi_compile.last_report())
    assert "2 of 2 attentions rewritten in 1 graph · dense: 2 head_config_misfit" in made
    assert "the head config is for another model" in made
    torch._dynamo.reset()
    with pytest.raises(Exception, match="the head config is for another model") as caught, torch.no_grad():
        compiled(model, head_config=config, strict=True)(**inputs)
    assert (
        isinstance(caught.value, MMIError) or isinstance(caught.value.__cause__, MMIError) or text in str(caught.value)
    )


def test_vision_towers_are_no_layers():
    """Bare compilation captures the tower as well; it attends in both directions."""
    model, inputs = models.llava(tokens=150)
    with torch.no_grad():
        run(compiled(model, head_config=config_of()), inputs)
    assert len(sites()) == 2
    made = mmi_compile.last_report()
    assert made is not None
    towers = [site for site in made.sites if site.phase == "encoder"]
    assert towers
    assert all(site.decision.reason is Reason.BIDIRECTIONAL for site in towers)


def attend(x: Tensor) -> Tensor:
    heads = x.view(*x.shape[:2], 4, 16).transpose(1, 2)
    pairs = heads[:, ::2]
    y = F.scaled_dot_product_attention(heads, pairs, pairs, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2).flatten(2)


def test_functions_without_modules_are_taken_in_order():
    def two(x):
        return attend(attend(x) + x)

    x = torch.randn(1, 90, 64, generator=torch.Generator().manual_seed(0))
    layers: list[list[HeadPattern]] = [[AShape(0, 8)] * 4, [AShape(16, 16)] * 4]
    with torch.no_grad():
        compiled(two, head_config=config_of(layers))(x)
    assert [site.pattern.partition(" (")[0] for site in sites()] == ["config layer 0", "config layer 1"]
    report.forget()
    with torch.no_grad():
        compiled(attend, head_config=config_of(layers))(x)
    (site,) = sites()
    assert site.decision is not None
    assert site.decision.reason is Reason.LAYER_UNKNOWN
    assert "2 layers have 1 attentions in this graph" in site.decision.detail


def dense_everywhere(reason: Reason, detail: str) -> None:
    assert sites()
    for site in sites():
        assert site.decision is not None
        assert site.decision.rewritten
        assert site.decision.reason is reason
        assert detail in site.decision.detail


def test_a_graph_that_several_layers_share_is_dense():
    """A break within the loop over layers: Dynamo compiles one frame for all of them."""
    model, inputs, _ = plain()
    with torch.no_grad():
        expected = model(**inputs)
        model.mlp[0].forward = torch._dynamo.disable(model.mlp[0].forward)  # type: ignore[method-assign]
        assert harness.relative_error(compiled(model, head_config=config_of())(**inputs), expected) < 1e-5
    dense_everywhere(Reason.LAYER_UNKNOWN, "the graph names no modules, and 2 layers have 1 attentions")


def test_a_config_of_more_layers_is_not_used():
    """The layers may be those of a part of the model, which count from 0 in each part."""
    model, inputs, _ = plain()
    with torch.no_grad():
        expected = model(**inputs)
        fast = compiled(model, head_config=config_of([MIXED[0]] * 5))
        assert harness.relative_error(fast(**inputs), expected) < 1e-5
    dense_everywhere(Reason.LAYER_UNKNOWN, "the graph ends before layer 4, and 5 layers have 2 attentions")


def test_a_skipped_pass_leaves_attention_dense_and_says_so():
    model, inputs, _ = plain()
    fast = compiled(model, head_config=config_of(), skip_passes=("assign_patterns",))
    with torch.no_grad():
        assert harness.relative_error(fast(**inputs), model(**inputs)) < 1e-5
    assert {site.decision.reason for site in sites()} == {Reason.SKIPPED}


# --- graphs, digests, reports ------------------------------------------------------------------------------------


def test_layers_share_one_grouping():
    model, inputs, _ = plain(mask="padding", batch=2, padding="left")
    with torch.no_grad():
        compiled(model, head_config=config_of())(**inputs)
    (graph,) = mmi_compile.last_report().graphs
    assert harness.count_ops(graph.rewritten, torch.ops.mmi.segments) == 1
    assert harness.count_ops(graph.rewritten, torch.ops.mmi.attention) == 2
    report.forget()
    torch._dynamo.reset()
    with torch.no_grad():
        compiled(model, head_config=config_of([[AShape(4, 8)] * 4] * 2))(**inputs)
    (graph,) = mmi_compile.last_report().graphs
    assert harness.count_ops(graph.rewritten, torch.ops.mmi.segments) == 0


def test_the_content_of_a_config_names_the_graph(tmp_path):
    model, inputs, _ = plain()
    config = config_of()
    for name in ("a.json", "b.json"):
        config.save(tmp_path / name)
    keys = []
    for given in (config, tmp_path / "a.json", str(tmp_path / "b.json"), config.to_json(), config_of(DENSE)):
        torch._dynamo.reset()
        report.forget()
        with torch.no_grad():
            compiled(model, head_config=given)(**inputs)
        keys.append(mmi_compile.last_report().graphs[0].key)
    assert len(set(keys[:4])) == 1
    assert keys[4] != keys[0]


def test_the_report_tells_what_runs_and_where_it_comes_from():
    model, inputs, ids = plain()
    with torch.no_grad(), mmi_compile.modality(ids):
        compiled(model, head_config=config_of())(**inputs)
    made = mmi_compile.last_report()
    text = str(made)
    assert (
        "head config for 2 layers of 4 query and 2 kv heads, head dim 16; from search · 1 sample of 300 tokens" in text
    )
    assert "head 1: q(image: vertical_slash(10, 4), video: grid(16, 0, 8), else: a_shape(4, 16)): density" in text
    plain_json = json.loads(json.dumps(made.to_json()))
    assert plain_json["options"]["head_config"]["provenance"]["source"] == "search"
    assert "layers" not in plain_json["options"]["head_config"]
    ran = plain_json["graphs"][0]["attentions"][0]["run"]
    assert len(ran["patterns"]) == 1
    assert len(ran["patterns"][0]) == len(ran["density_per_head"]) == 4
    assert all(0 < density < 1.5 for density in ran["density_per_head"])


# --- observers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["adaptive", "exact", "config"])
def test_observers_see_every_attention_and_may_replace_it(policy):
    model, inputs, ids = plain()
    options = {"head_config": config_of()} if policy == "config" else {}
    fast = compiled(model, policy=policy, **options)
    seen: list[runtime.AttentionCall] = []

    def watch(call: runtime.AttentionCall) -> Tensor | None:
        seen.append(call)
        return None

    with torch.no_grad(), mmi_compile.modality(ids):
        expected = fast(**inputs)
        with runtime.observing_attention(watch):
            assert torch.equal(fast(**inputs), expected)
    assert [call.layer for call in seen] == [0, 1]
    assert [call.key for call in seen] == [site.key for site in sites()]
    for call in seen:
        assert (call.q.shape, call.k.shape) == ((1, 4, 150, 16), (1, 2, 150, 16))
        assert call.geometry.kv_len == 150
        assert call.modality is not None
        assert torch.equal(call.modality.long(), ids)
        assert call.known
        assert call.names[2] == "video"

    def exact(call: runtime.AttentionCall) -> Tensor:
        return attention_reference(call.q, call.k, call.v, call.geometry.to_mask()[:, None], call.scale)

    with torch.no_grad(), runtime.observing_attention(exact):
        assert harness.relative_error(fast(**inputs), model(**inputs)) < 1e-5
    assert {site.to_json()["run"]["path"] for site in sites()} == {"given by an observer"}
    with torch.no_grad():
        fast(**inputs)
    assert "given by an observer" not in {site.to_json()["run"]["path"] for site in sites()}
    with torch.no_grad(), pytest.raises(MMIError, match="an observer gave"), runtime.observing_attention(lambda c: c.k):
        fast(**inputs)
    assert runtime.attention_observer() is None
