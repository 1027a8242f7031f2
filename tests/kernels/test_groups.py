"""Masks that group tokens: an interval of keys for every row, and the operators that use it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st
from torch import Tensor

from mmi_compile import runtime
from mmi_compile.decision import MMIError
from mmi_compile.kernels import grouped_ops  # noqa: F401  registers mmi::row_bounds
from mmi_compile.kernels.geometry import Geometry
from mmi_compile.kernels.groups import (
    CAUSAL,
    Clauses,
    Same,
    Window,
    clauses_to_text,
    intervals,
    lie_together,
    parse_clauses,
    stack_groups,
    visible,
)
from mmi_compile.kernels.ops import ABI
from mmi_compile.kernels.planner import TileShape, dense_plan
from mmi_compile.kernels.reference import attention_reference
from tests.host_waits import NoHostWaits

mmi = torch.ops.mmi
SCALE = 0.3


def terms(groups: int) -> st.SearchStrategy[object]:
    same = st.builds(Same, st.integers(0, groups - 1), st.sampled_from([None, 0, 1]))
    return st.one_of(st.just(CAUSAL), st.builds(Window, st.integers(1, 12)), same, same)


def masks(groups: int) -> st.SearchStrategy[Clauses]:
    """Any clauses; the first is usually causal, alone or with blocks."""
    clause = st.lists(terms(groups), min_size=1, max_size=3, unique=True).map(tuple)
    first = st.sampled_from([(CAUSAL,), (CAUSAL, Same(0, 0)), (CAUSAL, Same(0))])
    return st.builds(lambda a, rest: (a, *rest), first, st.lists(clause, max_size=3))


def ids(kind: str, batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Numbers of tokens: ``runs`` never come again, ``blocks`` have -1 between them, ``any`` are any."""
    if kind == "any":
        return torch.randint(-1, 3, (batch, tokens), generator=generator)
    starts = torch.rand(batch, tokens, generator=generator) < 0.2
    runs = starts.cumsum(1)
    if kind == "runs":
        return runs.flip(1) if torch.rand((), generator=generator) < 0.3 else runs
    return torch.where(runs % 3 == 1, runs // 3, -1)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Clauses, Tensor, int, int, int]:
    """Clauses, ids ``[K, B, tokens]``, q_len, offset and seed."""
    seed, batch = draw(st.integers(0, 9999)), draw(st.integers(1, 3))
    q_len, offset, spare = draw(st.integers(1, 40)), draw(st.sampled_from([0, 0, 7])), draw(st.sampled_from([0, 0, 5]))
    kinds = draw(st.lists(st.sampled_from(["runs", "blocks", "any"]), min_size=1, max_size=2))
    generator = torch.Generator().manual_seed(seed)
    found = torch.stack([ids(kind, batch, q_len + offset + spare, generator) for kind in kinds])
    return draw(masks(len(kinds))), found, q_len, offset, seed


@given(cases())
def test_intervals_are_the_mask_where_groups_lie_together(case: tuple[Clauses, Tensor, int, int, int]) -> None:
    clauses, found, q_len, offset, _ = case
    together = bool(lie_together(clauses, found, [False] * len(found)))
    event(f"together: {together}")
    assume(together)
    start, stop = intervals(clauses, found, q_len, offset)
    j = torch.arange(found.shape[-1])
    inside = (j >= start[..., None]) & (j < stop[..., None])
    assert torch.equal(inside, visible(clauses, found, torch.arange(q_len), offset))
    assert start.min() >= 0
    assert stop.max() <= found.shape[-1]
    assert (start <= stop).all()


@given(st.integers(0, 9999), st.sampled_from([None, 0, 1]))
def test_groups_that_come_again_are_seen(seed: int, least: int | None) -> None:
    found = torch.randint(-1, 2, (2, 1 + seed % 7), generator=torch.Generator().manual_seed(seed))
    together = True
    for row in found.tolist():
        for number in set(row):
            places = [n for n, other in enumerate(row) if other == number]
            counts = least is None or number >= least
            together &= not counts or places[-1] - places[0] + 1 == len(places)
    clauses = ((CAUSAL, Same(0, least)),)
    assert bool(lie_together(clauses, found[None], [False])) == together
    assert bool(lie_together(clauses, found[None], [True]))
    assert bool(lie_together(((CAUSAL,),), found[None], [False]))  # no clause asks


@given(masks(3))
def test_text_and_back(clauses: Clauses) -> None:
    assert parse_clauses(clauses_to_text(clauses)) == clauses


def test_text_that_is_no_mask() -> None:
    with pytest.raises(ValueError, match='no term of a mask: "same"; terms are causal'):
        parse_clauses("causal & same")


def test_groups_of_every_form_are_stacked() -> None:
    one = torch.tensor([3, 4, 5])
    stacked = stack_groups([one, one[None].int(), (one[None, None, None] > 3).expand(2, 1, 1, 3)], 2, 2)
    assert torch.equal(stacked, torch.tensor([[[3, 4]] * 2, [[3, 4]] * 2, [[0, 1]] * 2]))
    with pytest.raises(ValueError, match="2 prompts of 4 tokens"):
        stack_groups([one], 2, 4)


def attend(
    q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, found: Tensor, clauses: Clauses, offset: int
) -> Tensor:
    text, (batch, _, q_len, _) = clauses_to_text(clauses), q.shape
    rows = mmi.row_bounds(list(found), text, [False] * len(found), batch, q_len, k.shape[2], offset, ABI)
    out: Tensor = mmi.grouped_attention(q, k, v, padding, None, rows, text, SCALE, offset, "bshd", "groups/0", ABI)
    return out


@given(cases(), st.sampled_from(["none", "left", "right", "holes"]), st.sampled_from([(2, 2), (4, 2), (3, 1)]))
def test_attention_is_the_reference(
    case: tuple[Clauses, Tensor, int, int, int], kind: str, heads: tuple[int, int]
) -> None:
    clauses, found, q_len, offset, seed = case
    _, batch, tokens = found.shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, q_len, heads[0], 8, generator=generator, dtype=torch.float64).transpose(1, 2)
    k, v = (torch.randn(batch, heads[1], tokens, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    padding = None
    if kind != "none":
        padding = torch.rand(batch, tokens, generator=generator) < 0.8 if kind == "holes" else torch.ones(batch, tokens)
        edge = seed % (tokens + 1)
        if kind != "holes":
            padding[0, :edge] = kind == "right"
            padding[0, edge:] = kind == "left"
        k, v = (x.masked_fill(padding[:, None, :, None] == 0, torch.nan) for x in (k, v))
    mask = visible(clauses, found, torch.arange(q_len), offset)
    if padding is not None:
        mask = mask & (padding != 0)[:, None]
    expected = attention_reference(q, k.nan_to_num(), v.nan_to_num(), mask[:, None], SCALE)
    got = attend(q, k, v, padding, found, clauses, offset)
    run = runtime.attention_run("groups/0")
    assert run is not None
    event(run.path)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    assert got.transpose(1, 2).is_contiguous()


def test_operators_keep_their_promises() -> None:
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    ids_, text = torch.arange(9) // 4, "causal & same:0"
    arguments = ([ids_], text, [True], 2, 9, 9, 0, ABI)
    rows = mmi.row_bounds(*arguments)
    torch.library.opcheck(mmi.row_bounds.default, arguments)
    for layout in ("bshd", "bhsd"):
        torch.library.opcheck(
            mmi.grouped_attention.default, (q, k, k, None, None, rows, text, SCALE, 0, layout, "groups/1", ABI)
        )


def test_intervals_and_their_plans_never_wait_for_the_device() -> None:
    found = torch.stack([torch.arange(40) // 7] * 2)[None]
    clauses = parse_clauses("causal & window:9 & same:0|same:0:2")
    with NoHostWaits():
        start, stop = intervals(clauses, found, 33, 7)
        g = Geometry(2, 2, 1, 33, 40, 7, row_start=start, row_stop=stop)
        lie_together(clauses, found, [False])
        dense_plan(g, TileShape(16, 8), "cpu")


def test_rows_with_intervals_have_no_window_beside_them() -> None:
    start = torch.zeros(1, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="intersect it"):
        Geometry(1, 1, 1, 4, 4, window=2, row_start=start, row_stop=start)
    with pytest.raises(ValueError, match="both or neither"):
        Geometry(1, 1, 1, 4, 4, row_start=start)


def test_groups_that_are_too_short_are_refused() -> None:
    with pytest.raises(MMIError, match="one entry per token"):
        mmi.row_bounds([torch.zeros(2, 5)], "causal & same:0", [True], 2, 6, 6, 0, ABI)
    with pytest.raises(MMIError, match="beyond the 6 keys"):
        mmi.row_bounds([torch.zeros(2, 6)], "causal & same:0", [True], 2, 6, 6, 3, ABI)
    with pytest.raises(MMIError, match="compile it again"):
        mmi.row_bounds([torch.zeros(2, 6)], "causal & same:0", [True], 2, 6, 6, 0, ABI + 1)
