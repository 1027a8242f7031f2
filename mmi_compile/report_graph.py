"""What to draw of a graph, and where: the neighbourhood of its attentions, all else collapsed.

A model has thousands of nodes; a picture of it is legible only if it shows what the passes looked at. Drawn are
attentions, before and after, what their masks and modalities are computed from, their operands and results. Attentions
that are alike are drawn once. Everything else between them is one box that says how many nodes it stands for.

The layout is layered: ranks from topological generations (networkx), the order within a rank by barycentres, places by
averaging. It is computed from the graph alone, so the same graph always gives the same picture.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import networkx as nx
import torch
from torch import fx

from mmi_compile.passes.dataflow import digraph
from mmi_compile.passes.location import module_of, source_of
from mmi_compile.passes.nodes import tensor_of

if TYPE_CHECKING:
    from mmi_compile.report import GraphReport, SitePlace, SiteReport

    Dag: TypeAlias = nx.DiGraph[str]

Kind = Literal["attention", "mask", "modality", "operand", "result", "rest"]
State = Literal["kept", "new", "died"]

MOST_SITES = 3
"""Attentions that are drawn of one graph, each of another sort."""
MOST_OF_CONE = 24
"""Nodes that are drawn of what a mask or a modality is computed from; nearest first."""
MOST_RESULTS = 3

BOX_WIDTH, BOX_HEIGHT = 150.0, 36.0
_GAP, _ROW_GAP, _BEND = 16.0, 34.0, 10.0
_SWEEPS = 8


@dataclass(frozen=True)
class Box:
    """One node, or many that are collapsed.

    Attributes:
        key: names it within the picture. label, detail: two lines of text. title: all that is known, in lines.
        x, y: its middle, in pixels.
    """

    key: str
    label: str
    detail: str
    title: str
    kind: Kind
    state: State
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True)
class Edge:
    """From a value to its user: points of a line, from top to bottom; ``died`` where only the captured graph has it."""

    start: str
    stop: str
    died: bool
    points: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Picture:
    """Boxes and edges with their places, the size of the whole in pixels, and what is not shown, in words."""

    boxes: list[Box]
    edges: list[Edge]
    width: float
    height: float
    notes: list[str]


@dataclass
class _Union:
    """The captured and the compiled graph as one, so that what died and what is new can be drawn together."""

    dag: Dag = field(default_factory=nx.DiGraph)
    nodes: dict[str, fx.Node] = field(default_factory=dict)
    state: dict[str, State] = field(default_factory=dict)
    old: dict[str, str] = field(default_factory=dict)  # name in the captured graph → key
    new: dict[str, str] = field(default_factory=dict)  # name in the compiled graph → key
    living: set[tuple[str, str]] = field(default_factory=set)

    @classmethod
    def of(cls, graph: GraphReport) -> _Union:
        union = cls()
        before, after = graph.original.graph, (graph.rewritten or graph.original).graph
        union._add(after, union.new, "new")
        union.living = set(union.dag.edges)
        union._add(before, union.old, "died")
        if not nx.is_directed_acyclic_graph(union.dag):  # names that were given twice: draw what is compiled alone
            union = cls()
            union._add(after, union.new, "kept")
            union.living, union.old = set(union.dag.edges), {}
        return union

    def _add(self, graph: fx.Graph, keys: dict[str, str], state: State) -> None:
        for node in graph.nodes:
            known = self.nodes.get(node.name)
            same = known is not None and (known.op, str(known.target)) == (node.op, str(node.target))
            key = node.name if known is None or same else f"{node.name}, before"
            keys[node.name] = key
            self.state[key] = "kept" if same else state
            self.nodes.setdefault(key, node)
            self.dag.add_node(key)
        self.dag.add_edges_from((keys[a.name], keys[b.name]) for a, b in digraph(graph).edges)

    def key(self, name: str | None) -> str | None:
        """Of a node of the captured graph, else of the compiled one; None where neither has it."""
        return None if name is None else self.old.get(name, self.new.get(name))


def picture(graph: GraphReport) -> Picture | None:
    """The picture of one graph; None where it holds no attention."""
    if not graph.sites or len(graph.sites) != len(graph.places):
        return None
    union = _Union.of(graph)
    sorts = _sorts(graph.sites)
    shown = list(sorts.values())[:MOST_SITES]
    attentions = {union.key(name) for place in graph.places for name in (place.found, place.node)}
    boxes: dict[str, Box] = {}
    stages: dict[str, int] = {}
    for stage, numbers in enumerate(shown, 1):
        site, place = graph.sites[numbers[0]], graph.places[numbers[0]]
        _draw_site(boxes, union, site, place, len(numbers) - 1, attentions)
        stages |= {key: stage for key in (union.key(place.found), union.new.get(place.node)) if key is not None}
    hidden = [len(numbers) for numbers in list(sorts.values())[MOST_SITES:]]
    notes = [f"{sum(hidden)} attentions of {len(hidden)} other sorts are not drawn"] if hidden else []
    return _laid_out(boxes, _edges(boxes, union, stages), notes)


def _sorts(sites: list[SiteReport]) -> dict[tuple[Any, ...], list[int]]:
    """Numbers of attentions that differ in place, shape and pattern at most; those that were rewritten first."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for number, site in enumerate(sites):
        decision = site.decision
        rewritten = decision is not None and decision.rewritten
        reason = decision.reason if decision is not None else None
        found.setdefault((not rewritten, reason, site.mask, site.form, site.phase), []).append(number)
    return dict(sorted(found.items(), key=lambda item: item[0][0]))


