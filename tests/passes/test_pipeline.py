"""The pipeline as a whole: what it may change, what it must keep, and what every attention ends with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from torch import Tensor, fx

from mmi_compile.backend import rewrite_graph
from mmi_compile.decision import Reason
from mmi_compile.options import Options
from mmi_compile.passes import PIPELINE
from mmi_compile.report import GraphReport
from tests import harness
from tests.passes import attention_programs as forms
from tests.passes.attention_programs import Program


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rewritten_calls(gm: fx.GraphModule) -> int:
    return harness.count_ops(gm, torch.ops.mmi.attention)


def squares(gm: fx.GraphModule, lengths: set[int]) -> list[str]:
    """Nodes with a tensor that is query length by key length."""
    found = []
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, Tensor) and sum(int(size) in lengths for size in value.shape) > 1:
            found.append(f"{node.name}: {tuple(value.shape)}")
    return found


def run(gm: fx.GraphModule, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and the inputs as the graph left them."""
    copies = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
    with torch.no_grad():
        return [x for x in gm(*copies) if isinstance(x, Tensor)], [x for x in copies if isinstance(x, Tensor)]


def check(gm: fx.GraphModule, inputs: list[Tensor], options: Options) -> tuple[fx.GraphModule, GraphReport]:
    """Rewrite one captured graph and assert every law that holds for all graphs."""
    nodes, code = [(n, n.target, n.args) for n in gm.graph.nodes], gm.code
    result, report = rewrite_graph(gm, options)
    assert not report.failure, report.failure
    assert gm.code == code
    assert [(n, n.target, n.args) for n in gm.graph.nodes] == nodes
    assert all(site.decision is not None for site in report.sites)
    assert rewritten_calls(result) == sum(site.decision.rewritten for site in report.sites)
    if not report.tagged and not rewritten_calls(result):
        assert result is gm or harness.count_ops(result, torch.ops.mmi.begin_prompt) == 1
    (old, old_inputs), (new, new_inputs) = run(gm, inputs), run(result, inputs)
    for expected, actual in zip([*old, *old_inputs], [*new, *new_inputs], strict=True):
        assert actual.dtype == expected.dtype
        assert harness.relative_error(actual, expected) < 1e-5
    again, second = rewrite_graph(result, options)
    assert not second.failure, second.failure
    assert again.code == result.code
    return result, report


def captured(function, *inputs: Tensor) -> tuple[fx.GraphModule, list[Tensor]]:
    recorder = harness.capture(function, *[x.clone() for x in inputs], dynamic=False, fullgraph=True)
    # Which of the inputs each placeholder is: Dynamo orders them by first use and drops unused ones.
    return recorder.graphs[0], recorder.inputs[0]


def check_program(program: Program) -> None:
    gm, inputs = captured(program.run, *program.inputs())
    options = Options(policy="exact", inner="eager", min_tokens=program.min_tokens)
    result, report = check(gm, inputs, options)
    assert len(report.sites) == program.layers
    for site in report.sites:
        if program.is_prefill:
            assert site.decision.rewritten, f"{site.decision} {site.mask}"
        else:
            assert site.decision.reason is Reason.BIDIRECTIONAL
    if program.is_prefill:
        assert not squares(result, {forms.N, program.kv_len})
    assert all(f"k [{forms.BATCH}, {program.site_kv_heads}," in site.shapes for site in report.sites)


@given(forms.programs())
@example(Program(call="aten"))
@example(Program(form="eager", mask="fill_in_place", scale="in_place", gqa="tile"))
@example(Program(form="eager", mask="iadd", kind="chunk", window=True, padding=True, layers=2, junk=("counter",)))
def test_any_surface_form(program):
    check_program(program)


EACH_FORM = [
    *(Program(call=call, gqa="native", scale="after") for call in forms.SDPA_CALLS),
    *(Program(mask=mask, padding=True) for mask in forms.SDPA_MASKS),
    *(Program(form="eager", mask=mask, window=True) for mask in forms.EAGER_MASKS),
    *(Program(form="eager", mask="add_inf", transpose=transpose) for transpose in forms.TRANSPOSES),
    *(Program(form="eager", mask="where", scale=scale) for scale in forms.SCALES),
    *(Program(form="eager", mask="where", dropout=dropout, cast=cast) for dropout, cast in zip(
        forms.DROPOUTS, forms.CASTS[1:], strict=True)),
    *(Program(gqa=gqa) for gqa in (*forms.REPEATS, "plain")),
    *(Program(form="eager", mask="fill_inf", product=product) for product in forms.PRODUCTS),
    *(replace(Program(form="eager", mask="add_inf"), kind=kind) for kind in ("full", "cross", "chunk")),
]  # fmt: skip


@pytest.mark.parametrize("program", dict.fromkeys(EACH_FORM), ids=lambda p: f"{p.form}-{p.kind}-{p.mask}-{p.gqa}")
def test_each_surface_form(program):
    check_program(program)


# --- memory that is written to ------------------------------------------------------------------------------------


def heads(seed: int, count: int, n: int = 37) -> Tensor:
    return torch.randn(1, count, n, 8, generator=torch.Generator().manual_seed(seed))


