"""The chunks of a rank: as the operator takes them, what they add to the state, what of it is left between them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..ops.memo import keep


@dataclass(frozen=True)
class Plan:
    """What the ranks have agreed on."""

    group: dist.ProcessGroup
    layout: str
    exchange: str
    tokens: tuple[int, ...]  # of each rank
    scale: float
    need_final: bool
    states: bool  # enter, or are asked for
    implementation: object

    @functools.cached_property
    def chunks(self) -> list[tuple[int, ...]]:
        """Of each rank, its chunks in the order of its tokens."""
        P = self.group.size()
        return [(r,) if self.layout == "contiguous" else (r, 2 * P - 1 - r) for r in range(P)]

    @property
    def mine(self) -> tuple[int, ...]:
        return self.chunks[self.group.rank()]

    @functools.cached_property
    def in_order(self) -> tuple[int, ...]:
        """All chunks in the order of ranks."""
        return tuple(c for chunks in self.chunks for c in chunks)

    @functools.cached_property
    def owner(self) -> dict[int, int]:
        """The rank of every chunk."""
        return {c: r for r, chunks in enumerate(self.chunks) for c in chunks}

    @functools.cached_property
    def bounds(self) -> tuple[int, ...]:
        """Where chunks begin and end in the whole sequence; not for documents that are cut one by one."""
        lengths = self.tokens if self.layout == "contiguous" else [self.tokens[0] // 2] * (2 * len(self.tokens))
        bounds = [0]
        for n in lengths:
            bounds.append(bounds[-1] + n)
        return tuple(bounds)


class Chain:
    """What is left of a state on the way from one bound of the chunks to another; forward and backward ask for the same.

    R independent chains run over the same chunks: the rows of a batch, or documents that are cut one by one.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple, torch.Tensor] = {}

    def factors(self, pairs: tuple[tuple[int, int], ...]) -> torch.Tensor:
        """``[pairs, R or 1, H or 1]`` from one bound to another that is not before it."""
        if pairs not in self._kept:
            self._kept[pairs] = self._factors(pairs)
        return self._kept[pairs]

    def weights(self, places: tuple[int, ...], chunks: tuple[int, ...], reverse: bool) -> torch.Tensor:
        """``[places, chunks, R or 1, H or 1]``: left at bounds ``places`` of what chunks add; 0 of those that come later."""
        key = places, chunks, reverse
        if key not in self._kept:
            self._kept[key] = self._weights(*key)
        return self._kept[key]

    def _weights(self, places, chunks, reverse):
        pairs = {
            (p, c): (p, c) if reverse else (c + 1, p) for p in places for c in chunks if (c >= p if reverse else c < p)
        }
        none = torch.zeros_like(self.factors(((0, 0),))[0])
        found = dict(zip(pairs, self.factors(tuple(pairs.values())), strict=True)) if pairs else {}
        return torch.stack([torch.stack([found.get((p, c), none) for c in chunks]) for p in places])


class Decay(Chain):
    """``bounds [N+1, R or 1]`` of the N chunks, in tokens."""

    def __init__(self, log_decay: torch.Tensor, bounds: torch.Tensor) -> None:
        super().__init__()
        self.log_decay, self.bounds = log_decay, bounds

    def _factors(self, pairs):
        a, b = (torch.stack([self.bounds[pair[side]] for pair in pairs]) for side in (0, 1))
        return torch.exp((b - a)[..., None] * self.log_decay)  # the difference in integers: fp32 ends at 2^24 tokens


class SameDocument(Chain):
    """Nothing is left where a document begins on the way. The same for all layers."""

    def __init__(self, plan: Plan, cu_seqlens: torch.Tensor) -> None:
        super().__init__()
        self.cu_seqlens = cu_seqlens.long()
        self.bounds, mine = _constant(plan.bounds, cu_seqlens.device), _constant(plan.mine, cu_seqlens.device)
        self.a, self.b = self.bounds[mine, None], self.bounds[mine + 1, None]
        # bounds of all documents in each chunk of this rank, from its own first token on [chunks, N + 1], as kernels take them
        self.inside = (torch.minimum(torch.maximum(self.cu_seqlens, self.a), self.b) - self.a).to(torch.int32)

    def _factors(self, pairs):
        a, b = (torch.stack([self.bounds[pair[side]] for pair in pairs])[:, None] for side in (0, 1))
        return ~((self.cu_seqlens >= a) & (self.cu_seqlens <= b)).any(-1)[:, None, None]


