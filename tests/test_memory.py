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

class Blocks(torch.nn.Module):
    "Causal attention in a window, in which tokens of a block of images see both ways."
    def forward(self, x, ids):
        i, j = torch.arange(x.shape[2])[:, None], torch.arange(x.shape[2])[None]
        block = (ids[:, None, :, None] == ids[:, None, None]) & (ids[:, None, :, None] >= 0)
        mask = ((j <= i) | block) & (i - j < 512)
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

def prompt(kind, tokens):
    if kind == "blocks":
        ids = torch.arange(tokens) // 256
        return Blocks(), {"x": torch.randn(1, 2, tokens, 32), "ids": torch.where(ids % 2 == 0, ids, -1)[None]}
    shape = models.Shape(layers=1, heads=2, kv_heads=1, head_dim=32, max_positions=tokens)
    model, inputs = models.qwen2(tokens=tokens, shape=shape)
    if kind == "documents":
        positions = torch.arange(tokens)[None] % 1000
        inputs = {"input_ids": inputs["input_ids"], "position_ids": positions, "use_cache": False}
    return model.model, inputs

def prefill(tokens):
    model, inputs = prompt(sys.argv[2], tokens)
    fast = torch.compile(model, backend="mminference", options={"policy": "exact", "inner": watched})
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


def measure(kind: str, tokens: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(tokens), kind], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize("kind", ["padding", "documents", "blocks"])
def test_peak_memory_of_a_prefill_grows_linearly(kind):
    short, long = (measure(kind, tokens) for tokens in LENGTHS)
    assert not short["left"] + long["left"]
    # A boolean mask takes 256 MiB at 16 K tokens and 1 GiB at 32 K; the scores of one head take four times as much.
    assert 0 < long["largest"] <= 2 * short["largest"] <= 64 * MIB
    assert long["grown"] <= 2.5 * short["grown"] + 32 * MIB
    assert long["grown"] <= 192 * MIB
