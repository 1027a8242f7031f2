"""Which token is text, image or video, and on which grid: one real architecture for every way to carry it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import mmi_compile
from mmi_compile import generating, record, report, runtime
from mmi_compile.prompt_hook import PromptHook
from mmi_compile.record import IMAGE_ONLY, Record
from mmi_compile.runtime import ModalityRun
from mmi_compile.visual_segments import VisualSegment
from tests import families, harness, models

pytestmark = pytest.mark.fresh_dynamo

OPTIONS = {"policy": "exact", "inner": "eager"}
NOT_APART = f"image and video tokens share id {models.IMAGE_ID}: not told apart"


@pytest.fixture(autouse=True)
def _own_record() -> Any:
    record._state.__init__()
    report.forget()
    yield
    assert not record._state.hooked
    record._state.__init__()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[ModalityRun]:
    """What every graph with rewritten attention ran on."""
    seen: list[ModalityRun] = []
    monkeypatch.setattr(runtime, "record_modality", lambda key, run: seen.append(run))
    return seen


@pytest.fixture
def hooked(monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """The records of the pre-hook."""
    seen: list[Record] = []
    push = record.push_hooked

    def noting(made: Record) -> None:
        seen.append(made)
        push(made)

    monkeypatch.setattr(record, "push_hooked", noting)
    return seen


@pytest.fixture
def tags(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The masks that compiled graphs tagged."""
    seen: dict[str, Tensor] = {}
    tag = record.tag

    def noting(mask: Tensor, label: str) -> None:
        seen[label] = mask.clone()
        tag(mask, label)

    monkeypatch.setattr(record, "tag", noting)
    return seen


def run(case: families.Case, through: str, **options: Any) -> None:
    """One forward, compiled; its logits must be the model's."""
    chosen = {**OPTIONS, **options}
    with torch.no_grad():
        expected = case.model(**case.inputs).logits
        if through == "compile":
            compiled: Any = mmi_compile.compile(case.model, **chosen)
        else:
            compiled = torch.compile(case.model, backend="mminference", options=chosen)
        assert harness.relative_error(compiled(**case.inputs).logits, expected) < 1e-5


def segments_of(case: families.Case) -> list[VisualSegment]:
    found = []
    for modality, (frames, rows, columns), start, stride in case.media:
        stop = start + (frames - 1) * (stride or 0) + rows * columns
        name = "image_grid_thw" if modality == 1 else "video_grid_thw"
        found.append(VisualSegment(0, start, stop, modality, frames, rows, columns, stride, name))
    return found


CONFIG = "input_ids and config"
HOOKED = [
    ("qwen2_vl", {}, "mm_token_type_ids"),
    ("qwen2_5_vl", {}, "mm_token_type_ids"),
    ("qwen3_vl", {}, "mm_token_type_ids"),
    ("video_llama_3", {}, CONFIG),
    ("glm4v", {}, "mm_token_type_ids"),
    ("glm4v", {"videos": ()}, "mm_token_type_ids"),
    ("llava_onevision", {}, CONFIG),
    ("llava_next_video", {}, CONFIG),
    ("internvl", {}, f"{CONFIG} ({IMAGE_ONLY})"),
    ("smolvlm", {}, f"{CONFIG} ({IMAGE_ONLY})"),
]


@pytest.mark.parametrize(("family", "changes", "source"), HOOKED)
def test_the_pre_hook_knows_modality_and_grids(family, changes, source, runs):
    case = families.vision(family, **changes)
    run(case, "compile", strict=True)
    (ran,) = runs
    assert ran.source == source
    assert ran.ids.tolist() == case.types.tolist()
    assert list(ran.segments) == segments_of(case)
    assert ran.grid_note == ("" if family in families.GRID_FAMILIES else "the forward was given no grids")


BARE = [
    *(pytest.param(name, {}, "compiled graphs", marks=pytest.mark.slow) for name in ("qwen2_vl", "qwen2_5_vl")),
    ("video_llama_3", {}, "compiled graphs"),
    ("glm4v", {}, f"compiled graphs ({NOT_APART})"),
    ("llava_onevision", {}, "compiled graphs"),
    ("llava_next_video", {}, "compiled graphs"),
    ("internvl", {}, f"compiled graphs ({IMAGE_ONLY})"),
    ("smolvlm", {}, f"compiled graphs ({IMAGE_ONLY})"),
]


