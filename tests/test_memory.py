"""Memory of a long prefill on the CPU grows with its length, not with the square of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = (16 * 1024, 32 * 1024)
MIB = 2**20

WORKER = """
import json, resource, sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
torch.set_num_threads(1)
import mmi_compile
from tests import models

class Largest(TorchDispatchMode):
    "Bytes of the largest storage that any operator of the graph has returned."
    bytes = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return out

def watched(graph_module, example_inputs):
    def run(*args):
        with watch:
            return graph_module(*args)
    return run

def prefill(tokens):
    shape = models.Shape(layers=1, heads=2, kv_heads=1, head_dim=32, max_positions=tokens)
    model, inputs = models.qwen2(tokens=tokens, shape=shape)
    fast = torch.compile(model.model, backend="mminference", options={"policy": "exact", "inner": watched})
    with torch.no_grad():
        fast(**inputs)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB

watch = Largest()
prefill(256)
before = peak()
prefill(int(sys.argv[1]))
left = [str(site.decision) for site in mmi_compile.last_report().sites if not site.decision.rewritten]
print(json.dumps({"grown": peak() - before, "largest": watch.bytes, "left": left}))
"""


def measure(tokens: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(tokens)], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in other units elsewhere")
def test_peak_memory_of_a_prefill_grows_linearly():
    short, long = (measure(tokens) for tokens in LENGTHS)
    assert not short["left"] + long["left"]
    # A boolean mask takes 256 MiB at 16 K tokens and 1 GiB at 32 K; the scores of one head take four times as much.
    assert 0 < long["largest"] <= 2 * short["largest"] <= 64 * MIB
    assert long["grown"] <= 2.5 * short["grown"] + 32 * MIB
    assert long["grown"] <= 192 * MIB
