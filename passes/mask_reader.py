"""Abstract interpretation: what every element of a mask tensor is, as an expression over its indices.

Each operator has one transfer function. Where none applies, the tensor itself becomes the atom: "the data of this
node at these indices" is always a true statement about it, and the reason is remembered for whoever asks why.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any, TypeAlias

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from mmi_compile.passes.mask_aliasing import Changes, is_in_place
from mmi_compile.passes.mask_symbols import (
    AtLeastZero,
    Cases,
    Datum,
    Element,
    Live,
    Position,
    Scalar,
    SymbolicTensor,
    Truth,
    axis,
    example,
    provably_nonnegative,
    reindex,
    same,
    symbolic,
)

MAX_CASES = 16
_EXACT_INTEGERS = (torch.int32, torch.int64)


class Unread(Exception):
    """A transfer function cannot say what the elements are; the message says why."""


class Unsound(Exception):
    """Nothing may be concluded at all, for the reason given (data changed in place, no traced value)."""


Operand: TypeAlias = SymbolicTensor | Scalar | sympy.Expr
Transfer = Callable[["Reader", fx.Node, SymbolicTensor], Element]
_TRANSFERS: dict[str, Transfer] = {}

_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_ALIASES = {
    "less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge", "equal_to": "eq", "not_equal": "ne",
    "subtract": "sub", "multiply": "mul", "negative": "neg", "bitwise_and": "and_", "bitwise_or": "or_",
    "bitwise_xor": "xor", "bitwise_not": "invert", "iadd": "add", "isub": "sub", "imul": "mul", "iand": "and_",
    "ior": "or_", "ixor": "xor", "inv": "invert", "__and__": "and_", "__rand__": "and_", "__or__": "or_",
    "__ror__": "or_", "__xor__": "xor", "__rxor__": "xor", "__radd__": "add", "__rmul__": "mul", "__rsub__": "rsub",
}  # fmt: skip


def operator_name(node: fx.Node) -> str:
    """The one name under which an operator is known here, however it was spelled; "" for anything unknown."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        name = str(getattr(node.target, "__name__", ""))
        spaces = (operator, torch, torch.Tensor)
        if not any(getattr(space, name, None) is node.target for space in spaces):
            return ""  # another library's function of the same name may mean anything
    else:
        return ""
    if name in _ALIASES:
        return _ALIASES[name]
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        return {"iadd": "add", "isub": "sub", "imul": "mul", "iand": "and_", "ior": "or_"}.get(name, name)
    if is_in_place(node):
        name = name[:-1]
        name = f"{name}_" if name in ("and", "or") else name
    return _ALIASES.get(name, name)


def _transfer(*names: str) -> Callable[[Transfer], Transfer]:
    def register(function: Transfer) -> Transfer:
        for name in names:
            _TRANSFERS[name] = function
        return function

    return register


