"""Runs the rendered Hopper kernel on the CPU: Triton interprets its own language there, but not Gluon.

The source that a GPU would compile is executed as Python with a small stand-in for ``gl``: values are numpy arrays in
float64 and int64, shared memory is a dictionary, and the three workers run one after the other. The loading warp goes
first and leaves what it loads in queues; each warp group then takes it out in order. Every wait is checked against the
parity that real barriers would have, so that a kernel which would hang or overtake its data fails here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmi_compile.kernels.hopper_spec import HopperSpec
from mmi_compile.kernels.render import rendered_source


def raw(x: Any) -> Any:
    return x.a if isinstance(x, Value) else x


class Value:
    """A scalar or a tensor in registers."""

    def __init__(self, a: Any) -> None:
        self.a = np.asarray(raw(a))

    def to(self, kind: Any) -> Value:
        return Value(self.a.astype(kind))

    def __getitem__(self, key: Any) -> Value:
        return Value(self.a[key])

    def __bool__(self) -> bool:
        return bool(self.a)

    def __index__(self) -> int:
        return int(self.a)

    __int__ = __index__


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: Value, *others: Any) -> Value:
        return Value(getattr(self.a, name)(*[np.asarray(raw(x)) for x in others]))

    return apply


_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor")
for _name in (*_ARITHMETIC, "lshift", "rshift", "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{_name}__", _operator(f"__{_name}__"))
for _name in _ARITHMETIC:
    setattr(Value, f"__r{_name}__", _operator(f"__r{_name}__"))
Value.__neg__ = _operator("__neg__")  # type: ignore[attr-defined]


class Pointer:
    def __init__(self, memory: Any, offset: Any = 0) -> None:
        self.memory, self.offset = memory, np.asarray(raw(offset))

    def __add__(self, step: Any) -> Pointer:
        return Pointer(self.memory, self.offset + raw(step))


class Descriptor:
    """A four-dimensional tensor, read and written in tiles; what lies beyond its edges reads as zeros."""

    layout = None

    def __init__(self, tensor: Any, rows: int, columns: int) -> None:
        self.tensor, self.rows, self.columns = tensor, rows, columns
        self.block_type = self
        self.nbytes = 1

    def load(self, b: int, h: int, row: int) -> Any:
        tile = np.zeros((self.rows, self.columns))
        assert row >= 0
        part = self.tensor[b, h, row : row + self.rows]
        tile[: part.shape[0], : part.shape[1]] = part
        return tile

    def store(self, b: int, h: int, row: int, tile: Any) -> None:
        part = self.tensor[b, h, row : row + self.rows]
        part[:] = tile[: part.shape[0], : part.shape[1]]


class Slot:
    """One place of a ring in shared memory, or a view of it."""

    def __init__(self, ring: Ring, place: int, turned: bool = False) -> None:
        self.ring, self.place, self.turned = ring, place, turned

    def reshape(self, shape: Any) -> Slot:
        return self

    def permute(self, order: Any) -> Slot:
        return Slot(self.ring, self.place, not self.turned)

    @property
    def content(self) -> Any:
        tile = self.ring.machine.local[self.ring, self.place]
        return tile.T if self.turned else tile

    def store(self, value: Any) -> None:
        if self.ring.machine.loading:
            self.ring.stored.append((self.place, raw(value)))
        else:
            self.ring.machine.local[self.ring, self.place] = raw(value)

    def load(self, layout: Any) -> Value:
        if not self.ring.stored:
            return Value(self.content)
        place, value = self.ring.stored[self.ring.machine.taken[self.ring]]
        self.ring.machine.taken[self.ring] += 1
        assert place == self.place
        return Value(value)


class Ring:
    """A ring of buffers or of barriers; barriers queue what was loaded under each of their phases."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.stored: list[tuple[int, Any]] = []
        self.phases: list[tuple[int, list[tuple[Slot, Any]]]] = []

    def index(self, place: Any) -> Slot:
        return Slot(self, int(place))


