"""Structured inputs: what is planted is what attention finds, and the same seed gives the same tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmi_compile.kernels import structured
from mmi_compile.kernels.structured import Structure, StructuredInput, long_context_structure, structured_qkv

LENGTH = 2048
LONG = 16384


def last_rows(x: StructuredInput, head: int = 0) -> torch.Tensor:
    """Attention probabilities of the last 64 rows, ``[64, N]``."""
    length = x.q.shape[2]
    group = x.q.shape[1] // x.k.shape[1]
    scores = x.q[0, head, -64:].float() @ x.k[0, head // group].float().T * x.scale
    i, j = torch.arange(length - 64, length)[:, None], torch.arange(length)
    return torch.softmax(scores.masked_fill(j > i, -torch.inf), -1)


STRUCTURES = {
    "columns": Structure(columns=(3, 700)),
    "diagonals": Structure(distances=(0, 640)),
    "grid": Structure(stride=72, phase=7),
}


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_nearly_all_mass_lies_on_what_is_planted(structure: Structure) -> None:
    x = structured_qkv([structure], LENGTH)
    rows = list(range(LENGTH - 64, LENGTH))
    assert x.recall(x.planted(0)[rows], rows).item() > 0.97


def test_recall_is_that_of_plain_attention() -> None:
    x = structured_qkv([Structure(columns=(5,)), Structure(distances=(0,))], 128, kv_heads=1)
    mask = torch.rand(1, 2, 128, 128, generator=torch.Generator().manual_seed(1)) < 0.5
    scores = (x.q @ x.k.mT * x.scale).masked_fill(~torch.ones(128, 128, dtype=torch.bool).tril(), -torch.inf)
    want = (torch.softmax(scores, -1) * mask).sum(-1).mean(-1)
    torch.testing.assert_close(x.recall(mask), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.recall(torch.ones(128, 128, dtype=torch.bool)), torch.ones(1, 2))


def test_a_window_holds_its_share_and_fades() -> None:
    p = last_rows(structured_qkv([Structure(columns=(0, 1), local=256)], LENGTH, head_dim=128))
    distance = torch.arange(LENGTH - 64, LENGTH)[:, None] - torch.arange(LENGTH)
    near = (p * ((distance >= 0) & (distance < 256))).sum(-1)
    assert near.mean() > 0.05
    assert (p * (distance > 1024)).sum(-1).mean() > 0.5, "the sinks hold the rest"
    assert (p[:, 2:] * (distance[:, 2:] > 768)).sum(-1).mean() < 0.02


def test_periodic_diagonals_stand_out() -> None:
    x = structured_qkv([Structure(period=512, offset=100)], LENGTH, head_dim=128)
    p = last_rows(x)
    distance = torch.arange(LENGTH - 64, LENGTH)[:, None] - torch.arange(LENGTH)
    on = (distance % 512 == 100) & (distance >= 0)
    assert (p * on).sum(-1).mean() > 0.5


def test_vertical_slash_heads_look_like_real_ones() -> None:
    structure = long_context_structure("vertical_slash", LONG)
    p = last_rows(structured_qkv([structure], LONG, head_dim=128))
    columns = p.sum(0).topk(1000).indices
    assert structure.keys(LONG)[columns].sum() > 500
    distance = torch.arange(LONG - 64, LONG)[:, None] - torch.arange(LONG)
    mass = torch.zeros(LONG).scatter_add_(0, distance.clamp(min=0).flatten(), p.flatten())
    found = mass.topk(1024).indices
    assert (found < 2048).float().mean() > 0.7, "most are near"
    assert (found // 128).unique().numel() < 64, "and the others clustered"


def test_grid_heads_show_their_phase() -> None:
    structure = long_context_structure("grid", LONG, seed=5)
    mass = last_rows(structured_qkv([structure], LONG, head_dim=128)).sum(0)
    folded = mass.view(-1, structure.stride).sum(0)
    assert int(folded.argmax()) == structure.phase


def test_unknown_long_context_structure_is_refused() -> None:
    with pytest.raises(ValueError, match="vertical_slash"):
        long_context_structure("spiral", LONG)


def test_a_head_stays_inside_its_modality() -> None:
    modality = (torch.arange(LENGTH) // 100) % 3
    structures = [Structure(columns=(7, 150, 250), same_modality=True), Structure(columns=(7, 150))]
    x = structured_qkv(structures, LENGTH, kv_heads=1, modality=modality)
    same = modality[:, None] == modality
    inside, free = x.recall(same)[0]
    assert inside > 0.999
    assert free < 0.9
    assert torch.equal(x.planted(0) & ~same, torch.zeros_like(same))


def test_rows_of_each_modality_have_a_structure_of_their_own() -> None:
    modality = (torch.arange(LENGTH) // 64) % 2
    parts = {0: Structure(columns=(10,)), 1: Structure(columns=(20,))}
    x = structured_qkv([parts], LENGTH, modality=modality)
    rows = [LENGTH - 1, LENGTH - 65]
    for row in rows:
        mask = torch.zeros(1, LENGTH, dtype=torch.bool)
        mask[0, 10 if modality[row] == 0 else 20] = True
        assert x.recall(mask, [row]).item() > 0.95
    assert x.recall(x.planted(0)[rows], rows).item() > 0.95


def test_missing_modality_is_refused() -> None:
    with pytest.raises(ValueError, match="pass modality"):
        structured_qkv([Structure(same_modality=True)], 64)
    with pytest.raises(ValueError, match="pass modality"):
        structured_qkv([{0: Structure()}], 64)


@given(st.integers(1, 70), st.integers(0, 3), st.booleans())
def test_a_seed_means_the_same_tensors(length: int, seed: int, token_major: bool) -> None:
    structures = [Structure(distances=(0,)), Structure(stride=8, phase=3)]

    def make(seed: int) -> StructuredInput:
        return structured_qkv(
            structures, length, kv_heads=1, batch=2, seed=seed, token_major=token_major, dtype=torch.bfloat16
        )

    first, again, other = make(seed), make(seed), make(seed + 1)
    for name in ("q", "k", "v"):
        a, b, c = (getattr(x, name) for x in (first, again, other))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert a.isfinite().all()
        assert a.dtype == torch.bfloat16
        assert a.transpose(1, 2).is_contiguous() or not token_major
    assert first.q.shape == (2, 2, length, 64)
    assert first.k.shape == (2, 1, length, 64)


def test_rows_are_made_in_chunks_that_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "CHUNK", 100)
    x = structured_qkv([Structure(columns=(3,), distances=(130,))], 333)
    rows = list(range(300, 333))
    assert x.recall(x.planted(0)[rows], rows).item() > 0.97


def test_too_many_features_are_refused_with_the_least_head_dim() -> None:
    with pytest.raises(ValueError, match="give 12 or more"):
        structured_qkv([Structure()] * 4, 64, kv_heads=1, head_dim=8)
    with pytest.raises(ValueError, match="divisor of 3"):
        structured_qkv([Structure()] * 3, 64, kv_heads=2)