class Reader:
    """Reads the tensors of one graph; each node is read once."""

    def __init__(self, graph: fx.Graph) -> None:
        self._changes = Changes(graph, FRESH)
        self._memo: dict[fx.Node, SymbolicTensor] = {}
        self.reasons: dict[str, str] = {}

    @property
    def known(self) -> dict[fx.Node, SymbolicTensor]:
        """Every node read so far, inputs first."""
        return self._memo

    def read(self, node: fx.Node) -> SymbolicTensor:
        """What the elements of ``node`` are.

        Raises:
            Unsound: some tensor on the way changes in place, or has no traced value.
        """
        stack = [node]
        while stack:
            top = stack[-1]
            if top in self._memo:
                stack.pop()
                continue
            pending = [n for n in self._inputs(top) if n not in self._memo]
            if pending:
                stack.extend(pending)
            else:
                self._memo[top] = self._evaluate(top)
                stack.pop()
        return self._memo[node]

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        if operator_name(node) not in _TRANSFERS:
            return []
        return [n for n in node.all_input_nodes if isinstance(example(n), torch.Tensor)]

    def _evaluate(self, node: fx.Node) -> SymbolicTensor:
        value = example(node)
        if not isinstance(value, torch.Tensor):
            raise Unsound(f"`{node.name}` has no traced tensor value")
        if value.layout is not torch.strided:
            raise Unsound(f"`{node.name}` is not a strided tensor")
        if self._changes.touch(node):
            raise Unsound(f"`{node.name}` is changed in place")
        try:
            shape = tuple(symbolic(size) for size in value.shape)
        except TypeError as error:
            raise Unsound(f"`{node.name}` has a size that is {error}") from None
        index = tuple(_axes(shape))
        atom: Element = Datum(node.name, index, not (value.is_floating_point() or value.is_complex()))
        if value.dtype is torch.bool:
            atom = Truth(Live(node.name, *index))
        result = SymbolicTensor(shape, value.dtype, atom)
        name = operator_name(node)
        if name not in _TRANSFERS:
            self.reasons[node.name] = _why_not_read(node)
            return result
        try:
            element = _TRANSFERS[name](self, node, result)
        except Unread as reason:
            self.reasons[node.name] = f"`{name}` that is not read: {reason}"
            return result
        single = {axis(n): sympy.Integer(0) for n, size in enumerate(reversed(shape)) if size == 1}
        return SymbolicTensor(shape, value.dtype, reindex(element, single))

    def operand(self, arg: Any) -> Operand:
        """An argument: a tensor that was read before, a Python number, or an integer over the shape symbols."""
        if isinstance(arg, fx.Node):
            if arg in self._memo:
                return self._memo[arg]
            arg = example(arg)
        if isinstance(arg, (bool, int, float)):
            number: Scalar = arg
            return number
        try:
            return symbolic(arg)
        except TypeError:
            raise Unread(f"argument {arg!r} is not understood") from None

    def tensor(self, arg: Any) -> SymbolicTensor:
        """An argument that has to be a tensor."""
        found = self.operand(arg)
        if not isinstance(found, SymbolicTensor):
            raise Unread("a number where a tensor was expected")
        return found

    def integer(self, arg: Any) -> sympy.Expr:
        """An argument that has to be an integer known at compile time or in terms of the shape symbols."""
        found = self.operand(arg)
        if isinstance(found, (bool, float, SymbolicTensor)):
            raise Unread("an argument is not an integer of the graph's sizes")
        return sympy.sympify(found)


def _why_not_read(node: fx.Node) -> str:
    if node.op in ("placeholder", "get_attr"):
        return "an input of the graph"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    return f"`{name}`, which is not read"


def _axes(shape: tuple[sympy.Expr, ...]) -> Iterable[sympy.Expr]:
    """The index of each dimension: its axis symbol, or 0 where the size is 1."""
    return (sympy.Integer(0) if size == 1 else axis(len(shape) - 1 - n) for n, size in enumerate(shape))


def _bind(node: fx.Node, names: str, **defaults: Any) -> list[Any]:
    """The arguments of a node in the order of ``names`` (self first); anything unexpected is not read."""
    order = names.split()
    kwargs = {k: v for k, v in node.kwargs.items() if k not in ("device", "dtype", "layout", "pin_memory")}
    if kwargs.get("requires_grad") is False:
        kwargs.pop("requires_grad")
    bound = dict(zip(order, node.args, strict=False)) | {{"self": "input"}.get(k, k): v for k, v in kwargs.items()}
    if len(node.args) > len(order) or set(bound) - set(order) or len(bound) != len(node.args) + len(kwargs):
        raise Unread("unexpected arguments")
    missing = [name for name in order if name not in bound and name not in defaults]
    if missing:
        raise Unread(f"argument {missing[0]} is missing")
    return [bound[name] if name in bound else defaults[name] for name in order]


# --- elements -------------------------------------------------------------------------------------------------------


