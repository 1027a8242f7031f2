"""Reports: one golden text, one golden graph, and what programs may rely on."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmi_compile
from mmi_compile import report, runtime
from mmi_compile.decision import Decision, Reason
from mmi_compile.visual_segments import VisualSegment
from tests import models

pytestmark = pytest.mark.fresh_dynamo

GOLDEN = Path(__file__).resolve().parent / "golden"
IMAGE = 7
OPTIONS = {"policy": "exact", "inner": "eager"}


@pytest.fixture(autouse=True)
def _own_report() -> None:
    report.forget()


class Encoder(nn.Module):
    def forward(self, patches: Tensor) -> Tensor:
        x = patches[None, None]
        return patches + F.scaled_dot_product_attention(x, x, x)[0, 0]


class Layer(nn.Module):
    def __init__(self, learned_mask: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.learned_mask = learned_mask

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, 2, 8).permute(2, 0, 3, 1, 4)
        if self.learned_mask:
            mask = mask & (x[:, None, :, :1] > -1e9)
        return x + F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class TinyVLM(nn.Module):
    """Every kind of attention that a report tells apart, in code that does not change with a library's version."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.encoder = Encoder()
        self.layers = nn.ModuleList(Layer(learned) for learned in (False, False, True))

    def forward(self, ids: Tensor, live: Tensor, patches: Tensor) -> Tensor:
        image = ids == IMAGE
        x = self.embed(ids).masked_scatter(image.unsqueeze(-1), self.encoder(patches))
        position = torch.arange(ids.shape[1], device=ids.device)
        mask = (position[None, :] <= position[:, None]) & live.bool()[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        return x


def tiny() -> tuple[TinyVLM, dict[str, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ids = torch.tensor([[1, 2, *[IMAGE] * 4, 3, 4, 5], [0, 0, 1, *[IMAGE] * 4, 2, 3]])
        return TinyVLM().eval(), {"ids": ids, "live": (ids > 0).long(), "patches": torch.randn(8, 16)}


def assert_golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("MMI_ACCEPT") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text, f"{name} changed; if that is meant, run again with MMI_ACCEPT=1"


def without_versions(text: str) -> str:
    """Drop what changes with a version of Python, torch or this file: line numbers, hashes, node counts."""
    text = re.sub(r"\.py:\d+", ".py:LINE", text)
    text = re.sub(r"\b[0-9a-f]{12}\b", "KEY", text)
    text = re.sub(r"\d+ → \d+ nodes", "A → B nodes", text)
    return text.replace(f"mmi_compile {mmi_compile.__version__}", "mmi_compile VERSION")


def only_code(text: str) -> str:
    """The statements, without the comments between them that name files and lines."""
    text = re.sub(r"\.__eq__\((\w+)\)", r" == \1", without_versions(text))  # printed so before torch 2.13
    lines = [line.rstrip() for line in text.splitlines()]
    return "\n".join(line for line in lines if line and not line.lstrip().startswith("#")) + "\n"


def test_golden_report():
    model, inputs = tiny()
    assert_golden("report.txt", without_versions(str(mmi_compile.explain(model, options=OPTIONS, **inputs))) + "\n")


def test_golden_json():
    model, inputs = tiny()
    told = mmi_compile.explain(model, options=OPTIONS, **inputs).to_json()
    told["versions"] = sorted({"python", "torch"} & set(told["versions"]))
    told["version"] = "VERSION"
    (graph,) = told["graphs"]
    graph["nodes"] = sorted(graph["nodes"])
    graph["seconds"] = sorted(graph["seconds"])
    text = json.dumps(told, indent=1, ensure_ascii=False) + "\n"
    assert_golden("report.json", without_versions(text))


def test_golden_rewritten_graph():
    model, inputs = tiny()
    assert_golden("rewritten_graph.py", only_code(mmi_compile.explain(model, options=OPTIONS, **inputs).code()))


def test_the_rewritten_graph_is_the_model():
    model, inputs = tiny()
    fast = torch.compile(model, backend="mminference", options=OPTIONS)
    with torch.no_grad():
        live = inputs["live"].bool()
        torch.testing.assert_close(fast(**inputs)[live], model(**inputs)[live])


def test_code_before_and_after():
    model, inputs = tiny()
    made = mmi_compile.explain(model, options=OPTIONS, **inputs)
    before, after = made.code(before=True), made.code()
    assert "mmi.attention" not in before
    assert before.count("_nn.scaled_dot_product_attention(") == 4
    assert after.count("torch.ops.mmi.attention.default(") == 2
    assert after.count("_nn.scaled_dot_product_attention(") == 2


def test_json():
    model, inputs = tiny()
    made = mmi_compile.explain(model, options=OPTIONS, **inputs)
    told = json.loads(json.dumps(made.to_json()))
    assert told == json.loads(made.dumps())
    assert told["schema"] == report.SCHEMA_VERSION == 1
    assert told["version"] == mmi_compile.__version__
    assert told["summary"] == made.summary()
    assert told["summary"].startswith("2 of 4 attentions rewritten in 1 graph · left alone: ")
    assert told["options"]["policy"] == "exact"
    (graph,) = told["graphs"]
    assert graph["modality"]["prompt"]["tokens"] == {"text": 10, "image": 8}
    assert graph["modality"]["prompt"]["segments"] == {"text": 4, "image": 2}
    assert graph["modality"]["prompt"]["runs"][1] == [["text", 3], ["image", 4], ["text", 2]]
    reasons = sorted(str(site["reason"]) for site in graph["attentions"])
    assert reasons == ["BIDIRECTIONAL", "None", "None", "UNKNOWN_MASK"]
    for site in graph["attentions"]:
        assert site["rewritten"] == (site["reason"] is None)
        assert bool(site["mend"]) == (site["reason"] is not None)
        assert (site["run"] is not None) == site["rewritten"]
        assert "test_report.py" in site["source"]
    assert all(seconds >= 0 for seconds in graph["seconds"].values())


def test_json_of_options_that_hold_code():
    model, inputs = models.plain_causal(shape=models.Shape(layers=1))
    fast = torch.compile(model, backend="mminference", options={"inner": lambda gm, example_inputs: gm.forward})
    with torch.no_grad():
        fast(**inputs)
    json.dumps(mmi_compile.last_report().to_json())


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name)
def test_every_reason_says_what_and_what_to_do(reason):
    assert reason.message
    assert reason.mend
    decision = Decision.left(reason, "this fact")
    assert str(decision) == f"left alone: {reason.message} (this fact)"
    assert str(Decision.left(reason)) == f"left alone: {reason.message}"


def test_reasons_are_distinct():
    assert len({reason.message for reason in Reason}) == len(list(Reason)) == len(Reason.__members__)


def test_last_report_and_forget():
    assert mmi_compile.last_report() is None
    model, inputs = models.plain_causal(shape=models.Shape(layers=1))
    fast = torch.compile(model, backend="mminference", options=OPTIONS)
    with torch.no_grad():
        for _ in range(3):
            fast(**inputs)
    (site,) = mmi_compile.last_report().sites
    run = site.to_json()["run"]
    assert (run["q_len"], run["kv_len"], run["calls"], run["path"]) == (33, 33, 3, "dense (policy exact)")
    assert (run["density"], run["patterns"]) == (1.0, [])
    report.forget()
    assert mmi_compile.last_report() is None
    assert runtime.attention_run(site.key) is None
    assert site.to_json()["run"] is None


def test_reports_are_shared_between_threads():
    model, inputs = models.plain_causal(shape=models.Shape(layers=1))
    fast = torch.compile(model, backend="mminference", options=OPTIONS)

    def work() -> None:
        with torch.no_grad():
            fast(**inputs)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert mmi_compile.last_report().summary() == "1 of 1 attentions rewritten in 1 graph"


def test_adaptive_patterns_are_told_per_head_and_batch_element():
    model, inputs = models.plain_causal(tokens=300, batch=2, shape=models.Shape(layers=1))
    made = mmi_compile.explain(model, options={"min_tokens": 0, "recall": 0.5, "max_density": 1.0}, **inputs)
    run = made.sites[0].to_json()["run"]
    assert [len(heads) for heads in run["patterns"]] == [4, 4]
    assert len(run["density_per_head"]) == 4
    assert run["density"] == pytest.approx(sum(run["density_per_head"]) / 4)
    assert "(batch element 0 of 2)" in " ".join(str(made).split())


def test_labels_of_the_prompt_survive():
    runtime.record_modality("g", runtime.ModalityRun("masks", torch.tensor([[0, 4, 4, 9]]), {4: "depth"}))
    told: Any = report.modality_to_json("g")
    assert told["tokens"] == {"text": 1, "depth": 2, "modality 9": 1}
    assert told["runs"] == [[["text", 1], ["depth", 2], ["modality 9", 1]]]
    assert report.modality_to_json("never ran") is None


def _prompt_lines(ids: Tensor, **about: Any) -> list[str]:
    from mmi_compile import report_text

    runtime.record_modality("g", runtime.ModalityRun("masks", ids, **about))
    return report_text._prompt(report.GraphReport("g", mmi_compile.Options(), None))  # type: ignore[arg-type]


def test_thousands_of_runs_are_a_few_lines():
    regular = torch.tensor([[0] * 5 + ([2] * 4 + [0] * 2) * 3000])
    assert _prompt_lines(regular)[1].split() == ["text×5", "(video×4", "text×2)×3000"]
    generator = torch.Generator().manual_seed(0)
    lines = _prompt_lines(torch.randint(0, 3, (1, 9000), generator=generator))
    assert len(lines) <= 4
    assert re.search(r"… \d{4} +more", " ".join(lines))


def test_grids_are_told_and_alike_ones_counted():
    ids = torch.tensor([[0, 2, 2]])
    segments = [VisualSegment(0, 10 * i, 10 * i + 8, 2, 2, 2, 2, 4, "video_grid_thw") for i in range(40)]
    segments += [VisualSegment(1, 3, 7, 1, 1, 1, 4, None, "image_grid_thw")]
    lines = _prompt_lines(ids, segments=tuple(segments), grid_note="something")
    assert " ".join(" ".join(lines[2:]).split()) == (
        "grids video 2 frames × 2 rows × 2 tokens · frame stride 4 at 0 and 39 more alike [source: video_grid_thw]"
        " image 1 rows × 4 tokens at 3 of batch element 1 [source: image_grid_thw]"
        " not known: something"
    )
    told = report.modality_to_json("g")
    assert told["grids"][-1] == {
        "batch": 1, "start": 3, "stop": 7, "modality": "image", "frames": 1, "rows": 1, "tokens_per_row": 4,
        "frame_stride": None, "source": "image_grid_thw",
    }  # fmt: skip
    assert told["grid_note"] == "something"
    different = [VisualSegment(0, i, i + 1, 1, 1, 1, i + 1, None, "image_grid_thw") for i in range(500)]
    lines = _prompt_lines(ids, segments=tuple(different))
    assert lines[-1].split() == ["…", "494", "more"]


def test_an_empty_prompt_and_an_empty_report():
    runtime.record_modality("g", runtime.ModalityRun("none found", torch.zeros(1, 0, dtype=torch.int8)))
    assert report.modality_to_json("g")["tokens"] == {}
    empty = report.Report([])
    assert empty.summary() == "0 of 0 attentions rewritten in 0 graphs"
    assert "no attention was found" in str(empty)
    assert empty.code() == ""
    json.dumps(empty.to_json())


def test_dump_writes_the_graphs(tmp_path):
    model, inputs = tiny()
    fast = torch.compile(model, backend="mminference", options={**OPTIONS, "dump": str(tmp_path)})
    with torch.no_grad():
        fast(**inputs)
    texts = [path.read_text() for path in sorted(tmp_path.rglob("*.py"))]
    assert "mmi.attention.default(" not in texts[0]
    assert any("mmi.attention.default(" in text for text in texts)


def test_passes_that_did_not_run_are_told():
    model, inputs = tiny()
    made = mmi_compile.explain(model, options={**OPTIONS, "passes_until": "canonicalize"}, **inputs)
    assert made.passes_not_run[0] == "find_attention"
    assert "not run, by skip_passes or passes_until: find_attention, prove_mask" in str(made)
    assert "Not run, by skip_passes or passes_until: find_attention" in made.html()
    assert not mmi_compile.explain(model, options=OPTIONS, **inputs).passes_not_run


def test_compiling_costs_no_text_pictures_or_measurements(monkeypatch):
    """What a report shows is made when it is looked at; nothing is measured unless someone asks."""
    from mmi_compile import report_graph, report_program, report_time
    from mmi_compile.kernels import guard
    from mmi_compile.profiling import Stopwatch

    # pytest listens to every logger, so that PyTorch would write a structured trace, which holds the report.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])
    made = []

    def count(owner, name):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            made.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for owner, name in (
        (report, "readable"), (report_program.Snapshot, "of"), (report_program, "readable"), (report, "program"),
        (report_graph, "picture"), (report, "predicted"), (report_time, "stage_times"), (report, "run_to_json"),
        (report, "modality_to_json"), (report.GraphReport, "to_json"), (Stopwatch, "running"),
        (guard, "measure"), (guard, "measure_recall"), (torch.profiler, "profile"),
    ):  # fmt: skip
        count(owner, name)
    model, inputs = models.plain_causal(tokens=300, shape=models.Shape(layers=1))
    options = {"inner": "eager", "min_tokens": 0, "recall": 0.5}
    fast = torch.compile(model, backend="mminference", options=options)
    with torch.no_grad():
        fast(**inputs)
        fast(**inputs)
    assert made == []
    mmi_compile.last_report().html()
    assert {"readable", "run_to_json", "to_json"} <= set(made)
    assert "running" not in made
