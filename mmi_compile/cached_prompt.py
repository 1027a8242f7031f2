"""Which token is what among those that a cache holds, for prompts that are read in parts.

``generate(prefill_chunk_size=…)``, a second question about the same images, and a cache that is filled once and copied
have in common that a forward gets a part of the prompt, and its attention sees the rest in the cache. What the parts
before were told is kept on the cache itself, so that copies of it have it too. It is used only where the cache holds as
many tokens as were seen to go in (or fewer, after a crop), and its keys are still those that the last forward left
there; a cache that was filled elsewhere, reordered or changed by hand has no known beginning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmi_compile.record import Record
from mmi_compile.visual_segments import VisualSegment

_ATTRIBUTE = "_mmi_cached_prompt"


@dataclass(eq=False)
class CachedPrompt:
    """What is known of the tokens in a cache.

    Attributes:
        ids: int8 ``[B, tokens]``; names, segments: as in :class:`mmi_compile.record.Record`.
        steps: tokens that were read one at a time since, as decoding does. Nothing is computed for them.
        keys: the first layer's keys after the last forward, held so that a deep copy of the cache holds the copy of
            them; None where the cache does not show any.
    """

    ids: Tensor
    names: dict[int, str] = field(default_factory=dict)
    segments: tuple[VisualSegment, ...] = ()
    steps: int = 0
    keys: Tensor | None = None


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a forward, or None: transformers calls it ``cache`` from 5.24 on, and
    ``past_key_values`` before."""
    cache = arguments.get("cache")
    return arguments.get("past_key_values") if cache is None else cache


def cache_in(output: Any) -> Any:
    """The cache in what a forward returned, under either name, or None."""
    cache = getattr(output, "cache", None)
    return getattr(output, "past_key_values", None) if cache is None else cache


def tokens_before(kwargs: Mapping[str, Any]) -> int | None:
    """How many tokens the cache of a forward holds; 0 where it has none, None where it does not say.

    A static cache counts on the device: this then waits for it.
    """
    cache = cache_of(kwargs)
    if cache is None:
        return 0
    length = getattr(cache, "get_seq_length", None)
    return int(length()) if callable(length) else None


def continued(found: Record, before: int, cache: Any) -> None:
    """Make the record of a part, ids ``[B, n]``, that of the whole prompt so far, ids ``[B, before + n]``; where the
    beginning is not known, of nothing, with the reason."""
    assert found.ids is not None
    known = getattr(cache, _ATTRIBUTE, None)
    problem = _misfit(known, before, found, cache)
    if not isinstance(known, CachedPrompt) or problem:
        found.source += f"; not used: {problem}"
        found.ids, found.segments, found.grid_note = None, (), ""
        return
    batch = found.ids.shape[0]
    parts = [known.ids[:, :before].to(found.ids.device)]
    parts += [found.ids.new_zeros(batch, known.steps)] if known.steps else []
    found.ids = torch.cat([*parts, found.ids], 1)
    found.names = {**known.names, **found.names}
    kept = tuple(segment for segment in known.segments if segment.stop <= before)
    found.segments = kept + tuple(_moved(segment, before) for segment in found.segments)
    found.source += f"; {before} tokens were read before"
    if known.steps:
        found.source += f", {known.steps} of them one at a time, which count as text"


def _misfit(known: Any, before: int, found: Record, cache: Any) -> str:
    if not isinstance(known, CachedPrompt):
        return f"the cache holds {before} tokens of which nothing is known"
    assert found.ids is not None
    if known.ids.shape[0] != found.ids.shape[0]:
        return f"the cache was filled by {known.ids.shape[0]} prompts, and {found.ids.shape[0]} go on"
    tokens = known.ids.shape[1]
    # With steps in between, fewer tokens may be others than those that were there.
    if before != tokens + known.steps and not (before < tokens and not known.steps):
        return f"the cache holds {before} tokens, and {tokens + known.steps} were seen to go in"
    if not _same_keys(known.keys, _first_keys(cache)):
        return "the cache was changed since a forward of this model left it"
    if any(known.names.get(number, label) != label for number, label in found.names.items()):
        return f"modalities are called {known.names} in the cache and {found.names} now"
    return ""


def _moved(segment: VisualSegment, by: int) -> VisualSegment:
    return replace(segment, start=segment.start + by, stop=segment.stop + by)


def remember(cache: Any, found: Record | None, tokens: int) -> None:
    """Keep on ``cache`` what a forward of ``tokens`` tokens, recorded as ``found``, has put into it."""
    if cache is None:
        return
    known = getattr(cache, _ATTRIBUTE, None)
    if tokens == 1:
        if known is not None:  # a new one: a shallow copy of the cache has this one too
            _attach(cache, replace(known, steps=known.steps + 1, keys=_first_keys(cache)))
    elif found is not None and found.ids is not None:
        _attach(cache, CachedPrompt(found.ids, dict(found.names), found.segments, keys=_first_keys(cache)))
    elif known is not None:
        _attach(cache, None)


def _first_keys(cache: Any) -> Tensor | None:
    """The keys of the first layer that has some."""
    layers = getattr(cache, "layers", None)
    for layer in layers if isinstance(layers, list) else ():
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor):
            return keys
    return None


def _same_keys(before: Tensor | None, now: Tensor | None) -> bool:
    """Whether these are the same tensor, or one a crop of the other."""
    if before is None or now is None:
        return before is now
    return before.shape[0] == now.shape[0] and before.data_ptr() == now.data_ptr()


def _attach(cache: Any, known: CachedPrompt | None) -> None:
    try:
        setattr(cache, _ATTRIBUTE, known)
    except AttributeError:  # a tuple, or a class with slots: its next part has no known beginning
        return
