"""The prover is never wrong about random masks, proves the forms that models use, and says why it refuses others."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from mmi_compile.kernels.groups import Same, lie_together
from mmi_compile.options import Options
from mmi_compile.passes.base import AttentionSite, PassContext
from mmi_compile.passes.mask_algebra import Prover, prove, symbolic
from mmi_compile.passes.mask_fact import CAUSAL, MaskFact, MaskGroup
from mmi_compile.passes.mask_reader import Reader
from mmi_compile.passes.mask_symbols import Cases, Live, Position, SymbolicTensor, Truth, Value, axis, same
from mmi_compile.passes.prove_mask import ProveMask
from tests import families, models
from tests.harness import Recorder, capture
from tests.passes.mask_programs import Builder, Program, Values, build, build_grouped

ONE_LAYER = models.Shape(layers=1)


def described(fact: MaskFact, values: dict[str, Any], sizes: dict[sympy.Expr, int], q: int, kv: int) -> Tensor:
    """The pairs that a known fact says are visible, broadcastable to ``[B, H, q, kv]``."""
    offset = int(fact.offset.subs(sizes))
    i, j = torch.arange(q)[:, None] + offset, torch.arange(kv)[None]
    mask = torch.ones(1, 1, q, kv, dtype=torch.bool)
    if fact.causal:
        mask = mask & (j <= i)
    if fact.window is not None:
        mask = mask & (i - j < int(fact.window.subs(sizes)))
    for clause in fact.clauses:
        met = torch.zeros(1, 1, q, kv, dtype=torch.bool)
        for term in clause:
            if isinstance(term, MaskGroup):
                met = met | shared(term, values, i[:, 0], kv)
            else:
                met = met | (j <= i if term == CAUSAL else i - j < int(sympy.sympify(term).subs(sizes)))
        mask = mask & met
    if fact.padding is not None:
        padding = values[fact.padding.name]
        assert padding.dim() == 2 or padding.shape[1:-1] == (1, 1)
        assert padding.shape[-1] >= kv
        live = (padding == 0) if fact.padding_hides else (padding != 0)
        mask = mask & live.reshape(-1, 1, 1, padding.shape[-1])[..., :kv]
    return mask


def shared(group: MaskGroup, values: dict[str, Any], position: Tensor, kv: int) -> Tensor:
    """Whether the row at each position and each key are of one group, ``[B or 1, 1, q, kv]``."""
    ids = values[group.node.name]
    assert ids.dim() in (1, 2, 4)
    assert ids.shape[-1] >= kv
    assert ids.dim() < 4 or ids.shape[1:3] == (1, 1)
    ids = ids.reshape(-1, ids.shape[-1]).long()
    if group.together:
        assert lie_together(((Same(0, group.least),),), ids[None], [False])
    rows, keys = ids[:, position, None], ids[:, None, :kv]
    found = rows == keys
    return (found if group.least is None else found & (rows >= group.least))[:, None]


def check(fact: MaskFact, program: Program, batch: int, q: int, kv: int) -> None:
    """Compare a known fact with what the graph really computes for these sizes."""
    sizes = program.builder.sizes(batch, q, kv)
    for seed in range(3):
        try:
            values = program.run(batch, q, kv, seed)
        except IndexError:
            continue  # it reads beyond its tensors: no call of these sizes gets this far
        actual = values[program.mask.name]
        visible = actual if actual.dtype is torch.bool else actual == 0
        heads = actual.shape[-3] if actual.dim() > 2 and actual.shape[-3] > 1 else 2
        expected = described(fact, values, sizes, q, kv).expand(batch, heads, q, kv)
        assert torch.equal(visible.expand(batch, heads, q, kv), expected), (fact, program.builder.graph)
        if actual.dtype is not torch.bool:
            hidden = actual[~visible]
            assert ((hidden == float("-inf")) | (hidden == torch.finfo(actual.dtype).min)).all()
        if fact.padding is not None:
            assert values[fact.padding.name].shape[0] == batch


def prove_and_check(data: st.DataObject, build: Callable[..., Program | None]) -> None:
    """Whatever is proved about a random program has to be so, for the traced sizes and others."""
    dynamic = data.draw(st.booleans())
    batch, q = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    kv = q + data.draw(st.sampled_from([0, 0, 0, 1, 3]))
    program = data.draw(st.composite(lambda draw: build(draw, batch, q, kv, dynamic))())
    assume(program is not None)
    assert program is not None
    b = program.builder
    fact = prove(program.mask, q_len=b.q_len, kv_len=b.kv_len, batch=b.batch)
    event(f"known: {fact.known}")
    event(f"groups: {sorted('or' if len(clause) > 1 else 'and' for clause in fact.clauses)}")
    if not fact.known:
        assert fact.detail
        return
    check(fact, program, batch, q, kv)
    for other in [(4, 5, 9), (4, 5, 5), (4, 4, 9), (4, 9, 4), (4, 4, 4)]:
        if dynamic and b.allows(*other):
            event("known for other sizes")
            check(fact, program, *other)


@settings(max_examples=2 * settings().max_examples)
@given(st.data())
def test_a_known_fact_is_never_wrong(data: st.DataObject) -> None:
    prove_and_check(data, build)


@given(st.data())
def test_a_known_fact_about_groups_is_never_wrong(data: st.DataObject) -> None:
    prove_and_check(data, build_grouped)


Form = Callable[[Tensor, Tensor], Tensor]


def _low() -> float:
    # A global float would become an input of the dynamic graph.
    return torch.finfo(torch.float32).min


def _s(q: Tensor) -> int:
    return q.shape[2]


def _i(q: Tensor) -> tuple[Tensor, Tensor]:
    position = torch.arange(q.shape[2])
    return position[:, None], position[None, :]


def _tril(q: Tensor) -> Tensor:
    return torch.ones(_s(q), _s(q)).tril().bool()


def _window(q: Tensor, size: int) -> Tensor:
    i, j = _i(q)
    return (j <= i) & (j > i - size)


def _document(p: Tensor) -> Tensor:
    ids = p.cumsum(-1)
    return (ids[:, None, :, None] == ids[:, None, None, :]).bool()


def _same(p: Tensor) -> Tensor:
    return p[:, None, :, None] == p[:, None, None]


def _in_prefix(p: Tensor) -> Tensor:
    ids = torch.where(p == 0, 0, -1)
    return _same(ids) & (ids[:, None, :, None] >= 0)


def _from_rows(q: Tensor) -> Tensor:
    rows = torch.arange(_s(q))
    return torch.zeros(_s(q), _s(q)).masked_fill(rows > rows.view(_s(q), 1), _low())


def _old_style(q: Tensor, p: Tensor) -> Tensor:
    hidden = (1.0 - p.bool()[:, None, None, :].to(q.dtype)) * _low()
    return hidden + torch.full((_s(q), _s(q)), _low()).triu(1)


def _in_place(q: Tensor) -> Tensor:
    causal = torch.ones(_s(q), _s(q), dtype=torch.bool)
    causal = causal.tril_()
    return causal.logical_not_().logical_not_()


PROVED: dict[str, tuple[Form, str]] = {
    "tril of ones": (lambda q, p: _tril(q), "causal"),
    "torch.tril": (lambda q, p: torch.tril(torch.ones(_s(q), _s(q), dtype=torch.bool))[None, None], "causal"),
    "triu of -inf": (lambda q, p: torch.triu(torch.full((_s(q), _s(q)), float("-inf")), diagonal=1), "causal"),
    "not triu": (lambda q, p: ~torch.triu(torch.ones(_s(q), _s(q), dtype=torch.bool), 1), "causal"),
    "triu == 0": (lambda q, p: torch.ones(_s(q), _s(q)).triu(diagonal=1) == 0, "causal"),
    "tril with offset": (lambda q, p: torch.ones(_s(q), _s(q)).tril(diagonal=2).bool(), "causal with offset 2"),
    "less than plus one": (lambda q, p: torch.lt(_i(q)[1], _i(q)[0] + 1), "causal"),
    "method ge": (lambda q, p: _i(q)[0].ge(_i(q)[1]).unsqueeze(0).unsqueeze(0), "causal"),
    "view and masked_fill": (lambda q, p: _from_rows(q), "causal"),
    "masked_fill of not": (
        lambda q, p: torch.zeros(_s(q), _s(q)).masked_fill(_tril(q).logical_not(), float("-inf")),
        "causal",
    ),
    "where": (lambda q, p: torch.where(_tril(q), 0.0, float("-inf")), "causal"),
    "float32 min to half": (lambda q, p: torch.where(_tril(q), 0.0, _low()).to(torch.float16).float(), "causal"),
    "one minus mask": (lambda q, p: (1 - _tril(q).float()) * _low(), "causal"),
    "log": (lambda q, p: _tril(q).float().log(), "causal"),
    "in place": (lambda q, p: _in_place(q), "causal"),
    "window and causal": (lambda q, p: _window(q, 4), "causal and sliding window 4"),
    "window by distance": (lambda q, p: _tril(q) & (_i(q)[0] - _i(q)[1] < 3), "causal and sliding window 3"),
    "bool padding": (lambda q, p: p[:, None, None, :].bool(), "padding"),
    "padding != 0": (lambda q, p: _tril(q) & (p[:, None, None, :] != 0), "causal and padding"),
    "padding == 1": (lambda q, p: _tril(q) & (p == 1)[:, None, None, :], "causal and padding"),
    "padding > 0": (lambda q, p: _tril(q) & p.gt(0)[:, None, None], "causal and padding"),
    "padding by dtype": (lambda q, p: _tril(q) & p.to(torch.float16)[:, None, None].bool(), "causal and padding"),
    "padding by logical_and": (
        lambda q, p: torch.logical_and(_tril(q), p.view(p.shape[0], 1, 1, -1)), "causal and padding"
    ),
    "hidden where zero": (
        lambda q, p: torch.zeros(_s(q), _s(q)).masked_fill(~_tril(q) | (p[:, None, None] == 0), _low()),
        "causal and padding",
    ),
    "old style sum": (_old_style, "causal and padding"),
    "expanded": (
        lambda q, p: (_tril(q)[None, None] & p[:, None, None].bool()).expand(q.shape[0], -1, -1, -1),
        "causal and padding",
    ),
    "padding with room for heads": (lambda q, p: _tril(q) & p[:, None, None].roll(1, -1).bool(), "causal and padding"),
    "hidden keys": (lambda q, p: _tril(q) & ~p[:, None, None].bool(), "causal and padding"),
    "hidden keys, added": (
        lambda q, p: torch.zeros(_s(q), _s(q)).masked_fill(~_tril(q), _low())
        + torch.zeros(p.shape).masked_fill(p.bool(), float("-inf")).view(p.shape[0], 1, 1, -1),
        "causal and padding",
    ),
    "late == 1": (lambda q, p: _tril(q) & (p[:, None, None] == 1), "causal and padding"),
    "sliced": (lambda q, p: _tril(q)[None, None][:, :, :, : p.shape[1]], "causal"),
    "window twice": (lambda q, p: _window(q, 4) & _window(q, 3), "causal and sliding window 3"),
    "no mask at all": (lambda q, p: torch.ones(_s(q), _s(q), dtype=torch.bool), "all pairs visible"),
    "documents": (lambda q, p: _tril(q) & _document(p), "causal and same document"),
    "documents and padding": (
        lambda q, p: _tril(q) & _same(p) & (p != 0)[:, None, None], "causal and padding and same document"
    ),
    "blocks": (lambda q, p: _tril(q) | (_same(p) & (p[:, None, :, None] > 0)), "(causal or same block)"),
    "blocks in a window": (
        lambda q, p: (_tril(q) | (_same(p) & (p[:, None, :, None] >= 0))) & (_i(q)[0] - _i(q)[1] < 4),
        "sliding window 4 and (causal or same block)",
    ),
    "blocks beside a window": (
        lambda q, p: _window(q, 4) | (_same(p) & (p[:, None, :, None] >= 0)),
        "(causal or same block) and (sliding window 4 or same block)",
    ),
    "a prefix": (
        lambda q, p: _tril(q) | _in_prefix(p), "(causal or same block)"
    ),
    "chunks": (lambda q, p: _tril(q) & (_i(q)[0] // 4 == _i(q)[1] // 4), "causal and same chunk"),
    "or that changes nothing": (lambda q, p: _tril(q) & (_tril(q) | p[:, None, None].bool()), "causal"),
}  # fmt: skip

REFUSED: dict[str, tuple[Form, str]] = {
    "bidirectional images": (lambda q, p: _tril(q) | (p[:, None, None] == 2), "is not a plain condition"),
    "padding of queries": (lambda q, p: _tril(q) & p[:, None, :, None].bool(), "differs between query rows"),
    "padding of heads": (lambda q, p: _tril(q) & p[:, :, None].bool(), "differs between heads"),
    "roll by rows": (
        lambda q, p: _tril(q) & p[:, None, None].roll(1, -1).expand(-1, 1, _s(q), -1).flip(2).bool(),
        "`flip`, which is not read",
    ),
    "first row's padding": (lambda q, p: _tril(q) & p[:1, None, None].bool(), "is not a [batch, kv_len] tensor"),
    "first key's padding": (
        lambda q, p: _tril(q) & p[:, :1][:, None, None].bool().expand(-1, 1, _s(q), _s(q)),
        "is not a [batch, kv_len] tensor",
    ),
    "documents of rows alone": (lambda q, p: _document(p), "is not a plain condition"),
    "documents of other rows": (lambda q, p: _tril(q) & _document(p).flip(-1), "`flip`, which is not read"),
    "blocks of keys alone": (lambda q, p: _tril(q) | (_same(p) & (p[:, None, None] >= 0)), "is not a plain condition"),
    "blocks and other rows": (lambda q, p: _tril(q) | (_same(p) & (p[:, None, :, None] != 1)), "not a plain condition"),
    "documents one key off": (
        lambda q, p: _tril(q) & (p[:, None, :, None] == p.roll(1, -1)[:, None, None]), "`roll`, which is not read"
    ),
    "bias": (lambda q, p: torch.where(_tril(q), 0.0, -1e4), "a bias, or not low enough"),
    "half min in float": (
        lambda q, p: torch.where(_tril(q), 0.0, -65504.0).to(torch.float16).float(), "a bias, or not low enough"
    ),
    "0 times -inf": (lambda q, p: (1 - _tril(q).float()) * float("-inf"), "makes NaN"),
    "unknown ints": (lambda q, p: (1.0 - p[:, None, None].float()) * _low(), "to the scores"),
    "nothing visible": (lambda q, p: _i(q)[1] > _i(q)[0] + _s(q), "every pair is hidden"),
    "strictly upper": (lambda q, p: _i(q)[1] > _i(q)[0], "is not provably positive"),
    "stripes": (lambda q, p: _i(q)[1] <= 2 * _i(q)[0], "neither causal nor a window"),
    "prefix": (lambda q, p: (_i(q)[1] < 2).expand(_s(q), _s(q)), "neither causal nor a window"),
    "an input": (lambda q, p: p[:, None, None].float().expand(-1, 1, _s(q), -1), "to the scores"),
}  # fmt: skip


def _discarded_in_place(q: Tensor, p: Tensor) -> Tensor:
    mask = torch.ones(_s(q), _s(q), dtype=torch.bool)
    mask.tril_()
    return mask


def _padding_changed(q: Tensor, p: Tensor) -> Tensor:
    live = p.clone()
    mask = _tril(q) & live[:, None, None].bool()
    live[:, 0] = 0
    return mask & live[:, None, None].bool()


def _changed_through_view(q: Tensor, p: Tensor) -> Tensor:
    mask = torch.zeros(_s(q), _s(q))
    mask.view(-1).fill_(1.0)
    return mask.tril().bool()


REFUSED["discarded in-place result"] = (_discarded_in_place, "is changed in place")
REFUSED["padding changed"] = (_padding_changed, "is changed in place")
REFUSED["changed through a view"] = (_changed_through_view, "is changed in place")


def masks(gm: fx.GraphModule) -> list[tuple[fx.Node, Any, Any, Any]]:
    """Mask, q_len, kv_len and batch of every attention, fused or written out."""
    found: list[tuple[fx.Node, Any, Any, Any]] = []
    for node in gm.graph.nodes:
        if node.target is F.scaled_dot_product_attention:
            q, k = (node.args[n].meta["example_value"].shape for n in (0, 1))
            mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
            found.append((mask, q[2], k[2], q[0]))
        elif node.target in (F.softmax, torch.softmax):
            scores = node.args[0]
            shape = scores.meta["example_value"].shape
            found.append((scores.args[1], shape[2], shape[3], shape[0]))
    return found


def facts(gm: fx.GraphModule) -> list[MaskFact]:
    prover = Prover()
    return [prover.prove(m, q_len=q, kv_len=kv, batch=b) for m, q, kv, b in masks(gm) if isinstance(m, fx.Node)]


def prove_forms(forms: Sequence[Form], dynamic: bool) -> list[MaskFact]:
    """Facts of one graph in which each form has its own attention."""

    def run(q: Tensor, p: Tensor) -> list[Tensor]:
        return [F.scaled_dot_product_attention(q, q, q, attn_mask=form(q, p)) for form in forms]

    # As many heads as batch elements, so that padding of the wrong axis still broadcasts.
    q, p = torch.randn(3, 3, 7, 4), torch.ones(3, 7, dtype=torch.int64)
    (gm,) = capture(run, q, p, dynamic=dynamic, fullgraph=True).graphs
    # A prover for each: a form must not profit from what was read for another.
    return [prove(m, q_len=q_len, kv_len=kv, batch=b) for m, q_len, kv, b in masks(gm)]


def prove_form(form: Form, dynamic: bool) -> MaskFact:
    (fact,) = prove_forms([form], dynamic)
    return fact


@cache
def facts_of(kind: str, dynamic: bool) -> dict[str, MaskFact]:
    """What is found for each of the named forms; tracing all of them at once takes a fraction of the time."""
    named = {"proved": PROVED, "refused": REFUSED}[kind]
    found = prove_forms([form for form, _ in named.values()], dynamic)
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", PROVED)
def test_forms_that_are_proved(name: str, dynamic: bool) -> None:
    assert str(facts_of("proved", dynamic)[name]) == PROVED[name][1]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_forms_that_are_refused(name: str, dynamic: bool) -> None:
    fact = facts_of("refused", dynamic)[name]
    assert not fact.known
    assert REFUSED[name][1] in fact.detail


def outside_brackets(expression: str) -> str:
    """The expression without what stands in its brackets."""
    depth, kept = 0, ""
    for letter in expression:
        depth += letter in "(["
        kept += letter if not depth else ""
        depth -= letter in ")]"
    return kept


def test_alternatives_among_other_factors_are_printed_in_brackets() -> None:
    expressions = [fact.expression for fact in facts_of("proved", False).values()]
    mixed = [text for text in expressions if " & " in text and " | " in text]
    assert mixed
    assert not [text for text in mixed if "&" in outside_brackets(text) and "|" in outside_brackets(text)]


def test_padding_is_the_node_that_holds_it() -> None:
    for name, expected in (("padding != 0", "l_p_"), ("padding == 1", "eq"), ("bool padding", "l_p_")):
        fact = prove_form(PROVED[name][0], False)
        assert fact.padding is not None
        assert fact.padding.name == expected


def test_a_cast_that_may_cut_bits_is_itself_the_padding() -> None:
    # 256 is live as int64 and 0 as uint8.
    fact = prove_form(lambda q, p: p.to(torch.uint8)[:, None, None].bool(), False)
    assert fact.padding is not None
    assert fact.padding.meta["example_value"].dtype is torch.uint8


def test_padding_shared_by_the_batch_is_refused() -> None:
    assert not prove_form(lambda q, p: p[:1, None, None].bool(), False).known


def test_chunked_offset_is_an_expression_of_the_lengths() -> None:
    b = Builder(2, 4, 9, dynamic=True)
    shift = b.call(operator.sub, b.kv_len, b.q_len)
    rows = b.call(operator.add, b.call(torch.arange, b.q_len), shift)
    rows = b.call(operator.getitem, rows, (slice(None), None))
    mask = b.call(operator.le, b.call(torch.arange, b.kv_len), rows)
    fact = prove(mask, q_len=b.q_len, kv_len=b.kv_len, batch=b.batch)
    assert fact.known
    assert fact.causal
    assert sympy.simplify(fact.offset - (symbolic(b.kv_len) - symbolic(b.q_len))) == 0
    assert fact.offset != 0


def test_lengths_that_are_not_proved_equal_are_refused() -> None:
    b = Builder(2, 4, 9, dynamic=True)
    mask = b.method("tril", b.call(torch.ones, b.q_len, b.q_len, dtype=torch.bool))
    fact = prove(mask, q_len=b.q_len, kv_len=b.kv_len)
    assert not fact.known
    assert "not proved equal" in fact.detail


def test_a_float_mask_of_another_function_with_a_known_name_is_not_read() -> None:
    def tril(x: Tensor) -> Tensor:
        return x.triu()

    b = Builder(1, 4, 4, dynamic=False)
    mask = b.call(tril, b.call(torch.ones, 4, 4, dtype=torch.bool))
    fact = prove(mask, q_len=4, kv_len=4)
    assert not fact.known


def _mistral(attn: str) -> tuple[Any, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _model(transformers.MistralModel, config, attn)


def _gemma3(attn: str) -> tuple[Any, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _model(transformers.Gemma3TextModel, config, attn)


def _model(model_class: Any, config: Any, attn: str) -> tuple[Any, dict[str, Tensor]]:
    model = model_class._from_config(config, attn_implementation=attn).eval()
    ids = torch.randint(3, 60, (2, 20))
    attention_mask = torch.ones_like(ids)
    attention_mask[0, :3] = 0
    return model, {"input_ids": ids, "attention_mask": attention_mask}


@pytest.mark.parametrize(("attn", "dynamic"), [("sdpa", True), ("eager", False)])
def test_sliding_window_of_mistral(attn: str, dynamic: bool) -> None:
    model, inputs = _mistral(attn)
    gm = next(g for g in capture(model, use_cache=False, dynamic=dynamic, **inputs).graphs if masks(g))
    assert [str(f) for f in facts(gm)] == ["causal and sliding window 8 and padding"]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_both_masks_of_gemma3(attn: str) -> None:
    model, inputs = _gemma3(attn)
    gm = next(g for g in capture(model, use_cache=False, **inputs).graphs if masks(g))
    assert [str(f) for f in facts(gm)] == ["causal and sliding window 8 and padding", "causal and padding"]


@pytest.mark.parametrize(
    ("name", "attn", "dynamic"),
    [("qwen2_5_vl", "sdpa", True), ("qwen2_5_vl", "eager", False), ("llava", "sdpa", False), ("llava", "eager", True)],
)
def test_language_models_of_vision_models(name: str, attn: str, dynamic: bool) -> None:
    built, inputs = models.build(name, attn=attn, batch=2, padding="left", shape=ONE_LAYER)
    recorder = record(built.model.language_model, dynamic)
    with torch.no_grad():
        built(**inputs)
    assert meanings(recorder) == ["causal and padding"]


def record(model: torch.nn.Module, dynamic: bool | None = None) -> Recorder:
    """Compile ``model`` in place with a recorder."""
    torch._dynamo.reset()
    recorder = Recorder()
    model.compile(backend=recorder, dynamic=dynamic)
    return recorder


def meanings(recorder: Recorder) -> list[str]:
    return [str(fact) for gm in recorder.graphs for fact in facts(gm)]


@pytest.mark.parametrize(
    ("name", "attn", "dynamic"),
    [("qwen2", "sdpa", False), ("qwen2", "sdpa", True), ("qwen2", "eager", True)]
    + [("llama", "sdpa", True), ("llama", "eager", False), ("llama", "eager", True)],
)
def test_text_models_without_cache_or_padding_have_no_documents(name: str, attn: str, dynamic: bool) -> None:
    built, inputs = models.build(name, attn=attn, batch=2, tokens=9, with_attention_mask=False, shape=ONE_LAYER)
    found = meanings(capture(built.model, use_cache=False, dynamic=dynamic, **inputs))
    assert found == ["causal"]


@pytest.mark.parametrize(("name", "text"), [("qwen2", "causal"), ("mistral", "causal and sliding window 8")])
@pytest.mark.parametrize("dynamic", [False, True])
def test_documents_given_as_positions(name: str, text: str, dynamic: bool) -> None:
    built, inputs = models.build(name, tokens=19, with_attention_mask=False, shape=ONE_LAYER)
    positions = torch.cat([torch.arange(12), torch.arange(7)])[None]
    recorder = capture(built.model, use_cache=False, position_ids=positions, dynamic=dynamic, **inputs)
    (found,) = [fact for gm in recorder.graphs for fact in facts(gm)]
    assert str(found) == f"{text} and same document"
    assert found.groups[0].together


def test_documents_of_one_row_say_nothing_of_positions_of_another() -> None:
    positions = torch.stack([torch.randperm(40), torch.cat([torch.arange(15), torch.arange(25)])])

    def function(q: Tensor, p: Tensor) -> Tensor:
        jumps = torch.diff(p, prepend=p[:, :1] - 1, dim=-1)
        document = (jumps[1:2] != 1).cumsum(-1)
        earlier = p[:1][:, None, None] <= p[:1][:, None, :, None]
        mask = (document[:, None, :, None] == document[:, None, None]) & earlier
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    q = torch.randn(2, 2, 40, 16)
    compiled = torch.compile(function, backend="mminference", options={"policy": "exact", "inner": "eager"})
    torch.testing.assert_close(compiled(q, positions), function(q, positions))


def _llama4(attn: str) -> tuple[Any, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, attention_chunk_size=8, no_rope_layers=[1, 0],
        num_local_experts=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _model(transformers.Llama4TextModel, config, attn)


@pytest.mark.parametrize(("attn", "dynamic"), [("sdpa", True), ("eager", False)])
def test_chunks_of_llama4(attn: str, dynamic: bool) -> None:
    model, inputs = _llama4(attn)
    gm = next(g for g in capture(model, use_cache=False, dynamic=dynamic, **inputs).graphs if masks(g))
    chunked, plain = facts(gm)
    assert str(chunked) == "causal and padding and same chunk"
    assert chunked.groups[0].together
    assert str(plain) == "causal and padding"


@pytest.mark.parametrize(("attn", "dynamic"), [("sdpa", True), ("eager", False)])
def test_image_blocks_of_gemma3(attn: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    case = families.vision("gemma3", attn=attn, batch=2, padding="left", shape=models.Shape(layers=2))
    recorder = capture(case.model, use_cache=False, dynamic=dynamic, **case.inputs)
    found = {str(fact): fact for gm in recorder.graphs for fact in facts(gm)}
    blocks = "(causal or same block)"
    for words in (f"padding and {blocks}", f"sliding window 8 and padding and {blocks}"):
        assert found[words].groups[0].together


def test_documents_cannot_be_proved_away_where_positions_jump() -> None:
    def jump(q: Tensor, p: Tensor) -> Tensor:
        positions = (torch.arange(_s(q)) * 2)[None]
        ids = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
        return _tril(q) & (ids[:, None, :, None] == ids[:, None, None, :])

    fact = prove_form(jump, True)
    assert fact.groups
    assert fact.groups[0].together


def element_at(tensor: SymbolicTensor, index: tuple[int, ...], sizes: dict[sympy.Expr, int]) -> int | bool | None:
    """One element of a tensor that was read, for these sizes; None where it is left to the data."""
    places = {axis(len(index) - 1 - n): k for n, k in enumerate(index)}
    known = {symbol: sympy.Integer(value) for symbol, value in (places | sizes).items()}
    if isinstance(tensor.element, Position) and not tensor.element.expr.atoms(Value):
        return int(tensor.element.expr.xreplace(known))
    if isinstance(tensor.element, Cases):
        (value,) = (value for value, when in tensor.element.items if when.xreplace(known) == sympy.true)
        assert isinstance(value, int)
        return value
    if isinstance(tensor.element, Truth) and not tensor.element.condition.atoms(Live, Value):
        return tensor.element.condition.xreplace(known) == sympy.true
    return None


@given(st.data())
def test_differences_and_running_sums_are_exact_at_every_index(data: st.DataObject) -> None:
    batch, tokens = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 5))
    b = Builder(batch, tokens, tokens, data.draw(st.booleans()))
    small = st.sampled_from([1, 1, 0, 2, -1])
    dtype = data.draw(st.sampled_from([torch.int64, torch.int32]))
    positions = b.call(operator.mul, b.call(torch.arange, b.kv_len, dtype=dtype), data.draw(small))
    positions = b.call(operator.add, positions, data.draw(small))
    positions = b.method("expand", b.method("unsqueeze", positions, 0), b.batch, -1)
    ends: dict[str, Any] = {}
    for name, kept in (("prepend", slice(None, 1)), ("append", slice(-1, None))):
        if data.draw(st.booleans()):
            end = b.call(operator.getitem, positions, (slice(None), kept))
            ends[name] = b.call(operator.sub, end, data.draw(small))
    dim = data.draw(st.sampled_from([-1, 1, -1, 0]))
    if dim == 0:
        ends = {}
    steps = b.call(torch.diff, positions, dim=dim, **ends)
    changes = b.call(operator.ne, steps, data.draw(small))
    sums = b.method("cumsum", data.draw(st.sampled_from([changes, steps])), data.draw(st.sampled_from([-1, 0])))
    sizes, values, reader = b.sizes(batch, tokens, tokens), Program(b, sums).run(batch, tokens, tokens), Reader(b.graph)
    for node in (steps, changes, sums):
        tensor, actual = reader.read(node), values[node.name]
        for index in product(*map(range, actual.shape)):
            found = element_at(tensor, index, sizes)
            event(f"{node.target}: read {found is not None}")
            assert found is None or found == actual[index].item(), (node, tensor, index)


def test_layers_of_different_batch_sizes_do_not_share_a_fact() -> None:
    def run(q: Tensor, three: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        mask = _tril(q)[None, None] & p[:, None, None].bool()
        one = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        return one, F.scaled_dot_product_attention(three, three, three, attn_mask=mask)

    inputs = torch.randn(1, 2, 5, 4), torch.randn(3, 2, 5, 4), torch.ones(1, 5, dtype=torch.int64)
    (gm,) = capture(run, *inputs, dynamic=False).graphs
    context = PassContext(Options())
    for node in gm.graph.find_nodes(op="call_function", target=F.scaled_dot_product_attention):
        q, k, v = node.args
        context.sites.append(AttentionSite(node, q, k, v, "sdpa", mask=node.kwargs["attn_mask"]))
    ProveMask().run(gm, context)
    # One row of padding is all the padding that a batch of one has, and none that a batch of three could be given.
    assert [str(site.mask_fact).split(" (")[0] for site in context.sites] == ["causal and padding", "unknown"]


def chunks(batch: int, dynamic: bool | None, mask_tokens: int) -> list[tuple[MaskFact, fx.GraphModule]]:
    """Facts of a prefill in three chunks; the padding mask grows with them, or has its full length from the start."""
    transformers = pytest.importorskip("transformers")
    built, inputs = models.build(
        "qwen2", batch=batch, tokens=24, padding="left" if batch > 1 else "none", shape=ONE_LAYER
    )
    ids, live = inputs["input_ids"], inputs["attention_mask"]
    recorder, cache = record(built.model, dynamic), transformers.DynamicCache(config=built.model.config)
    for start, stop in ((0, 8), (8, 17), (17, 24)):
        with torch.no_grad():
            built.model(
                input_ids=ids[:, start:stop], attention_mask=live[:, : max(stop, mask_tokens)], past_key_values=cache,
                use_cache=True,
            )  # fmt: skip
    return [(fact, gm) for gm in recorder.graphs for fact in facts(gm)]


@pytest.mark.parametrize(("batch", "dynamic", "mask_tokens"), [(1, True, 0), (2, None, 24)])
def test_chunked_prefill_with_padding_of_another_symbol(batch: int, dynamic: bool | None, mask_tokens: int) -> None:
    found = chunks(batch, dynamic, mask_tokens)
    assert len(found) > 1
    for fact, gm in found:
        ((_, q_len, kv_len, _),) = masks(gm)
        assert fact.known, fact.detail
        assert fact.causal
        assert fact.padding is not None
        assert sympy.expand(fact.offset - symbolic(kv_len) + symbolic(q_len)) == 0
    last, gm = found[-1]
    ((_, _, kv_len, _),) = masks(gm)
    assert last.padding is not None
    assert symbolic(last.padding.meta["example_value"].shape[1]) != symbolic(kv_len)


@pytest.mark.parametrize("indexing", ["slice", "gather"])
def test_longer_padding_read_in_bounds_is_the_padding(indexing: str) -> None:
    b = Builder(2, 4, 9, dynamic=True)
    live = b.method("bool", b.wide)
    if indexing == "slice":
        mask = b.call(operator.getitem, live, (slice(None), None, None, slice(None, b.kv_len)))
    else:
        rows = b.call(operator.getitem, b.call(torch.arange, b.batch), (slice(None), None, None, None))
        keys = b.call(operator.getitem, b.call(torch.arange, b.kv_len), (None, None, None, slice(None)))
        mask = b.call(operator.getitem, live, (rows, keys))
    fact = prove(mask, q_len=b.q_len, kv_len=b.kv_len, batch=b.batch)
    assert fact.padding is b.wide


def test_a_slice_of_the_right_length_goes_before_longer_padding() -> None:
    b = Builder(2, 4, 9, dynamic=True)
    exact = b.call(operator.getitem, b.method("bool", b.wide), (slice(None), slice(None, b.kv_len)))
    mask = b.call(operator.getitem, exact, (slice(None), None, None, slice(None)))
    assert prove(mask, q_len=b.q_len, kv_len=b.kv_len, batch=b.batch).padding is exact


def test_longer_padding_that_a_shift_moves_is_read_where_it_has_moved() -> None:
    b = Builder(2, 4, 9, dynamic=True)
    shifted = slice(1, b.call(operator.add, b.kv_len, 1))
    mask = b.call(operator.getitem, b.method("bool", b.wide), (slice(None), None, None, shifted))
    assert prove(mask, q_len=b.q_len, kv_len=b.kv_len, batch=b.batch).padding is mask


def test_another_length_that_came_by_broadcasting_is_not_read_through() -> None:
    b = Builder(2, 4, 9, dynamic=True)
    keys = b.call(operator.le, b.call(torch.arange, b.kv_len), b.kv_len)
    live = b.call(operator.getitem, b.method("bool", b.wide), (slice(None), None, None, slice(None)))
    mask = b.graph.call_function(operator.and_, (keys, live))  # torch would refuse or guard: this is the traced value
    batch, kv_len = b.pad.meta["example_value"].shape
    with b.mode:
        mask.meta["example_value"] = torch.ones(batch, 1, 1, kv_len, dtype=torch.bool)
    fact = prove(mask, q_len=b.q_len, kv_len=b.kv_len, batch=b.batch)
    assert fact.padding is mask
    assert "wide" not in fact.expression


def test_padding_joined_from_pieces_is_no_proof_of_their_length() -> None:
    # Only the first half of the keys is read from `short`; the causal term hides the rest.
    b = Builder(2, 4, 9, dynamic=True)
    short = b.call(operator.getitem, b.method("bool", b.wide), (slice(None), slice(None, b.q_len)))
    past = b.call(operator.sub, b.kv_len, b.q_len)
    rest = b.call(torch.zeros, b.batch, past, dtype=torch.bool)
    live = b.call(operator.getitem, b.call(torch.cat, [short, rest], dim=-1), (slice(None), None, None))
    causal = b.method("tril", b.call(torch.ones, b.q_len, b.kv_len, dtype=torch.bool))
    fact = prove(b.call(operator.and_, causal, live), q_len=b.q_len, kv_len=b.kv_len, batch=b.batch)
    assert fact.padding is None or same(symbolic(fact.padding.meta["example_value"].shape[1]), symbolic(b.kv_len))


def test_a_maximum_that_a_guard_settles_is_settled() -> None:
    """A sliding cache that is full: positions count from ``max(0, seen - window + 1)``."""

    def function(q: Tensor, k: Tensor, seen: int) -> Tensor:
        first = max(0, seen - 8 + 1)
        if seen < 8:
            return q
        i, j = torch.arange(q.shape[2])[:, None] + seen, torch.arange(k.shape[2])[None] + first
        return F.scaled_dot_product_attention(q, k, k, attn_mask=j <= i)

    recorder = capture(function, torch.randn(1, 1, 5, 8), torch.randn(1, 1, 12, 8), 20, dynamic=True)
    (gm,) = recorder.graphs
    (mask,) = [node for node in gm.graph.nodes if node.target in (operator.le, "__le__")]
    q, k = (node.meta["example_value"] for node in gm.graph.nodes if node.name in ("l_q_", "l_k_"))
    fact = prove(mask, q_len=q.shape[2], kv_len=k.shape[2])
    assert (fact.causal, fact.offset) == (True, 7)


Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Whether batch element ``b`` with ids ``ids[B, N]`` sees key ``j`` from row ``i``: ``rule(ids, b, i, j)``."""

