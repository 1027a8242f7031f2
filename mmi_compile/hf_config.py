"""A model and a prompt from a Hugging Face config alone: no weights, few layers, the config's own attention.

    {"model_type": "qwen2_5_vl", "text_config": {"num_hidden_layers": 28, …}, …}
        → Qwen2_5_VLForConditionalGeneration with 2 of 28 layers and random weights, and an image prompt that it runs on

Numbers of heads, head dims, widths of hidden states, kinds of masks, token ids and dtype are those of the config, so
that what is explained is true of the model. What costs memory and no attention ever sees is shrunk, and named.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmi_compile._suggest import nearest
from mmi_compile.config_prompts import Prompt, prompts
from mmi_compile.decision import MMIError

_FIRST_LAYERS = 2
_WIDTHS = {"moe": 16, "": 128}
"""Neurons of MLPs: of experts, of which a layer may have hundreds, and of all others."""

_NARROW_HEAD = 64
_MANY_TOKENS = 8192
MAX_GIB = 12.0

_COUNTS = (
    "num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers", "num_global_layers",
)  # fmt: skip
"""What configs call their numbers of layers."""

_MLPS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "ffn_size", "mlp_dim", "n_inner", "d_ff")
"""What names of the width of an MLP hold."""

_AUTO = (
    "AutoModelForImageTextToText", "AutoModelForSpeechSeq2Seq", "AutoModelForSeq2SeqLM", "AutoModelForMultimodalLM",
    "AutoModelForCausalLM", "AutoModel",
)  # fmt: skip

Config = Any
"""A config of transformers, which is imported lazily."""


class ConfigFileError(MMIError):
    """A config from which no model can be built and run; the message is one sentence.

    Attributes:
        usage: whether what was given is no config at all, rather than one that cannot be served.
    """

    def __init__(self, message: str, *, usage: bool = False) -> None:
        super().__init__(message)
        self.usage = usage


@dataclass(frozen=True)
class Sample:
    """A model made from a config, in evaluation mode on the CPU, and the arguments of a forward that works.

    Attributes:
        subject: what it is, in words: the file, the class and the prompt.
        shrunk: what is smaller than in the config, such as ``"num_hidden_layers 28 → 2"``.
    """

    model: nn.Module
    inputs: dict[str, Any]
    subject: str
    shrunk: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.subject}; shrunk: {', '.join(self.shrunk)}" if self.shrunk else self.subject


def is_config(place: str | Path) -> bool:
    """Whether ``place`` names a JSON file or a folder, rather than a script."""
    path = Path(place)
    return path.suffix == ".json" or path.is_dir()


def sample(place: str | Path, tokens: int = 512) -> Sample:
    """A model with the config in ``place`` and a prompt for it; the same config always gives the same.

    Args:
        place: a config file, or a folder with ``config.json`` as Hugging Face models have.
        tokens: least length of the prompt. It is longer where an image needs more room, or to show a sliding window of
            at most 4096 tokens, and not longer than the config's ``max_position_embeddings`` unless an image is.

    Raises:
        ConfigFileError: no such file, no config, an unknown model type, or one of which no model could be built and
            run. The global random state is left alone.
    """
    path = _file(Path(place))
    data = _read(path)
    with _quiet(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        config = _config(data, path)
        problems: list[Exception] = []
        for widths in (True, False):  # some families tie the width of an MLP to other sizes
            smaller, shrunk = _shrunk(config, widths)
            try:
                model, more = _built(smaller, path)
                prompt = _first_that_runs(model, smaller, tokens)
            except ConfigFileError:
                if problems:
                    break
                raise
            except Exception as error:  # whatever the model's code does with such a config
                problems.append(error)
                continue
            name = f"{path}: {type(model).__name__} ({config.model_type}), random weights, {prompt.what}"
            return Sample(model, prompt.inputs, name, (*shrunk, *more))
    problem = f"{type(problems[-1]).__name__}: {str(problems[-1]).strip().partition(chr(10))[0]}"
    raise ConfigFileError(f"{path}: no model of type {config.model_type!r} could be built and run from it ({problem})")


# --- reading ---------------------------------------------------------------------------------------------------------


def _file(place: Path) -> Path:
    if not place.is_dir():
        return place
    path = place / "config.json"
    if not path.is_file():
        raise ConfigFileError(f"{place}: holds no config.json; give the folder of a Hugging Face model", usage=True)
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigFileError(f"{path}: there is no such file; give a Hugging Face config.json", usage=True) from None
    except OSError as error:
        raise ConfigFileError(f"{path}: cannot be read: {error.strerror}", usage=True) from None
    except (ValueError, RecursionError) as error:
        raise ConfigFileError(f"{path}: is no JSON ({error}); give a Hugging Face config.json", usage=True) from None
    if isinstance(data, dict) and ({"fingerprint", "layers"} <= data.keys() or {"schema", "graphs"} <= data.keys()):
        raise ConfigFileError(f"{path}: is no model's config; `mmi show` shows head configs and reports", usage=True)
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise ConfigFileError(f"{path}: names no model_type, so it is no config of a Hugging Face model", usage=True)
    return data


def _config(data: Mapping[str, Any], path: Path) -> Config:
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError:
        raise ConfigFileError(f"{path}: needs transformers: pip install 'mmi-compile[models]'") from None
    kind = data["model_type"]
    if kind not in CONFIG_MAPPING:
        best = nearest(kind, CONFIG_MAPPING.keys())
        meant = f'; did you mean "{best}"?' if best else "; explain a script that builds the model instead"
        raise ConfigFileError(f"{path}: transformers has no model_type {kind!r}{meant}")
    # Weights are neither quantized nor on a GPU here, whatever kernels the model was saved with.
    left_out = ("quantization_config", "attn_implementation", "_attn_implementation")
    try:
        return CONFIG_MAPPING[kind].from_dict({name: value for name, value in data.items() if name not in left_out})
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise ConfigFileError(
            f"{path}: is no valid config of type {kind!r} ({type(error).__name__}: {first})"
        ) from None


# --- shrinking -------------------------------------------------------------------------------------------------------


def kept_layers(count: int, kinds: Sequence[object]) -> list[int]:
    """Which of ``count`` layers to build: the first ones, and the first of every kind.

    Args:
        kinds: of each layer, whatever is told apart; empty where all are alike.
    """
    first = {kind: layer for layer, kind in reversed(list(enumerate(kinds)))}
    return sorted({*range(min(_FIRST_LAYERS, count)), *first.values()})


def _shrunk(config: Config, widths: bool) -> tuple[Config, list[str]]:
    """A copy with fewer layers and, where asked for, narrower MLPs; and what was changed, in words."""
    config = copy.deepcopy(config)
    told: list[str] = []
    for prefix, part in _parts(config):
        told += [prefix + change for change in _cut_layers(part, _layers_asked_for(config, prefix))]
        if widths and "vision" not in prefix:  # towers are small, and some tie this width to that of their features
            told += [prefix + change for change in _narrow(part)]
    return config, told


def _parts(config: Config, prefix: str = "") -> Iterator[tuple[str, Config]]:
    """The config and those inside it, with a prefix for their names."""
    from transformers import PretrainedConfig

    yield prefix, config
    for name, value in sorted(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            yield from _parts(value, f"{prefix}{name}.")


def _layers_asked_for(config: Config, prefix: str) -> int:
    """How many layers a vision tower needs for features of a certain layer, which may count from the end."""
    if "vision" not in prefix:
        return 0
    named = getattr(config, "vision_feature_layer", None)
    layers = [layer for layer in (named if isinstance(named, list | tuple) else [named]) if isinstance(layer, int)]
    return max((-layer if layer < 0 else layer + 1 for layer in layers), default=0)


def _cut_layers(config: Config, least: int) -> Iterator[str]:
    own = vars(config)
    names = [config.attribute_map.get(name, name) for name in _COUNTS]
    counts = {name: own[name] for name in dict.fromkeys(names) if isinstance(own.get(name), int)}
    for count in sorted(set(counts.values())):
        chosen = _chosen(config, count, least)
        if len(chosen) >= count:
            continue
        _keep_in_lists(config, count, chosen)
        shared = own.get("num_kv_shared_layers")
        if isinstance(shared, int):  # they are the last ones
            config.num_kv_shared_layers = sum(layer >= count - shared for layer in chosen)
        for name in (name for name, value in counts.items() if value == count):
            setattr(config, name, len(chosen))
            which = "" if chosen == list(range(len(chosen))) else f" (layers {', '.join(map(str, chosen))})"
            yield f"{name} {count} → {len(chosen)}{which}"


def _chosen(config: Config, count: int, least: int) -> list[int]:
    flags: list[Sequence[object]] = [value for _, value in _per_layer(config, count)]
    flags += [[layer in value for layer in range(count)] for _, value in _indices(config, count)]
    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    flags.append([layer >= count - shared for layer in range(count)])
    computed = getattr(config, "layers_block_type", None) if "layers_block_type" not in vars(config) else None
    if isinstance(computed, list) and len(computed) == count:  # from the layer's number, so none may be left out
        return list(range(kept_layers(count, computed)[-1] + 1))
    chosen = kept_layers(count, list(zip(*map(partial(map, repr), flags), strict=True)))
    return chosen if len(chosen) >= least else sorted({*chosen, *range(min(least, count))})


def _per_layer(config: Config, count: int) -> list[tuple[str, Sequence[Any]]]:
    """Lists with something for each layer."""
    lists = [(name, value) for name, value in vars(config).items() if isinstance(value, list | tuple)]
    found = [(name, value) for name, value in lists if not any(word in name for word in ("token", "image_", "archit"))]
    return [(name, value) for name, value in found if len(value) == count and not _is_indices(value, count)]


def _indices(config: Config, count: int) -> list[tuple[str, Sequence[int]]]:
    """Lists of the numbers of some layers."""
    words = ("layer", "index", "indices", "ids")
    return [
        (name, value)
        for name, value in vars(config).items()
        if isinstance(value, list | tuple) and _is_indices(value, count)
        if any(word in name for word in words) and name != "vision_feature_layer"
    ]


def _is_indices(value: Sequence[Any], count: int) -> bool:
    if not value or not all(type(x) is int and 0 <= x < count for x in value):
        return False
    return len(set(value)) == len(value) and list(value) == sorted(value)


def _keep_in_lists(config: Config, count: int, chosen: Sequence[int]) -> None:
    for name, value in _per_layer(config, count):
        setattr(config, name, [value[layer] for layer in chosen])
    for name, value in _indices(config, count):
        setattr(config, name, [new for new, layer in enumerate(chosen) if layer in value])


def _narrow(config: Config) -> Iterator[str]:
    """Narrower MLPs: no attention sees how wide they are inside."""
    for name, value in list(vars(config).items()):
        if not any(word in name for word in _MLPS):
            continue
        width = _WIDTHS["moe" if "moe" in name or "expert" in name else ""]
        if type(value) is int and value > width:
            setattr(config, name, width)
            yield f"{name} {value} → {width}"
        elif isinstance(value, list) and value and all(type(x) is int and x > width for x in value):
            setattr(config, name, [width] * len(value))
            yield f"{name} {max(value)} → {width}"


# --- building --------------------------------------------------------------------------------------------------------


def _built(config: Config, path: Path) -> tuple[nn.Module, list[str]]:
    kind = _class(config, path)
    dtype = config.dtype or getattr(config.get_text_config(), "dtype", None)
    make = partial(kind._from_config, config, **({} if dtype is None else {"dtype": dtype}))
    vocabularies = {size for _, part in _parts(config) for size in _vocabularies(part)}
    with torch.device("meta"):
        sizes = [p.nbytes for p in make().parameters() if not {*p.shape[:1]} & vocabularies]
    gib = sum(sizes) / 2**30
    if gib > MAX_GIB:
        raise ConfigFileError(f"{path}: {config.model_type} takes {gib:.0f} GiB even with few layers; explain a script")
    with _RowsToCome(vocabularies):
        model: nn.Module = make().eval().requires_grad_(False)
    return model, [*_narrow_head(model), *_share_rows(model)]


def _class(config: Config, path: Path) -> Any:
    """The class that the config names, else the one that transformers' Auto classes choose for it."""
    import transformers

    autos = [getattr(transformers, name) for name in _AUTO if hasattr(transformers, name)]
    found = [auto._model_mapping[type(config)] for auto in autos if type(config) in auto._model_mapping]
    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    known = [kind for kind in named if getattr(kind, "config_class", None) is type(config)]
    chosen = [*known, *found]
    if not chosen:
        raise ConfigFileError(f"{path}: transformers has a config and no model for {config.model_type!r}")
    return chosen[0][0] if isinstance(chosen[0], tuple) else chosen[0]


