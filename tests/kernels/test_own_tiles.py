"""Tiles of the user's choice."""

from __future__ import annotations

import pytest
import torch

from mmi_compile.bench_peers import kernel_families
from mmi_compile.kernels.dispatch import CPU_TILES, tiles_for
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.own_tiles import using_tiles

CPU = torch.device("cpu")


def tiles_in_use() -> set[TileShape]:
    """Those of dispatch, and those that head search plans in."""
    return {tiles_for(CPU, torch.float32, 64), kernel_families(CPU, torch.float32, 64)[0].tiles}


def test_they_hold_for_a_while_and_everywhere() -> None:
    with using_tiles(TileShape(32, 16)):
        assert tiles_in_use() == {TileShape(32, 16)}
        with using_tiles(None):
            assert tiles_in_use() == {TileShape(32, 16)}
        with using_tiles(TileShape(64, 64)):
            assert tiles_in_use() == {TileShape(64, 64)}
        assert tiles_in_use() == {TileShape(32, 16)}
    assert tiles_in_use() == {CPU_TILES}


def test_they_end_with_an_error() -> None:
    with pytest.raises(RuntimeError, match="inside"), using_tiles(TileShape(32, 16)):
        raise RuntimeError("inside")
    assert tiles_in_use() == {CPU_TILES}


@pytest.mark.parametrize("tiles", [TileShape(8, 32), TileShape(32, 48), TileShape(32, 512)])
def test_others_are_refused(tiles: TileShape) -> None:
    with pytest.raises(ValueError, match="powers of two from 16 to 256"), using_tiles(tiles):
        pass