def _compute(function: Callable[..., Any], args: list[Any], dtype: torch.dtype) -> Scalar:
    """One element, computed by torch itself, so that promotion, rounding and overflow are exactly torch's."""
    try:
        with unset_fake_temporarily(), torch.no_grad():
            result = function(*args)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise Unread(f"torch refuses the constants ({str(error).splitlines()[0]})") from None
    if result.dtype is not dtype:
        raise Unread(f"constants compute in {result.dtype}, the graph in {dtype}")
    value: Scalar = result.item()
    if value != value:
        raise Unread("makes NaN")
    return value


def _constant(value: Scalar, like: SymbolicTensor) -> torch.Tensor:
    """A tensor of one element that promotes as ``like`` does (0-d tensors promote differently)."""
    with unset_fake_temporarily():
        return torch.full((1,) if like.shape else (), value, dtype=like.dtype, device="cpu")


def _join(pairs: Iterable[tuple[Scalar, Boolean]], dtype: torch.dtype) -> Element:
    merged: dict[Scalar, Boolean] = {}
    for value, when in pairs:
        if when != sympy.false:
            merged[value] = sympy.Or(merged.get(value, sympy.false), when)
    if dtype is torch.bool:
        return Truth(merged.get(True, sympy.false))
    if len(merged) > MAX_CASES:
        raise Unread("too many distinct values")
    return Cases(tuple(merged.items()))


def _cases(tensor: SymbolicTensor) -> tuple[tuple[Scalar, Boolean], ...]:
    element = tensor.element
    if isinstance(element, Cases):
        return element.items
    if isinstance(element, Truth):
        return ((True, element.condition), (False, sympy.Not(element.condition)))
    if isinstance(element, Position) and element.expr.is_Integer and tensor.dtype in _EXACT_INTEGERS:
        return ((int(element.expr), sympy.true),)
    raise Unread("depends on more than a few constants")


def _position(operand: Operand) -> sympy.Expr | None:
    """The operand as an exact integer expression, or None."""
    if isinstance(operand, (bool, float)):
        return None
    if not isinstance(operand, SymbolicTensor):
        return sympy.sympify(operand)
    if operand.dtype not in _EXACT_INTEGERS:
        return None
    if isinstance(operand.element, Position):
        return operand.element.expr
    if isinstance(operand.element, Cases) and len(operand.element.items) == 1:
        return sympy.Integer(int(operand.element.items[0][0]))
    return None


def _exact(expr: sympy.Expr, dtype: torch.dtype) -> Position:
    """``expr`` as a position, if its constants are so small that token counts cannot make it overflow."""
    expr = sympy.expand(expr)
    constant, terms = expr.as_coeff_Add()
    slopes = [term.as_coeff_Mul()[0] for term in sympy.Add.make_args(terms)]
    largest, steepest = (2**40, 2**20) if dtype is torch.int64 else (2**30, 1)
    if abs(constant) > largest or any(abs(slope) > steepest for slope in slopes):
        raise Unread(f"{expr} may overflow {dtype}")
    return Position(expr)


def _truth(tensor: SymbolicTensor) -> Boolean:
    element = _cast(tensor, torch.bool)
    assert isinstance(element, Truth)
    return element.condition


def _cast(tensor: SymbolicTensor, dtype: torch.dtype) -> Element:
    element, source = tensor.element, tensor.dtype
    if source is dtype:
        return element
    if isinstance(element, Position) and source in _EXACT_INTEGERS:
        if dtype in _EXACT_INTEGERS:
            return element
        if dtype is torch.bool:
            return Truth(_compare_integers("ne", element.expr, sympy.Integer(0)))
    if isinstance(element, Datum):
        return _cast_datum(element, source, dtype)
    pairs = ((_compute(_constant(v, tensor).to, [dtype], dtype), when) for v, when in _cases(tensor))
    return _join(pairs, dtype)


