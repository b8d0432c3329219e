"""What launches and allocates alike in every call of a layout: parts of the plans of forward, backward and states.

Plans are worked out once for each layout of the inputs and each set of options, and hold no tensors.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch

from ..backend import Documents
from . import tiling
from .documents import count_documents, ids_and_bounds
from .kernels import gradients_kernel, walk_kernel
from .launch import Launch, cdiv
from .tiling import precision


class Memory(NamedTuple):
    """Of a result: its layout."""

    size: tuple[int, ...]
    strides: tuple[int, ...]

    def new(self, like: torch.Tensor) -> torch.Tensor:
        """Allocated, with the dtype and the device of ``like``."""
        return like.new_empty_strided(self.size, self.strides)

    def stride(self) -> tuple[int, ...]:
        return self.strides


def dense(*size: int) -> Memory:
    strides = [1]
    for n in size[:0:-1]:
        strides.insert(0, strides[0] * max(n, 1))
    return Memory(size, tuple(strides))


def tokens_like(x: torch.Tensor, heads: int, dim: int) -> Memory:
    """``[B, T, heads, dim]``; as a view of ``[T, B, heads, dim]``, Megatron's order, where x is one."""
    (B, T), token = x.shape[:2], heads * dim
    if B > 1 and x.stride(0) < x.stride(1):
        return Memory((B, T, heads, dim), (token, B * token, dim, 1))
    return dense(B, T, heads, dim)


def strides_of(x: torch.Tensor | Memory | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]


def rows_of(x: torch.Tensor, pieces: int) -> tuple[int, int]:
    """Number of sequences in ``[B, pieces * T, ...]``, and T. Splitting pieces off as rows would need a copy."""
    return x.shape[0] * pieces, x.shape[1] // pieces


def first_row(rows: int, segments: int, splits: int, reverse: bool) -> int:
    """Split of the first of so many split states. The last segment's (reversed the first's) are not needed."""
    return splits if reverse and rows < segments * splits else 0


def by_row(documents: Documents | None) -> bool:
    """Whether states are those of sequences, and not of documents."""
    return documents is None or documents.by_row


def kind_of(documents: Documents | None) -> Hashable:
    """What plans depend on of documents."""
    return None if documents is None else (documents.bounds.shape[1], documents.by_row)


def leaving_state(
    entering: torch.Tensor | None, like: tuple[int, ...], has_empty: bool, device: torch.device
) -> torch.Tensor:
    """Memory for outgoing states. Kernels skip empty sequences, whose state passes unchanged: it is filled in here."""
    if not has_empty:
        return torch.empty(like, device=device, dtype=torch.float32)
    return torch.zeros(like, device=device, dtype=torch.float32) if entering is None else entering.clone()


def kernels(overlapped: bool) -> tuple:
    """Those of a walk and of gradients."""
    if not overlapped:
        return walk_kernel, gradients_kernel
    from . import hopper  # not under Triton's interpreter, nor with releases that lack Gluon

    return hopper.hopper_walk_kernel, hopper.hopper_gradients_kernel


def early(after_states: bool) -> dict[str, bool]:
    """Options of a launch that may start while the one before it runs."""
    return dict(launch_pdl=True) if after_states else {}


def walk(
    q, k, v, o, *, H: int, rows: int, incoming: bool, outgoing: bool = False, documents: Documents | None,
    split_len: int, splits: int, pieces: int = 1, reverse: bool = False, scale: float = 1.0,
    after_states: bool = False,
) -> Launch:  # fmt: skip
    """``walk_kernel`` for o and the outgoing states, or without q for ``rows`` states of splits.

    Its tensors: q, k, v, o, log_decay, split_states, incoming, outgoing, ids and bounds of documents. ``after_states``:
    the launch before this one, on its stream, computes the states of splits.
    """
    (B, T), (heads, K), V = rows_of(k, pieces), k.shape[2:], v.shape[-1]
    segments, states_only, packed = cdiv(T, split_len * splits), q is None, documents is not None
    overlapped = (
        not states_only and tiling.o_gains(K, V, packed) and (by_row(documents) or not (incoming or outgoing))
        and tiling.overlaps(q, k, v, K=K, V=V, segments=(split_len * splits,))
    )  # fmt: skip
    tiles = (
        tiling.hopper_tiles(K, V) if overlapped
        else tiling.tiles_of(v.dtype, K, V, T <= 16, states_only and not packed)
    )  # fmt: skip
    given = rows > 0, incoming, outgoing
    return Launch(
        kernels(overlapped)[0], cdiv(V, tiles.BV) * H * (rows if states_only else segments) * B,
        (*strides_of(q), *strides_of(k), *strides_of(v), *strides_of(o), H // heads, pieces, count_documents(documents),
         T, H, split_len, splits, segments, rows, first_row(rows, segments, splits, reverse),
         1.0 if reverse else scale, scale if reverse else 1.0),
        (K, V, tiles.BK, tiles.BV, tiles.BC, tiles.num_stages, reverse, *given, packed, after_states) if overlapped else
        (K, V, tiles.BK, tiles.BV, tiles.BC, reverse, states_only, *given, packed, by_row(documents),
         *precision(v.dtype)),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, scratch=overlapped,
        **early(overlapped and after_states),
    )  # fmt: skip


class SplitStates:
    """Plan of the states ``[B, rows, H, K, V]`` fp32 of the splits that other segments need, or of ``every`` one."""

    def __init__(
        self, k, v, H: int, *, incoming: bool, documents, split_len, splits, pieces=1, reverse=False, scale=1.0,
        every=False,
    ) -> None:  # fmt: skip
        (B, T), K = rows_of(k, pieces), k.shape[3]
        self.rows = (cdiv(T, split_len * splits) - (not every)) * splits if T else 0
        self._memory = dense(B, self.rows, H, K, v.shape[-1])
        self._incoming = incoming and not by_row(documents)  # those of documents enter inside parts
        if self.rows:
            self._launch = walk(
                None, k, v, None, H=H, rows=self.rows, incoming=self._incoming, documents=documents,
                split_len=split_len, splits=splits, pieces=pieces, reverse=reverse, scale=scale,
            )  # fmt: skip

    def __call__(self, k, v, log_decay, incoming, documents) -> torch.Tensor | None:
        """None of no rows."""
        if not self.rows:
            return None
        states = self._memory.new(log_decay)  # which is fp32, too
        incoming = incoming if self._incoming else None
        self._launch(None, k, v, None, log_decay, states, incoming, None, *ids_and_bounds(documents))
        return states
