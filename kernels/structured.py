"""Queries and keys whose attention structure is planted, hence known: for tests, examples and benchmarks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Structure:
    """Where one head puts its attention. Empty means (nearly) uniform attention, which no pattern can thin out.

    Attributes:
        columns: keys that every later row attends to.
        distances: distances ``i - j`` that every row attends to; 0 plants locality.
        stride, phase: key lines ``j = phase (mod stride)``; stride 0 for none.
    """

    columns: tuple[int, ...] = ()
    distances: tuple[int, ...] = ()
    stride: int = 0
    phase: int = 0

    def keys(self, length: int) -> Tensor:
        """The planted key columns and lines, bool ``[length]``."""
        j = torch.arange(length)
        lines = j % self.stride == self.phase if self.stride else torch.zeros(length, dtype=torch.bool)
        for column in self.columns:
            lines = lines | (j == column)
        return lines

    def mask(self, length: int) -> Tensor:
        """Planted pairs with ``j <= i``, bool ``[length, length]``; quadratic."""
        i, j = torch.arange(length)[:, None], torch.arange(length)
        pairs = self.keys(length).expand(length, -1)
        for distance in self.distances:
            pairs = pairs | (i - j == distance)
        return pairs & (j <= i)


@dataclass(frozen=True)
class StructuredInput:
    """``q [B, HQ, N, D]``, ``k, v [B, HKV, N, D]`` and what was planted in each query head."""

    q: Tensor
    k: Tensor
    v: Tensor
    structures: tuple[Structure, ...]


def structured_qkv(
    structures: Sequence[Structure],
    length: int,
    *,
    batch: int = 1,
    kv_heads: int | None = None,
    head_dim: int = 64,
    scale: float | None = None,
    peak: float | None = None,
    noise: float = 0.02,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> StructuredInput:
    """Inputs whose query head ``h`` attends as ``structures[h]`` says, with nearly all of its mass.

    Each query head of a group owns one feature of the shared keys for its columns; the other features hold rotations
    ``(cos w i, sin w i)`` as in rotary embeddings, whose product peaks at one distance.

    Args:
        peak: score (after ``scale``) of a planted pair, ``log(length) + 8`` by default; background pairs have 0 on
            average, so that together they hold well below one hundredth of the mass.
        scale: the factor attention will use, ``head_dim ** -0.5`` by default.

    Raises:
        ValueError: the heads do not divide, or ``head_dim`` has no room for the features.
    """
    heads = len(structures)
    kv_heads = heads if kv_heads is None else kv_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"{heads} structures cannot share {kv_heads} kv_heads; give a divisor of {heads}")
    group = heads // kv_heads
    pairs = (head_dim - group) // 2
    if pairs < 4:
        raise ValueError(f"head_dim {head_dim} is too small for {group} heads per group; give {group + 8} or more")
    generator = torch.Generator().manual_seed(seed)
    frequencies = math.pi * torch.rand(pairs, generator=generator, dtype=torch.float64)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    turned = torch.cat([angles.cos(), angles.sin()], -1)
    q = noise * torch.randn(batch, heads, length, head_dim, generator=generator, dtype=torch.float64)
    k = noise * torch.randn(batch, kv_heads, length, head_dim, generator=generator, dtype=torch.float64)
    v = torch.randn(batch, kv_heads, length, head_dim, generator=generator, dtype=torch.float64)
    k[..., group : group + 2 * pairs] += turned
    strength = (math.log(max(1, length)) + 8 if peak is None else peak) / (head_dim**-0.5 if scale is None else scale)
    # The strength is shared out between q and k so that neither leaves the range of half precision.
    share = math.sqrt(strength)
    for head, structure in enumerate(structures):
        own = head % group
        k[:, head // group, :, own] += structure.keys(length) * share
        q[:, head, :, own] += share
        for distance in structure.distances:
            shifted = (torch.arange(length, dtype=torch.float64) - distance)[:, None] * frequencies
            turn = torch.cat([shifted.cos(), shifted.sin()], -1)
            q[:, head, :, group : group + 2 * pairs] += turn * (strength / pairs)
    return StructuredInput(q.to(device, dtype), k.to(device, dtype), v.to(device, dtype), tuple(structures))
