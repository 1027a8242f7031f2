"""Patterns: validation, printing and JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given

from mmi_compile.kernels.patterns import AShape, Dense, Grid, Pattern, TriShape, VerticalSlash, from_json
from tests.strategies import patterns


@given(patterns())
def test_json_round_trip(pattern: Pattern) -> None:
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