# --- which nodes -------------------------------------------------------------------------------------------------


def _draw_site(
    boxes: dict[str, Box], union: _Union, site: SiteReport, place: SitePlace, alike: int, attentions: set[str | None]
) -> None:
    def draw(key: str | None, kind: Kind) -> None:
        if key is not None and key not in boxes:
            boxes[key] = _box(key, union, kind)

    before, after = union.key(place.found), union.new.get(place.node)
    middle = {key for key in (before, after) if key is not None}
    for key in middle:
        box = _box(key, union, "attention")
        where = site.where if site.layer is None else f"layer {site.layer}"
        times = " · ".join(filter(None, [where, f"× {alike + 1} alike" if alike else ""]))
        boxes[key] = replace(box, detail=times or box.detail, title=f"{box.title}\n{site.decision}")
    mask = union.key(place.mask)
    if mask is not None:
        for key in _cone(union, mask, attentions.__contains__):
            draw(key, "mask")
    for key in [key for root in middle for key in union.dag.predecessors(root)]:
        name = _target(union.nodes[key])
        if name == "mmi.key_bounds":
            draw(key, "mask")
        if name in ("mmi.modality", "mmi.segments"):
            for source in _modality_cone(union, key):
                draw(source, "modality")
    for name in place.operands:
        draw(union.new.get(name, union.old.get(name)), "operand")
    if before is not None and union.state[before] == "died":
        for key in _cone(union, before, lambda key: union.state[key] != "died" or key in attentions):
            draw(key, "operand")
    users = [key for root in (after, before) if root is not None for key in union.dag.successors(root)]
    for key in [key for key in dict.fromkeys(users) if key not in boxes][:MOST_RESULTS]:
        draw(key, "result")


def _modality_cone(union: _Union, root: str) -> Iterable[str]:
    """What modality ids are computed from: not the tensor that they take their device from."""
    yield root
    node = union.nodes[root]
    sources = node.args[1:] if _target(node) == "mmi.modality" else node.args[1:2]
    for source in _nodes_in(sources):
        key = union.new.get(source.name)
        if key is not None:
            yield from _cone(union, key, lambda _: False)


def _nodes_in(arguments: Any) -> list[fx.Node]:
    found: dict[fx.Node, None] = {}
    fx.node.map_arg(arguments, found.setdefault)
    return list(found)


def _cone(union: _Union, root: str, stop: Callable[[str], bool]) -> list[str]:
    """``root`` and what it is computed from, nearest first, at most ``MOST_OF_CONE`` nodes; not beyond ``stop``."""
    found: dict[str, None] = {root: None}
    queue = deque([root])
    while queue:
        for key in sorted(union.dag.predecessors(queue.popleft())):
            if key not in found and not stop(key) and len(found) < MOST_OF_CONE:
                found[key] = None
                queue.append(key)
    return list(found)


def _target(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return str(getattr(node.target, "__name__", node.target))


def _box(key: str, union: _Union, kind: Kind) -> Box:
    node = union.nodes[key]
    tensor = tensor_of(node)
    shape = "" if tensor is None else _shape(tensor)
    label = _target(node) if node.op.startswith("call") else node.name
    facts = (f"{node.name} = {node.op} {_target(node)}", shape, module_of(node), source_of(node))
    label = "sdpa" if label == "scaled_dot_product_attention" else label
    return Box(
        key, label.replace("mmi.", "mmi::"), shape or node.op, "\n".join(filter(None, facts)), kind, union.state[key]
    )


_SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "bool": "b8"}


