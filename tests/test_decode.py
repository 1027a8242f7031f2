"""Decoding is left to the inner backend: the same graphs, the same calls, and next to nothing in the hooks."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import fx, nn

import mmi_compile
from mmi_compile import cached_prompt, record, report
from mmi_compile.frontend import find_language_model
from mmi_compile.kernels.ops import ABI  # noqa: F401  registers mmi::…
from tests import families
from tests.prompts import Shape

pytestmark = pytest.mark.fresh_dynamo

TOKENS = 6


@pytest.fixture(autouse=True)
def _own_report() -> None:
    report.forget()


class Counting:
    """An inner backend that counts how often each graph runs."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.calls: Counter[int] = Counter()

    def __call__(self, gm: fx.GraphModule, example_inputs: Any) -> Any:
        number = len(self.graphs)
        self.graphs.append(gm)

        def counted(*args: Any) -> Any:
            self.calls[number] += 1
            return gm.forward(*args)

        return counted

    def decoding(self) -> list[tuple[int, Counter[str], int]]:
        """Of each graph that runs once a token: its nodes, its calls by target, and how often it ran."""
        found = []
        for number, gm in enumerate(self.graphs):
            calls = Counter(str(node.target) for node in gm.graph.nodes if node.op.startswith("call"))
            if not any(is_ours(node) for node in gm.graph.nodes):
                found.append((len(gm.graph.nodes), calls, self.calls[number]))
        return found


def is_ours(node: fx.Node) -> bool:
    return node.op == "call_function" and str(node.target).startswith("mmi.")


def generated(model: Any, inputs: dict[str, Any], **arguments: Any) -> list[list[int]]:
    return model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, **arguments).tolist()


def built(name: str) -> tuple[nn.Module, dict[str, Any]]:
    if name in families.TEXT:
        return families.text(name, shape=Shape(layers=1))
    case = families.vision(name, shape=Shape(layers=1))
    return case.model, case.inputs


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl", pytest.param("llava", marks=pytest.mark.slow)])
def test_decode_graphs_are_those_of_the_inner_backend(name, cache):
    model, inputs = built(name)
    arguments = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    twin = copy.deepcopy(model)
    ours, alone = Counting(), Counting()
    mmi_compile.compile(model, policy="exact", inner=ours)
    tokens = generated(model, inputs, **arguments)
    torch._dynamo.reset()
    find_language_model(twin).compile(backend=alone)
    assert generated(twin, inputs, **arguments) == tokens
    # Alone, the first graph is the prompt's.
    decoding = [entry for number, entry in enumerate(alone.decoding()) if number]
    assert ours.decoding() == decoding
    assert sum(calls for _, _, calls in decoding) == TOKENS - 1
    assert ours.calls.total() == alone.calls.total() == TOKENS


def test_decoding_records_nothing(monkeypatch):
    model, inputs = built("qwen2_5_vl")
    mmi_compile.compile(model, policy="exact", inner="eager")
    seen: list[record.Record] = []
    push = record.push_hooked

    def pushing(found: record.Record) -> None:
        seen.append(found)
        push(found)

    monkeypatch.setattr(record, "push_hooked", pushing)
    asked: list[Any] = []
    monkeypatch.setattr(cached_prompt, "tokens_before", lambda kwargs: asked.append(kwargs) or 0)
    generated(model, inputs)
    assert [found.ids is not None for found in seen] == [True] + [False] * (TOKENS - 1)
    assert len(asked) == 1