def qkv() -> list[Tensor]:
    return [heads(0, 4), heads(1, 2), heads(2, 2)]


def repeated(x: Tensor) -> Tensor:
    batch, count, n, dim = x.shape
    return x[:, :, None].expand(batch, count, 2, n, dim).reshape(batch, count * 2, n, dim)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def keep_mask(n: int) -> Tensor:
    return torch.arange(n)[None, :] <= torch.arange(n)[:, None]


def check_function(function, *inputs: Tensor) -> tuple[fx.GraphModule, GraphReport]:
    gm, order = captured(function, *inputs)
    return check(gm, order, Options(policy="exact", inner="eager"))


def test_a_cache_written_after_its_heads_were_repeated_is_not_folded():
    def function(q, k, v):
        wide = repeated(k)
        k.mul_(0)
        return (causal(q, wide, repeated(v)),)

    _, report = check_function(function, *qkv())
    assert "k [1, 4," in report.sites[0].shapes


def test_a_cache_written_through_a_view_is_not_folded():
    def function(q, k, v):
        view = k.transpose(1, 2)
        wide, other = repeated(k), repeated(v)
        view[:, 3:7] = 1.0
        return (causal(q, wide, other),)

    _, report = check_function(function, *qkv())
    assert "k [1, 4," in report.sites[0].shapes


def test_repeated_heads_that_are_written_are_not_folded():
    def function(q, k, v):
        wide = repeated(k)
        wide.mul_(torch.arange(4)[None, :, None, None])
        return (causal(q, wide, repeated(v)),)

    _, report = check_function(function, *qkv())
    assert "k [1, 4," in report.sites[0].shapes


def test_a_cache_written_before_its_heads_are_repeated_is_folded():
    def function(q, k, v, new):
        k[:, :, 3:4] = new
        v += 1
        return (causal(q, repeated(k), repeated(v)),)

    _, report = check_function(function, *qkv(), torch.ones(1, 2, 1, 8))
    assert "k [1, 2," in report.sites[0].shapes


def test_writing_to_something_else_does_not_hinder_folding():
    def function(q, k, v, counter):
        wide, other = repeated(k), repeated(v)
        counter.add_(1)
        return (causal(q, wide, other),)

    result, report = check_function(function, *qkv(), torch.zeros(1))
    assert "k [1, 2," in report.sites[0].shapes
    assert harness.count_ops(result, "add_") == 1


def test_unused_in_place_calls_survive():
    def function(q, k, v, length):
        length.add_(q.shape[2])
        out = causal(q, repeated(k), repeated(v))
        k.copy_(k + 1)
        return (out,)

    result, report = check_function(function, *qkv(), torch.zeros(1))
    assert report.sites[0].decision.rewritten
    assert harness.count_ops(result, "add_") == 1
    assert harness.count_ops(result, "copy_") == 1


HAZARDS = {
    "k": lambda q, k, v, scores, mask: k.mul_(0),
    "q": lambda q, k, v, scores, mask: q[0].zero_(),
    "mask": lambda q, k, v, scores, mask: mask.zero_(),
    "scores": lambda q, k, v, scores, mask: scores.masked_fill_(torch.eye(scores.shape[-1]) > 0, -1.0),
    "view of scores": lambda q, k, v, scores, mask: scores[:, 0].mul_(0.5),
}


@pytest.mark.parametrize("hazard", HAZARDS)
def test_operands_written_between_the_two_products_are_refused(hazard):
    def function(q, k, v):
        q, k = q.clone(), k.clone()
        mask = torch.where(keep_mask(37), 0.0, -torch.inf)
        scores = q @ k.mT + mask
        HAZARDS[hazard](q, k, v, scores, mask)
        return (torch.softmax(scores, -1) @ v,)

    _, report = check_function(function, heads(0, 4), heads(1, 4), heads(2, 4))
    assert report.sites[0].decision.reason is Reason.MUTATED


def test_values_written_between_the_two_products_are_read_as_they_are():
    def function(q, k, v):
        weights = torch.softmax((q @ k.mT).masked_fill(~keep_mask(37), -torch.inf), -1)
        v.mul_(2)
        return (weights @ v,)

    _, report = check_function(function, heads(0, 4), heads(1, 4), heads(2, 4))
    assert report.sites[0].decision.rewritten


def test_weights_written_after_the_softmax_are_not_a_softmax_any_more():
    def function(q, k, v):
        weights = torch.softmax((q @ k.mT).masked_fill(~keep_mask(37), -torch.inf), -1)
        weights.mul_(0.5)
        return (weights @ v,)

    _, report = check_function(function, heads(0, 4), heads(1, 4), heads(2, 4))
    assert not report.sites[0].decision.rewritten


# --- several attentions -------------------------------------------------------------------------------------------


