"""One argument form for SDPA; calls that return their argument disappear, and no others do."""

from __future__ import annotations

import operator

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


# --- products ---------------------------------------------------------------------------------------------------------


def close(function, *inputs: Tensor) -> fx.GraphModule:
    """The canonical graph, which was seen to compute nearly the same: products may be summed in another order."""
    recorder = harness.capture(function, *inputs, dynamic=False, fullgraph=True)
    (after,) = harness.run_passes(recorder.graphs[0], [Canonicalize()], PassContext(options=Options()))
    old, new = (gm(*(a.clone() for a in recorder.inputs[0])) for gm in (recorder.graphs[0], after))
    assert all(harness.relative_error(a, b) < 1e-5 for a, b in zip(old, new, strict=True))
    return after


EINSUMS = {
    "heads first": ("bhid,bhjd->bhij", "bhij,bhjd->bhid", "bhid"),
    "tokens first": ("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd", "bqhd"),
    "spaces": ("b q h d, b k h d -> b h q k", "b h q k, b k h d -> b q h d", "bqhd"),
    "heads before the batch": ("bqhd,bkhd->hbqk", "hbqk,bkhd->bqhd", "bqhd"),
    "merged heads": ("zid,zjd->zij", "zij,zjd->zid", "zid"),
}


@pytest.mark.parametrize("name", EINSUMS)
def test_einsum_beside_a_softmax_becomes_a_product(name):
    scores, values, layout = EINSUMS[name]
    shape = [{"b": 2, "h": 3, "z": 6}.get(letter, 8 if letter == "d" else 5) for letter in layout]

    def function(q, k, v):
        return torch.einsum(values, torch.einsum(scores, q, k).softmax(-1), v)

    after = close(function, *(x(*shape) * (n + 1) for n in range(3)))
    assert harness.count_ops(after, torch.functional.einsum) == 0
    assert harness.count_ops(after, torch.matmul) == 2


def test_the_keys_may_come_first():
    after = close(lambda q, k: torch.einsum("bhjd,bhid->bhij", k, q).softmax(-1) @ k, x(), x() * 2)
    (product, _) = (n for n in after.graph.nodes if n.target in (torch.matmul, operator.matmul))
    assert product.args[0].name == "l_q_"


NO_PRODUCTS = {
    "no softmax": lambda a: torch.einsum("bhid,bhjd->bhij", a, a).relu(),
    "a sum": lambda a: torch.einsum("bhid,bhjd->bhi", a, a).softmax(-1),
    "two sums": lambda a: torch.einsum("bhid,bhid->bh", a, a).softmax(-1),
    "a diagonal": lambda a: torch.einsum("bhii,bhij->bhij", a @ a.mT, a).softmax(-1),
    "no summed index": lambda a: torch.einsum("bhid,bhid->bhid", a, a).softmax(-1),
    "an ellipsis": lambda a: torch.einsum("...id,...jd->...ij", a, a).softmax(-1),
    "three factors": lambda a: torch.einsum("bhid,bhjd,bhkd->bhij", a, a, a).softmax(-1),
}


@pytest.mark.parametrize("name", NO_PRODUCTS)
def test_other_sums_stay(name):
    _, after = canonical(NO_PRODUCTS[name], x())
    assert harness.count_ops(after, torch.functional.einsum) == 1


@pytest.mark.parametrize(("beta", "alpha"), [(1.0, 1.0), (1, 0.25), (0.0, 0.5), (0.5, 2.0)])
@pytest.mark.parametrize("bias", ["zeros", "data"])
def test_baddbmm_beside_a_softmax(beta, alpha, bias):
    def function(q, k, b):
        b = torch.zeros_like(b) if bias == "zeros" else b
        return torch.baddbmm(b, q, k.mT, beta=beta, alpha=alpha).softmax(-1) @ k

    after = close(function, x(3, 5, 8), x(3, 5, 8) * 2, x(3, 5, 5))
    assert harness.count_ops(after, torch.bmm) == 1
    assert harness.count_ops(after, torch.add) == (bias == "data" and beta != 0)


