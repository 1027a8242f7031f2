"""Every model in every setting: what was captured, found, rewritten or left alone, and how exact the result is.

Run ``python -m tests.matrix`` for a cover of all pairs of settings, ``--all`` for their whole product,
``--families qwen3_vl llama`` for some models, and ``--write docs/models.md`` for the table.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mmi_compile
from mmi_compile import record, report
from mmi_compile.report import modality_to_json
from tests import families, modules
from tests.harness import relative_error
from tests.prompts import Shape

OPTIONS = {"policy": "exact", "inner": "eager"}
LARGEST_ERROR = 1e-5
SHAPE = Shape()

FACTORS: dict[str, tuple[Any, ...]] = {
    "attn": ("sdpa", "eager"),
    "through": ("mmi_compile.compile", "torch.compile", "model.compile"),
    "cache": ("none", "dynamic", "static"),
    "batch": ("1", "3, left padding", "3, right padding"),
    "dynamic": (False, True),
}


@dataclass(frozen=True)
class Setting:
    """How one model is built, compiled and called; plain modules have no ``attn`` and no ``cache``."""

    attn: str
    through: str
    cache: str
    batch: str
    dynamic: bool

    @property
    def padding(self) -> Any:
        return self.batch[3:].removesuffix(" padding") or "none"

    @property
    def size(self) -> int:
        return int(self.batch[0])


@dataclass
class Cell:
    """What happened to one model in one setting.

    Attributes:
        graphs: how many Dynamo captured.
        found, rewritten: attentions in them.
        left: how many were left alone for which reason.
        details: what stopped each, in words.
        source: where the modality of the prompt was learned; empty where no attention was rewritten.
        error: largest absolute difference of live logits over the largest logit.
        seconds: the first call, less a call of the uncompiled model.
        failure: an exception or a wrong result, in words; empty otherwise.
        stock: the same happens with PyTorch's own ``eager`` backend.
    """

    model: str
    setting: Setting
    graphs: int = 0
    found: int = 0
    rewritten: int = 0
    left: dict[str, int] = field(default_factory=dict)
    details: list[str] = field(default_factory=list)
    source: str = ""
    error: float = 0.0
    seconds: float = 0.0
    failure: str = ""
    stock: bool = False

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Cell:
        told = json.loads(line)
        return cls(**{**told, "setting": Setting(**told["setting"])})


def names() -> list[str]:
    """Every model of the matrix."""
    return [*families.VISION, *families.TEXT, *modules.MODULES]


def title(name: str) -> str:
    for table in (families.VISION, families.TEXT, modules.MODULES):
        if name in table:
            return str(table[name].title)  # type: ignore[index]
    raise KeyError(name)


def settings(name: str, *, everything: bool) -> list[Setting]:
    """The settings of one model: all of them, or few in which any two levels of two factors meet."""
    factors = dict(FACTORS)
    if name in modules.MODULES:
        factors |= {"attn": ("own",), "cache": ("none",), "batch": ("1", "3")}
    product = [Setting(*levels) for levels in itertools.product(*factors.values())]
    return product if everything else _pairwise(product)


def _pairs(setting: Setting) -> set[tuple[Any, ...]]:
    levels = dataclasses.astuple(setting)
    return {(a, levels[a], b, levels[b]) for a, b in itertools.combinations(range(len(levels)), 2)}


def _pairwise(product: list[Setting]) -> list[Setting]:
    left = set().union(*map(_pairs, product))
    chosen = []
    while left:
        best = max(product, key=lambda setting: len(_pairs(setting) & left))
        chosen.append(best)
        left -= _pairs(best)
    return chosen


# --- one cell --------------------------------------------------------------------------------------------------------


def build(name: str, setting: Setting) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a cell with inputs, without a cache."""
    if name in modules.MODULES:
        return modules.build(name, batch=setting.size)
    arguments = {"attn": setting.attn, "batch": setting.size, "padding": setting.padding, "shape": SHAPE}
    if name in families.TEXT:
        return families.text(name, **arguments)
    case = families.vision(name, **arguments)
    return case.model, case.inputs


def _call(model: Any, inputs: dict[str, Any], cache: str) -> Tensor:
    """One forward of a prompt, with a cache of its own."""
    arguments = dict(inputs)
    if "input_ids" in inputs:
        arguments |= _cache(model, cache, inputs["input_ids"].shape[1])
    with torch.no_grad():
        made = model(**arguments)
    return made if isinstance(made, Tensor) else made.logits


