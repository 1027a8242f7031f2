"""Random programs that build attention masks: right ones, nearly right ones and nonsense, as Dynamo-like graphs."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import partial
from typing import Any

import sympy
import torch
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._dynamo.source import LocalSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from mmi_compile.passes.mask_symbols import symbolic

SPARE = 7  # columns of ``wide`` beyond kv_len; so many that no other size has the same hint, and so the same symbol


class Refused(Exception):
    """torch itself refuses the program (shapes or dtypes that do not fit)."""


class Builder:
    """Adds nodes to a graph and records ``example_value`` exactly as Dynamo does: by running them on fake tensors.

    The inputs are ``rows`` (float ``[B, q_len]``, only there for its sizes), ``pad`` (int64 ``[B, kv_len]``) and
    ``wide`` (int64 ``[B, kv_len + SPARE]``, of which the masks read the first ``kv_len`` columns).
    """

    def __init__(self, batch: int, q_len: int, kv_len: int, dynamic: bool) -> None:
        self.graph = fx.Graph()
        self.shapes = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.shapes)
        self.rows = self._input("rows", torch.zeros(batch, q_len), dynamic)
        self.pad = self._input("pad", torch.ones(batch, kv_len, dtype=torch.int64), dynamic)
        self.wide = self._input("wide", torch.ones(batch, kv_len + SPARE, dtype=torch.int64), dynamic)
        self.batch, self.q_len = self.size(self.rows, 0), self.size(self.rows, 1)
        self.kv_len = self.size(self.pad, 1)

    def _input(self, name: str, value: Tensor, dynamic: bool) -> fx.Node:
        node = self.graph.placeholder(name)
        context = StatelessSymbolicContext([DimDynamic.DUCK if dynamic else DimDynamic.STATIC] * value.dim())
        node.meta["example_value"] = self.mode.from_tensor(
            value, symbolic_context=context, source=LocalSource(name), static_shapes=None
        )
        return node

    def size(self, node: fx.Node, dim: int) -> Any:
        """A size as Dynamo passes it: a plain int, or a node that holds a SymInt."""
        found = node.meta["example_value"].shape[dim]
        return found if isinstance(found, int) else self.method("size", node, dim)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """A function call; a call that needs no node (sizes that are plain ints) is folded."""
        if not any(isinstance(a, fx.Node) for a in args) and all(isinstance(a, int) for a in args):
            if target in (operator.add, operator.sub):
                return target(*args)
        return self._record("call_function", target, args, kwargs)

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        return self._record("call_method", name, args, kwargs)

    def _record(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        fake_args, fake_kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["example_value"])
        function = target if op == "call_function" else getattr(type(fake_args[0]), target, None)
        try:
            with self.mode:
                value = function(*fake_args, **fake_kwargs)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise Refused(str(error)) from None
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta["example_value"] = value
        assert isinstance(value, (FakeTensor, int, torch.SymInt)), (target, value)
        return node

    def symbols(self) -> dict[str, sympy.Expr]:
        wide = self.wide.meta["example_value"].shape[1]
        return {
            "B": symbolic(self.batch), "q": symbolic(self.q_len), "kv": symbolic(self.kv_len), "wide": symbolic(wide),
        }  # fmt: skip

    def sizes(self, batch: int, q_len: int, kv_len: int) -> dict[sympy.Expr, int]:
        """What the symbols stand for in a call of these sizes."""
        values = {"B": batch, "q": q_len, "kv": kv_len, "wide": kv_len + SPARE}
        return {symbol: values[name] for name, symbol in self.symbols().items() if symbol.is_Symbol}

    def allows(self, batch: int, q_len: int, kv_len: int) -> bool:
        """Whether the graph, with the guards that tracing it left behind, serves a call of these sizes."""
        sizes = self.sizes(batch, q_len, kv_len)
        values = {"B": batch, "q": q_len, "kv": kv_len, "wide": kv_len + SPARE}
        if any(symbol.subs(sizes) != values[name] for name, symbol in self.symbols().items()):
            return False  # two sizes share a symbol and differ here
        return all(guard.expr.subs(sizes) == sympy.true for guard in self.shapes.guards)


class Values(fx.Interpreter):
    """Runs a graph for real and keeps what every node computed."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(torch.nn.Module(), garbage_collect_values=False, graph=graph)

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        self.by_name = {**getattr(self, "by_name", {}), n.name: found}
        return found


