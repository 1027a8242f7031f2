"""Which token is what: validation, order of trust, and that no record outlives its forward or leaves its thread."""

from __future__ import annotations

import gc
import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mmi_compile
from mmi_compile import record, report, runtime
from mmi_compile.decision import MMIError
from mmi_compile.kernels.ops import ABI  # noqa: F401  registers mmi::…
from mmi_compile.prompt_hook import PromptHook
from mmi_compile.record import Record
from tests import models

CPU = torch.device("cpu")
OPTIONS = {"policy": "exact", "inner": "eager"}


@pytest.fixture(autouse=True)
def _no_record_is_left() -> Any:
    record._state.__init__()
    report.forget()
    yield
    assert not record._state.given
    assert not record._state.hooked
    record._state.__init__()


def ids_of(*values: int) -> Tensor:
    return torch.tensor([values])


def read(reader: str = "graph", shape: tuple[int, int] = (1, 3)) -> tuple[list[int] | None, str]:
    found = record.read(reader, *shape, CPU)
    return (None if found.ids is None else found.ids.flatten().tolist()), found.source


# --- modality(ids) ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"int64 \(3,\).*\[batch, tokens\]"),
        (torch.zeros(1, 1, 3, dtype=torch.int64), r"\(1, 1, 3\)"),
        (torch.zeros(1, 3), "float32"),
        (torch.zeros(1, 3, dtype=torch.complex64), "complex64"),
        ([[0, 1]], "list"),
        (ids_of(0, 16), "0 … 15, found 0 … 16"),
        (ids_of(-1, 2), "found -1 … 2"),
    ],
)
def test_wrong_ids_are_refused_with_the_mend(ids, message):
    with pytest.raises(MMIError, match=message), mmi_compile.modality(ids):
        pass


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.uint8, torch.int64])
def test_any_integer_dtype_serves(dtype):
    with mmi_compile.modality(ids_of(0, 1, 1).to(dtype)):
        found = record.read("graph", 1, 3, CPU)
    assert found.ids is not None
    assert found.ids.dtype == torch.int8
    assert found.ids.tolist() == [[0, 1, 1]]
    assert found.source == "given by hand"


def test_empty_ids_serve_an_empty_prompt():
    with mmi_compile.modality(torch.zeros(1, 0, dtype=torch.int64)):
        assert read(shape=(1, 0)) == ([], "given by hand")


def test_nesting_restores_the_outer_ids():
    with mmi_compile.modality(ids_of(1, 1, 1)):
        with mmi_compile.modality(ids_of(2, 2, 2)):
            assert read()[0] == [2, 2, 2]
        with mmi_compile.modality(ids_of(0, 1)):  # of another shape, and not equal to the outer in any sense
            assert read(shape=(1, 2))[0] == [0, 1]
        assert read()[0] == [1, 1, 1]
    assert read()[0] is None


def test_ids_end_with_the_block_also_after_an_exception():
    with pytest.raises(ZeroDivisionError), mmi_compile.modality(ids_of(1, 1, 1)):
        raise ZeroDivisionError
    assert read()[0] is None


def test_another_shape_is_ignored_and_noted():
    with mmi_compile.modality(ids_of(1, 1, 1, 1)):
        ids, source = read()
        assert ids is None
        assert source == "given by hand, ignored: shape (1, 4) is not (1, 3)"
        with record.hooked(Record("a hook", ids=ids_of(0, 2, 0))):
            ids, source = read()
    assert ids == [0, 2, 0]
    assert source.startswith("a hook; given by hand, ignored")


def test_readers_get_a_copy():
    given = ids_of(0, 1, 0)
    with mmi_compile.modality(given):
        ids = record.read("graph", 1, 3, CPU).ids
        assert ids is not None
        ids.fill_(5)
        assert read()[0] == [0, 1, 0]


# --- order of trust -----------------------------------------------------------------------------------------------


def test_order_of_trust():
    with record.hooked(Record("a hook", ids=ids_of(2, 0, 0))):
        record.tag(ids_of(0, 0, 1).bool(), "image")
        assert read() == ([2, 0, 0], "a hook")
        with mmi_compile.modality(ids_of(0, 3, 0)):
            assert read() == ([0, 3, 0], "given by hand")
    record.tag(ids_of(0, 0, 1).bool(), "video")
    assert read() == ([0, 0, 2], "compiled graphs")


def test_a_hook_that_found_nothing_says_why():
    with record.hooked(Record("the prompt has no input_ids")):
        ids, source = read()
    assert ids is None
    assert source == "the prompt has no input_ids"


