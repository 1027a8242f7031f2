"""The backend through ``torch.compile``: options, inner backends, fall-backs, and graphs that it must not touch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import mmi_compile
from mmi_compile import MMIError, Reason, report
from mmi_compile.backend import compile_graph, graph_key, mminference, rewrite_graph
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.own_tiles import using_tiles
from mmi_compile.kernels.structured import Structure, structured_qkv
from mmi_compile.options import OptionError, Options
from mmi_compile.passes.classify_phase import ClassifyPhase
from mmi_compile.passes.rewrite import Rewrite
from tests import harness, models

EXACT = {"policy": "exact", "inner": "eager"}


@pytest.fixture(autouse=True)
def fresh():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    report.forget()
    yield
    torch._dynamo.reset()
    report.forget()
    torch.set_num_threads(before)


def causal(q: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, q, q, is_causal=True) * 2


def heads(n: int = 17, dim: int = 8) -> Tensor:
    return torch.randn(1, 2, n, dim, generator=torch.Generator().manual_seed(n))


def compiled(function: Any = causal, *, dynamic: bool | None = False, mode: str | None = None, **options: Any) -> Any:
    # torch.compile takes a mode or options, never both; a mode reaches the backend as its keyword argument.
    if mode is not None:
        return torch.compile(function, backend="mminference", mode=mode, dynamic=dynamic)
    return torch.compile(function, backend="mminference", options={**EXACT, **options}, dynamic=dynamic)


def call(function: Any, *args: Any) -> Any:
    with torch.no_grad():
        return function(*args)


def last() -> report.GraphReport:
    return mmi_compile.last_report().graphs[-1]


@dataclasses.dataclass
class Recording:
    """An inner backend that keeps what it is given."""

    graphs: list[fx.GraphModule] = dataclasses.field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        self.graphs.append(gm)
        return gm.forward


# --- options ------------------------------------------------------------------------------------------------------


def test_there_is_no_report_before_the_first_compilation():
    assert mmi_compile.last_report() is None


def test_the_backend_is_known_by_name():
    assert "mminference" in torch._dynamo.list_backends()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"polcy": "exact"}, 'unknown option "polcy"; did you mean "policy"'),
        ({"policy": "exat"}, 'did you mean "exact"'),
        ({"recall": 2.0}, 'option "recall" must be'),
        ({"skip_passes": ("rewrit",)}, 'unknown pass "rewrit"; did you mean "rewrite"'),
    ],
)
def test_wrong_options_are_refused_with_the_mend(options, message):
    function = torch.compile(causal, backend="mminference", options={"inner": "eager", **options})
    with pytest.raises(Exception, match="option") as caught:
        call(function, heads())
    assert message in str(caught.value)
    cause = caught.value if isinstance(caught.value, OptionError) else getattr(caught.value, "inner_exception", None)
    assert isinstance(cause, OptionError)


def test_the_environment_mirrors_options(monkeypatch):
    monkeypatch.setenv("MMI_INNER", "eager")
    monkeypatch.setenv("MMI_POLICY", "exact")
    assert harness.relative_error(call(torch.compile(causal, backend="mminference"), heads()), causal(heads())) < 1e-5
    assert last().options.inner == "eager"


def test_options_may_be_an_object():
    gm = harness.capture(causal, heads()).graphs[0]
    mminference(gm, [heads()], options=Options(**EXACT))
    assert last().options == Options(**EXACT)


# --- inner backends -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor", "callable"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_inner_backends(inner, dynamic):
    recording = Recording()
    function = compiled(inner=recording if inner == "callable" else inner, dynamic=dynamic)
    for n in (17, 23):
        assert harness.relative_error(call(function, heads(n)), causal(heads(n))) < 1e-5
    assert [site.decision.rewritten for site in last().sites] == [True]
    assert len(mmi_compile.last_report().graphs) == (1 if dynamic else 2)
    if inner == "callable":
        assert harness.count_ops(recording.graphs[0], torch.ops.mmi.attention) == 1


@pytest.fixture
def patches(monkeypatch):
    seen: list[Any] = []

    def compile_fx(gm, example_inputs, config_patches=None):
        seen.append(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return seen


def test_the_mode_reaches_inductor(patches):
    call(compiled(mode="max-autotune-no-cudagraphs"), heads())
    assert patches == [torch._inductor.list_mode_options("max-autotune-no-cudagraphs")]


def test_inductor_options_win_over_the_mode(patches):
    gm = harness.capture(causal, heads()).graphs[0]
    options = Options(policy="exact", inductor={"max_autotune": False, "epilogue_fusion": False})
    compile_graph(gm, [heads()], options, "max-autotune-no-cudagraphs", lambda _: None)
    (seen,) = patches
    assert seen["max_autotune"] is False
    assert seen["epilogue_fusion"] is False
    assert set(torch._inductor.list_mode_options("max-autotune-no-cudagraphs")) <= set(seen)


def test_without_mode_and_options_inductor_gets_no_patches(patches):
    call(compiled(inner="inductor"), heads())
    assert patches == [None]


# --- fall-backs ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=[ClassifyPhase, Rewrite])
def broken_pass(request, monkeypatch):
    work = request.param.run

    def run(self, gm, context):
        work(self, gm, context)
        raise ZeroDivisionError("broken on purpose")

    monkeypatch.setattr(request.param, "run", run)
    return request.param().name


def test_a_pass_that_fails_leaves_the_graph_untouched(broken_pass):
    recording = Recording()
    assert torch.equal(call(compiled(inner=recording), heads()), causal(heads()))
    assert recording.graphs[0] is last().original
    assert harness.count_ops(recording.graphs[0], F.scaled_dot_product_attention) == 1
    assert last().failure == f"{broken_pass}: ZeroDivisionError: broken on purpose"
    (site,) = last().sites
    assert site.decision.reason is Reason.PASS_FAILED
    assert broken_pass in site.decision.detail
    assert "broken on purpose" in str(mmi_compile.last_report())


def test_a_pass_that_fails_raises_under_strict(broken_pass):
    gm = harness.capture(causal, heads()).graphs[0]
    with pytest.raises(MMIError, match=f"pass '{broken_pass}' failed: broken on purpose") as caught:
        rewrite_graph(gm, Options(**EXACT, strict=True))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def refuse_rewritten(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
    if harness.count_ops(gm, torch.ops.mmi.attention):
        raise NotImplementedError("no such operator")
    return gm.forward


def test_an_inner_backend_that_refuses_the_rewritten_graph_gets_the_untouched_one():
    assert torch.equal(call(compiled(inner=refuse_rewritten), heads()), causal(heads()))
    assert last().failure == "inner backend: NotImplementedError: no such operator"
    assert last().rewritten is last().original
    assert last().sites[0].decision.reason is Reason.PASS_FAILED


def test_an_inner_backend_that_refuses_the_rewritten_graph_raises_under_strict():
    with pytest.raises(Exception, match="no such operator"):
        call(compiled(inner=refuse_rewritten, strict=True), heads())


def test_an_inner_backend_that_refuses_every_graph_shows_its_own_error():
    def refuse(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        raise NotImplementedError("refused")

    with pytest.raises(Exception, match="refused"):
        call(compiled(inner=refuse), heads())


def test_dynamo_may_restart_its_analysis():
    from torch._dynamo.exc import RestartAnalysis

    calls = []

    def restart(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        calls.append(gm)
        raise RestartAnalysis(restart_reason="again")

    gm = harness.capture(causal, heads()).graphs[0]
    seen: list[report.GraphReport] = []
    with pytest.raises(RestartAnalysis):
        compile_graph(gm, [heads()], Options(policy="exact", inner=restart), None, seen.append)
    assert len(calls) == 1
    assert seen == []  # Dynamo compiles the frame again, and that is what counts


def biased(q: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, q, q, attn_mask=bias)


def test_strict_names_the_attention_the_reason_and_the_mend():
    with pytest.raises(Exception, match="strict: attention") as caught:
        call(compiled(biased, strict=True), heads(), torch.randn(17, 17))
    text = str(caught.value)
    assert "in biased" in text
    assert Reason.MASK_IS_INPUT.message in text
    assert Reason.MASK_IS_INPUT.mend in text


@pytest.mark.parametrize("n", [1, 17])
def test_strict_accepts_encoders_and_decode_steps(n):
    def function(q, k):
        return F.scaled_dot_product_attention(q, k, k)

    call(compiled(function, strict=True), heads(n), heads())
    assert last().sites[0].decision.reason is (Reason.DECODE if n == 1 else Reason.BIDIRECTIONAL)


# --- what must not change -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [lambda x: torch.relu(x) + 1, lambda x: x @ x.mT, lambda x: biased(x, x @ x.mT)])
def test_graphs_without_prefill_are_handed_on_as_they_are(function):
    recorder, recording = harness.capture(function, heads()), Recording()
    gm = recorder.graphs[0]
    compile_graph(gm, recorder.inputs[0], Options(policy="exact", inner=recording), None, lambda _: None)
    assert recording.graphs == [gm]
    assert recording.graphs[0] is gm


def test_the_captured_graph_stays_as_it_is():
    gm = harness.capture(causal, heads()).graphs[0]
    code, nodes = gm.code, list(gm.graph.nodes)
    meta = [dict(node.meta) for node in nodes]
    result, _ = rewrite_graph(gm, Options(**EXACT))
    assert result is not gm
    assert gm.code == code
    assert list(gm.graph.nodes) == nodes
    assert all(node.meta.keys() == old.keys() for node, old in zip(nodes, meta, strict=True))


def test_parameters_are_shared_with_the_copy():
    model, inputs = models.plain_causal(mask="bool")
    gm = harness.capture(model, **inputs).graphs[0]
    result, _ = rewrite_graph(gm, Options(**EXACT))
    assert {id(p) for p in result.parameters()} == {id(p) for p in gm.parameters()}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_gradients_are_left_alone(inner):
    model, inputs = models.plain_causal(mask="bool", gqa="expand")
    expected = torch.autograd.grad(model(**inputs).square().sum(), list(model.parameters()))
    options = {"policy": "exact", "inner": inner}
    actual = torch.compile(model, backend="mminference", options=options)(**inputs)
    assert {site.decision.reason for site in last().sites} == {Reason.GRAD_ENABLED}
    for a, b in zip(torch.autograd.grad(actual.square().sum(), list(model.parameters())), expected, strict=True):
        assert harness.relative_error(a, b) < 1e-5


def test_grad_mode_without_anything_that_requires_it_does_not_hinder():
    compiled()(heads())
    assert last().sites[0].decision.rewritten


def test_gradients_that_are_switched_on_inside_the_graph():
    def function(x):
        with torch.enable_grad():
            return causal(x)

    x = heads().requires_grad_()
    y = call(compiled(function), x)
    assert last().sites[0].decision.reason is Reason.GRAD_ENABLED
    (actual,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(causal(x).sum(), x)
    assert harness.relative_error(actual, expected) < 1e-5


def test_inference_mode():
    with torch.inference_mode():
        actual = compiled(inner="aot_eager")(heads())
    assert last().sites[0].decision.rewritten
    assert harness.relative_error(actual, causal(heads())) < 1e-5


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_inputs_are_mutated_as_before(inner):
    def function(q, cache, seen):
        cache[:, :, 2:19] = q
        seen.add_(17)
        keep = torch.arange(19)[None, :] <= torch.arange(17)[:, None] + 2
        out = F.scaled_dot_product_attention(q, cache[:, :, :19], cache[:, :, :19], attn_mask=keep)
        cache.mul_(2)
        return out

    arguments = [heads(), torch.ones(1, 2, 24, 8), torch.zeros(1)]
    expected_arguments, actual_arguments = ([x.clone() for x in arguments] for _ in range(2))
    expected = function(*expected_arguments)
    actual = call(compiled(function, inner=inner), *actual_arguments)
    assert last().sites[0].decision.rewritten
    assert harness.relative_error(actual, expected) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(actual_arguments, expected_arguments, strict=True))


# --- lengths ------------------------------------------------------------------------------------------------------


def masked(q: Tensor) -> Tensor:
    i = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, q, q, attn_mask=i[None, :] <= i[:, None])


@pytest.mark.parametrize("function", [causal, masked])
@pytest.mark.parametrize("policy", ["exact", "adaptive"])
@pytest.mark.parametrize("dynamic", [None, False, True])
def test_lengths_zero_one_and_odd(function, policy, dynamic):
    run = compiled(function, policy=policy, min_tokens=0, recall=1.0, dynamic=dynamic)
    for n in (33, 0, 1, 129, 7):
        assert harness.relative_error(call(run, heads(n)), function(heads(n))) < 1e-5, n
    for site in mmi_compile.last_report().sites:
        length = site.shapes.split(", ")[2]
        if length == "0":  # no pair at all: a mask of nothing may be left alone
            assert site.decision.reason in (None, Reason.UNKNOWN_MASK)
        else:
            assert site.decision.reason is (Reason.DECODE if length == "1" else None), site


def test_no_recompilation_between_two_lengths():
    run = compiled(masked, dynamic=True)
    for n in (16, 33, 70):
        call(run, heads(n))
    assert len(mmi_compile.last_report().graphs) == 1


# --- what is written ----------------------------------------------------------------------------------------------


def test_dump_writes_the_graph_from_first_to_last(tmp_path):
    folder = tmp_path / "new" / "folder"
    call(compiled(dump=folder), heads())
    texts = [path.read_text() for path in sorted(folder.rglob("*.py"))]
    assert last().key in " ".join(map(str, folder.rglob("*")))
    assert "torch._C._nn.scaled_dot_product_attention(" in texts[0]
    assert "mmi.attention" not in texts[0]
    assert "mmi.attention" in texts[-1]
    assert "torch._C._nn.scaled_dot_product_attention(" not in texts[-1]


def test_graphs_without_attention_are_not_dumped(tmp_path):
    call(compiled(torch.relu, dump=tmp_path), heads())
    assert list(tmp_path.iterdir()) == []


def test_the_key_of_a_graph_does_not_depend_on_the_process():
    first, second = (harness.capture(causal, heads()).graphs[0] for _ in range(2))
    other = harness.capture(masked, heads()).graphs[0]
    exact, adaptive = Options(policy="exact"), Options(policy="adaptive")
    assert graph_key(first, exact) == graph_key(second, exact) != graph_key(other, exact)
    assert graph_key(first, exact) != graph_key(first, adaptive)
    assert len(graph_key(first, exact)) == 12


def test_the_report_covers_all_graphs():
    def function(q):
        q = causal(q)
        torch._dynamo.graph_break()
        return F.scaled_dot_product_attention(q, q, q)

    call(compiled(function), heads())
    found = mmi_compile.last_report()
    assert found.summary() == "1 of 2 attentions rewritten in 2 graphs · left alone: 1 bidirectional"
    assert all(step in found.graphs[0].seconds for step in ("canonicalize", "cleanup", "inner backend"))


class Module(nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return causal(q)


def test_module_compile():
    module = Module()
    module.compile(backend="mminference", options=EXACT)
    assert harness.relative_error(call(module, heads()), causal(heads())) < 1e-5
    assert last().sites[0].decision.rewritten


@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_a_grid_is_found_in_code_of_every_backend(inner):
    """Code that AOTAutograd made calls operators where a tensor's pending conjugation is forgotten."""
    x = structured_qkv([Structure(distances=(0,), stride=72, phase=7)], 2048)
    options = {"inner": inner, "min_tokens": 0, "recall": 0.9, "strict": True}
    fast = torch.compile(
        lambda q, k, v: 2 * F.scaled_dot_product_attention(q, k, v, is_causal=True), backend="mminference",
        options=options,
    )  # fmt: skip
    with torch.no_grad(), using_tiles(TileShape(32, 32)):
        fast(x.q, x.k, x.v)
    made = mmi_compile.last_report()
    assert made is not None
    assert "(stride 72)" in made.sites[0].to_json()["run"]["patterns"][0][0]
