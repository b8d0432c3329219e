"""Forward and backward of the operator with Triton: chooses tiles, splits and segments, allocates, launches."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from ..backend import Destination, Documents
from .documents import count_documents, decay_factors, find_documents, ids_and_bounds
from .kernels import gradients_kernel, walk_kernel
from .launch import KNOWN_TRITON, cdiv, launch, pad
from .states import combine, reduce_splits
from .step import step
from .symmetric import buffer_words, receive

__all__ = [
    "DIRECT", "NAME", "backward", "buffer_words", "combine", "decay_factors", "final_states", "find_documents",
    "forward", "local_states", "receive",
]  # fmt: skip

NAME = "triton"
DIRECT = True

# Programs that fill a GPU of about 130 multiprocessors. A constant, so that results do not depend on the GPU.
PROGRAMS = 256
MIN_SEGMENT, MAX_SEGMENTS = 256, 32
MIN_SPLIT, MAX_SPLITS = 1024, 32  # where a segment has several splits
ONE_LAUNCH = 1024  # shorter sequences have one segment
OVERLAP = False  # take hopper.py's kernels where they can be taken: they compile, and were not measured yet


class Tiles(NamedTuple):
    """Tile sizes of one walk: padded head dim, columns per program, tokens per chunk."""

    BK: int
    BV: int
    BC: int
    num_warps: int
    num_stages: int


@functools.cache
def _tiles(dtype: torch.dtype, K: int, V: int, few_tokens: bool, long_chunks: bool = False) -> Tiles:
    """The state's tile [BV, BK] lives in registers, so a wide K needs a narrow BV. Walks that compute only states of
    sequences that are not packed have registers for ``long_chunks``."""
    BK, BV = pad(K), pad(V)
    if dtype == torch.float32:  # plain fp32 arithmetic: correct, not fast
        return Tiles(BK, min(BV, 32), 16 if BK > 128 else 32, 4, 1)
    if BK > 128:
        return Tiles(BK, min(BV, 64), 16, 4, 3)
    return Tiles(BK, min(BV, 64), 16 if few_tokens else 64 if long_chunks else 32, 4, 4)


def _overlapped(*tensors: torch.Tensor, documents: Documents | None, K: int, V: int) -> bool:
    """Whether the kernels of ``hopper.py`` take these tensors."""
    T = tensors[0].shape[1]
    return (
        OVERLAP and documents is None and tensors[0].dtype == torch.bfloat16 and T > 16
        and all(64 <= pad(dim) <= 256 for dim in (K, V))
        and _has_wgmma(tensors[0].device) and _descriptors(*tensors)
    )  # fmt: skip


@functools.cache
def _has_wgmma(device: torch.device) -> bool:
    """Gluon is an experiment of Triton's: what one release compiles another may not."""
    return KNOWN_TRITON and _has_copy_engine(device) and torch.cuda.get_device_capability(device)[0] == 9


def _kernels(overlapped: bool) -> tuple:
    """Those of a walk and of gradients."""
    if not overlapped:
        return walk_kernel, gradients_kernel
    from . import hopper  # not under Triton's interpreter, nor with releases that lack Gluon

    return hopper.hopper_walk_kernel, hopper.hopper_gradients_kernel


@functools.cache
def _hopper_tiles(K: int, V: int) -> Tiles:
    """Two programs of four warps fit a multiprocessor, or one of eight, of which each group of four has 64 columns of
    the state's tile, or half of its K where that is wide. A program for o has as many warps as one for dk."""
    BK, BV = pad(K), pad(V)
    wide = max(BK, BV) > 128
    return Tiles(BK, 128 if wide and BK <= 128 else 64, 64, 8 if wide else 4, 3 if max(BK, BV) == 64 else 2)


class SplitPlan(NamedTuple):
    """How a sequence is cut: tokens per split, a multiple of 64, and splits per segment of the walks."""

    split_len: int
    splits: int  # for o and dq
    splits_grad: int  # for dk and dv


