"""Whatever program of attention is compiled computes what it computed: random masks, heads, lengths and layouts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor

from mmi_compile import report
from mmi_compile.kernels import dispatch
from mmi_compile.kernels.frames import TileShape
from tests.harness import relative_error

pytestmark = pytest.mark.fresh_dynamo

Term = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``i [q_len, 1]``, ``j [1, keys]``, live ``[B, keys]`` and ids ``[B, keys]`` to a bool mask that broadcasts to
``[B, 1, q_len, keys]``; the rows are the last of the keys' positions."""


def _same(i: Tensor, j: Tensor, live: Tensor, ids: Tensor) -> Tensor:
    return ids[:, None, -i.shape[0] :, None] == ids[:, None, None]


TERMS: dict[str, Term] = {
    "causal": lambda i, j, live, ids: j <= i,
    "window": lambda i, j, live, ids: i - j < 9,
    "wide window": lambda i, j, live, ids: i - j < 40,
    "padding": lambda i, j, live, ids: live[:, None, None],
    "hidden": lambda i, j, live, ids: ~(live == 0)[:, None, None],
    "documents": _same,
    "blocks": lambda i, j, live, ids: _same(i, j, live, ids) & (ids[:, None, -i.shape[0] :, None] >= 0),
    "chunks": lambda i, j, live, ids: i // 8 == j // 8,
    "prefix": lambda i, j, live, ids: j < 3,
}


@st.composite
def masks(draw: st.DrawFn) -> list[list[str]]:
    """Clauses of terms; nearly always with a causal one, alone or beside others."""
    clause = st.lists(st.sampled_from(sorted(TERMS)), min_size=1, max_size=2, unique=True)
    first = draw(st.sampled_from([["causal"], ["causal"], ["causal", "blocks"], ["causal", "window"], ["window"]]))
    return [first, *draw(st.lists(clause, max_size=3))]


def program(clauses: list[list[str]], form: str, scale: float | None) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, live: Tensor, ids: Tensor) -> Tensor:
        i = torch.arange(q.shape[2])[:, None] + (k.shape[2] - q.shape[2])
        j = torch.arange(k.shape[2])[None]
        mask = torch.ones((), dtype=torch.bool)
        for clause in clauses:
            met = TERMS[clause[0]](i, j, live, ids)
            for name in clause[1:]:
                met = met | TERMS[name](i, j, live, ids)
            mask = mask & met
        if mask.dim() == 2:
            mask = mask[None, None]
        if form == "fused":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
        return torch.softmax(scores.masked_fill(~mask, -math.inf), -1).nan_to_num(0.0) @ v if form == "nan" else (
            torch.softmax(scores + torch.zeros(()).masked_fill(~mask, torch.finfo(q.dtype).min), -1) @ v
        )  # fmt: skip

    return run


def inputs(data: st.DataObject, q_heads: int, k_heads: int, dim: int) -> tuple[Tensor, ...]:
    """q as a view of ``[B, N, H, D]``, k a slice, and padding on either side, in between or of everything."""
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    batch, q_len = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.sampled_from([1, 2, 17, 33, 70]))
    keys = q_len + data.draw(st.sampled_from([0, 0, 0, 5, 16]))
    q = torch.randn(batch, q_len, q_heads, dim, generator=random).transpose(1, 2)
    k = torch.randn(batch, k_heads, keys + 2, dim, generator=random)[:, :, 2:]
    v = torch.randn(batch, k_heads, keys, dim, generator=random)
    live, places = torch.ones(batch, keys, dtype=torch.bool), torch.arange(keys)
    for row in live:
        cut = data.draw(st.integers(0, keys))
        side = data.draw(st.sampled_from(["none", "left", "right", "holes"]))
        row &= {"none": places >= 0, "left": places >= cut, "right": places < cut, "holes": places % 7 != cut % 7}[side]
    runs = (torch.rand(batch, keys, generator=random) < 0.2).cumsum(1)
    kind = data.draw(st.sampled_from(["runs", "blocks", "any"]))
    ids = {"runs": runs, "blocks": torch.where(runs % 3 == 1, runs // 3, -1), "any": runs % 4 - 1}[kind]
    return q, k, v, live, ids


@given(masks(), st.sampled_from(["fused", "low", "nan"]), st.sampled_from([None, 0.3]), st.data())
def test_a_compiled_program_computes_what_it_did(
    clauses: list[list[str]], form: str, scale: float | None, data: st.DataObject
) -> None:
    k_heads, group = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.sampled_from([1, 2, 5]))
    policy = data.draw(st.sampled_from(["exact", "exact", "adaptive", "sparse"]))
    options: dict[str, Any] = {"policy": "adaptive" if policy == "sparse" else policy, "inner": "eager"}
    if policy != "exact":
        options |= {"min_tokens": 0, "recall": 1.0 if policy == "adaptive" else 0.8, "max_density": 1.0}
    function = program(clauses, form, scale)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(dispatch, "CPU_TILES", TileShape(16, 16))
        torch._dynamo.reset()
        report.forget()
        compiled = torch.compile(
            function, backend="mminference", options=options, dynamic=data.draw(st.sampled_from([None, True, False]))
        )
        for _ in range(data.draw(st.integers(1, 3))):
            given_now = inputs(data, k_heads * group, k_heads, 16)
            actual, expected = compiled(*given_now), function(*given_now)
            # What a row that may see no key gets is not defined: eager attention gives it arbitrary values.
            ones = torch.ones_like(given_now[2])
            seen = program(clauses, "fused", scale)(given_now[0], given_now[1], ones, *given_now[3:]) > 0.5
            assert actual.shape == expected.shape
            assert actual[seen].isfinite().all()
            if policy != "sparse":
                assert relative_error(actual[seen], expected[seen]) < 1e-4
    for graph in report.remembered():
        assert not graph.failure
        event(f"rewritten: {[site.decision is not None and site.decision.rewritten for site in graph.sites]}")