@dataclass
class Program:
    """A finished mask graph."""

    builder: Builder
    mask: fx.Node

    def run(self, batch: int, q_len: int, kv_len: int, seed: int = 0) -> dict[str, Any]:
        """Every node's value for inputs of these sizes; padding data are 0, 1 and, now and then, other integers."""
        generator = torch.Generator().manual_seed(seed)
        data = torch.tensor([0, 1, 1, 1, 2, -1, 256])
        kinds = 4 if seed % 2 else len(data)
        pad, wide = (
            data[torch.randint(0, kinds, (batch, length), generator=generator)] for length in (kv_len, kv_len + SPARE)
        )
        interpreter = Values(self.builder.graph)
        interpreter.run(torch.zeros(batch, q_len), pad, wide)
        return interpreter.by_name


_SPELLINGS = {
    "le": (operator.le, torch.le, torch.less_equal, "le"), "lt": (operator.lt, torch.lt, torch.less, "lt"),
    "ge": (operator.ge, torch.ge, torch.greater_equal, "ge"), "gt": (operator.gt, torch.gt, torch.greater, "gt"),
    "eq": (operator.eq, torch.eq, "eq"), "ne": (operator.ne, torch.not_equal, "ne"),
    "and": (operator.and_, torch.logical_and, torch.bitwise_and, "logical_and", operator.mul, "__and__"),
    "or": (operator.or_, torch.logical_or, "logical_or", operator.add), "xor": (operator.xor, "logical_xor"),
    "not": (operator.invert, torch.logical_not, "logical_not", "bitwise_not"),
}  # fmt: skip


def _spell(draw: st.DrawFn, b: Builder, name: str, *args: Any) -> fx.Node:
    target = draw(st.sampled_from(_SPELLINGS[name]))
    return b.method(target, *args) if isinstance(target, str) else b.call(target, *args)


def _positions(draw: st.DrawFn, b: Builder, length: Any, column: bool) -> fx.Node:
    kind = draw(st.sampled_from(["plain", "plain", "from", "int32", "step", "float"]))
    if kind == "from":
        start = draw(st.integers(-2, 3))
        found = b.call(torch.arange, start, b.call(operator.add, length, start))
    elif kind == "step":
        found = b.call(torch.arange, 0, b.call(operator.add, b.call(operator.add, length, length), 0), 2)
    else:
        dtype = {"plain": None, "int32": torch.int32, "float": torch.float32}[kind]
        found = b.call(torch.arange, length, **({"dtype": dtype} if dtype else {}))
    offset: Any = draw(st.sampled_from([0, 0, 0, 1, -1, "aligned"]))
    if offset == "aligned":
        offset = b.call(operator.sub, b.kv_len, b.q_len)
    found = b.call(draw(st.sampled_from([operator.add, operator.sub])), found, offset)
    if draw(st.booleans()):
        return b.call(operator.getitem, found, (slice(None), None) if column else (None, slice(None)))
    if not column:
        return found
    return b.method(
        *draw(st.sampled_from([("unsqueeze", found, -1), ("view", found, -1, 1), ("reshape", found, (-1, 1))]))
    )


def _comparison(draw: st.DrawFn, b: Builder) -> fx.Node:
    i, j = _positions(draw, b, b.q_len, column=True), _positions(draw, b, b.kv_len, column=False)
    form = draw(st.sampled_from(["j?i", "i?j", "distance", "back", "swapped", "one"]))
    name = draw(st.sampled_from(["le", "lt", "ge", "gt", "eq", "ne"]))
    width = draw(st.integers(-1, 5))
    if form == "distance":
        return _spell(draw, b, name, b.call(operator.sub, i, j), width)
    if form == "back":
        return _spell(draw, b, name, b.call(operator.sub, i, width), j)
    if form == "swapped":
        i, j = b.method("transpose", j if draw(st.booleans()) else i, 0, -1), i
    if form == "one":
        return _spell(draw, b, name, j if draw(st.booleans()) else i, width)
    return _spell(draw, b, name, i, j) if form == "i?j" else _spell(draw, b, name, j, i)


