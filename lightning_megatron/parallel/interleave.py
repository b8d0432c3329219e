"""Sequence-parallel ranks exchange rows so that each holds a part of every chunk of the sequence.

Megatron gives rank r the r-th part of a sequence. A chunk would then lie on one rank. Here each of P ranks gets rows
``[r n, (r + 1) n)`` of every chunk of ``P n`` tokens, so that the ranks' rows of one chunk, gathered, are the chunk.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.distributed as dist

Span = tuple[int, int]  # rows of a rank, from the first to behind the last


class Interleave(NamedTuple):
    """The exchange of one rank, both ways.

    Attributes:
        group: the sequence-parallel ranks.
        pieces: rows that go to every rank, in the order of the sequence.
        received: rows that come from every rank.

    Example::

        order = interleave(group, x.shape[0], rows)
        y = order.leave(layer_by_chunks(order.enter(x)))  # [s / P, b, h], as x
    """

    group: dist.ProcessGroup
    pieces: tuple[tuple[Span, ...], ...]
    received: tuple[int, ...]

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """``[s / P, ...]``, this rank's part of the sequence -> its rows of all chunks, chunk after chunk."""
        sent = torch.cat([x[start:stop] for spans in self.pieces for start, stop in spans])
        return self._exchange(sent, self.received, self._sizes())

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """The way back."""
        arrived = self._exchange(x, self._sizes(), self.received)
        output, row = torch.empty_like(arrived), 0
        for spans in self.pieces:
            for start, stop in spans:
                output[start:stop] = arrived[row : row + stop - start]
                row += stop - start
        return output

    def _sizes(self) -> tuple[int, ...]:
        return tuple(sum(stop - start for start, stop in spans) for spans in self.pieces)

    def _exchange(self, x: torch.Tensor, received: tuple[int, ...], sent: tuple[int, ...]) -> torch.Tensor:
        output = torch.empty_like(x)  # of as many rows: every rank holds s / P of them before and after
        dist.all_to_all_single(output, x.contiguous(), list(received), list(sent), group=self.group)
        return output


def interleave(group: dist.ProcessGroup, length: int, rows: int) -> Interleave:
    """For ranks that hold ``length`` rows each, and ``rows`` rows of a chunk; the last chunk may have fewer."""
    return Interleave(group, *_spans(group.rank(), group.size(), length, rows))


@functools.lru_cache(maxsize=64)
def _spans(rank: int, ranks: int, length: int, rows: int) -> tuple[tuple[tuple[Span, ...], ...], tuple[int, ...]]:
    def between(source: int, target: int) -> tuple[Span, ...]:
        """Rows of ``source`` that ``target`` gets."""
        found = []
        for first in range(0, length, rows):
            size = min(rows, length - first)
            start = first * ranks + target * size - source * length
            span = max(0, start), min(length, start + size)
            if span[0] < span[1]:
                found.append(span)
        return tuple(found)

    received = tuple(sum(stop - start for start, stop in between(source, rank)) for source in range(ranks))
    return tuple(between(rank, target) for target in range(ranks)), received