def test_labels_become_ids():
    assert record.label_ids(["video", "depth", "image", "lidar"]) == [2, 4, 1, 5]
    many = record.label_ids([f"kind {i}" for i in range(40)])
    assert max(many) == record.MAX_MODALITIES - 1


# --- one forward --------------------------------------------------------------------------------------------------


def test_no_graph_reads_a_record_twice():
    record.tag(ids_of(0, 0, 1).bool(), "image")
    assert read("first half")[0] == [0, 0, 1]
    assert read("second half")[0] == [0, 0, 1]  # another graph of the same forward
    assert read("first half")[0] is None  # the next forward
    assert read("second half")[0] is None


def test_begin_prompt_forgets():
    record.tag(ids_of(0, 0, 1).bool(), "image")
    record.begin_prompt()
    assert read()[0] is None


def test_a_tag_after_a_reader_begins_another_record():
    record.tag(ids_of(0, 0, 1).bool(), "image")
    read("a")
    record.tag(ids_of(1, 0, 0).bool(), "video")
    assert read("a")[0] == [2, 0, 0]


def test_tags_of_one_prompt_add_up():
    record.tag(ids_of(0, 0, 1).bool(), "image")
    record.tag(ids_of(1, 0, 0).bool(), "video")
    assert read()[0] == [2, 0, 1]


def test_tags_of_another_shape_are_ignored():
    record.tag(torch.ones(1, 4, dtype=torch.bool), "image")
    ids, source = read()
    assert ids is None
    assert "another shape" in source


def test_a_hooked_forward_neither_inherits_nor_leaves_tags():
    record.tag(ids_of(0, 0, 1).bool(), "image")
    with record.hooked(Record("the prompt has no input_ids")):
        assert read("a")[0] is None
        record.tag(ids_of(1, 0, 0).bool(), "image")
        assert read("b")[0] == [1, 0, 0]
    assert read("c")[0] is None


def test_only_the_owner_ends_a_record():
    mine, other = object(), object()
    record.push_hooked(Record("mine", ids=ids_of(0, 1, 0), owner=mine))
    record.pop_hooked(other)
    assert read()[0] == [0, 1, 0]
    record.pop_hooked(mine)
    record.pop_hooked(mine)
    assert read()[0] is None


def test_an_exception_in_forward_ends_the_hooks_record():
    model, inputs = models.qwen2(shape=models.Shape(layers=1))
    PromptHook.install(model)
    seen: list[int] = []

    def fail(*_: object) -> None:
        seen.append(len(record._state.hooked))
        raise ZeroDivisionError

    handle = model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        model(**inputs)
    assert seen == [1]
    assert not record._state.hooked
    handle.remove()
    with torch.no_grad():
        model(**inputs)
    assert not record._state.hooked


def test_a_hook_that_never_ran_ends_nobody_elses_record():
    model, inputs = models.qwen2(shape=models.Shape(layers=1))
    PromptHook.install(model)

    def refuse(*_: object) -> None:
        raise ZeroDivisionError

    model.register_forward_pre_hook(refuse, prepend=True)  # runs before ours
    with record.hooked(Record("outer", ids=ids_of(0, 1, 0))):
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        assert read()[0] == [0, 1, 0]


# --- one call of a compiled function ------------------------------------------------------------------------------


def _tagging(ids: Tensor) -> Tensor:
    return torch.ops.mmi.tag_modality(ids == 7, "video") * 1


def _reading(x: Tensor) -> Tensor:
    return torch.ops.mmi.modality(x, [], "", None, 1, 3, "reader") * 1


def _both(ids: Tensor, x: Tensor) -> Tensor:
    tagged = _tagging(ids)
    torch._dynamo.graph_break()
    return _reading(x) + 0 * tagged


@pytest.mark.fresh_dynamo
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_tags_are_read_within_the_call_that_made_them_and_nowhere_else(backend):
    ids, x = ids_of(0, 7, 7), torch.zeros(1, 3)
    first, second, both = (torch.compile(f, backend=backend) for f in (_tagging, _reading, _both))
    assert both(ids, x).tolist() == [[0, 2, 2]]
    first(ids)  # nobody reads this
    assert second(x).tolist() == [[0, 0, 0]]
    first(ids)
    gc.collect()  # compiling may leave frames in cycles
    assert not record._state.tagged.masks, "memory is held after the call"
    assert both(ids_of(7, 0, 0), x).tolist() == [[2, 0, 0]]


@pytest.mark.fresh_dynamo
def test_an_exception_ends_the_call():
    def fail(ids: Tensor) -> Tensor:
        assert _tagging(ids).shape == ids.shape
        torch._dynamo.graph_break()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        torch.compile(fail, backend="eager")(ids_of(0, 7, 7))
    assert torch.compile(_reading, backend="eager")(torch.zeros(1, 3)).tolist() == [[0, 0, 0]]


