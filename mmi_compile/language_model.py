"""Find the language model inside a vision-language model by its interface, not by its class."""

from __future__ import annotations

import inspect
import re
import types

import torch
from torch import nn


def find_language_model(model: nn.Module) -> nn.Module:
    """The decoder that reads token embeddings; ``model`` itself where no part of it answers that description.

    transformers' ``get_decoder`` names it. Where a model lacks that method, the decoder is the one submodule that
    takes ``inputs_embeds`` and holds a list of layers and a token embedding of its own.
    """
    named = getattr(model, "get_decoder", None)
    if callable(named):
        decoder = named()
        if isinstance(decoder, nn.Module) and decoder is not model and _reads_embeddings(decoder):
            return decoder
    found = [m for m in model.modules() if m is not model and _reads_embeddings(m) and _has_layers(m)]
    innermost = [m for m in found if not any(n is not m and n in set(m.modules()) for n in found)]
    return innermost[0] if len(innermost) == 1 else model


def with_masks(model: nn.Module, language_model: nn.Module) -> nn.Module:
    """The part of ``model`` to compile so that the masks of ``language_model`` are made in the same graph.

    That is the innermost module around it whose forward makes masks, as Gemma 3's and PaliGemma's do for their image
    blocks; else the language model itself.

    What computes image features in such a module stays as it is.
    """
    inside = set(language_model.modules())
    around = [m for m in model.modules() if m not in inside and language_model in set(m.modules()) and _makes_masks(m)]
    if not around:
        return language_model
    for name in _FEATURES:
        function = getattr(type(around[-1]), name, None)
        if callable(function) and name not in vars(around[-1]):
            # A bound method, so that a copy of the model gets one of its own.
            kept = types.MethodType(torch.compiler.disable(function), around[-1])
            object.__setattr__(around[-1], name, kept)
    return around[-1]


_FEATURES = ("get_image_features", "get_video_features")
_MASK_MAKERS = re.compile(r"create_\w*masks?_?\w*")


def _makes_masks(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and any(_MASK_MAKERS.fullmatch(name) for name in code.co_names)


def takes_feature_mask(module: nn.Module) -> bool:
    """Does the decoder add features to rows that a mask selects (``visual_pos_masks``, as deepstack does)?"""
    return _takes(module, "visual_pos_masks")


def _reads_embeddings(module: nn.Module) -> bool:
    return _takes(module, "inputs_embeds")


def _takes(module: nn.Module, argument: str) -> bool:
    try:
        return argument in inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return False


def _has_layers(module: nn.Module) -> bool:
    children = dict(module.named_children())
    return any(isinstance(c, nn.ModuleList) and len(c) for c in children.values()) and any(
        isinstance(c, nn.Embedding) for c in children.values()
    )
