"""``mmi_compile.search``: from a model and a few prompts to a :class:`~mmi_compile.head_config.HeadConfig`.

The model runs through the same graphs as under ``policy="exact"``; whatever attention was rewritten there shows its q,
k and v before it is computed, and is searched on the spot (``head_search.py``). So no model class needs to be known,
and one layer is in memory at a time. What has been measured goes to a file after every layer, if a path is given, and a
search that was interrupted goes on from there; another budget needs no new measurement of heads. What their errors
do to the output is then seen in forwards in which some attentions are sparse (``output_error.py``).
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from mmi_compile import record, runtime
from mmi_compile.backend import compile_graph
from mmi_compile.cost_file import cost_model, tile_counts
from mmi_compile.decision import NO_PREFILL, Reason
from mmi_compile.environment import versions
from mmi_compile.frontend import for_once
from mmi_compile.head_choice import Choice, LayerResult, Mode, Scored, choose, choose_uniform
from mmi_compile.head_config import Fingerprint, HeadConfig, HeadEntry, Provenance
from mmi_compile.head_measure import HeadSearchError, LayerInput, Measuring, Rows, run_heads
from mmi_compile.head_search import BOUNDARIES, Candidates, Merge, Searcher, Survey, pack, unpack
from mmi_compile.kernels.patterns import Dense
from mmi_compile.options import Options
from mmi_compile.output_error import Heads, OutputError, Shown, Weigh, best, weighed
from mmi_compile.prompt_hook import PromptHook
from mmi_compile.record import LABELS
from mmi_compile.report import GraphReport
from mmi_compile.runtime import AttentionCall
from mmi_compile.search_store import SearchStore
from mmi_compile.visual_segments import VisualSegment

Unit: TypeAlias = Literal["time", "tiles"]

_WORDS = {
    "mode": ("share", "equal"), "unit": ("time", "tiles"), "rows": ("all", "last", "both"), "merge": ("mean", "max"),
    "weigh": ("equal", "layers", "heads"),
}  # fmt: skip

ROWS_AT_MOST = {"cuda": 32768, "cpu": 1024}
"""Query rows that candidates are run on, by device."""


def search(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    budget: float = 0.12,
    mode: Mode = "share",
    unit: Unit = "time",
    candidates: Candidates | None = None,
    boundaries: Sequence[str] = BOUNDARIES,
    strides: Sequence[int] | None = None,
    rows: Rows = "both",
    merge: Merge = "mean",
    weigh: Weigh = "layers",
    rows_at_most: int | None = None,
    dense_tail: bool = True,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> HeadConfig:
    """Choose a boundary and patterns for every query head (MMInference, section 3.4).

    Args:
        model: any module with attention that ``policy="exact"`` would rewrite. It is left as it was.
        inputs: keyword arguments of its forward, or a list of them: calibration prompts, best as long as the prompts
            to come and of their kind. The first one decides which sizes of patterns are tried.
        budget: share of dense attention's cost that all heads may take together.
        unit: of cost: kernel ``"time"`` as the cost model predicts it, or ``"tiles"``, so that the budget is a density.
        mode: ``"share"`` spends the budget where it lowers the error most; ``"equal"`` gives each head as much.
        candidates: what to try; None for a ladder of sizes of every pattern.
        boundaries: which of ``none``, ``q`` and ``2d`` the ladder may use.
        strides: of grids, in tokens; None for those of the prompt's images and videos, where their grids are known.
        rows: ``"all"`` rows count alike, or only the ``"last"`` ones of a prompt, or ``"both"`` in equal parts.
        merge: the error of several prompts is their ``"mean"`` or their ``"max"``.
        weigh: how much errors count. ``"layers"``: as much as the model's output changes when that layer alone is
            sparse, one more forward a layer and prompt, on two prompts at most. What the budget then gives, or the best
            single pattern for all heads, is taken if it changes the output less than what the budget gives where all
            layers count alike. ``"heads"``: the same with a forward for each head. ``"equal"``: all layers alike, no
            forwards. Output means logits, or else the first tensor ``[B, N, C]``; where a forward returns neither,
            layers count alike.
        rows_at_most: query rows that candidates are run on; None for a number that suits the device.
        dense_tail: plan as the option of that name makes plans at run time.
        resume: a file for what has been measured. If it exists, the search goes on from it. It stays when the search
            is done: with it, another budget or mode takes no more than the forwards of ``weigh``.
        progress: show a bar with the time left, on a terminal.

    Returns:
        The config. ``score`` of each entry is the relative error of that head's output on the calibration prompts.

    Raises:
        HeadSearchError: a prompt is too short, attention gives NaN, the budget cannot be met, no attention was found,
            or the file belongs to another search. Nothing is left half-written.
        ValueError: an argument is out of range.
    """
    prompts = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    _check(model, prompts, budget, {"mode": mode, "unit": unit, "rows": rows, "merge": merge, "weigh": weigh})
    settings = {
        "unit": unit,
        "rows": rows, "merge": merge, "rows_at_most": rows_at_most, "dense_tail": dense_tail,
        "strides": None if strides is None else list(strides), "boundaries": list(boundaries),
        "candidates": None if candidates is None else repr(candidates),
    }  # fmt: skip
    store = SearchStore.open(resume, _digest(model, prompts, settings))
    with _bar(progress) as on_layer, ExitStack() as stack:
        run = _Run(model, prompts, settings, candidates, store, on_layer, stack)
        run.measure()
        choice = run.choice(budget, mode, weigh)
    return run.config(choice, budget)


def _check(model: nn.Module, prompts: Sequence[Mapping[str, Any]], budget: float, words: Mapping[str, str]) -> None:
    if not prompts:
        raise ValueError("no calibration prompt; give the keyword arguments of the model's forward, or a list of them")
    for prompt in prompts:
        if not isinstance(prompt, Mapping) or not all(isinstance(name, str) for name in prompt):
            raise ValueError(f"a calibration prompt must be a dict of forward arguments, is {type(prompt).__name__}")
    if not 0 < budget <= 1:
        raise ValueError(
            f"budget is {budget}; give a share of dense attention's cost above 0 and up to 1, such as 0.12"
        )
    for name, value in words.items():
        if value not in _WORDS[name]:
            raise ValueError(f"{name} {value!r}: give one of {', '.join(_WORDS[name])}")
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")


# ---------------------------------------------------------------------------------------------------------------------
# Running the model


class _Enough(Exception):
    """Ends a forward whose first attention said all that was asked."""


@dataclass
class _Run:
    """One search in progress.

    Attributes:
        on_layer: told (done, total or None, words) before every layer.
        stack: closed when the model has run for the last time.
        labels: modality ids that are told apart, and what all prompts call them. passes: forwards that are done.
    """

    model: nn.Module
    prompts: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]
    candidates: Candidates | None
    store: SearchStore
    on_layer: Callable[[int, int | None, str], None]
    stack: ExitStack = field(default_factory=ExitStack)
    searcher: Searcher | None = None
    labels: tuple[int, ...] = ()
    names: dict[int, str] = field(default_factory=dict)
    passes: int = 0

    @cached_property
    def _observable(self) -> tuple[Forward, list[GraphReport]]:
        return self.stack.enter_context(_observable(self.model))

    def measure(self) -> None:
        """All forwards that are still needed."""
        store, alone = self.store, len(self.prompts) == 1
        if store.finished:
            return
        forward, graphs = self._observable
        if not alone:
            for prompt in self.prompts:
                forward(prompt, self._peek, may_stop=True)
        for number, prompt in enumerate(self.prompts):
            if not store.complete("survey", number):
                self._count(forward(prompt, self._on_each(number, prompt, self._survey)).attentions, number)
                store.left_out = left_alone(graphs)
                store.write()
            self.passes += 1
        if not alone:
            for number, prompt in enumerate(self.prompts):
                if not store.complete("combinations", number):
                    forward(prompt, self._on_each(number, prompt, self._combine))
                self.passes += 1
        store.finished = True
        store.write()

    def _count(self, attentions: int, number: int) -> None:
        if self.store.count not in (None, attentions):
            raise HeadSearchError(
                f"calibration prompt {number + 1} ran {attentions} attentions, and the ones before it"
                f" {self.store.count}; give prompts that all run through the same layers"
            )
        self.store.count = attentions

    def _peek(self, place: int, call: AttentionCall) -> None:
        self._meet(call)
        raise _Enough

    def _meet(self, call: AttentionCall) -> None:
        """Learn which modalities a prompt has; text (0) is always told apart."""
        if call.modality is None:
            return
        present = {int(x) for x in call.modality.unique().tolist()}
        self.labels = tuple(sorted({0, *self.labels, *present}))
        for label in self.labels:
            name = _name(label, call.names)
            if label in present and self.names.get(label, name) != name:
                raise HeadSearchError(
                    f"modality {label} is {self.names[label]!r} in one calibration prompt and {name!r} in another;"
                    " give prompts that number their modalities alike"
                )
            self.names.setdefault(label, name)

    def _on_each(
        self, number: int, prompt: Mapping[str, Any], work: Callable[[int, int, LayerInput, Searcher], None]
    ) -> Callable[[int, AttentionCall], None]:
        segments = _segments(self.model, prompt)

        def on_call(place: int, call: AttentionCall) -> None:
            if len(self.prompts) == 1 and place == 0:
                self._meet(call)
            if self.searcher is None:
                self.searcher = self._searcher(call, segments)
                self.store.agree(self.searcher, self.labels, self.names, call.q.device)
            self.store.note(place, call)
            alone = len(self.prompts) == 1
            what = "searching" if alone else f"prompt {number + 1} of {len(self.prompts)}"
            layers, passes = self.store.count or _layer_count(self.model), 1 if alone else 2 * len(self.prompts)
            done = place + (layers or 0) * self.passes
            self.on_layer(done, None if layers is None else layers * passes, what)
            x = LayerInput(call.q, call.k, call.v, call.geometry, call.scale, call.modality, self.labels)
            try:
                work(number, place, x, self.searcher)
            except HeadSearchError as error:
                layer = place if call.layer is None else call.layer
                raise HeadSearchError(f"layer {layer}: {error}") from None

        return on_call

    def _searcher(self, call: AttentionCall, segments: Sequence[VisualSegment]) -> Searcher:
        q, given = call.q, self.settings
        costs = (cost_model if given["unit"] == "time" else tile_counts)(q.device, q.dtype, q.shape[-1])
        candidates = self.candidates
        if candidates is None:
            strides, inside = _strides(segments) if given["strides"] is None else (given["strides"], given["strides"])
            candidates = Candidates.ladder(
                call.geometry.q_len, call.geometry.kv_len, costs.tiles, strides=strides, region_strides=inside,
                boundaries=given["boundaries"],
            )  # fmt: skip
        most = given["rows_at_most"] or ROWS_AT_MOST.get(q.device.type, 32768)
        how = Measuring(costs, given["rows"], most, given["dense_tail"])
        return Searcher(candidates, how, given["merge"])

    def _survey(self, number: int, place: int, x: LayerInput, searcher: Searcher) -> None:
        alone = len(self.prompts) == 1
        if self.store.has("survey", number, place) and (not alone or self.store.has("combinations", number, place)):
            return
        prompt = searcher.prompt(x)
        survey = searcher.survey_of(prompt)
        self.store.put("survey", number, place, survey.to_json())
        if alone:
            found = searcher.measure_combinations(prompt, searcher.combinations(survey, self.labels))
            self.store.put("combinations", number, place, pack(found))
        self.store.write()

    def _combine(self, number: int, place: int, x: LayerInput, searcher: Searcher) -> None:
        if self.store.has("combinations", number, place):
            return
        combinations = searcher.combinations(self._merged(place, searcher), self.labels)
        self.store.put("combinations", number, place, pack(searcher.measure_combinations(x, combinations)))
        self.store.write()

    def _merged(self, place: int, searcher: Searcher) -> Survey:
        surveys = [Survey.from_json(self.store.get("survey", n, place)) for n in range(len(self.prompts))]
        return searcher.merged(surveys)

    def results(self) -> list[LayerResult]:
        """The layers in the order in which they ran."""
        searcher = self.searcher or self.store.searcher()
        self.labels, self.names = self.store.modalities()
        found = []
        for place in range(self.store.count or 0):
            survey = self._merged(place, searcher)
            parts = [unpack(self.store.get("combinations", n, place)) for n in range(len(self.prompts))]
            measured = searcher.merged_combinations(parts)
            found.append(searcher.result(survey, searcher.combinations(survey, self.labels), measured, self.labels))
        return found

    def choice(self, budget: float, mode: Mode, weigh: Weigh) -> Choice:
        """What the heads run under a budget."""
        layers = self.results()
        alike = choose(layers, budget, mode=mode)
        if weigh == "equal":
            return alike
        store, most = self.store, self.settings["merge"] == "max"

        def keep(name: str, number: int, value: float) -> None:
            store.put(f"output {name}", number, 0, value)

        def known(name: str, number: int) -> float | None:
            kind = f"output {name}"
            return float(store.get(kind, number, 0)) if store.has(kind, number, 0) else None

        output = OutputError(self._run_under, len(self.prompts), known, keep)
        try:
            again = weighed(layers, budget, output, weigh)
            uniform = choose_uniform(self._uniform(), again, budget, mode=mode)
            choices = [alike, choose(again, budget, mode=mode), *([] if uniform is None else [uniform])]
            return best(choices, output, most=most)
        finally:
            store.write()

    def _uniform(self) -> list[list[list[Scored]]]:
        """Each plain candidate in all heads, ``[P][layers][heads]``."""
        searcher = self.searcher or self.store.searcher()
        by_layer = [searcher.uniform(self._merged(place, searcher)) for place in range(self.store.count or 0)]
        return [list(layers) for layers in zip(*by_layer, strict=True)]

    def _run_under(self, number: int, heads: Heads) -> Shown | None:
        """The output for a prompt where some attentions are sparse."""
        prompt, tail = self.prompts[number], self.settings["dense_tail"]

        def sparse(place: int, call: AttentionCall) -> Tensor | None:
            if place not in heads:
                return None
            x = LayerInput(call.q, call.k, call.v, call.geometry, call.scale, call.modality, self.labels)
            return run_heads(x, heads[place], dense_tail=tail)

        places = f"layer {min(heads) + 1} alone" if len(heads) == 1 else "the whole model"
        self.on_layer(min(heads, default=0), self.store.count, f"output, {places}")
        forward, _ = self._observable
        mask = prompt.get("attention_mask")
        shown = forward(prompt, sparse).output
        return Shown.of(shown, mask if isinstance(mask, Tensor) else None, self.settings["rows"])

    def config(self, choice: Choice, budget: float) -> HeadConfig:
        """The config of what was chosen."""
        facts = [self.store.facts[str(place)] for place in range(len(choice.heads))]
        shapes = {tuple(fact["shape"]) for fact in facts}
        if len(shapes) > 1:
            raise HeadSearchError(
                f"layers differ in (query heads, kv heads, head dim): {sorted(shapes)}; a head config has one shape for"
                " all of them"
            )
        q_heads, kv_heads, head_dim = shapes.pop()
        entries = [tuple(_entry(scored) for scored in heads) for heads in choice.heads]
        numbers = [fact["layer"] for fact in facts]
        if self.store.left_out and None not in numbers and numbers == sorted(set(numbers)):
            # Some layers' attention was left alone: their numbers count, and they are dense.
            dense = (HeadEntry(Dense()),) * q_heads
            by_number = dict(zip(numbers, entries, strict=True))
            entries = [by_number.get(n, dense) for n in range(numbers[-1] + 1)]
        provenance = Provenance(
            source="search", samples=len(self.prompts), tokens=max(fact["tokens"] for fact in facts), budget=budget,
            device=self.store.device, versions=versions(),
            date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        )  # fmt: skip
        names = self.names if len(self.labels) > 1 else {}
        return HeadConfig(Fingerprint(len(entries), q_heads, kv_heads, head_dim), tuple(entries), names, provenance)


def _entry(scored: Scored) -> HeadEntry:
    def short(value: float) -> float:
        return float(f"{value:.4g}")

    return HeadEntry(
        scored.pattern, score=short(scored.error), recall=short(scored.recall), density=short(scored.density)
    )


def _name(label: int, names: Mapping[int, str]) -> str:
    return names.get(label) or (LABELS[label] if label < len(LABELS) else f"modality {label}")


class Ran(NamedTuple):
    """How many attentions a forward had, and what it returned; None where it was stopped."""

    attentions: int
    output: Any


Forward: TypeAlias = Callable[..., Ran]


@contextmanager
def _observable(model: nn.Module) -> Iterator[tuple[Forward, list[GraphReport]]]:
    """A function ``forward(prompt, on_call, may_stop=False)`` that runs the model once and shows ``on_call`` each
    attention with its place in the forward; what ``on_call`` returns, if anything, is the attention's output. And the
    graphs so far. The model is compiled apart from whatever the user has compiled.

    ``forward`` raises HeadSearchError where no attention could be shown, and says why.
    """
    graphs: list[GraphReport] = []
    options = Options.from_mapping({"policy": "exact", "inner": "eager"})

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        return compile_graph(gm, example_inputs, options, None, graphs.append)

    with torch.no_grad(), for_once(model, backend) as compiled:

        def forward(
            prompt: Mapping[str, Any], on_call: Callable[[int, AttentionCall], Tensor | None], *, may_stop: bool = False
        ) -> Ran:
            seen, output = 0, None

            def observe(call: AttentionCall) -> Tensor | None:
                nonlocal seen
                seen += 1
                return on_call(seen - 1, call)

            known = PromptHook(model).read((), prompt)
            try:
                with record.hooked(known), runtime.observing_attention(observe):
                    output = compiled(**prompt)
            except _Enough:
                if not may_stop:
                    raise
            if not seen:
                raise HeadSearchError(f"no attention of this model was rewritten{_why(graphs)}")
            return Ran(seen, output)

        yield forward, graphs


def _why(graphs: Sequence[GraphReport]) -> str:
    """The first reason for which an attention was left alone, as the end of a sentence."""
    for site in (site for graph in graphs for site in graph.sites):
        decision = site.decision
        if decision is not None and decision.is_grouped:
            return f": {Reason.GROUPED_MASK.message}; {Reason.GROUPED_MASK.mend}"
        if decision is not None and not decision.rewritten and decision.reason is not None:
            return f": {decision.reason.message}; {decision.reason.mend}"
    return "; mmi_compile.explain(model, **inputs) shows what was captured"


def left_alone(graphs: Sequence[GraphReport]) -> bool:
    """Whether some prefill attention was not rewritten, or has a mask for which there are no patterns."""
    decisions = [site.decision for graph in graphs for site in graph.sites if site.decision is not None]
    return any(d.is_grouped or (not d.rewritten and d.reason not in NO_PREFILL) for d in decisions)


def _segments(model: nn.Module, prompt: Mapping[str, Any]) -> tuple[VisualSegment, ...]:
    return PromptHook(model).read((), prompt).segments


def _strides(segments: Sequence[VisualSegment]) -> tuple[list[int], list[int]]:
    """Tokens per row and per frame of all images and videos, in the prompt, and among the tokens of their modality."""
    whole: list[int] = []
    inside: list[int] = []
    for s in segments:
        whole += [s.tokens_per_row, *([s.frame_stride] if s.frame_stride else [])]
        inside += [s.tokens_per_row, *([s.rows * s.tokens_per_row] if s.frames > 1 else [])]
    return sorted(set(whole)), sorted(set(inside))


def _layer_count(model: nn.Module) -> int | None:
    """Layers according to the model's config, for the progress bar alone."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    count = getattr(config, "num_hidden_layers", None)
    return count if isinstance(count, int) else None


