"""flex_attention: rewritten where its functions prove the mask and made its block mask, left alone elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import mmi_compile
from mmi_compile import Reason, report
from mmi_compile.passes.flex import FLEX
from tests import families, harness
from tests.prompts import Shape

pytestmark = pytest.mark.fresh_dynamo

N = 200  # more than one block
OPTIONS: dict[str, Any] = {"policy": "exact", "inner": "eager"}


@pytest.fixture(autouse=True)
def _own_report() -> Any:
    report.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # flex_attention without Inductor says that it is slow
        yield


def heads(batch: int = 2, count: int = 4, tokens: int = N, seed: int = 0) -> Tensor:
    return torch.randn(batch, count, tokens, 16, generator=torch.Generator().manual_seed(seed))


def blocks(mask: Any, q: Tensor, k: Tensor, batch: int | None = None) -> BlockMask:
    return create_block_mask(mask, batch, None, q.shape[2], k.shape[2], device="cpu")


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    scores = (q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT) * (scale or q.shape[3] ** -0.5)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).nan_to_num(0)
    return (weights @ v.double().repeat_interleave(q.shape[1] // v.shape[1], 1)).float()


def tril(q_len: int = N, kv_len: int = N) -> Tensor:
    return torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)


def run(function: Callable[..., Tensor], *inputs: Any, dynamic: bool | None = None, **options: Any) -> Tensor:
    with torch.no_grad():
        made: Tensor = torch.compile(
            function, backend="mminference", options={**OPTIONS, **options}, dynamic=dynamic, fullgraph=True
        )(*inputs)
    return made


def sites() -> list[report.SiteReport]:
    made = mmi_compile.last_report()
    assert made is not None
    assert not any(graph.failure for graph in made.graphs)
    return made.sites


def rewritten_graph() -> torch.fx.GraphModule:
    made = mmi_compile.last_report()
    assert made is not None
    (graph,) = made.graphs
    assert graph.rewritten is not None
    return graph.rewritten


def check(mask: str) -> None:
    (site,) = sites()
    assert site.decision is not None
    assert site.decision.rewritten, str(site.decision)
    assert site.mask == mask
    assert site.form == "flex"
    graph = rewritten_graph()
    assert harness.count_ops(graph, FLEX) == 0
    assert harness.count_ops(graph, torch.ops.mmi.attention.default) == 1
    harness.max_square(graph, N)


# --- rewritten ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_causal(dynamic, inner):
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=blocks(causal, q, k))

    q, k, v = (heads(seed=seed) for seed in range(3))
    made = run(function, q, k, v, dynamic=dynamic, inner=inner)
    assert harness.relative_error(made, reference(q, k, v, tril())) < 1e-5
    if inner == "eager":
        check("causal")


def test_grouped_heads_and_a_scale():
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=blocks(causal, q, k), scale=0.3, enable_gqa=True)

    q, k, v = heads(), heads(count=2, seed=1), heads(count=2, seed=2)
    assert harness.relative_error(run(function, q, k, v), reference(q, k, v, tril(), 0.3)) < 1e-5
    check("causal")


def test_a_window():
    def window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < 30)

    def function(q: Tensor) -> Tensor:
        return flex_attention(q, q, q, block_mask=blocks(window, q, q))

    q = heads()
    mask = tril() & ~tril().tril(-30)
    assert harness.relative_error(run(function, q), reference(q, q, q, mask)) < 1e-5
    check("causal and sliding window 30")


def test_padding_that_the_function_captures():
    def function(q: Tensor, live: Tensor) -> Tensor:
        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & live[b, j]

        return flex_attention(q, q, q, block_mask=blocks(mask, q, q, batch=2))

    q, live = heads(), torch.ones(2, N, dtype=torch.bool)
    live[1, :70] = False
    expected = reference(q, q, q, tril() & live[:, None, None, :])
    assert harness.relative_error(run(function, q, live), expected) < 1e-5
    check("causal and padding")


def test_a_later_part_of_a_prompt():
    def function(q: Tensor, k: Tensor) -> Tensor:
        past = k.shape[2] - q.shape[2]

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return i + past >= j

        return flex_attention(q, k, k, block_mask=blocks(mask, q, k))

    q, k = heads(tokens=60), heads(seed=1)
    assert harness.relative_error(run(function, q, k), reference(q, k, k, tril(60))) < 1e-5
    (site,) = sites()
    assert site.decision is not None
    assert site.decision.rewritten


def test_a_mask_as_a_change_of_the_scores():
    def function(q: Tensor) -> Tensor:
        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(i >= j, s, -float("inf"))

        return flex_attention(q, q, q, score_mod=score)

    q = heads()
    assert harness.relative_error(run(function, q), reference(q, q, q, tril())) < 1e-5
    check("causal")


def test_both_functions_together():
    def function(q: Tensor) -> Tensor:
        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(i - j < 30, s, -float("inf"))

        return flex_attention(q, q, q, score_mod=score, block_mask=blocks(causal, q, q))

    q = heads()
    mask = tril() & ~tril().tril(-30)
    assert harness.relative_error(run(function, q), reference(q, q, q, mask)) < 1e-5
    check("causal and sliding window 30")


def test_layers_share_a_block_mask():
    def function(q: Tensor) -> Tensor:
        block_mask = blocks(causal, q, q)
        for _ in range(2):
            q = flex_attention(q, q, q, block_mask=block_mask)
        return q

    q = heads()
    expected = reference(q, q, q, tril())
    expected = reference(expected, expected, expected, tril())
    assert harness.relative_error(run(function, q), expected) < 1e-5
    assert [str(site.decision) for site in sites()] == ["rewritten: mmi::attention, dense, causal"] * 2
    harness.max_square(rewritten_graph(), N)


# --- left alone ---------------------------------------------------------------------------------------------------


def left(reason: Reason, detail: str) -> None:
    for site in sites():
        assert site.decision is not None
        assert site.decision.reason is reason, str(site.decision)
        assert detail in site.decision.detail


def test_a_block_mask_from_outside_may_leave_blocks_out():
    q = heads()
    dense = create_block_mask(causal, None, None, N, N, device="cpu")
    # The second row of blocks lists its own block alone, though the function would show the first one too.
    numbers = torch.ones(1, 1, 2, dtype=torch.int32)
    indices = torch.tensor([[[[0, 0], [1, 0]]]], dtype=torch.int32)
    sparse = BlockMask.from_kv_blocks(numbers, indices, mask_mod=causal, seq_lengths=(N, N))
    assert sparse.sparsity() > dense.sparsity()

    def function(q: Tensor, block_mask: BlockMask) -> Tensor:
        return flex_attention(q, q, q, block_mask=block_mask)

    run(function, q, sparse)
    left(Reason.UNKNOWN_MASK, "its block mask is an input of the graph, and may leave out blocks")


def test_blocks_listed_by_hand():
    def function(q: Tensor) -> Tensor:
        numbers = torch.ones(1, 1, 2, dtype=torch.int32)
        indices = torch.arange(2, dtype=torch.int32).view(1, 1, 2, 1).expand(1, 1, 2, 2).contiguous()
        block_mask = BlockMask.from_kv_blocks(numbers, indices, mask_mod=causal, seq_lengths=(N, N))
        return flex_attention(q, q, q, block_mask=block_mask)

    run(function, heads())
    left(Reason.UNKNOWN_MASK, "its block mask is not made by create_block_mask alone")


def _without_full_blocks(found: BlockMask) -> BlockMask:
    return BlockMask.from_kv_blocks(found.kv_num_blocks, found.kv_indices, mask_mod=causal, seq_lengths=(N, N))


def _with_full_blocks_for_partial(found: BlockMask) -> BlockMask:
    assert found.full_kv_num_blocks is not None
    return BlockMask.from_kv_blocks(
        found.full_kv_num_blocks, found.full_kv_indices, found.kv_num_blocks, found.kv_indices, mask_mod=causal,
        seq_lengths=(N, N),
    )  # fmt: skip


def _with_full_blocks_emptied(found: BlockMask) -> BlockMask:
    assert found.full_kv_num_blocks is not None
    found.full_kv_num_blocks.zero_()
    return found


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_without_full_blocks, "not made by create_block_mask alone"),
        (_with_full_blocks_for_partial, "not made by create_block_mask alone"),
        (_with_full_blocks_emptied, "may have been changed"),
    ],
)
def test_lists_that_create_block_mask_made_and_somebody_changed(
    change: Callable[[BlockMask], BlockMask], why: str
) -> None:
    # Uncompiled, flex_attention asks the function alone, so there is nothing to compare with here.
    def function(q: Tensor) -> Tensor:
        block_mask = change(create_block_mask(causal, None, None, N, N, device="cpu"))
        return flex_attention(q, q, q, block_mask=block_mask)

    torch.compile(function, backend="mminference", options={"policy": "exact", "inner": "eager"})(heads())
    left(Reason.UNKNOWN_MASK, why)


def test_another_function_than_the_one_that_made_the_blocks():
    def window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < 30)

    def function(q: Tensor) -> Tensor:
        block_mask = blocks(window, q, q)
        block_mask.mask_mod = causal
        return flex_attention(q, q, q, block_mask=block_mask)

    run(function, heads())
    left(Reason.UNKNOWN_MASK, "its block mask is not seen to be made of its mask function")


SCORES: dict[str, Callable[..., Tensor]] = {
    "a soft cap": lambda s, b, h, i, j: 20 * torch.tanh(s / 20),
    "a bias": lambda s, b, h, i, j: s + (j - i),
    "not low enough": lambda s, b, h, i, j: torch.where(i >= j, s, -100.0),
    "scores decide": lambda s, b, h, i, j: torch.where(s > 0, s, -float("inf")),
}


@pytest.mark.parametrize("name", SCORES)
def test_score_functions_that_do_more_than_hide(name):
    def function(q: Tensor) -> Tensor:
        return flex_attention(q, q, q, score_mod=SCORES[name], block_mask=blocks(causal, q, q))

    q = heads()
    with torch.no_grad():
        expected = function(q)
    assert harness.relative_error(run(function, q), expected) < 1e-6
    left(Reason.UNKNOWN_MASK, "its score function changes scores")


MASKS: dict[str, Callable[..., Tensor]] = {
    "heads differ": lambda b, h, i, j: (i >= j) & (i - j < 8 * (h + 1)),
    "prefix": lambda b, h, i, j: (i >= j) | (j < 5),
    "strided": lambda b, h, i, j: (i >= j) & ((i - j) % 4 == 0),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask_functions_that_are_not_proved(name):
    def function(q: Tensor) -> Tensor:
        block_mask = create_block_mask(MASKS[name], None, 4, N, N, device="cpu")
        return flex_attention(q, q, q, block_mask=block_mask)

    q = heads()
    with torch.no_grad():
        expected = function(q)
    assert harness.relative_error(run(function, q), expected) < 1e-5
    (site,) = sites()
    assert site.decision is not None
    if not site.decision.rewritten:  # a prover that learns more may prove them
        assert site.decision.reason is Reason.UNKNOWN_MASK


def test_everything_visible_is_an_encoder():
    run(lambda q: flex_attention(q, q, q), heads())
    left(Reason.BIDIRECTIONAL, "")


def test_log_sums_that_are_read():
    def function(q: Tensor) -> Tensor:
        out, lse = flex_attention(q, q, q, block_mask=blocks(causal, q, q), return_lse=True)
        return out * lse[..., None]

    run(function, heads())
    left(Reason.WEIGHTS_USED, "log-sum-exp")


def test_one_attention_rewritten_and_one_left_alone():
    def function(q: Tensor) -> Tensor:
        block_mask = blocks(causal, q, q)
        q = flex_attention(q, q, q, block_mask=block_mask)
        return flex_attention(q, q, q, score_mod=SCORES["a soft cap"], block_mask=block_mask)

    q = heads()
    with torch.no_grad():
        expected = function(q)
    assert harness.relative_error(run(function, q), expected) < 1e-5
    assert [site.decision is not None and site.decision.rewritten for site in sites()] == [True, False]
    assert harness.count_ops(rewritten_graph(), FLEX) == 1


@pytest.mark.parametrize("name", ["llama", pytest.param("mistral", marks=pytest.mark.slow)])
def test_transformers_make_their_block_mask_in_another_graph(name):
    model, inputs = families.text(name, attn="flex_attention", shape=Shape(layers=1))
    plain, _ = families.text(name, attn="sdpa", shape=Shape(layers=1))
    mmi_compile.compile(model, **OPTIONS)
    with torch.no_grad():
        expected = plain(**inputs, use_cache=False).logits
        assert harness.relative_error(model(**inputs, use_cache=False).logits, expected) < 1e-5
    assert sites()
    left(Reason.UNKNOWN_MASK, "its block mask is an input of the graph")
