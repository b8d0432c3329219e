"""How the chunks of a rank go to the operator, and what they add to the state."""

from __future__ import annotations

import torch

from ..ops.backend import Destination, Documents
from .plan import ParallelPlan


class Rows:
    """Chunks of the rows of a batch, packed or not: each is a sequence of its own to the operator.

    Attributes:
        log_decay: ``[H]``.
        documents: of all chunks, found for this call; None if not packed.
        pieces: chunks that the operator finds in a row of the batch.
        by_document: whether documents have states of their own, which initial_state and final_state of the caller then
            are.
    """

    by_document = False

    def __init__(self, plan: ParallelPlan, log_decay: torch.Tensor, cu_seqlens: torch.Tensor | None) -> None:
        self.plan, self.log_decay, self.pieces = plan, log_decay, len(plan.mine)
        self.documents = self._find(cu_seqlens) if cu_seqlens is not None else None

    def _find(self, cu_seqlens: torch.Tensor) -> Documents:
        plan = self.plan
        return plan.backend.find_documents(cu_seqlens, plan.length, plan.total, starts=plan.starts)

    def initial_states(self, incoming: torch.Tensor | None, own: torch.Tensor | None) -> torch.Tensor | None:
        """The operator's initial states, from those that enter the chunks ``[chunks, R, ...]``, and the documents'
        ``own``.
        """
        return None if incoming is None else incoming.transpose(0, 1).flatten(0, 1)

    final_grads = initial_states  # the same in reversed time: gradients of final states

    def local_states(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        initial: torch.Tensor | None,
        destination: Destination | None,
        reverse: bool = False,
        scale: float = 1.0,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What the chunks add ``[chunks, R, ...]``, or None if it went to the ``destination``; and the states of
        splits, which the operator need not compute again. Reversed, of (q, do).
        """
        states, split_states = self.plan.backend.local_states(
            k, v, self.log_decay, initial, self.documents, reverse, scale, self.pieces, destination
        )
        return None if states is None else self._by_chunk(states), split_states

    def _by_chunk(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(0, (-1, len(self.plan.mine))).transpose(0, 1)


class PerDocument(Rows):
    """Per-document zigzag: documents are the rows; the operator takes all their chunks as one packed sequence."""

    def __init__(self, plan: ParallelPlan, log_decay: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
        super().__init__(plan, log_decay, cu_seqlens)
        self.pieces = 1

    def _find(self, cu_seqlens: torch.Tensor) -> Documents:
        plan = self.plan
        tokens = plan.tokens[plan.group.rank()]
        return plan.backend.find_documents(cu_seqlens, tokens, plan.total, per_document=plan.count)

    def local_states(self, k, v, initial, destination, reverse=False, scale=1.0):
        assert destination is None  # messages would differ in size from batch to batch
        states = self.plan.backend.final_states(k, v, self.log_decay, initial, self.documents, reverse, scale)
        return self._by_chunk(states), None


class DocumentStates:
    """Chunks of a packed sequence whose documents have states of their own.

    A piece is what a document has in a chunk, chunk by chunk all documents, most of them empty. Only the document
    of a chunk's first token may have begun before, and only that of its last token goes on behind it.
    """

    by_document, pieces = True, 1

    def __init__(self, plan: ParallelPlan, log_decay: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
        self.plan, self.log_decay = plan, log_decay
        n, starts = plan.length, plan.starts
        ids, bounds, _ = plan.backend.find_documents(cu_seqlens, n, plan.total, starts=starts)
        chunks, N = bounds.shape[0], bounds.shape[1] - 1
        self.count = N
        self.chunks = [
            Documents(None if ids is None else ids[c : c + 1], bounds[c : c + 1], by_row=False) for c in range(chunks)
        ]
        number = torch.arange(chunks, device=bounds.device, dtype=torch.int32)[:, None]
        edges = torch.cat(((bounds[:, :-1] + number * n).flatten(), number.new_full((1,), chunks * n)))
        self.documents = Documents(None if ids is None else (ids + number * N).view(1, -1), edges[None], by_row=False)
        # pieces that states enter from the left, and from the right
        self.first, self.last = (
            (bounds[:, 1:] <= token).sum(1).clamp(max=N - 1) + number[:, 0] * N for token in (0, n - 1)
        )
        filled = bounds[:, 1:] > bounds[:, :-1]
        begins = torch.stack([cu_seqlens[:-1] >= start for start in starts])
        ends = torch.stack([cu_seqlens[1:] <= start + n for start in starts])
        self.begins, self.ends = ((filled & x)[..., None, None, None] for x in (begins, ends))
        # rank 0 answers for empty documents
        self.empty = (cu_seqlens.diff() == 0)[:, None, None, None] & (plan.group.rank() == 0)

    def initial_states(self, incoming: torch.Tensor | None, own: torch.Tensor | None) -> torch.Tensor | None:
        """Initial states of pieces: what enters the chunks ``[chunks, 1, ...]``, and ``own [N, ...]`` where
        documents begin.
        """
        return self._place(incoming, own, self.first, self.begins)

    def final_grads(self, incoming: torch.Tensor | None, own: torch.Tensor | None) -> torch.Tensor | None:
        """The same in reversed time: gradients of the pieces' final states."""
        return self._place(incoming, own, self.last, self.ends)

    def _place(self, incoming, own, pieces, where):
        if incoming is None and own is None:
            return None
        found = None if own is None else torch.where(where, own, 0.0).flatten(0, 1)
        if incoming is None:
            return found
        if found is None:
            found = incoming.new_zeros(len(self.chunks) * self.count, *incoming.shape[2:])
        return found.index_add(0, pieces, incoming[:, 0])

    def local_states(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        initial: torch.Tensor | None,
        destination: Destination | None,
        reverse: bool = False,
        scale: float = 1.0,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What the chunks add to the state of their last document, reversed of their first ``[chunks, 1, ...]``."""
        count = len(self.chunks)
        initials = [None] * count if initial is None else initial.unflatten(0, (count, -1))
        found = []
        for c, documents in enumerate(self.chunks):
            tokens = slice(c * self.plan.length, (c + 1) * self.plan.length)
            how = documents, reverse, scale, 1, destination, c
            states, _ = self.plan.backend.local_states(k[:, tokens], v[:, tokens], self.log_decay, initials[c], *how)
            found.append(states)
        local = [x for x in found if x is not None]
        return torch.stack(local) if local else None, None  # splits of a chunk are not those of all tokens

    def documents_beginning(self, states: torch.Tensor, of_empty: torch.Tensor | None) -> torch.Tensor:
        """States of pieces for the documents ``[N, ...]`` that begin on this rank, 0 for the others."""
        return self._of_documents(states, of_empty, self.begins)

    def documents_ending(self, states: torch.Tensor, of_empty: torch.Tensor | None) -> torch.Tensor:
        return self._of_documents(states, of_empty, self.ends)

    def _of_documents(self, states, of_empty, where):
        found = torch.where(where, states.unflatten(0, (-1, self.count)), 0.0).sum(0)
        return found if of_empty is None else torch.where(self.empty, of_empty, found)


def chunks_of(plan: ParallelPlan, log_decay: torch.Tensor, cu_seqlens: torch.Tensor | None) -> Rows | DocumentStates:
    """This rank's chunks, with documents found anew from ``cu_seqlens``, which may have changed without a trace."""
    if cu_seqlens is None:
        return Rows(plan, log_decay, None)
    if plan.layout == "zigzag-documents":
        return PerDocument(plan, log_decay, cu_seqlens)
    return (DocumentStates if plan.states else Rows)(plan, log_decay, cu_seqlens)
