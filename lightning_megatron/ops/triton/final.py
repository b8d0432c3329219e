"""States alone, of context-parallel ranks: what chunks add to them, and final states."""

from __future__ import annotations

from collections.abc import Hashable

import torch

from ..backend import Destination
from ..kept import keep
from . import tiling
from .documents import count_documents, ids_and_bounds
from .launch import ALIGNED, Launch, cdiv
from .plans import SplitStates, by_row, kind_of, leaving_state, rows_of, tokens_like, walk
from .states import reduce_splits


class _LocalStates:
    """Plan of ``local_states``."""

    def __init__(self, k, v, H: int, incoming: bool, documents, reverse, scale, pieces) -> None:
        (B, T), K, V = rows_of(k, pieces), k.shape[3], v.shape[-1]
        cut = tiling.plan_for(v, B, T, H, K, V, documents is not None)
        splits = cut.splits_grad if reverse else cut.splits
        self.size, self.split_len = (B, T, K, V), cut.split_len
        self.is_used = T > cut.split_len * splits  # one segment needs none
        self.states = SplitStates(
            k, v, H, incoming=incoming, documents=documents, split_len=cut.split_len, splits=splits, pieces=pieces,
            reverse=reverse, scale=scale, every=True,
        )  # fmt: skip


_local_states: dict[Hashable, _LocalStates] = {}


def local_states(
    k, v, log_decay, initial_state, documents, reverse=False, scale=1.0, pieces=1,
    destination: Destination | None = None, first=0,
):  # fmt: skip
    """See ``Backend.local_states``."""
    H = log_decay.numel()
    if k.shape[0] * pieces == 0:
        return None if destination else v.new_empty(0, H, k.shape[3], v.shape[-1], dtype=torch.float32), None
    key = (*_key(k, v, H, initial_state, documents, reverse, scale), pieces)
    plan = _local_states.get(key)
    if plan is None:
        plan = keep(
            _local_states, key, _LocalStates(k, v, H, initial_state is not None, documents, reverse, scale, pieces)
        )  # fmt: skip
    initial_state = None if initial_state is None else initial_state.contiguous()
    split_states = plan.states(k, v, log_decay, initial_state, documents)
    states = reduce_splits(
        split_states, log_decay, documents, plan.size, plan.split_len,
        reverse=reverse, destination=destination, first=first,
    )  # fmt: skip
    return states, split_states if plan.is_used else None


def _key(k, v, H, initial_state, documents, reverse, scale) -> tuple[Hashable, ...]:
    """What plans of states depend on."""
    return (
        k.dtype, k.device, k.shape, k.stride(), v.shape, v.stride(), H, initial_state is None, kind_of(documents),
        reverse, scale, torch.are_deterministic_algorithms_enabled(),
        (k.data_ptr() | v.data_ptr()) % ALIGNED == 0,
    )  # fmt: skip


class _FinalStates:
    """Plan of ``final_states``."""

    def __init__(self, k, v, H: int, incoming: bool, documents, reverse, scale) -> None:
        (B, T, _, K), V = k.shape, v.shape[-1]
        whole = by_row(documents)
        self.size, self.has_empty = (B if whole else count_documents(documents), H, K, V), not whole or T == 0
        self.launch: Launch | None = None
        if T == 0 or B == 0:
            return
        programs = max(1, B * H * cdiv(V, tiling.tiles_of(v.dtype, K, V, T <= 16).BV))
        plan = tiling.plan_splits(T, programs, programs)
        cut = dict(documents=documents, split_len=plan.split_len, splits=plan.splits, reverse=reverse, scale=scale)
        self.states, self.o = SplitStates(k, v, H, incoming=incoming, **cut), tokens_like(k, H, V)
        q = self.queries(k)
        self.launch = walk(
            q, k, v, self.o, H=H, rows=self.states.rows, incoming=incoming, outgoing=True,
            after_states=self.states.rows > 0, **cut,
        )  # fmt: skip

    def queries(self, k):
        """Any: what is made of them is not used."""
        return k[:, :, :1].expand(-1, -1, self.size[1], -1)


_final_states: dict[Hashable, _FinalStates] = {}


def final_states(k, v, log_decay, initial_state, documents, reverse=False, scale=1.0):
    """See ``Backend.final_states``."""
    H = log_decay.numel()
    key = _key(k, v, H, initial_state, documents, reverse, scale)
    plan = _final_states.get(key)
    if plan is None:
        plan = keep(
            _final_states, key, _FinalStates(k, v, H, initial_state is not None, documents, reverse, scale)
        )  # fmt: skip
    initial_state = None if initial_state is None else initial_state.contiguous()
    final = leaving_state(initial_state, plan.size, plan.has_empty, k.device)
    if plan.launch is not None:
        states = plan.states(k, v, log_decay, initial_state, documents)
        plan.launch(
            plan.queries(k), k, v, plan.o.new(v), log_decay, states, initial_state, final, *ids_and_bounds(documents)
        )  # fmt: skip
    return final
