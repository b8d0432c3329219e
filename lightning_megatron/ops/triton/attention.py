"""Forward and backward of the operator with Triton.

Whatever follows from the layouts of the inputs and from options is worked out once, in a plan: layouts of results and
states, and launches. A call allocates, and passes addresses.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

from ..kept import keep
from . import tiling
from .documents import count_documents, decay_factors, find_documents, ids_and_bounds
from .final import final_states, local_states
from .launch import ALIGNED, Launch, cdiv
from .plans import (
    SplitStates,
    by_row,
    early,
    first_row,
    kernels,
    kind_of,
    leaving_state,
    rows_of,
    strides_of,
    tokens_like,
    walk,
)  # fmt: skip
from .pointwise import add_heads
from .states import combine
from .step import step
from .symmetric import buffer_words, receive
from .tiling import SplitPlan, precision

__all__ = [
    "DIRECT", "NAME", "backward", "buffer_words", "combine", "decay_factors", "final_states", "find_documents",
    "forward", "gradients_like", "local_states", "outputs_like", "plan_of", "receive",
]  # fmt: skip

NAME = "triton"
DIRECT = True


class _Forward:
    """Plan of a forward."""

    def __init__(self, q, k, v, scale, initial: bool, documents, need_final, split_rows: int | None, pieces) -> None:
        (B, T), (H, K), V = rows_of(q, pieces), q.shape[2:], v.shape[-1]
        whole = by_row(documents)
        self.cut = tiling.plan_for(B, T, H, K, V, q.dtype)
        self._scale, self._o = scale, tokens_like(q, H, V)
        self._final = (B if whole else count_documents(documents), H, K, V) if need_final else None
        self._has_empty = not whole or T == 0
        self._is_step = T == 1 and B > 0 and documents is None and split_rows is None and pieces == 1
        self._launch: Launch | None = None
        if T == 0 or B == 0 or self._is_step:
            return
        cut = dict(documents=documents, split_len=self.cut.split_len, splits=self.cut.splits, pieces=pieces)
        self._states = SplitStates(k, v, H, incoming=initial, **cut)
        self._launch = walk(
            q, k, v, self._o, H=H, rows=self._states.rows if split_rows is None else split_rows, incoming=initial,
            outgoing=need_final, scale=scale, after_states=split_rows is None and self._states.rows > 0, **cut,
        )  # fmt: skip

    def __call__(self, q, k, v, log_decay, initial_state, documents, split_states):
        o, final = self._o.new(q), None
        if self._final is not None:
            final = leaving_state(initial_state, self._final, self._has_empty, q.device)
        if self._launch is not None:
            if split_states is None:
                split_states = self._states(k, v, log_decay, initial_state, documents)
            self._launch(q, k, v, o, log_decay, split_states, initial_state, final, *ids_and_bounds(documents))
        elif self._is_step:
            step(q, k, v, o, log_decay, None, initial_state, final, self._scale)
        return o, final, (split_states,), self.cut


_forwards: dict[Hashable, _Forward] = {}


def forward(q, k, v, log_decay, scale, initial_state, documents, need_final, split_states=None, pieces=1):
    """See ``Backend.forward``."""
    rows = None if split_states is None else split_states.shape[1]
    key = (
        q.dtype, q.device, q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), scale, initial_state is None,
        kind_of(documents), need_final, rows, pieces, torch.are_deterministic_algorithms_enabled(),
        (q.data_ptr() | k.data_ptr() | v.data_ptr()) % ALIGNED == 0,
    )  # fmt: skip
    plan = _forwards.get(key)
    if plan is None:
        plan = keep(
            _forwards, key, _Forward(q, k, v, scale, initial_state is not None, documents, need_final, rows, pieces)
        )  # fmt: skip
    initial_state = None if initial_state is None else initial_state.contiguous()
    return plan(q, k, v, log_decay, initial_state, documents, split_states)


def plan_of(q, v) -> SplitPlan:
    """See ``Backend.plan_of``."""
    B, T, H, K = q.shape
    return tiling.plan_for(B, T, H, int(K), int(v.shape[3]), q.dtype)  # torch.compile may have symbols for numbers


def outputs_like(q, k, v, packed: bool):
    """See ``Backend.outputs_like``."""
    (B, T, H, K), V, cut = q.shape, v.shape[3], plan_of(q, v)
    rows = (cdiv(T, cut.split_len * cut.splits) - 1) * cut.splits if T > 0 else 0
    states = q.new_empty((B, rows, H, K, V), dtype=torch.float32)
    return tokens_like(q, H, V).new(q), states, q.new_empty((1, T) if packed else (0,), dtype=torch.int32)


class _Backward:
    """Plan of a backward, of a forward that was cut as ``cut``."""

    def __init__(
        self, q, k, v, do, scale, initial: bool, documents, split_rows: int, cut: SplitPlan, pieces
    ) -> None:  # fmt: skip
        (B, T), (H, K), V = rows_of(q, pieces), q.shape[2:], v.shape[-1]
        self._cut, self._rows, self._scale, self._pieces = cut, split_rows, scale, pieces
        self._sizes = B, T, H, K, V
        self._results = tokens_like(q, H, K), tokens_like(k, H, K), tokens_like(v, H, V)
        self._kv_heads, self._dtype = k.shape[2], q.dtype
        self._sums = None if self._kv_heads == H else (tokens_like(k, k.shape[2], K), tokens_like(v, k.shape[2], V))
        self._strides = tuple(n for x in (q, k, v, do) for n in strides_of(x))
        self._initial, self._packed, self._documents = initial, documents is not None, count_documents(documents)
        self._by_row = by_row(documents)
        self.has_tokens = T > 0 and B > 0
        segments = cut.split_len * cut.splits, cut.split_len * cut.splits_grad
        self._may_overlap = self.has_tokens and tiling.overlaps(q, k, v, do, K=K, V=V, segments=segments)
        tiles = self._tiles(False)
        # tensor descriptors need splits of whole chunks
        self._descriptors = (
            self.has_tokens and cut.split_len % min(x.BC for x in tiles) == 0 and tiling.has_descriptors(q, k, v, do)
        )
        self._gradients: dict[tuple, Launch] = {}
        self._split_grads = [  # without and with gradients of final states
            SplitStates(
                q, do, H, incoming=given, documents=documents, split_len=cut.split_len, splits=cut.splits_grad,
                pieces=pieces, reverse=True, scale=scale,
            )
            for given in (False, True)
        ]  # fmt: skip

    def _tiles(self, overlapped: bool) -> tuple[tiling.Tiles, tiling.Tiles]:
        _, T, _, K, V = self._sizes
        if overlapped:
            return tiling.hopper_tiles(K, V), tiling.hopper_tiles(V, K)
        return tiling.tiles_of(self._dtype, K, V, T <= 16), tiling.tiles_of(self._dtype, V, K, T <= 16)

    def walks(self, for_kv: bool, for_q: bool, split_rows: int, dfinal: bool, after_states: bool) -> Launch:
        """Of dk and dv, of dq, or all of them; of the ``split_rows`` states of splits that dk and dv have.

        ``after_states``: the launch before this one, on its stream, computes those.
        """
        key = for_kv, for_q, split_rows, dfinal, after_states
        found = self._gradients.get(key)
        return self._walks(*key) if found is None else found

    def _walks(self, for_kv: bool, for_q: bool, split_rows: int, dfinal: bool, after_states: bool) -> Launch:
        overlapped = self._may_overlap and (self._by_row or not (self._initial or dfinal))
        (B, T, H, K, V), (by_v, by_k), cut = self._sizes, self._tiles(overlapped), self._cut
        wide = by_v if by_v.BK >= by_k.BK else by_k
        n_k, n_v, BC = cdiv(K, by_k.BV), cdiv(V, by_v.BV), min(by_v.BC, by_k.BC)
        segments, segments_q = (
            cdiv(T, cut.split_len * n) if wanted else 0
            for n, wanted in ((cut.splits_grad, for_kv), (cut.splits, for_q))
        )
        given = self._rows > 0, split_rows > 0, self._initial, dfinal
        launch = Launch(
            kernels(overlapped)[1], ((n_k + n_v) * segments + n_k * segments_q) * H * B,
            (*self._strides, *[n for x in self._results for n in x.strides[:2]], H // self._kv_heads, self._pieces,
             self._documents, T, H, cut.split_len, cut.splits_grad, segments, split_rows,
             first_row(split_rows, segments, cut.splits_grad, True), cut.splits, segments_q, self._rows, self._scale),
            (K, V, by_v.BK, by_k.BK, by_k.BV, by_v.BV, BC, wide.num_stages, *given, self._packed, after_states)
            if overlapped else
            (K, V, by_v.BK, by_k.BK, by_k.BV, by_v.BV, BC, *given, self._packed, self._by_row, self._descriptors,
             *precision(self._dtype)),
            num_warps=wide.num_warps, num_stages=wide.num_stages, scratch=overlapped or self._descriptors,
            **early(overlapped and after_states),
        )  # fmt: skip
        self._gradients[for_kv, for_q, split_rows, dfinal, after_states] = launch
        return launch

    def __call__(self, q, k, v, log_decay, initial_state, documents, split_states, do, dfinal, split_grads):
        dq, dk, dv = [x.new(q) for x in self._results]
        ids, bounds = ids_and_bounds(documents)
        given = q, k, v, do, dq, dk, dv, log_decay, split_states
        has_tokens, dq_is_left = self.has_tokens, True
        if callable(dfinal):
            if has_tokens:  # the last state is a placeholder: walks for dq do not write it
                self.walks(False, True, 0, False, False)(*given, None, initial_state, None, initial_state, ids, bounds)
            dfinal, dq_is_left = dfinal(), False
        dfinal, dinitial = None if dfinal is None else dfinal.contiguous(), None
        if initial_state is not None:
            has_empty = not self._by_row or not has_tokens
            dinitial = leaving_state(dfinal, initial_state.shape, has_empty, q.device)
        if has_tokens:
            after_states = split_grads is None
            if after_states:
                split_grads = self._split_grads[dfinal is not None](q, do, log_decay, dfinal, documents)
            rows = 0 if split_grads is None else split_grads.shape[1]
            launch = self.walks(True, dq_is_left, rows, dfinal is not None, after_states and rows > 0)
            launch(*given, split_grads, initial_state, dfinal, dinitial, ids, bounds)
        if self._sums is not None:
            sums = [x.new(q) for x in self._sums]
            add_heads(dk, dv, *sums)
            dk, dv = sums
        return dq, dk, dv, dinitial


_backwards: dict[Hashable, _Backward] = {}


def backward(q, k, v, log_decay, scale, initial_state, documents, saved, plan, do, dfinal, split_grads=None, pieces=1):
    """See ``Backend.backward``: given a function as ``dfinal``, dq is launched before the function is called."""
    (split_states,) = saved
    rows = 0 if split_states is None else split_states.shape[1]
    aligned = (q.data_ptr() | k.data_ptr() | v.data_ptr() | do.data_ptr()) % ALIGNED == 0
    key = (
        q.dtype, q.device, q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), do.stride(), scale,
        initial_state is None, kind_of(documents), rows, plan, pieces, aligned,
    )  # fmt: skip
    found = _backwards.get(key)
    if found is None:
        found = keep(
            _backwards, key,
            _Backward(q, k, v, do, scale, initial_state is not None, documents, rows, plan, pieces),
        )  # fmt: skip
    initial_state = None if initial_state is None else initial_state.contiguous()
    return found(q, k, v, log_decay, initial_state, documents, split_states, do, dfinal, split_grads)


def gradients_like(q, k, v):
    """See ``Backend.gradients_like``."""
    H, K, V, kv_heads = *q.shape[2:], v.shape[3], k.shape[2]
    shapes = (q, H, K), (k, kv_heads, K), (v, kv_heads, V)
    dq, dk, dv = (tokens_like(x, heads, dim).new(x) for x, heads, dim in shapes)
    return dq, dk, dv
