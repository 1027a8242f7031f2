"""Attention over an explicit boolean mask: the specification every kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax attention over exactly the pairs of ``mask``; a row without any pair gives zeros.

    Args:
        q: floating ``[B, HQ, Q, D]``; k, v: ``[B, HKV, K, D]``, ``HQ`` a multiple of ``HKV`` (GQA).
        mask: bool, broadcastable to ``[B, HQ, Q, K]``, True where the pair is kept.
        scale: factor on the scores, usually ``D ** -0.5``.

    Returns:
        ``[B, HQ, Q, D]`` in the dtype of ``q``, computed in float64 for float64 inputs and in float32 for all others.
    """
    values = v.to(_work_dtype(q)).repeat_interleave(q.shape[1] // v.shape[1], 1)
    return (probabilities_reference(q, k, mask, scale) @ values).to(q.dtype)


def probabilities_reference(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention probabilities ``[B, HQ, Q, K]`` over ``mask``, for recall; shapes and dtypes as above."""
    work = _work_dtype(q)
    keys = k.to(work).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q.to(work) @ keys.transpose(-1, -2)) * scale
    # A row without pairs is 0 / 0 in softmax; the second fill makes it zero.
    return torch.softmax(scores.masked_fill(~mask, -torch.inf), -1).masked_fill(~mask, 0.0)


def _work_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
