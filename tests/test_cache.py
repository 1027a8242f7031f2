"""A second process finds the compiled code on disk; results and report are those of the first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from mmi_compile.head_config import Fingerprint, HeadConfig, HeadEntry
from mmi_compile.kernels.patterns import AShape, ByModality, Dense, VerticalSlash

ROOT = Path(__file__).resolve().parent.parent

WORKER = """
import json, sys
import torch
from torch._dynamo.utils import counters
torch.set_num_threads(1)
import mmi_compile
from tests import models
model, inputs = models.plain_causal(
    mask="padding", shape=models.Shape(layers=1), tokens=150, batch=2, padding="right"
)
ids = torch.arange(300).view(2, 150) // 20 % 3
options = json.loads(sys.argv[2])
fast = torch.compile(model, backend="mminference", options={"min_tokens": 0, **options})
with torch.no_grad(), mmi_compile.modality(ids):
    torch.save(fast(**inputs), sys.argv[1])
report = mmi_compile.last_report()
graphs = report.to_json()["graphs"]
for graph in graphs:
    del graph["seconds"]
print(json.dumps({
    "inductor": dict(counters["inductor"]), "autograd": dict(counters["aot_autograd"]),
    "text": str(report), "summary": report.summary(), "graphs": graphs,
}))
"""


def run(folder: Path, name: str, **options: Any) -> dict[str, Any]:
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(folder / name), json.dumps(options or {"recall": 0.6})],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_second_process_hits_the_caches_and_says_the_same(tmp_path):
    first, second = (run(tmp_path, name) for name in ("first", "second"))
    assert first["inductor"]["fxgraph_cache_miss"] >= 1
    assert first["autograd"]["autograd_cache_miss"] >= 1
    assert "autograd_cache_bypass" not in first["autograd"]

    assert second["autograd"]["autograd_cache_hit"] == first["autograd"]["autograd_cache_miss"]
    assert second["inductor"]["fxgraph_cache_hit"] == first["inductor"]["fxgraph_cache_miss"]
    assert not second["autograd"].keys() & {"autograd_cache_miss", "autograd_cache_bypass"}
    assert "fxgraph_cache_miss" not in second["inductor"]

    assert torch.equal(torch.load(tmp_path / "first"), torch.load(tmp_path / "second"))
    for part in ("summary", "text", "graphs"):
        assert second[part] == first[part]
    (attention,) = [site for graph in first["graphs"] for site in graph["attentions"]]
    assert attention["run"]["path"] == "tile-sparse PyTorch"
    assert "given by hand" in first["text"]


def test_head_configs_have_compiled_code_of_their_own(tmp_path):
    """Equal content hits whatever its file is called; other content under the same name does not."""
    for name, local in (("a", 8), ("b", 8), ("changed", 24)):
        by_rows = ByModality("q", AShape(4, local), ((1, VerticalSlash(10, 4)),))
        entries = (HeadEntry(AShape(4, local)), HeadEntry(by_rows), HeadEntry(by_rows), HeadEntry(Dense()))
        config = HeadConfig(Fingerprint(1, 4, 2, 16), (entries,), {0: "text", 1: "image", 2: "video"})
        config.save(tmp_path / f"{name}.json")
    first = run(tmp_path, "first", policy="config", head_config=str(tmp_path / "a.json"))
    second = run(tmp_path, "second", policy="config", head_config=str(tmp_path / "b.json"))
    (tmp_path / "changed.json").replace(tmp_path / "a.json")
    third = run(tmp_path, "third", policy="config", head_config=str(tmp_path / "a.json"))
    assert first["autograd"]["autograd_cache_miss"] == second["autograd"]["autograd_cache_hit"] >= 1
    assert "autograd_cache_miss" not in second["autograd"]
    assert third["autograd"]["autograd_cache_miss"] >= 1
    assert second["graphs"] == first["graphs"]
    assert third["graphs"][-1]["key"] != first["graphs"][-1]["key"]
    outputs = [torch.load(tmp_path / name) for name in ("first", "second", "third")]
    assert torch.equal(outputs[0], outputs[1])
    assert "a_shape(4, 24)" in third["text"]
    assert "a_shape(4, 24)" not in first["text"]
