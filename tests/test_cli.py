"""The command ``mmi``: exit codes, short errors, and where output goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import mmi_compile
from mmi_compile import bench, bench_table, cli
from mmi_compile.bench_rows import FAILED, Results, Row, rows_from_json

SMALL = ["bench", "--device", "cpu", "--tokens", "130", "--heads", "2", "--kv-heads", "1", "--head-dim", "32",
         "--repeats", "1"]  # fmt: skip


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == mmi_compile.__version__


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    assert "Usage: mmi" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench", "--tokens", "x"], "number of tokens"),
        (["bench", "--cases", "a_shap"], 'did you mean "a_shape"'),
        (["bench", "--peers", "flexx"], 'did you mean "flex"'),
        (["bench", "--dtype", "int8"], "known: bf16"),
        (["bench", "--heads", "5", "--kv-heads", "3"], "divisor of 5"),
        (["bench", "--repeats", "x"], "--repeats"),
        (["bench", "--device", "tpu"], "device"),
        (["bench", "--json", "/no/such/folder/x.json"], "no folder"),
        (["bench", "--plot", "/no/such/folder/x.png"], ""),
        (["bench", "--device", "cpu", "--tune"], "no GPU"),
        (["bench", "--bogus"], "--bogus"),
        (["bensh"], "bensh"),
    ],
)
def test_usage_errors_are_short_and_exit_with_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert 1 <= len(captured.err.splitlines()) <= 3
    assert captured.err.startswith("mmi: ")


def test_table_goes_to_stdout_and_progress_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SMALL, "--cases", "dense,a_shape(8,16)"]) == 0
    captured = capsys.readouterr()
    assert "TFLOP/s" in captured.out
    assert "a_shape(8,16)" in captured.out
    assert len(captured.err.splitlines()) == 6


def test_json_to_stdout_is_nothing_but_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SMALL, "--cases", "dense", "--peers", "none", "--json", "-"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [row["kernel"] for row in data["rows"]] == ["mmi cpu"]
    assert data["options"]["tokens"] == [130]


def test_json_file_is_written_beside_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.json"
    assert cli.main([*SMALL, "--cases", "dense", "--json", str(target)]) == 0
    assert len(rows_from_json(json.loads(target.read_text()))) == 3
    assert "TFLOP/s" in capsys.readouterr().out


def test_a_failed_measurement_exits_with_1_after_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(options: object, device: object, **callbacks: object) -> Results:
        rows = [Row(130, "dense", "mmi x", True, FAILED, "out of memory", error=float("nan"))]
        return Results(options, {"type": "cpu", "name": "CPU"}, {"torch": "2"}, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(bench, "run_bench", failing)
    assert cli.main([*SMALL, "--json", "-"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["rows"][0]["error"] is None
    assert "out of memory" in captured.err.splitlines()[-1]


def test_plot_without_matplotlib_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_table, "can_plot", lambda: False)
    assert cli.main([*SMALL, "--plot", "x.png"]) == 2
    assert "mmi-compile[plot]" in capsys.readouterr().err


def test_help_is_light_and_the_module_runs() -> None:
    code = (
        "import sys; from mmi_compile import cli; cli.main(['--help']); "
        "print(sorted({'torch', 'triton', 'transformers', 'matplotlib'} & {n.partition('.')[0] for n in sys.modules}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    assert out.splitlines()[-1] == "[]"
    ran = subprocess.run(
        [sys.executable, "-m", "mmi_compile", "--version"], capture_output=True, text=True, check=True, timeout=120
    )
    assert ran.stdout.strip() == mmi_compile.__version__


SCRIPT = """
import torch
from torch import nn