class Both(Chain):
    """Decay within a document."""

    def __init__(self, decay: Decay, same: SameDocument) -> None:
        super().__init__()
        self.decay, self.same = decay, same

    def _factors(self, pairs):
        return self.decay.factors(pairs) * self.same.factors(pairs)

    def _weights(self, *key):
        return self.decay.weights(*key) * self.same.weights(*key)


class _Rows:
    """Chunks of R rows of a batch, packed or not, ``count`` of each on this rank: sequences of their own to the operator."""

    by_document = False

    def __init__(self, plan: Plan, log_decay: torch.Tensor, cu_seqlens: torch.Tensor | None) -> None:
        self.log_decay, self.count = log_decay.detach().contiguous(), len(plan.mine)
        self.pieces = self.count  # that the operator finds in a row of the batch
        self.cu_seqlens, self.chain = None, _decay(plan, log_decay)
        if cu_seqlens is not None:
            same = _same_document(plan, cu_seqlens)
            self.cu_seqlens, self.chain = same.inside, Both(self.chain, same)

    def begin(self, states: torch.Tensor | None, whole: torch.Tensor | None) -> torch.Tensor | None:
        """States ``[chunks, R, ...]`` that enter the chunks from the left, as initial states of the pieces."""
        return None if states is None else states.transpose(0, 1).flatten(0, 1)

    end = begin

    def own_states(self, implementation, k, v, initial, mail, **how) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What the chunks add ``[chunks, R, ...]``, or None if it went off with the ``mail``; what the operator need not compute
        again."""
        how |= dict(pieces=self.pieces, mail=mail)
        states, parts = implementation.end_states(k, v, self.log_decay, initial, self.cu_seqlens, **how)
        return None if states is None else self._by_chunk(states), parts

    def _by_chunk(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(0, (-1, self.count)).transpose(0, 1)


class _CutApart(_Rows):
    """Documents that are cut one by one are the rows; the operator takes all their chunks as one packed sequence."""

    pieces = 1

    def __init__(self, plan: Plan, log_decay: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
        self.log_decay, self.count = log_decay.detach().contiguous(), len(plan.mine)
        bounds, self.cu_seqlens = keep(cu_seqlens, plan, lambda x: _cut_apart(plan, x))
        self.chain = Decay(self.log_decay, bounds)

    def own_states(self, implementation, k, v, initial, mail, **how) -> tuple[torch.Tensor, None]:
        assert mail is None  # messages would differ in size from batch to batch
        return self._by_chunk(implementation.final_states(k, v, self.log_decay, initial, self.cu_seqlens, **how)), None


class _Documents:
    """Chunks of a packed sequence whose documents have states of their own.

    A piece is what a document has in a chunk, chunk by chunk all documents, most of them empty. Only the document
    of a chunk's first token may have begun before, and only that of its last token goes on behind it.
    """

    by_document, pieces = True, 1

    def __init__(self, plan: Plan, log_decay: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
        self.log_decay, device, same = (
            log_decay.detach().contiguous(),
            log_decay.device,
            _same_document(plan, cu_seqlens),
        )
        cu_seqlens, inside, a, b = same.cu_seqlens, same.inside, same.a, same.b
        before = (b - a).cumsum(0) - (b - a)
        self.cu_seqlens = torch.cat(((inside + before)[:, :-1].flatten(), (b - a).sum(0)))
        self.documents = cu_seqlens.numel() - 1
        self.inside, self.lengths = inside, [plan.bounds[c + 1] - plan.bounds[c] for c in plan.mine]
        offset = torch.arange(len(plan.mine), device=device) * self.documents
        self.firsts = torch.searchsorted(cu_seqlens, a[:, 0], right=True) - 1 + offset
        self.lasts = torch.searchsorted(cu_seqlens, b[:, 0] - 1, right=True) - 1 + offset
        filled = inside[:, 1:] > inside[:, :-1]
        self.begins = (filled & (cu_seqlens[:-1] >= a))[..., None, None, None]
        self.ends = (filled & (cu_seqlens[1:] <= b))[..., None, None, None]
        self.empty = (cu_seqlens.diff() == 0)[:, None, None, None] & (plan.group.rank() == 0)  # rank 0 answers for them
        self.chain = Both(_decay(plan, log_decay), same)

    def begin(self, states: torch.Tensor | None, whole: torch.Tensor | None) -> torch.Tensor | None:
        """What enters the chunks ``[chunks, 1, ...]``, and ``whole [N, ...]`` where documents begin, as states of pieces."""
        return self._place(states, whole, self.firsts, self.begins)

    def end(self, states: torch.Tensor | None, whole: torch.Tensor | None) -> torch.Tensor | None:
        return self._place(states, whole, self.lasts, self.ends)

    def _place(self, states, whole, pieces, places):
        if states is None and whole is None:
            return None
        found = None if whole is None else torch.where(places, whole, 0.0).flatten(0, 1)
        if states is None:
            return found
        if found is None:
            found = states.new_zeros(self.begins.shape[0] * self.documents, *states.shape[2:])
        return found.index_add(0, pieces, states[:, 0])

    def own_states(self, implementation, k, v, initial, mail, **how) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What the chunks add to the state of their last document, reversed of their first ``[chunks, 1, ...]``."""
        initial = [None] * len(self.lengths) if initial is None else initial.unflatten(0, (len(self.lengths), -1))
        chunks = zip(
            range(len(self.lengths)), *(x.split(self.lengths, dim=1) for x in (k, v)), initial, self.inside, strict=True
        )
        own = [
            implementation.end_states(k, v, self.log_decay, s, bounds, mail=mail, first=c, **how)[0]
            for c, k, v, s, bounds in chunks
        ]
        return None if mail else torch.stack(own), None  # parts of a chunk are not those of all tokens

    def documents_beginning(self, states: torch.Tensor, of_empty: torch.Tensor | None) -> torch.Tensor:
        """States of pieces for the documents ``[N, ...]`` that begin on this rank, 0 for the others."""
        return self._documents(states, of_empty, self.begins)

    def documents_ending(self, states: torch.Tensor, of_empty: torch.Tensor | None) -> torch.Tensor:
        return self._documents(states, of_empty, self.ends)

    def _documents(self, states, of_empty, places):
        found = torch.where(places, states.unflatten(0, (-1, self.documents)), 0.0).sum(0)
        return found if of_empty is None else torch.where(self.empty, of_empty, found)


