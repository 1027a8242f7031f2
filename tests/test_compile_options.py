"""What users combine with compiling: fullgraph, dynamic, mode, stances, autocast, quantised layers, export."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmi_compile
from mmi_compile import Reason, report
from mmi_compile.backend import NO_CUDA_GRAPHS
from mmi_compile.kernels.ops import ABI
from mmi_compile.options import OptionError
from tests import families, harness, models, modules
from tests.prompts import Shape

pytestmark = pytest.mark.fresh_dynamo

OPTIONS: dict[str, Any] = {"policy": "exact", "inner": "eager"}
ONE_LAYER = Shape(layers=1)
BF16 = 2e-2
"""Two roundings of bfloat16, relative to the largest logit."""


@pytest.fixture(autouse=True)
def _own_report() -> None:
    report.forget()


def built(name: str, **arguments: Any) -> tuple[nn.Module, dict[str, Any]]:
    if name in families.TEXT:
        return families.text(name, shape=ONE_LAYER, **arguments)
    case = families.vision(name, shape=ONE_LAYER, **arguments)
    return case.model, case.inputs


def output(model: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        made = model(**inputs) if "x" in inputs else model(**inputs, use_cache=False)
    return made if isinstance(made, Tensor) else made.logits


def error(model: Callable[..., Any], inputs: dict[str, Any], expected: Tensor) -> float:
    made = output(model, inputs)
    assert made.dtype == expected.dtype
    return harness.relative_error(made, expected)


def last() -> report.Report:
    made = mmi_compile.last_report()
    assert made is not None
    return made


def rewritten() -> tuple[int, int]:
    return len(last().rewritten), len(last().sites)


# --- fullgraph and dynamic ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3_vl", "llava"])
def test_fullgraph_of_the_language_model(name):
    model, inputs = built(name)
    expected = output(model, inputs)
    mmi_compile.compile(model, fullgraph=True, **OPTIONS)
    assert error(model, inputs, expected) < 1e-5
    assert rewritten() == (1, 1)


@pytest.mark.parametrize("dynamic", [None, False, True])
def test_fullgraph_of_a_whole_text_model(dynamic):
    model, _ = built("mistral")
    compiled = torch.compile(model, backend="mminference", options=OPTIONS, fullgraph=True, dynamic=dynamic)
    for tokens in (33, 47, 20):
        twin, inputs = built("mistral", tokens=tokens)
        assert error(compiled, inputs, output(twin, inputs)) < 1e-5
    graphs = {None: 2, False: 3, True: 1}[dynamic]
    assert rewritten() == (graphs, graphs)
    assert len(last().graphs) == graphs


# --- mode and CUDA graphs -----------------------------------------------------------------------------------------


def test_a_mode_that_asks_for_cuda_graphs_keeps_them_for_decoding(monkeypatch):
    given: list[Any] = []

    def compile_fx(gm: Any, example_inputs: Any, config_patches: Any = None) -> Any:
        given.append(dict(config_patches or {}))
        return gm.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    model, inputs = built("llama")
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    mmi_compile.compile(model, mode="reduce-overhead", policy="exact")
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
    assert len(given) == len(last().graphs)
    for patches, graph in zip(given, last().graphs, strict=True):
        prefill = any(site.phase == "prefill" for site in graph.sites)
        assert patches["triton.cudagraphs"] is not prefill
        assert graph.notes == ([NO_CUDA_GRAPHS] if prefill else [])
    assert "CUDA graphs" in str(last())
    assert "CUDA graphs" in last().html()
    assert NO_CUDA_GRAPHS in last().to_json()["graphs"][0]["notes"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_compile_with_inductor(mode):
    model, inputs = built("llama")
    expected = output(model, inputs)
    mmi_compile.compile(model, mode=mode, policy="exact")
    assert error(model, inputs, expected) < 1e-5
    assert rewritten() == (1, 1)


@pytest.mark.gpu
def test_cuda_graphs_on_a_gpu():
    model, inputs = built("llama", dtype=torch.bfloat16)
    model, inputs = model.cuda(), {name: x.cuda() for name, x in inputs.items()}
    arguments = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    expected = model.generate(**inputs, **arguments)
    mmi_compile.compile(model, mode="reduce-overhead", policy="exact")
    found = [model.generate(**inputs, **arguments) for _ in range(3)]
    # Kernels round differently, and after one other token all that follow are others.
    first = inputs["input_ids"].shape[1] + 1
    assert torch.equal(found[0][:, :first], expected[:, :first])
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])
    notes = {site.phase: graph.notes for graph in last().graphs for site in graph.sites}
    assert notes == {"prefill": [NO_CUDA_GRAPHS], "decode": []}


def test_every_operator_is_kept_out_of_cuda_graphs():
    assert ABI
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mmi::")]
    assert len(names) >= 6
    for name in names:
        operator = getattr(torch.ops.mmi, name.removeprefix("mmi::").partition(".")[0]).default
        assert torch.Tag.cudagraph_unsafe in operator.tags


def test_a_wrong_mode_is_refused_at_once():
    model, inputs = built("llama")
    with pytest.raises(OptionError, match='did you mean "reduce-overhead"'):
        mmi_compile.compile(model, mode="reduce_overhead")
    with pytest.raises(OptionError, match="inner is 'eager'"):
        mmi_compile.compile(model, mode="reduce-overhead", inner="eager")
    assert model.model._compiled_call_impl is None
    with pytest.raises(Exception, match="unknown mode"):
        output(torch.compile(model, backend="mminference", mode="fastest"), inputs)


# --- stances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3_vl"])
def test_stances(name):
    model, inputs = built(name)
    expected = output(model, inputs)
    mmi_compile.compile(model, **OPTIONS)
    with torch.compiler.set_stance("force_eager"):
        assert error(model, inputs, expected) == 0
    assert mmi_compile.last_report() is None
    assert error(model, inputs, expected) < 1e-5
    with torch.compiler.set_stance("fail_on_recompile"):
        assert error(model, inputs, expected) < 1e-5
    assert rewritten() == (1, 1)


def test_stances_about_recompilation():
    model, inputs = built("llama")
    twin, longer = built("llama", tokens=47)
    mmi_compile.compile(model, **OPTIONS)
    output(model, inputs)
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="fail_on_recompile"):
        output(model, longer)
    with torch.compiler.set_stance("eager_on_recompile"):
        assert error(model, longer, output(twin, longer)) == 0
    assert rewritten() == (1, 1)
    assert error(model, longer, output(twin, longer)) < 1e-5


def stock_fails(stance: str) -> bool:
    """Whether a model cannot be compiled under a stance by PyTorch's own ``eager`` backend either."""
    model, inputs = built("llama")
    model.model.compile(backend="eager")
    try:
        with torch.compiler.set_stance(stance):
            for _ in range(3):
                output(model, inputs)
    except Exception:
        return True
    finally:
        torch._dynamo.reset()
    return False


