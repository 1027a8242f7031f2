"""The newcomer's path: every example runs in a process of its own, as a reader would run it, and checks itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"

PATH = {
    "quickstart.py": (["--clips", "17", "--repeats", "1", "--inner", "eager"], "mminference, adaptive"),
    "long_video.py": ([], "known from mm_token_type_ids"),
    "mixed_documents.py": ([], "given by hand, ignored: shape"),
    "own_model.py": ([], "under strict=True, MMIError"),
    "own_pattern.py": ([], "stamps(72, 6, 0, 64): density"),
    "search_heads.py": ([], "searched, budget 30%"),
    "reading_report.py": ([], "report.html"),
    "serving.py": ([], "in chunks of 512"),
}
"""Script → its arguments, and something that it prints."""

FURTHER = {"bench_decode.py": (["--tokens", "4", "--repeats", "1"], "ms a step")}
"""The same for those that are no part of the path."""

ELSEWHERE = {"boundaries.py", "pictures.py", "video_needles.py", "text_perplexity.py", "head_search.py"}
"""Run by tests of their own, or too slow for here. ``planted.py`` is a module, and ``bench_prefill.py`` needs a GPU."""


@pytest.mark.slow
@pytest.mark.parametrize("script", PATH | FURTHER)
def test_example(script: str) -> None:
    arguments, printed = (PATH | FURTHER)[script]
    found = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments], capture_output=True, text=True, timeout=400, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # threads that wait for each other cost more than they gain
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-4000:]
    assert printed in found.stdout
    if script == "quickstart.py":
        errors = {policy: float(x) for policy, x in re.findall(r"mminference, (\w+) .*×\s+(\S+)$", found.stdout, re.M)}
        assert errors["exact"] < 1e-5
        assert errors["adaptive"] < 0.1


def test_the_list_of_examples_is_complete() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert set(re.findall(r"\]\((\w+\.py)\)", text)) == scripts - {"planted.py"}
    assert scripts == set(PATH) | set(FURTHER) | ELSEWHERE | {"planted.py", "bench_prefill.py"}
    in_order = re.findall(r"^\d\. \[`(\w+\.py)`\]", text, re.MULTILINE)
    assert in_order == list(PATH)
