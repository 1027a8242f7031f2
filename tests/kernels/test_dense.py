"""Exact attention: every geometry, and no memory beyond linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from torch.utils._python_dispatch import TorchDispatchMode

from mmi_compile.kernels.dense import dense_attention
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.planner import TileShape
from mmi_compile.kernels.reference import attention_reference
from tests.strategies import geometries, random_inputs, tile_shapes

SCALE = 0.3


@given(geometries(), tile_shapes())
@example(Geometry(2, 4, 2, 50, 50), TileShape(16, 16))
@example(Geometry(2, 4, 2, 1, 40, q_offset=39), TileShape(16, 16))
@example(Geometry(1, 2, 2, 0, 0), TileShape(16, 16))
@example(Geometry(1, 2, 1, 37, 77, q_offset=40), TileShape(16, 16))
@example(Geometry(2, 2, 1, 40, 40, kv_start=torch.tensor([0, 7]), kv_stop=torch.tensor([33, 40])), TileShape(16, 16))
def test_dense_attention_is_exact(geometry: Geometry, tiles: TileShape) -> None:
    x = random_inputs(geometry)
    got = dense_attention(x.q, x.k, x.v, geometry, SCALE, tiles)
    expected = attention_reference(x.q, x.k, x.v, geometry.to_mask()[:, None], SCALE)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


class _LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that any operator returned."""

    largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(part, torch.Tensor):
                self.largest = max(self.largest, part.untyped_storage().nbytes() // part.element_size())
        return result


PADDED = {"kv_start": torch.tensor([5]), "kv_stop": torch.tensor([1900])}


@pytest.mark.parametrize(
    "facts",
    [{}, PADDED, {"window": 100}, {"q_offset": 48}, {"key_padding": torch.arange(2000)[None] % 7 != 3}],
    ids=["causal", "padded", "window", "offset", "holes"],
)
def test_nothing_quadratic_is_ever_made(facts: dict[str, Any]) -> None:
    length = 2000
    g = Geometry(1, 4, 2, length - facts.get("q_offset", 0), length, **facts)
    x = random_inputs(g, dtype=torch.float32)
    tiles = TileShape(16, 16)
    with _LargestResult() as seen:
        dense_attention(x.q, x.k, x.v, g, SCALE, tiles)
    heads_and_rows = g.q_heads * tiles.block_m
    assert seen.largest <= length * heads_and_rows


def test_a_device_kernel_is_called_with_a_plan() -> None:
    g = Geometry(1, 1, 1, 40, 40, window=9)
    x = random_inputs(g)
    calls = []

    def run_plan(*args: Any) -> torch.Tensor:
        calls.append(args[3].geometry)
        return x.q

    assert dense_attention(x.q, x.k, x.v, g, SCALE, TileShape(16, 16), run_plan) is x.q
    assert calls == [g]


def test_a_plan_without_a_kernel_is_refused() -> None:
    g = Geometry(1, 1, 1, 40, 40, window=9)
    q = torch.empty(1, 1, 40, 8, device="meta")
    with pytest.raises(ValueError, match="pass run_plan"):
        dense_attention(q, q, q, g, SCALE, TileShape(16, 16))
