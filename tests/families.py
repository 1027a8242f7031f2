"""One small random model of every family of ``transformers`` that the matrix covers, and inputs that run.

``vision`` and ``text`` build them; the same arguments always give the same weights and inputs, and the global random
state is left alone. ``transformers`` is imported on use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.prompts import (
    IMAGE_ID,
    VIDEO_END_ID,
    VIDEO_ID,
    VIDEO_START_ID,
    VISION_END_ID,
    VISION_START_ID,
    Grid,
    Padding,
    Prompt,
    Shape,
    collate,
    seeded,
)

Built = tuple[nn.Module, dict[str, Any]]
Config = Any
"""A config of transformers, which is imported lazily."""

IMAGES: tuple[Grid, ...] = ((1, 4, 4), (1, 2, 4))
VIDEOS: tuple[Grid, ...] = ((3, 2, 2), (2, 4, 2))

_PATCH, _MERGE, _TEMPORAL = 4, 2, 2  # pixels, patches, frames; the vision towers of families with grids
_TOKENS = {"image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID}
_INDICES = {"image_token_index": IMAGE_ID, "video_token_index": VIDEO_ID}
_BRACKETS = {"vision_start_token_id": VISION_START_ID, "vision_end_token_id": VISION_END_ID}
_TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
"""Vision towers of families without grids: 16 patches, of 8 x 8 pixels, from every picture."""
_PINPOINTS = [[32, 32], [32, 64], [64, 32], [64, 64]]


@dataclass(frozen=True)
class Text:
    """A text family: names of its classes in ``transformers``, and what its config has beside ``Shape.config``."""

    title: str
    config: str
    model: str
    extra: Callable[[Shape], dict[str, Any]] = lambda shape: {}


def _gemma3_text(shape: Shape, **changes: Any) -> dict[str, Any]:
    """Sliding and full attention by turns, the last layer full."""
    kinds = ["full_attention" if (shape.layers - layer) % 2 else "sliding_attention" for layer in range(shape.layers)]
    return {
        "head_dim": shape.head_dim, "sliding_window": 8, "layer_types": kinds, "query_pre_attn_scalar": shape.head_dim,
        "rope_parameters": None, **changes,
    }  # fmt: skip


TEXT: dict[str, Text] = {
    "llama": Text("Llama", "LlamaConfig", "LlamaForCausalLM"),
    "qwen2": Text("Qwen2", "Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": Text("Qwen3", "Qwen3Config", "Qwen3ForCausalLM", lambda shape: {"head_dim": shape.head_dim}),
    "mistral": Text("Mistral, sliding window", "MistralConfig", "MistralForCausalLM", lambda _: {"sliding_window": 8}),
    "phi3": Text("Phi-3", "Phi3Config", "Phi3ForCausalLM"),
    "gemma3_text": Text("Gemma 3, text", "Gemma3TextConfig", "Gemma3ForCausalLM", _gemma3_text),
}


@dataclass(frozen=True)
class Vision:
    """A vision-language family.

    Attributes:
        title: as its users write it.
        model: its class in ``transformers``.
        config: the config around a decoder of a shape.
        write: writes the images and videos of one batch element.
        pixels: makes the inputs for the vision tower of a batch of that many elements.
        types: the argument that tells modality, where the processor passes one.
    """

    title: str
    model: str
    config: Callable[[Shape], Config]
    write: Callable[[Prompt, Sequence[Grid], Sequence[Grid]], object]
    pixels: Callable[[int, Sequence[Grid], Sequence[Grid]], dict[str, Tensor]]
    types: str | None = None
    grids: bool = False


# --- families whose processor passes grids ---------------------------------------------------------------------------


def _mrope(shape: Shape, **changes: Any) -> dict[str, Any]:
    side = (shape.head_dim // 2) * 3 // 8
    section = [shape.head_dim // 2 - 2 * side, side, side]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section, **changes}
    return {**shape.config(), "rope_parameters": rope}


def _grid_tower(shape: Shape, **changes: Any) -> dict[str, Any]:
    return {
        "depth": 1, "hidden_size": 32, "out_hidden_size": shape.hidden, "intermediate_size": 64, "num_heads": 2,
        "patch_size": _PATCH, "spatial_merge_size": _MERGE, "temporal_patch_size": _TEMPORAL, **changes,
    }  # fmt: skip


def _config(name: str, **arguments: Any) -> Config:
    import transformers

    return getattr(transformers, name)(**arguments)


def _qwen2_vl(shape: Shape) -> Config:
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": shape.hidden, "num_heads": 2, "mlp_ratio": 2}
    vision |= {"patch_size": _PATCH, "spatial_merge_size": _MERGE, "temporal_patch_size": _TEMPORAL}
    return _config("Qwen2VLConfig", text_config=_mrope(shape), vision_config=vision, **_TOKENS, **_BRACKETS)


def _qwen2_5_vl(shape: Shape) -> Config:
    vision = _grid_tower(shape, depth=2, window_size=16, fullatt_block_indexes=[1], tokens_per_second=2)
    return _config("Qwen2_5_VLConfig", text_config=_mrope(shape), vision_config=vision, **_TOKENS, **_BRACKETS)


def _qwen3_vl(shape: Shape) -> Config:
    text = {**_mrope(shape, mrope_interleaved=True), "head_dim": shape.head_dim}
    vision = _grid_tower(shape, num_position_embeddings=64, deepstack_visual_indexes=[0])
    return _config("Qwen3VLConfig", text_config=text, vision_config=vision, **_TOKENS, **_BRACKETS)


def _qwen3_vl_moe(shape: Shape) -> Config:
    text = {**_mrope(shape, mrope_interleaved=True), "head_dim": shape.head_dim}
    text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    vision = _grid_tower(shape, num_position_embeddings=64, deepstack_visual_indexes=[0])
    return _config("Qwen3VLMoeConfig", text_config=text, vision_config=vision, **_TOKENS, **_BRACKETS)


def _qwen3_5(shape: Shape) -> Config:
    """Linear and full attention by turns, the last layer full."""
    kinds = ["full_attention" if (shape.layers - layer) % 2 else "linear_attention" for layer in range(shape.layers)]
    rope = {"mrope_interleaved": True, "partial_rotary_factor": 0.25, "mrope_section": [1, 1, 0]}
    text = {**_mrope(shape, **rope), "head_dim": shape.head_dim, "layer_types": kinds}
    text |= {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    vision = _grid_tower(shape, num_position_embeddings=64)
    return _config("Qwen3_5Config", text_config=text, vision_config=vision, **_TOKENS, **_BRACKETS)


def _glm4v(shape: Shape) -> Config:
    ends = {"image_start_token_id": VISION_START_ID, "image_end_token_id": VISION_END_ID}
    ends |= {"video_start_token_id": VIDEO_START_ID, "video_end_token_id": VIDEO_END_ID}
    text = _mrope(shape, mrope_section=[1, 1, 2], partial_rotary_factor=0.5)
    return _config("Glm4vConfig", text_config=text, vision_config=_grid_tower(shape, image_size=32), **ends, **_TOKENS)


def _video_llama_3(shape: Shape) -> Config:
    vision = {name: size for name, size in _TOWER.items() if name != "image_size"} | {"patch_size": _PATCH}
    text = _config("Qwen2Config", **shape.config())
    return _config("VideoLlama3Config", text_config=text, vision_config=vision, **_TOKENS)


def _write_grids(stamp: int, wrapped: bool) -> Callable[[Prompt, Sequence[Grid], Sequence[Grid]], None]:
    """Images, then videos: whole ones between brackets, or a time ``stamp`` before each frame."""

    def write(prompt: Prompt, images: Sequence[Grid], videos: Sequence[Grid]) -> None:
        for grid in images:
            prompt.image(grid).text(3)
        for grid in videos:
            if stamp:
                prompt.video(grid, stamp=stamp, wrapped=wrapped).text(2)
            else:
                prompt.put(VISION_START_ID).video(grid).put(VISION_END_ID).text(2)

    return write


def _write_glm4v(prompt: Prompt, images: Sequence[Grid], videos: Sequence[Grid]) -> None:
    """A video is a list of images between tokens of its own, with a time stamp before each frame."""
    for grid in images:
        prompt.image(grid).text(3)
    for grid in videos:
        prompt.put(VIDEO_START_ID).video(grid, IMAGE_ID, stamp=3, wrapped=True).text(2).put(VIDEO_END_ID)


def _patches(batch: int, images: Sequence[Grid], videos: Sequence[Grid], depth: int = _TEMPORAL) -> dict[str, Tensor]:
    """Random patches ``[sum(t*h*w), channels * depth * patch * patch]`` and the grids, int64 ``[media, 3]``."""
    made = {}
    for name, pixels, media in (("image", "pixel_values", images), ("video", "pixel_values_videos", videos)):
        if media:
            patches = [(t, rows * _MERGE, columns * _MERGE) for t, rows, columns in media] * batch
            rows = sum(t * h * w for t, h, w in patches)
            made |= {pixels: torch.randn(rows, 3 * depth * _PATCH**2), f"{name}_grid_thw": torch.tensor(patches)}
    return made


def _video_llama_pixels(batch: int, images: Sequence[Grid], videos: Sequence[Grid]) -> dict[str, Tensor]:
    made = _patches(batch, images, videos, depth=1)
    for name, media in (("image", images), ("video", videos)):
        if media:
            made[f"{name}_merge_sizes"] = torch.tensor([_MERGE] * len(media) * batch)
    if videos:
        made["video_compression_mask"] = torch.ones(batch * sum(t * h * w for t, h, w in videos), dtype=torch.bool)
    return made


# --- families without grids ------------------------------------------------------------------------------------------


def _llama(shape: Shape) -> Config:
    return _config("LlamaConfig", **shape.config())


def _clip() -> Config:
    return _config("CLIPVisionConfig", **_TOWER | {"num_hidden_layers": 2}, projection_dim=32)


def _siglip() -> Config:
    return _config("SiglipVisionConfig", **_TOWER | {"num_hidden_layers": 2})


def _llava(shape: Shape) -> Config:
    return _config(
        "LlavaConfig", vision_config=_clip(), text_config=_llama(shape), image_token_index=IMAGE_ID, image_seq_length=16
    )


def _llava_onevision(shape: Shape) -> Config:
    text = _config("Qwen2Config", **shape.config())
    pinpoints = {"image_grid_pinpoints": _PINPOINTS}
    return _config("LlavaOnevisionConfig", vision_config=_siglip(), text_config=text, **pinpoints, **_INDICES)


def _llava_next_video(shape: Shape) -> Config:
    sizes = {"image_seq_length": 16, "video_seq_length": 12, "spatial_pool_stride": 2}
    pinpoints = {"image_grid_pinpoints": _PINPOINTS}
    return _config(
        "LlavaNextVideoConfig", vision_config=_clip(), text_config=_llama(shape), **pinpoints, **sizes, **_INDICES
    )


def _internvl(shape: Shape) -> Config:
    return _config(
        "InternVLConfig",
        vision_config=_config("InternVLVisionConfig", **_TOWER | {"image_size": [32, 32], "patch_size": [8, 8]}),
        text_config=_config("Qwen2Config", **shape.config()),
        image_token_id=IMAGE_ID,
        image_seq_length=4,
        downsample_ratio=0.5,
    )


def _idefics(name: str) -> Callable[[Shape], Config]:
    def config(shape: Shape) -> Config:
        text = _llama(shape)
        return _config(name, vision_config=_TOWER, text_config=text, image_token_id=IMAGE_ID, scale_factor=2)

    return config


def _mistral3(shape: Shape) -> Config:
    vision = _config("PixtralVisionConfig", **_TOWER | {"image_size": 64, "head_dim": 16})
    text = _config("MistralConfig", **shape.config(), head_dim=shape.head_dim, sliding_window=None)
    tokens = {"image_token_index": IMAGE_ID, "spatial_merge_size": 2}
    return _config("Mistral3Config", vision_config=vision, text_config=text, **tokens)


def _gemma3(shape: Shape) -> Config:
    text = _config("Gemma3TextConfig", **{**shape.config(), **_gemma3_text(shape)})
    tokens = {"image_token_index": IMAGE_ID, "boi_token_index": VISION_START_ID, "eoi_token_index": VISION_END_ID}
    return _config("Gemma3Config", vision_config=_siglip(), text_config=text, mm_tokens_per_image=4, **tokens)


def _write_llava(prompt: Prompt, images: Sequence[Grid], videos: Sequence[Grid]) -> None:
    for grid in images:
        prompt.image(grid, wrapped=False).text(2)


def _write_tiles(newline: int) -> Callable[[Prompt, Sequence[Grid], Sequence[Grid]], None]:
    """An image of 64 x 64 pixels as a tile of 16 tokens, and four with a newline token after each of eight rows."""

    def write(prompt: Prompt, images: Sequence[Grid], videos: Sequence[Grid]) -> None:
        prompt.put(VISION_START_ID).features(IMAGE_ID, 1, 16 + 8 * 9).put(VISION_END_ID).text(4)
        prompt.put(VISION_START_ID).features(VIDEO_ID, 2, 3 * 4 + newline).put(VISION_END_ID)

    return write


def _write_two_images(prompt: Prompt, images: Sequence[Grid], videos: Sequence[Grid]) -> None:
    """Two pictures of four tokens each."""
    for gap in (5, 0):
        prompt.put(VISION_START_ID).features(IMAGE_ID, 1, 4).put(VISION_END_ID).text(gap)


def _pictures(*shape: int) -> Callable[[int, Sequence[Grid], Sequence[Grid]], dict[str, Tensor]]:
    """``pixel_values`` of this shape for every batch element, joined along the first dimension."""

    def pixels(batch: int, images: Sequence[Grid], videos: Sequence[Grid]) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(batch * shape[0], *shape[1:])}

    return pixels


def _llava_pixels(batch: int, images: Sequence[Grid], videos: Sequence[Grid]) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch * len(images), 3, 32, 32)} if images else {}


def _mistral3_pixels(batch: int, images: Sequence[Grid], videos: Sequence[Grid]) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2 * batch, 3, 32, 32), "image_sizes": torch.tensor([[32, 32]] * 2 * batch)}


def _tiles(batch: int, images: Sequence[Grid], videos: Sequence[Grid]) -> dict[str, Tensor]:
    made = {"pixel_values": torch.randn(batch, 5, 3, 32, 32), "image_sizes": torch.tensor([[64, 64]] * batch)}
    return {**made, "pixel_values_videos": torch.randn(batch, 3, 3, 32, 32)}


def _tiles_of_onevision(batch: int, images: Sequence[Grid], videos: Sequence[Grid]) -> dict[str, Tensor]:
    return {**_tiles(batch, images, videos), "batch_num_images": torch.tensor([1] * batch)}


_GRIDS: dict[str, Any] = {"pixels": _patches, "types": "mm_token_type_ids", "grids": True}

VISION: dict[str, Vision] = {
    "qwen2_vl": Vision(
        "Qwen2-VL", "Qwen2VLForConditionalGeneration", _qwen2_vl, _write_grids(0, wrapped=False), **_GRIDS
    ),
    "qwen2_5_vl": Vision(
        "Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl, _write_grids(0, wrapped=False), **_GRIDS
    ),
    "qwen3_vl": Vision(
        "Qwen3-VL", "Qwen3VLForConditionalGeneration", _qwen3_vl, _write_grids(4, wrapped=True), **_GRIDS
    ),
    "qwen3_vl_moe": Vision(
        "Qwen3-VL-MoE", "Qwen3VLMoeForConditionalGeneration", _qwen3_vl_moe, _write_grids(4, wrapped=True), **_GRIDS
    ),
    "qwen3_5": Vision("Qwen3.5", "Qwen3_5ForConditionalGeneration", _qwen3_5, _write_grids(4, wrapped=True), **_GRIDS),
    "llava": Vision("LLaVA-1.5", "LlavaForConditionalGeneration", _llava, _write_llava, _llava_pixels),
    "llava_next_video": Vision(
        "LLaVA-NeXT-Video", "LlavaNextVideoForConditionalGeneration", _llava_next_video, _write_tiles(0), _tiles
    ),
    "llava_onevision": Vision(
        "LLaVA-OneVision",
        "LlavaOnevisionForConditionalGeneration",
        _llava_onevision,
        _write_tiles(1),
        _tiles_of_onevision,
    ),
    "internvl": Vision(
        "InternVL", "InternVLForConditionalGeneration", _internvl, _write_two_images, _pictures(2, 3, 32, 32)
    ),
    "video_llama_3": Vision(
        "VideoLLaMA3",
        "VideoLlama3ForConditionalGeneration",
        _video_llama_3,
        _write_grids(3, wrapped=False),
        _video_llama_pixels,
        grids=True,
    ),
    "gemma3": Vision(
        "Gemma 3",
        "Gemma3ForConditionalGeneration",
        _gemma3,
        _write_two_images,
        _pictures(2, 3, 32, 32),
        "token_type_ids",
    ),
    "idefics3": Vision(
        "Idefics3",
        "Idefics3ForConditionalGeneration",
        _idefics("Idefics3Config"),
        _write_two_images,
        _pictures(1, 2, 3, 32, 32),
    ),
    "smolvlm": Vision(
        "SmolVLM",
        "SmolVLMForConditionalGeneration",
        _idefics("SmolVLMConfig"),
        _write_two_images,
        _pictures(1, 2, 3, 32, 32),
    ),
    "mistral3": Vision(
        "Mistral 3 (Pixtral)", "Mistral3ForConditionalGeneration", _mistral3, _write_two_images, _mistral3_pixels
    ),
    "glm4v": Vision("GLM-4V", "Glm4vForConditionalGeneration", _glm4v, _write_glm4v, **_GRIDS),
}

GRID_FAMILIES = tuple(name for name, family in VISION.items() if family.grids)
PLAIN_FAMILIES = tuple(name for name, family in VISION.items() if not family.grids)


# --- building --------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A vision-language model with a batch of prompts.

    Attributes:
        types: the true modality, int64 ``[batch, length]``: 0 text, 1 image, 2 video.
        media: for each image and video of the first batch element ``(modality, grid, start, frame stride)``, with the
            stride None where there is one frame; in the order of the prompt.
    """

    model: nn.Module
    inputs: dict[str, Any]
    types: Tensor
    media: list[tuple[int, Grid, int, int | None]]


