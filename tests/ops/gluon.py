"""Runs the kernels of ``ops/triton/hopper.py`` and ``fused.py`` on CPU tensors, one program after the other.

Triton's interpreter does not know Gluon. These are the few operations that the kernels use, on torch's tensors: shared
memory, copies by the copy engine, products. What is asynchronous happens as early as it may, when it is asked for, or
as late as it may, when it is waited for. A buffer that is filled while it is still read, or read before it is filled,
gives other results in one of the two. What was not waited for cannot be computed with. What threads have stored may be
read by what is asynchronous after a fence and a barrier.

Warpgroups that run apart take turns: one that leads runs until it waits for another, one that does not until it has
told something to another, so that what the leader no longer waits for is as far behind as it may be.
"""

from __future__ import annotations

import functools
import math
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from lightning_megatron.ops.triton import fused, hopper, walk


@dataclass
class Pointer:
    """Addresses of elements of a tensor's memory; ``offset`` is a number or a tensor of them."""

    memory: torch.Tensor  # flat
    offset: Any = 0

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)

    def __sub__(self, offset: Any) -> Pointer:
        return self + -offset

    def load(self, mask: torch.Tensor | None, other: float = 0) -> torch.Tensor:
        if mask is None:
            return self.memory[self.offset]
        return torch.where(mask, self.memory[torch.where(mask, self.offset, 0)], other)

    def store(self, value: torch.Tensor, mask: torch.Tensor) -> None:
        self.memory[self.offset[mask]] = value[mask]


def pointer(x: torch.Tensor | None) -> Pointer | None:
    """To the first element of a tensor, whatever its strides."""
    if x is None:
        return None
    count = x.untyped_storage().nbytes() // x.element_size()
    return Pointer(torch.as_strided(x, (count,), (1,), 0), x.storage_offset())


@dataclass
class Stored:
    """What a warpgroup has stored."""

    places: range
    by: int
    is_fenced: bool = False


@dataclass
class Shared:
    """Shared memory, of which views are others. ``stored``: what threads have stored that is not yet for all to see."""

    data: torch.Tensor
    stored: list[Stored]

    def index(self, i: int) -> Shared:
        return Shared(self.data[int(i)], self.stored)

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.data.permute(order), self.stored)

    def slice(self, start: int, length: int, dim: int) -> Shared:
        return Shared(self.data.narrow(dim, start, length), self.stored)

    def load(self, layout: Any) -> torch.Tensor:
        return self.data.clone()

    def store(self, value: torch.Tensor) -> None:
        assert value.dtype == self.data.dtype and value.shape == self.data.shape
        self.data.copy_(value)
        self.stored.append(Stored(self.places(), threading.get_ident()))

    def places(self) -> range:
        """From the first to the last."""
        first, steps = self.data.data_ptr(), zip(self.data.shape, self.data.stride(), strict=True)
        return range(first, first + self.data.element_size() * (1 + sum((n - 1) * step for n, step in steps)))

    def may_be_read(self) -> bool:
        here = self.places()
        return not any(x.places.start < here.stop and here.start < x.places.stop for x in self.stored)


@dataclass
class Barrier:
    """Counts phases: one ends when as many as it counts have arrived, and all bytes that it expects have come."""

    count: int = 0
    phases: int = 0
    arrivals: int = 0
    missing: int = 0
    copies: list[Callable] = field(default_factory=list)  # not yet done

    def arrived(self, arrivals: int, count: int) -> None:
        self.arrivals += arrivals
        self.missing -= count
        assert self.arrivals <= self.count, "more arrivals than are counted"
        if self.arrivals == self.count and self.missing == 0:
            self.phases, self.arrivals = self.phases + 1, 0


