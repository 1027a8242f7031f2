"""Plant attention with known structure into a randomly initialised decoder, so that speed can be shown without weights.

Random queries and keys attend everywhere: no pattern fits them, and a sparse method measured on them measures nothing.
Here each group of heads gets one of the structures that trained models show (MInference and MMInference, section 2),
through the biases of the query and key projections and a few marked tokens:

=========  ==================================================================================================
local      the query and key biases agree on mid-frequency rotary dimensions, so scores fall with distance
vertical   all queries look for a feature that only some marked tokens carry
grid       likewise, with the marked tokens evenly spaced, as "the same place in every frame" is
=========  ==================================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

STRUCTURES = ("local", "vertical", "grid")
GAIN = 18.0
"""By how much (in logits) planted pairs stand out of the random rest."""
MARK = 30.0
"""Value of a marked token's feature, in units of the other features' standard deviation."""


@torch.no_grad()
def plant(model: nn.Module, structures: Sequence[str] = STRUCTURES, local: slice | None = None) -> None:
    """Give the heads of every layer of ``model`` one of ``structures`` in turn, by key/value group.

    Args:
        model: a decoder with ``layers[i].self_attn.{q,k,v,o}_proj`` and rotary embeddings, whose query and key
        projections have biases. Structure ``n`` looks for its mark in feature ``n`` of the hidden state.
    local: the rotary frequencies that local heads compare, as indices below half the head dimension; by default
        those that tell a few hundred tokens apart. With M-RoPE the first section is time.
    """
    config = model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    for layer in model.layers:
        attention = layer.self_attn
        q_bias = attention.q_proj.bias.view(heads, dim).zero_()
        k_bias = attention.k_proj.bias.view(groups, dim).zero_()
        q_weight = attention.q_proj.weight.view(heads, dim, -1)
        k_weight = attention.k_proj.weight.view(groups, dim, -1)
        # Marks must reach every layer: nothing writes to their features, and the residual stream stays small.
        for projection in (attention.o_proj, layer.mlp.down_proj):
            projection.weight.mul_(0.1)
            projection.weight[: len(STRUCTURES)] = 0
        for group in range(groups):
            kind = structures[group % len(structures)]
            members = slice(group * heads // groups, (group + 1) * heads // groups)
            if kind == "local":
                bias = _local_bias(dim, local).to(q_bias)
                q_bias[members] = bias
                k_bias[group] = bias
            else:
                look = _slow_direction(dim).to(q_bias)
                strength = math.sqrt(GAIN * math.sqrt(dim))
                # Only the bias and the mark speak in that direction: anything else there would be noise.
                q_weight[members, look != 0] = 0
                k_weight[group, look != 0] = 0
                q_bias[members] = look * strength
                k_weight[group, :, STRUCTURES.index(kind)] = look * strength / MARK


def _local_bias(dim: int, local: slice | None) -> Tensor:
    """Equal query and key vectors whose rotated product falls off with distance."""
    half = dim // 2
    bias = torch.zeros(dim)
    chosen = torch.arange(half)[local or slice(half // 4, half * 5 // 8)]
    bias[chosen] = math.sqrt(GAIN * math.sqrt(dim) / len(chosen))
    return bias


def _slow_direction(dim: int) -> Tensor:
    """A unit vector on rotary dimensions so slow that a hundred thousand tokens hardly turn it."""
    half = dim // 2
    direction = torch.zeros(dim)
    direction[half - max(1, half // 11) : half] = 1.0
    return direction / direction.norm()


@torch.no_grad()
def mark(embeddings: Tensor, vertical: int = 400, stride: int = 256, seed: int = 0) -> Tensor:
    """Mark tokens of ``embeddings`` ``[B, N, hidden]`` for :func:`plant`: ``vertical`` random ones, and every
    ``stride``-th one. Returns the marked embeddings."""
    tokens = embeddings.shape[1]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(tokens, generator=generator)[: min(vertical, tokens)].to(embeddings.device)
    marked = embeddings.clone()
    scale = embeddings.float().std().item() * MARK
    marked[..., : len(STRUCTURES)] = 0
    marked[:, chosen, STRUCTURES.index("vertical")] = scale
    marked[:, stride // 3 :: stride, STRUCTURES.index("grid")] = scale
    return marked


@torch.no_grad()
def mark_tokens(embedding: nn.Embedding, tokens: dict[str, int]) -> None:
    """Mark token ids instead: ``tokens`` maps a structure's name to the id that carries its mark.

    Embeddings get unit size first: transformers initialises them so small that a layer's output would drown the marks.
    """
    embedding.weight.div_(embedding.weight.float().std())
    embedding.weight[:, : len(STRUCTURES)] = 0
    for structure, token in tokens.items():
        embedding.weight[token, STRUCTURES.index(structure)] = MARK
