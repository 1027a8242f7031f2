"""What happened to every attention, for people and for programs."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmi_compile import __version__, recompile_limit, runtime
from mmi_compile.decision import Decision, MMIError, Reason
from mmi_compile.environment import versions
from mmi_compile.recompile_limit import LimitReached
from mmi_compile.record import LABELS
from mmi_compile.report_program import Snapshot, program, readable
from mmi_compile.report_time import KernelFacts, StageTime, predicted

if TYPE_CHECKING:
    from torch import Tensor, fx

    from mmi_compile.options import Options
    from mmi_compile.passes.base import AttentionSite, PassContext

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class SiteReport:
    """One attention: the facts found at compile time, without references to the graph.

    Attributes:
        where, layer, source: module path, layer number, and the user's source lines (empty where unknown).
        form: ``sdpa`` or ``eager`` (written out as matmul, softmax, matmul).
        shapes: of q and k, with dtype; sizes that vary are symbols.
        mask: what the mask was proved to mean; expression: the boolean expression that was proved.
        phase: ``prefill``, ``decode``, ``encoder`` or ``unclassified``.
        pattern: what the policy gives each head before the input is known.
        key: names the attention at run time.
        facts: what the cost of its kernel depends on; not in JSON.
    """

    where: str
    layer: int | None
    source: str
    form: str
    shapes: str
    mask: str
    expression: str
    phase: str
    pattern: str
    key: str
    decision: Decision | None
    facts: KernelFacts | None = None

    def to_json(self) -> dict[str, Any]:
        decision = self.decision
        out: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("where", "layer", "source", "form", "shapes", "mask", "expression", "phase", "pattern", "key")
        }
        out["rewritten"] = decision is not None and decision.rewritten
        out["decision"] = str(decision)
        out["reason"] = decision.reason.name if decision is not None and decision.reason is not None else None
        out["detail"] = decision.detail if decision is not None else ""
        out["mend"] = decision.reason.mend if decision is not None and decision.reason is not None else ""
        out["anchor"] = decision.reason.anchor if decision is not None and decision.reason is not None else ""
        out["run"] = run = run_to_json(self.key)
        out["predicted"] = predicted(self.facts, run)
        return out


@dataclass(frozen=True)
class SitePlace:
    """Where an attention is in its graph, by names of nodes, for drawing it.

    Attributes:
        found: the attention in the captured graph. node: the attention in the graph that is compiled.
        operands: what ``node`` takes as q, k and v. mask: of ``found``; None where it has none.
    """

    found: str
    node: str
    operands: tuple[str, ...]
    mask: str | None


_RESUMED = re.compile(r"^torch_dynamo_resume_in_(.+)_at_\d+$")
"""What Dynamo calls the rest of a function after a break."""


@dataclass(frozen=True)
class GraphBreak:
    """Why Dynamo ended a graph before its frame did.

    Attributes:
        place: the two innermost source lines, outermost first; empty where Dynamo names none.
        reason: Dynamo's, in one line.
    """

    place: str
    reason: str

    @classmethod
    def after(cls, gm: fx.GraphModule) -> GraphBreak | None:
        """The break that ends a captured graph; None where its frame returns there."""
        why = getattr(gm, "compile_subgraph_reason", None)
        if why is None or not why.graph_break:
            return None
        frames = [
            (Path(frame.filename).name, frame.lineno, _RESUMED.sub(r"\1", frame.name)) for frame in why.user_stack[-2:]
        ]
        place = " → ".join(f"{file}:{line} in {function}" for file, line, function in frames)
        return cls(place, str(why.reason).strip().partition("\n")[0])


@dataclass
class GraphReport:
    """One graph: its attentions, its modality source, its code before and after, and where the time went.

    ``notes`` are what its reader should know of how it was compiled, in words.
    """

    key: str
    options: Options
    original: fx.GraphModule
    rewritten: fx.GraphModule | None = None
    sites: list[SiteReport] = field(default_factory=list)
    modality_source: str = "none"
    modality_labels: list[str] = field(default_factory=list)
    tagged: list[str] = field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    failure: str = ""
    notes: list[str] = field(default_factory=list)
    current_pass: str = ""
    passes_not_run: list[str] = field(default_factory=list)
    trace: list[Snapshot] = field(default_factory=list)
    needs_grad: bool = False
    changed: bool = False
    places: list[SitePlace] = field(default_factory=list)
    found: dict[int, str] = field(default_factory=dict)
    live_inputs: frozenset[str] = frozenset()

    def observe(self, event: str, name: str, gm: fx.GraphModule, context: PassContext) -> None:
        """Pipeline observer: remembers which pass runs and how long each took."""
        if event == "before":
            self.current_pass = name
            self.seconds[name] = -time.perf_counter()
        else:
            self.seconds[name] += time.perf_counter()
            for number, site in enumerate(context.sites):
                self.found.setdefault(number, site.node.name)
            if self.options.dump is not None:
                gm.recompile()
                self.trace.append(Snapshot.of(name, gm))

    def finish(self, context: PassContext, gm: fx.GraphModule) -> None:
        """Take over what the passes found; ``gm`` is the graph that will be compiled."""
        self.rewritten = gm
        self.nodes_before, self.nodes_after = len(self.original.graph.nodes), len(gm.graph.nodes)
        self.modality_source = context.modality.source
        self.modality_labels = [label.partition("@")[0] for label in context.modality.labels]
        self.tagged = list(context.modality.tagged)
        self.passes_not_run = list(context.passes_not_run)
        self.needs_grad, self.changed = context.needs_grad, context.changed
        self.places = [
            SitePlace(
                found=self.found.get(number, site.node.name), node=site.node.name,
                operands=(site.q.name, site.k.name, site.v.name),
                mask=None if site.mask is None else site.mask.name,
            )
            for number, site in enumerate(context.sites)
        ]  # fmt: skip
        if self.options.dump is not None:
            self.live_inputs = frozenset(_inputs_of_padding(context))
        self.sites = [
            SiteReport(
                where=site.where, layer=site.layer, source=site.source, form=site.form, shapes=site.shapes,
                mask=str(site.mask_fact) if site.mask_fact is not None else "not examined",
                expression=site.mask_fact.expression if site.mask_fact is not None else "",
                phase=site.phase, pattern=site.pattern, key=site.key, decision=site.decision, facts=_facts(site),
            )
            for site in context.sites
        ]  # fmt: skip

    def fail(self, step: str, error: Exception) -> None:
        """The untouched graph runs after all: record why."""
        self.failure = f"{step}: {type(error).__name__}: {error}"
        self.rewritten = self.original
        left = Decision.left(Reason.PASS_FAILED, self.failure)
        self.sites = [SiteReport(**{**vars(site), "decision": left}) for site in self.sites]

    @property
    def ends_in(self) -> GraphBreak | None:
        """The graph break that ends it, if one does."""
        return GraphBreak.after(self.original)

    def code(self, *, before: bool = False) -> str:
        """The graph that was compiled (or, with ``before``, the one Dynamo captured) as Python code."""
        return readable(self.original if before or self.rewritten is None else self.rewritten)

    def dump(self, folder: str | Path) -> None:
        """Write the captured graph, and the graph after every pass, into ``folder/<graph key>/``: Python files that run
        on the CPU with inputs of the recorded shapes (see :mod:`mmi_compile.report_program`).

        Raises:
            MMIError: the folder or a file cannot be written.
        """
        from mmi_compile.report_steps import header, steps

        path = Path(folder) / self.key
        try:
            path.mkdir(parents=True, exist_ok=True)
            for number, snapshot in enumerate(steps(self)):
                text = program(snapshot, self.original.graph, header(self, number, snapshot), self.live_inputs)
                (path / f"{number:02d}_{snapshot.name}.py").write_text(text, encoding="utf-8")
        except OSError as error:
            raise MMIError(f'option "dump": cannot write to {path}: {error.strerror}; name another folder') from None

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "nodes": {"before": self.nodes_before, "after": self.nodes_after},
            "passes_not_run": self.passes_not_run,
            "modality": {
                "source": self.modality_source, "labels": self.modality_labels, "tagged": self.tagged,
                "prompt": modality_to_json(self.key),
            },
            "attentions": [site.to_json() for site in self.sites],
            "seconds": {name: round(value, 6) for name, value in self.seconds.items()},
            "failure": self.failure,
            "notes": list(self.notes),
        }  # fmt: skip


def _reason(site: SiteReport) -> str:
    """Why it does not get what the options ask for; empty where it does."""
    decision = site.decision
    return decision.reason.name.lower() if decision is not None and decision.reason is not None else ""


def _facts(site: AttentionSite) -> KernelFacts | None:
    from mmi_compile.passes.nodes import tensor_of

    q = tensor_of(site.q)
    if q is None or q.dim() != 4:
        return None
    size = q.shape[3]
    return KernelFacts(str(q.device), q.dtype, size if isinstance(size, int) else None)


def _inputs_of_padding(context: PassContext) -> set[str]:
    """Names of the graph's inputs that say which keys are live."""
    todo = [site.mask_fact.padding for site in context.sites if site.mask_fact is not None]
    seen: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += node.all_input_nodes
    return {node.name for node in seen if node.op == "placeholder"}


