"""Small random models with inputs that run: real ``transformers`` architectures, and a plain decoder.

Every builder returns ``(model.eval(), inputs)`` where ``model(**inputs)`` works; the same arguments always give the
same weights and the same inputs, and the global random state is left alone. ``transformers`` is imported on use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Padding = Literal["none", "left", "right"]
Built = tuple[nn.Module, dict[str, Any]]

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
TEXT_IDS = (5, 150)  # half-open range that prompts draw from
IMAGE_ID, VIDEO_ID, VISION_START_ID, VISION_END_ID = 200, 201, 202, 203
VOCAB = 256

_PATCH, _MERGE, _TEMPORAL = 4, 2, 2  # pixels, patches, frames; the vision tower of Qwen2.5-VL


@dataclass(frozen=True)
class Shape:
    """Size of a text decoder. ``weight_std`` is large enough for attention that is far from uniform."""

    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    mlp: int = 96
    max_positions: int = 4096
    weight_std: float = 0.15

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    def config(self) -> dict[str, Any]:
        """The arguments that every text config of ``transformers`` shares."""
        return {
            "vocab_size": VOCAB,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.max_positions,
            "initializer_range": self.weight_std,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "pad_token_id": PAD_ID,
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
        }


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@dataclass
class _Prompt:
    """Token ids and modality (0 text, 1 image, 2 video) of one batch element, built left to right."""

    ids: list[int] = field(default_factory=list)
    types: list[int] = field(default_factory=list)

    def text(self, count: int) -> _Prompt:
        self.ids += torch.randint(*TEXT_IDS, (count,)).tolist()
        self.types += [0] * count
        return self

    def media(self, token: int, modality: int, count: int, wrapped: bool) -> _Prompt:
        self.ids += [VISION_START_ID, *[token] * count, VISION_END_ID] if wrapped else [token] * count
        self.types += [0, *[modality] * count, 0] if wrapped else [modality] * count
        return self


def pad_counts(batch: int, padding: Padding) -> list[int]:
    """Pad tokens of each batch element; with more than one element, the first has none."""
    if padding == "none":
        return [0] * batch
    return [3] if batch == 1 else [3 * b for b in range(batch)]


def _collate(
    write: Callable[[_Prompt], object], tokens: int, batch: int, padding: Padding, with_attention_mask: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Build ``batch`` prompts of one length: ``write`` puts the body between text of ``tokens`` tokens in all.

    Returns:
        ``input_ids`` (and ``attention_mask`` where asked), int64 ``[batch, length]``, and the modality, likewise.
    """
    if padding not in ("none", "left", "right"):
        raise ValueError(f'padding must be "none", "left" or "right", got {padding!r}')
    if padding != "none" and not with_attention_mask:
        raise ValueError("padding without an attention mask would be ordinary tokens")
    counts = pad_counts(batch, padding)
    ids, types, masks = [], [], []
    for count in counts:
        spare = max(counts) - count
        prompt = _Prompt().text(tokens - tokens // 2)
        write(prompt)
        prompt.text(tokens // 2 + spare)
        pad, live = [PAD_ID] * count, [1] * len(prompt.ids)
        left = padding == "left"
        ids.append(pad + prompt.ids if left else prompt.ids + pad)
        types.append([0] * count + prompt.types if left else prompt.types + [0] * count)
        masks.append([0] * count + live if left else live + [0] * count)
    inputs = {"input_ids": torch.tensor(ids)}
    if with_attention_mask:
        inputs["attention_mask"] = torch.tensor(masks)
    return inputs, torch.tensor(types)


def _instantiate(model_class: Any, config: Any, attn: str, dtype: torch.dtype) -> nn.Module:
    model: nn.Module = model_class._from_config(config, attn_implementation=attn, dtype=dtype)
    return model.eval()


def _text_model(
    names: tuple[str, str],
    extra: dict[str, Any],
    *,
    attn: str = "sdpa",
    tokens: int = 33,
    batch: int = 1,
    padding: Padding = "none",
    with_attention_mask: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shape: Shape = Shape(),
) -> Built:
    import transformers

    config_class, model_class = (getattr(transformers, name) for name in names)
    with _seeded(seed):
        model = _instantiate(model_class, config_class(**shape.config(), **extra), attn, dtype)
        inputs, _ = _collate(lambda prompt: None, tokens, batch, padding, with_attention_mask)
    return model, inputs


def qwen2(**arguments: Any) -> Built:
    """``Qwen2ForCausalLM``; arguments as in ``_text_model`` (attn, tokens, batch, padding, dtype, seed, shape)."""
    return _text_model(("Qwen2Config", "Qwen2ForCausalLM"), {}, **arguments)


def llama(**arguments: Any) -> Built:
    """``LlamaForCausalLM``; arguments as in ``qwen2``."""
    return _text_model(("LlamaConfig", "LlamaForCausalLM"), {}, **arguments)


def mistral(window: int | None = 8, **arguments: Any) -> Built:
    """``MistralForCausalLM`` with a sliding ``window``, in tokens (None for none); else as ``qwen2``."""
    return _text_model(("MistralConfig", "MistralForCausalLM"), {"sliding_window": window}, **arguments)


def llava(
    *,
    attn: str = "sdpa",
    tokens: int = 16,
    images: int = 1,
    batch: int = 1,
    padding: Padding = "none",
    with_attention_mask: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shape: Shape = Shape(),
) -> Built:
    """``LlavaForConditionalGeneration`` (CLIP and Llama): ``images`` of 16 tokens each, apart by two text tokens."""
    import transformers

    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=32,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**shape.config()),
        image_token_index=IMAGE_ID,
        image_seq_length=16,
    )

    def write(prompt: _Prompt) -> None:
        for _ in range(images):
            prompt.media(IMAGE_ID, 1, 16, wrapped=False).text(2)

    with _seeded(seed):
        model = _instantiate(transformers.LlavaForConditionalGeneration, config, attn, dtype)
        inputs, _ = _collate(write, tokens, batch, padding, with_attention_mask)
        if images:
            inputs["pixel_values"] = torch.randn(batch * images, 3, 32, 32).to(dtype)
    return model, inputs


