"""Masks that group tokens: packed documents, chunks of positions, blocks whose tokens see both ways.

A mask is a conjunction of clauses, each a choice of terms, written as text: ``"causal|same:0:0 & window:512"`` reads
"the key is not later than the row, or has the row's number in group 0, which is 0 or more; and it is closer than 512
tokens". Every term speaks of the row's own position, so where the tokens of a group lie together, the keys of a term
are an interval around it. Unions and intersections of such intervals are intervals again: a mask becomes two integers a
row, and no pair is ever listed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from mmi_compile.kernels.geometry import Geometry

CAUSAL = "causal"
SCORE_LIMIT = 16 << 20
"""Scores of one head and step where tokens of a group do not lie together (elements)."""


@dataclass(frozen=True)
class Window:
    """The key is fewer than ``tokens`` before the row."""

    tokens: int

    def __str__(self) -> str:
        return f"window:{self.tokens}"


@dataclass(frozen=True)
class Same:
    """The key has the number of the row's own position in group ``index``, which is ``least`` or more."""

    index: int
    least: int | None = None

    def __str__(self) -> str:
        return f"same:{self.index}" + ("" if self.least is None else f":{self.least}")


Term: TypeAlias = "str | Window | Same"
Clauses: TypeAlias = "tuple[tuple[Term, ...], ...]"


def clauses_to_text(clauses: Iterable[Iterable[Term]]) -> str:
    """The form in which graphs carry a mask."""
    return " & ".join("|".join(map(str, clause)) for clause in clauses)


@lru_cache(maxsize=256)
def parse_clauses(text: str) -> Clauses:
    """What :func:`clauses_to_text` wrote.

    Raises:
        ValueError: a term is none of ``causal``, ``window:N``, ``same:K`` and ``same:K:LEAST``.
    """
    return tuple(tuple(_parse(term) for term in clause.split("|")) for clause in text.split(" & "))


def _parse(text: str) -> Term:
    word, *numbers = text.split(":")
    if word == CAUSAL and not numbers:
        return CAUSAL
    if word == "window" and len(numbers) == 1:
        return Window(int(numbers[0]))
    if word == "same" and len(numbers) in (1, 2):
        return Same(*map(int, numbers))
    raise ValueError(f'no term of a mask: "{text}"; terms are causal, window:N, same:K and same:K:LEAST')


def stack_groups(groups: Sequence[Tensor], batch: int, tokens: int) -> Tensor:
    """Groups ``[N]``, ``[B or 1, N]`` or ``[B or 1, 1, 1, N]`` as one tensor, int64 ``[K, B, tokens]``.

    Raises:
        ValueError: a group has fewer than ``tokens`` numbers, or another batch size.
    """
    found = []
    for group in groups:
        rows = group.reshape(-1, group.shape[-1])
        if rows.shape[0] not in (1, batch) or rows.shape[1] < tokens:
            raise ValueError(f"a group of shape {tuple(group.shape)} for {batch} prompts of {tokens} tokens")
        found.append(rows[:, :tokens].to(torch.int64).expand(batch, tokens))
    return torch.stack(found)


def intervals(clauses: Clauses, ids: Tensor, q_len: int, q_offset: int) -> Tensor:
    """First key of every row and one past its last, int32 ``[2, B, q_len]``; a row without keys gets an empty range.

    Exact where :func:`lie_together` holds. Launches only; the device is never waited for.

    Args:
        ids: int64 ``[K, B, tokens]``, numbers of all keys in each group; ``q_len + q_offset <= tokens``.
    """
    _, batch, tokens = ids.shape
    own = torch.arange(q_offset, q_offset + q_len, device=ids.device).expand(batch, q_len)
    runs = [_runs(group) for group in ids.unbind()]
    start, stop = torch.zeros_like(own), torch.full_like(own, tokens)
    for clause in clauses:
        first, last = torch.full_like(own, tokens), torch.zeros_like(own)
        for term in clause:
            begin, end = _interval(term, own, ids, runs)
            first, last = torch.minimum(first, begin), torch.maximum(last, end)
        start, stop = torch.maximum(start, first), torch.minimum(stop, last)
    return torch.stack([start, torch.maximum(stop, start)]).to(torch.int32)


