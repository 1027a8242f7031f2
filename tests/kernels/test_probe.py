"""The PyTorch probe: what its sums mean, which diagonals it tells apart, and folded mass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.probe import (
    Probe,
    best_phase,
    phase_mass,
    probe_rows,
    probe_tile_count,
    reference_probe,
    run_probe,
)
from mmi_compile.kernels.reference import probabilities_reference
from tests.strategies import geometries, random_inputs

SCALE = 0.3


@given(geometries(), st.sampled_from([8, 16, 64]), st.integers(1, 70))
def test_tiles_hold_the_mass_of_their_own_rows(geometry: Geometry, block_m: int, last_q: int) -> None:
    g, x = geometry, random_inputs(geometry)
    probe = run_probe(x.q, x.k, g, SCALE, block_m=block_m, last_q=last_q)
    full = probabilities_reference(x.q, x.k, g.to_mask()[:, None], SCALE)
    assert torch.equal(probe.first_tile, probe.rows[:, 0] // block_m)
    for b in range(g.batch):
        for t in range(probe.tiles.shape[2]):
            rows = probe.rows[b][probe.rows[b] // block_m == probe.first_tile[b] + t]
            torch.testing.assert_close(probe.tiles[b, :, t], full[b, :, rows].sum(1))


@given(geometries(), st.integers(1, 40), st.integers(1, 64))
def test_tiles_hold_every_probe_row(geometry: Geometry, block_m: int, last_q: int) -> None:
    rows = probe_rows(geometry, torch.device("cpu"), last_q)
    count = probe_tile_count(geometry, rows.shape[1], block_m)
    assert int((rows // block_m - rows[:, :1] // block_m).max()) < count


@given(geometries(), st.data())
def test_picked_heads_are_those_of_all(geometry: Geometry, data: st.DataObject) -> None:
    g, x = geometry, random_inputs(geometry)
    heads = sorted(data.draw(st.sets(st.integers(0, g.q_heads - 1), min_size=1)))
    few = run_probe(x.q, x.k, g, SCALE, block_m=16, heads=heads, peaks=2)
    every = run_probe(x.q, x.k, g, SCALE, block_m=16, peaks=2)
    for name in ("columns", "distances", "tiles", "peaks", "beside"):
        torch.testing.assert_close(getattr(few, name), getattr(every, name)[:, heads])


def attend(pairs: list[tuple[int, int]], length: int = 256, head_dim: int = 64) -> Probe:
    """Probe of a head whose row ``i`` looks hard at key ``j`` for each of ``pairs`` and faintly at all others."""
    k = torch.nn.functional.normalize(
        torch.randn(1, 1, length, head_dim, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    q = torch.zeros_like(k)
    for i, j in pairs:
        q[0, 0, i] += k[0, 0, j]
    g = Geometry(1, 1, 1, length, length)
    return reference_probe(20.0 * q, k, g, 1.0, block_m=64, peaks=4, nearest=16)


def found(probe: Probe) -> set[int]:
    return set(probe.peak_distances[probe.peaks > 1.0].tolist())


def test_a_diagonal_is_a_peak() -> None:
    assert found(attend([(i, i - 100) for i in range(100, 256)])) == {100}


def test_half_a_diagonal_is_none() -> None:
    assert found(attend([(i, i - 100) for i in range(100, 224)])) == set()


def test_a_column_is_no_peak() -> None:
    probe = attend([(i, 30) for i in range(100, 256)])
    assert found(probe) == set()
    torch.testing.assert_close(probe.beside, probe.columns)


def test_one_row_that_looks_hard_at_one_key_is_no_peak() -> None:
    assert found(attend([(250, 20), (200, 77)])) == set()


def test_near_diagonals_are_no_candidates() -> None:
    assert found(attend([(i, i - 10) for i in range(100, 256)])) == set()


def test_what_lies_beside_a_peak_stays() -> None:
    probe = attend([(i, i - 100) for i in range(100, 256)])
    assert float(probe.columns[0, 0, 92:156].sum()) > 60
    assert float(probe.beside[0, 0, 92:156].sum()) < 4
    torch.testing.assert_close(probe.beside[0, 0, :92], probe.columns[0, 0, :92])


@given(st.integers(1, 300), st.lists(st.integers(1, 400), max_size=4), st.integers(0, 9))
def test_phase_mass_is_the_sum_by_residue(length: int, strides: list[int], seed: int) -> None:
    mass = torch.rand(2, 3, length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    folded = phase_mass(mass, strides)
    assert [f.shape for f in folded] == [(2, 3, stride) for stride in strides]
    for stride, sums in zip(strides, folded, strict=True):
        residue = (torch.arange(length) % stride).expand_as(mass)
        torch.testing.assert_close(sums, torch.zeros_like(sums).scatter_add_(-1, residue, mass))


@given(st.integers(1, 300), st.lists(st.integers(1, 400), min_size=3, max_size=3))
def test_best_phase_of_device_strides_is_that_of_host_strides(length: int, strides: list[int]) -> None:
    mass = torch.rand(2, 3, length, generator=torch.Generator().manual_seed(length))
    together = best_phase(mass, torch.tensor(strides).expand(2, -1))
    for head, stride in enumerate(strides):
        assert torch.equal(together[:, head], best_phase(mass[:, head : head + 1], stride)[:, 0])


def test_strides_start_at_one() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        phase_mass(torch.ones(1, 1, 4), [0])
