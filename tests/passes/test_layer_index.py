"""Which layer an attention is, from the paths of modules alone; and which graphs a head config fits."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmi_compile.passes.layer_index import layer_indices


def indices(*paths: str) -> list[int | None]:
    sites: list[Any] = [SimpleNamespace(where=path) for path in paths]
    return layer_indices(sites)


@given(
    prefix=st.sampled_from(["", "model.", "language_model.model.", "parts.0."]),
    suffix=st.sampled_from(["", ".self_attn", ".attention.inner", ".heads.0"]),
    numbers=st.sets(st.integers(0, 40), min_size=2, max_size=12),
    seed=st.integers(0, 3),
)
def test_a_list_of_layers_is_numbered_by_its_modules(prefix, suffix, numbers, seed):
    order = list(numbers)
    random.Random(seed).shuffle(order)
    assert indices(*(f"{prefix}layers.{n}{suffix}" for n in order)) == order


@pytest.mark.parametrize(
    ("paths", "found"),
    [
        ([], []),
        ([""], [None]),
        (["self_attn"], [None]),
        (["layers.3.self_attn"], [3]),
        (["layers.3.self_attn"] * 2, [3, 3]),
        (["", "layers.1.self_attn"], [None, 1]),
        (["parts.0.layers.3.self_attn"], [None]),
        (["layers.0.self_attn", "layers.0.cross_attn", "layers.1.self_attn"], [None, None, 1]),
        (["text.layers.0.attn", "language.layers.0.attn"], [None, None]),
        ([f"blocks.{b}.layers.{n}.attn" for b in range(2) for n in range(2)], [None] * 4),
    ],
)
def test_doubts_give_no_number(paths, found):
    assert indices(*paths) == found