def _plan_splits(T: int, programs: int, programs_grad: int) -> SplitPlan:
    """As few segments as fill a GPU, if one segment has ``programs`` programs (``programs_grad`` for dk and dv).

    Splits are shorter than segments, so that more programs compute their states. Another plan rounds differently. Under
    ``torch.use_deterministic_algorithms`` the plan depends on T alone: a sequence gets the same bits in any batch, and
    a head on any tensor-parallel rank.
    """
    if torch.are_deterministic_algorithms_enabled():
        programs, programs_grad = PROGRAMS // 8, PROGRAMS // 4
    most = 1 if T < ONE_LAUNCH else min(T // MIN_SEGMENT, MAX_SEGMENTS)
    segments, segments_grad = (min(cdiv(PROGRAMS, n), most) for n in (programs, programs_grad))
    count = max(segments, min(cdiv(4 * PROGRAMS, programs), T // MIN_SPLIT, MAX_SPLITS))
    return SplitPlan(cdiv(T, 64 * count) * 64, cdiv(count, segments), cdiv(count, segments_grad))


@functools.cache
def _has_copy_engine(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def _descriptors(*tensors: torch.Tensor) -> bool:
    """Whether the copy engine can move the tiles: tensor descriptors need addresses and strides of 16 bytes."""
    if not _has_copy_engine(tensors[0].device) or tensors[0].dtype == torch.float32:
        return False
    for x in tensors:
        multiple = 16 // x.element_size()
        batch, token, head, _ = x.stride()
        if x.data_ptr() % 16 or batch % multiple or token % multiple or head % multiple or token == 0:
            return False
    triton.set_allocator(_scratch)
    return True


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Allocate memory for the descriptors that programs make."""
    return torch.empty(size, device="cuda", dtype=torch.int8)


def _precision(dtype: torch.dtype) -> tuple[str, bool]:
    """PRECISION and WIDE_STATE of the kernels."""
    return "ieee" if dtype == torch.float32 else "tf32", dtype == torch.float16


def _strides(x: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if x is None else x.stride()[:3]


def _launch_walk(
    q, k, v, o, log_decay, split_states, *, incoming, outgoing=None, documents, reverse=False, split_len, splits,
    pieces=1, scale=1.0, after_states=False,
) -> None:  # fmt: skip
    """Launch ``walk_kernel`` for o and the ``outgoing`` states, or without q for the states of splits.

    ``after_states``: the launch before this one, on this stream, computes ``split_states``.
    """
    (B, T), (heads, K) = _rows_of(k, pieces), k.shape[2:]
    V, H = v.shape[-1], log_decay.numel()
    segments = cdiv(T, split_len * splits)
    states_only = q is None
    doc, bounds = ids_and_bounds(documents)
    overlapped = not states_only and _overlapped(q, k, v, o, documents=documents, K=K, V=V)
    tiles = _hopper_tiles(K, V) if overlapped else _tiles(v.dtype, K, V, T <= 16, states_only and doc is None)
    rows, first = _rows(split_states, segments, splits, reverse)
    given = split_states is not None, incoming is not None, outgoing is not None
    launch(
        _kernels(overlapped)[0], cdiv(V, tiles.BV) * H * (rows if states_only else segments) * B,
        (q, k, v, o, log_decay, split_states, incoming, outgoing, doc, bounds),
        (*_strides(q), *_strides(k), *_strides(v), *_strides(o), H // heads, pieces, count_documents(documents),
         T, H, split_len, splits, segments, rows, first, 1.0 if reverse else scale, scale if reverse else 1.0),
        (K, V, tiles.BK, tiles.BV, tiles.BC, tiles.num_stages, reverse, *given, after_states) if overlapped else
        (K, V, tiles.BK, tiles.BV, tiles.BC, reverse, states_only, *given, doc is not None, _by_row(documents),
         *_precision(v.dtype)),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **_early(overlapped and after_states),
    )  # fmt: skip


def _early(early: bool) -> dict[str, bool]:
    """Options of a launch that may start while the one before it runs."""
    return dict(launch_pdl=True) if early else {}


def _rows_of(x: torch.Tensor, pieces: int) -> tuple[int, int]:
    """Number of sequences in ``[B, pieces * T, ...]``, and T. Splitting pieces off as rows would need a copy."""
    return x.shape[0] * pieces, x.shape[1] // pieces


def _rows(split_states: torch.Tensor | None, segments: int, splits: int, reverse: bool) -> tuple[int, int]:
    """Number of split states, and the first one's split. The last segment's (reversed the first's) are not needed."""
    rows = 0 if split_states is None else split_states.shape[1]
    return rows, splits if reverse and rows < segments * splits else 0


def _split_states(
    k, v, log_decay, *, incoming, documents, split_len, splits, pieces=1, reverse=False, scale=1.0, every=False
) -> torch.Tensor | None:
    """States ``[B, rows, H, K, V]`` fp32 of the splits that other segments need (None of none), or of ``every`` one."""
    (B, T), K = _rows_of(k, pieces), k.shape[3]
    rows = (cdiv(T, split_len * splits) - (not every)) * splits
    if rows == 0:
        return None
    split_states = torch.empty(B, rows, log_decay.numel(), K, v.shape[-1], device=k.device, dtype=torch.float32)
    _launch_walk(  # those of documents enter inside parts
        None, k, v, None, log_decay, split_states, incoming=None if _by_row(documents) else incoming,
        documents=documents, reverse=reverse, split_len=split_len, splits=splits, pieces=pieces, scale=scale,
    )  # fmt: skip
    return split_states


def _by_row(documents: Documents | None) -> bool:
    """Whether states are those of sequences, and not of documents."""
    return documents is None or documents.by_row


def _leaving_state(
    entering: torch.Tensor | None, like: tuple[int, ...], has_empty: bool, device: torch.device
) -> torch.Tensor:
    """Memory for outgoing states. Kernels skip empty sequences, whose state passes unchanged: it is filled in here."""
    if not has_empty:
        return torch.empty(like, device=device, dtype=torch.float32)
    return torch.zeros(like, device=device, dtype=torch.float32) if entering is None else entering.clone()


def _tokens_like(x: torch.Tensor, heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """``[B, T, heads, dim]``; as a view of ``[T, B, heads, dim]``, Megatron's order, where x is one."""
    B, T = x.shape[:2]
    if B > 1 and x.stride(0) < x.stride(1):
        return torch.empty(T, B, heads, dim, device=x.device, dtype=dtype).transpose(0, 1)
    return torch.empty(B, T, heads, dim, device=x.device, dtype=dtype)


def _plan_for(B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype) -> SplitPlan:
    columns_v, columns_k = cdiv(V, _tiles(dtype, K, V, T <= 16).BV), cdiv(K, _tiles(dtype, V, K, T <= 16).BV)
    return _plan_splits(T, max(1, B * H * columns_v), max(1, B * H * (columns_v + columns_k)))


def forward(q, k, v, log_decay, scale, initial_state, documents, need_final, split_states=None, pieces=1):
    """See ``Backend.forward``."""
    (B, T), (H, K) = _rows_of(q, pieces), q.shape[2:]
    V = v.shape[-1]
    packed, by_row = documents is not None, _by_row(documents)
    initial_state = None if initial_state is None else initial_state.contiguous()
    o = _tokens_like(q, H, V, q.dtype)
    final = (
        _leaving_state(
            initial_state, (B if by_row else count_documents(documents), H, K, V), not by_row or T == 0, q.device
        )
        if need_final
        else None
    )
    plan = _plan_for(B, T, H, K, V, q.dtype)
    if T == 0 or B == 0:
        return o, final, (None,), plan
    if T == 1 and not packed and split_states is None and pieces == 1:
        step(q, k, v, o, log_decay, None, initial_state, final, scale)
        return o, final, (None,), plan
    cut = dict(documents=documents, split_len=plan.split_len, splits=plan.splits, pieces=pieces)
    after_states = split_states is None
    if after_states:
        split_states = _split_states(k, v, log_decay, incoming=initial_state, **cut)
        after_states = split_states is not None
    _launch_walk(
        q, k, v, o, log_decay, split_states, incoming=initial_state, outgoing=final, scale=scale,
        after_states=after_states, **cut,
    )  # fmt: skip
    return o, final, (split_states,), plan


def local_states(
    k, v, log_decay, initial_state, documents, reverse=False, scale=1.0, pieces=1,
    destination: Destination | None = None, first=0,
):  # fmt: skip
    """See ``Backend.local_states``."""
    (B, T), K = _rows_of(k, pieces), k.shape[3]
    V, H = v.shape[-1], log_decay.numel()
    if B == 0:
        return None if destination else v.new_empty(0, H, K, V, dtype=torch.float32), None
    plan = _plan_for(B, T, H, K, V, v.dtype)
    split_states, splits = None, plan.splits_grad if reverse else plan.splits
    if T > 0:
        split_states = _split_states(
            k, v, log_decay, incoming=None if initial_state is None else initial_state.contiguous(),
            documents=documents, split_len=plan.split_len, splits=splits, pieces=pieces, reverse=reverse, scale=scale,
            every=True,
        )  # fmt: skip
    states = reduce_splits(
        split_states, log_decay, documents, (B, T, K, V), plan.split_len,
        reverse=reverse, destination=destination, first=first,
    )  # fmt: skip
    return states, split_states if T > plan.split_len * splits else None  # one segment needs none


def final_states(k, v, log_decay, initial_state, documents, reverse=False, scale=1.0):
    """See ``Backend.final_states``."""
    B, T, _, K = k.shape
    V, H, by_row = v.shape[-1], log_decay.numel(), _by_row(documents)
    initial_state = None if initial_state is None else initial_state.contiguous()
    final = _leaving_state(
        initial_state, (B if by_row else count_documents(documents), H, K, V), not by_row or T == 0, k.device
    )
    if T == 0 or B == 0:
        return final
    programs = max(1, B * H * cdiv(V, _tiles(v.dtype, K, V, T <= 16).BV))
    plan = _plan_splits(T, programs, programs)
    cut = dict(documents=documents, split_len=plan.split_len, splits=plan.splits, reverse=reverse, scale=scale)
    split_states = _split_states(k, v, log_decay, incoming=initial_state, **cut)
    q = k[:, :, :1].expand(B, T, H, K)
    _launch_walk(
        q, k, v, _tokens_like(k, H, V, v.dtype), log_decay, split_states, incoming=initial_state, outgoing=final,
        after_states=split_states is not None, **cut,
    )  # fmt: skip
    return final


def backward(q, k, v, log_decay, scale, initial_state, documents, saved, plan, do, dfinal, split_grads=None, pieces=1):
    """See ``Backend.backward``: given a function as ``dfinal``, dq is launched before the function is called."""
    (B, T), (H, K) = _rows_of(q, pieces), q.shape[2:]
    V, kv_heads = v.shape[-1], k.shape[2]
    (split_states,) = saved
    packed, by_row = documents is not None, _by_row(documents)
    dq = _tokens_like(q, H, K, q.dtype)
    dk, dv = _tokens_like(k, H, K, k.dtype), _tokens_like(v, H, V, v.dtype)
    initial_state = None if initial_state is None else initial_state.contiguous()
    overlapped = T > 0 and B > 0 and _overlapped(q, k, v, do, dq, dk, dv, documents=documents, K=K, V=V)
    if overlapped:
        by_v, by_k = _hopper_tiles(K, V), _hopper_tiles(V, K)
    else:
        by_v, by_k = _tiles(q.dtype, K, V, T <= 16), _tiles(q.dtype, V, K, T <= 16)
    wide = by_v if by_v.BK >= by_k.BK else by_k
    n_k, n_v, BC = cdiv(K, by_k.BV), cdiv(V, by_v.BV), min(by_v.BC, by_k.BC)
    tokens = T > 0 and B > 0
    segments, segments_q = (cdiv(T, plan.split_len * n) if tokens else 0 for n in (plan.splits_grad, plan.splits))
    # tensor descriptors need splits of whole chunks
    descriptors = tokens and plan.split_len % BC == 0 and _descriptors(q, k, v, do, dq, dk, dv)

    def walks(segments: int, segments_q: int, split_grads=None, dfinal=None, dinitial=None, after=False) -> None:
        """Launch the walks for dk and dv of ``segments`` segments and those for dq of ``segments_q``; 0: none."""
        split_rows, split_first = _rows(split_grads, segments, plan.splits_grad, True)
        given = split_states is not None, split_grads is not None, initial_state is not None, dfinal is not None
        launch(
            _kernels(overlapped)[1], ((n_k + n_v) * segments + n_k * segments_q) * H * B,
            (q, k, v, do, dq, dk, dv, log_decay, split_states, split_grads, initial_state, dfinal, dinitial,
             *ids_and_bounds(documents)),
            (*_strides(q), *_strides(k), *_strides(v), *_strides(do), *dq.stride()[:2], *dk.stride()[:2],
             *dv.stride()[:2], H // kv_heads, pieces, count_documents(documents), T, H, plan.split_len,
             plan.splits_grad, segments, split_rows, split_first, plan.splits, segments_q,
             _rows(split_states, segments_q, plan.splits, False)[0], scale),
            (K, V, by_v.BK, by_k.BK, by_k.BV, by_v.BV, BC, wide.num_stages, *given, after) if overlapped else
            (K, V, by_v.BK, by_k.BK, by_k.BV, by_v.BV, BC, *given, packed, by_row, descriptors, *_precision(q.dtype)),
            num_warps=wide.num_warps, num_stages=wide.num_stages, **_early(overlapped and after),
        )  # fmt: skip

    if callable(dfinal):
        if tokens:
            walks(0, segments_q, dinitial=initial_state)  # a placeholder: walks for dq do not write it
        dfinal, segments_q = dfinal(), 0
    dfinal = None if dfinal is None else dfinal.contiguous()
    dinitial = None
    if initial_state is not None:
        dinitial = _leaving_state(dfinal, initial_state.shape, not by_row or T == 0, q.device)
    if tokens:
        after = split_grads is None
        if after:
            split_grads = _split_states(
                q, do, log_decay, incoming=dfinal, documents=documents, split_len=plan.split_len,
                splits=plan.splits_grad, pieces=pieces, reverse=True, scale=scale,
            )  # fmt: skip
            after = split_grads is not None
        walks(segments, segments_q, split_grads, dfinal, dinitial, after)
    if kv_heads != H:  # torch adds in fp32
        dk, dv = (x.unflatten(2, (kv_heads, -1)).sum(3) for x in (dk, dv))
    return dq, dk, dv, dinitial
