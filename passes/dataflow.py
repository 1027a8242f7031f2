"""The graph as a dataflow DAG: cones of ancestors, aliases and mutation."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import networkx as nx
import torch
from torch import fx

_INPLACE_OPERATORS = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.iand, operator.ior, operator.ixor, operator.ipow, operator.imod, operator.imatmul,
}  # fmt: skip


def digraph(graph: fx.Graph) -> nx.DiGraph:
    """Nodes of ``graph``, with an edge from every value to each of its users."""
    dag: nx.DiGraph = nx.DiGraph()
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
    """True when the node may write to one of its arguments, judged by PyTorch's naming rules."""
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op != "call_function":
        return node.op == "call_module"
    if node.kwargs.get("out") is not None or node.target in _INPLACE_OPERATORS or node.kwargs.get("inplace"):
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = getattr(node.target, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def is_pure(node: fx.Node) -> bool:
    """True when the node may be dropped as soon as nothing reads its value."""
    return node.op in ("call_function", "call_method", "get_attr") and not mutates(node) and not node.is_impure()


def alias_root(node: fx.Node) -> fx.Node:
    """The tensor whose storage ``node`` may share, following first arguments: conservative, since copies count too."""
    while node.op in ("call_function", "call_method") and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def mutated_between(start: fx.Node, end: fx.Node, tensor: fx.Node) -> bool:
    """May anything from ``start`` (exclusive) to ``end`` (exclusive) in graph order write to ``tensor``'s storage?"""
    root = alias_root(tensor)
    node = start.next
    while node is not end and node.op != "root":
        if mutates(node) and any(alias_root(arg) is root for arg in node.all_input_nodes):
            return True
        node = node.next
    return False


def erase_dead(graph: fx.Graph, candidates: set[fx.Node]) -> int:
    """Erase the pure nodes among ``candidates`` that nothing reads any more; return how many."""
    erased = 0
    for node in reversed(list(graph.nodes)):
        if node in candidates and not node.users and is_pure(node):
            graph.erase_node(node)
            erased += 1
    return erased
