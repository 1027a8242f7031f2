"""Prompts to try on a model that was made from a config: with an image where its family takes one, else of text."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

_IMAGE_TOKENS = ("image_token_id", "image_token_index")
_STARTS = ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index")
_ENDS = ("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index")
_MANY_PATCHES = 4096
_LONGEST_WINDOW = 4096
_TILES = 11
"""Tiles of an image in families that cut it: models read as many as the sizes of the image ask for."""


@dataclass(frozen=True)
class Prompt:
    """Arguments of a forward, and what they are in words."""

    inputs: dict[str, Any]
    what: str


def prompts(model: nn.Module, config: Any, tokens: int) -> Iterator[Prompt]:
    """Prompts in the order in which they should be tried. Whether a model runs on one is for the caller to see.

    Args:
        config: that of the model. tokens: least length of the prompt.
    """
    takes = set(inspect.signature(model.forward).parameters)
    text = config.get_text_config()
    window = _window(text)
    note = f" (shorter than the window of {window})" if tokens <= window > _LONGEST_WINDOW else ""
    tokens = max(tokens, window + 64) if window <= _LONGEST_WINDOW else tokens
    tokens = min(tokens, getattr(text, "max_position_embeddings", None) or tokens)
    dtype = getattr(model, "dtype", torch.float32)
    if "input_ids" in takes:
        for prompt in _with_images(model, config, tokens, takes):
            yield replace(prompt, what=prompt.what + note)
        ids = _text_ids(config, tokens)
        plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        plain = {name: value for name, value in plain.items() if name in takes}
        if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
            plain["decoder_input_ids"] = ids
        seen = ", no image" if _named(config, _IMAGE_TOKENS) else ""
        words = f"a text prompt of {tokens} tokens{note}{seen}"
        yield Prompt(plain, words)
        if "pixel_values" in takes and not seen:
            for pixels in _pictures(config, takes):
                yield Prompt({**plain, **_cast(pixels, dtype)}, f"{words} and an image")
    elif "pixel_values" in takes:
        for pixels in _pictures(config, takes):
            yield Prompt(_cast(pixels, dtype), "an image")
    elif "input_features" in takes:
        frames = 2 * getattr(config, "max_source_positions", 1500)
        sound = {"input_features": torch.randn(1, getattr(config, "num_mel_bins", 80), frames)}
        ids = _text_ids(config, min(tokens, getattr(config, "max_target_positions", None) or tokens))
        yield Prompt({**_cast(sound, dtype), "decoder_input_ids": ids}, f"sound and {ids.shape[1]} tokens")


def _window(text: Any) -> int:
    """Tokens of the sliding window or the chunks of some layers; 0 where there are none. In a shorter prompt they would
    look like causal ones."""
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        return getattr(text, "sliding_window", None) or 0
    names = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    return max((getattr(text, name, None) or 0 for kind, name in names.items() if kind in kinds), default=0)


# --- text ------------------------------------------------------------------------------------------------------------


def _text_ids(config: Any, count: int) -> Tensor:
    """Ids of ordinary tokens, int64 ``[1, count]``: none that the config names."""
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) or 1024
    named = set(_token_ids(config))
    ordinary = torch.tensor([token for token in range(min(vocabulary, 4096)) if token not in named])
    return ordinary[torch.randint(len(ordinary), (1, count))]


def _token_ids(config: Any) -> Iterator[int]:
    """Every token id that a config or one inside it names."""
    for name, value in vars(config).items():
        if hasattr(value, "get_text_config"):
            yield from _token_ids(value)
        elif "token" in name and name.endswith(("_id", "_ids", "_index")):
            values = value if isinstance(value, list | tuple) else [value]
            yield from (token for token in values if isinstance(token, int))


def _named(config: Any, names: tuple[str, ...]) -> list[int]:
    """The first of these token ids that the config has; none where it has none."""
    values = (getattr(config, name, None) for name in names)
    return [value for value in values if isinstance(value, int)][:1]


# --- images ----------------------------------------------------------------------------------------------------------


def _with_images(model: nn.Module, config: Any, tokens: int, takes: set[str]) -> Iterator[Prompt]:
    """One image amid text. How many tokens it takes is asked of the model's own vision tower."""
    token, function = _named(config, _IMAGE_TOKENS), _image_features(model)
    if not token or function is None or "pixel_values" not in takes:
        return
    for pixels in _pictures(config, takes, tokens):
        made = _cast(pixels, getattr(model, "dtype", torch.float32))
        try:
            count = _feature_count(function, made)
        except Exception:  # whatever a vision tower does with pictures of another family
            continue
        image = [*_named(config, _STARTS), *token * count, *_named(config, _ENDS)]
        around = max(tokens - len(image), 32)
        words = _text_ids(config, around)[0]
        ids = torch.cat([words[: around // 2], torch.tensor(image), words[around // 2 :]])[None]
        types = (ids == token[0]).long()
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **made}
        if "mm_token_type_ids" in takes:
            inputs["mm_token_type_ids"] = types
        if "token_type_ids" in takes and hasattr(config, "mm_tokens_per_image"):  # there they tell modality
            inputs["token_type_ids"] = types
        yield Prompt(inputs, f"a prompt of {ids.shape[1]} tokens, {count} of them an image's")


def _cast(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def _vision_config(config: Any) -> Any:
    return getattr(config, "vision_config", None) or config


def _side(value: Any) -> int:
    """The size of a square from how a config writes it: a number, or one for each dimension."""
    if isinstance(value, list | tuple):
        return int(value[-1])
    return int(value["height"] if isinstance(value, dict) else value)


def _pictures(config: Any, takes: set[str], tokens: int = 512) -> Iterator[dict[str, Tensor]]:
    """Pixels of one image in the forms that families take, those that say most of themselves first."""
    vision = _vision_config(config)
    patch = _side(getattr(vision, "patch_size", None) or 16)
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    if "image_grid_thw" in takes:
        merge = getattr(vision, "spatial_merge_size", None) or getattr(config, "spatial_merge_size", None) or 2
        rows = columns = merge * max(2, min(16, math.isqrt(tokens // 4)))
        grid = torch.tensor([[1, rows, columns]])
        for depth in dict.fromkeys([getattr(vision, "temporal_patch_size", 1) or 1, 1]):
            flat = torch.randn(rows * columns, channels * depth * patch * patch)
            sizes = {"image_merge_sizes": torch.tensor([merge])} if "image_merge_sizes" in takes else {}
            yield {"pixel_values": flat, "image_grid_thw": grid, **sizes}
        yield {"pixel_values": flat.view(-1, channels, patch, patch), "image_grid_thw": grid}
        return
    for side in _sides(vision, patch):
        picture = torch.randn(1, channels, side, side)
        size = torch.tensor([[side, side]])
        if "image_sizes" in takes:
            yield {"pixel_values": picture, "image_sizes": size}
            yield {"pixel_values": torch.randn(1, _TILES, channels, side, side), "image_sizes": size}
        yield {"pixel_values": picture}
        yield {"pixel_values": picture[None]}


def _sides(vision: Any, patch: int) -> list[int]:
    """Sides of an image, in pixels: the config's, and a smaller one for towers that take any size."""
    side = getattr(vision, "image_size", None)
    own = [_side(side)] if side else []
    return list(dict.fromkeys([*(x for x in own if (x // patch) ** 2 <= _MANY_PATCHES), 28 * patch, *own]))


def _image_features(model: nn.Module) -> Callable[..., Any] | None:
    """The model's function from pixels to rows for the language model."""
    found = (getattr(owner, "get_image_features", None) for owner in (model, getattr(model, "model", None)))
    return next(filter(callable, found), None)


def _feature_count(function: Callable[..., Any], pixels: Mapping[str, Tensor]) -> int:
    """How many rows of image features ``function`` makes of an image."""
    takes = inspect.signature(function).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    found = function(**{name: x for name, x in pixels.items() if name in takes or open_ended})
    outputs = (getattr(found, name, None) for name in ("pooler_output", "last_hidden_state"))
    return _rows(next((output for output in outputs if output is not None), found))


def _rows(features: Any) -> int:
    """Rows of a tensor ``[…, width]``, or of all tensors of a list."""
    if isinstance(features, Tensor):
        return math.prod(features.shape[:-1])
    return sum(map(_rows, features))
