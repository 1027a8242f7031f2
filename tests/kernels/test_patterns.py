"""Patterns: validation, printing and JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given

from mmi_compile.kernels.patterns import AShape, BlockTopK, Dense, Grid, Pattern, TriShape, VerticalSlash, from_json
from tests.strategies import patterns


@given(patterns())
def test_json_round_trip(pattern: Pattern) -> None:
    assert from_json(json.loads(json.dumps(pattern.to_json()))) == pattern


@pytest.mark.parametrize("pattern", [BlockTopK(k=64), BlockTopK(mass=0.9, scoring="antidiagonal", stride=8, sink=0)])
def test_block_topk_json_round_trip(pattern: Pattern) -> None:
    assert from_json(json.loads(json.dumps(pattern.to_json()))) == pattern


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (Dense(), "dense"),
        (AShape(128, 4096), "a_shape(128, 4096)"),
        (TriShape(128, 4096, 64), "tri_shape(128, 4096, 64)"),
        (VerticalSlash(1000, 200), "vertical_slash(1000, 200)"),
        (Grid(None, 64, 512), "grid(None, 64, 512)"),
        (Grid(144, 64, 512, query_lines=True), "grid(144, 64, 512, query_lines)"),
        (BlockTopK(k=64), "block_topk(k=64, mean, local=128, sink=128)"),
        (
            BlockTopK(mass=0.9, scoring="antidiagonal", sink=0),
            "block_topk(mass=0.9, antidiagonal, stride=16, local=128, sink=0)",
        ),
    ],
)
def test_describe(pattern: Pattern, text: str) -> None:
    assert pattern.describe() == text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AShape(-1, 4), "a_shape: sink is -1; give 0 or more"),
        (lambda: AShape(0, 0), "a_shape: local is 0; give 1 or more"),
        (lambda: TriShape(0, 1, -2), "tri_shape: last is -2"),
        (lambda: VerticalSlash(3, 0), "vertical_slash: n_slash is 0"),
        (lambda: Grid(0, 1, 1), "grid: stride is 0; give 1 or more"),
        (lambda: BlockTopK(), "block_topk: k is None and mass is None; give exactly one of them"),
        (lambda: BlockTopK(k=1, mass=0.5), "block_topk: k is 1 and mass is 0.5; give exactly one of them"),
        (lambda: BlockTopK(k=0), "block_topk: k is 0; give 1 or more"),
        (lambda: BlockTopK(k=513), "block_topk: k is 513; give 512 or less"),
        (lambda: BlockTopK(mass=1.0), "block_topk: mass is 1.0; give a share between 0 and 1, or take dense"),
        (lambda: BlockTopK(mass=float("nan")), "block_topk: mass is nan"),
        (lambda: BlockTopK(k=1, scoring="means"), 'did you mean "mean"'),
        (lambda: BlockTopK(k=1, stride=2), "block_topk: stride is 2; give 4 or more"),
        (lambda: BlockTopK(k=1, local=0), "block_topk: local is 0; give 1 or more"),
        (lambda: BlockTopK(k=1, sink=-1), "block_topk: sink is -1; give 0 or more"),
        (lambda: from_json({"pattern": "block_topk", "kk": 3}), 'did you mean "k"'),
        (lambda: from_json({"pattern": "a_shap"}), 'did you mean "a_shape"'),
        (lambda: from_json({"pattern": "a_shape", "sink": 1, "locl": 2}), 'did you mean "local"'),
        (lambda: from_json({"pattern": "a_shape", "sink": 1}), "a_shape lacks local"),
        (lambda: from_json({}), "unknown pattern None"),
    ],
)
def test_values_out_of_range_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("value", [1.5, "4", True, None])
def test_values_of_a_wrong_type_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match="local must be an int"):
        AShape(0, value)  # type: ignore[arg-type]


def test_shares_and_counts_are_told_apart() -> None:
    with pytest.raises(TypeError, match="mass must be a float"):
        BlockTopK(mass=1)
    with pytest.raises(TypeError, match="mass must be a float"):
        BlockTopK(mass="0.5")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="k must be an int"):
        BlockTopK(k=0.5)  # type: ignore[arg-type]