def test_zeros_that_were_written_to_count():
    def function(q, k):
        bias = torch.zeros(3, 5, 5)
        bias[0] = 1.0
        return torch.baddbmm(bias, q, k.mT).softmax(-1)

    after = close(function, x(3, 5, 8), x(3, 5, 8) * 2)
    assert harness.count_ops(after, torch.add) == 1


# --- nn.MultiheadAttention --------------------------------------------------------------------------------------------

MULTIHEAD = torch.nn.functional.multi_head_attention_forward


def multihead(**arguments) -> torch.nn.MultiheadAttention:
    return torch.nn.MultiheadAttention(16, 2, **arguments).eval()


MASKS = {
    "none": {},
    "bool": {"attn_mask": ~mask()},
    "float": {"attn_mask": torch.zeros(5, 5).masked_fill(~mask(), -torch.inf)},
    "flag": {"attn_mask": ~mask(), "is_causal": True},
    "heads": {"attn_mask": (~mask()).expand(6, 5, 5)},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])},
    "both": {
        "attn_mask": ~mask(),
        "key_padding_mask": torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2]),
    },
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("form", ["self", "cross", "weights", "no bias", "sequence first"])
def test_multihead_attention_is_written_out(masks, form):
    module = multihead(batch_first=form != "sequence first", bias=form != "no bias")
    given = {**MASKS[masks], "need_weights": form == "weights"}

    def function(q, k):
        if form == "sequence first":
            q, k = q.transpose(0, 1), k.transpose(0, 1)
        return module(q, k if form == "cross" else q, k if form == "cross" else q, **given)[0]

    after = close(function, x(3, 5, 16), x(3, 5, 16) * 2)
    assert (harness.count_ops(after, MULTIHEAD), harness.count_ops(after, SDPA)) == (0, 1)


UNUSUAL = {
    "weights": lambda a: multihead(batch_first=True)(a, a, a),
    "dropout": lambda a: multihead(batch_first=True, dropout=0.5).train()(a, a, a, need_weights=False)[0],
    "bias": lambda a: multihead(batch_first=True, add_bias_kv=True)(a, a, a, need_weights=False)[0],
    "zero": lambda a: multihead(batch_first=True, add_zero_attn=True)(a, a, a, need_weights=False)[0],
    "no batch": lambda a: multihead()(a[0], a[0], a[0], need_weights=False)[0],
    "own sizes": lambda a: multihead(batch_first=True, kdim=8, vdim=8)(a, a[..., :8], a[..., 8:], need_weights=False),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_multihead_attention_stays_closed(name):
    recorder = harness.capture(UNUSUAL[name], x(3, 5, 16), dynamic=False)
    gm = next(gm for gm in recorder.graphs if harness.count_ops(gm, MULTIHEAD))
    (after,) = harness.run_passes(gm, [Canonicalize()], PassContext(options=Options()))
    assert harness.count_ops(after, MULTIHEAD) == 1


# --- nn.TransformerEncoderLayer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"src_mask": ~mask()},
        {"src_key_padding_mask": MASKS["padding"]["key_padding_mask"]},
        {"src_mask": ~mask(), "src_key_padding_mask": MASKS["padding"]["key_padding_mask"]},
    ],
)
@pytest.mark.parametrize("form", [{}, {"norm_first": True}, {"activation": "gelu", "layer_norm_eps": 0.1}])
def test_the_fused_encoder_layer_is_written_out(masks, form):
    layer = torch.nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, **form).eval()
    after = close(lambda a: layer(a, **masks), x(3, 5, 16))
    assert harness.count_ops(after, torch._transformer_encoder_layer_fwd) == 0
    assert harness.count_ops(after, SDPA) == 1