def _interval(term: Term, own: Tensor, ids: Tensor, runs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """First key and one past the last, int64 ``[B, q_len]``; ``(tokens, 0)``, which no union notices, for none."""
    tokens = ids.shape[-1]
    if isinstance(term, Window):
        return (own - (term.tokens - 1)).clamp(min=0), torch.full_like(own, tokens)
    if not isinstance(term, Same):
        return torch.zeros_like(own), own + 1
    start, stop = (edge.gather(1, own) for edge in runs[term.index])
    if term.least is not None:
        member = ids[term.index].gather(1, own) >= term.least
        start, stop = torch.where(member, start, tokens), torch.where(member, stop, 0)
    return start, stop


def _runs(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where the run of equal numbers around each key begins and ends, int64 ``[B, tokens]`` each."""
    tokens = ids.shape[-1]
    place = torch.arange(tokens, device=ids.device).expand_as(ids)
    changes = ids[:, 1:] != ids[:, :-1]
    start = torch.where(F.pad(changes, (1, 0)), place, 0).cummax(1).values
    stop = torch.where(F.pad(changes, (0, 1)), place + 1, tokens).flip(1).cummin(1).values.flip(1)
    return start, stop


def lie_together(clauses: Clauses, ids: Tensor, known: Sequence[bool]) -> Tensor:
    """Whether the tokens of every group that counts are one run: bool, a scalar on the device.

    Args:
        ids: as in :func:`intervals`; known: groups of which that is proved.
    """
    fine = torch.ones((), dtype=torch.bool, device=ids.device)
    for term in dict.fromkeys(term for clause in clauses for term in clause):
        if isinstance(term, Same) and not known[term.index]:
            fine = fine & _is_run(ids[term.index], term.least)
    return fine


def _is_run(ids: Tensor, least: int | None) -> Tensor:
    """Whether equal numbers, of ``least`` or more, lie side by side in each row of ``[B, tokens]``."""
    run = F.pad(ids[:, 1:] != ids[:, :-1], (1, 0)).cumsum(1)
    number, order = ids.sort(dim=1, stable=True)
    run = run.gather(1, order)
    torn = (number[:, 1:] == number[:, :-1]) & (run[:, 1:] != run[:, :-1])
    if least is not None:
        torn = torn & (number[:, 1:] >= least)
    return ~torn.any()


def visible(clauses: Clauses, ids: Tensor, rows: Tensor, q_offset: int) -> Tensor:
    """What the mask says of every pair of some rows, bool ``[B, R, tokens]``: the meaning of ``clauses``.

    Args:
        ids: as in :func:`intervals`; rows: int64 ``[R]``.
    """
    _, batch, tokens = ids.shape
    own, key = (rows + q_offset)[:, None], torch.arange(tokens, device=ids.device)[None]
    allowed = torch.ones(batch, len(rows), tokens, dtype=torch.bool, device=ids.device)
    for clause in clauses:
        met = torch.zeros_like(allowed)
        for term in clause:
            if isinstance(term, Window):
                met |= own - key < term.tokens
            elif isinstance(term, Same):
                number = ids[term.index][:, own[:, 0], None]  # [B, R, 1]
                same = number == ids[term.index][:, None]
                met |= same if term.least is None else same & (number >= term.least)
            else:
                met |= key <= own
        allowed &= met
    return allowed


def scattered_attention(
    q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, scale: float, clauses: Clauses, ids: Tensor
) -> Tensor:
    """Attention under a mask whose groups do not lie together, ``[B, HQ, q_len, D]``: a few rows at a time.

    Exact and slow, with memory linear in the length. ``geometry`` says which keys padding leaves alive.
    """
    g, out = geometry, torch.zeros(q.shape[:-1] + v.shape[-1:], dtype=q.dtype, device=q.device)
    live = g.live_keys(q.device)
    if live is not None:
        # The weight of a dead key is zero, and zero times NaN is not.
        v = v.masked_fill(~live[:, None, :, None], 0.0)
        k = k.masked_fill(~live[:, None, :, None], 0.0)
    step = max(1, SCORE_LIMIT // max(1, g.batch * g.kv_len))
    for rows in torch.arange(g.q_len, device=q.device).split(step):
        allowed = visible(clauses, ids, rows, g.q_offset)
        if live is not None:
            allowed &= live[:, None]
        part = F.scaled_dot_product_attention(
            q[:, :, rows], k, v, attn_mask=allowed[:, None], scale=scale, enable_gqa=g.group > 1
        )
        out[:, :, rows] = part.masked_fill(~allowed.any(-1)[:, None, :, None], 0.0)
    return out
