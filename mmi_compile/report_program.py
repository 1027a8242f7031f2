"""A graph as a Python file that runs: what ``dump`` writes after every pass, for finding the pass at fault.

Such a file needs nothing of the process that wrote it. It holds no values of the user's, only shapes: floating-point
inputs are drawn anew, from seeds, so that the files of two passes get the same numbers and their results can be
compared.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from mmi_compile.passes.nodes import value_of

if TYPE_CHECKING:
    import jinja2

_PROVIDED = ("inf", "nan", "NoneType", "torch", "device", "fx_pytree", "pytree")
"""Names that the template defines."""

_LITERAL = 64
"""Elements of a graph's own constant that are written out; larger ones are drawn."""


@dataclass(frozen=True)
class Snapshot:
    """A graph at one moment: what FX prints of it, and the objects that the text names.

    Attributes:
        name: of the pass that ran last, or ``captured``.
        text: the graph as a class, in Python. nodes: how many it had.
        names: global name → object, for everything that the text takes from elsewhere.
        constants: path → tensor that the graph holds itself.
        outputs: dtype and shape of each output, None where it is no tensor or was not recorded.
        problems: why the text cannot run alone, in words; empty where it can.
    """

    name: str
    text: str
    nodes: int
    names: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)
    outputs: Sequence[str | None] = ()
    problems: Sequence[str] = ()

    @classmethod
    def of(cls, name: str, gm: fx.GraphModule) -> Snapshot:
        """Take it. ``gm`` may be changed afterwards."""
        names: dict[str, Any] = {}
        problems: list[str] = []
        for module in _graphs(gm):
            names.update(module.graph.python_code("self").globals)
            problems += _calls_of_modules(module)
        constants = dict(_constants(gm))
        return cls(name, readable(gm), len(gm.graph.nodes), names, constants, list(_outputs(gm)), problems)


def readable(gm: fx.GraphModule) -> str:
    """The graph as a Python class with shapes and source lines, as FX prints it."""
    return str(gm.print_readable(print_output=False, include_stride=False, colored=False))