def _digest(model: nn.Module, prompts: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """Names a search: the model's shape and a sample of its weights, the prompts and the settings."""
    import mmi_compile

    digest = hashlib.sha256(json.dumps([mmi_compile.__version__, settings], sort_keys=True).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(_bytes(parameter.detach().flatten()[:16]))
    for prompt in prompts:
        digest.update(b"prompt")
        for name in sorted(prompt):
            digest.update(name.encode())
            for part in _parts(prompt[name]):
                digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    """What tells an argument of a forward from another; of objects that are not known, their type alone."""
    if isinstance(value, Tensor):
        yield f"{tuple(value.shape)} {value.dtype}".encode()
        yield _bytes(value)
    elif isinstance(value, Mapping):
        for key in value:
            yield repr(key).encode()
            yield from _parts(value[key])
    elif isinstance(value, list | tuple):
        yield f"{len(value)} parts".encode()
        for part in value:
            yield from _parts(part)
    else:
        known = value is None or isinstance(value, str | int | float)
        yield repr(value).encode() if known else type(value).__name__.encode()


def _bytes(x: Tensor) -> bytes:
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@contextmanager
def _bar(wanted: bool) -> Iterator[Callable[[int, int | None, str], None]]:
    """What is called before every layer. A bar on a terminal, on stderr; elsewhere nothing."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not wanted or not console.is_terminal:
        yield lambda done, total, what: None
        return
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("layers,"),
        TimeElapsedColumn(), TextColumn("taken, left:"), TimeRemainingColumn(), console=console, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("compiling", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
