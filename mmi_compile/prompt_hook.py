"""Read from each prompt which tokens are text, image or video, before the model runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmi_compile import record
from mmi_compile.record import LABELS, Record

_HANDLES = "_mmi_prompt_hook"
_ID_ATTRIBUTES = ("{}_token_id", "{}_token_index")


class PromptHook:
    """A forward pre-hook that records the prompt's modality ids, and a forward hook that ends the record.

    It runs eagerly, outside every compiled graph, and survives ``generate``.
    """

    def __init__(self, model: nn.Module) -> None:
        self._ids = token_ids(getattr(model, "config", None))

    @classmethod
    def install(cls, model: nn.Module) -> None:
        """Install once per model; a second call changes nothing."""
        if hasattr(model, _HANDLES):
            return
        hook = cls(model)
        handles = (
            model.register_forward_pre_hook(hook.before, with_kwargs=True, prepend=True),
            model.register_forward_hook(hook.after, with_kwargs=True, always_call=True),
        )
        object.__setattr__(model, _HANDLES, handles)

    @torch.compiler.disable
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = self.read(args, kwargs)
        found.owner = self
        record.push_hooked(found)

    @torch.compiler.disable
    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        record.pop_hooked(self)

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Record:
        """The record of one call: from the processor's modality ids, else from the config's token ids, else from
        ``token_type_ids``, which are modalities in some families and halves of the prompt in others."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point():
            return Record("the prompt has no input_ids")
        given = _token_types("mm_token_type_ids", ids, kwargs)
        if given is not None:
            return given
        if not self._ids:
            return _token_types("token_type_ids", ids, kwargs) or Record("the config names no image or video token")
        merged = torch.zeros(ids.shape, dtype=torch.int8, device=ids.device)
        for label, token in self._ids.items():
            merged = merged.masked_fill(ids == token, LABELS.index(label))
        return Record("input_ids and config", ids=merged)


def _token_types(name: str, ids: Tensor, kwargs: dict[str, Any]) -> Record | None:
    types = kwargs.get(name)
    if not isinstance(types, Tensor) or types.shape != ids.shape:
        return None
    return Record(name, ids=types.clamp(0, record.MAX_MODALITIES - 1).to(torch.int8))


def token_ids(config: Any) -> dict[str, int]:
    """The ids that stand for image, video and audio tokens in a transformers config."""
    found = {}
    for label in LABELS[1:]:
        for attribute in _ID_ATTRIBUTES:
            value = getattr(config, attribute.format(label), None)
            if isinstance(value, int):
                found[label] = value
                break
    return found
