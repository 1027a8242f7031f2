"""Dumped graphs run alone, in a process that knows nothing of the one that wrote them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import mmi_compile
from mmi_compile import report
from mmi_compile.backend import rewrite_graph
from mmi_compile.decision import MMIError
from mmi_compile.options import Options
from mmi_compile.passes import PIPELINE
from mmi_compile.report_program import Snapshot, program
from mmi_compile.report_steps import difference, steps
from tests import harness, models
from tests.test_report import tiny

pytestmark = pytest.mark.fresh_dynamo

NAMES = ["captured", *(step.name for step in PIPELINE)]


@pytest.fixture(autouse=True)
def _own_report() -> None:
    report.forget()


def dump(folder: Path, model: nn.Module, inputs: dict[str, Tensor], *, dynamic: bool | None = None) -> list[Path]:
    options = {"policy": "exact", "inner": "eager", "dump": str(folder)}
    with torch.no_grad():
        torch.compile(model, backend="mminference", dynamic=dynamic, options=options)(**inputs)
    return sorted(folder.rglob("*.py"))


def run(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, path.name], cwd=path.parent, capture_output=True, text=True, timeout=300)


def outputs(path: Path) -> list[str]:
    """What the file prints, without the last digits of the norms."""
    done = run(path)
    assert done.returncode == 0, done.stderr + done.stdout
    return [re.sub(r"norm (\d+\.\d{3})\d*", r"norm \1", line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("dynamic", [False, True])
def test_files_of_a_language_model_run_and_agree(tmp_path: Path, dynamic: bool) -> None:
    model, inputs = models.build("qwen2", batch=2, padding="left", shape=models.Shape(layers=1))
    files = dump(tmp_path, model, inputs, dynamic=dynamic)
    assert [path.stem for path in files] == [f"{i:02d}_{name}" for i, name in enumerate(NAMES)]
    captured, rewritten = files[0], files[NAMES.index("rewrite")]
    assert "mmi.attention" not in captured.read_text()
    assert "mmi.attention" in rewritten.read_text()
    if dynamic:
        assert "Sizes of the traced call: " in captured.read_text()
    before, after = outputs(captured), outputs(rewritten)
    logits = [2, inputs["input_ids"].shape[1], 256]
    assert before[-1].startswith(f"output {len(before) - 1}: float32 {logits}, norm ")
    assert before == after


def test_the_header_says_where_a_file_comes_from(tmp_path: Path) -> None:
    model, inputs = tiny()
    text = dump(tmp_path, model, inputs)[NAMES.index("prove_mask")].read_text()
    for words in (
        "after the pass prove_mask, the third that ran", "python 03_prove_mask.py", f"torch {torch.__version__}",
        "policy='exact'", "attention: layer 0, layers.0, test_report.py:",
    ):  # fmt: skip
        assert words in text, words


def test_the_shape_of_an_output_is_checked(tmp_path: Path) -> None:
    model, inputs = tiny()
    path = dump(tmp_path, model, inputs)[0]
    path.write_text(path.read_text().replace("OUTPUTS = ['float32 [2,", "OUTPUTS = ['float32 [3,"))
    done = run(path)
    assert done.returncode == 1
    assert "recorded: float32 [3," in done.stdout


def twice(x: Tensor) -> Tensor:
    return 2 * x


twice.__module__ = "__main__"  # as a function of the user's own script


def test_a_graph_that_cannot_run_alone_says_why(tmp_path: Path) -> None:
    graph = fx.Graph()
    graph.output((graph.call_function(twice, (graph.placeholder("x"),)),))
    gm = fx.GraphModule(nn.Module(), graph)
    path = tmp_path / "alone.py"
    path.write_text(program(Snapshot.of("captured", gm), graph, ["made by hand\nin two lines"]))
    done = run(path)
    assert done.returncode == 2
    assert "cannot be run alone: " in done.stderr
    assert "(function) cannot be imported" in done.stderr
    assert "the input x is no tensor and no number" in done.stderr


def test_constants_strides_and_called_graphs_are_rebuilt(tmp_path: Path) -> None:
    inner = fx.Graph()
    inner.output(inner.call_method("cos", (inner.placeholder("y"),)))
    root = nn.Module()
    root.register_buffer("three", torch.tensor([1, 2, 3]))
    root.add_module("part", fx.GraphModule(nn.Module(), inner, "Part"))
    graph = fx.Graph()
    x, wide = graph.placeholder("x"), graph.placeholder("wide")
    x.meta["example_value"], wide.meta["example_value"] = torch.zeros(3, 4).t(), torch.zeros(1, 3).expand(4, 3)
    total = graph.call_method("add", (x, wide))
    called = graph.call_module("part", (graph.call_method("add", (total, graph.get_attr("three"))),))
    called.meta["example_value"] = torch.zeros(4, 3)
    graph.output((called, *(graph.call_method("stride", (x, dim)) for dim in (0, 1))))
    gm = fx.GraphModule(root, graph)
    path = tmp_path / "parts.py"
    path.write_text(program(Snapshot.of("captured", gm), graph, []))
    lines = outputs(path)
    assert lines[0].startswith("output 0: float32 [4, 3], norm ")
    assert [line.split()[-1] for line in lines[1:]] == ["1", "4"]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model, inputs = tiny()
    message = r'option "dump": cannot write to .*: Not a directory; name another folder'
    with pytest.raises(Exception, match=message) as caught:  # Dynamo wraps what a backend raises
        mmi_compile.explain(model, options={"dump": tmp_path / "file"}, **inputs)
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), MMIError)


def test_steps_are_the_same_whether_they_were_kept_or_run_again(tmp_path: Path) -> None:
    gm = harness.capture(*_function()).graphs[0]
    kept = rewrite_graph(gm, Options(policy="exact", inner="eager", dump=tmp_path))[1]
    later = rewrite_graph(gm, Options(policy="exact", inner="eager"))[1]
    assert kept.trace
    assert not later.trace
    assert [step.name for step in steps(later)] == [step.name for step in steps(kept)] == NAMES
    last = steps(later)[-1].text
    assert last == later.code()
    changed = {b.name for a, b in zip(steps(later), steps(later)[1:], strict=False) if any(difference(a, b))}
    assert {"rewrite", "cleanup"} <= changed
    assert "prove_mask" not in changed


def _function() -> tuple[object, Tensor]:
    def attend(x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril()
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    return attend, torch.randn(1, 2, 40, 16)