def test_first_eager_then_compiled():
    if stock_fails("eager_then_compile"):  # PyTorch 2.13 looks sizes of one tensor up in those of another
        pytest.skip("PyTorch itself fails under this stance")
    model, inputs = built("llama")
    expected = output(model, inputs)
    mmi_compile.compile(model, **OPTIONS)
    with torch.compiler.set_stance("eager_then_compile"):
        for _ in range(3):
            assert error(model, inputs, expected) < 1e-5
    assert rewritten() == (1, 1)


# --- autocast -----------------------------------------------------------------------------------------------------


def autocast(dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast("cpu", dtype)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_a_model_under_autocast(name, attn):
    model, inputs = built(name, attn=attn)
    whole = output(model, inputs)
    with autocast():
        expected = output(model, inputs)
        mmi_compile.compile(model, **OPTIONS)
        assert expected.dtype == torch.bfloat16
        assert error(model, inputs, expected) < BF16
    assert rewritten() == (1, 1)
    assert error(model, inputs, whole) < 1e-5  # compiled once more without
    assert rewritten() == (2, 2)


class Inside(nn.Module):
    """A model that enters autocast itself."""

    def __init__(self, model: nn.Module, *, enabled: bool = True) -> None:
        super().__init__()
        self.model, self.enabled = model, enabled

    def forward(self, **inputs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            made = self.model(**inputs)
        return made


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_autocast_inside_a_model(attn, inner):
    model, inputs = built("qwen2", attn=attn)
    model = Inside(model)
    expected = output(model, inputs)
    compiled = torch.compile(model, backend="mminference", options={**OPTIONS, "inner": inner}, fullgraph=True)
    assert error(compiled, inputs, expected) < BF16
    assert rewritten() == (1, 1)


@pytest.mark.parametrize("where", ["around", "inside", "off inside"])
@pytest.mark.parametrize("name", ["multihead", "einsum_heads", "einsum_tokens", "baddbmm", "flattened"])
def test_products_that_are_written_out_under_autocast(name, where):
    module, inputs = modules.build(name)
    model = module if where == "around" else Inside(module, enabled=where == "inside")
    with torch.autocast("cpu", torch.bfloat16, enabled=where != "inside"):
        expected = output(model, inputs)
        compiled = torch.compile(model, backend="mminference", options=OPTIONS)
        assert error(compiled, inputs, expected) < BF16
    done, found = rewritten()
    assert done == found > 0


def test_the_fused_encoder_layer_under_autocast_is_left_alone():
    module, inputs = modules.build("encoder")
    with autocast():
        expected = output(module, inputs)
        compiled = torch.compile(module, backend="mminference", options=OPTIONS)
        assert error(compiled, inputs, expected) < BF16
    assert {site.decision.reason for site in last().sites if site.decision is not None} == {Reason.SHAPE}


class Bias(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = torch.full((q.shape[1], q.shape[1]), float("-inf")).triu(1).expand(q.shape[0], -1, -1)
        return torch.bmm(torch.baddbmm(bias, q, k.transpose(1, 2)).softmax(-1), v)


def test_a_mask_inside_a_product_under_autocast():
    q, k, v = (torch.randn(4, 65, 16) for _ in range(3))
    compiled = torch.compile(Bias(), backend="mminference", options=OPTIONS)
    with torch.no_grad():
        assert harness.relative_error(compiled(q, k, v), Bias()(q, k, v)) < 1e-5
        assert rewritten() == (1, 1)
        with autocast():
            made, expected = compiled(q, k, v), Bias()(q, k, v)
    assert made.dtype == expected.dtype
    assert harness.relative_error(made, expected) < BF16


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16, torch.float16), (torch.float16,) * 3, (torch.float32,) * 3]
)
def test_operands_of_any_dtype_under_autocast(dtypes):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 65, 16, generator=generator).to(dtype) for dtype in dtypes)
    with autocast(), torch.no_grad():
        expected = Attention()(q, k, v)
        made = torch.compile(Attention(), backend="mminference", options=OPTIONS)(q, k, v)
    assert made.dtype == expected.dtype == torch.bfloat16
    assert harness.relative_error(made, expected) < BF16
    assert rewritten() == (1, 1)