def _triangle(draw: st.DrawFn, b: Builder) -> fx.Node:
    shape = (b.q_len, b.kv_len) if draw(st.booleans()) else (b.kv_len, b.q_len)
    dtype = draw(st.sampled_from([torch.bool, torch.float32, torch.int64, torch.uint8, torch.float16]))
    full = b.call(torch.ones, *shape, dtype=dtype)
    name = draw(st.sampled_from(["tril", "triu", "tril_"]))
    diagonal: Any = draw(st.sampled_from([0, 0, 1, -1, 2, "aligned"]))
    if diagonal == "aligned":
        diagonal = b.call(operator.sub, b.kv_len, b.q_len)
    found = b.method(name, full, diagonal) if draw(st.booleans()) else b.method(name, full, diagonal=diagonal)
    if draw(st.integers(0, 9)) == 0:
        b.method("fill_", full, 1)  # a change that the reading of the triangle must not miss
    form = draw(st.sampled_from(["bool", "to", "eq", "gt"]))
    if form in ("bool", "to"):
        return b.method("bool", found) if form == "bool" else b.method("to", found, torch.bool)
    return _spell(draw, b, form, found, draw(st.sampled_from([0, 1])))


def _padding(draw: st.DrawFn, b: Builder) -> fx.Node:
    pad: Any = b.pad
    dtype = draw(st.sampled_from([None, None, torch.bool, torch.float32, torch.float16, torch.uint8, torch.int32]))
    pad = b.method("to", pad, dtype) if dtype else pad
    shape: Any = draw(
        st.sampled_from(
            [
                (slice(None), None, None, slice(None)), (slice(None), None, None),
                (slice(None), None, slice(None), None), (slice(None), None), (None, slice(None)), (0,),
                (slice(0, 1), None, None),
                (slice(None), None, None, slice(1, None)), (slice(None), None, None, slice(None, None, 1)),
            ]
        )
    )  # fmt: skip
    form = draw(st.sampled_from(["bool", "ne", "eq", "gt", "gather", "wide", "not"]))
    early = draw(st.booleans())
    if form == "gather":
        return _gathered(draw, b, b.method("bool", pad))
    if form == "wide":
        return _wide(draw, b)
    pad = pad if early else b.call(operator.getitem, pad, shape)
    if form in ("bool", "not"):
        pad = b.method("bool", pad)
        pad = _spell(draw, b, "not", pad) if form == "not" else pad
    else:
        pad = _spell(draw, b, form, pad, draw(st.sampled_from([0, 0, 1])))
    return b.call(operator.getitem, pad, shape) if early else pad


def _wide(draw: st.DrawFn, b: Builder) -> fx.Node:
    """Padding that is longer than the keys, cut to size by indexing."""
    early = draw(st.booleans())
    pad = b.method("bool", b.wide) if early else b.wide
    if draw(st.booleans()):
        pad = _gathered(draw, b, pad)
    else:
        stop: Any = draw(st.sampled_from([b.kv_len, b.kv_len, b.kv_len, None, -1, 1]))
        columns = slice(draw(st.sampled_from([None, None, None, 1])), stop)
        pad = b.call(operator.getitem, pad, (slice(None), None, None, columns))
    return pad if early else _spell(draw, b, draw(st.sampled_from(["ne", "ne", "eq"])), pad, 0)


def _documents(draw: st.DrawFn, b: Builder) -> fx.Node:
    """Whether a query row and a key are of one document, from positions that step by something else than 1."""
    pick = partial(draw, st.sampled_from([1, 1, 1, 0, 2]))
    index = b.call(torch.arange, pick(), b.call(operator.add, b.kv_len, pick()))
    index = b.call(operator.mul, index, pick()) if draw(st.booleans()) else index
    index = b.call(operator.getitem, index, (None, slice(None)))
    ends = {}
    for name in draw(st.sampled_from([["prepend"], ["prepend"], ["append"], []])):
        kept = slice(None, 1) if name == "prepend" else slice(-1, None)
        end = b.call(operator.getitem, index, (slice(None), kept))
        ends[name] = b.call(operator.sub, end, draw(st.sampled_from([1, 1, -1, 0])))
    steps = b.call(torch.diff, index, dim=draw(st.sampled_from([-1, 1])), **ends)
    number = b.method("cumsum", _spell(draw, b, draw(st.sampled_from(["ne", "ne", "eq"])), steps, pick()), -1)
    rows = b.call(operator.getitem, number, (slice(None), slice(None, b.q_len), None))
    keys = b.call(operator.getitem, number, (slice(None), None, slice(None)))
    return _spell(draw, b, draw(st.sampled_from(["eq", "eq", "le"])), rows, keys)