@dataclass(frozen=True)
class Report:
    """All graphs of one compilation or explanation.

    Attributes:
        stages: measured times, where someone asked for them (:func:`mmi_compile.report_time.stage_times`).
        subject: what was explained, in words, where the command line named it: a script, or a config and what was
            shrunk of it (:class:`mmi_compile.hf_config.Sample`).
        limits: the functions of which Dynamo compiles no further version.
    """

    graphs: Sequence[GraphReport]
    stages: Sequence[StageTime] = ()
    subject: str = ""
    limits: Sequence[LimitReached] = ()

    @property
    def sites(self) -> list[SiteReport]:
        return [site for graph in self.graphs for site in graph.sites]

    @property
    def rewritten(self) -> list[SiteReport]:
        return [site for site in self.sites if site.decision is not None and site.decision.rewritten]

    @property
    def passes_not_run(self) -> list[str]:
        """Passes that the options left out, in order."""
        return list(dict.fromkeys(name for graph in self.graphs for name in graph.passes_not_run))

    @property
    def breaks(self) -> list[tuple[GraphBreak, int]]:
        """The graph breaks, and how many graphs end in each; the most frequent first. A break before which nothing was
        captured ends no graph, and is not among them."""
        return Counter(found for graph in self.graphs if (found := graph.ends_in) is not None).most_common()

    def runs(self) -> list[tuple[SiteReport, dict[str, Any]]]:
        """Each rewritten attention that has run, and its last run as in the JSON report."""
        found = [(site, run_to_json(site.key)) for site in self.rewritten]
        return [(site, run) for site, run in found if run is not None]

    def summary(self) -> str:
        """One line: what was rewritten, and what was left alone for which reasons."""
        sites, done = self.sites, self.rewritten
        left = Counter(_reason(site) for site in sites if _reason(site) and site not in done)
        dense = Counter(_reason(site) for site in done if _reason(site))
        graphs = f"{len(self.graphs)} graph{'s' if len(self.graphs) != 1 else ''}"
        text = f"{len(done)} of {len(sites)} attentions rewritten in {graphs}"
        if left:
            text += " · left alone: " + ", ".join(f"{count} {name}" for name, count in left.most_common())
        if dense:
            text += " · dense: " + ", ".join(f"{count} {name}" for name, count in dense.most_common())
        if self.limits:
            text += " · limits reached, what is new runs uncompiled: " + str(len(self.limits))
        return text

    def code(self, *, before: bool = False) -> str:
        """The rewritten FX graphs (or, with ``before``, the captured ones) that hold attention, as Python code."""
        return "\n\n".join(f"# graph {graph.key}\n{graph.code(before=before)}" for graph in self.graphs if graph.sites)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; ``schema`` is raised with every incompatible change."""
        return {
            "schema": SCHEMA_VERSION,
            "version": __version__,
            "summary": self.summary(),
            "subject": self.subject,
            "options": options_to_json(self.graphs[0].options) if self.graphs else {},
            "versions": versions(),
            "stages": [stage.to_json() for stage in self.stages],
            "breaks": [{"place": found.place, "reason": found.reason, "graphs": n} for found, n in self.breaks],
            "limits": [limit.to_json() for limit in self.limits],
            "graphs": [graph.to_json() for graph in self.graphs],
        }

    def dumps(self) -> str:
        return json.dumps(self.to_json(), indent=2, default=str)

    def html(self) -> str:
        """Everything as one HTML page that needs no network."""
        from mmi_compile.report_html import render_html

        return render_html(self)

    def svg(self) -> str:
        """The graphs that hold attention as one picture: attentions before and after, what their masks and modalities
        are computed from, and what died (dashed)."""
        from mmi_compile.report_svg import report_svg

        return report_svg(self)

    def __str__(self) -> str:
        from mmi_compile.report_text import render

        return render(self)


def options_to_json(options: Options) -> dict[str, Any]:
    """The options; of a head config, which may have thousands of heads, what it is for and where it comes from."""
    plain = options.to_json()
    config = options.head_config
    if config is not None:
        plain["head_config"] = {
            "fingerprint": config.fingerprint.to_json(),
            "provenance": config.provenance.to_json(),
            "modalities": {str(key): name for key, name in config.modalities.items()},
        }
    return plain


# --- what ran ----------------------------------------------------------------------------------------------------


def run_to_json(key: str) -> dict[str, Any] | None:
    """The last run of an attention, copied from the device; None when it has not run.

    ``patterns[b][h]`` describes what head ``h`` of batch element ``b`` ran: what the adaptive policy chose, or what the
    head config says. ``notes`` are what one should know of the run.
    """
    run = runtime.attention_run(key)
    if run is None:
        return None
    density = run.density
    heads = _with_moved(run.choice.describe() if run.choice is not None else _configured(run), run)
    per_head = [float(density)] if isinstance(density, (int, float)) else _floats(density)
    return {
        "q_len": run.q_len,
        "kv_len": run.kv_len,
        "path": run.path,
        "calls": run.calls,
        "density": sum(per_head) / max(1, len(per_head)),
        "density_per_head": per_head,
        "patterns": heads,
        "notes": list(run.notes),
        "guard": None if run.guard is None else _guard_to_json(run.guard),
    }


def _with_moved(heads: list[list[str]], run: runtime.AttentionRun) -> list[list[str]]:
    """Heads that the guard moved to dense in this run say so, and what they would have been."""
    guard = run.guard
    if not heads or guard is None or guard.moved is None or guard.call != run.calls:
        return heads
    return [
        [f"dense (moved by the guard; was {text})" if moved else text for text, moved in zip(texts, row, strict=True)]
        for texts, row in zip(heads, guard.moved.tolist(), strict=True)
    ]


def _guard_to_json(guard: runtime.GuardRun) -> dict[str, Any]:
    """What the guard saw: per head the worst batch element, and the time it took."""
    recall, error, moved = guard.recall, guard.error, guard.moved
    return {
        "call": guard.call,
        "rows": guard.rows,
        "min_recall": guard.min_recall or None,
        "recall_per_head": None if recall is None else _worst(recall.amin(0)),
        "error_per_head": None if error is None else _worst(error.amax(0)),
        "moved_to_dense": None if moved is None else [h for h, was in enumerate(moved.any(0).tolist()) if was],
        "milliseconds": round(guard.watch.total() * 1e3, 3),
    }


def _worst(per_head: Tensor) -> list[float | None]:
    # NaN is no JSON; it means that the inputs were NaN.
    return [None if x != x else float(f"{x:.6g}") for x in per_head.tolist()]


def _configured(run: runtime.AttentionRun) -> list[list[str]]:
    """The heads of a head config with their densities, for each batch element."""
    if not run.heads or isinstance(run.density, (int, float)):
        return []
    return [
        [f"{head}: density {density:.3f}" for head, density in zip(run.heads, row, strict=True)]
        for row in run.density.tolist()
    ]


def _floats(tensor: Tensor) -> list[float]:
    return [float(x) for x in tensor.detach().float().mean(0).flatten().cpu()]  # [B, HQ] → HQ


def modality_to_json(graph_key: str) -> dict[str, Any] | None:
    """The prompt that a graph last ran on; None when it has not run.

    ``tokens`` and ``segments`` count tokens and runs of each modality, ``runs[b]`` lists the runs of batch element
    ``b`` as ``[name, length]``, ``grids`` holds its images and videos with their strides (see
    :class:`mmi_compile.visual_segments.VisualSegment`) where their grids are known, and ``grid_note`` says what is not
    known about them.
    """
    run = runtime.modality_run(graph_key)
    if run is None:
        return None
    ids = run.ids.cpu()
    rows = [_runs(row) for row in ids]
    names = {value: _name(value, run.labels) for row in rows for value, _ in row}
    counts: Counter[str] = Counter()
    segments: Counter[str] = Counter()
    for row in rows:
        for value, length in row:
            counts[names[value]] += length
            segments[names[value]] += 1
    return {
        "source": run.source,
        "tokens": dict(counts),
        "segments": dict(segments),
        "runs": [[[names[value], length] for value, length in row] for row in rows],
        "grids": [{**segment.to_json(), "modality": _name(segment.modality, run.labels)} for segment in run.segments],
        "grid_note": run.grid_note,
    }


def _name(value: int, labels: dict[int, str]) -> str:
    if value in labels:
        return labels[value]
    return LABELS[value] if value < len(LABELS) else f"modality {value}"


def _runs(values: Tensor) -> list[tuple[int, int]]:
    """Run-length encoding of a row."""
    import torch

    kinds, lengths = torch.unique_consecutive(values, return_counts=True)
    return list(zip(kinds.tolist(), lengths.tolist(), strict=True))


# --- what was compiled in this process ---------------------------------------------------------------------------

_remembered: deque[GraphReport] = deque(maxlen=512)
_lock = threading.Lock()


def remember(graph: GraphReport) -> None:
    """Keep the report of a graph that is being compiled; the oldest of very many are dropped."""
    with _lock:
        _remembered.append(graph)


def remembered() -> list[GraphReport]:
    """Reports of the graphs compiled so far, newest last."""
    with _lock:
        return list(_remembered)


def forget() -> None:
    """Forget everything compiled so far, and what ran."""
    with _lock:
        _remembered.clear()
    recompile_limit.forget()
    runtime.forget()
