"""Random small functions that contain attention, in the ways that people write it, with what should become of it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

BATCH, Q_HEADS, KV_HEADS, DIM, WIDTH = 2, 4, 2, 8, 24
N, PAST, OTHER, WINDOW = 37, 13, 29, 9
"""Tokens of the prompt, of its past, of the other side of cross attention, and of the sliding window: all distinct,
and unlike every other size, so that a square is seen by its shape."""

SDPA_MASKS = ("flag", "bool", "float", "finfo")
EAGER_MASKS = (
    "add_inf", "add_finfo", "fill_inf", "fill_min", "where", "where_swapped", "where_method", "add_swapped",
    "add_in_place", "iadd", "fill_in_place",
)  # fmt: skip
SDPA_CALLS = ("positional", "keyword", "mixed", "aten", "aten_overload")
REPEATS = ("none", "interleave", "interleave_function", "expand", "unsqueeze", "tile")
SCALES = ("none", "before", "after", "left", "divide", "query", "in_place")
TRANSPOSES = ("transpose", "negative", "function", "permute", "permute_tuple", "mT", "stored", "contiguous")
PRODUCTS = ("matmul", "operator", "method", "keyword")
CASTS = ("none", "softmax_dtype", "scores", "weights", "same")
DROPOUTS = ("none", "zero", "eval", "zero_training")
JUNK = ("linear", "gelu_gate", "channel_softmax", "in_place", "clone_in_place", "counter", "residual", "view")


@dataclass(frozen=True)
class Program:
    """One function ``run(x, other, live, counter, weight) -> tuple`` in a chosen surface form.

    ``x`` is ``[B, N, WIDTH]``, ``other`` ``[B, OTHER or PAST, WIDTH]``, ``live`` bool ``[B, kv_len]``, ``counter``
    ``[1]`` (may be written to), ``weight`` ``[WIDTH, (Q_HEADS + 2 * KV_HEADS) * DIM]``.
    """

    form: str = "sdpa"
    kind: str = "causal"  # causal, full, cross, chunk
    mask: str = "flag"
    window: bool = False
    padding: bool = False
    call: str = "positional"
    gqa: str = "expand"  # a way to repeat heads, "native" (enable_gqa), or "plain" (as many key heads)
    scale: str = "none"
    transpose: str = "transpose"
    product: str = "matmul"
    cast: str = "none"
    dropout: str = "none"
    junk: tuple[str, ...] = ()
    layers: int = 1
    min_tokens: int = 4096
    dtype: torch.dtype = torch.float32

    @property
    def kv_len(self) -> int:
        return {"cross": OTHER, "chunk": N + PAST}.get(self.kind, N)

    @property
    def is_prefill(self) -> bool:
        """The attention is causal, so it must be rewritten; anything else must be left alone as bidirectional."""
        return self.kind in ("causal", "chunk")

    @property
    def site_kv_heads(self) -> int:
        """Key heads of the site: repeated heads are folded, unless the copy of k that follows hides them."""
        folds = self.gqa in ("interleave", "interleave_function", "expand", "unsqueeze", "native")
        hidden = self.form == "eager" and self.transpose in ("stored", "contiguous")
        return KV_HEADS if folds and not hidden else Q_HEADS

    def inputs(self, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        live = torch.ones(BATCH, self.kv_len, dtype=torch.bool)
        live[1, -3:] = False
        live[0, 5] = False

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)

        side = PAST if self.kind == "chunk" else OTHER
        weight = normal(WIDTH, (Q_HEADS + 2 * KV_HEADS) * DIM) * WIDTH**-0.5
        return [normal(BATCH, N, WIDTH), normal(BATCH, side, WIDTH), live, torch.zeros(1), weight]

    def run(self, x: Tensor, other: Tensor, live: Tensor, counter: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        keep = self._keep(live)
        mask = self._mask(keep, x.dtype)
        for layer in range(self.layers):
            for name in self.junk:
                x = _junk(name, x, counter, weight)
            y = self._attention(x, other, keep, mask, weight).transpose(1, 2).reshape(BATCH, N, -1)
            x = x + y[..., :WIDTH] * (layer + 1)
        return (x, y)

    # --- the mask ------------------------------------------------------------------------------------------------

    def _keep(self, live: Tensor) -> Tensor | None:
        if self.kind in ("full", "cross") or self.mask == "flag":
            return None
        i = torch.arange(N)[:, None] + (PAST if self.kind == "chunk" else 0)
        j = torch.arange(self.kv_len)[None, :]
        keep = j <= i
        if self.window:
            keep = keep & (i - j < WINDOW)
        keep = keep[None, None]
        return keep & live[:, None, None, :] if self.padding else keep

    def _mask(self, keep: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What all layers share: a keep-mask, or what is added to the scores."""
        if keep is None or self.mask in ("bool", "where", "where_method"):
            return keep
        if self.mask in ("fill_inf", "fill_min", "where_swapped", "fill_in_place"):
            return ~keep
        lowest = torch.finfo(dtype).min if "finfo" in self.mask else -math.inf
        if dtype is torch.float64:  # torch.where would make the two numbers float32
            return torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, lowest)
        return torch.where(keep, 0.0, lowest).to(dtype)

    # --- attention -----------------------------------------------------------------------------------------------

    def _attention(self, x: Tensor, other: Tensor, keep: Tensor | None, mask: Tensor | None, weight: Tensor) -> Tensor:
        wq, wk, wv = weight.split([Q_HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], dim=1)
        source = {"cross": other, "chunk": torch.cat([other, x], 1)}.get(self.kind, x)
        if self.gqa == "plain":
            wk, wv = wk.repeat(1, Q_HEADS // KV_HEADS), wv.repeat(1, Q_HEADS // KV_HEADS)
        q, k, v = ((a @ w).view(BATCH, -1, w.shape[1] // DIM, DIM).transpose(1, 2) for a, w in
                   ((x, wq), (source, wk), (source, wv)))  # fmt: skip
        if self.gqa not in ("plain", "native"):
            k, v = _repeat(self.gqa, k), _repeat(self.gqa, v)
        return self._sdpa(q, k, v, mask) if self.form == "sdpa" else self._eager(q, k, v, mask)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        causal, native = self.mask == "flag" and self.kind == "causal", self.gqa == "native"
        scale = None if self.scale == "none" else 0.3
        if self.call == "positional":
            return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=native)
        if self.call == "keyword":
            return F.scaled_dot_product_attention(
                enable_gqa=native, value=v, key=k, query=q, attn_mask=mask, is_causal=causal, scale=scale
            )
        if self.call == "mixed":
            return F.scaled_dot_product_attention(q, k, value=v, attn_mask=mask, dropout_p=0, is_causal=causal,
                                                  **({"scale": scale} if scale else {}), enable_gqa=native)  # fmt: skip
        aten = torch.ops.aten.scaled_dot_product_attention
        call = aten if self.call == "aten" else aten.default
        return call(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=native)

    def _eager(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.scale == "query":
            q = q * 0.3
        scores = _product(self.product, q, _transposed(self.transpose, k))
        scores = _scaled(self.scale, scores)
        if self.cast == "scores":
            scores = scores.float() if scores.dtype != torch.float64 else scores
        scores = _masked(self.mask, scores, mask)
        if self.cast == "softmax_dtype":
            weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
        elif self.cast == "same":
            weights = torch.softmax(scores.to(v.dtype), 3).type_as(v)
        else:
            weights = scores.softmax(-1).to(v.dtype)
        if self.dropout != "none":
            weights = F.dropout(weights, 0.5 if self.dropout == "eval" else 0.0, self.dropout == "zero_training")
        return _product(self.product, weights, v)


def _repeat(how: str, x: Tensor) -> Tensor:
    group = Q_HEADS // KV_HEADS
    batch, heads, n, dim = x.shape
    if how == "interleave":
        return x.repeat_interleave(group, dim=1)
    if how == "interleave_function":
        return torch.repeat_interleave(input=x, repeats=group, dim=-3)
    if how == "expand":
        return x[:, :, None, :, :].expand(batch, heads, group, n, dim).reshape(batch, heads * group, n, dim)
    if how == "unsqueeze":
        return x.unsqueeze(2).repeat(1, 1, group, 1, 1).flatten(1, 2)
    if how == "tile":  # other heads than grouped-query attention would take: must not be folded
        return x.repeat(1, group, 1, 1)
    return x.contiguous().view(batch, 1, heads, n, dim).expand(batch, group, heads, n, dim).reshape(batch, -1, n, dim)


def _transposed(how: str, k: Tensor) -> Tensor:
    forms: dict[str, Callable[[], Tensor]] = {
        "transpose": lambda: k.transpose(2, 3),
        "negative": lambda: k.transpose(-1, -2),
        "function": lambda: torch.transpose(input=k, dim0=3, dim1=2),
        "permute": lambda: k.permute(0, 1, 3, 2),
        "permute_tuple": lambda: torch.permute(k, (0, 1, -1, -2)),
        "mT": lambda: k.mT,
        "stored": lambda: torch.stack(k.unbind(2), 3),
        "contiguous": lambda: k.transpose(2, 3).contiguous(),
    }
    return forms[how]()


def _product(how: str, a: Tensor, b: Tensor) -> Tensor:
    if how == "operator":
        return a @ b
    if how == "method":
        return a.matmul(b)
    return torch.matmul(input=a, other=b) if how == "keyword" else torch.matmul(a, b)


def _scaled(how: str, scores: Tensor) -> Tensor:
    if how == "after":
        return scores * 0.3
    if how == "left":
        return 0.3 * scores
    if how == "divide":
        return scores / math.sqrt(DIM)
    return scores.mul_(0.3) if how == "in_place" else scores


def _masked(how: str, scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores
    lowest = torch.finfo(scores.dtype).min
    if how in ("add_inf", "add_finfo"):
        return scores + mask
    if how == "add_swapped":
        return torch.add(mask, scores)
    if how == "add_in_place":
        return scores.add_(mask)
    if how == "iadd":
        return operator.iadd(scores, mask)
    if how == "fill_inf":
        return scores.masked_fill(mask, -math.inf)
    if how == "fill_min":
        return torch.masked_fill(input=scores, mask=mask, value=lowest)
    if how == "fill_in_place":
        return scores.masked_fill_(mask, -math.inf)
    if how == "where_swapped":
        return torch.where(mask, -math.inf, scores)
    return scores.where(mask, lowest) if how == "where_method" else torch.where(mask, scores, -math.inf)


def _junk(name: str, x: Tensor, counter: Tensor, weight: Tensor) -> Tensor:
    if name == "linear":
        return x + torch.matmul(torch.matmul(x, weight[:, :8]), weight[:, 8:16].mT) * 0.1
    if name == "gelu_gate":
        return x * torch.matmul(F.gelu(x), weight[:, :WIDTH]).sigmoid()
    if name == "channel_softmax":
        return x + torch.softmax(x, -1)
    if name == "in_place":
        x = x * 2
        x += 0.5
        return x
    if name == "clone_in_place":
        return x.clone().mul_(0.5)
    if name == "counter":
        counter.add_(1)
        return x
    if name == "residual":
        return F.layer_norm(x, (WIDTH,)) + x
    return x.view(BATCH * N, WIDTH).view(BATCH, N, WIDTH)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Any program that runs; what does not matter for the drawn form keeps its default."""
    form = draw(st.sampled_from(["sdpa", "eager"]))
    kind = draw(st.sampled_from(["causal", "causal", "chunk", "full", "cross"]))
    masks = SDPA_MASKS if form == "sdpa" else EAGER_MASKS
    mask = draw(st.sampled_from([m for m in masks if m != "flag" or kind != "chunk"]))
    gqa = draw(st.sampled_from([*REPEATS, "plain", *(["native"] if form == "sdpa" else [])]))
    shared: dict[str, Any] = {
        "form": form,
        "kind": kind,
        "mask": mask,
        "window": draw(st.booleans()),
        "padding": draw(st.booleans()),
        "gqa": gqa,
        "junk": tuple(draw(st.lists(st.sampled_from(JUNK), max_size=2))),
        "layers": draw(st.integers(1, 2)),
        "min_tokens": draw(st.sampled_from([0, 4096])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "scale": draw(st.sampled_from(SCALES)),
    }
    if form == "sdpa":
        return Program(**shared, call=draw(st.sampled_from(SDPA_CALLS)))
    return Program(
        **shared,
        transpose=draw(st.sampled_from(TRANSPOSES)),
        product=draw(st.sampled_from(PRODUCTS)),
        cast=draw(st.sampled_from(CASTS)),
        dropout=draw(st.sampled_from(DROPOUTS)),
    )
