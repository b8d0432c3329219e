"""Runs the kernels of ``ops/triton/hopper.py`` on CPU tensors, one program after the other.

Triton's interpreter does not know Gluon. These are the few operations that the kernels use, on torch's tensors: shared
memory, copies by the copy engine, products. What is asynchronous happens as early as it may, when it is asked for, or
as late as it may, when it is waited for. A buffer that is filled while it is still read, or read before it is filled,
gives other results in one of the two. What was not waited for cannot be computed with.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from lightning_megatron.ops.triton import hopper, walk


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
class Shared:
    """Shared memory, of which views are others."""

    data: torch.Tensor

    def index(self, i: int) -> Shared:
        return Shared(self.data[int(i)])

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.data.permute(order))

    def slice(self, start: int, length: int, dim: int) -> Shared:
        return Shared(self.data.narrow(dim, start, length))

    def load(self, layout: Any) -> torch.Tensor:
        return self.data.clone()

    def store(self, value: torch.Tensor) -> None:
        assert value.dtype == self.data.dtype and value.shape == self.data.shape
        self.data.copy_(value)


@dataclass
class Barrier:
    """Counts phases: one ends when all bytes that it expects have come."""

    phases: int = 0
    missing: int = 0
    copies: list[Callable] = field(default_factory=list)  # not yet done

    def arrived(self, count: int) -> None:
        self.missing -= count
        self.phases += self.missing == 0


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


class Machine:
    """One program: its number, and what it has begun and not finished."""

    def __init__(self, program: int, programs: int, warps: int, late: bool) -> None:
        self.program, self.programs, self.warps, self.late = program, programs, warps, late
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
            program_id=lambda axis: torch.tensor(self.program), thread_barrier=lambda: None,
            arange=lambda start, end, layout=None: torch.arange(start, end),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            cdiv=lambda a, b: -(-a // b), exp=torch.exp, exp2=torch.exp2,
            where=lambda c, a, b: torch.where(number(c), number(a), number(b)),
            minimum=lambda a, b: torch.minimum(number(a), number(b)),
            maximum=lambda a, b: torch.maximum(number(a), number(b)),
            convert_layout=lambda x, layout: x,
            load=lambda p, mask=None, other=0: p.load(mask, other), store=lambda p, x, mask: p.store(x, mask),
            allocate_shared_memory=self.allocate,
        )  # fmt: skip

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
        if dtype == torch.int64:  # barriers
            barriers = [Barrier() for _ in range(shape[0])]
            return SimpleNamespace(index=lambda i: barriers[int(i)])
        return Shared(torch.full(shape, math.nan, dtype=dtype))

    def barriers(self) -> SimpleNamespace:
        return SimpleNamespace(
            MBarrierLayout=lambda: None, init=lambda b, count: None, invalidate=lambda b: None,
            expect=self.expect, wait=self.wait_for_copies,
        )  # fmt: skip

    def expect(self, barrier: Barrier, count: int, pred: Any = True) -> None:
        if pred:
            assert barrier.missing == 0, "the phase before has not ended"
            barrier.missing = count

    def wait_for_copies(self, barrier: Barrier, phase: Any) -> None:
        for copy in barrier.copies:
            copy()
        barrier.copies.clear()
        assert barrier.phases % 2 != int(phase), "waits for a phase that nothing ends"

    def copies(self) -> SimpleNamespace:
        return SimpleNamespace(
            make_tensor_descriptor=lambda base, shape, strides, block, layout: Descriptor(base, shape, strides, block),
            store_wait=self.wait_for_stores,
        )  # fmt: skip

    def copy_in(self, descriptor: Descriptor, start: list[Any], barrier: Barrier, to: Shared, pred: Any = True) -> None:
        if not pred:
            return
        places, inside = descriptor.places(start)

        def copy() -> None:
            to.store(Pointer(descriptor.base.memory, places).load(inside))
            barrier.arrived(to.data.numel() * to.data.element_size())

        to.data.fill_(math.nan)  # from now on nobody may read what was there
        barrier.copies.append(copy) if self.late else copy()

    def copy_out(self, descriptor: Descriptor, start: list[Any], source: Shared) -> None:
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
        names = vars(walk) | vars(hopper)
        world = names | dict(
            gl=self.language(), tl=self.language(), tma=self.copies(), mbarrier=self.barriers(),
            warpgroup_mma=self.multiply, warpgroup_mma_wait=self.wait_for_products,
            fence_async_shared=lambda: None, gdc_wait=lambda: None,
            UNDERFLOW=walk.UNDERFLOW.value, LOG2E=hopper.LOG2E.value,
        )  # fmt: skip
        for name, function in names.items():
            if hasattr(function, "fn"):
                code = function.fn
                world[name] = types.FunctionType(code.__code__, world, name, code.__defaults__)
        world |= dict(_load=self.copy_in, _store=self.copy_out, _barrier=lambda: None)
        world |= dict(_opaque=lambda i: i, _rounded=lambda x: x.to(torch.bfloat16), _stored=self.arrived)
        return world


def run(kernel: Any, grid: int, arguments: tuple, warps: int, late: bool) -> None:
    """All programs of a kernel. ``arguments`` are CPU tensors, numbers and None, in the order of its parameters."""
    given = [
        pointer(x) if x is None or isinstance(x, torch.Tensor)
        else torch.tensor(x) if type(x) is int and not parameter.is_constexpr else x
        for parameter, x in zip(kernel.params, arguments, strict=True)
    ]  # fmt: skip
    for program in range(grid):
        machine = Machine(program, grid, warps, late)
        machine.world()[kernel.fn.__name__](*given)
        machine.arrived(machine.program)
