"""How time and memory are measured, and the floors they are compared with.

Times of the GPU alone: event pairs around every call are all recorded while the GPU still sleeps, so that a slow host
cannot show up between them. Calls rotate over inputs that together do not fit the L2 cache.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .peers import BHTD

BATCH = 20  # calls queued behind one sleep: with a dozen launches each, well under what the queue to the GPU holds
CYCLES_PER_MS = 2_000_000  # of torch.cuda._sleep, at most; a slower clock sleeps longer
MAX_MS = 2000.0  # a measurement takes about this long at most, but five calls at least
MAX_COPIES = 64
DEVICE = "cuda"


@dataclass(frozen=True)
class Shape:
    """Sizes of q ``[B, T, H, K]``, k ``[B, T, Hkv, K]`` and v ``[B, T, Hkv, V]`` in a dtype of 2 bytes."""

    B: int
    T: int
    H: int
    K: int = 128
    V: int = 128
    Hkv: int | None = None

    @property
    def kv_heads(self) -> int:
        return self.Hkv or self.H

    def input_bytes(self) -> int:
        """q, k and v."""
        return 2 * self.B * self.T * (self.H * self.K + self.kv_heads * (self.K + self.V))

    def forward_bytes(self) -> int:
        """Least traffic: q, k, v read, o written."""
        return self.input_bytes() + 2 * self.B * self.T * self.H * self.V

    def backward_bytes(self) -> int:
        """Least traffic: q, k, v, do read, dq, dk, dv written."""
        return 2 * self.input_bytes() + 2 * self.B * self.T * self.H * self.V

    def state_bytes(self) -> int:
        """One state of each head, fp32."""
        return 4 * self.B * self.H * self.K * self.V

    def columns(self) -> dict[str, int]:
        return dict(B=self.B, T=self.T, H=self.H, Hkv=self.kv_heads, K=self.K, V=self.V)


def floor_ms(traffic: int, gb_per_s: float) -> float:
    """Time in ms that ``traffic`` bytes take at a bandwidth."""
    return traffic / gb_per_s * 1e-6


class Timing(NamedTuple):
    """Median of one call; ``host_bound`` if the host could not queue the calls while the GPU slept."""

    ms: float
    calls: int
    host_bound: bool


def _warm_up(calls: Sequence[Callable]) -> tuple[float, float]:
    """(ms of the host, ms in all) per call, once everything is compiled."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for call in itertools.islice(itertools.cycle(calls), 3):
        call()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    return host * 1e3 / 3, (time.perf_counter() - start) * 1e3 / 3


def _batch(calls: Iterator[Callable], count: int, sleep_ms: float) -> tuple[list[float], bool]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    awake = torch.cuda.Event()
    torch.cuda._sleep(int(sleep_ms * CYCLES_PER_MS))
    awake.record()
    for start, end in events:
        call = next(calls)
        start.record()
        call()
        end.record()
    host_bound = awake.query()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events], host_bound


def gpu_time(calls: Sequence[Callable], repeats: int) -> Timing:
    """Median time of one call on the GPU. ``calls`` do the same on different inputs and take turns."""
    host_ms, total_ms = _warm_up(calls)
    repeats = max(min(repeats, 5), min(repeats, int(MAX_MS / total_ms)))
    turns, times, host_bound = itertools.cycle(calls), [], False
    sleep_ms = 1 + 1.5 * host_ms * min(BATCH, repeats)
    while len(times) < repeats:
        for _ in range(3):
            batch, late = _batch(turns, min(BATCH, repeats - len(times)), sleep_ms)
            if not late:
                break
            sleep_ms = min(3 * sleep_ms, 500)
        times += batch
        host_bound |= late
    return Timing(statistics.median(times), repeats, host_bound)


def eager_ms(calls: Sequence[Callable], repeats: int) -> float:
    """Wall time of one call, host included: many calls, one wait at the end; median of five such rounds."""
    _warm_up(calls)
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for call in itertools.islice(itertools.cycle(calls), repeats):
            call()
        torch.cuda.synchronize()
        rounds.append((time.perf_counter() - start) * 1e3 / repeats)
    return statistics.median(rounds)


def graph_ms(calls: Sequence[Callable], repeats: int) -> float:
    """Time of one call in a CUDA graph that holds all of ``calls``, on the GPU."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return gpu_time([graph.replay], repeats).ms / len(calls)


def copy_bandwidth() -> float:
    """GB/s of a copy of 1 GiB, reads and writes counted."""
    source = torch.randint(256, (1 << 30,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / gpu_time([lambda: target.copy_(source)], 20).ms * 1e-6


def extra_bytes(attn: Callable, q, k, v, do) -> int:
    """Peak memory of forward and backward beyond q, k, v, do, o, dq, dk and dv."""
    for _ in range(2):  # the first run compiles and autotunes
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        o = attn(q, k, v)
        gradients = torch.autograd.grad(o, (q, k, v), do)
        torch.cuda.synchronize()
        results = sum(x.numel() * x.element_size() for x in (o, *gradients))
        extra = torch.cuda.max_memory_allocated() - before - results
        del o, gradients
    return max(0, extra)


def copies_beyond_cache(footprint: int) -> int:
    """How many inputs of ``footprint`` bytes are at least twice the L2 cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(MAX_COPIES, math.ceil(2 * cache / footprint))


def bounds(lengths: Sequence[int]) -> torch.Tensor:
    """``cu_seqlens`` of documents of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)


def random_inputs(shape: Shape, layout: str, grad: bool) -> tuple[torch.Tensor, ...]:
    """q, k, v and do in bf16, contiguous in ``layout``, from the global generator."""
    B, T, H, Hkv = shape.B, shape.T, shape.H, shape.kv_heads
    made = []
    for heads, dim in ((H, shape.K), (Hkv, shape.K), (Hkv, shape.V), (H, shape.V)):
        size = (B, heads, T, dim) if layout == BHTD else (B, T, heads, dim)
        made.append(torch.randn(size, dtype=torch.bfloat16, device=DEVICE))
    for x in made[:3]:
        x.requires_grad_(grad)
    return tuple(made)
