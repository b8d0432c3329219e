"""Tiles of the kernels, and where sequences are cut: numbers that follow from sizes."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from .launch import cdiv, launcher_is_known, pad

# Programs that fill a GPU of 132 multiprocessors, two on each or one alone. Constants, so that results do not depend on
# the GPU.
PROGRAMS = 256
ALONE = 132
STATE_PASS = 0.5  # time of the states of splits, in that of a walk over all tokens that fills the GPU
MIN_SEGMENT, MAX_SEGMENTS = 256, 32
MIN_SPLIT, MAX_SPLITS = 1024, 32  # where a segment has several splits
ONE_LAUNCH = 1024  # shorter sequences have one segment


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
        return Tiles(BK, min(BV, 64), 32 if long_chunks else 16, 4, 3)
    return Tiles(BK, min(BV, 64), 16 if few_tokens else 64 if long_chunks else 32, 4, 4)


class SplitPlan(NamedTuple):
    """How a sequence is cut: tokens per split, a multiple of 64, and splits per segment of the walks."""

    split_len: int
    splits: int  # for o and dq
    splits_grad: int  # for dk and dv


def _ends(queries: int, segments: int, others: int, segments_others: int) -> float:
    """When a launch ends, in the time of a program that walks a whole sequence: ``queries`` programs of one of
    ``segments`` each, and then ``others``, as multiprocessors get free."""
    rounds, rest = divmod(queries * segments, ALONE)
    first, last = rounds / segments, (rounds + bool(rest)) / segments
    least = max(last, (queries + others) / ALONE)  # if none waited; programs are whole, so that it ends up to one later
    ends = (x + (int((least - x) * segments_others) + n) / segments_others for x in (first, last) for n in range(3))
    for end in sorted(max(last, x) for x in ends):
        ran = [int((end - x) * segments_others + 1e-6) for x in (first, last)]
        if (ALONE - rest) * ran[0] + rest * ran[1] >= others * segments_others:
            return end
    raise AssertionError("the last of these is late enough")


@functools.cache
def _segments_alone(programs: int, programs_grad: int) -> tuple[int, int]:
    """Into how many segments long sequences are cut, for o and dq, and for dk and dv, if a multiprocessor runs one
    program at a time.

    More of them fill the GPU to its last round of programs, and cost more states: all but the last segment's.
    """
    states = lambda n: STATE_PASS * (1 - 1 / n) * programs / ALONE
    counts = range(1, MAX_SEGMENTS + 1)
    best = min(counts, key=lambda n: cdiv(programs * n, ALONE) / n + states(n))
    queries = programs_grad - programs
    fitting = [n for n in counts if math.lcm(n, best) <= MAX_SPLITS]
    return best, min(fitting, key=lambda n: _ends(queries, best, programs_grad, n) + states(n))


def plan_splits(T: int, programs: int, programs_grad: int, alone: bool = False) -> SplitPlan:
    """As few segments as fill a GPU, if one segment has ``programs`` programs (``programs_grad`` for dk and dv).

    What two programs of a multiprocessor leave of a last round runs faster, and does not matter; that of programs which
    run ``alone`` does. Splits are shorter than segments, so that more programs compute their states. Another plan
    rounds differently. Under ``torch.use_deterministic_algorithms`` the plan depends on T alone: a sequence gets the
    same bits in any batch, and a head on any tensor-parallel rank.
    """
    if torch.are_deterministic_algorithms_enabled():
        programs, programs_grad, alone = PROGRAMS // 8, PROGRAMS // 4, False
    if alone:
        wanted = _segments_alone(int(programs), int(programs_grad))  # torch.compile may have symbols for numbers
        whole = math.lcm(*wanted)  # so that segments have equally many splits
    else:
        wanted, whole = (cdiv(PROGRAMS, programs), cdiv(PROGRAMS, programs_grad)), 1
    most = 1 if T < ONE_LAUNCH else min(T // MIN_SEGMENT, MAX_SEGMENTS)
    segments, segments_grad = (min(n, most) for n in wanted)
    fit = min(T // MIN_SPLIT, MAX_SPLITS)
    count = max(segments, min(cdiv(min(cdiv(4 * PROGRAMS, programs), fit), whole), fit // whole) * whole)
    return SplitPlan(cdiv(T, 64 * count) * 64, cdiv(count, segments), cdiv(count, segments_grad))


def plan_for(B: int, T: int, H: int, K: int, V: int, dtype: torch.dtype) -> SplitPlan:
    few, alone = bool(T <= 16), is_wide(K, V) and dtype == torch.bfloat16
    tiles, tiles_grad = tiles_of(dtype, K, V, few), tiles_of(dtype, V, K, few)
    if alone:
        tiles, tiles_grad = hopper_tiles(K, V), hopper_tiles(V, K)
    columns_v, columns_k = cdiv(V, tiles.BV), cdiv(K, tiles_grad.BV)
    return plan_splits(T, max(1, B * H * columns_v), max(1, B * H * (columns_v + columns_k)), alone)


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


def overlaps(*tensors: torch.Tensor, K: int, V: int, segments: tuple[int, ...]) -> bool:
    """Whether the kernels of ``hopper.py`` take these tensors, and ``segments`` of so many tokens.

    Copies and stores are of whole chunks, and would cross into a segment that began inside of one.
    """
    return (
        tensors[0].dtype == torch.bfloat16 and tensors[0].shape[1] > 16
        and all(tokens % hopper_tiles(K, V).BC == 0 for tokens in segments)
        and all(64 <= pad(dim) <= 256 for dim in (K, V))
        and has_wgmma(tensors[0].device) and has_descriptors(*tensors)
    )  # fmt: skip


@functools.cache
def o_gains(K: int, V: int, packed: bool) -> bool:
    """Whether ``hopper.py`` is faster for o, too. With heads of 64 it takes 4% longer for sequences not packed."""
    return packed or max(pad(K), pad(V)) >= 128


def is_wide(K: int, V: int) -> bool:
    """Whether a state takes the registers of two groups of warps."""
    return max(pad(K), pad(V)) > 128


@functools.cache
def hopper_tiles(K: int, V: int) -> Tiles:
    """Each group of four warps has 64 columns of the state's tile. Two programs of one group fit a multiprocessor;
    where K or V is wide, one of two groups. A program for o has as many warps as one for dk."""
    BK, BV = pad(K), pad(V)
    wide = is_wide(K, V)
    return Tiles(BK, 128 if wide else 64, 64, 8 if wide else 4, 3 if max(BK, BV) == 64 else 2)