def _cast_datum(element: Datum, source: torch.dtype, dtype: torch.dtype) -> Element:
    """Casts keep "is zero" as long as no bits are cut off and floats are not truncated."""
    if not element.integral:
        raise Unread("floating-point data")
    if dtype is torch.bool:
        return Truth(Live(element.name, *element.index))
    if dtype.is_floating_point:
        return element
    if source.is_floating_point or dtype.is_complex or torch.iinfo(dtype).bits < torch.iinfo(source).bits:
        raise Unread(f"a cast from {source} to {dtype} may turn non-zero data into zero")
    return element


def _align(tensor: SymbolicTensor, shape: tuple[sympy.Expr, ...]) -> SymbolicTensor:
    """``tensor`` broadcast to ``shape``: right-aligned axes keep their symbols, so only sizes need a proof."""
    if len(tensor.shape) > len(shape):
        raise Unread("has fewer dimensions than its operand")
    for size, target in zip(reversed(tensor.shape), reversed(shape), strict=False):
        if size != 1 and not same(size, target):
            raise Unread(f"size {size} is not provably {target}")
    return SymbolicTensor(shape, tensor.dtype, tensor.element)


def _select(when: Boolean, chosen: SymbolicTensor, other: SymbolicTensor, out: SymbolicTensor) -> Element:
    """``where(when, chosen, other)`` for operands that already have the result's dtype."""
    if isinstance(chosen.element, Truth) and isinstance(other.element, Truth):
        a, b = chosen.element.condition, other.element.condition
        return Truth(sympy.Or(sympy.And(when, a), sympy.And(sympy.Not(when), b)))
    pairs = [(v, sympy.And(when, c)) for v, c in _cases(chosen)]
    pairs += [(v, sympy.And(sympy.Not(when), c)) for v, c in _cases(other)]
    return _join(pairs, out.dtype)


# --- makers ---------------------------------------------------------------------------------------------------------


def _fill(reader: Reader, value: Any, out: SymbolicTensor) -> Element:
    scalar = reader.operand(value)
    if isinstance(scalar, SymbolicTensor):
        raise Unread("filled with a tensor")
    if isinstance(scalar, sympy.Expr) and not scalar.is_number:
        if out.dtype not in _EXACT_INTEGERS:
            raise Unread("filled with a size")
        return Position(scalar)
    number = scalar if isinstance(scalar, (bool, int, float)) else int(scalar)

    def make(v: Scalar) -> torch.Tensor:
        return torch.full((), v, dtype=out.dtype, device="cpu")

    return _join([(_compute(make, [number], out.dtype), sympy.true)], out.dtype)


@_transfer("ones", "ones_like", "new_ones")
def _ones(reader: Reader, node: fx.Node, out: SymbolicTensor) -> Element:
    return _fill(reader, 1, out)


@_transfer("zeros", "zeros_like", "new_zeros")
def _zeros(reader: Reader, node: fx.Node, out: SymbolicTensor) -> Element:
    return _fill(reader, 0, out)


@_transfer("full", "new_full", "full_like")
def _full(reader: Reader, node: fx.Node, out: SymbolicTensor) -> Element:
    place = 2 if operator_name(node) == "new_full" else 1
    value = node.kwargs.get("fill_value", node.args[place] if len(node.args) > place else None)
    return _fill(reader, value, out)


@_transfer("tensor", "scalar_tensor")
def _scalar(reader: Reader, node: fx.Node, out: SymbolicTensor) -> Element:
    if out.shape or len(node.args) != 1:
        raise Unread("more than one number")
    return _fill(reader, node.args[0], out)