def _shape(tensor: torch.Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    kind = name.rstrip("0123456789")
    return f"{_SHORT.get(kind, kind)}{name.removeprefix(kind)}[{', '.join(map(str, tensor.shape))}]"


# --- edges, and what is collapsed --------------------------------------------------------------------------------


def _edges(boxes: dict[str, Box], union: _Union, stages: Mapping[str, int]) -> list[Edge]:
    """Edges between boxes. Adds one box for all nodes that are not drawn between two drawn attentions.

    A node's stage is the number of the last drawn attention before it. Nodes of one stage that are not drawn are one
    box; it is read by drawn nodes of its own stage and later ones, and reads drawn nodes of earlier ones, so that
    collapsing never makes a circle.
    """
    stage: dict[str, float] = {}
    for key in nx.topological_sort(union.dag):
        reached = [stages.get(p, stage[p]) for p in union.dag.predecessors(key)]
        stage[key] = max(reached, default=0)
        if key in stages:
            stage[key] = stages[key] - 0.5
        elif key in boxes and boxes[key].kind == "result":
            stage[key] = max(stage[key] - 0.25, 0)
    found: dict[tuple[str, str], bool] = {}
    for a, b in union.dag.edges:
        died = (a, b) not in union.living
        start, stop = (key if key in boxes else f"rest {int(_whole(stage[key]))}" for key in (a, b))
        if start == stop or (start not in boxes and stop not in boxes):
            continue
        if stop not in boxes and (boxes[start].kind not in ("attention", "result") or stage[a] >= _whole(stage[b])):
            continue  # that other attentions share a mask is said by their number
        if start not in boxes and _whole(stage[a]) > stage[b]:
            continue
        found[start, stop] = found.get((start, stop), True) and died
    named = {name for pair in found for name in pair}
    for key in [key for key in named if key not in boxes]:
        boxes[key] = _rest(
            key, [n for n in union.dag if n not in boxes and f"rest {int(_whole(stage[n]))}" == key], union
        )
    return [Edge(a, b, died) for (a, b), died in found.items()]


def _whole(stage: float) -> float:
    """The stage of a node that is not drawn: between a drawn attention and its results there is nothing else."""
    return float(int(stage + 0.5))


def _rest(key: str, members: list[str], union: _Union) -> Box:
    died = sum(union.state[member] == "died" for member in members)
    new = sum(union.state[member] == "new" for member in members)
    parts = [f"{count} {what}" for count, what in ((died, "died"), (new, "new")) if count]
    label = f"{len(members)} more node{'s' if len(members) != 1 else ''}"
    return Box(key, label, ", ".join(parts) or "not drawn", f"{label} that are not drawn", "rest", "kept")


# --- places ------------------------------------------------------------------------------------------------------


def _laid_out(boxes: Mapping[str, Box], edges: list[Edge], notes: list[str]) -> Picture:
    dag: Dag = nx.DiGraph()
    dag.add_nodes_from(boxes)
    dag.add_edges_from((edge.start, edge.stop) for edge in edges)
    ranks = _ranks(dag)
    chains = {(e.start, e.stop): _chain(e, ranks) for e in edges}
    order = _ordered(boxes, ranks, chains)
    x = _placed(order, chains)
    y = {key: BOX_HEIGHT / 2 + rank * (BOX_HEIGHT + _ROW_GAP) for rank, keys in enumerate(order) for key in keys}
    left = min((x[key] - _width(key) / 2 for key in x), default=0.0)
    x = {key: round(value - left, 1) for key, value in x.items()}
    placed = [replace(box, x=x[key], y=y[key]) for key, box in boxes.items()]
    drawn = []
    for edge in edges:
        inner = [(x[key], y[key]) for key in chains[edge.start, edge.stop][1:-1]]
        begin = (x[edge.start], y[edge.start] + BOX_HEIGHT / 2)
        end = (x[edge.stop], y[edge.stop] - BOX_HEIGHT / 2)
        drawn.append(replace(edge, points=(begin, *inner, end)))
    width = max((x[key] + _width(key) / 2 for key in x), default=0.0)
    return Picture(placed, drawn, round(width, 1), max(y.values(), default=0.0) + BOX_HEIGHT / 2, notes)


def _ranks(dag: Dag) -> dict[str, int]:
    """As late as possible, so that an input stands above its first user; what nothing reads, below what it reads."""
    levels = [sorted(level) for level in nx.topological_generations(dag.reverse(copy=False))]
    ranks = {key: len(levels) - 1 - depth for depth, level in enumerate(levels) for key in level}
    for key in nx.topological_sort(dag):
        if dag.out_degree(key) == 0 and dag.in_degree(key) > 0:
            ranks[key] = 1 + max(ranks[p] for p in dag.predecessors(key))
    used = sorted(set(ranks.values()))
    return {key: used.index(rank) for key, rank in ranks.items()}


def _chain(edge: Edge, ranks: Mapping[str, int]) -> list[str]:
    """The edge's ends and a bend on every rank between them."""
    between = range(ranks[edge.start] + 1, ranks[edge.stop])
    return [edge.start, *(f"\0{edge.start}\0{edge.stop}\0{rank}" for rank in between), edge.stop]


def _width(key: str) -> float:
    return _BEND if key.startswith("\0") else BOX_WIDTH


def _ordered(
    boxes: Mapping[str, Box], ranks: Mapping[str, int], chains: Mapping[tuple[str, str], list[str]]
) -> list[list[str]]:
    """The keys of every rank from left to right: by the mean place of their neighbours, upwards and downwards."""
    rows: list[list[str]] = [[] for _ in range(1 + max(ranks.values(), default=0))]
    for key in boxes:
        rows[ranks[key]].append(key)
    above: dict[str, list[str]] = {}
    below: dict[str, list[str]] = {}
    for (start, _), chain in chains.items():
        for step, (a, b) in enumerate(pairwise(chain)):
            below.setdefault(a, []).append(b)
            above.setdefault(b, []).append(a)
            if step:
                rows[ranks[start] + step].append(a)
    for sweep in range(2 * _SWEEPS):
        near, numbers = (above, range(1, len(rows))) if sweep % 2 == 0 else (below, range(len(rows) - 2, -1, -1))
        for number in numbers:
            place = {key: i for i, key in enumerate(rows[number - 1 if sweep % 2 == 0 else number + 1])}
            own = {key: i for i, key in enumerate(rows[number])}

            def centre(key: str, place: Mapping[str, int] = place, own: Mapping[str, int] = own) -> float:
                found = [place[other] for other in near.get(key, []) if other in place]  # noqa: B023
                return sum(found) / len(found) if found else float(own[key])

            rows[number].sort(key=lambda key: (centre(key), own[key]))
    return rows


def _placed(rows: list[list[str]], chains: Mapping[tuple[str, str], list[str]]) -> dict[str, float]:
    """The middle of every key: near the mean of its neighbours, without overlap."""
    near: dict[str, list[str]] = {}
    for chain in chains.values():
        for a, b in pairwise(chain):
            near.setdefault(a, []).append(b)
            near.setdefault(b, []).append(a)
    x: dict[str, float] = {}
    for row in rows:
        at = 0.0
        for key in row:
            x[key] = at + _width(key) / 2
            at += _width(key) + _GAP
        for key in row:
            x[key] -= at / 2
    for sweep in range(2 * _SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = [sum(x[o] for o in near[key]) / len(near[key]) if near.get(key) else x[key] for key in row]
            x.update(zip(row, _apart(row, wanted), strict=True))
    return _squeezed(x)


def _squeezed(x: dict[str, float]) -> dict[str, float]:
    """Without the empty stretches between parts that share no edge."""
    reached, cut, found = None, 0.0, {}
    for key in sorted(x, key=lambda key: (x[key] - _width(key) / 2, key)):
        start, stop = x[key] - _width(key) / 2, x[key] + _width(key) / 2
        if reached is not None:
            cut += max(0.0, start - reached - 2 * _GAP)
        reached = stop if reached is None else max(reached, stop)
        found[key] = x[key] - cut
    return found


def _apart(row: list[str], wanted: list[float]) -> list[float]:
    """Places in order with room between them: the mean of pushing to the right and pushing to the left."""
    right = list(wanted)
    left = list(wanted)
    for i in range(1, len(row)):
        right[i] = max(right[i], right[i - 1] + _room(row[i - 1], row[i]))
        j = len(row) - 1 - i
        left[j] = min(left[j], left[j + 1] - _room(row[j], row[j + 1]))
    return [(a + b) / 2 for a, b in zip(left, right, strict=True)]


def _room(a: str, b: str) -> float:
    return (_width(a) + _width(b)) / 2 + _GAP
