"""Memory of a long prefill on the CPU grows with its length, not with the square of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = (8 * 1024, 16 * 1024)
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

def causal(i, j): return j <= i
def block(ids): return (ids[:, None, :, None] == ids[:, None, None]) & (ids[:, None, :, None] >= 0)

MASKS = {
    "offset": lambda i, j, ids, live: causal(i, j),
    "window": lambda i, j, ids, live: causal(i, j) & (i - j < 512),
    "chunks": lambda i, j, ids, live: causal(i, j) & (i // 512 == j // 512),
    "left padding": lambda i, j, ids, live: causal(i, j) & live[:, None, None],
    "right padding": lambda i, j, ids, live: causal(i, j) & live[:, None, None],
    "blocks": lambda i, j, ids, live: causal(i, j) | block(ids),
    "blocks in a window": lambda i, j, ids, live: (causal(i, j) | block(ids)) & (i - j < 512),
    "padded documents in a window": lambda i, j, ids, live: (
        causal(i, j) & (i - j < 512) & (ids[:, None, :, None] == ids[:, None, None]) & live[:, None, None]
    ),
}

class Masked(torch.nn.Module):
    "Attention of the last half of a prompt to all of it for an offset, else of all of it to itself."
    def forward(self, q, k, ids, live):
        i = torch.arange(q.shape[2])[:, None] + (k.shape[2] - q.shape[2])
        mask = MASKS[sys.argv[1]](i, torch.arange(k.shape[2])[None], ids, live)
        return torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=mask)

def prompt(kind, tokens):
    if kind in MASKS:
        ids, live = torch.arange(tokens) // 256, torch.ones(1, tokens, dtype=torch.bool)
        if "padd" in kind:
            live[:, slice(-99, None) if "right" in kind else slice(99)] = False
        ids = torch.where(ids % 2 == 0, ids, -1)[None] if "blocks" in kind else ids[None]
        k = torch.randn(1, 2, tokens, 32)
        return Masked(), {"q": k[:, :, tokens // 2 :] if kind == "offset" else k, "k": k, "ids": ids, "live": live}
    shape = models.Shape(layers=1, heads=2, kv_heads=1, head_dim=32, max_positions=tokens)
    model, inputs = models.qwen2(tokens=tokens, shape=shape)
    if kind == "documents of a model":
        positions = torch.arange(tokens)[None] % 1000
        inputs = {"input_ids": inputs["input_ids"], "position_ids": positions, "use_cache": False}
    return model.model, inputs

def prefill(tokens):
    model, inputs = prompt(sys.argv[1], tokens)
    watch.bytes = 0
    fast = torch.compile(model, backend="mminference", options={"policy": "exact", "inner": watched})
    with torch.no_grad():
        fast(**inputs)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB

watch = Largest()
prefill(256)
before = peak()
for tokens in sys.argv[2:]:
    prefill(int(tokens))
    left = [str(site.decision) for site in mmi_compile.last_report().sites if not site.decision.rewritten]
    print(json.dumps({"grown": peak() - before, "largest": watch.bytes, "left": left}))
"""


def measure(kind: str) -> list[dict[str, Any]]:
    """One process for both lengths, the short one first: the peak so far is then that of each."""
    command = [sys.executable, "-c", WORKER, kind, *map(str, LENGTHS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()[-len(LENGTHS) :]]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize(
    "kind",
    [
        "padding of a model",
        "documents of a model",
        "offset",
        "window",
        "chunks",
        "left padding",
        "right padding",
        "blocks",
        "blocks in a window",
        "padded documents in a window",
    ],
)
def test_peak_memory_of_a_prefill_grows_linearly(kind):
    short, long = measure(kind)
    assert not short["left"] + long["left"]
    # A boolean mask takes 64 MiB at 8 K tokens and 256 MiB at 16 K; the scores of one head take four times as much.
    assert 0 < long["largest"] <= 2 * short["largest"] <= 32 * MIB
    assert long["grown"] <= 2.5 * short["grown"] + 32 * MIB
    assert long["grown"] <= 128 * MIB