def local(plan: Plan, log_decay: torch.Tensor, cu_seqlens: torch.Tensor | None) -> _Rows | _Documents:
    if plan.layout == "zigzag-documents":
        return _CutApart(plan, log_decay, cu_seqlens)
    return (_Documents if plan.states and cu_seqlens is not None else _Rows)(plan, log_decay, cu_seqlens)


def _decay(plan: Plan, log_decay: torch.Tensor) -> Decay:
    return keep(log_decay, plan, lambda x: Decay(x, _constant(plan.bounds, x.device)[:, None]), constant=True)


def _same_document(plan: Plan, cu_seqlens: torch.Tensor) -> SameDocument:
    return keep(cu_seqlens, plan, lambda x: SameDocument(plan, x))


def _cut_apart(plan: Plan, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds of the chunks of every document ``[chunks + 1, N]``, and of all its chunks on this rank one behind the other."""
    chunks = 2 * plan.group.size()
    lengths = cu_seqlens.diff() // chunks
    ends = lengths.repeat_interleave(len(plan.mine)).cumsum(0)
    return torch.arange(chunks + 1, device=cu_seqlens.device)[:, None] * lengths, torch.cat((ends.new_zeros(1), ends))


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """On the device, where a copy would wait for all that is launched."""
    return torch.tensor(values, device=device)