def instantiate(model: str, config: Config, attn: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The class called ``model`` with random weights."""
    import transformers

    made: nn.Module = getattr(transformers, model)._from_config(config, attn_implementation=attn, dtype=dtype)
    return made.eval()


def vision(
    name: str,
    *,
    attn: str = "sdpa",
    images: Sequence[Grid] = IMAGES,
    videos: Sequence[Grid] = VIDEOS,
    before: int = 5,
    after: int = 4,
    batch: int = 1,
    padding: Padding = "none",
    with_attention_mask: bool = True,
    with_token_types: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shape: Shape = Shape(layers=1),
) -> Case:
    """A small model of a family in ``VISION``, with a batch of prompts.

    Args:
        images, videos: for families with grids; GLM4V takes one kind at a time, so it gets the videos if there are any.
            LLaVA-1.5 takes images of 4 x 4 tokens; the other families have media of their own.
        before, after: text tokens before the first and after the last of the media.
        with_token_types: pass what the processor says of modality, where it does.
    """
    family = VISION[name]
    if name == "glm4v" and videos:
        images = ()
    if name == "llava":
        images = [(1, 4, 4)] * len(images)
    with seeded(seed):
        model = instantiate(family.model, family.config(shape), attn, dtype)
        made = collate(
            lambda prompt: family.write(prompt, images, videos),
            before=before, after=after, batch=batch, padding=padding, with_attention_mask=with_attention_mask,
        )  # fmt: skip
        pixels = family.pixels(batch, images, videos)
    inputs = made.inputs | {key: x.to(dtype) if x.is_floating_point() else x for key, x in pixels.items()}
    if with_token_types and family.types is not None:
        inputs[family.types] = made.types
    return Case(model, inputs, made.types, made.media)


def text(
    name: str,
    *,
    attn: str = "sdpa",
    tokens: int = 33,
    batch: int = 1,
    padding: Padding = "none",
    with_attention_mask: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shape: Shape = Shape(),
    **config: Any,
) -> Built:
    """A small model of a family in ``TEXT``, with prompts of ``tokens`` tokens; ``config`` changes its config."""
    family = TEXT[name]
    arguments = {**shape.config(), **family.extra(shape), **config}
    with seeded(seed):
        model = instantiate(family.model, _config(family.config, **arguments), attn, dtype)
        made = collate(
            lambda prompt: None, before=tokens, after=0, batch=batch, padding=padding,
            with_attention_mask=with_attention_mask,
        )  # fmt: skip
    return model, dict(made.inputs)