@_transfer("arange")
def _arange(reader: Reader, node: fx.Node, out: SymbolicTensor) -> Element:
    if out.dtype not in _EXACT_INTEGERS:
        raise Unread(f"positions of {out.dtype}")
    given = (
        {"end": node.args[0]} if len(node.args) == 1 else dict(zip(("start", "end", "step"), node.args, strict=False))
    )
    given |= {k: v for k, v in node.kwargs.items() if k in ("start", "end", "step")}
    start, step = (reader.integer(given.get(k, d)) for k, d in (("start", 0), ("step", 1)))
    reader.integer(given["end"])  # a float end would make a different length, and is not an integer range
    (index,) = _axes(out.shape)
    return _exact(start + step * index, out.dtype)


# --- movement -------------------------------------------------------------------------------------------------------


@_transfer(
    "to", "type", "type_as", "bool", "float", "half", "bfloat16", "double", "int", "long", "short", "byte", "char",
    "contiguous", "clone", "detach", "cpu", "cuda",
)  # fmt: skip
def _convert(reader: Reader, node: fx.Node, out: SymbolicTensor) -> Element:
    source = reader.tensor(node.args[0])
    if len(source.shape) != len(out.shape):
        raise Unread("the shape changes")
    return _cast(source, out.dtype)


@_transfer("expand", "expand_as", "broadcast_to", "repeat", "tile")
def _broadcast(reader: Reader, node: fx.Node, out: SymbolicTensor) -> Element:
    # repeat and tile are broadcasts exactly where every repeated dimension has size 1, which is what _align asks.
    return _align(reader.tensor(node.args[0]), out.shape).element


@_transfer("view", "reshape", "view_as", "reshape_as", "unsqueeze", "squeeze", "flatten", "unflatten")
def _reshape(reader: Reader, node: fx.Node, out: SymbolicTensor) -> Element:
    """All of these keep row-major order, so equal sizes (ones aside) mean equal elements."""
    source = reader.tensor(node.args[0])
    if source.dtype is not out.dtype:
        raise Unread("reinterprets bits")
    old = [(axis(len(source.shape) - 1 - n), s) for n, s in enumerate(source.shape) if s != 1]
    new = [(axis(len(out.shape) - 1 - n), s) for n, s in enumerate(out.shape) if s != 1]
    if len(old) != len(new) or not all(same(a[1], b[1]) for a, b in zip(old, new, strict=False)):
        raise Unread("does more than add or drop dimensions of size 1")
    return reindex(source.element, {a[0]: b[0] for a, b in zip(old, new, strict=False)})


@_transfer("transpose", "swapaxes", "swapdims", "permute", "t")
def _permute(reader: Reader, node: fx.Node, out: SymbolicTensor) -> Element:
    source = reader.tensor(node.args[0])
    rank = len(source.shape)
    order = _order(node, rank)
    return reindex(source.element, {axis(rank - 1 - old): axis(rank - 1 - new) for new, old in enumerate(order)})


def _order(node: fx.Node, rank: int) -> list[int]:
    dims: list[Any] = list(node.args[1:])
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = list(dims[0])
    if node.kwargs or not all(isinstance(d, int) for d in dims):
        raise Unread("unexpected arguments")
    dims = [d % rank for d in dims] if rank else []
    if operator_name(node) == "permute":
        return dims
    order = list(range(rank))
    if operator_name(node) == "t":
        return order[::-1]
    order[dims[0]], order[dims[1]] = order[dims[1]], order[dims[0]]
    return order


@_transfer("getitem")
def _getitem(reader: Reader, node: fx.Node, out: SymbolicTensor) -> Element:
    if not isinstance(node.args[0], fx.Node) or not isinstance(example(node.args[0]), torch.Tensor):
        raise Unread("an item of something that is not a tensor")
    source = reader.tensor(node.args[0])
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if any(isinstance(n, fx.Node) and isinstance(example(n), torch.Tensor) for n in index):
        return _gather(reader, source, list(index), out)
    entries = _without_ellipsis(list(index), len(source.shape))
    mapping: dict[sympy.Symbol, sympy.Expr] = {}
    places = iter(zip(_axes(out.shape), out.shape, strict=False))
    dims = iter(enumerate(source.shape))
    for entry in entries:
        if entry is None:
            next(places)
            continue
        dim, size = next(dims)
        if isinstance(entry, slice):
            place, extent = next(places)
            start, step = _slice(reader, entry, size, extent)
            chosen = start + step * place
        else:
            chosen = _nonnegative(reader.integer(entry), size)
        if size != 1:
            mapping[axis(len(source.shape) - 1 - dim)] = chosen
    return reindex(source.element, mapping)