RULES: dict[str, tuple[Rule, str]] = {
    "window": (lambda ids, b, i, j: (j <= i) & (i - j < 3), "causal and sliding window 3"),
    "padding": (lambda ids, b, i, j: (j <= i) & (ids[b, j] != 0), "causal and padding"),
    "documents": (lambda ids, b, i, j: (j <= i) & (ids[b, i] == ids[b, j]), "causal and same document"),
    "blocks": (
        lambda ids, b, i, j: (j <= i) | ((ids[b, i] == ids[b, j]) & (ids[b, i] >= 1)), "(causal or same block)"
    ),
    # Nothing outside of vmap holds the chunk of a key.
    "chunks": (lambda ids, b, i, j: (j <= i) & ((j - ids[b, b]) // 3 == (i - ids[b, b]) // 3), ""),
    "rows": (lambda ids, b, i, j: (j <= i) & (ids[b, i] != 0), ""),
    "other batch": (lambda ids, b, i, j: (j <= i) & (ids[1 - b, i] == ids[1 - b, j]), ""),
    "not read": (lambda ids, b, i, j: (j <= i) & ((ids[b, j] ^ 1) == 1), ""),
    "not read of rows": (lambda ids, b, i, j: (j <= i) & ((ids[b, i] ^ ids[b, j]) == 0), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("outside", ["bij", "jib", "ibj"])
def test_masks_made_under_vmap(name: str, outside: str) -> None:
    """``outside`` says in which order ``vmap`` nests, as transformers does where it is given functions."""
    rule, expected = RULES[name]

    def function(q: Tensor, ids: Tensor) -> Tensor:
        def mapped(b: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return rule(ids, b, i, j)

        for letter in reversed(outside):
            mapped = torch.vmap(mapped, tuple(0 if letter == x else None for x in "bij"))
        visible = mapped(torch.arange(2), torch.arange(5), torch.arange(5))
        visible = visible.permute(*(outside.index(x) for x in "bij"))[:, None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=visible)

    ids = torch.tensor([[0, 1, 1, 2, 0], [1, 1, 0, 2, 2]])
    with TransformGetItemToIndex():
        (gm,) = capture(function, torch.randn(2, 1, 5, 8), ids, fullgraph=True).graphs
    (attention,) = [node for node in gm.graph.nodes if "attn_mask" in node.kwargs]
    fact = prove(attention.kwargs["attn_mask"], q_len=5, kv_len=5, batch=2)
    assert str(fact) == expected or (not expected and not fact.known), fact
    if fact.known:
        values = Values(gm.graph)
        values.run(*(torch.randn(2, 1, 5, 8) if "q" in n.name else ids for n in gm.graph.find_nodes(op="placeholder")))
        actual = values.by_name[attention.kwargs["attn_mask"].name]
        assert torch.equal(described(fact, values.by_name, {}, 5, 5).expand_as(actual), actual)
