"""Modules that compute causal attention without ``transformers``, each in the words of another library.

Every builder takes a batch size and a length in tokens, and returns a module in evaluation mode and its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.prompts import seeded

WIDTH, HEADS, DIM = 64, 4, 16
Built = tuple[nn.Module, dict[str, Any]]


def _causal(n: int, device: torch.device) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool, device=device).tril()


def _split(x: Tensor, heads: int) -> Tensor:
    """``[B, N, heads * DIM]`` as ``[B, heads, N, DIM]``."""
    return x.view(x.shape[0], x.shape[1], heads, DIM).transpose(1, 2)


class Multihead(nn.Module):
    """``nn.MultiheadAttention`` on its own input."""

    def __init__(self, *, flag: bool, weights: bool) -> None:
        super().__init__()
        self.flag, self.weights = flag, weights
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = ~_causal(x.shape[1], x.device)
        y, _ = self.attention(x, x, x, attn_mask=mask, is_causal=self.flag, need_weights=self.weights)
        return y


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` with a causal mask, as language models of PyTorch's tutorials are built."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 96, batch_first=True, norm_first=True)
        self.stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        return self.stack(x, mask=mask, is_causal=True)


class Decoder(nn.Module):
    """``nn.TransformerDecoder``: causal attention to the target, full attention to the memory."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 96, batch_first=True, norm_first=True)
        self.stack = nn.TransformerDecoder(layer, 2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        return self.stack(x, memory, tgt_mask=mask, tgt_is_causal=True)


class FusedProjection(nn.Module):
    """One projection for queries, keys and values, split by ``unbind``, as timm writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, n, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, n, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(batch, n, width))


class GroupedQueries(nn.Module):
    """Keys expanded to ``[B, N, HKV, group, D]`` and flattened, with a bool mask made by the caller, as torchtune
    writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, WIDTH // 2), nn.Linear(WIDTH, WIDTH // 2)

    def _heads(self, x: Tensor) -> Tensor:
        batch, n, _ = x.shape
        x = x.view(batch, n, HEADS // 2, 1, DIM).expand(batch, n, HEADS // 2, 2, DIM)
        return x.reshape(batch, n, HEADS, DIM).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = _causal(x.shape[1], x.device)[None].expand(x.shape[0], -1, -1)
        q, k, v = _split(self.q(x), HEADS), self._heads(self.k(x)), self._heads(self.v(x))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, :, :], is_causal=False)
        return self.out(y.transpose(1, 2).flatten(2))


class Projected(nn.Module):
    """Attention by a function of q, k and v, each ``[B, HEADS, N, DIM]``."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.attend(*(_split(layer(x), HEADS) for layer in (self.q, self.k, self.v)))
        return self.out(y.transpose(1, 2).flatten(2))


def einsum_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * DIM**-0.5
    weights = scores.masked_fill(~_causal(q.shape[2], q.device), float("-inf")).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def einsum_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads after tokens, as in code that came from JAX."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / DIM**0.5
    scores = torch.where(_causal(q.shape[1], q.device), scores, torch.finfo(scores.dtype).min)
    return torch.einsum("bhqk,bkhd->bqhd", torch.softmax(scores, -1), v).transpose(1, 2)


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Batch and heads in one dimension, the product scaled by ``alpha``, as Megatron's descendants write it."""
    batch, heads, n, dim = q.shape
    q, k, v = (x.reshape(batch * heads, n, dim) for x in (q, k, v))
    empty = torch.zeros(batch * heads, n, n, dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(empty, q, k.transpose(1, 2), beta=1.0, alpha=dim**-0.5).view(batch, heads, n, n)
    weights = scores.masked_fill(~_causal(n, q.device), torch.finfo(q.dtype).min).softmax(-1)
    return torch.bmm(weights.view(batch * heads, n, n), v).view(batch, heads, n, dim)


def flattened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with ``bmm`` and a mask that is added to the three-dimensional scores, as fairseq writes it."""
    batch, heads, n, dim = q.shape
    q, k, v = (x.reshape(batch * heads, n, dim) for x in (q * dim**-0.5, k, v))
    mask = torch.full((n, n), float("-inf"), device=q.device).triu(1)
    weights = F.softmax(torch.bmm(q, k.transpose(1, 2)) + mask[None], dim=-1)
    return torch.bmm(weights, v).view(batch, heads, n, dim)


def _mask_causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def _mask_window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i >= j) & (i - j < 8)


def flex(mask: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention with a block mask that is made in the compiled code."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        made: Tensor = flex_attention(q, k, v, block_mask=create_block_mask(mask, None, None, n, n, device="cpu"))
        return made

    return attend


def flex_documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    document = torch.arange(n, device=q.device) // 8

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (document[i] == document[j])

    made: Tensor = flex_attention(q, k, v, block_mask=create_block_mask(mask, None, None, n, n, device="cpu"))
    return made


def flex_score(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The mask as a change of the scores, and no block mask."""

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i >= j, s, -float("inf"))

    made: Tensor = flex_attention(q, k, v, score_mod=score)
    return made


@dataclass(frozen=True)
class Module:
    """A module of the matrix: what it shows, how it is made, and how many of its attentions are causal."""

    title: str
    make: Callable[[], nn.Module]
    causal: int = 1


MODULES: dict[str, Module] = {
    "multihead": Module("`nn.MultiheadAttention`", lambda: Multihead(flag=False, weights=False)),
    "multihead_flag": Module("`nn.MultiheadAttention`, `is_causal`", lambda: Multihead(flag=True, weights=False)),
    "multihead_weights": Module("`nn.MultiheadAttention`, weights", lambda: Multihead(flag=False, weights=True)),
    "encoder": Module("`nn.TransformerEncoder`", Encoder, 2),
    "decoder": Module("`nn.TransformerDecoder`", Decoder, 2),
    "fused_projection": Module("timm style", FusedProjection),
    "grouped_queries": Module("torchtune style", GroupedQueries),
    "einsum_heads": Module("`einsum`, heads first", lambda: Projected(einsum_heads)),
    "einsum_tokens": Module("`einsum`, tokens first", lambda: Projected(einsum_tokens)),
    "baddbmm": Module("`baddbmm`", lambda: Projected(baddbmm)),
    "flattened": Module("`bmm` on `[B·H, N, D]`", lambda: Projected(flattened)),
    "flex_causal": Module("`flex_attention`, causal", lambda: Projected(flex(_mask_causal))),
    "flex_window": Module("`flex_attention`, window", lambda: Projected(flex(_mask_window))),
    "flex_documents": Module("`flex_attention`, documents", lambda: Projected(flex_documents)),
    "flex_score": Module("`flex_attention`, `score_mod`", lambda: Projected(flex_score)),
}


def build(name: str, *, batch: int = 1, tokens: int = 33, seed: int = 0) -> Built:
    """The module called ``name`` in ``MODULES``, and ``x`` (and ``memory``) of ``[batch, tokens, WIDTH]``."""
    with seeded(seed):
        module = MODULES[name].make().eval()
        inputs = {"x": torch.randn(batch, tokens, WIDTH)}
        if name == "decoder":
            inputs["memory"] = torch.randn(batch, 7, WIDTH)
    return module, inputs