def _without_ellipsis(index: list[Any], rank: int) -> list[Any]:
    missing = rank - sum(e is not None and e is not Ellipsis for e in index)
    if sum(e is Ellipsis for e in index) > 1 or missing < 0:
        raise Unread("an index that torch would refuse")
    if Ellipsis not in index:
        return index + [slice(None)] * missing
    place = index.index(Ellipsis)
    return index[:place] + [slice(None)] * missing + index[place + 1 :]


def _nonnegative(index: sympy.Expr, size: sympy.Expr) -> sympy.Expr:
    """A Python index counted from the front, if its sign is known."""
    if provably_nonnegative(index):
        return index
    if provably_nonnegative(-index - 1) and provably_nonnegative(size + index):
        return size + index
    raise Unread(f"the sign of index {index} is not proved")


def _slice(reader: Reader, entry: slice, size: sympy.Expr, extent: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """Start and step of a slice of a dimension of ``size`` that keeps ``extent`` entries."""
    step = reader.integer(1 if entry.step is None else entry.step)
    start = reader.integer(0 if entry.start is None else entry.start)
    if provably_nonnegative(start):
        return start, step
    if entry.stop is None and step == 1:
        return size - extent, step  # whatever was clamped, the slice ends at the end
    return _nonnegative(start, size), step


def _gather(reader: Reader, source: SymbolicTensor, index: list[Any], out: SymbolicTensor) -> Element:
    """Indexing by tensors: whole dimensions first, then one tensor for each of the next dimensions."""
    whole = 0
    while isinstance(index[whole], slice) and index[whole] == slice(None):
        whole += 1
    tensors = [reader.tensor(n) for n in index[whole:] if isinstance(n, fx.Node)]
    if len(tensors) != len(index) - whole or whole + len(tensors) > len(source.shape):
        raise Unread("index tensors mixed with slices, numbers or None")
    trailing = len(source.shape) - whole - len(tensors)
    broadcast = out.shape[whole : len(out.shape) - trailing]
    mapping: dict[sympy.Symbol, sympy.Expr] = {}
    for n, tensor in enumerate(tensors):
        expr = _position(_align(tensor, broadcast)) if tensor.shape else None
        if expr is None or not provably_nonnegative(expr):
            raise Unread("an index tensor is not a range of non-negative positions")
        shifted = {axis(k): axis(k + trailing) for k in range(len(broadcast))}
        if source.shape[whole + n] != 1:
            mapping[axis(len(source.shape) - 1 - whole - n)] = expr.xreplace(shifted)
    for n in range(whole):
        mapping[axis(len(source.shape) - 1 - n)] = axis(len(out.shape) - 1 - n)
    return reindex(source.element, mapping)


@_transfer("cat", "concat", "concatenate")
def _cat(reader: Reader, node: fx.Node, out: SymbolicTensor) -> Element:
    tensors, dim = _bind(node, "tensors dim", dim=0)
    if not isinstance(dim, int) or not isinstance(tensors, (tuple, list)):
        raise Unread("unexpected arguments")
    place = len(out.shape) - 1 - dim % len(out.shape)
    where, start = axis(place), sympy.Integer(0)
    pieces: list[tuple[SymbolicTensor, sympy.Expr]] = []
    for piece in (reader.tensor(t) for t in tensors):
        if len(piece.shape) != len(out.shape):
            raise Unread("operands of different rank")
        element = reindex(piece.element, {where: where - start})
        start = start + piece.shape[-1 - place]
        pieces.append((SymbolicTensor(out.shape, out.dtype, _cast_to(piece, element, out.dtype)), start))
    result = pieces[-1][0]
    for tensor, stop in reversed(pieces[:-1]):
        result = SymbolicTensor(out.shape, out.dtype, _select(AtLeastZero(stop - 1 - where), tensor, result, out))
    return result.element


def _cast_to(tensor: SymbolicTensor, element: Element, dtype: torch.dtype) -> Element:
    return _cast(SymbolicTensor(tensor.shape, tensor.dtype, element), dtype)


@_transfer("tril", "triu")
def _triangle(reader: Reader, node: fx.Node, out: SymbolicTensor) -> Element:
    source, diagonal = _bind(node, "input diagonal", diagonal=0)
    tensor, shift = reader.tensor(source), reader.integer(diagonal)
    *_, row, column = _axes(out.shape)
    above = column - row - shift
    keep = AtLeastZero(above) if operator_name(node) == "triu" else AtLeastZero(-above)
    zero = SymbolicTensor(out.shape, out.dtype, _fill(reader, 0, out))
    return _select(keep, tensor, zero, out)


# --- pointwise ------------------------------------------------------------------------------------------------------


@_transfer("where")
def _where(reader: Reader, node: fx.Node, out: SymbolicTensor) -> Element:
    if node.op == "call_method":
        chosen, when, other = _bind(node, "input condition other")
    else:
        when, chosen, other = _bind(node, "condition input other")
    return _choose(reader, when, chosen, other, out, torch.where)


@_transfer("masked_fill")
def _masked_fill(reader: Reader, node: fx.Node, out: SymbolicTensor) -> Element:
    other, when, value = _bind(node, "input mask value")

    def fill(mask: torch.Tensor, chosen: Any, base: torch.Tensor) -> torch.Tensor:
        return base.masked_fill(mask, chosen)

    return _choose(reader, when, value, other, out, fill)


def _choose(
    reader: Reader, when: Any, chosen: Any, other: Any, out: SymbolicTensor, function: Callable[..., torch.Tensor]
) -> Element:
    mask = _align(reader.tensor(when), out.shape)
    if mask.dtype is not torch.bool:
        raise Unread("the condition is not bool")
    yes, no = (_branches(reader.operand(arg), out.shape) for arg in (chosen, other))
    condition = _constant(True, reader.tensor(when)), _constant(False, reader.tensor(when))
    pairs = [
        (_compute(function, [condition[0], v, no[0][0]], out.dtype), sympy.And(_truth(mask), c)) for v, c in yes
    ] + [
        (_compute(function, [condition[1], yes[0][0], v], out.dtype), sympy.And(sympy.Not(_truth(mask)), c))
        for v, c in no
    ]
    return _join(pairs, out.dtype)


def _branches(operand: Operand, shape: tuple[sympy.Expr, ...]) -> list[tuple[Any, Boolean]]:
    """The possible concrete arguments and when each applies."""
    if isinstance(operand, SymbolicTensor):
        return [(_constant(v, operand), when) for v, when in _cases(_align(operand, shape))]
    if isinstance(operand, sympy.Expr):
        if not operand.is_Integer:
            raise Unread("a size among constants")
        operand = int(operand)
    return [(operand, sympy.true)]


def _rsub(left: Any, right: Any) -> Any:
    return right - left


_POINTWISE: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name)
    for name in ("add", "sub", "mul", "neg", "and_", "or_", "xor", "invert", *_COMPARISONS)
} | {
    "rsub": _rsub, "logical_and": torch.logical_and, "logical_or": torch.logical_or, "logical_not": torch.logical_not,
    "logical_xor": torch.logical_xor, "minimum": torch.minimum, "maximum": torch.maximum, "log": torch.log,
}  # fmt: skip
_INTEGER: dict[str, Callable[..., sympy.Expr]] = {
    "add": operator.add, "sub": operator.sub, "rsub": _rsub, "mul": operator.mul, "neg": operator.neg,
}  # fmt: skip


