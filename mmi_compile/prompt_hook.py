"""Read from each prompt which tokens are text, image or video, and how they lie on grids, before the model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmi_compile import cached_prompt, generating, record
from mmi_compile.decision import MMIError
from mmi_compile.generating import GRIDS
from mmi_compile.record import ANY_VISION, LABELS, Record
from mmi_compile.visual_segments import GridMismatch, Grids, VisualSegment, find_segments, to_host

_HOOK = "_mmi_prompt_hook"
_FROM_IDS = "input_ids and config"
_ID_ATTRIBUTES = ("{}_token_id", "{}_token_index")


class PromptHook:
    """A forward pre-hook that records the prompt's modality ids, and a forward hook that ends the record.

    It runs eagerly, outside every compiled graph, and survives ``generate``. For a prompt of more than one token whose
    modality types or grids lie on a device, it waits for that device once, and once more for a static cache to say how
    many tokens it holds; otherwise it never does.

    Args:
        model: the model that is called with the processor's output.
        strict: raise where metadata disagrees with the prompt, instead of going on without it.
    """

    def __init__(self, model: nn.Module, *, strict: bool = False) -> None:
        self._config = ConfigFacts.of(getattr(model, "config", None))
        self.strict = strict

    @classmethod
    def install(cls, model: nn.Module, *, strict: bool = False) -> None:
        """Install once per model; a second call changes nothing but ``strict``."""
        installed = vars(model).get(_HOOK)
        if installed is not None:
            installed[0].strict = strict
            return
        hook = cls(model, strict=strict)
        handles = (
            model.register_forward_pre_hook(hook.before, with_kwargs=True, prepend=True),
            model.register_forward_hook(hook.after, with_kwargs=True, always_call=True),
        )
        object.__setattr__(model, _HOOK, (hook, *handles))
        generating.keep_grids(model)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # An exported program is the model as it was written: there is no rewritten attention that would read a record.
        if not torch.compiler.is_exporting():
            self._before(module, args, kwargs)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not torch.compiler.is_exporting():
            self._after(args, kwargs, output)

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = self.read(args, kwargs, module)
        found.owner = self
        record.push_hooked(found)

    @torch.compiler.disable
    def _after(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found = record.pop_hooked(self)
        shape = _prompt_shape(_input_ids(args, kwargs), kwargs)
        if shape is None or output is None:  # the forward failed: how much of it is in the cache, the cache will tell
            return
        cache = cached_prompt.cache_in(output)
        cached_prompt.remember(cached_prompt.cache_of(kwargs) if cache is None else cache, found, shape[1])

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], module: nn.Module | None = None) -> Record:
        """The record of one call: from the processor's modality ids, else from the config's token ids, else from
        ``token_type_ids``, which are modalities in some families and halves of the prompt in others, else from the
        positions of features (``visual_pos_masks``).

        Where the call goes on with a cache, the record is that of all tokens so far (see
        :mod:`mmi_compile.cached_prompt`). A call with one token is a decode step, whose attention asks for none.

        Args:
            module: the model whose ``generate`` may know the grids of the whole prompt.

        Raises:
            MMIError: under ``strict``, where metadata or ids given by hand do not fit the prompt.
        """
        ids = _input_ids(args, kwargs)
        shape = _prompt_shape(ids, kwargs)
        if shape is None:
            return Record("the prompt has no input_ids")
        if shape[1] == 1:
            return Record("a decode step")
        if self.strict:
            _check_given(*shape)
        found, problem = self._modality(ids, shape, kwargs)
        if problem:
            if self.strict:
                raise MMIError(problem)
            found.source += f"; {problem}"
        if found.ids is None:
            return found
        before = cached_prompt.tokens_before(kwargs)
        whole = (shape[0], shape[1] + (before or 0))
        told = {} if module is None else generating.grids(module, kwargs, whole)
        if not before:
            self._add_segments(found, {**told, **kwargs})
        elif self._config.video is not None and found.source.startswith(_FROM_IDS):
            return Record(f"{found.source}; not used: a video that began in an earlier part looks like images")
        else:
            self._add_segments(found, kwargs)
            cached_prompt.continued(found, before, cached_prompt.cache_of(kwargs))
            if told and found.ids is not None:  # the last part of a prompt whose grids generate was told
                self._add_segments(found, told)
        return found

    def _modality(self, ids: Tensor | None, shape: tuple[int, int], kwargs: Mapping[str, Any]) -> tuple[Record, str]:
        """The record without segments, and what is wrong with ``mm_token_type_ids``, in words."""
        types, problem = _token_types("mm_token_type_ids", shape, kwargs)
        if types is not None:
            return types, ""
        if ids is not None and self._config.ids:
            return self._config.read(ids), problem
        types, wrong = _token_types("token_type_ids", shape, kwargs)
        if types is not None:
            return types, problem
        visual = kwargs.get("visual_pos_masks")
        if isinstance(visual, Tensor) and visual.shape == shape:
            merged, names = record.merge([visual.bool()], [ANY_VISION])
            return Record("visual_pos_masks (image and video are not told apart)", ids=merged, names=names), problem
        if ids is None:
            return Record("the prompt has no input_ids"), problem
        return Record("the config names no image or video token"), problem or wrong

    def _add_segments(self, found: Record, kwargs: Mapping[str, Any]) -> None:
        assert found.ids is not None
        segments: list[VisualSegment] = []
        notes: list[str] = []
        errors: list[GridMismatch] = []
        try:
            prompt, described = self._grids(found.ids, kwargs)
        except GridMismatch as error:
            described = []
            errors.append(error)
        for grids in described:
            try:
                more, note = find_segments(prompt, grids)
            except GridMismatch as error:
                errors.append(error)
            else:
                segments += more
                notes += [note] if note else []
        if errors and _cached_tokens(kwargs):
            found.grid_note = "a later part of a cached prompt: its grids describe the whole"
            return
        if errors and self.strict:
            raise errors[0]
        if not described and not errors:
            notes.append("the forward was given no grids")
        found.segments = tuple(sorted(segments, key=lambda segment: (segment.batch, segment.start)))
        found.grid_note = "; ".join([*notes, *map(str, errors)])

    def _grids(self, ids: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, list[Grids]]:
        """The modality ids on the host, and what each argument says."""
        names = [(kind, name) for kind, name in GRIDS if isinstance(kwargs.get(name), Tensor)]
        if not names:
            return ids, []
        wanted = [ids]
        for kind, name in names:
            grid, merges, kept = kwargs[name], kwargs.get(f"{kind}_merge_sizes"), _kept(kind, kwargs)
            if grid.dim() != 2 or grid.shape[1] != 3 or grid.is_floating_point():
                raise GridMismatch(f"{name} is {grid.dtype} {tuple(grid.shape)}; pass integers [media, 3]: t, h, w")
            empty = grid[:0, 0]
            wanted += [grid, merges if isinstance(merges, Tensor) else empty, empty if kept is None else kept]
        prompt, *told = to_host(wanted)
        described = []
        for i, (kind, name) in enumerate(names):
            sizes, sides, left = (tensor.tolist() for tensor in told[3 * i : 3 * i + 3])
            if not sides and self._config.merge:
                sides = [self._config.merge] * len(sizes)
            if len(sides) != len(sizes) or any(side < 1 for side in sides):
                raise GridMismatch(
                    f"{name} describes {len(sizes)} media, {len(sides)} merge sizes are known; pass {kind}_merge_sizes"
                    " or name spatial_merge_size in the vision config"
                )
            modality = LABELS.index(kind)
            described.append(Grids(name, modality, tuple(map(tuple, sizes)), tuple(sides), left[0] if left else None))
        return prompt, described


def _input_ids(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    ids = kwargs.get("input_ids", args[0] if args else None)
    return ids if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point() else None


def _prompt_shape(ids: Tensor | None, kwargs: Mapping[str, Any]) -> tuple[int, int] | None:
    if ids is not None:
        return ids.shape[0], ids.shape[1]
    embeds = kwargs.get("inputs_embeds")
    if isinstance(embeds, Tensor) and embeds.dim() == 3:
        return embeds.shape[0], embeds.shape[1]
    return None


def _check_given(batch: int, tokens: int) -> None:
    misfit = record.given_misfit(batch, tokens)
    if misfit:
        raise MMIError(f"strict: modality ids given by hand: {misfit}; give one id per token of this prompt")


def _token_types(name: str, shape: tuple[int, int], kwargs: Mapping[str, Any]) -> tuple[Record | None, str]:
    """A record of ready-made modality ids, or None and what is wrong with them."""
    types = kwargs.get(name)
    if not isinstance(types, Tensor) or types.shape != shape:
        return None, ""
    if shape[1] > 1 and types.numel():
        try:
            record.check_range(name, *torch.stack(torch.aminmax(types)).tolist())
        except MMIError as error:
            return None, f"ignored: {error}"
    return Record(name, ids=types.to(torch.int8)), ""


def _cached_tokens(kwargs: Mapping[str, Any]) -> bool:
    """Does the prompt go on where a cache ends? A static cache may wait for the device to answer."""
    length = getattr(cached_prompt.cache_of(kwargs), "get_seq_length", None)
    return callable(length) and bool(length() > 0)


def _kept(kind: str, kwargs: Mapping[str, Any]) -> Tensor | None:
    """How many tokens are left where the model drops some, int64 ``[1]``."""
    mask = kwargs.get(f"{kind}_compression_mask")
    return mask.sum().view(1) if isinstance(mask, Tensor) else None


@dataclass(frozen=True)
class ConfigFacts:
    """What a transformers config says of visual tokens.

    Attributes:
        ids: label → the token id that stands for features of that kind.
        video: ids that open and close a video, between which image tokens are frames; None where there are none.
        merge: patches along each side of a token; None where the config does not say.
    """

    ids: Mapping[str, int]
    video: tuple[int, int] | None
    merge: int | None

    @classmethod
    def of(cls, config: Any) -> ConfigFacts:
        brackets = (getattr(config, "video_start_token_id", None), getattr(config, "video_end_token_id", None))
        merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", None)
        return cls(
            ids=token_ids(config),
            video=(brackets[0], brackets[1]) if isinstance(brackets[0], int) and isinstance(brackets[1], int) else None,
            merge=merge if isinstance(merge, int) else None,
        )

    def read(self, ids: Tensor) -> Record:
        """The record of a prompt of token ids ``[B, S]``."""
        merged = torch.zeros(ids.shape, dtype=torch.int8, device=ids.device)
        for label, token in self.ids.items():
            merged = merged.masked_fill(ids == token, LABELS.index(label))
        source = _FROM_IDS
        if self.video is not None:
            opened, closed = ((ids == token).cumsum(1) for token in self.video)
            merged = torch.where((merged == LABELS.index("image")) & (opened > closed), LABELS.index("video"), merged)
        elif "image" in self.ids and len(set(self._visual())) < 2:
            source += f" ({record.IMAGE_ONLY})"
        return Record(source, ids=merged.to(torch.int8))

    def _visual(self) -> Sequence[int]:
        return [token for label, token in self.ids.items() if label in ("image", "video")]


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
