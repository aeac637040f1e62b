"""Runs a Gluon kernel's own source on the host, on a model of the parts of Gluon that it uses.

The model is as unkind as a GPU may be: a copy fills its buffer with NaN at once and lands at any later moment, in any order; a
product reads its operands only when it is waited for; groups of warps take turns at random. A barrier that is waited for in the
wrong phase, or at which too few arrive, is a `Deadlock`, and a buffer overwritten or read too early gives wrong numbers.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from triton.runtime.jit import JITFunction

LAYOUTS = ("NVMMADistributedLayout", "SliceLayout", "DotOperandLayout", "BlockedLayout")


class Deadlock(RuntimeError):
    """Every group of warps waits, and no copy is on its way."""


class Schedule:
    """Lets one group of warps run at a time, chosen at random where one waits."""

    def __init__(self, seed: int) -> None:
        self.dice, self.changed = random.Random(seed), threading.Condition()
        self.ready: dict[int, Callable[[], bool]] = {}  # by the number of a group: whether it may go on
        self.turn: int | None = None
        self.copies: list[Callable[[], None]] = []
        self.failure: BaseException | None = None

    def run(self, groups: list[Callable[[], None]]) -> None:
        """Run groups to their ends, and raise what one of them raised."""
        self.ready = {number: lambda: True for number in range(len(groups))}
        threads = [threading.Thread(target=self._run, args=item) for item in enumerate(groups)]
        with self.changed:
            for thread in threads:
                thread.start()
            self._choose()
        for thread in threads:
            thread.join()
        if self.failure:
            raise self.failure

    def _run(self, number: int, group: Callable[[], None]) -> None:
        CURRENT.number = number
        try:
            self._await_turn(number)
            with np.errstate(divide="ignore", invalid="ignore"):  # in rows past a tile's end, which are not stored
                group()
        except BaseException as failure:  # noqa: BLE001 raised again by `run`
            self.failure = self.failure or failure
        with self.changed:
            del self.ready[number]
            self._choose()

    def _await_turn(self, number: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.turn == number or self.failure)
        if self.failure:
            raise self.failure

    def pause(self, ready: Callable[[], bool]) -> None:
        """Let others run until it is ready and its turn."""
        number = CURRENT.number
        with self.changed:
            self.ready[number] = ready
            self._choose()
        self._await_turn(number)

    def _choose(self) -> None:
        """Give the turn to a group that is ready, after landing some of the copies."""
        self.turn = None
        while self.ready and not self.failure:
            able = [number for number, ready in self.ready.items() if ready()]
            if self.copies and (not able or self.dice.random() < 0.3):
                self.copies.pop(self.dice.randrange(len(self.copies)))()
            elif able:
                self.turn = self.dice.choice(able)
                break
            else:
                self.failure = Deadlock("every group waits")
        self.changed.notify_all()


CURRENT = threading.local()


class Block(np.ndarray):
    """Values of a group's registers."""

    type = SimpleNamespace(layout=None)

    def to(self, dtype: Any) -> Any:
        """Return the values rounded."""
        return self.astype(dtype)


def block(values: Any) -> Any:
    """Return an array or a number as `Block`."""
    return np.asarray(values).view(Block)


@dataclass
class Pointer:
    """Addresses into a flat array."""

    array: np.ndarray
    offset: Any = 0

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.array, self.offset + offset)

    @property
    def dtype(self) -> SimpleNamespace:
        """Type of a pointer."""
        return SimpleNamespace(element_ty=self.array.dtype)


@dataclass
class Barrier:
    """An mbarrier: a phase ends when all have arrived and all expected bytes have come."""

    count: int = 0
    missing: int = 0
    bytes: int = 0
    phases: int = 0

    def change(self, arrivals: int, expected: int) -> None:
        """Count arrivals, and bytes that are expected or, negative, have come."""
        self.missing -= arrivals
        self.bytes += expected
        assert self.missing >= 0 and self.count, "more arrivals than the barrier was made for, or it was not made"
        if not self.missing and not self.bytes:
            self.phases += 1
            self.missing = self.count


@dataclass
class Buffers:
    """Tiles in shared memory."""

    dtype: Any
    items: list[Any]

    def index(self, number: Any) -> Any:
        """Return one tile."""
        return self.items[int(number)]


@dataclass
class Tile:
    """A tile in shared memory, perhaps seen transposed."""

    values: np.ndarray
    transposed: bool = False

    def permute(self, order: list[int]) -> Tile:
        """Return the tile seen transposed."""
        assert order == [1, 0]
        return Tile(self.values, not self.transposed)

    def read(self) -> np.ndarray:
        """Return what it holds now."""
        return (self.values.T if self.transposed else self.values).astype(np.float32)


@dataclass
class Descriptor:
    """A matrix of which blocks are copied; zeros past its rows."""

    matrix: np.ndarray
    block_shape: list[int]
    layout: Any = None

    @property
    def dtype(self) -> Any:
        """Type of the elements."""
        return self.matrix.dtype

    @property
    def block_type(self) -> SimpleNamespace:
        """Type of a block, of which only the size is asked."""
        return SimpleNamespace(nbytes=int(np.prod(self.block_shape)) * self.matrix.itemsize)

    def block(self, row: int, column: int) -> np.ndarray:
        """Return a block."""
        values = np.zeros(self.block_shape, self.dtype)
        found = self.matrix[row : row + self.block_shape[0], column : column + self.block_shape[1]]
        values[: len(found)] = found
        return values