def _ids(draw: st.DrawFn, b: Builder) -> fx.Node:
    """An integer per key, ``[B, kv_len]``, as models number documents, blocks and chunks; nearly right ones too."""
    form = draw(st.sampled_from(["data", "steps", "jumps", "jumps", "blocks", "blocks", "prefix", "chunks", "chunks"]))
    if form == "data":
        return b.method("to", b.pad, draw(st.sampled_from([torch.int64, torch.int64, torch.int32])))
    if form == "steps":
        steps = draw(st.sampled_from([b.pad, b.method("bool", b.pad), b.call(operator.ne, b.pad, 1)]))
        return b.method("cumsum", steps, draw(st.sampled_from([-1, 1, -1, 0])))
    if form == "jumps":
        return _jumps(draw, b, b.method("cumsum", b.pad, -1))
    if form == "blocks":
        inside = b.call(operator.eq, b.pad, draw(st.sampled_from([1, 1, 2])))
        before = b.call(torch.nn.functional.pad, inside, (1, 0), value=0)
        before = b.call(operator.getitem, before, (slice(None), slice(None, -1)))
        first = b.call(operator.and_, inside, b.call(operator.invert, before))
        first = draw(st.sampled_from([first, first, first, b.call(operator.invert, inside)]))
        number = b.call(operator.sub, b.call(torch.cumsum, b.method("int", first), dim=1), 1)
        return b.call(torch.where, inside, number, -1)
    if form == "prefix":
        zero, rest = draw(st.sampled_from([(0, -1), (0, -1), (1, 0), (-1, 0)]))
        return b.call(torch.where, b.call(operator.eq, b.pad, 0), zero, rest)
    left = b.call(torch.sum, b.call(operator.eq, b.method("cumsum", b.pad, -1), 0), dim=-1, keepdim=True)
    places = b.call(operator.getitem, b.call(torch.arange, b.kv_len), (None, slice(None)))
    places = b.call(operator.sub, places, left) if draw(st.booleans()) else b.method("expand", places, b.batch, -1)
    places = b.call(operator.neg, places) if draw(st.integers(0, 5)) == 0 else places
    return b.call(operator.floordiv, places, draw(st.sampled_from([1, 2, 3, 4])))


def _jumps(draw: st.DrawFn, b: Builder, positions: fx.Node) -> fx.Node:
    """Numbers of documents, from positions that do not step by 1."""
    first = b.call(operator.getitem, positions, (slice(None), slice(None, 1)))
    first = b.call(operator.sub, first, draw(st.sampled_from([1, 1, 0])))
    steps = b.call(torch.diff, positions, prepend=first, dim=-1)
    return b.method("cumsum", b.call(operator.ne, steps, draw(st.sampled_from([1, 1, 1, 1, 0]))), -1)


def _at(b: Builder, ids: fx.Node, length: Any, shift: Any, row: bool) -> fx.Node:
    """``ids`` at rows or at keys, indexed as transformers does."""
    batch = b.call(operator.getitem, b.call(torch.arange, b.batch), (slice(None), None, None, None))
    index = (None, None, slice(None), None) if row else (None, None, None, slice(None))
    places = b.call(operator.add, b.call(torch.arange, length), shift)
    return b.call(operator.getitem, ids, (batch, b.call(operator.getitem, places, index)))


def _shift(draw: st.DrawFn, b: Builder) -> Any:
    """Where row 0 stands, now and then somewhere else."""
    aligned = b.call(operator.sub, b.kv_len, b.q_len)
    return draw(st.sampled_from([aligned, aligned, aligned, aligned, aligned, 0]))


def _same(draw: st.DrawFn, b: Builder, ids: fx.Node, shift: Any) -> fx.Node:
    rows, keys = _at(b, ids, b.q_len, shift, True), _at(b, ids, b.kv_len, 0, False)
    if draw(st.integers(0, 7)) == 0:
        rows, keys = keys, rows
    return _spell(draw, b, draw(st.sampled_from(["eq"] * 7 + ["le"])), rows, keys)


