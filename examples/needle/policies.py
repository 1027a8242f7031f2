"""What an experiment compares, written as short words: ``adaptive:0.9``, ``tri_shape:16,512,128``, ``config.json``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import mmi_compile
from mmi_compile.head_config import Fingerprint, HeadConfig, HeadEntry
from mmi_compile.kernels.frames import TileShape
from mmi_compile.kernels.patterns import AShape, Grid, Pattern, TriShape, VerticalSlash

PATTERNS: dict[str, Callable[..., Pattern]] = {kind.name: kind for kind in (AShape, TriShape, VerticalSlash, Grid)}
FORMS = (
    "dense (not compiled), exact, adaptive, adaptive:RECALL, adaptive:RECALL,MIN_RECALL, a_shape:SINK,LOCAL,"
    " tri_shape:SINK,LOCAL,LAST, vertical_slash:COLUMNS,DIAGONALS, grid:STRIDE,SINK,LOCAL, or the path of a head config"
)


@dataclass(frozen=True)
class Policy:
    """One way to run the model.

    Attributes:
        text: as it was written.
        name: ``dense``, ``exact``, ``adaptive``, or ``config``.
        recall: target of ``adaptive``, or None for the default; min_recall: of its guard, or None for none.
        pattern: of all heads, for ``config``; else ``path`` is that of a head config, or ``config`` is one.
        dense_tail: the last rows keep every key. boundaries: what ``adaptive`` may choose among.
    """

    text: str
    name: str
    recall: float | None = None
    pattern: Pattern | None = None
    path: str | None = None
    min_recall: float | None = None
    config: HeadConfig | None = None
    dense_tail: bool = True
    boundaries: tuple[str, ...] = ("none",)

    def options(self, model: Any) -> dict[str, Any]:
        """Options of ``mmi_compile.compile``. ``min_tokens`` is 0: short prompts are to be sparse as well."""
        options: dict[str, Any] = {"policy": self.name, "inner": "eager", "min_tokens": 0, "strict": True}
        options["dense_tail"] = self.dense_tail
        if self.name == "adaptive":
            options["boundaries"] = self.boundaries
        if self.recall is not None:
            options["recall"] = self.recall
        if self.min_recall is not None:
            options["min_recall"] = self.min_recall
        if self.pattern is not None:
            options["head_config"] = uniform(self.pattern, model)
        elif self.config is not None or self.path is not None:
            options["head_config"] = self.config or self.path
        return options


def parse_policy(text: str) -> Policy:
    """The policy that ``text`` names.

    Raises:
        ValueError: none of the forms, which the message lists.
    """
    name, _, sizes = text.partition(":")
    if name in ("dense", "exact") and not sizes:
        return Policy(text, name)
    if text.endswith(".json"):
        return Policy(text, "config", path=text)
    try:
        if name == "adaptive":
            shares = [float(share) for share in sizes.split(",")] if sizes else []
            if len(shares) > 2:
                raise ValueError("it takes a recall and a min_recall")
            return Policy(text, name, *shares[:1], min_recall=shares[1] if len(shares) == 2 else None)
        if name in PATTERNS:
            return Policy(text, "config", pattern=PATTERNS[name](*(int(size) for size in sizes.split(","))))
    except (TypeError, ValueError) as error:
        raise ValueError(f"policy {text!r}: {error}; give {FORMS}") from None
    raise ValueError(f"unknown policy {text!r}; give {FORMS}")


def uniform(pattern: Pattern, model: Any) -> HeadConfig:
    """A head config in which all heads of a transformers model have one pattern."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    fingerprint = Fingerprint(
        layers=config.num_hidden_layers, q_heads=heads, kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )  # fmt: skip
    return HeadConfig(fingerprint, ((HeadEntry(pattern),) * heads,) * config.num_hidden_layers)


class Runner:
    """A model under one policy, and what its attention computed.

    Attributes:
        model: what to call. Densities are those of its latest call.
    """

    def __init__(self, model: Any, known: set[int]) -> None:
        self.model, self._known = model, known

    def densities(self) -> list[list[float]]:
        """Pairs computed ÷ pairs of causal attention, of every layer and head; empty for a model that is not compiled.

        Raises:
            RuntimeError: some attention of the language model did not run rewritten.
        """
        sites = [site for graph in _graphs() if id(graph) not in self._known for site in graph.sites]
        runs = [site.to_json()["run"] for site in sites]
        if None in runs:
            raise RuntimeError("an attention was compiled and did not run rewritten; print mmi_compile.last_report()")
        return [run["density_per_head"] for run in runs if run is not None]

    def density(self) -> float:
        """The mean over layers and heads; 1 for a model that is not compiled."""
        heads = [density for layer in self.densities() for density in layer]
        return sum(heads) / len(heads) if heads else 1.0


@contextmanager
def running(model: Any, policy: Policy) -> Iterator[Runner]:
    """A copy of ``model`` compiled for ``policy``; the model itself stays as it is.

    Raises:
        mmi_compile.OptionError: this version of mmi_compile does not know the policy.
    """
    if policy.name == "dense":
        yield Runner(model, {id(graph) for graph in _graphs()})
        return
    torch.compiler.reset()  # policies share code objects, and Dynamo compiles one only so often
    known = {id(graph) for graph in _graphs()}
    yield Runner(mmi_compile.compile(copy.deepcopy(model), **policy.options(model)), known)


def parse_tiles(text: str) -> TileShape | None:
    """Query rows and keys of a tile, such as ``32,32``; None for an empty text.

    Raises:
        ValueError: not two whole numbers.
    """
    sizes = text.split(",")
    if text and (len(sizes) != 2 or not all(size.strip().isdecimal() for size in sizes)):
        raise ValueError(f"tiles are {text!r}; give two powers of two, such as 32,32")
    return TileShape(int(sizes[0]), int(sizes[1])) if text else None


def _graphs() -> list[Any]:
    report = mmi_compile.last_report()
    return [] if report is None else list(report.graphs)