@dataclass
class Product:
    """A product that was begun."""

    a: Any
    b: Any
    total: np.ndarray
    result: Any = None

    def finish(self) -> None:
        """Read the operands and multiply."""
        a = self.a.read() if isinstance(self.a, Tile) else self.a.astype(np.float32)
        self.result = block(self.total + a @ self.b.read())


@dataclass
class Machine:
    """What a program's calls of Gluon do."""

    schedule: Schedule
    program: int
    products: dict[int, list[Product]] = field(default_factory=dict)

    def gluon(self) -> SimpleNamespace:
        """Return what stands for `triton.experimental.gluon.language`."""
        return SimpleNamespace(
            float32=np.float32, int64=np.int64, constexpr=lambda x: x, static_range=range,
            program_id=lambda axis: self.program,
            arange=lambda start, end, layout=None: block(np.arange(start, end)),
            full=lambda shape, value, dtype, layout=None: block(np.full(shape, value, dtype)),
            zeros=lambda shape, dtype, layout=None: block(np.zeros(shape, dtype)),
            cast=lambda x, dtype: int(x),
            convert_layout=lambda x, layout: x,
            where=lambda condition, a, b: block(np.where(condition, a, np.float32(b))),
            maximum=lambda a, b: block(np.maximum(a, b)),
            max=lambda x, axis: block(np.max(x, axis)),
            sum=lambda x, axis: block(np.sum(x, axis)),
            exp2=lambda x: block(np.exp2(x)),
            log2=lambda x: block(np.log2(x)),
            load=self._load, store=self._store, allocate_shared_memory=self._allocate, warp_specialize=self._specialize,
            **dict.fromkeys(LAYOUTS, lambda *_: None),
        )  # fmt: skip

    def barriers(self) -> SimpleNamespace:
        """Return what stands for `mbarrier`."""
        return SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=lambda barrier, count: vars(barrier).update(count=count, missing=count),
            expect=lambda barrier, count: barrier.change(1, count),
            arrive=lambda barrier: barrier.change(1, 0),
            wait=lambda barrier, phase: self.schedule.pause(lambda: barrier.phases % 2 != phase),
        )

    def load(self, source: Descriptor, place: list[Any], barrier: Barrier, tile: Tile) -> None:
        """Stand for `tma.async_load`."""
        row, column = map(int, place)
        tile.values[:] = np.nan

        def land() -> None:
            tile.values[:] = source.block(row, column)
            barrier.change(0, -source.block_type.nbytes)

        self.schedule.copies.append(land)

    def multiply(self, a: Any, b: Tile, total: np.ndarray, use_acc: bool = True, is_async: bool = False) -> Product:
        """Stand for `warpgroup_mma`."""
        assert is_async
        product = Product(a, b, total if use_acc else np.zeros_like(total))
        self.products.setdefault(CURRENT.number, []).append(product)
        return product

    def wait(self, outstanding: int, deps: list[Any]) -> Any:
        """Stand for `warpgroup_mma_wait`: products end in order, all but so many."""
        begun = self.products[CURRENT.number]
        while len(begun) > outstanding:
            begun.pop(0).finish()
        results = [x.result if isinstance(x, Product) else x for x in deps]
        assert all(x is not None for x in results), "a result is used before its product has ended"
        return results[0] if len(results) == 1 else tuple(results)

    def _load(self, pointer: Pointer, mask: Any = None, other: Any = 0) -> Any:
        if mask is None:
            return int(pointer.array[pointer.offset])
        place = np.where(mask, pointer.offset, 0)
        return block(np.where(mask, pointer.array[place], other))

    def _store(self, pointer: Pointer, values: Any, mask: Any) -> None:
        offset, mask = np.broadcast_to(pointer.offset, values.shape), np.broadcast_to(mask, values.shape)
        pointer.array[offset[mask]] = values[mask]

    def _allocate(self, dtype: Any, shape: list[int], layout: Any) -> Buffers:
        if dtype is np.int64:
            return Buffers(dtype, [Barrier() for _ in range(shape[0])])
        return Buffers(dtype, [Tile(np.full(shape[1:], np.nan, dtype)) for _ in range(shape[0])])

    def _specialize(self, groups: list[Any], warps: list[int], registers: list[int]) -> None:
        assert len(groups) == len(warps) + 1 == len(registers) + 1
        self.schedule.run([lambda f=function, a=arguments: f(*a) for function, arguments in groups])


def run(module: ModuleType, kernel: str, grid: int, *arguments: Any, seed: int = 0, **constants: Any) -> None:
    """Run the programs of a kernel one after the other.

    Args:
        module: of the kernel, with the functions that it calls.
        kernel: its name.
        grid: number of programs.
        arguments: `Pointer` and `Descriptor` in the place of tensors.
        seed: of the order in which groups run and copies land.
        constants: of the kernel.
    """
    for program in range(grid):
        machine = Machine(Schedule(seed + program), program)
        names: dict[str, Any] = {name: getattr(value, "value", value) for name, value in vars(module).items()}
        names |= {"gl": machine.gluon(), "mbarrier": machine.barriers(), "async_load": machine.load}
        names |= {"warpgroup_mma": machine.multiply, "warpgroup_mma_wait": machine.wait}
        for name, value in vars(module).items():
            if isinstance(value, JITFunction):
                names[name] = FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)
        names[kernel](*arguments, **constants)
