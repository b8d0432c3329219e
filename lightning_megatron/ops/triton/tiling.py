"""Tiles of the kernels, and where sequences are cut: numbers that follow from sizes."""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch
import triton

from .launch import cdiv, launcher, pad

logger = logging.getLogger(__name__)

# Programs that a GPU of 132 multiprocessors runs at a time, two on each or one alone. Constants, so that results do not
# depend on the GPU.
PAIRS, ALONE = 264, 132
PROGRAMS = 256  # of a plan that depends on the length only; four times as many compute states of splits
STATE_PASS = 0.5  # time of the states of splits, in that of a walk over all tokens that fills the GPU
START = 400  # time until a program walks, in tokens that it would walk over
MIN_SEGMENT, MAX_SEGMENTS = 256, 32
# Where a segment has several splits. A walk adds up those before it: more than FEW only if they stay as long as LONG.
MIN_SPLIT, MAX_SPLITS = 1024, 32
FEW_SPLITS, LONG_SPLIT = 16, 2048
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


def _ends(queries: int, segments: int, others: int, segments_others: int, slots: int) -> float:
    """When a launch ends, in the time of a program that walks a whole sequence: ``queries`` programs of one of
    ``segments`` each, and then ``others``, as the GPU's ``slots`` get free."""
    rounds, rest = divmod(queries * segments, slots)
    first, last = rounds / segments, (rounds + bool(rest)) / segments
    least = max(last, (queries + others) / slots)  # if none waited; programs are whole, so that it ends up to one later
    ends = (x + (int((least - x) * segments_others) + n) / segments_others for x in (first, last) for n in range(3))
    for end in sorted(max(last, x) for x in ends):
        ran = [int((end - x) * segments_others + 1e-6) for x in (first, last)]
        if (slots - rest) * ran[0] + rest * ran[1] >= others * segments_others:
            return end
    raise AssertionError("the last of these is late enough")


@functools.cache
def _segments(programs: int, programs_grad: int, most: int, T: int, slots: int) -> tuple[int, int]:
    """Into how many segments sequences of T tokens are cut, at ``most``, for o and dq, and for dk and dv.

    More of them fill the GPU to its last round of programs, and cost more states (all but the last segment's) and more
    starts. Of 472 cuts of 21 shapes that were measured on an H200 (tests/benchmarks/NOTES.md) this finds the fastest.
    """
    queries = programs_grad - programs

    def time(n: int, n_grad: int) -> float:
        rounds = cdiv(programs * n, slots)
        started = rounds + (queries * n + programs_grad * n_grad) / slots
        states = 2 * STATE_PASS * (1 - 1 / n) * programs / slots
        return rounds / n + _ends(queries, n, programs_grad, n_grad, slots) + states + started * START / T

    # segments for dk and dv are some of the others, so that both consist of the same splits
    pairs = ((n, n_grad) for n in range(1, most + 1) for n_grad in range(1, n + 1) if n % n_grad == 0)
    return min(pairs, key=lambda pair: time(*pair))


def plan_splits(T: int, programs: int, programs_grad: int, alone: bool = False) -> SplitPlan:
    """Segments that fill a GPU, if one segment has ``programs`` programs (``programs_grad`` for dk and dv).

    A multiprocessor runs two of them, or one ``alone``. Splits are shorter than segments, so that more programs compute
    their states. Another plan rounds differently. Under ``torch.use_deterministic_algorithms`` the plan depends on T
    alone: a sequence gets the same bits in any batch, and a head on any tensor-parallel rank.
    """
    if torch.are_deterministic_algorithms_enabled():
        programs, programs_grad, alone = PROGRAMS // 8, PROGRAMS // 4, False
    T, programs, programs_grad = int(T), int(programs), int(programs_grad)  # torch.compile may have symbols for numbers
    most = 1 if T < ONE_LAUNCH else min(T // MIN_SEGMENT, MAX_SEGMENTS)
    few_bits = max(0, T.bit_length() - 3)  # so that lengths share what is found
    about = max(1, T >> few_bits << few_bits)
    segments, segments_grad = _segments(programs, programs_grad, most, about, ALONE if alone else PAIRS)
    fit = min(T // MIN_SPLIT, max(FEW_SPLITS, T // LONG_SPLIT), MAX_SPLITS)
    wanted = min(cdiv(4 * PROGRAMS, programs), fit)
    count = max(segments, min(cdiv(wanted, segments), fit // segments) * segments)
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
    if not has_copy_engine(device) or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    if launcher() is None:
        logger.warning(
            "lightning attention: the faster kernels for Hopper GPUs need Triton 3.6 to 3.9, of torch 2.11 to 2.15, "
            "and this is %s: those for all GPUs are used",
            triton.__version__,
        )
        return False
    return True


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
