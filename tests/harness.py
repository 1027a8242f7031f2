"""What tests need to look at graphs: a recording backend, op counts, and a detector of N x N tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx


class GraphPass(Protocol):
    """The part of a pass that tests rely on; ``run`` returns a graph or changes the one it was given."""

    name: str

    def run(self, graph_module: fx.GraphModule, context: Any) -> object: ...


def snapshot(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy of ``gm`` with its own graph and shared parameters; node metadata is kept."""
    copied = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    copied.meta = dict(gm.meta)
    return copied


@dataclass
class Recorder:
    """A Dynamo backend that keeps every graph it is given, then runs it as it is or hands it to ``inner``.

    Attributes:
        inner: backend called with a fresh copy, so that what it does to its graph never shows in ``graphs``.
        graphs: one copy of each graph, in order of compilation, as Dynamo made it.
        inputs: the example inputs of each graph.
        outputs: what ``inner`` returned, where that is a graph module; otherwise None.
    """

    inner: Callable[[fx.GraphModule, list[Any]], Callable[..., Any]] | None = None
    graphs: list[fx.GraphModule] = field(default_factory=list)
    inputs: list[list[Any]] = field(default_factory=list)
    outputs: list[fx.GraphModule | None] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any], **_: object) -> Callable[..., Any]:
        self.graphs.append(snapshot(gm))
        self.inputs.append(list(example_inputs))
        compiled = self.inner(snapshot(gm), example_inputs) if self.inner else gm.forward
        self.outputs.append(compiled if isinstance(compiled, fx.GraphModule) else None)
        return compiled


def capture(
    function: Callable[..., Any], *args: Any, dynamic: bool | None = None, fullgraph: bool = False, **kwargs: Any
) -> Recorder:
    """Compile ``function`` with a ``Recorder``, call it once without gradients, and return the recorder.

    Dynamo is reset before, so that the graphs do not depend on what was compiled earlier. A ``torch.nn.Module`` is
    called through ``forward`` and stays uncompiled.
    """
    torch._dynamo.reset()
    recorder = Recorder()
    with torch.no_grad():
        torch.compile(function, backend=recorder, dynamic=dynamic, fullgraph=fullgraph)(*args, **kwargs)
    return recorder


def run_passes(gm: fx.GraphModule, passes: Sequence[GraphPass], context: Any = None) -> list[fx.GraphModule]:
    """Run ``passes`` on a copy of ``gm``; one checked, runnable graph per pass, the last one being the result."""
    history: list[fx.GraphModule] = []
    current = snapshot(gm)
    for graph_pass in passes:
        result = graph_pass.run(current, context)
        current = result if isinstance(result, fx.GraphModule) else current
        current.graph.lint()
        current.recompile()
        history.append(snapshot(current))
    return history


def nodes(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """Every node of ``gm`` and of the graph modules inside it (bodies of higher-order ops)."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            yield from module.graph.nodes


def _is_call_of(node: fx.Node, target: object) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(target, torch._ops.OpOverloadPacket) and isinstance(node.target, torch._ops.OpOverload):
        return node.target.overloadpacket is target
    # `is` first: comparing arbitrary callables with == can be costly or surprising.
    return node.target is target or node.target == target


def count_ops(gm: fx.GraphModule, target: object) -> int:
    """Number of calls of ``target``: a function, an op overload, an op packet (any overload) or a method's name."""
    return sum(_is_call_of(node, target) for node in nodes(gm))


def _hint(size: int | torch.SymInt) -> int:
    if isinstance(size, int):
        return size
    if not size.node.has_hint():
        raise ValueError(f"size {size} has no hint: nothing can be said about its square")
    hint = size.node.hint
    assert isinstance(hint, int)
    return hint


def numel(value: Tensor) -> int:
    """Elements of a real or fake tensor; symbolic sizes count with the sizes of the traced call, adding no guard."""
    total = 1
    for size in value.shape:
        total *= _hint(size)
    return total


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def max_square(gm: fx.GraphModule, n: int) -> int:
    """Assert that no node computes a tensor of ``n * n`` elements or more; return the largest count found.

    Inputs and attributes are weights or the caller's own tensors, and are left out. Choose ``n``, in tokens, larger
    than ``batch * width`` for every width of the model (hidden, MLP, vocabulary), or those are taken for squares.
    A node without an ``example_value`` (or ``val``) is skipped, except that a graph without any is an error.
    """
    largest, seen = 0, False
    offenders: list[str] = []
    for node in nodes(gm):
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        for tensor in _tensors(node.meta.get("example_value", node.meta.get("val"))):
            seen, count = True, numel(tensor)
            largest = max(largest, count)
            if count >= n * n:
                offenders.append(f"{node.name} = {node.target}: {tuple(tensor.shape)} {tensor.dtype}")
    assert seen, "no node of this graph has an example value"
    assert not offenders, f"tensors of {n} x {n} elements or more:\n  " + "\n  ".join(offenders)
    return largest


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value, computed in float64."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if not expected.numel():
        return 0.0
    scale = expected.double().abs().amax().clamp(min=torch.finfo(torch.float64).tiny)
    return float(((actual.double() - expected.double()).abs().amax() / scale).item())