@_transfer(*_POINTWISE)
def _pointwise(reader: Reader, node: fx.Node, out: SymbolicTensor) -> Element:
    name = operator_name(node)
    unary = name in ("neg", "invert", "logical_not", "log")
    operands = [reader.operand(a) for a in _bind(node, "input" if unary else "input other")]
    aligned = [_align(x, out.shape) if isinstance(x, SymbolicTensor) else x for x in operands]
    for read in (_boolean, _integer, _liveness):
        element = read(name, aligned, out)
        if element is not None:
            return element
    pairs = []
    for combination in product(*(_branches_in_place(x, out.shape) for x in operands)):
        value = _compute(_POINTWISE[name], [v for v, _ in combination], out.dtype)
        pairs.append((value, sympy.And(*(when for _, when in combination))))
    return _join(pairs, out.dtype)


def _branches_in_place(operand: Operand, shape: tuple[sympy.Expr, ...]) -> list[tuple[Any, Boolean]]:
    found = _branches(operand, shape)
    if len(found) > MAX_CASES:
        raise Unread("too many distinct values")
    return found


_CONNECTIVES: dict[str, Callable[..., Boolean]] = {
    "and_": sympy.And, "or_": sympy.Or, "invert": sympy.Not, "logical_and": sympy.And, "logical_or": sympy.Or,
    "logical_not": sympy.Not,
}  # fmt: skip