@dataclass
class Descriptor:
    base: Pointer
    shape: list[int]
    strides: list[int]
    block: list[int]

    def places(self, coordinates: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Addresses of a block, and which of them are inside of the tensor."""
        ranges = [int(c) + torch.arange(n) for c, n in zip(coordinates, self.block, strict=True)]
        inside = (ranges[0] < int(self.shape[0]))[:, None] & (ranges[1] < int(self.shape[1]))[None, :]
        return self.base.offset + ranges[0][:, None] * self.strides[0] + ranges[1][None, :] * self.strides[1], inside


@dataclass
class Product:
    """An accumulator that is computed at some time before it is waited for."""

    compute: Callable[[], torch.Tensor]
    value: torch.Tensor | None = None

    def finish(self) -> torch.Tensor:
        if self.value is None:
            self.value = self.compute()
        return self.value


class Turns:
    """Of threads that run one at a time, as the warpgroups of a program, which are numbered."""

    def __init__(self, leader: int | None) -> None:
        self.leader = leader
        self.tokens: list[threading.Semaphore] = []
        self.running, self.failed = [], False

    def run(self, functions: list[Callable]) -> None:
        self.tokens = [threading.Semaphore(0) for _ in functions]
        self.running, errors = list(range(len(functions))), []

        def one(me: int) -> None:
            self.tokens[me].acquire()
            try:
                if not self.failed:
                    with torch.no_grad():  # threads do not inherit it
                        functions[me]()
            except BaseException as error:
                self.failed = True
                errors.append(error)
            following = self.after(me)
            self.running.remove(me)
            if following != me:
                self.tokens[following].release()

        threads = [threading.Thread(target=one, args=(i,)) for i in range(len(functions))]
        for thread in threads:
            thread.start()
        self.tokens[self.leader or 0].release()
        for thread in threads:
            thread.join()
        self.tokens = []
        if errors:
            raise errors[0]

    def after(self, me: int) -> int:
        return self.running[(self.running.index(me) + 1) % len(self.running)]

    def give(self, me: int) -> None:
        """To the next; comes back when it is this one's turn again."""
        following = self.after(me)
        if following != me:
            self.tokens[following].release()
            self.tokens[me].acquire()
        assert not self.failed, "another warpgroup has failed"


class Machine:
    """One program, or a warpgroup of it: its number, and what it has begun and not finished."""

    def __init__(self, program: int, programs: int, warps: int, late: bool, turns: Turns, group: int = 0) -> None:
        self.program, self.programs, self.warps, self.late = program, programs, warps, late
        self.turns, self.group = turns, group
        self.stored: list[Stored] = []
        self.products: list[Product] = []
        self.stores: list[Callable] = []
        self.read: list[Callable] = []

    def language(self) -> SimpleNamespace:
        layout = lambda *args, **kwargs: None
        layout.get_default_for = layout
        number = lambda x: torch.tensor(x) if not isinstance(x, torch.Tensor) else x
        return SimpleNamespace(
            NVMMADistributedLayout=layout, NVMMASharedLayout=layout, DotOperandLayout=layout, SliceLayout=layout,
            SwizzledSharedLayout=layout,
            BlockedLayout=layout, to_tensor=number, cast=lambda x, dtype: x.to(dtype),
            sum=lambda x, axis: x.sum(axis),
            float32=torch.float32, int32=torch.int32, int64=torch.int64, static_range=range,
            num_warps=lambda: self.warps, num_programs=lambda axis: torch.tensor(self.programs),
            program_id=lambda axis: torch.tensor(self.program), thread_barrier=self.meet,
            arange=lambda start, end, layout=None: torch.arange(start, end),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            cdiv=lambda a, b: -(-a // b), exp=torch.exp, exp2=torch.exp2,
            where=lambda c, a, b: torch.where(number(c), number(a), number(b)),
            minimum=lambda a, b: torch.minimum(number(a), number(b)),
            maximum=lambda a, b: torch.maximum(number(a), number(b)),
            convert_layout=lambda x, layout: x,
            load=lambda p, mask=None, other=0: p.load(mask, other), store=lambda p, x, mask: p.store(x, mask),
            allocate_shared_memory=self.allocate, warp_specialize=self.specialize,
        )  # fmt: skip

    def specialize(self, parts: list[tuple[Callable, tuple]], warps: list[int], registers: list[int]) -> None:
        groups = [self]
        for group, count in enumerate(warps, 1):
            groups.append(Machine(self.program, self.programs, count, self.late, self.turns, group))
            groups[-1].stored = self.stored
        self.turns.run(
            [functools.partial(x.world()[f.__name__], *given) for x, (f, given) in zip(groups, parts, strict=True)]
        )
        for group in groups[1:]:
            group.arrived(group.program)

    def fence(self) -> None:
        for x in self.stored:
            x.is_fenced |= x.by == threading.get_ident()

    def meet(self) -> None:
        me = threading.get_ident()
        self.stored[:] = [x for x in self.stored if x.by != me or not x.is_fenced]

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
        if dtype == torch.int64:  # barriers
            barriers = [Barrier() for _ in range(shape[0])]
            return SimpleNamespace(index=lambda i: barriers[int(i)])
        return Shared(torch.full(shape, math.nan, dtype=dtype), self.stored)

    def barriers(self) -> SimpleNamespace:
        return SimpleNamespace(
            MBarrierLayout=lambda: None, init=lambda b, count: setattr(b, "count", count), invalidate=lambda b: None,
            expect=self.expect, wait=self.wait_for_phase, arrive=self.arrive,
        )  # fmt: skip

    def arrive(self, barrier: Barrier, count: int) -> None:
        barrier.arrived(count, 0)
        if self.turns.leader != self.group:
            self.turns.give(self.group)

    def expect(self, barrier: Barrier, count: int, pred: Any = True) -> None:
        if pred:
            assert barrier.missing == 0, "the phase before has not ended"
            barrier.arrived(1, -count)

    def wait_for_phase(self, barrier: Barrier, phase: Any, pred: Any = True) -> None:
        if not pred:
            return
        for turn in range(100):
            while barrier.copies:
                barrier.copies.pop(0)()
            if barrier.phases % 2 != int(phase):
                return
            assert turn < 99 and self.turns.tokens, "waits for a phase that nothing ends"
            self.turns.give(self.group)

    def copies(self) -> SimpleNamespace:
        return SimpleNamespace(
            make_tensor_descriptor=lambda base, shape, strides, block, layout: Descriptor(base, shape, strides, block),
            async_copy_global_to_shared=self.copy_in, async_copy_shared_to_global=self.copy_out,
            store_wait=self.wait_for_stores,
        )  # fmt: skip

    def copy_in(self, descriptor: Descriptor, start: list[Any], barrier: Barrier, to: Shared, pred: Any = True) -> None:
        if not pred:
            return
        places, inside = descriptor.places(start)

        def copy() -> None:
            to.data.copy_(Pointer(descriptor.base.memory, places).load(inside))
            barrier.arrived(0, to.data.numel() * to.data.element_size())

        to.data.fill_(math.nan)  # from now on nobody may read what was there
        barrier.copies.append(copy) if self.late else copy()

    def copy_out(self, descriptor: Descriptor, start: list[Any], source: Shared) -> None:
        assert source.may_be_read(), "copies what lacks a fence or a barrier"
        places, inside = descriptor.places(start)

        def read() -> Callable:
            data = source.data.clone()
            return lambda: Pointer(descriptor.base.memory, places).store(data, inside)

        self.stores.append(read) if self.late else read()()

    def wait_for_stores(self, pending: int) -> None:
        """Their buffers have been read then; ``arrived`` waits until they are in memory."""
        while len(self.stores) > pending:
            self.read.append(self.stores.pop(0)())

    def arrived(self, i: torch.Tensor) -> torch.Tensor:
        self.wait_for_stores(0)
        while self.read:
            self.read.pop(0)()
        return i

    def multiply(self, a: Any, b: Shared, into: Any, use_acc: bool = True, is_async: bool = False) -> Product:
        assert is_async and (not isinstance(a, Product)) and a is not None
        for x in (a, b):
            assert not isinstance(x, Shared) or x.may_be_read(), "multiplies what lacks a fence or a barrier"

        def compute() -> torch.Tensor:
            x = (a.data if isinstance(a, Shared) else a).float() @ b.data.float()
            if not use_acc:
                return x
            return x + (into.finish() if isinstance(into, Product) else into)

        product = Product(compute)
        self.products.append(product)
        if not self.late:
            product.finish()
        return product

    def wait_for_products(self, pending: int, deps: list[Product]) -> torch.Tensor | tuple[torch.Tensor, ...]:
        while len(self.products) > pending:
            self.products.pop(0).finish()
        assert all(product.value is not None for product in deps), "what is waited for may still run"
        return deps[0].value if len(deps) == 1 else tuple(product.value for product in deps)

    def world(self) -> dict[str, Any]:
        """The kernels' functions, for which Gluon's names are those of this machine."""
        names = vars(walk) | vars(hopper) | vars(fused)
        world = names | dict(
            gl=self.language(), tl=self.language(), tma=self.copies(), mbarrier=self.barriers(),
            warpgroup_mma=self.multiply, warpgroup_mma_wait=self.wait_for_products,
            fence_async_shared=self.fence, gdc_wait=lambda: None,
            UNDERFLOW=walk.UNDERFLOW.value, LOG2E=hopper.LOG2E.value,
        )  # fmt: skip
        for name, function in names.items():
            if hasattr(function, "fn"):
                code = function.fn
                world[name] = types.FunctionType(code.__code__, world, name, code.__defaults__)
        world |= dict(_opaque=lambda i: i, _rounded=lambda x: x.to(torch.bfloat16), _stored=self.arrived)
        return world


def run(kernel: Any, grid: int, arguments: tuple, warps: int, late: bool, turns: Turns) -> None:
    """All programs of a kernel. ``arguments`` are CPU tensors, numbers and None, in the order of its parameters."""
    given = [
        pointer(x) if x is None or isinstance(x, torch.Tensor)
        else torch.tensor(x) if type(x) is int and not parameter.is_constexpr else x
        for parameter, x in zip(kernel.params, arguments, strict=True)
    ]  # fmt: skip
    for program in range(grid):
        machine = Machine(program, grid, warps, late, turns)
        machine.world()[kernel.fn.__name__](*given)
        machine.arrived(machine.program)