def _graphs(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    yield gm
    for child in gm.children():
        if isinstance(child, fx.GraphModule):
            yield from _graphs(child)


def _calls_of_modules(gm: fx.GraphModule) -> list[str]:
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    return [
        f"it calls the module {name} ({type(gm.get_submodule(name)).__name__})"
        for name in sorted(called)
        if not isinstance(gm.get_submodule(name), fx.GraphModule)
    ]


def _constants(gm: fx.GraphModule) -> Iterator[tuple[str, torch.Tensor]]:
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            value: Any = gm
            for part in str(node.target).split("."):
                value = getattr(value, part, None)
            if isinstance(value, torch.Tensor):
                yield str(node.target), value


def _outputs(gm: fx.GraphModule) -> Iterator[str | None]:
    output = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    for leaf in pytree.tree_leaves(output.args[0]):
        value = value_of(leaf)
        yield _described(value) if isinstance(value, torch.Tensor) else None


def _described(tensor: torch.Tensor) -> str | None:
    sizes = [_hint(size) for size in tensor.shape]
    return None if None in sizes else f"{str(tensor.dtype).removeprefix('torch.')} {sizes}"


def _hint(size: Any) -> int | None:
    """A size, or the value that a symbol had in the traced call."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else None
    return int(size)


# --- the file ----------------------------------------------------------------------------------------------------


def program(snapshot: Snapshot, graph: fx.Graph, header: Sequence[str], live: Collection[str] = ()) -> str:
    """A Python file that rebuilds the graph, draws inputs for it and runs it on the CPU.

    Args:
        graph: the captured graph, whose placeholders say what the inputs are.
        header: lines of the comment at its top.
        live: names of placeholders that say which keys are live: ones instead of zeros.

    The file's exit status is 0 when the outputs have the recorded shapes and dtypes, 1 when not, and 2 where it says
    why the graph cannot be run alone.
    """
    imports, problems = _imports(snapshot.names)
    inputs = [_input(number, node, live) for number, node in enumerate(graph.find_nodes(op="placeholder"))]
    problems = [*snapshot.problems, *problems, *(item["problem"] for item in inputs if item["problem"])]
    if "torch.ops.mmi." in snapshot.text:
        imports.append("import mmi_compile.kernels.ops  # registers the operators torch.ops.mmi")
    symbols = [f"{item['name']} = {item['code']}" for item in inputs if item["symbol"]]
    lines = [*header, *(["Sizes of the traced call: " + ", ".join(symbols)] if symbols else [])]
    found = re.search(r"^class (\w+)\(", snapshot.text)
    code, name = (snapshot.text, found.group(1)) if found else (f"Graph = None  # {_one_line(snapshot.text)}", "Graph")
    return _template().render(
        header=[_one_line(line) for line in lines],
        imports=imports,
        problems=repr([_one_line(problem) for problem in problems]),
        inputs=inputs,
        constants=[
            {"name": path, "code": _constant(i, value)} for i, (path, value) in enumerate(snapshot.constants.items())
        ],
        outputs=repr(list(snapshot.outputs)),
        code=code.rstrip(),
        name=name,
    )


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    import jinja2  # compiling needs no templates

    text = resources.files("mmi_compile").joinpath("templates/graph.py.jinja").read_text(encoding="utf-8")
    # Python source, never HTML: nothing to escape.
    return jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(text)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _imports(names: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """One import for every name that is not the template's own, and what cannot be imported."""
    lines, problems = [], []
    for name, value in sorted(names.items()):
        if name in _PROVIDED:
            continue
        line = _import(name, value)
        if line:
            lines.append(line)
        else:
            problems.append(f"{name} ({type(value).__name__}) cannot be imported")
    return lines, problems


def _import(name: str, value: Any) -> str:
    """``from module import value as name``, where that gives the same object in another process; else empty."""
    if isinstance(value, type(importlib)):
        return f"import {value.__name__} as {name}" if value.__name__ != "__main__" else ""
    module, path = getattr(value, "__module__", None), getattr(value, "__qualname__", getattr(value, "__name__", None))
    if not module or not path or module == "__main__" or not path.isidentifier():
        return ""
    try:
        same = getattr(importlib.import_module(module), path, None) is value
    except ImportError:
        return ""
    return f"from {module} import {path} as {name}" if same else ""


def _input(number: int, node: fx.Node, live: Collection[str]) -> dict[str, Any]:
    value = value_of(node)
    found = {"name": str(node.target), "code": "None", "problem": "", "symbol": False}
    if isinstance(value, torch.Tensor):
        found["code"] = _number(node, value) or _tensor(number, value, node.name in live)
        if found["code"] == "None":
            found["problem"] = f"the sizes of {node.target} depend on data"
    elif isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        known = value.node.has_hint()
        found.update(symbol=True, code=repr(value.node.hint) if known else "1")
    elif isinstance(value, (int, float, bool)):
        found["code"] = repr(value)
    else:
        found["problem"] = f"the input {node.target} is no tensor and no number"
    return found


def _number(node: fx.Node, tensor: torch.Tensor) -> str:
    """A number that Dynamo hands on as a tensor, such as the scale of an attention with ``dynamic=True``, as it was in
    the traced call; empty for other tensors."""
    if tensor.dim() or not tensor.dtype.is_floating_point:
        return ""
    read = (value_of(user) for user in node.users if user.target == "item")
    known = [x.node.hint for x in read if isinstance(x, torch.SymFloat) and x.node.has_hint()]
    return f"torch.tensor({known[0]!r}, dtype={tensor.dtype})" if known else ""


def _tensor(number: int, tensor: torch.Tensor, is_live: bool) -> str:
    """A call of ``drawn`` or ``filled`` of the template; ``None`` where a size is not known."""
    dtype, shape = tensor.dtype, [size for size in map(_hint, tensor.shape) if size is not None]
    if len(shape) < tensor.dim() or tensor.layout is not torch.strided:
        return "None"
    stride = [_hint(step) for step in tensor.stride()]
    arguments = f"{number}, {shape}, {dtype}"
    if None not in stride and stride != list(torch.empty(shape, device="meta").stride()):
        arguments += f", {stride}"
    if dtype.is_floating_point or dtype.is_complex:
        return f"drawn({arguments})"
    return f"filled({arguments}, value=1)" if is_live else f"filled({arguments})"


def _constant(number: int, tensor: torch.Tensor) -> str:
    if tensor.numel() <= _LITERAL and not _is_fake(tensor):
        return f"torch.tensor({tensor.tolist()!r}, dtype={tensor.dtype})"
    return _tensor(1_000_000 + number, tensor, False)


def _is_fake(tensor: torch.Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor) or tensor.is_meta