def test_double_precision_stays_what_it_is_under_autocast():
    q = torch.randn(1, 2, 65, 16, dtype=torch.float64)
    with autocast(), torch.no_grad():
        expected = Attention()(q, q, q)
        made = torch.compile(Attention(), backend="mminference", options=OPTIONS)(q, q, q)
    assert made.dtype == expected.dtype == torch.float64
    assert harness.relative_error(made, expected) < 1e-12


class ByHand(nn.Module):
    """Scores in float32 and values in bfloat16, both by casts of its own: no autocast."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        scores = (q.float() @ k.float().transpose(-1, -2)).masked_fill(~mask, float("-inf"))
        return scores.softmax(-1).to(v.dtype) @ v


def test_casts_by_hand_are_no_autocast():
    q, k, v = (torch.randn(1, 2, 65, 16).to(torch.bfloat16) for _ in range(3))
    with torch.no_grad():
        expected = ByHand()(q, k, v)
        made = torch.compile(ByHand(), backend="mminference", options=OPTIONS)(q, k, v)
    assert torch.equal(made, expected)
    (site,) = last().sites
    assert site.decision is not None
    assert site.decision.reason is Reason.DTYPE


def test_the_operator_computes_the_same_under_autocast():
    q, k, v = (torch.randn(1, 2, 300, 16) for _ in range(3))
    kwargs = {"policy": "adaptive", "min_tokens": 0, "inner": "eager"}
    compiled = torch.compile(Inside(_Named()), backend="mminference", options=kwargs)
    plain = torch.compile(_Named(), backend="mminference", options=kwargs)
    with torch.no_grad():
        cast = [x.to(torch.bfloat16) for x in (q, k, v)]
        expected = plain(q=cast[0], k=cast[1], v=cast[2])
        assert torch.equal(compiled(q=q, k=k, v=v), expected)


class _Named(Attention):
    def forward(self, *, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(q, k, v)


# --- quantised layers ---------------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and one scale for each output, as weight-only quantisation makes it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def quantise(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))


@pytest.mark.parametrize("name", ["qwen2", "qwen2_5_vl"])
def test_int8_weights_made_by_hand(name):
    model, inputs = built(name)
    quantise(mmi_compile.frontend.find_language_model(model))
    expected = output(model, inputs)
    mmi_compile.compile(model, **OPTIONS)
    assert error(model, inputs, expected) < 1e-5
    assert rewritten() == (1, 1)


@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_int8_weights_of_torchao(inner):
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    model, inputs = built("llama")
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    expected = output(model, inputs)
    mmi_compile.compile(model, policy="exact", inner=inner)
    assert error(model, inputs, expected) < 1e-5
    assert rewritten() == (1, 1)


# --- export -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ["llama", "llava"])
def test_an_exported_model_is_the_model_as_it_was_written(name, strict):
    model, inputs = built(name)
    expected = output(model, inputs)
    mmi_compile.compile(model, **OPTIONS)
    assert error(model, inputs, expected) < 1e-5
    with torch.no_grad():
        program = torch.export.export(model, (), {**inputs, "use_cache": False}, strict=strict)
    assert not [node for node in program.graph.nodes if "mmi" in str(node.target)]
    assert error(program.module(), inputs, expected) < 1e-6
    assert error(model, inputs, expected) < 1e-5  # goes on as compiled
    done, found = rewritten()
    assert done == found > 0


def test_an_exported_program_may_be_compiled():
    model, inputs = models.plain_causal(shape=ONE_LAYER)
    expected = output(model, inputs)
    with torch.no_grad():
        program = torch.export.export(model, (), inputs)
    compiled = torch.compile(program.module(), backend="mminference", options=OPTIONS)
    assert error(compiled, inputs, expected) < 1e-5
    assert rewritten() == (1, 1)


def test_a_mask_of_an_exported_program_is_left_alone_with_a_reason():
    model, inputs = built("llama")
    expected = output(copy.deepcopy(model), inputs)
    with torch.no_grad():
        program = torch.export.export(model, (), {**inputs, "use_cache": False})
    compiled = torch.compile(program.module(), backend="mminference", options=OPTIONS)
    assert error(compiled, inputs, expected) < 1e-5
    (site,) = last().sites
    assert site.decision is not None
    assert site.decision.reason is Reason.UNKNOWN_MASK