def _vocabularies(config: Config) -> Iterator[int]:
    """Numbers of tokens that are worth saving memory for."""
    for name, value in vars(config).items():
        if "vocab_size" in name and isinstance(value, int) and value >= _MANY_TOKENS:
            yield value


class _RowsToCome(TorchFunctionMode):
    """Makes matrices with a row for each token of a vocabulary without memory, on the device ``meta``."""

    def __init__(self, vocabularies: set[int]) -> None:
        super().__init__()
        self.vocabularies = vocabularies

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and args:
            sizes = tuple(args[0]) if isinstance(args[0], list | tuple) else args
            if len(sizes) == 2 and sizes[0] in self.vocabularies:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _narrow_head(model: nn.Module) -> list[str]:
    """A small output layer instead of that of the vocabulary."""
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
        if not isinstance(head, nn.Linear) or not head.weight.is_meta:
            return []
        bias = head.bias is not None
        narrow = nn.Linear(head.in_features, _NARROW_HEAD, bias, dtype=head.weight.dtype).requires_grad_(False)
        model.set_output_embeddings(narrow)  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return []
    return [f"output layer of {head.out_features} tokens → {_NARROW_HEAD}"]


def _share_rows(model: nn.Module) -> list[str]:
    """Gives vocabularies their weights: each row is the last one, moved by an element."""
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None and weight.is_meta:
                if weight not in made:
                    numbers = 0.02 * torch.randn(sum(weight.shape) - 1, dtype=weight.dtype)
                    made[weight] = nn.Parameter(numbers.as_strided(weight.shape, (1, 1)), requires_grad=False)
                module._parameters[name] = made[weight]
    return [f"embeddings of {weight.shape[0]} tokens share their memory" for weight in made.values()]


def _first_that_runs(model: nn.Module, config: Config, tokens: int) -> Prompt:
    """The first prompt that the model runs on; raises what it raised on the last one."""
    problem: Exception = ValueError("no prompt for these inputs is known")
    for prompt in prompts(model, config, tokens):
        try:
            model(**prompt.inputs)
        except Exception as error:  # whatever the model's code does with such a prompt
            problem = error
        else:
            return prompt
    raise problem


class _quiet:
    """Hides what transformers logs about models that nobody asked for."""

    def __enter__(self) -> None:
        try:
            from transformers.utils import logging
        except ImportError:
            return
        self.level = logging.get_verbosity()
        logging.set_verbosity_error()

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "level"):
            from transformers.utils import logging

            logging.set_verbosity(self.level)
