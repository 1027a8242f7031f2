"""Static caches, seen so that the compiler can say where a prompt stands.

A static cache counts its tokens in a tensor, and ``generate`` builds masks for it before it calls the model. Neither
means anything to a graph that gets them as inputs. For prompts both are undone: the model builds its mask from the
padding as it does with any other cache, and the count is a number. Decode steps stay as they are.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmi_compile.cached_prompt import cache_of

_MASKS = "create_masks_for_generate"


def keep_masks_readable(model: nn.Module) -> None:
    """Let ``model.generate`` hand the padding of a prompt to the model instead of a finished mask. A function for masks
    that the user has set on this model is left alone."""
    if not hasattr(model, "generate") or _MASKS in vars(model):
        return

    def create(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        embeddings = kwargs.get("inputs_embeds")
        if not args and isinstance(embeddings, Tensor) and embeddings.shape[1] > 1 and "attention_mask" in kwargs:
            return kwargs["attention_mask"]
        return _masks_of(self)(*args, **kwargs)

    # A bound method, so that a copy of the model gets one of its own.
    object.__setattr__(model, _MASKS, types.MethodType(create, model))


def _masks_of(model: nn.Module) -> Callable[..., Any]:
    own = next((vars(base)[_MASKS] for base in type(model).__mro__ if _MASKS in vars(base)), None)
    if own is not None:
        bound: Callable[..., Any] = own.__get__(model, type(model))
        return bound
    from transformers import masking_utils

    made: Callable[..., Any] = getattr(masking_utils, _MASKS)
    return made


def counting_on_the_host(call: Any) -> Callable[..., Any]:
    """``call`` with a static cache that says how many tokens it holds as a number while a prompt is read.

    On a GPU this waits for the device once for each prompt, or each chunk of one.
    """

    @functools.wraps(call, updated=())  # its attributes tell Dynamo that it may be unwrapped
    def counted(*args: Any, **kwargs: Any) -> Any:
        layers = _counting_layers(kwargs) if not torch.compiler.is_compiling() else []
        if not layers:
            return call(*args, **kwargs)
        with _as_numbers(layers):
            return call(*args, **kwargs)

    return counted


def _counting_layers(kwargs: dict[str, Any]) -> list[Any]:
    """Layers of a cache that count in a tensor, where this call reads more than one token."""
    tokens = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
    if not isinstance(tokens, Tensor) or tokens.dim() < 2 or tokens.shape[1] < 2:
        return []
    layers = getattr(cache_of(kwargs), "layers", None) or []
    return [layer for layer in layers if isinstance(getattr(layer, "cumulative_length", None), Tensor)]


@contextmanager
def _as_numbers(layers: list[Any]) -> Iterator[None]:
    counts = [layer.get_seq_length() for layer in layers]
    tensors = [count for count in counts if isinstance(count, Tensor)]
    if not tensors:
        yield
        return
    numbers = iter(torch.stack([count.reshape(()) for count in tensors]).tolist())
    try:
        for layer, count in zip(layers, counts, strict=True):
            if isinstance(count, Tensor):
                layer.get_seq_length = functools.partial(int, next(numbers))
        yield
    finally:
        for layer in layers:
            vars(layer).pop("get_seq_length", None)