def _grouped(draw: st.DrawFn, b: Builder) -> fx.Node:
    """Documents, chunks or blocks beside causality, as models combine them, and nearly so."""
    shift = _shift(draw, b)
    rows = b.call(operator.getitem, b.call(torch.arange, b.q_len), (slice(None), None))
    rows = b.call(operator.add, rows, shift)
    keys = b.call(torch.arange, b.kv_len)
    causal = b.call(operator.le, keys, rows)
    width = draw(st.integers(1, 4))
    window = b.call(operator.gt, keys, b.call(operator.sub, rows, width))
    form = draw(st.sampled_from(["and", "or", "or", "or and window", "window in or", "documents", "documents or"]))
    if form.startswith("documents"):
        positions = b.method("cumsum", b.pad, -1)
        at_row, at_key = _at(b, positions, b.q_len, shift, True), _at(b, positions, b.kv_len, 0, False)
        causal = b.call(operator.le, at_key, at_row)
        near = b.call(operator.gt, at_key, b.call(operator.sub, at_row, width))
        causal = b.call(operator.and_, causal, near) if draw(st.booleans()) else causal
        found = b.call(operator.and_, causal, _same(draw, b, _jumps(draw, b, positions), shift))
        if form == "documents":
            return found
        causal = found
    ids = _ids(draw, b)
    same = _same(draw, b, ids, shift)
    if form == "and":
        return _spell(draw, b, "and", causal, same)
    if form == "window in or":
        causal = b.call(operator.and_, causal, window)
    if draw(st.integers(0, 7)):
        column = _at(b, ids, b.q_len, shift, True) if draw(st.integers(0, 7)) else _at(b, ids, b.kv_len, 0, False)
        same = b.call(operator.and_, same, _spell(draw, b, draw(st.sampled_from(["ge", "ge", "gt", "le"])), column, 0))
    found = b.call(operator.or_, causal, same)
    return b.call(operator.and_, found, window) if form == "or and window" else found


def _gathered(draw: st.DrawFn, b: Builder, pad: fx.Node) -> fx.Node:
    batch = b.call(operator.getitem, b.call(torch.arange, b.batch), (slice(None), None, None, None))
    length, place = draw(st.sampled_from([(b.kv_len, 3), (b.kv_len, 3), (b.q_len, 2)]))
    index = [None, None, None, None]
    index[place] = slice(None)  # type: ignore[call-overload]
    keys = b.call(operator.getitem, b.call(torch.arange, length), tuple(index))
    if draw(st.integers(0, 4)) == 0:
        keys = b.call(operator.sub, keys, 1)
    return b.call(operator.getitem, pad, (batch, keys))


def _heads(draw: st.DrawFn, b: Builder) -> fx.Node:
    heads = b.call(operator.getitem, b.call(torch.arange, 2), (slice(None), None, None))
    return _spell(draw, b, draw(st.sampled_from(["lt", "ge"])), heads, draw(st.sampled_from([0, 1, 2])))


def _pieces(draw: st.DrawFn, b: Builder) -> fx.Node:
    """``cat([past, square], -1)``, as older models build chunked causality."""
    past = b.call(operator.sub, b.kv_len, b.q_len)
    first = b.call(torch.ones, b.q_len, past, dtype=torch.bool)
    second = b.method("tril", b.call(torch.ones, b.q_len, b.q_len, dtype=torch.bool), draw(st.sampled_from([0, 0, 1])))
    return b.call(torch.cat, [first, second] if draw(st.integers(0, 3)) else [second, first], dim=-1)


def _right(draw: st.DrawFn, b: Builder) -> fx.Node:
    """Causality and padding as they should be, one of them now and then alone."""
    shift = b.call(operator.sub, b.kv_len, b.q_len)
    if draw(st.booleans()):
        causal = b.method("tril", b.call(torch.ones, b.q_len, b.kv_len, dtype=torch.bool), shift)
    else:
        rows = b.call(operator.getitem, b.call(torch.arange, b.q_len), (slice(None), None))
        causal = b.call(operator.le, b.call(torch.arange, b.kv_len), b.call(operator.add, rows, shift))
    form = draw(st.sampled_from(["pad", "pad", "slice", "gather"]))
    live = b.method("bool", b.pad if form == "pad" else b.wide)
    if form == "gather":
        live = _gathered(draw, b, live)
    else:
        live = b.call(operator.getitem, live, (slice(None), None, None, slice(None, b.kv_len)))
    part = draw(st.sampled_from(["both", "both", "causal", "live"]))
    return {"both": lambda: b.call(operator.and_, causal, live), "causal": lambda: causal, "live": lambda: live}[part]()


_TERMS = [
    _right,
    _right,
    _right,
    _comparison,
    _comparison,
    _triangle,
    _triangle,
    _padding,
    _padding,
    _padding,
    _pieces,
    _heads,
    _documents,
    _grouped,
    _grouped,
]