def _boolean(name: str, operands: list[Operand], out: SymbolicTensor) -> Element | None:
    """Connectives on bool tensors, without going through truth tables; the logical ones on anything."""
    if name not in _CONNECTIVES or out.dtype is not torch.bool:
        return None
    tensors = [x for x in operands if isinstance(x, SymbolicTensor)]
    if len(tensors) != len(operands):
        return None
    return Truth(_CONNECTIVES[name](*(_truth(x) for x in tensors)))


def _integer(name: str, operands: list[Operand], out: SymbolicTensor) -> Element | None:
    """Exact arithmetic and comparison of positions."""
    exprs = [_position(x) for x in operands]
    values = [e for e in exprs if e is not None]
    if len(values) != len(exprs):
        return None
    if name in _COMPARISONS:
        return Truth(_compare_integers(name, values[0], values[1]))
    if name not in _INTEGER or out.dtype not in _EXACT_INTEGERS:
        return None
    return _exact(_INTEGER[name](*values), out.dtype)


def _compare_integers(name: str, left: sympy.Expr, right: sympy.Expr) -> Boolean:
    if name in ("eq", "ne"):
        equal = sympy.And(AtLeastZero(left - right), AtLeastZero(right - left))
        return equal if name == "eq" else sympy.Not(equal)
    if name in ("gt", "ge"):
        left, right = right, left
    return AtLeastZero(right - left - (1 if name in ("lt", "gt") else 0))


def _liveness(name: str, operands: list[Operand], out: SymbolicTensor) -> Element | None:
    """``data == 0`` and ``data != 0``: the only comparisons of unknown integers that mean liveness."""
    data, zero = operands[0], operands[-1]
    if name not in ("eq", "ne") or not isinstance(data, SymbolicTensor) or not isinstance(zero, (int, float)):
        return None
    element = data.element
    if not isinstance(element, Datum) or not element.integral or zero != 0:
        return None
    live = Live(element.name, *element.index)
    return Truth(live if name == "ne" else sympy.Not(live))


# Operators whose result never shares memory with an argument.
FRESH = frozenset(
    [*_POINTWISE, "ones", "ones_like", "new_ones", "zeros", "zeros_like", "new_zeros", "full", "new_full", "full_like"]
    + ["arange", "tril", "triu", "where", "masked_fill", "clone", "logical_not", "lt", "le", "gt", "ge"]
)