class Machine:
    """What the workers share, and what the one that runs at the moment sees of it."""

    def __init__(self, programs: int) -> None:
        self.programs, self.program = programs, 0
        self.begin_worker(loading=True)

    def begin_worker(self, *, loading: bool) -> None:
        self.loading = loading
        self.local: dict[tuple[Ring, int], Any] = {}
        self.taken: dict[Ring, int] = defaultdict(int)
        self.waits: dict[tuple[Ring, int], int] = defaultdict(int)

    def wait(self, barrier: Slot, phase: Any) -> None:
        ring, place = barrier.ring, barrier.place
        count = self.waits[ring, place]
        self.waits[ring, place] += 1
        # The first wait of a worker that fills passes at once, the first of one that reads waits for phase 0.
        assert int(phase) == (count + self.loading) % 2, "a wait for the wrong phase would hang or pass too soon"
        if not self.loading and ring.phases:
            where, loads = ring.phases[self.taken[ring]]
            self.taken[ring] += 1
            assert where == place
            for slot, tile in loads:
                self.local[slot.ring, slot.place] = tile

    def expect(self, barrier: Slot, size: Any) -> None:
        barrier.ring.phases.append((barrier.place, []))

    def load_into(self, desc: Descriptor, at: Any, barrier: Slot, buffer: Slot) -> None:
        where, loads = barrier.ring.phases[-1]
        assert where == barrier.place
        loads.append((buffer, desc.load(*[int(x) for x in at[:3]])))

    def load_tile(self, desc: Descriptor, at: Any, buffer: Slot, ready: Slot, free: Slot, phase: Any) -> None:
        self.wait(free, phase)
        self.expect(ready, 0)
        self.load_into(desc, at, ready, buffer)

    def store_tile(self, desc: Descriptor, at: Any, buffer: Slot) -> None:
        desc.store(*[int(x) for x in at[:3]], buffer.content)

    def specialize(self, workers: Any, warps: Any, registers: Any) -> None:
        *groups, (load, arguments) = workers
        load(*arguments)
        for attend, given in groups:
            self.begin_worker(loading=False)
            attend(*given)


def product(a: Any, b: Slot, acc: Value, use_acc: bool = True, is_async: bool = False) -> Value:
    left = a.content if isinstance(a, Slot) else raw(a)
    scores = (torch.from_numpy(left) @ torch.from_numpy(b.content)).numpy()
    return Value(scores + raw(acc) if use_acc else scores)