def _cache(model: Any, cache: str, length: int) -> dict[str, Any]:
    if cache == "none":
        return {"use_cache": False}
    from transformers import DynamicCache, StaticCache

    config = getattr(model, "_orig_mod", model).config.get_text_config()
    if cache == "dynamic":
        return {"use_cache": True, "past_key_values": DynamicCache(config=config)}
    return {"use_cache": True, "past_key_values": StaticCache(config=config, max_cache_len=length + 9)}


def _compiled(model: nn.Module, setting: Setting, stock: bool) -> Any:
    backend, options = ("eager", None) if stock else ("mminference", OPTIONS)
    if setting.through == "torch.compile":
        return torch.compile(model, backend=backend, options=options, dynamic=setting.dynamic)
    if setting.through == "mmi_compile.compile" and not stock:
        return mmi_compile.compile(model, dynamic=setting.dynamic, **OPTIONS)
    inner = mmi_compile.frontend.find_language_model(model) if setting.through == "mmi_compile.compile" else model
    inner.compile(backend=backend, options=options, dynamic=setting.dynamic)
    return model


@contextmanager
def _clean() -> Iterator[None]:
    """No compiled code, reports or records of another cell, and no warnings of models that are small on purpose."""
    torch._dynamo.reset()
    report.forget()
    record._state.__init__()  # type: ignore[misc]
    yield
    torch._dynamo.reset()


def run(name: str, setting: Setting) -> Cell:
    """Compile and call one model, and compare."""
    cell = Cell(name, setting)
    model, inputs = build(name, setting)
    live = inputs["attention_mask"].bool() if "attention_mask" in inputs else ...
    started = time.perf_counter()
    expected = _call(copy.deepcopy(model), inputs, setting.cache)[live]
    uncompiled = time.perf_counter() - started
    with _clean():
        try:
            started = time.perf_counter()
            actual = _call(_compiled(copy.deepcopy(model), setting, stock=False), inputs, setting.cache)[live]
            cell.seconds = time.perf_counter() - started - uncompiled
        except Exception as error:
            cell.failure = f"{type(error).__name__}: {str(error).strip()[:300]}"
        else:
            cell.error = relative_error(actual, expected) if bool(actual.isfinite().all()) else float("inf")
            if not cell.error <= LARGEST_ERROR:
                cell.failure = f"wrong by {cell.error:.1e}"
        _describe(cell)
    if cell.failure:
        cell.stock = _stock_fails(model, setting, inputs, expected, live)
    return cell


def _stock_fails(model: nn.Module, setting: Setting, inputs: dict[str, Any], expected: Tensor, live: Any) -> bool:
    with _clean():
        try:
            made = _call(_compiled(copy.deepcopy(model), setting, stock=True), inputs, setting.cache)[live]
        except Exception:
            return True
    return not relative_error(made, expected) <= LARGEST_ERROR


def _describe(cell: Cell) -> None:
    made = mmi_compile.last_report()
    if made is None:
        return
    cell.graphs, cell.found, cell.rewritten = len(made.graphs), len(made.sites), len(made.rewritten)
    left = [site.decision for site in made.sites if site.decision is not None and site.decision.reason is not None]
    cell.left = dict(Counter(decision.reason.name for decision in left if decision.reason is not None))
    cell.details = sorted({str(decision) for decision in left if decision.reason is not mmi_compile.Reason.DECODE})
    failures = [graph.failure for graph in made.graphs if graph.failure]
    if failures and not cell.failure:
        cell.failure = f"pass failed: {failures[0][:300]}"
    prompts = [modality_to_json(graph.key) for graph in made.graphs if any(_is_done(site) for site in graph.sites)]
    cell.source = ", ".join(sorted({prompt["source"] for prompt in prompts if prompt is not None}))


def _is_done(site: report.SiteReport) -> bool:
    return site.decision is not None and site.decision.rewritten


# --- recompilation ---------------------------------------------------------------------------------------------------

_FRAMES: tuple[tuple[families.Grid, ...], ...] = (
    ((1, 4, 4), (1, 2, 4)), ((1, 2, 2),), ((1, 4, 6), (1, 2, 4), (1, 2, 2)), ((1, 6, 4),), ((1, 2, 4), (1, 4, 2)),
    ((1, 8, 4),), ((1, 4, 8), (1, 2, 2)), ((1, 2, 6),), ((1, 6, 6),), ((1, 2, 8), (1, 4, 4)),
)  # fmt: skip