@pytest.mark.fresh_dynamo
def test_a_compiled_call_inside_another():
    """What the outer call tagged holds for it, and what the inner call tagged ends with the inner one."""
    reads, tags = (torch.compile(f, backend="eager") for f in (_reading, _tagging))
    inner_reads = torch.compiler.disable(lambda x: reads(x))
    inner_tags = torch.compiler.disable(lambda ids: tags(ids))

    def outer(ids: Tensor, x: Tensor) -> Tensor:
        tagged = _tagging(ids)
        return inner_reads(x) + 0 * tagged

    def around(ids: Tensor, x: Tensor) -> Tensor:
        tagged = inner_tags(ids)
        torch._dynamo.graph_break()
        return _reading(x) + 0 * tagged

    ids, x = ids_of(0, 7, 7), torch.zeros(1, 3)
    assert torch.compile(outer, backend="eager")(ids, x).tolist() == [[0, 2, 2]]
    assert torch.compile(around, backend="eager")(ids, x).tolist() == [[0, 0, 0]]


def test_labels_tell_kinds_apart_by_their_token():
    assert record.told_apart(["image@5", "video@6"]) == (["image", "video"], "")
    assert record.told_apart(["image@5", "id 5@5", "video@6"])[0] == ["image", "image", "video"]
    kinds, note = record.told_apart(["image@5", "video@5", "audio@6"])
    assert kinds == ["vision", "vision", "audio"]
    assert note == "image and video tokens share id 5: not told apart"
    kinds, note = record.told_apart(["image@5"])
    assert (kinds, note) == (["image"], record.IMAGE_ONLY)
    ids, names = record.merge([ids_of(1, 1, 0).bool(), ids_of(0, 1, 0).bool()], ["image", "vision"])
    assert (ids.tolist(), names) == ([[1, 1, 0]], {1: "image", 4: "vision"})


# --- what the hook reads ------------------------------------------------------------------------------------------


class _Config:
    image_token_id = 7
    video_token_index = 9


def _hook(config: object) -> PromptHook:
    model = torch.nn.Module()
    model.config = config
    return PromptHook(model)


@pytest.mark.parametrize("positional", [False, True])
def test_hook_reads_ids_and_config(positional):
    ids = ids_of(1, 7, 9, 7)
    found = _hook(_Config()).read(*(((ids,), {}) if positional else ((), {"input_ids": ids})))
    assert found.source == "input_ids and config"
    assert found.ids is not None
    assert found.ids.tolist() == [[0, 1, 2, 1]]


def test_hook_prefers_the_processors_types():
    found = _hook(_Config()).read((), {"input_ids": ids_of(1, 7, 7), "mm_token_type_ids": ids_of(0, 2, 2)})
    assert (found.source, found.ids.tolist()) == ("mm_token_type_ids", [[0, 2, 2]])
    # Prefix and suffix, as some families have it, are no modalities.
    found = _hook(_Config()).read((), {"input_ids": ids_of(1, 7, 7), "token_type_ids": ids_of(0, 0, 1)})
    assert (found.source, found.ids.tolist()) == ("input_ids and config", [[0, 1, 1]])
    found = _hook(None).read((), {"input_ids": ids_of(1, 7, 7), "token_type_ids": ids_of(0, 1, 1)})
    assert (found.source, found.ids.tolist()) == ("token_type_ids", [[0, 1, 1]])


def test_hook_ignores_types_of_another_shape():
    found = _hook(_Config()).read((), {"input_ids": ids_of(1, 7), "mm_token_type_ids": ids_of(0, 1, 1)})
    assert found.source == "input_ids and config"


@pytest.mark.parametrize(
    "kwargs", [{}, {"input_ids": None}, {"input_ids": torch.zeros(1, 3)}, {"input_ids": torch.zeros(3).long()}]
)
def test_hook_without_usable_ids(kwargs):
    found = _hook(_Config()).read((), kwargs)
    assert found.ids is None
    assert found.source == "the prompt has no input_ids"


def test_hook_without_token_ids():
    assert _hook(None).read((), {"input_ids": ids_of(1, 1)}).source == "the config names no image or video token"


# --- whole models -------------------------------------------------------------------------------------------------


def _without_images(inputs: dict[str, Any]) -> dict[str, Any]:
    """A text prompt of the same shape."""
    ids = inputs["input_ids"].clone()
    ids[ids >= models.IMAGE_ID] = models.TEXT_IDS[0]
    kept = {"input_ids": ids, "attention_mask": inputs["attention_mask"]}
    if "mm_token_type_ids" in inputs:
        kept["mm_token_type_ids"] = torch.zeros_like(ids)
    return kept


