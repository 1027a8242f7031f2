"""What a pass is, what passes share, and how a pipeline of them runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import fx

from mmi_compile.decision import Decision, Reason
from mmi_compile.kernels.layer_heads import LayerHeads
from mmi_compile.passes.mask_fact import MaskFact

if TYPE_CHECKING:
    from mmi_compile.options import Options


@dataclass
class AttentionSite:
    """One attention of the graph, and what the passes learn about it.

    ``q`` is ``[B, HQ, q_len, D]``, ``k`` and ``v`` ``[B, HKV, kv_len, D]`` after ``repeat_kv`` has been folded.
    ``node`` is the node whose value is the attention's output ``[B, HQ, q_len, D]``.

    ``autocast`` is the dtype to which autocast makes the products cast q, k and v, where the graph does not show it.

    ``layer`` is a label for reports; ``index`` is the number of the decoder layer where the graph tells without doubt.
    ``policy`` is what runs: that of the options, or ``exact`` with the ``fallback`` that says why. ``heads`` are those
    of a head config.
    """

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    form: str
    mask: fx.Node | None = None
    is_causal: bool = False
    scale: Any = None
    dropout_p: Any = 0.0
    autocast: torch.dtype | None = None
    where: str = ""
    layer: int | None = None
    source: str = ""
    shapes: str = ""
    mask_fact: MaskFact | None = None
    phase: str = ""
    pattern: str = ""
    policy: str = ""
    heads: LayerHeads | None = None
    index: int | None = None
    fallback: tuple[Reason, str] | None = None
    key: str = ""
    decision: Decision | None = None

    @property
    def open(self) -> bool:
        """No pass has decided on it yet."""
        return self.decision is None

    def leave(self, reason: Reason, detail: str = "") -> None:
        """Leave it alone; the first reason stands."""
        if self.decision is None:
            self.decision = Decision.left(reason, detail)


@dataclass
class ModalityFact:
    """Where the graph learns which token is text, image or video.

    Attributes:
        source: ``"graph"`` (masks of this graph), ``"record"`` (set outside it, read at run time) or ``"none"``.
        masks: nodes of bool ``[B, S]`` masks, one per modality, when the source is the graph.
        labels: a name per mask, for reports.
        tagged: names of nodes of this graph whose value is recorded for graphs that run later.
    """

    source: str = "none"
    masks: list[fx.Node] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    tagged: list[str] = field(default_factory=list)


@dataclass
class PassContext:
    """The facts of one compilation, shared by all passes of a pipeline."""

    options: Options
    graph_key: str = ""
    needs_grad: bool = False
    sites: list[AttentionSite] = field(default_factory=list)
    modality: ModalityFact = field(default_factory=ModalityFact)
    dead_candidates: set[fx.Node] = field(default_factory=set)
    changed: bool = False
    passes_not_run: list[str] = field(default_factory=list)

    def open_sites(self) -> list[AttentionSite]:
        return [site for site in self.sites if site.open]


class Pass(Protocol):
    """One step of the pipeline: a frozen dataclass with a name. It neither logs, times nor dumps: observers do."""

    @property
    def name(self) -> str: ...

    def run(self, gm: fx.GraphModule, context: PassContext) -> None: ...


Observer = Callable[[str, str, fx.GraphModule, PassContext], None]
"""Called as ``observer("before" | "after", pass_name, graph_module, context)`` around every pass."""


def run_pipeline(
    gm: fx.GraphModule, context: PassContext, passes: Sequence[Pass], observers: Sequence[Observer] = ()
) -> None:
    """Run ``passes`` in order on ``gm`` in place, without those that ``skip_passes`` names and those after
    ``passes_until``. Exceptions pass through: the caller owns the untouched graph."""
    names = [step.name for step in passes]
    for step in passes:
        if not context.options.runs_pass(step.name, names):
            context.passes_not_run.append(step.name)
            continue
        for observer in observers:
            observer("before", step.name, gm, context)
        step.run(gm, context)
        for observer in observers:
            observer("after", step.name, gm, context)