class Local(nn.Module):
    def forward(self, x):
        q = x.unflatten(-1, (2, 16)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

def build():
    place = torch.arange(700.0)[None, :, None] / 40 + torch.arange(32.0) * 0.1
    return Local(), [{"x": 4 * torch.cat([place.sin(), place.cos()], -1)[..., :32]}]

def other():
    return Local(), 3

broken = lambda: 1 / 0

def misfit():
    return Local(), {"x": torch.zeros(3)}

def unknown_argument():
    return Local(), {"y": torch.zeros(3)}

def nothing():
    return nn.Linear(3, 3), {"input": torch.zeros(2, 3)}
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.mark.fresh_dynamo
def test_explain(script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, drawing = tmp_path / "report.html", tmp_path / "graph.svg"
    files = ["--html", str(page), "--svg", str(drawing)]
    assert cli.main(["explain", f"{script}:build", "-o", "policy=exact", *files, "--code"]) == 0
    assert drawing.read_text().startswith("<svg xmlns=")
    text = capsys.readouterr().out
    assert "1 of 1 attentions rewritten" in text
    assert "torch.ops.mmi.attention" in text
    assert "1 of 1 attentions rewritten" in page.read_text()
    assert cli.main(["explain", str(script), "--json"]) == 0  # build is the function's usual name
    assert json.loads(capsys.readouterr().out)["summary"].startswith("1 of 1")


@pytest.mark.fresh_dynamo
def test_verify(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sparse = ["-o", "min_tokens=0", "-o", "recall=0.5", "-o", "max_density=1"]
    assert cli.main(["verify", str(script), *sparse, "--rows", "20", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["rows"] == 20
    assert len(told["recall_per_head"]) == len(told["error_per_head"]) == 2
    least = min(told["recall_per_head"])
    assert least < 1
    assert cli.main(["verify", str(script), *sparse, "--least-recall", str((1 + least) / 2)]) == 1
    assert "least recall" in capsys.readouterr().out
    assert cli.main(["verify", str(script), "-o", "policy=exact"]) == 0
    assert "nothing to verify" in capsys.readouterr().out
    assert cli.main(["verify", f"{script}:nothing"]) == 1
    assert "no attention was found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "more", "words", "code"),
    [
        ("script.py:other", [], "must return the model and a dict", 2),
        ("script.py:broken", [], "ZeroDivisionError", 1),
        ("script.py:absent", [], "no function 'absent'", 2),
        ("absent.py", [], "no script", 2),
        ("script.py", ["-o", "policy"], "NAME=VALUE", 2),
        ("script.py", ["-o", "polic=exact"], 'did you mean "policy"', 2),
        ("script.py", ["-o", "recall=2"], "MMI_RECALL must be", 2),
        ("script.py", ["--html", "absent/page.html"], "no folder", 2),
        ("script.py", ["--html", "."], "cannot write .: Is a directory", 1),
        ("script.py", ["--svg", "."], "cannot write .: Is a directory", 1),
        ("script.py", ["-o", "dump=script.py/x"], "cannot write to script.py/x", 1),
        ("script.py", ["-o", "passes_until=rewrit"], 'did you mean "rewrite"', 2),
        ("script.py", ["-o", "passes_until=rewrite", "-o", "skip_passes=rewrite"], "leaves out", 2),
        ("script.py", ["-o", "passes_until=canonicalize"], "leave out the pass find_attention", 1),
        ("script.py:misfit", [], "the model of script.py:misfit failed: ", 1),
        ("script.py:unknown_argument", [], "unexpected keyword argument 'y'", 1),
        ("script.py:nothing", [], "no attention was found in 1 graph", 1),
        ("no_import.py", [], "no_import.py failed: ModuleNotFoundError: No module named 'nothing_of_this_name'", 1),
        ("no_syntax.py", [], "no_syntax.py failed: SyntaxError: ", 1),
    ],
)
@pytest.mark.fresh_dynamo
def test_scripts_that_cannot_be_explained(
    place: str, more: list[str], words: str, code: int, script: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(script.parent)
    Path("no_import.py").write_text("import nothing_of_this_name")
    Path("no_syntax.py").write_text("def build(:")
    assert cli.main(["explain", place, *more]) == code
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.fresh_dynamo
def test_stages_are_measured_where_asked(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sparse = ["-o", "min_tokens=0", "-o", "recall=0.5", "-o", "max_density=1"]
    assert cli.main(["explain", str(script), *sparse, "--time", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"mmi::plan", "mmi::kernel"} <= {stage["name"] for stage in told["stages"]}
    assert cli.main(["explain", str(script), *sparse, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"] == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete(shell: str) -> None:
    """The script that a shell is given, and what that script then asks for."""
    run = [sys.executable, "-m", "mmi_compile"]
    # Else typer asks which shell the tests were started from.
    environ = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = subprocess.run([*run, "--show-completion", shell], env=environ, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert f"_MMI_COMPLETE=complete_{shell}" in shown.stdout
    if shell == "bash":
        asked = {"_MMI_COMPLETE": "complete_bash", "COMP_WORDS": "mmi ex", "COMP_CWORD": "1"}
        answer = subprocess.run(run, env={**os.environ, **asked}, capture_output=True, text=True, timeout=120)
        assert answer.stdout.split() == ["explain"]
