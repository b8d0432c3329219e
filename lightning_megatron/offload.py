"""Keeps what full recompute keeps, the input of every layer, in pinned host memory until the backward needs it.

One copy stream a GPU. A layer's input leaves while the next layer computes, and comes back while the layer after it is
recomputed and differentiated. The compute stream waits for copies, the host never does. An input's memory on the GPU is
freed after the compute stream waits for its copy, so that the allocator knows at once what is free; ``record_stream``
would tell it only when the copy is done, and a host that runs ahead would allocate anew.

The last checkpoint of a stage keeps its input on the GPU: its backward is the first to come.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

SLAB = 64 * 2**20  # bytes; torch rounds pinned memory up to a power of two, which costs up to half of one large buffer
_MADE_BY = "_lightning_made_by"  # attribute of a checkpoint's output: the Offloaded of its input


class HostMemory:
    """Pinned buffers that are used again and again, in pieces of ``SLAB`` bytes and one smaller power of two."""

    def __init__(self) -> None:
        self.free: dict[int, list[torch.Tensor]] = defaultdict(list)
        self.bytes = 0  # allocated so far

    def take(self, size: int, pinned: bool) -> list[torch.Tensor]:
        """Buffers of uint8 that hold ``size`` bytes together, each full but the last."""
        whole, rest = divmod(size, SLAB)
        pieces = [SLAB] * whole + ([1 << (rest - 1).bit_length()] if rest else [])
        return [self.free[piece].pop() if self.free[piece] else self._allocate(piece, pinned) for piece in pieces]

    def give(self, buffers: list[torch.Tensor]) -> None:
        for buffer in buffers:
            self.free[buffer.numel()].append(buffer)

    def _allocate(self, size: int, pinned: bool) -> torch.Tensor:
        try:
            buffer = torch.empty(size, dtype=torch.uint8, device="cpu", **(dict(pin_memory=True) if pinned else {}))
        except RuntimeError as error:
            raise RuntimeError(
                f"--lightning-offload-activations has {self.bytes / 2**30:.1f} GiB of pinned host memory and cannot "
                f"get more ({error}): it takes 2 bytes x hidden size x tokens x layers of a GPU (docs/memory.md); "
                "use more GPUs for a sequence, fewer processes a node, or leave it out"
            ) from error
        self.bytes += size
        return buffer


class Offloader:
    """Runs checkpoints so that their first argument waits on the host for the backward."""

    def __init__(self) -> None:
        self.memory = HostMemory()
        self.sent = 0  # tensors copied to the host so far
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def checkpoint(self, run: Callable, hidden: torch.Tensor, *rest: Any) -> Any:
        """``run(hidden, *rest)``, a checkpoint that saves its arguments for the backward.

        Args:
            run: returns a tensor, or a tuple whose first item is one: what the next checkpoint is called with.
            hidden: ``[s, b, h]``. It goes to the host when ``run`` is called with the next one, and is then freed
                here, as soon as the caller lets go of it.
            rest: stays where it is; tensors of a batch that all layers share.

        Returns:
            What ``run`` returns.

        Example::

            offloader = Offloader()
            for layer in layers:
                x = offloader.checkpoint(partial(checkpoint, layer, use_reentrant=True), x)
        """
        if not (torch.is_grad_enabled() and isinstance(hidden, torch.Tensor) and hidden.requires_grad):
            return run(hidden, *rest)
        before: Offloaded | None = getattr(hidden, _MADE_BY, None)
        here = Offloaded(self, hidden, before)
        address, shape = hidden.data_ptr(), hidden.shape

        def pack(tensor: torch.Tensor) -> torch.Tensor | Offloaded:
            return here if tensor.data_ptr() == address and tensor.shape == shape else tensor

        if before is not None:
            before.send()
        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            outputs = run(hidden, *rest)
        if before is not None:
            before.leave()
        setattr(outputs[0] if isinstance(outputs, tuple) else outputs, _MADE_BY, here)
        return outputs


def _unpack(packed: torch.Tensor | Offloaded) -> torch.Tensor:
    return packed.get() if isinstance(packed, Offloaded) else packed


class Offloaded:
    """The input of one checkpoint: on the GPU, on its way, or on the host. ``before`` is needed next in a backward."""

    def __init__(self, owner: Offloader, tensor: torch.Tensor, before: Offloaded | None) -> None:
        self.owner, self.before = owner, before
        self.tensor: torch.Tensor | None = tensor.detach()
        self.like = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        self.shape = tensor.shape
        self.buffers: list[torch.Tensor] | None = None  # on the host, while the values are there
        self.arrived: torch.cuda.Event | None = None  # of the last copy, either way

    def send(self) -> None:
        """Begin the copy to the host, of what the compute stream has written by now."""
        if self.tensor is None or self.buffers is not None or not self.tensor.is_contiguous():
            return
        values = _bytes(self.tensor)
        self.buffers = self.owner.memory.take(values.numel(), pinned=values.is_cuda)
        self._copy(self.buffers, values.split(SLAB))
        self.owner.sent += 1

    def leave(self) -> None:
        """Let the compute stream wait for that copy, and free the memory here."""
        if self.buffers is not None:
            self._wait()
            self.tensor = None

    def fetch(self) -> None:
        """Begin the copy back."""
        if self.buffers is None or self.tensor is not None:
            return
        self.tensor = self.like.new_empty(self.shape)  # of the compute stream, which is the one to free it
        self._copy(_bytes(self.tensor).split(SLAB), self.buffers)
        self._give_back()

    def get(self) -> torch.Tensor:
        """The values on the GPU, once; and begin to fetch those that the backward needs next.

        Raises:
            RuntimeError: a second backward through the same graph.
        """
        self.fetch()
        tensor, before = self.tensor, self.before
        if tensor is None:
            raise RuntimeError(
                "a backward went twice through layers whose inputs were on the host and are given back; do not retain "
                "the graph, or leave --lightning-offload-activations out"
            )
        self._wait()
        self._give_back()
        self.tensor = self.before = None
        if before is not None:
            before.fetch()
        return tensor

    def _give_back(self) -> None:
        if self.buffers is not None:
            self.owner.memory.give(self.buffers)  # the next copy into them waits in the same stream
            self.buffers = None

    def _copy(self, to: Any, values: Any) -> None:
        if not self.like.is_cuda:
            self._fill(to, values)
            return
        stream = self.owner.stream(self.like.device)
        stream.wait_stream(torch.cuda.current_stream(self.like.device))
        with torch.cuda.stream(stream):
            self._fill(to, values)
            self.arrived = stream.record_event()

    @staticmethod
    def _fill(to: Any, values: Any) -> None:
        for target, source in zip(to, values, strict=True):
            size = min(target.numel(), source.numel())  # the last buffer is longer
            target[:size].copy_(source[:size], non_blocking=True)

    def _wait(self) -> None:
        if self.arrived is not None:
            torch.cuda.current_stream(self.like.device).wait_event(self.arrived)
            self.arrived = None


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor as uint8, one-dimensional."""
    return tensor.view(-1).view(torch.uint8)