def _condition(draw: st.DrawFn, b: Builder, depth: int) -> fx.Node:
    if depth == 0:
        return draw(st.sampled_from(_TERMS))(draw, b)
    left = _condition(draw, b, depth - 1)
    form = draw(st.sampled_from(["and", "and", "and", "and", "or", "xor", "not", "where", "masked_fill", "keep"]))
    if form == "keep":
        return left
    if form == "not":
        return _spell(draw, b, "not", left)
    right = _condition(draw, b, draw(st.integers(0, depth - 1)))
    if form == "where":
        return b.call(torch.where, left, right, draw(st.sampled_from([False, True])))
    if form == "masked_fill":
        return b.method("masked_fill", left, right, draw(st.sampled_from([False, True])))
    return _spell(draw, b, form, left, right)


def _additive(draw: st.DrawFn, b: Builder, mask: fx.Node) -> fx.Node:
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float16, torch.bfloat16]))
    low = draw(st.sampled_from([float("-inf"), torch.finfo(dtype).min, torch.finfo(dtype).min, -1e4]))
    form = draw(st.sampled_from(["where", "fill", "scale", "invert", "log"]))
    if form == "where":
        found = b.call(torch.where, mask, b.call(torch.zeros, (), dtype=dtype), low)
    elif form == "fill":
        zeros = b.method("to", b.call(torch.zeros_like, mask), dtype)
        found = b.method("masked_fill", zeros, _spell(draw, b, "not", mask), low)
    elif form == "scale":
        found = b.call(operator.mul, b.call(operator.sub, 1.0, b.method("to", mask, dtype)), low)
    elif form == "invert":
        found = b.call(operator.mul, b.method("to", _spell(draw, b, "not", mask), dtype), low)
    else:
        found = b.method("log", b.method("to", mask, dtype))
    return found


def _wrap(draw: st.DrawFn, b: Builder, mask: fx.Node) -> fx.Node:
    form = draw(st.sampled_from(["none", "none", "expand", "clone", "slice", "to", "four", "repeat", "swap"]))
    if form == "expand":
        return b.method("expand", mask, b.batch, draw(st.sampled_from([1, 2])), b.q_len, b.kv_len)
    if form == "clone":
        return b.method(draw(st.sampled_from(["clone", "contiguous"])), mask)
    if form == "slice":
        return b.call(operator.getitem, mask, (Ellipsis, slice(None, b.kv_len)))
    if form == "to" and mask.meta["example_value"].dtype is not torch.bool:
        return b.method("to", mask, draw(st.sampled_from([torch.float16, torch.float32, torch.bfloat16])))
    if form == "four" and mask.meta["example_value"].dim() == 2:
        return b.call(operator.getitem, mask, (None, None))
    if form == "repeat" and mask.meta["example_value"].dim() == 4:
        return b.method("repeat", mask, 1, draw(st.sampled_from([1, 2])), 1, 1)
    return b.method("transpose", mask, -1, -2) if form == "swap" else mask


def build(draw: st.DrawFn, batch: int, q_len: int, kv_len: int, dynamic: bool) -> Program | None:
    """A random program for these sizes, or None where torch refuses what was drawn."""
    b = Builder(batch, q_len, kv_len, dynamic)
    try:
        mask = _condition(draw, b, draw(st.integers(0, 3)))
        if draw(st.booleans()):
            mask = _additive(draw, b, mask)
            if draw(st.integers(0, 3)) == 0:
                mask = b.call(operator.add, mask, _additive(draw, b, _condition(draw, b, 0)))
        mask = _wrap(draw, b, mask)
    except Refused:
        return None
    b.graph.output(mask)
    return Program(b, mask)


def build_grouped(draw: st.DrawFn, batch: int, q_len: int, kv_len: int, dynamic: bool) -> Program | None:
    """A random program whose tokens are grouped, in most cases as some model groups them."""
    b = Builder(batch, q_len, kv_len, dynamic)
    try:
        mask = _grouped(draw, b)
        for term in draw(st.lists(st.sampled_from([_padding, _right, _grouped, _comparison]), max_size=2)):
            mask = _spell(draw, b, draw(st.sampled_from(["and", "and", "and", "or"])), mask, term(draw, b))
        mask = _additive(draw, b, mask) if draw(st.integers(0, 3)) == 0 else mask
    except Refused:
        return None
    b.graph.output(mask)
    return Program(b, mask)
