"""The graph as a dataflow DAG: cones of ancestors, shared storage and mutation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

import networkx as nx
import torch
from torch import fx

from mmi_compile.passes.mask_aliasing import changed
from mmi_compile.passes.nodes import storage_of, tensor_of

if TYPE_CHECKING:
    Dag: TypeAlias = nx.DiGraph[fx.Node]


def digraph(graph: fx.Graph) -> Dag:
    """Nodes of ``graph``, with an edge from every value to each of its users."""
    dag: Dag = nx.DiGraph()
    dag.add_nodes_from(graph.nodes)
    dag.add_edges_from((arg, node) for node in graph.nodes for arg in node.all_input_nodes)
    return dag


def cone(graph: fx.Graph, roots: Iterable[fx.Node]) -> set[fx.Node]:
    """``roots`` and everything that they are computed from."""
    dag = digraph(graph)
    found: set[fx.Node] = set()
    for root in roots:
        if root not in found:
            found |= nx.ancestors(dag, root) | {root}
    return found


def mutates(node: fx.Node) -> bool:
    """True when the node may write to one of its arguments."""
    return any(True for _ in changed(node))


def is_pure(node: fx.Node) -> bool:
    """True when the node may be dropped as soon as nothing reads its value."""
    return node.op in ("call_function", "call_method", "get_attr") and not mutates(node) and not node.is_impure()


def may_alias(a: fx.Node, b: fx.Node) -> bool:
    """May two nodes share memory? The traced values say so; where Dynamo recorded none, the answer is yes."""
    if a is b:
        return True
    left, right = _storages(a), _storages(b)
    return left is None or right is None or not left.isdisjoint(right)


def _storages(node: fx.Node) -> set[int] | None:
    if not node.users and "example_value" not in node.meta:
        return set()  # a statement such as ``x[0] = y``, or the output
    value = node.meta.get("example_value")
    parts = value if isinstance(value, (tuple, list)) else (value,)
    found = set()
    for part in parts:
        storage = storage_of(part) if isinstance(part, torch.Tensor) else None
        if storage is not None:
            found.add(storage)
        elif not isinstance(part, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)):
            return None
    return found


def mutated_between(start: fx.Node, end: fx.Node, tensor: fx.Node) -> bool:
    """May anything from ``start`` (exclusive) to ``end`` (exclusive) in graph order write to ``tensor``'s memory?"""
    node = start.next
    while node is not end and node.op != "root":
        if any(may_alias(target, tensor) for target in changed(node)):
            return True
        node = node.next
    return False


def erase_dead(graph: fx.Graph, candidates: set[fx.Node]) -> int:
    """Erase the nodes among ``candidates`` that nothing reads any more and that write to nothing but memory that
    only they see; return how many."""
    erased = 0
    for node in reversed(list(graph.nodes)):
        if node in candidates and not node.users and (is_pure(node) or _writes_privately(node, candidates)):
            graph.erase_node(node)
            erased += 1
    return erased


def _writes_privately(node: fx.Node, candidates: set[fx.Node]) -> bool:
    """An unused in-place call whose memory came from a candidate and is read by its own predecessors only."""
    targets = list(changed(node))
    if not targets or node.op == "call_module" or any(tensor_of(target) is None for target in targets):
        return False
    shared = {other for other in node.graph.nodes if any(may_alias(other, t) for t in targets)} | {node}
    return all(
        other in candidates and other.op in ("call_function", "call_method") and shared.issuperset(other.users)
        for other in shared
    )
