"""Grids for the forwards inside ``generate``, which may encode images and videos first and forget their grids."""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

GRIDS = (("image", "image_grid_thw"), ("video", "video_grid_thw"))
"""Kind of medium, and the argument that holds ``(t, h, w)`` of each, in patches."""


class _State(threading.local):
    def __init__(self) -> None:
        self.calls: list[tuple[nn.Module, dict[str, Any]]] = []  # generate(**kwargs) of which model, the innermost last


_state = _State()


def keep_grids(model: nn.Module) -> None:
    """Wrap ``model.generate`` so that :func:`grids` knows its arguments while it runs. One that the user has replaced
    is left alone."""
    original = getattr(type(model), "generate", None)
    if original is None or "generate" in vars(model):
        return

    @functools.wraps(original)
    def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _running(self, args, kwargs):
            return original(self, *args, **kwargs)

    # A bound method, so that a copy of the model gets one of its own.
    object.__setattr__(model, "generate", types.MethodType(generate, model))


@contextmanager
def _running(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    ids = kwargs.get("inputs", args[0] if args else None)
    _state.calls.append((model, kwargs if ids is None else {**kwargs, "input_ids": ids}))
    try:
        yield
    finally:
        _state.calls.pop()


def grids(model: nn.Module, kwargs: Mapping[str, Any], shape: tuple[int, int]) -> dict[str, Any]:
    """What the running ``generate`` of this model was told of grids, if a forward has read its whole prompt, ``shape``
    of it, and was told of none itself. Beams have other shapes, and so has every part of a prompt but the last."""
    if not _state.calls or _state.calls[-1][0] is not model or any(name in kwargs for _, name in GRIDS):
        return {}
    told = _state.calls[-1][1]
    if getattr(told.get("input_ids"), "shape", None) != shape:
        return {}
    kept = ("{}_grid_thw", "{}_merge_sizes", "{}_compression_mask")
    names = [name.format(kind) for kind, _ in GRIDS for name in kept]
    return {name: told[name] for name in names if told.get(name) is not None}