def prompts(name: str, count: int = 10) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """The same model with prompts of different lengths, images and videos."""
    for n in range(count):
        if name in modules.MODULES:
            yield modules.build(name, tokens=20 + 7 * n)
        elif name in families.TEXT:
            yield families.text(name, tokens=20 + 7 * n)
        else:
            videos = () if n % 2 else ((2, 2, 2 + 2 * (n % 3)),)
            media = {"images": _FRAMES[n], "videos": videos, "before": 5 + 3 * n, "after": 4 + n}
            case = families.vision(name, shape=SHAPE, **media)
            yield case.model, case.inputs


def compilations(name: str, count: int = 10) -> int:
    """How many graphs with attention ``mmi_compile.compile`` makes for ``count`` different prompts, whose results all
    have to be right."""
    compiled = None
    with _clean():
        for model, inputs in prompts(name, count):
            if compiled is None:
                compiled = mmi_compile.compile(copy.deepcopy(model), **OPTIONS)
            error = relative_error(_call(compiled, inputs, "dynamic"), _call(model, inputs, "dynamic"))
            if not error <= LARGEST_ERROR:
                raise AssertionError(f"{name} is wrong by {error:.1e} for a prompt of {len(inputs)} inputs")
        made = mmi_compile.last_report()
        return 0 if made is None else sum(bool(graph.sites) for graph in made.graphs)


# --- the table -------------------------------------------------------------------------------------------------------