@pytest.mark.parametrize(("family", "changes", "source"), BARE)
def test_bare_graphs_know_modality(family, changes, source, runs):
    case = families.vision(family, **changes)
    run(case, "bare")
    (ran,) = runs
    assert ran.source == source
    if NOT_APART in source:
        vision = max(ran.labels)
        assert ran.labels == {vision: "vision"}
        assert ran.ids.tolist() == (case.types.clamp(max=1) * vision).tolist()
    else:
        assert ran.ids.tolist() == case.types.tolist()
    assert not ran.segments


@pytest.mark.parametrize("family", [pytest.param("qwen3_vl", marks=pytest.mark.slow), "gemma3"])
def test_bare_graphs_record_also_where_no_attention_reads(family, tags, runs):
    """Deepstack breaks the graph between mask and attention, and Gemma3 masks image blocks: these are left alone."""
    case = families.vision(family)
    run(case, "bare")
    assert not runs
    kinds, _ = record.told_apart(list(tags))
    assert record.merge(list(tags.values()), kinds)[0].tolist() == case.types.tolist()


def test_gemma3s_record(hooked):
    case = families.vision("gemma3")
    run(case, "compile")
    (made,) = hooked
    assert made.source == f"{CONFIG} ({IMAGE_ONLY})"
    assert made.ids.tolist() == case.types.tolist()


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_token_ids_and_brackets_serve_without_the_processors_types(family):
    """GLM4V marks frames by image tokens between a video's start and end."""
    case = families.vision(family, with_token_types=False)
    found = PromptHook(case.model).read((), case.inputs)
    assert (found.source, found.ids.tolist()) == (CONFIG, case.types.tolist())
    assert list(found.segments) == segments_of(case)


def test_explain_shows_grids_and_captures_deepstack_as_compile_does():
    case = families.vision("qwen3_vl")
    made = mmi_compile.explain(case.model, options=OPTIONS, **case.inputs)
    assert len(made.rewritten) == 1
    assert case.model.model.language_model._compiled_call_impl is None
    (graph,) = [graph for graph in made.graphs if graph.key and report.modality_to_json(graph.key)]
    told = graph.to_json()["modality"]["prompt"]
    assert told["source"] == "mm_token_type_ids"
    assert [grid["frame_stride"] for grid in told["grids"]] == [None, None, 10, 14]
    text = " ".join(str(made).split())
    assert "video 3 frames × 2 rows × 2 tokens · frame stride 10 at 44 [source: video_grid_thw]" in text
    assert "(video×4 text×6)×2" in text


@pytest.mark.parametrize("family", ["qwen2_5_vl", "video_llama_3"])
def test_generate_reads_the_grids_once(family, runs, hooked):
    case = families.vision(family)
    expected = case.model.generate(**case.inputs, max_new_tokens=3, do_sample=False).tolist()
    mmi_compile.compile(case.model, strict=True, **OPTIONS)
    assert case.model.generate(**case.inputs, max_new_tokens=3, do_sample=False).tolist() == expected
    (ran,) = runs
    assert list(ran.segments) == segments_of(case)
    assert len(hooked) == 3
    assert not any(made.segments or made.grid_note for made in hooked[1:])
    assert not generating._state.calls
    twin = copy.deepcopy(case.model)
    assert twin.generate.__self__ is twin


def test_a_model_fed_embeddings_never_sees_another_models_prompt(tags, runs):
    """The first model's attention is left alone, so its record is never read."""
    image = families.vision("gemma3")
    run(image, "bare")
    assert tags
    assert not runs
    model, _ = models.qwen2(shape=models.Shape(layers=1))
    embeddings = torch.randn(*image.types.shape, model.config.hidden_size)
    with torch.no_grad():
        torch.compile(model, backend="mminference", options=OPTIONS)(inputs_embeds=embeddings)
    (ran,) = runs
    assert ran.source == "none found"
    assert not ran.ids.any()


def test_a_language_model_alone_reads_where_features_go(runs):
    case = families.vision("qwen3_vl", videos=())
    text = case.model.model.language_model
    tokens = case.types.shape[1]
    arguments = {
        "inputs_embeds": torch.randn(1, tokens, text.config.hidden_size),
        "visual_pos_masks": case.types == 1,
        "deepstack_visual_embeds": [torch.randn(int(case.types.sum()), text.config.hidden_size)],
    }
    with torch.no_grad():
        mmi_compile.compile(text, **OPTIONS)(**arguments)
    (ran,) = runs
    assert ran.source == "visual_pos_masks (image and video are not told apart)"
    assert (ran.ids != 0).tolist() == (case.types == 1).tolist()
    assert ran.labels == {4: "vision"}