def test_interleaved_attentions_share_what_is_inserted_before_the_first():
    def function(q, k, v, live):
        mask = keep_mask(37)[None, None] & live[:, None, None, :]
        first, second = (torch.softmax((x @ k.mT).masked_fill(~mask, -torch.inf), -1) for x in (q, q + 1))
        b = second @ v
        return (first @ v + b, b)

    live = torch.ones(1, 37, dtype=torch.bool)
    live[0, -4:] = False
    result, report = check_function(function, heads(0, 4), heads(1, 4), heads(2, 4), live)
    assert len(report.sites) == 2
    assert rewritten_calls(result) == 2
    assert harness.count_ops(result, torch.ops.mmi.key_bounds) == 1
    assert harness.count_ops(result, torch.ops.mmi.modality) == 1
    assert not squares(result, {37})


def test_attentions_that_read_each_other_are_all_rewritten():
    def function(q, k, v):
        for _ in range(3):
            q = causal(q, k, v)
        return (q,)

    result, _ = check_function(function, heads(0, 4), heads(1, 4), heads(2, 4))
    assert rewritten_calls(result) == 3
    assert harness.count_ops(result, F.scaled_dot_product_attention) == 0


def test_a_mask_that_somebody_else_reads_stays():
    def function(q, k, v):
        mask = keep_mask(37)
        return (F.scaled_dot_product_attention(q, k, v, attn_mask=mask), mask.sum(-1))

    result, report = check_function(function, heads(0, 4), heads(1, 4), heads(2, 4))
    assert report.sites[0].decision.rewritten
    assert squares(result, {37})


def test_causal_and_bidirectional_attention_in_one_graph():
    def function(q, k, v):
        y = causal(q, k, v)
        return (F.scaled_dot_product_attention(y, k, v) + torch.softmax(y @ k.mT, -1) @ v,)

    result, report = check_function(function, heads(0, 4), heads(1, 4), heads(2, 4))
    reasons = [site.decision.reason for site in report.sites]
    assert reasons == [None, Reason.BIDIRECTIONAL, Reason.BIDIRECTIONAL]
    assert rewritten_calls(result) == 1


@pytest.mark.parametrize("shape", ["view", "squeeze", "flatten"])
def test_the_memory_order_that_a_later_view_counts_on_is_kept(shape):
    def function(q, k, v):
        y = torch.softmax((q @ k.mT).masked_fill(~keep_mask(37), -torch.inf), -1) @ v
        if shape == "view":
            return (y.view(1, -1),)
        return (y.squeeze(0).view(-1, 8) if shape == "squeeze" else y.transpose(1, 2).contiguous().view(37, -1),)

    result, report = check_function(function, heads(0, 4), heads(1, 4), heads(2, 4))
    assert report.sites[0].decision.rewritten
    (call,) = [n for n in result.graph.nodes if n.target is torch.ops.mmi.attention.default]
    assert ("bshd" in call.args) == (shape == "flatten")


# --- the frame ----------------------------------------------------------------------------------------------------


def test_pass_names_are_unique_and_in_the_documented_order():
    names = [step.name for step in PIPELINE]
    assert names == [
        "canonicalize", "find_attention", "prove_mask", "trim_keys", "classify_phase", "find_modality",
        "assign_patterns", "rewrite", "cleanup",
    ]  # fmt: skip


@pytest.mark.parametrize("skipped", [step.name for step in PIPELINE])
def test_any_pass_can_be_left_out(skipped):
    gm, inputs = captured(Program(mask="bool", padding=True).run, *Program(mask="bool").inputs())
    result, report = rewrite_graph(gm, Options(policy="exact", inner="eager", skip_passes=(skipped,)))
    assert not report.failure, report.failure
    assert all(site.decision is not None for site in report.sites)
    left = {site.decision.reason for site in report.sites}
    assert (Reason.SKIPPED in left) == (skipped in ("prove_mask", "rewrite"))
    assert harness.relative_error(run(result, inputs)[0][0], run(gm, inputs)[0][0]) < 1e-5


@pytest.mark.parametrize("last", range(len(PIPELINE)))
def test_the_pipeline_can_end_after_any_pass(last):
    names = [step.name for step in PIPELINE]
    gm, inputs = captured(Program(mask="bool", padding=True).run, *Program(mask="bool").inputs())
    result, report = rewrite_graph(gm, Options(policy="exact", inner="eager", passes_until=names[last]))
    assert not report.failure, report.failure
    assert list(report.seconds) == names[: last + 1]
    assert report.passes_not_run == names[last + 1 :]
    found = [site.decision for site in report.sites]
    if last >= names.index("rewrite"):
        assert [decision.rewritten for decision in found] == [True]
        assert "mmi.attention" in result.code
    else:
        assert [decision.reason for decision in found] == [Reason.SKIPPED] * (last >= names.index("find_attention"))
    assert harness.relative_error(run(result, inputs)[0][0], run(gm, inputs)[0][0]) < 1e-5


@pytest.mark.parametrize("dynamic", [False, True])
def test_static_and_dynamic_graphs(dynamic):
    program = Program(mask="bool", padding=False)
    recorder = harness.capture(program.run, *program.inputs(), dynamic=dynamic)
    result, _ = check(recorder.graphs[0], recorder.inputs[0], Options(policy="exact", inner="eager"))
    assert rewritten_calls(result) == 1