def table(cells: Sequence[Cell]) -> str:
    """Markdown: one row for each model and way to compile it, and one more for each set of settings that differs."""
    lines = [
        "| model | compiled by | settings | graphs | rewritten | left alone | encoder | modality from | error | s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(cell.model for cell in cells):
        for through in FACTORS["through"]:
            mine = [cell for cell in cells if cell.model == name and cell.setting.through == through]
            outcomes: dict[Any, list[Cell]] = {}
            for cell in mine:
                outcomes.setdefault(_outcome(cell), []).append(cell)
            # What happens most often comes first.
            for same in sorted(outcomes.values(), key=len, reverse=True):
                lines.append(_row(same, mine))
    return "\n".join(lines)


def _outcome(cell: Cell) -> tuple[Any, ...]:
    return (cell.rewritten, _causal(cell), _left(cell), _source(cell), cell.failure, cell.stock)


def _causal(cell: Cell) -> int:
    return cell.found - cell.left.get("BIDIRECTIONAL", 0)


def _left(cell: Cell) -> str:
    """Why attentions that are not an encoder's stayed."""
    if cell.failure:
        return f"**{'PyTorch itself: ' if cell.stock else 'FAILED: '}{cell.failure.splitlines()[0][:80]}**"
    reasons = sorted(set(cell.left) - {"BIDIRECTIONAL"})
    return ", ".join(reason.lower().replace("_", " ") for reason in reasons) or "–"


def _source(cell: Cell) -> str:
    """Where the modality was learned, without the remarks."""
    if cell.model not in families.VISION or not cell.rewritten:
        return "–"
    return cell.source.partition(" (")[0] or NOT_ASKED


def _row(same: list[Cell], mine: list[Cell]) -> str:
    first = same[0]
    columns = (
        title(first.model), f"`{first.setting.through}`", _where(same, mine), _range([c.graphs for c in same]),
        f"{first.rewritten} of {_causal(first)}", _left(first), _range([c.left.get("BIDIRECTIONAL", 0) for c in same]),
        _source(first), f"{max(cell.error for cell in same):.0e}",
        f"{sorted(c.seconds for c in same)[len(same) // 2]:.1f}",
    )  # fmt: skip
    return f"| {' | '.join(column.replace('|', '/') for column in columns)} |"


def _range(numbers: list[int]) -> str:
    return str(numbers[0]) if min(numbers) == max(numbers) else f"{min(numbers)}–{max(numbers)}"


def _where(same: list[Cell], mine: list[Cell]) -> str:
    """The levels that these cells have and others have not."""
    told = []
    for factor in ("attn", "cache", "batch", "dynamic"):
        levels = [getattr(cell.setting, factor) for cell in same]
        every = {getattr(cell.setting, factor) for cell in mine}
        if set(levels) != every:
            label = {"attn": "", "cache": " cache", "batch": "batch ", "dynamic": ""}[factor]
            words = {True: "dynamic", False: "static shapes"}
            shown = " or ".join(words[x] if isinstance(x, bool) else x for x in dict.fromkeys(levels))
            shown = shown.replace("none", "no")
            told.append(label + shown if factor == "batch" else shown + label)
    return ", ".join(told) or ("all" if len(same) == len(mine) else "some")


NOT_ASKED = "not asked for"
"""Masks that group tokens run exactly, and nothing of that depends on the modality."""

HEAD = """# Models

Generated by `python -m tests.matrix{arguments} --write docs/models.md`; not edited by hand.

Small random models of each family (two layers, 64 wide) on the CPU, in {count} cells: attention `sdpa` or `eager`, no
cache, `DynamicCache` or `StaticCache`, one prompt or three of different lengths padded on the left or the right, static
or dynamic shapes. A row with settings holds for cells with these settings only.

* *rewritten*: attentions of the language model, among those found in the captured graphs;
* *left alone*: why the others stayed; the words of the reports are below the table;
* *encoder*: attentions in both directions, such as a vision tower's, which are never rewritten;
* *modality from*: where it was learned which token is text, image or video; "not asked for" where masks group tokens,
  so that attention runs exactly under every policy and nothing depends on it;
* *error*: the largest difference between logits of live tokens under `policy="exact"` and those of the uncompiled
  model, over the largest logit, in float32;
* *s*: median of the seconds that the first call takes, with `inner="eager"` on one thread.

{versions}.

{verdict}

"""


def document(cells: Sequence[Cell], arguments: str) -> str:
    import transformers

    versions = ", ".join(
        f"{name} {version}"
        for name, version in (
            ("mmi-compile", mmi_compile.__version__), ("torch", torch.__version__),
            ("transformers", transformers.__version__), ("Python", platform.python_version()),
        )
    )  # fmt: skip
    failed = [cell for cell in cells if cell.failure and not cell.stock]
    verdict = f"{len(failed)} of {len(cells)} cells failed."
    head = HEAD.format(arguments=arguments, count=len(cells), versions=versions, verdict=verdict)
    counted = {title(name): compilations(name) for name in dict.fromkeys(cell.model for cell in cells)}
    often = [f"{name}: {count}" for name, count in counted.items() if count > 2]
    lengths = f"Ten prompts of different lengths, images and videos take at most two compilations with\n\
`mmi_compile.compile(model)` for {len(counted) - len(often)} of {len(counted)} models; the others: \
{', '.join(often) or 'none'}.\n\n"
    return head + lengths + table(cells) + "\n\n" + _reasons(cells)


def _reasons(cells: Sequence[Cell]) -> str:
    """Why attentions stayed as they were, in the words of the reports."""
    lines = ["## Why attentions were left alone", ""]
    for name in dict.fromkeys(cell.model for cell in cells):
        told = Counter(detail for cell in cells if cell.model == name for detail in cell.details)
        lines += [f"* {title(name)}: {detail}" for detail, _ in told.most_common(4)]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="the whole product of settings")
    parser.add_argument("--families", nargs="+", metavar="NAME", choices=names(), default=names())
    parser.add_argument("--through", nargs="+", metavar="CALL", choices=FACTORS["through"], default=FACTORS["through"])
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table as Markdown")
    parser.add_argument("--results", type=Path, metavar="FILE", help="keep cells here, and do not run them again")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cells = []
    work = [(name, s) for name in chosen.families for s in settings(name, everything=chosen.all)]
    work = [(name, setting) for name, setting in work if setting.through in chosen.through]
    for cell in _cells(work, chosen.results):
        cells.append(cell)
        words = f"{cell.rewritten}/{cell.found} in {cell.graphs} graphs {cell.left or ''} {cell.source}"
        print(cell.model, *map(str, dataclasses.astuple(cell.setting)), f"{cell.seconds:.1f}s", sep=" · ", end=" · ")
        print(f"{'STOCK ' if cell.stock else ''}FAILED {cell.failure}" if cell.failure else words, flush=True)
    if chosen.write is not None:
        chosen.write.parent.mkdir(parents=True, exist_ok=True)
        chosen.write.write_text(document(cells, " --all" if chosen.all else ""))
    return int(any(cell.failure and not cell.stock for cell in cells))


def _cells(work: Sequence[tuple[str, Setting]], results: Path | None) -> Iterator[Cell]:
    kept: dict[tuple[str, Setting], Cell] = {}
    if results is not None and results.exists():
        cells = [Cell.from_json(line) for line in results.read_text().splitlines()]
        kept = {(cell.model, cell.setting): cell for cell in cells}
    for name, setting in work:
        cell = kept.get((name, setting)) or run(name, setting)
        if results is not None and (name, setting) not in kept:
            with results.open("a") as file:
                file.write(cell.to_json() + "\n")
        yield cell


if __name__ == "__main__":
    sys.exit(main())