@pytest.fixture
def prompts_seen(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[list[list[int]]]]:
    """Thread → the modality ids of every prefill that ran in it, as the operators saw them."""
    seen: dict[int, list[list[list[int]]]] = {}
    note = runtime.record_modality

    def noting(graph_key: str, run: runtime.ModalityRun) -> None:
        seen.setdefault(threading.get_ident(), []).append(run.ids.tolist())
        note(graph_key, run)

    monkeypatch.setattr(runtime, "record_modality", noting)
    return seen


def _truth(inputs: dict[str, Any]) -> list[list[int]]:
    ids = inputs["input_ids"]
    return ((ids == models.IMAGE_ID).long() + 2 * (ids == models.VIDEO_ID).long()).tolist()


@pytest.mark.fresh_dynamo
@pytest.mark.parametrize("through", ["bare", "compile"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_text_prompt_after_an_image_prompt_of_its_shape_is_text(name, through, prompts_seen):
    model, inputs = models.build(name, shape=models.Shape(layers=1))
    text = _without_images(inputs)
    compiled: Callable[..., Any]
    if through == "bare":
        compiled = torch.compile(model, backend="mminference", options=OPTIONS)
    else:
        compiled = mmi_compile.compile(model, **OPTIONS)
    prompts = [inputs, text, inputs, text, text]
    with torch.no_grad():
        for prompt in prompts:
            compiled(**prompt)
    (seen,) = prompts_seen.values()
    assert seen == [_truth(prompt) for prompt in prompts]


@pytest.mark.fresh_dynamo
@pytest.mark.parametrize("through", ["bare", "compile"])
def test_two_threads_and_two_models_do_not_mix(through, prompts_seen):
    shape = models.Shape(layers=1)
    built = [models.llava(images=2, shape=shape), models.qwen2_5_vl(images=1, frames=2, shape=shape)]
    assert built[0][1]["input_ids"].shape != built[1][1]["input_ids"].shape
    barrier = threading.Barrier(2)
    rounds, failures, threads_of = 3, [], {}

    def work(index: int) -> None:
        model, inputs = built[index]
        threads_of[index] = threading.get_ident()
        prompts = [inputs, _without_images(inputs)] * rounds
        try:
            with torch.no_grad():
                expected = [model(**prompt).logits for prompt in prompts[:2]]
                compiled: Callable[..., Any]
                if through == "bare":
                    compiled = torch.compile(model, backend="mminference", options=OPTIONS)
                else:
                    compiled = mmi_compile.compile(model, **OPTIONS)
                for i, prompt in enumerate(prompts):
                    barrier.wait(timeout=120)
                    torch.testing.assert_close(compiled(**prompt).logits, expected[i % 2], rtol=1e-4, atol=1e-4)
            if record._state.hooked or record._state.given:
                failures.append("a record is left")
        except Exception:  # a thread's exception would be lost
            failures.append(traceback.format_exc())
            barrier.abort()

    # PyTorch loads a backend's entry point without a lock: two first look-ups at once fail with "duplicate name".
    torch._dynamo.lookup_backend("mminference")
    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=240)
    assert not failures, "\n".join(failures)
    for index, (_, inputs) in enumerate(built):
        prompts = [inputs, _without_images(inputs)] * rounds
        assert prompts_seen[threads_of[index]] == [_truth(prompt) for prompt in prompts]
    assert len(prompts_seen) == 2


def test_modality_given_by_hand_reaches_one_thread_only():
    found: list[object] = []
    with mmi_compile.modality(ids_of(1, 1, 1)):
        thread = threading.Thread(target=lambda: found.append(read()[0]))
        thread.start()
        thread.join()
        assert read()[0] == [1, 1, 1]
    assert found == [None]


@pytest.mark.fresh_dynamo
def test_ids_given_by_hand_reach_any_model(prompts_seen):
    model, inputs = models.plain_causal(tokens=9, shape=models.Shape(layers=1))
    compiled = torch.compile(model, backend="mminference", options=OPTIONS)
    ids = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 0, 0]])
    with torch.no_grad():
        with mmi_compile.modality(ids):
            compiled(**inputs)
        compiled(**inputs)
        with mmi_compile.modality(ids[:, :5]):
            compiled(**inputs)
    (seen,) = prompts_seen.values()
    assert seen == [ids.tolist(), [[0] * 9], [[0] * 9]]
    assert "ignored: shape (1, 5) is not (1, 9)" in str(mmi_compile.last_report())
