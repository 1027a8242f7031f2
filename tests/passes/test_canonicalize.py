"""One argument form for SDPA; calls that return their argument disappear, and no others do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mmi_compile.options import Options
from mmi_compile.passes import PassContext
from mmi_compile.passes.canonicalize import SDPA, Canonicalize
from tests import harness

ATEN = torch.ops.aten.scaled_dot_product_attention


def canonical(function, *inputs: Tensor) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The captured graph and the canonical one, which were seen to compute the same."""
    recorder = harness.capture(function, *inputs, dynamic=False, fullgraph=True)
    before = recorder.graphs[0]
    (after,) = harness.run_passes(before, [Canonicalize()], PassContext(options=Options()))
    old, new = (gm(*(a.clone() for a in recorder.inputs[0])) for gm in (before, after))
    assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    return before, after


def x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (1, 2, 5, 8)), generator=torch.Generator().manual_seed(0)).to(dtype)


def mask() -> Tensor:
    return torch.ones(5, 5, dtype=torch.bool).tril()


CALLS = {
    "positional": lambda q, m: F.scaled_dot_product_attention(q, q, q, m, 0.0, False),
    "keyword": lambda q, m: F.scaled_dot_product_attention(attn_mask=m, query=q, value=q, key=q),
    "causal": lambda q, m: F.scaled_dot_product_attention(q, q, q, None, 0.0, True) + m.sum(),
    "scale": lambda q, m: F.scaled_dot_product_attention(q, q, q, m, scale=0.5, enable_gqa=True),
    "packet": lambda q, m: ATEN(q, q, q, m),
    "overload": lambda q, m: ATEN.default(q, q, q, m, 0.0, False, scale=0.5),
}


@pytest.mark.parametrize("call", CALLS)
def test_sdpa_is_spelled_out(call):
    _, after = canonical(CALLS[call], x(), mask())
    (node,) = [n for n in after.graph.nodes if n.target is SDPA]
    assert len(node.args) == 3
    assert list(node.kwargs) == ["attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    assert node.kwargs["is_causal"] is (call == "causal")
    assert (node.kwargs["attn_mask"] is None) == (call == "causal")
    assert node.kwargs["scale"] == (0.5 if call in ("scale", "overload") else None)
    assert node.kwargs["enable_gqa"] is (call == "scale")


IDENTITIES = {
    "dropout of nothing": lambda a: F.dropout(a, 0.0),
    "dropout outside training": lambda a: F.dropout(a, 0.3, training=False),
    "dropout by keywords": lambda a: F.dropout(p=0.3, training=False, input=a),
    "torch.dropout": lambda a: torch.dropout(a, 0.3, False),
    "inactive dropout in place": lambda a: F.dropout(a, 0.3, False, True),
    "to its dtype": lambda a: a.to(torch.float32),
    "float": lambda a: a.float(),
    "type_as itself": lambda a: a.type_as(a),
    "to its device": lambda a: a.to("cpu"),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities_disappear(name):
    _, after = canonical(lambda a: (IDENTITIES[name](a + 1) * 2,), x())
    assert [n.op for n in after.graph.nodes] == ["placeholder", "call_function", "call_function", "output"]


KEPT = {
    "to another dtype": lambda a: a.to(torch.float64),
    "half": lambda a: a.half(),
    "a copy": lambda a: a.to(torch.float32, copy=True),
    "a positional copy": lambda a: a.to(torch.float32, False, True),
    "another memory format": lambda a: a.to(memory_format=torch.channels_last),
    "clone": lambda a: a.clone(),
    "relu": lambda a: F.relu(a),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_makes_a_new_tensor_stays(name):
    before, after = canonical(lambda a: (KEPT[name](a + 1) * 2,), x())
    assert len(after.graph.nodes) == len(before.graph.nodes)


def test_active_dropout_stays():
    recorder = harness.capture(lambda a: F.dropout(a, 0.3), x())
    (after,) = harness.run_passes(recorder.graphs[0], [Canonicalize()], PassContext(options=Options()))
    assert harness.count_ops(after, F.dropout) == 1


def test_a_copy_that_is_written_to_stays_a_copy():
    def function(a):
        b, c = a.to(torch.float32), a.to(torch.float32, copy=True)
        c.add_(1)
        return (b + c, a.float().mul_(2))

    _, after = canonical(function, x())
    assert harness.count_ops(after, "to") == 1
