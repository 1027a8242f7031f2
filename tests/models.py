"""Small random models with inputs that run, by the names under which most tests ask for them, and a plain decoder.

Every builder returns ``(model.eval(), inputs)`` where ``model(**inputs)`` works; the same arguments always give the
same weights and the same inputs, and the global random state is left alone. ``tests.families`` has every architecture.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import families
from tests.families import Built
from tests.prompts import IMAGE_ID, TEXT_IDS, VIDEO_ID, Padding, Shape, pad_counts, seeded

__all__ = ["BUILDERS", "IMAGE_ID", "TEXT_IDS", "VIDEO_ID", "Built", "Padding", "Shape", "build"]


def qwen2(**arguments: Any) -> Built:
    """``Qwen2ForCausalLM``; arguments as in ``families.text`` (attn, tokens, batch, padding, dtype, seed, shape)."""
    return families.text("qwen2", **arguments)


def llama(**arguments: Any) -> Built:
    """``LlamaForCausalLM``; arguments as in ``qwen2``."""
    return families.text("llama", **arguments)


def mistral(window: int | None = 8, **arguments: Any) -> Built:
    """``MistralForCausalLM`` with a sliding ``window``, in tokens (None for none); else as ``qwen2``."""
    return families.text("mistral", sliding_window=window, **arguments)


def llava(*, tokens: int = 16, images: int = 1, shape: Shape = Shape(), **arguments: Any) -> Built:
    """``LlavaForConditionalGeneration`` (CLIP and Llama): ``tokens`` of text around ``images`` of 16 tokens each, with
    two text tokens after each; other arguments as in ``families.vision``."""
    before, after = tokens - tokens // 2, tokens // 2
    media = {"images": [(1, 4, 4)] * images, "videos": ()}
    case = families.vision("llava", before=before, after=after, shape=shape, **media, **arguments)
    return case.model, case.inputs


def qwen2_5_vl(
    *,
    tokens: int = 16,
    images: int = 1,
    frames: int = 0,
    frame: tuple[int, int] = (4, 4),
    shape: Shape = Shape(),
    **arguments: Any,
) -> Built:
    """``Qwen2_5_VLForConditionalGeneration`` with images, then one video, in each batch element.

    Args:
        tokens: text tokens, half before the media and half after; a few more follow each image and the video.
        images: images per element, of ``rows * columns`` tokens each.
        frames: temporal steps of the video, of ``rows * columns`` tokens each; 0 for no video.
        frame: ``(rows, columns)`` of language-model tokens in an image and in a frame.
        **arguments: as in ``families.vision``.
    """
    before, after = tokens - tokens // 2, tokens // 2
    media = {"images": [(1, *frame)] * images, "videos": [(frames, *frame)] if frames else ()}
    case = families.vision("qwen2_5_vl", before=before, after=after, shape=shape, **media, **arguments)
    return case.model, case.inputs


MaskForm = Literal["flag", "bool", "additive", "finfo", "triu", "tril", "window", "padding", "full"]
AttentionForm = Literal["sdpa", "eager"]
GqaForm = Literal["enable_gqa", "expand", "repeat_interleave"]

MASK_FORMS: tuple[MaskForm, ...] = (
    "flag", "bool", "additive", "finfo", "triu", "tril", "window", "padding", "full",
)  # fmt: skip
GQA_FORMS: tuple[GqaForm, ...] = ("enable_gqa", "expand", "repeat_interleave")


def _visible(length: int, device: torch.device, window: int = 0) -> Tensor:
    i = torch.arange(length, device=device)[:, None]
    j = torch.arange(length, device=device)[None, :]
    visible = j <= i
    return visible & (i - j < window) if window else visible


class PlainAttention(nn.Module):
    """One self-attention whose surface form (mask, SDPA or matmuls, GQA) is chosen by name.

    ``flag`` is ``is_causal=True`` (by hand where ``form="eager"``); ``bool``, ``tril`` are boolean causal masks;
    ``additive`` and ``triu`` add -inf, ``finfo`` the most negative finite value; ``window`` is causal within
    ``window`` tokens; ``padding`` is causal and the live keys of the caller; ``full`` sees everything.
    """

    def __init__(self, shape: Shape, mask: MaskForm, form: AttentionForm, gqa: GqaForm, window: int) -> None:
        super().__init__()
        self.shape, self.mask, self.form, self.gqa, self.window = shape, mask, form, gqa, window
        self.query = nn.Linear(shape.hidden, shape.heads * shape.head_dim)
        self.key = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim)
        self.value = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim)
        self.out = nn.Linear(shape.heads * shape.head_dim, shape.hidden)

    def _mask(self, x: Tensor, padding: Tensor | None) -> Tensor | None:
        n, device, dtype = x.shape[1], x.device, x.dtype
        if self.mask == "full" or (self.mask == "flag" and self.form == "sdpa"):
            return None
        if self.mask == "triu":
            return torch.full((n, n), float("-inf"), device=device, dtype=dtype).triu(1)
        if self.mask == "tril":
            return torch.ones(n, n, device=device, dtype=torch.bool).tril()
        if self.mask == "padding":
            assert padding is not None, 'mask="padding" needs padding=bool[B, N]'
            return _visible(n, device) & padding[:, None, None, :]
        visible = _visible(n, device, self.window if self.mask == "window" else 0)
        if self.mask == "additive":
            return torch.zeros(n, n, device=device, dtype=dtype).masked_fill(~visible, float("-inf"))
        if self.mask == "finfo":
            return torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)
        return visible

    def _repeat(self, x: Tensor) -> Tensor:
        group = self.shape.heads // self.shape.kv_heads
        if self.gqa == "repeat_interleave":
            return x.repeat_interleave(group, dim=1)
        batch, heads, n, dim = x.shape
        return x[:, :, None].expand(batch, heads, group, n, dim).reshape(batch, heads * group, n, dim)

    def _eager(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = torch.matmul(q, k.transpose(2, 3)) * self.shape.head_dim**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """``x``: ``[B, N, hidden]``; ``padding``: bool ``[B, N]``, True where a key is live."""
        batch, n, _ = x.shape
        q, k, v = (
            layer(x).view(batch, n, -1, self.shape.head_dim).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mask = self._mask(x, padding)
        native = self.form == "sdpa" and self.gqa == "enable_gqa"
        if not native:
            k, v = self._repeat(k), self._repeat(v)
        if self.form == "eager":
            y = self._eager(q, k, v, mask)
        else:
            causal = self.mask == "flag"
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=native)
        return self.out(y.transpose(1, 2).reshape(batch, n, -1))


class PlainCausal(nn.Module):
    """A stack of pre-norm blocks around ``PlainAttention``: input and output ``[B, N, hidden]``."""

    def __init__(
        self,
        shape: Shape = Shape(),
        mask: MaskForm = "flag",
        form: AttentionForm = "sdpa",
        gqa: GqaForm = "enable_gqa",
        window: int = 8,
    ) -> None:
        super().__init__()
        self.attention = nn.ModuleList(PlainAttention(shape, mask, form, gqa, window) for _ in range(shape.layers))
        self.norm = nn.ModuleList(nn.LayerNorm(shape.hidden) for _ in range(shape.layers))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(shape.hidden, shape.mlp), nn.GELU(), nn.Linear(shape.mlp, shape.hidden))
            for _ in range(shape.layers)
        )

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        for attention, norm, mlp in zip(self.attention, self.norm, self.mlp, strict=True):
            x = x + attention(norm(x), padding)
            x = x + mlp(x)
        return x


def plain_causal(
    *,
    mask: MaskForm = "flag",
    form: AttentionForm = "sdpa",
    gqa: GqaForm = "enable_gqa",
    window: int = 8,
    tokens: int = 33,
    batch: int = 1,
    padding: Padding = "none",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shape: Shape = Shape(),
) -> Built:
    """``PlainCausal`` in one surface form. ``mask="padding"`` passes bool ``padding`` ``[B, N]`` to the model.

    Left padding leaves pad rows without any visible key, where softmax gives NaN: compare live rows only.
    """
    if padding != "none" and mask != "padding":
        raise ValueError(f'padding={padding!r} needs mask="padding", got mask={mask!r}')
    with seeded(seed):
        model = PlainCausal(shape, mask, form, gqa, window).to(dtype).eval()
        inputs = {"x": torch.randn(batch, tokens, shape.hidden).to(dtype)}
    if mask == "padding":
        live = torch.ones(batch, tokens, dtype=torch.bool)
        for row, count in zip(live, pad_counts(batch, padding), strict=True):
            if padding == "left":
                row[:count] = False
            else:
                row[tokens - count :] = False
        inputs["padding"] = live
    return model, inputs


BUILDERS: dict[str, Callable[..., Built]] = {
    "plain_causal": plain_causal,
    "qwen2": qwen2,
    "llama": llama,
    "mistral": mistral,
    "llava": llava,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen2_5_vl_video": functools.partial(qwen2_5_vl, images=0, frames=3),
}


def build(name: str, **arguments: Any) -> Built:
    """The model called ``name`` in ``BUILDERS``, with that builder's arguments."""
    return BUILDERS[name](**arguments)
