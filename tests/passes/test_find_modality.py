"""Where a graph learns which token is text, image or video."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import mmi_compile
from mmi_compile import record, report
from mmi_compile.backend import rewrite_graph
from mmi_compile.options import Options
from mmi_compile.report import GraphReport
from tests import harness, models

N, HIDDEN, IMAGE, VIDEO = 13, 16, 90, 91
EXACT = Options(policy="exact", inner="eager")
OPS = torch.ops.mmi


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    report.forget()
    record.begin_prompt()
    yield
    report.forget()


def prompt() -> Tensor:
    ids = torch.arange(1, N + 1)[None]
    ids[0, 2:6] = IMAGE
    ids[0, 8:11] = VIDEO
    return ids


TYPES = [0, 0, 1, 1, 1, 1, 0, 0, 2, 2, 2, 0, 0]


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "ids": prompt(),
        "table": torch.randn(100, HIDDEN, generator=generator),
        "image": torch.randn(4, HIDDEN, generator=generator),
        "video": torch.randn(3, HIDDEN, generator=generator),
    }


def attend(x: Tensor) -> Tensor:
    q = x.view(1, -1, 2, HIDDEN // 2).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def embed(ids: Tensor, table: Tensor, image: Tensor, video: Tensor) -> Tensor:
    x = F.embedding(ids, table)
    image_mask = (ids == IMAGE).unsqueeze(-1).expand_as(x)
    video_mask = (ids == VIDEO)[..., None].expand_as(x)
    return x.masked_scatter(image_mask, image).masked_scatter(video_mask, video)


def whole(ids: Tensor, table: Tensor, image: Tensor, video: Tensor) -> Tensor:
    return attend(embed(ids, table, image, video))


def rewritten(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[fx.GraphModule, GraphReport]:
    recorder = harness.capture(function, dynamic=False, fullgraph=True, **arguments)
    result, found = rewrite_graph(recorder.graphs[0], EXACT)
    assert not found.failure, found.failure
    old, new = recorder.graphs[0](*recorder.inputs[0]), result(*recorder.inputs[0])
    assert all(harness.relative_error(b, a) < 1e-5 for a, b in zip(old, new, strict=True))
    return result, found


def call_of(gm: fx.GraphModule, target: object) -> fx.Node:
    (node,) = [n for n in gm.graph.nodes if n.target is target]
    return node


def seen(found: GraphReport) -> list[int]:
    from mmi_compile import runtime

    return runtime.modality_run(found.key).ids[0].tolist()


def test_comparisons_of_the_same_graph_become_arguments():
    result, found = rewritten(whole, inputs())
    assert found.modality_source == "graph"
    assert found.modality_labels == ["image", "video"]
    assert len(call_of(result, OPS.modality.default).args[1]) == 2
    assert seen(found) == TYPES
    assert harness.count_ops(result, OPS.tag_modality) == 0


@pytest.mark.parametrize(
    "compare", [lambda ids: ids == IMAGE, lambda ids: torch.eq(input=ids, other=IMAGE), lambda ids: ids.eq(IMAGE)]
)
def test_any_way_to_compare(compare):
    def function(ids, table, image, video):
        x = F.embedding(ids, table)
        image_mask = compare(ids).unsqueeze(dim=-1)
        return attend(torch.where(image_mask, x.flip(1), x))

    _, found = rewritten(function, inputs())
    assert found.modality_source == "graph"
    assert seen(found) == [int(kind == 1) for kind in TYPES]


NO_MODALITY = {
    "another use": lambda ids, x: x * (ids == IMAGE).sum(),
    "not of integers": lambda ids, x: torch.where((x[..., 0] == 3.0).unsqueeze(-1), x, x + 1),
    "not two-dimensional": lambda ids, x: torch.where((ids[0] == IMAGE).unsqueeze(-1), x, x + 1),
    "another tensor": lambda ids, x: torch.where((ids == ids.flip(1)).unsqueeze(-1), x, x + 1),
}


@pytest.mark.parametrize("name", NO_MODALITY)
def test_what_says_nothing_about_modality(name):
    def function(ids, table, image, video):
        return attend(NO_MODALITY[name](ids, F.embedding(ids, table)))

    _, found = rewritten(function, inputs())
    assert found.modality_source == "record"
    assert seen(found) == [0] * N


def test_placed_features_say_where_vision_is_but_not_of_which_kind():
    def function(x, where, image):
        return attend(x.masked_scatter(where.unsqueeze(-1).expand_as(x), image))

    x = torch.randn(1, N, HIDDEN)
    where = torch.tensor(TYPES)[None] == 1
    result, found = rewritten(function, {"x": x, "where": where, "image": torch.randn(4, HIDDEN)})
    assert found.modality_source == "graph"
    assert len(call_of(result, OPS.modality.default).args[1]) == 1
    assert [int(kind > 0) for kind in seen(found)] == [int(kind == 1) for kind in TYPES]


@pytest.mark.parametrize("whole_rows", [True, False])
def test_rows_that_are_assigned_to_hold_features(whole_rows):
    def function(x, where, image):
        x = x.clone()
        if whole_rows:
            x[where, :] = image
        else:
            x[where] = image
        return attend(x)

    where = torch.tensor(TYPES)[None] == 1
    arguments = {"x": torch.randn(1, N, HIDDEN), "where": where, "image": torch.randn(4, HIDDEN)}
    _, found = rewritten(function, arguments)
    assert found.modality_source == "graph"
    assert found.modality_labels == ["vision"]
    assert [int(kind > 0) for kind in seen(found)] == [int(kind == 1) for kind in TYPES]


def test_one_id_under_two_names_is_vision():
    def function(ids, table, image, video):
        image_mask, video_mask = ids == IMAGE, ids == IMAGE
        x = F.embedding(ids, table)
        x = torch.where(image_mask.unsqueeze(-1), x.flip(1), x)
        return attend(torch.where(video_mask.unsqueeze(-1), x + 1, x))

    _, found = rewritten(function, inputs())
    from mmi_compile import runtime

    run = runtime.modality_run(found.key)
    assert run.labels == {4: "vision"}
    assert seen(found) == [4 * int(kind == 1) for kind in TYPES]
    assert f"image and video tokens share id {IMAGE}" in run.source


def test_a_wide_mask_that_is_an_input_is_narrowed():
    def function(x, image_mask, image):
        return attend(x.masked_scatter(image_mask, image))

    wide = (torch.tensor(TYPES) == 1)[None, :, None].expand(1, N, HIDDEN)
    arguments = {"x": torch.randn(1, N, HIDDEN), "image_mask": wide.clone(), "image": torch.randn(4, HIDDEN)}
    result, found = rewritten(function, arguments)
    assert found.modality_labels == ["image"]
    assert harness.count_ops(result, torch.select) == 1
    assert seen(found) == [int(kind == 1) for kind in TYPES]


def test_a_mask_made_after_the_first_attention_cannot_be_its_argument():
    def function(ids, table, image, video):
        y = attend(F.embedding(ids, table)).transpose(1, 2).reshape(1, N, HIDDEN)
        return y.masked_scatter((ids == IMAGE).unsqueeze(-1).expand_as(y), image)

    _, found = rewritten(function, inputs())
    assert found.modality_source == "record"


def test_a_graph_without_attention_records_for_later_graphs():
    result, found = rewritten(embed, inputs())
    assert found.tagged == ["image", "video"]
    assert harness.count_ops(result, OPS.tag_modality) == 2
    assert harness.count_ops(result, OPS.begin_prompt) == 1
    again, second = rewrite_graph(result, EXACT)
    assert again is result
    assert second.tagged == []


def test_the_embedding_of_a_prompt_begins_a_record_before_any_mask_is_recorded():
    result, _ = rewritten(embed, inputs())
    begin = call_of(result, OPS.begin_prompt.default)
    users = list(begin.users)
    assert [user.target for user in users] == [F.embedding]
    order = list(result.graph.nodes)
    tags = [n for n in order if n.target is OPS.tag_modality.default]
    assert all(order.index(begin) < order.index(tag) for tag in tags)


@pytest.mark.parametrize("ids", [torch.tensor([[5]]), torch.tensor([5, 6, 7])])
def test_other_lookups_begin_no_record(ids):
    recorder = harness.capture(lambda ids, table: F.embedding(ids, table) + 1, ids, torch.randn(9, 4), dynamic=False)
    gm = recorder.graphs[0]
    result, _ = rewrite_graph(gm, EXACT)
    assert result is gm


def test_tags_cross_a_graph_break():
    def function(**arguments):
        x = embed(**arguments)
        torch._dynamo.graph_break()
        return attend(x)

    with torch.no_grad():
        actual = torch.compile(function, backend="mminference", options={"policy": "exact", "inner": "eager"})(
            **inputs()
        )
    assert harness.relative_error(actual, whole(**inputs())) < 1e-5
    first, second = mmi_compile.last_report().graphs
    assert first.tagged == ["image", "video"]
    assert second.modality_source == "record"
    assert seen(second) == TYPES


def test_a_second_prompt_never_sees_the_first():
    def function(ids, table, image, video, place: bool):
        x = embed(ids, table, image, video) if place else F.embedding(ids, table)
        torch._dynamo.graph_break()
        return attend(x)

    compiled = torch.compile(function, backend="mminference", options={"policy": "exact", "inner": "eager"})
    with torch.no_grad():
        compiled(**inputs(), place=True)
        attending = mmi_compile.last_report().graphs[-1]
        assert seen(attending) == TYPES
        compiled(**inputs(), place=False)
    assert seen(attending) == [0] * N


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen2_5_vl_video"])
def test_whole_models_compiled_bare(name):
    model, arguments = models.build(name)
    with torch.no_grad():
        expected = model(**arguments).logits
        compiled = torch.compile(model, backend="mminference", options={"policy": "exact", "inner": "eager"})
        assert harness.relative_error(compiled(**arguments).logits, expected) < 1e-5
    prefill = [g for g in mmi_compile.last_report().graphs if any(s.decision.rewritten for s in g.sites)]
    types = torch.zeros_like(arguments["input_ids"])
    types[arguments["input_ids"] == models.IMAGE_ID] = 1
    types[arguments["input_ids"] == models.VIDEO_ID] = 2
    assert prefill
    assert all(seen(graph) == types[0].tolist() for graph in prefill)