class Language:
    """The part of ``gl`` that the kernel uses."""

    int32, int64, uint32, float32 = np.int64, np.int64, np.uint32, np.float64
    bfloat16, float16 = np.float64, np.float64
    static_range = range

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    @staticmethod
    def constexpr(x: Any) -> Any:
        return x

    @staticmethod
    def BlockedLayout(*_: Any) -> None:
        return None

    NVMMADistributedLayout = DotOperandLayout = SliceLayout = SwizzledSharedLayout = BlockedLayout

    def program_id(self, axis: int) -> Value:
        return Value(self.machine.program)

    def num_programs(self, axis: int) -> Value:
        return Value(self.machine.programs)

    def allocate_shared_memory(self, *_: Any) -> Ring:
        return Ring(self.machine)

    def warp_specialize(self, *given: Any) -> None:
        self.machine.specialize(*given)

    @staticmethod
    def load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Value:
        shape = np.broadcast_shapes(pointer.offset.shape, np.shape(raw(mask)))
        asked = np.broadcast_to(raw(mask), shape)
        offset = np.broadcast_to(pointer.offset, shape)
        inside = (offset >= 0) & (offset < pointer.memory.size)
        assert np.all(inside | ~asked), "a load beyond the tensor"
        if not pointer.memory.size:
            return Value(np.full(shape, raw(other)))
        return Value(np.where(asked, pointer.memory[np.where(asked, offset, 0)], raw(other)))

    @staticmethod
    def store(pointer: Pointer, value: Any, mask: Any) -> None:
        shape = np.shape(raw(value))
        asked, offset = np.broadcast_to(raw(mask), shape), np.broadcast_to(pointer.offset, shape)
        pointer.memory[offset[asked]] = raw(value)[asked]

    @staticmethod
    def atomic_add(pointer: Pointer, step: Any) -> Value:
        old = int(pointer.memory[0])
        pointer.memory[0] += step
        return Value(old)

    @staticmethod
    def arange(start: int, stop: int, layout: Any) -> Value:
        return Value(np.arange(start, stop))

    @staticmethod
    def full(shape: Any, value: Any, kind: Any, layout: Any) -> Value:
        return Value(np.full(shape, raw(value), kind))

    @staticmethod
    def zeros(shape: Any, kind: Any, layout: Any) -> Value:
        return Value(np.zeros(shape, kind))

    @staticmethod
    def convert_layout(x: Value, layout: Any) -> Value:
        return x

    where = staticmethod(lambda c, a, b: Value(np.where(raw(c), raw(a), raw(b))))
    minimum = staticmethod(lambda a, b: Value(np.minimum(raw(a), raw(b))))
    maximum = staticmethod(lambda a, b: Value(np.maximum(raw(a), raw(b))))
    cdiv = staticmethod(lambda a, b: Value(-(-raw(a) // raw(b))))
    max = staticmethod(lambda x, axis: Value(raw(x).max(axis)))
    sum = staticmethod(lambda x, axis: Value(raw(x).sum(axis)))
    exp2 = staticmethod(lambda x: Value(np.exp2(raw(x))))


def _namespace(machine: Machine) -> dict[str, Any]:
    class Barriers:
        wait, expect = staticmethod(machine.wait), staticmethod(machine.expect)
        arrive = init = staticmethod(lambda *_, **__: None)
        MBarrierLayout = staticmethod(lambda: None)

    class Gluon:
        @staticmethod
        def jit(function: Any = None, **_: Any) -> Any:
            return function if function is not None else lambda f: f

    def finish(outstanding: int, deps: list[Any]) -> Any:
        return deps[0] if len(deps) == 1 else tuple(deps)

    return {
        "gluon": Gluon, "gl": Language(machine), "mbarrier": Barriers, "load_into": machine.load_into,
        "load_tile": machine.load_tile, "store_tile": machine.store_tile, "store_wait": lambda n: None,
        "fence_async_shared": lambda: None, "warpgroup_mma": product, "warpgroup_mma_wait": finish,
    }  # fmt: skip


class EmulatedKernel:
    """Stands in for a compiled kernel: ``kernel[(programs,)](**arguments)``. Outputs are written in float64 first."""

    def __init__(self, spec: HopperSpec) -> None:
        text = re.sub(r"^from mmi_compile.*?\)  # fmt: skip$", "", rendered_source(spec), flags=re.M | re.S)
        self.source = compile(re.sub(r"^(from|import) triton.*$", "", text, flags=re.M), "hopper kernel", "exec")
        self.spec = spec
        code = self._functions(Machine(1))["attention"].__code__
        self.arg_names = code.co_varnames[: code.co_argcount]

    def _functions(self, machine: Machine) -> dict[str, Any]:
        space = _namespace(machine)
        exec(self.source, space)
        return space

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*, num_warps: int, **arguments: Any) -> None:
            out = arguments["out"] if "out" in arguments else arguments["o_desc"].base
            exact = torch.empty_strided(out.shape, out.stride(), dtype=torch.float64).fill_(float("nan"))
            given = {name: self._argument(name, value, exact) for name, value in arguments.items()}
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # threads that wait for each other cost more than these small products
            for program in range(grid[0]):
                machine = Machine(grid[0])
                machine.program = program
                with np.errstate(all="ignore"):
                    self._functions(machine)["attention"](**given)
            torch.set_num_threads(threads)
            out.copy_(exact)

        return launch

    def _argument(self, name: str, value: Any, out: Tensor) -> Any:
        if name.endswith("_desc"):
            tensor = out if name == "o_desc" else value.base.double()
            return Descriptor(tensor.numpy(), value.block_shape[2], self.spec.block_d)
        if name == "out":
            return Pointer(_memory(out))
        if isinstance(value, Tensor):
            return Pointer(_memory(value.double() if value.is_floating_point() else value.long()))
        return Value(value)


def _memory(t: Tensor) -> Any:
    """Kernels address memory, not elements: all of a tensor that begins where its storage does."""
    assert t.storage_offset() == 0
    return t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,)).numpy()
