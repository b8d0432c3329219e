"""Tiles of the kernels, and where sequences are cut: numbers that follow from sizes."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .launch import cdiv, launcher_is_known, pad

# Programs that fill a GPU of about 130 multiprocessors. A constant, so that results do not depend on the GPU.
PROGRAMS = 256
MIN_SEGMENT, MAX_SEGMENTS = 256, 32
MIN_SPLIT, MAX_SPLITS = 1024, 32  # where a segment has several splits
ONE_LAUNCH = 1024  # shorter sequences have one segment
# One walk for dk and dv (``fused.py``): compiled and emulated, not yet measured. Plans remember what it was.
FUSED = False
PACKED_OVERLAP = False  # whether the kernels of hopper.py take packed sequences: not yet measured


class Tiles(NamedTuple):
    """Tile sizes of one walk: padded head dim, columns per program, tokens per chunk."""

    BK: int
    BV: int
    BC: int
    num_warps: int
    num_stages: int


@functools.cache
def tiles_of(dtype: torch.dtype, K: int, V: int, few_tokens: bool, long_chunks: bool = False) -> Tiles:
    """The state's tile [BV, BK] lives in registers, so a wide K needs a narrow BV. Walks that compute only states of
    sequences that are not packed have registers for ``long_chunks``."""
    BK, BV = pad(K), pad(V)
    if dtype == torch.float32:  # plain fp32 arithmetic: correct, not fast
        return Tiles(BK, min(BV, 32), 16 if BK > 128 else 32, 4, 1)
    if BK > 128:
        return Tiles(BK, min(BV, 64), 16, 4, 3)
    return Tiles(BK, min(BV, 64), 16 if few_tokens else 64 if long_chunks else 32, 4, 4)


class SplitPlan(NamedTuple):
    """How a sequence is cut: tokens per split, a multiple of 64, and splits per segment of the walks."""

    split_len: int
    splits: int  # for o and dq
    splits_grad: int  # for dk and dv


def plan_splits(T: int, programs: int, programs_grad: int) -> SplitPlan:
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


def plan_for(x: torch.Tensor, B: int, T: int, H: int, K: int, V: int, packed: bool) -> SplitPlan:
    """Of tensors of the dtype and on the device of ``x``."""
    few, dtype = bool(T <= 16), x.dtype
    columns_v, columns_k = cdiv(V, tiles_of(dtype, K, V, few).BV), cdiv(K, tiles_of(dtype, V, K, few).BV)
    if fuses(x, packed=packed, K=K, V=V):  # one program in the place of two
        columns_k = 0
    return plan_splits(T, max(1, B * H * columns_v), max(1, B * H * (columns_v + columns_k)))


@functools.cache
def has_copy_engine(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def has_descriptors(*tensors: torch.Tensor) -> bool:
    """Whether the copy engine can move the tiles: tensor descriptors need addresses and strides of 16 bytes."""
    if not has_copy_engine(tensors[0].device) or tensors[0].dtype == torch.float32:
        return False
    for x in tensors:
        multiple = 16 // x.element_size()
        batch, token, head, _ = x.stride()
        if x.data_ptr() % 16 or batch % multiple or token % multiple or head % multiple or token == 0:
            return False
    return True


def precision(dtype: torch.dtype) -> tuple[str, bool]:
    """PRECISION and WIDE_STATE of the kernels."""
    return "ieee" if dtype == torch.float32 else "tf32", dtype == torch.float16


@functools.cache
def has_wgmma(device: torch.device) -> bool:
    """Gluon is an experiment of Triton's: what one release compiles another may not."""
    return launcher_is_known() and has_copy_engine(device) and torch.cuda.get_device_capability(device)[0] == 9


def overlaps(*tensors: torch.Tensor, packed: bool, K: int, V: int) -> bool:
    """Whether the kernels of ``hopper.py`` take these tensors."""
    return (
        (PACKED_OVERLAP or not packed) and tensors[0].dtype == torch.bfloat16 and tensors[0].shape[1] > 16
        and all(64 <= pad(dim) <= 256 for dim in (K, V))
        and has_wgmma(tensors[0].device) and has_descriptors(*tensors)
    )  # fmt: skip


@functools.cache
def o_gains(K: int, V: int) -> bool:
    """Whether ``hopper.py`` is faster for o, too. With heads of 64, and of more than 128, it takes 2 to 4% longer."""
    return max(pad(K), pad(V)) == 128


def fuses(x: torch.Tensor, *, packed: bool, K: int, V: int) -> bool:
    """Whether dk and dv of tensors like ``x`` have one walk if the copy engine can move them.

    Strides do not count: plans of the forward and of states alone, which have other tensors, must be the same.
    """
    return (
        FUSED and not packed and x.dtype == torch.bfloat16 and bool(pad(K) == pad(V) == 128) and has_wgmma(x.device)
    )  # fmt: skip


@functools.cache
def hopper_tiles(K: int, V: int) -> Tiles:
    """Each group of four warps has 64 columns of the state's tile. Two programs of one group fit a multiprocessor;
    where K or V is wide, one of two groups. A program for o has as many warps as one for dk."""
    BK, BV = pad(K), pad(V)
    wide = max(BK, BV) > 128
    return Tiles(BK, 128 if wide else 64, 64, 8 if wide else 4, 3 if max(BK, BV) == 64 else 2)
