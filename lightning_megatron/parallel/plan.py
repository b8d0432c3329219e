"""What the ranks have agreed on, and what follows from it: which chunks of the sequence each rank holds."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch.distributed as dist

from ..ops.backend import Backend


@dataclass(frozen=True)
class ParallelPlan:
    group: dist.ProcessGroup
    layout: str
    exchange: str
    tokens: tuple[int, ...]  # of each rank
    scale: float
    need_final: bool
    states: bool  # enter, or are asked for
    backend: Backend

    @functools.cached_property
    def mine(self) -> tuple[int, ...]:
        return self.chunks_of(self.group.rank())

    def chunks_of(self, rank: int) -> tuple[int, ...]:
        """The chunks of a rank in the order of its tokens."""
        return (rank,) if self.layout == "contiguous" else (rank, 2 * self.group.size() - 1 - rank)

    def owner(self, chunk: int) -> int | None:
        """The rank that holds a chunk; None where there is no such chunk."""
        if not 0 <= chunk < self.count:
            return None
        return chunk if self.layout == "contiguous" else min(chunk, self.count - 1 - chunk)

    @functools.cached_property
    def count(self) -> int:
        """Chunks of the sequence; bound i is where chunk i begins, bound ``count`` the end."""
        return self.group.size() * (1 if self.layout == "contiguous" else 2)

    @functools.cached_property
    def in_order(self) -> tuple[int, ...]:
        """All chunks in the order of ranks."""
        return tuple(c for rank in range(self.group.size()) for c in self.chunks_of(rank))

    def entrances(self, reverse: bool) -> tuple[int, ...]:
        """The bounds where states enter this rank's chunks."""
        return tuple(c + 1 if reverse else c for c in self.mine)

    @property
    def total(self) -> int:
        return sum(self.tokens)

    @property
    def equal(self) -> bool:
        """Whether all chunks are of one length; not asked of documents that are cut one by one."""
        return len(set(self.tokens)) == 1

    @property
    def length(self) -> int:
        """Tokens of each of this rank's chunks."""
        return self.tokens[self.group.rank()] // len(self.mine)

    @property
    def bounds(self) -> tuple[int, ...]:
        """Where chunks begin and end in the whole sequence."""
        lengths = self.tokens if self.layout == "contiguous" else [self.length] * self.count
        return tuple(sum(lengths[:i]) for i in range(self.count + 1))

    @property
    def starts(self) -> tuple[int, ...]:
        """Where this rank's chunks begin in the whole sequence."""
        if self.layout == "contiguous":
            return (sum(self.tokens[: self.group.rank()]),)
        return tuple(c * self.length for c in self.mine)
