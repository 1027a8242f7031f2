"""Head configs from other projects: MInference's lists of best patterns, and Qwen's ``sparse_attention_config``.

Errors name the place in their files, as those of :mod:`mmi_compile.head_config` do.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mmi_compile._suggest import did_you_mean
from mmi_compile.head_config import Fingerprint, HeadConfig, HeadEntry, Provenance
from mmi_compile.head_config_checks import (
    checked_int,
    checked_number,
    checked_text,
    from_file,
    read_json,
    refuse,
    spelled_number,
    under,
)
from mmi_compile.kernels.patterns import AShape, BlockTopK, Pattern, VerticalSlash, shown

_NO_SIZES = ("flex_vertical_and_slash",)
_FOREIGN = ("vertical_and_slash", "stream_llm", "block_sparse")


def from_minference(
    data: str | os.PathLike[str] | Sequence[Any],
    *,
    kv_heads: int,
    head_dim: int,
    hidden_size: int | None = None,
    model_type: str | None = None,
) -> HeadConfig:
    """MInference's best patterns: for each layer, ``{"0": [pattern, number, number, score], ...}``.

    ``vertical_and_slash`` becomes ``vertical_slash`` (at least 30 columns and 50 diagonals, as its kernel takes
    them), ``stream_llm`` becomes ``a_shape``, and ``block_sparse`` becomes ``block_topk`` of 100 blocks, a number
    that its kernel has fixed.

    What is lost: its probe always keeps 30 first columns and the 100 nearest diagonals, while ours keeps a share of
    the counts; its blocks have 64 keys, ours as many as the kernel's tiles, so that ``block_topk`` keeps as much or
    up to twice as much, and a window beside it; ``starting_layer`` (dense layers at the bottom) is not in the file.
    Scores are kept as they are: in some files they are recalls, in others counts.

    Args:
        data: the list of layers, or the path of the JSON file.
        kv_heads, head_dim, hidden_size, model_type: of the model, which the file does not say.

    Raises:
        HeadConfigError: the data has another form, a layer lacks heads, or a pattern has no fixed sizes, such as
            ``flex_vertical_and_slash``.
    """
    with from_file(data):
        read = read_json(data) if isinstance(data, str | os.PathLike) else data
        layers = _foreign_layers(read, "", extra_columns=0)
        heads = len(layers[0])
        fingerprint = Fingerprint(len(layers), heads, kv_heads, head_dim, hidden_size, model_type)
        return HeadConfig(fingerprint, layers, provenance=Provenance(source="MInference"))


def from_qwen_sparse_attention_config(
    data: str | os.PathLike[str] | Mapping[str, Any] | Sequence[Any],
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    hidden_size: int | None = None,
    model_type: str | None = None,
) -> HeadConfig:
    """The ``sparse_attention_config`` of Qwen's one-million-token models, as vLLM's dual chunk attention reads it.

    All heads are ``vertical_and_slash``, which becomes ``vertical_slash``; where the file says 30 columns, vLLM
    takes 130, and so does this.

    What is lost: dual chunk attention itself, which changes positions and estimates lines chunk by chunk;
    ``sparse_attention_threshold`` (dense up to 32768 tokens: set the option ``min_tokens``),
    ``sparse_attention_last_q`` and ``sparse_attention_enabled``.

    Args:
        data: the layers (a list, or an object by layer number), a ``dual_chunk_attention_config`` or a whole
            ``config.json`` that holds them, or the path of one of these.
        kv_heads, head_dim, hidden_size, model_type: of the model; a whole ``config.json`` says them itself.

    Raises:
        HeadConfigError: the data has another form or other patterns, or contradicts an argument.
    """
    with from_file(data):
        read = read_json(data) if isinstance(data, str | os.PathLike) else data
        facts = _qwen_facts(read)
        given = {"kv_heads": kv_heads, "head_dim": head_dim, "hidden_size": hidden_size, "model_type": model_type}
        for name, value in given.items():
            if value is not None and facts.setdefault(name, value) != value:
                refuse("", f"says that {name} is {shown(facts[name])}, but the argument is {shown(value)}")
        for name in ("kv_heads", "head_dim"):
            if name not in facts:
                refuse("", f"does not say {name}; give it as an argument")
        layers = _foreign_layers(*_qwen_layers(read), extra_columns=100)
        fingerprint = Fingerprint(**{"layers": len(layers), "q_heads": len(layers[0]), **facts})
        return HeadConfig(fingerprint, layers, provenance=Provenance(source="Qwen sparse_attention_config"))


def _foreign_layers(data: object, place: str, extra_columns: int) -> tuple[tuple[HeadEntry, ...], ...]:
    layers: list[tuple[HeadEntry, ...]] = []
    for where, layer in _in_order(data, place, "layers"):
        heads = []
        for at, head in _in_order(layer, where, "heads"):
            with under(at):
                heads.append(_foreign_entry(head, extra_columns))
        if layers and len(heads) != len(layers[0]):
            refuse(where, f"holds {len(heads)} heads, but the layers before hold {len(layers[0])}")
        layers.append(tuple(heads))
    return tuple(layers)


def _in_order(data: object, place: str, what: str) -> list[tuple[str, Any]]:
    """Places and items of a list, or of an object whose keys are the numbers 0 … n - 1."""
    if isinstance(data, list | tuple) and data:
        return [(f"{place}[{number}]", item) for number, item in enumerate(data)]
    if not isinstance(data, Mapping) or not data:
        refuse(place, f"must be {what} as a list or by number, is {shown(data)}")
    found: dict[int, tuple[str, Any]] = {}
    for key, item in data.items():
        number = spelled_number(str(key))
        if number is None:
            refuse(place, f"must be {what} by number, has the key {shown(key)}")
        found[number] = (f"{place}[{number}]", item)
    missing = next((number for number in range(len(data)) if number not in found), None)
    if missing is not None:
        refuse(place, f"holds {len(data)} {what} without number {missing}; numbers must run from 0 without gaps")
    return [found[number] for number in range(len(data))]


def _foreign_entry(data: object, extra_columns: int) -> HeadEntry:
    """``[pattern, number, number, score]``; ``extra_columns`` are added where there are just 30, as vLLM does."""
    if not isinstance(data, list | tuple) or len(data) != 4:
        refuse("", f"must be [pattern, number, number, score], is {shown(data)}")
    name, first, second, score = data
    if name in _NO_SIZES:
        mend = 'use policy="adaptive" with that recall'
        refuse("[0]", f'"{name}" has no sizes: it is estimated for each prompt to reach a recall; {mend}')
    if not isinstance(name, str) or name not in _FOREIGN or (extra_columns and name != "vertical_and_slash"):
        known = _FOREIGN[:1] if extra_columns else _FOREIGN
        refuse("[0]", f"unknown pattern {shown(name)}{did_you_mean(str(name), known)}")
    for place, value in (("[1]", first), ("[2]", second)):
        if name != "block_sparse":  # its numbers are not used
            checked_int(value, place, 0)
    return HeadEntry(_foreign_pattern(name, first, second, extra_columns), score=checked_number(score, "[3]"))


def _foreign_pattern(name: str, first: int, second: int, extra_columns: int) -> Pattern:
    if name == "stream_llm":
        return AShape(first, max(1, second))
    if name == "block_sparse":
        return BlockTopK(k=100)
    columns = first + extra_columns if first == 30 else max(first, 30)
    return VerticalSlash(columns, max(second, 50))


def _qwen_layers(data: object) -> tuple[object, str]:
    """The layers, and where in the data they are."""
    place: list[str] = []
    for key in ("dual_chunk_attention_config", "sparse_attention_config"):
        if isinstance(data, Mapping) and key in data:
            data, place = data[key], [*place, key]
    if isinstance(data, Mapping) and data and all(spelled_number(str(key)) is None for key in data):
        mend = "give sparse_attention_config.json, which lies beside config.json"
        refuse(".".join(place), f"holds no sparse_attention_config; {mend}")
    return data, ".".join(place)


def _qwen_facts(data: object) -> dict[str, Any]:
    """What a whole ``config.json`` says of the model."""
    if not isinstance(data, Mapping) or "num_attention_heads" not in data:
        return {}
    names = {
        "layers": "num_hidden_layers", "q_heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim", "hidden_size": "hidden_size", "model_type": "model_type",
    }  # fmt: skip
    facts = {name: data[key] for name, key in names.items() if data.get(key) is not None}
    for name, value in facts.items():
        (checked_text(value, names[name]) if name == "model_type" else checked_int(value, names[name], 1))
    facts.setdefault("kv_heads", facts["q_heads"])
    if "hidden_size" in facts:
        facts.setdefault("head_dim", facts["hidden_size"] // facts["q_heads"])
    return facts