def _mrope_section(head_dim: int) -> list[int]:
    side = (head_dim // 2) * 3 // 8
    return [head_dim // 2 - 2 * side, side, side]


def _qwen2_5_vl_config(shape: Shape) -> Any:
    import transformers

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": _mrope_section(shape.head_dim)}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": shape.hidden,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": _PATCH,
        "spatial_merge_size": _MERGE,
        "temporal_patch_size": _TEMPORAL,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }
    return transformers.Qwen2_5_VLConfig(
        text_config={**shape.config(), "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=VISION_START_ID,
        vision_end_token_id=VISION_END_ID,
    )


def _patches(grids: Sequence[tuple[int, int, int]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random patches ``[sum(t*h*w), channels * temporal * patch * patch]`` and the grids, int64 ``[media, 3]``."""
    rows = sum(t * h * w for t, h, w in grids)
    return torch.randn(rows, 3 * _TEMPORAL * _PATCH * _PATCH).to(dtype), torch.tensor(grids)


def qwen2_5_vl(
    *,
    attn: str = "sdpa",
    tokens: int = 16,
    images: int = 1,
    frames: int = 0,
    frame: tuple[int, int] = (4, 4),
    batch: int = 1,
    padding: Padding = "none",
    with_attention_mask: bool = True,
    with_token_types: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shape: Shape = Shape(),
) -> Built:
    """``Qwen2_5_VLForConditionalGeneration`` with images, then one video, in each batch element.

    Args:
        tokens: text tokens, half before the media and half after; two more follow each image and the video.
        images: images per element, of ``rows * columns`` tokens each.
        frames: temporal steps of the video, of ``rows * columns`` tokens each; 0 for no video.
        frame: ``(rows, columns)`` of language-model tokens in an image and in a frame.
        with_token_types: pass ``mm_token_type_ids``, as the processor does.
    """
    import transformers

    rows, columns = frame
    grid = (rows * _MERGE, columns * _MERGE)

    def write(prompt: _Prompt) -> None:
        for _ in range(images):
            prompt.media(IMAGE_ID, 1, rows * columns, wrapped=True).text(2)
        if frames:
            prompt.media(VIDEO_ID, 2, frames * rows * columns, wrapped=True).text(2)

    with _seeded(seed):
        model = _instantiate(transformers.Qwen2_5_VLForConditionalGeneration, _qwen2_5_vl_config(shape), attn, dtype)
        inputs, types = _collate(write, tokens, batch, padding, with_attention_mask)
        if with_token_types:
            inputs["mm_token_type_ids"] = types
        if images:
            patches, thw = _patches([(1, *grid)] * (images * batch), dtype)
            inputs |= {"pixel_values": patches, "image_grid_thw": thw}
        if frames:
            patches, thw = _patches([(frames, *grid)] * batch, dtype)
            inputs |= {"pixel_values_videos": patches, "video_grid_thw": thw}
    return model, inputs


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
    with _seeded(seed):
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


# --- families that carry modality in different ways -----------------------------------------------------------------

VIDEO_START_ID, VIDEO_END_ID = 204, 205
Grid = tuple[int, int, int]
"""Frames, and rows and columns of language-model tokens in a frame."""
IMAGES: tuple[Grid, ...] = ((1, 4, 4), (1, 2, 4))
VIDEOS: tuple[Grid, ...] = ((3, 2, 2), (2, 4, 2))


@dataclass
class Interleaved:
    """A model whose prompt holds text, images and, where the family has them, videos.

    Attributes:
        types: the true modality, int64 ``[1, length]``: 0 text, 1 image, 2 video.
        media: for each image and video ``(modality, grid, start, frame stride)``, with the stride None where there is
            one frame; in the order of the prompt.
    """

    model: nn.Module
    inputs: dict[str, Any]
    types: Tensor
    media: list[tuple[int, Grid, int, int | None]]


@dataclass
class _Script:
    """Writes a prompt and notes where its media lie."""

    prompt: _Prompt = field(default_factory=_Prompt)
    media: list[tuple[int, Grid, int, int | None]] = field(default_factory=list)

    def image(self, grid: Grid, token: int = IMAGE_ID) -> None:
        self.media.append((1, grid, len(self.prompt.ids) + 1, None))
        self.prompt.media(token, 1, grid[0] * grid[1] * grid[2], wrapped=True).text(3)

    def video(self, grid: Grid, token: int, *, stamp: int, wrapped: bool) -> None:
        """Frames after ``stamp`` tokens of text each, between start and end tokens where ``wrapped``."""
        frames, rows, columns = grid
        start = len(self.prompt.ids) + stamp + wrapped
        stride = rows * columns + stamp + 2 * wrapped
        self.media.append((2, grid, start, stride if frames > 1 else None))
        for _ in range(frames):
            self.prompt.text(stamp).media(token, 2, rows * columns, wrapped)
        self.prompt.text(2)


def _grid_vision(shape: Shape, **changes: Any) -> dict[str, Any]:
    common = {
        "depth": 1,
        "hidden_size": 32,
        "out_hidden_size": shape.hidden,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": _PATCH,
        "spatial_merge_size": _MERGE,
        "temporal_patch_size": _TEMPORAL,
    }
    return {**common, **changes}


def _grid_model(family: str, shape: Shape) -> tuple[Any, Any]:
    """Model class and config of a family whose processor passes grids."""
    import transformers

    section = _mrope_section(shape.head_dim)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}
    text: dict[str, Any] = {**shape.config(), "rope_parameters": rope}
    tokens = {"image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID}
    brackets = {"vision_start_token_id": VISION_START_ID, "vision_end_token_id": VISION_END_ID}
    if family == "qwen2_vl":
        vision = {"depth": 1, "embed_dim": 32, "hidden_size": shape.hidden, "num_heads": 2, "mlp_ratio": 2}
        vision |= {"patch_size": _PATCH, "spatial_merge_size": _MERGE, "temporal_patch_size": _TEMPORAL}
        config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens, **brackets)
        return transformers.Qwen2VLForConditionalGeneration, config
    if family == "qwen2_5_vl":
        return transformers.Qwen2_5_VLForConditionalGeneration, _qwen2_5_vl_config(shape)
    if family == "qwen3_vl":
        rope["mrope_interleaved"] = True
        vision = _grid_vision(shape, num_position_embeddings=64, deepstack_visual_indexes=[0])
        text |= {"head_dim": shape.head_dim}
        config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **tokens, **brackets)
        return transformers.Qwen3VLForConditionalGeneration, config
    if family == "glm4v":
        rope |= {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
        config = transformers.Glm4vConfig(
            text_config=text,
            vision_config=_grid_vision(shape, image_size=32),
            image_start_token_id=VISION_START_ID,
            image_end_token_id=VISION_END_ID,
            video_start_token_id=VIDEO_START_ID,
            video_end_token_id=VIDEO_END_ID,
            **tokens,
        )
        return transformers.Glm4vForConditionalGeneration, config
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.VideoLlama3Config(
        text_config=transformers.Qwen2Config(**shape.config()), vision_config={**vision, "patch_size": _PATCH}, **tokens
    )
    return transformers.VideoLlama3ForConditionalGeneration, config


def _grid_family(
    family: str, shape: Shape, images: Sequence[Grid], videos: Sequence[Grid]
) -> tuple[nn.Module, dict[str, Any], _Script]:
    script = _Script()
    script.prompt.text(5)
    for grid in images:
        script.image(grid)
    for grid in videos:
        if family == "glm4v":
            # A video is a list of images between tokens of its own; a time stamp follows each frame.
            script.prompt.ids.append(VIDEO_START_ID)
            script.prompt.types.append(0)
            script.video(grid, IMAGE_ID, stamp=3, wrapped=True)
            script.prompt.ids.append(VIDEO_END_ID)
            script.prompt.types.append(0)
        else:
            stamp = {"qwen3_vl": 4, "video_llama_3": 3}.get(family, 0)
            if stamp == 0:
                script.prompt.ids.append(VISION_START_ID)
                script.prompt.types.append(0)
            script.video(grid, VIDEO_ID, stamp=stamp, wrapped=family == "qwen3_vl")
    script.prompt.text(4)
    model_class, config = _grid_model(family, shape)
    model = _instantiate(model_class, config, "sdpa", torch.float32)
    inputs: dict[str, Any] = {}
    depth = 1 if family == "video_llama_3" else _TEMPORAL
    for name, pixels, media in (("image", "pixel_values", images), ("video", "pixel_values_videos", videos)):
        if media:
            patches = [(t, rows * _MERGE, columns * _MERGE) for t, rows, columns in media]
            count = sum(t * h * w for t, h, w in patches)
            inputs |= {pixels: torch.randn(count, 3 * depth * _PATCH**2), f"{name}_grid_thw": torch.tensor(patches)}
            if family == "video_llama_3":
                inputs[f"{name}_merge_sizes"] = torch.tensor([_MERGE] * len(media))
    if family == "video_llama_3" and videos:
        inputs["video_compression_mask"] = torch.ones(sum(t * h * w for t, h, w in videos), dtype=torch.bool)
    return model, inputs, script


_CLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_PINPOINTS = [[32, 32], [32, 64], [64, 32], [64, 64]]


def _plain_family(family: str, shape: Shape) -> tuple[nn.Module, dict[str, Any], _Script]:
    """Families without grids: LLaVA's, and those whose videos are images."""
    import transformers

    script = _Script()
    inputs: dict[str, Any] = {"pixel_values": torch.randn(2, 3, 32, 32)}
    model_class: Any
    config: Any
    if family in ("llava_onevision", "llava_next_video"):
        tokens = {"image_token_index": IMAGE_ID, "video_token_index": VIDEO_ID, "image_grid_pinpoints": _PINPOINTS}
        inputs = {"pixel_values": torch.randn(1, 5, 3, 32, 32), "image_sizes": torch.tensor([[64, 64]])}
        inputs["pixel_values_videos"] = torch.randn(1, 3, 3, 32, 32)
        newline = family == "llava_onevision"
        # A tile of 16 tokens, and four of them with a newline token after each of eight rows.
        script.prompt.text(6).media(IMAGE_ID, 1, 16 + 8 * 9, True).text(4).media(VIDEO_ID, 2, 3 * 4 + newline, True)
        if newline:
            inputs["batch_num_images"] = torch.tensor([1])
            config = transformers.LlavaOnevisionConfig(
                vision_config=transformers.SiglipVisionConfig(**_CLIP),
                text_config=transformers.Qwen2Config(**shape.config()),
                **tokens,
            )
            model_class = transformers.LlavaOnevisionForConditionalGeneration
        else:
            config = transformers.LlavaNextVideoConfig(
                vision_config=transformers.CLIPVisionConfig(**_CLIP, projection_dim=32),
                text_config=transformers.LlamaConfig(**shape.config()),
                image_seq_length=16,
                video_seq_length=12,
                spatial_pool_stride=2,
                **tokens,
            )
            model_class = transformers.LlavaNextVideoForConditionalGeneration
    elif family == "internvl":
        vision = {**_CLIP, "image_size": [32, 32], "patch_size": [8, 8]}
        config = transformers.InternVLConfig(
            vision_config=transformers.InternVLVisionConfig(**vision),
            text_config=transformers.Qwen2Config(**shape.config()),
            image_token_id=IMAGE_ID,
            image_seq_length=4,
            downsample_ratio=0.5,
        )
        model_class = transformers.InternVLForConditionalGeneration
    elif family == "smolvlm":
        inputs = {"pixel_values": torch.randn(1, 2, 3, 32, 32)}
        config = transformers.SmolVLMConfig(
            vision_config=_CLIP,
            text_config=transformers.LlamaConfig(**shape.config()),
            image_token_id=IMAGE_ID,
            scale_factor=2,
        )
        model_class = transformers.SmolVLMForConditionalGeneration
    else:
        text = transformers.Gemma3TextConfig(
            **shape.config() | {"rope_parameters": None},
            head_dim=shape.head_dim,
            sliding_window=8,
            layer_types=["full_attention"] * shape.layers,
            query_pre_attn_scalar=shape.head_dim,
        )
        config = transformers.Gemma3Config(
            text_config=text,
            vision_config=transformers.SiglipVisionConfig(**_CLIP),
            mm_tokens_per_image=4,
            image_token_index=IMAGE_ID,
            boi_token_index=VISION_START_ID,
            eoi_token_index=VISION_END_ID,
        )
        model_class = transformers.Gemma3ForConditionalGeneration
    if not script.prompt.ids:
        script.prompt.text(6).media(IMAGE_ID, 1, 4, True).text(5).media(IMAGE_ID, 1, 4, True)
    script.prompt.text(6)
    return _instantiate(model_class, config, "sdpa", torch.float32), inputs, script


GRID_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "video_llama_3", "glm4v")
PLAIN_FAMILIES = ("llava_onevision", "llava_next_video", "internvl", "smolvlm", "gemma3")


def interleaved(
    family: str,
    *,
    images: Sequence[Grid] = IMAGES,
    videos: Sequence[Grid] = VIDEOS,
    with_token_types: bool = True,
    seed: int = 0,
    shape: Shape = Shape(layers=1),
) -> Interleaved:
    """A small model of ``family`` (in ``GRID_FAMILIES`` or ``PLAIN_FAMILIES``) with a prompt of one batch element.

    Args:
        images, videos: for families with grids; GLM4V takes one kind at a time, so it gets the videos if there are any.
        with_token_types: pass what the processor says of modality, where it does.
    """
    if family == "glm4v" and videos:
        images = ()
    with _seeded(seed):
        if family in GRID_FAMILIES:
            model, inputs, script = _grid_family(family, shape, images, videos)
        else:
            model, inputs, script = _plain_family(family, shape)
    types = torch.tensor([script.prompt.types])
    ids = torch.tensor([script.prompt.ids])
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if with_token_types and family == "gemma3":
        inputs["token_type_ids"] = types
    elif with_token_types and family in GRID_FAMILIES and family != "video_llama_3":
        inputs["mm_token_type_ids"] = types
    return Interleaved(model, inputs, types, script.media)
