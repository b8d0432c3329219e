"""One walk for dk and dv, for Hopper GPUs: they have the same states, whose update it computes once.

A program has two warpgroups of 4 warps, each with half of the state's rows in registers. One computes dv, the other dk.
They meet once a chunk, where each has put its half, rounded, into shared memory: products with the state need all of
it. The weights of a chunk's products stay in registers, and nothing else holds one warpgroup up for the other, whose
products run while it weights, rounds and stores.

A program for dq is two programs of ``hopper.py``'s walk, one a warpgroup. K and V are above 64 and at most 128. Names
are as in ``hopper.py``, and

    a b c    what the weights of a chunk's products are products of, by token that reads and by token that is read, and
             what they weight: k, q and do for dv, v, do and q for dk
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

from .hopper import _COUNTS, LOG2E, _opaque, _rounded, walk
from .walk import incoming_state, state_tile


@gluon.jit
def _fetch_all(inputs, buffers, stage, start, bar, BYTES: gl.constexpr, there):
    """Ask for the chunk from ``start`` on, if it is ``there``; ``bar`` says when it has come."""
    d_q, d_k, d_v, d_do = inputs
    q_buf, k_buf, v_buf, do_buf, s_buf = buffers
    mbarrier.expect(bar, BYTES, pred=there)
    tma.async_copy_global_to_shared(d_k, [start, 0], bar, k_buf.index(stage), pred=there)
    tma.async_copy_global_to_shared(d_q, [start, 0], bar, q_buf.index(stage), pred=there)
    tma.async_copy_global_to_shared(d_v, [start, 0], bar, v_buf.index(stage), pred=there)
    tma.async_copy_global_to_shared(d_do, [start, 0], bar, do_buf.index(stage), pred=there)


@gluon.jit
def _share_state(s_buf, b_s, turn, shared, FIRST: gl.constexpr, ROWS: gl.constexpr):
    """Round these rows for both warpgroups; ``shared`` says when both have."""
    s_buf.index(turn).slice(FIRST, ROWS, 0).store(_rounded(b_s))
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(shared, count=1)


@gluon.jit
def _gradient(
    inputs, buffers, d_o, o_buf, barriers, b_ld, split_grads, dfinal, dinitial, sizes, scale,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, BC: gl.constexpr, STAGES: gl.constexpr,
    SPLIT_GRADS: gl.constexpr, DFINAL: gl.constexpr, INITIAL: gl.constexpr, AFTER_STATES: gl.constexpr,
    FOR_K: gl.constexpr,
):  # fmt: skip
    """A warpgroup's part: dk or dv, and half of the state's rows.

    ``bars`` say which chunks have come, ``done`` with which the warpgroup for dk is done, ``shared`` that both have
    shared the state.
    """
    q_buf, k_buf, v_buf, do_buf, s_buf = buffers
    bars, done, shared = barriers
    i_b, i_h, begin, end, T, H, split_len, split_rows, split_first = sizes
    BO: gl.constexpr = BK if FOR_K else BV
    ROWS: gl.constexpr = BV // 2
    FIRST: gl.constexpr = ROWS if FOR_K else 0
    LA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BC, 16])
    LO: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BO, 16])
    LS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BK, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, LO, 2)
    WRITE: gl.constexpr = gl.DotOperandLayout(0, LS, 2)

    o_k, o_v = gl.arange(0, BK, gl.SliceLayout(0, LS)), FIRST + gl.arange(0, ROWS, gl.SliceLayout(1, LS))
    m_vk = (o_v < V)[:, None] & (o_k < K)[None, :]
    ld2 = b_ld * LOG2E
    p_i, p_j = gl.arange(0, BC, gl.SliceLayout(1, LA)), gl.arange(0, BC, gl.SliceLayout(0, LA))
    b_d = p_j[None, :] - p_i[:, None]
    b_w = gl.where(b_d >= 0, gl.exp2(ld2 * gl.maximum(b_d, 0).to(gl.float32)), 0.0) * scale
    p_read = gl.arange(0, BC, gl.SliceLayout(1, LO))
    p_write = gl.arange(0, BC, gl.SliceLayout(0, WRITE))

    chunks = gl.cdiv(end - begin, BC)
    BYTES: gl.constexpr = 4 * BC * (BK + BV)
    if not FOR_K:
        for i in gl.static_range(STAGES):
            start = begin + (chunks - 1 - i) * BC
            _fetch_all(inputs, buffers, i, start, bars.index(i), BYTES, i < chunks)
    if AFTER_STATES:  # the launch that computes them is the one before this, and may still run
        gdc_wait()
    b_s = incoming_state(
        gl.zeros([ROWS, BK], gl.float32, LS), split_grads, split_rows, split_first, dfinal, None, None, b_ld,
        i_b, i_h, o_k, o_v, m_vk, begin, end, T, H, split_len, K, V, True, False, SPLIT_GRADS, DFINAL, False, True,
    )  # fmt: skip
    _share_state(s_buf, b_s, 0, shared, FIRST, ROWS)
    zero_a = gl.zeros([BC, BC], gl.float32, LA)
    zero_o = gl.zeros([BC, BO], gl.float32, LO)
    for i_c in range(chunks):
        stage, phase = i_c % STAGES, i_c // STAGES & 1
        start = begin + (chunks - 1 - i_c) * BC
        n = gl.minimum(BC, end - start)
        s_q, s_k, s_v, s_do = q_buf.index(stage), k_buf.index(stage), v_buf.index(stage), do_buf.index(stage)
        s_a = s_v if FOR_K else s_k
        s_b = s_do if FOR_K else s_q
        s_c = s_q if FOR_K else s_do
        mbarrier.wait(bars.index(stage), phase)
        b_a = warpgroup_mma(s_a, s_b.permute([1, 0]), zero_a, use_acc=False, is_async=True)  # [BC of i, BC of j]
        turn = i_c & 1
        mbarrier.wait(shared, turn)
        s_s = s_buf.index(turn) if FOR_K else s_buf.index(turn).permute([1, 0])
        b_o = warpgroup_mma(s_a, s_s, zero_o, use_acc=False, is_async=True)  # [BC, BO]
        # 16 numbers that would be kept in registers if they did not depend on n: tokens from there on are 0
        b_write = gl.exp2(ld2 * gl.minimum(p_write + 1, n).to(gl.float32)) * scale
        b_v = s_do.slice(FIRST, ROWS, 1).permute([1, 0]).load(WRITE)
        b_v = _rounded(b_v.to(gl.float32) * b_write[None, :])
        b_a = warpgroup_mma_wait(1, deps=[b_a])
        b_a = b_a * b_w
        b_p = _rounded(b_a)
        b_r = _rounded(b_a - b_p.to(gl.float32))  # what rounding cut off
        b_read = gl.exp2(ld2 * gl.maximum(n - 1 - p_read, 0).to(gl.float32))
        b_s = b_s * gl.exp2(ld2 * n.to(gl.float32))
        b_s = warpgroup_mma(b_v, s_q, b_s, is_async=True)
        b_o = warpgroup_mma_wait(1, deps=[b_o])
        b_o = b_o * b_read[:, None]
        b_o = warpgroup_mma(gl.convert_layout(b_p, WEIGHTS), s_c, b_o, is_async=True)
        b_o = warpgroup_mma(gl.convert_layout(b_r, WEIGHTS), s_c, b_o, is_async=True)
        b_s = warpgroup_mma_wait(2, deps=[b_s])
        _share_state(s_buf, b_s, turn ^ 1, shared, FIRST, ROWS)
        if not FOR_K:  # the chunk before this is done with here, and is waited for where the other warpgroup is not yet
            then = i_c + STAGES - 1
            there, free = (i_c > 0) & (then < chunks), then % STAGES
            mbarrier.wait(done.index(free), then // STAGES - 1 & 1, pred=there)
            ahead = begin + (chunks - 1 - then) * BC
            _fetch_all(inputs, buffers, free, ahead, bars.index(free), BYTES, there)
        b_o = warpgroup_mma_wait(0, deps=[b_o])
        tma.store_wait(0)
        gl.thread_barrier()
        if FOR_K:
            mbarrier.arrive(done.index(stage), count=1)
        o_buf.store(_rounded(b_o))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(d_o, [start, 0], o_buf)
    tma.store_wait(0)
    if INITIAL:
        if begin == 0:
            o_k = _opaque(i_h * 0) + gl.arange(0, BK, gl.SliceLayout(0, LS))  # anew: the loop had no register for it
            m_vk = (o_v < V)[:, None] & (o_k < K)[None, :]
            gl.store(state_tile(dinitial, i_b, H, i_h, o_k, o_v, K, V, False), b_s, mask=m_vk)


@gluon.jit
def _dq(
    heads, strides, b_ld, split_states, initial, sizes, scale,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, BC: gl.constexpr, STAGES: gl.constexpr,
    SPLIT_STATES: gl.constexpr, INITIAL: gl.constexpr, AFTER_STATES: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """A warpgroup's part: half of dq's columns."""
    p_do, p_v, p_k, p_dq = heads
    do_st, v_st, k_st, dq_st = strides
    i_b, i_h, i_s, T, H, split_len, splits, segments, split_rows = sizes
    walk(
        p_do, p_v, p_k, p_dq, do_st, v_st, k_st, dq_st, b_ld, split_states, initial, None, None, None,
        i_b, i_h, HALF, i_s, T, H, split_len, splits, segments, split_rows, 0, scale, 1.0,
        V, K, BV, BK // 2, BC, STAGES, False, True, SPLIT_STATES, INITIAL, False, False, AFTER_STATES, False,
    )  # fmt: skip


@gluon.jit(do_not_specialize=(*_COUNTS, "splits_q", "segments_q", "split_rows_q"))
def hopper_fused_kernel(
    q, k, v, do, dq, dk, dv, log_decay, split_states, split_grads, initial, dfinal, dinitial,
    doc, cu_seqlens,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, do_sb, do_st, do_sh,
    dq_sb, dq_st, dk_sb, dk_st, dv_sb, dv_st, group, pieces, documents, T, H, split_len,
    splits, segments, split_rows, split_first, splits_q, segments_q, split_rows_q, scale,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr,
    COLS_K: gl.constexpr, COLS_V: gl.constexpr, BC: gl.constexpr, STAGES: gl.constexpr,
    SPLIT_STATES: gl.constexpr, SPLIT_GRADS: gl.constexpr, INITIAL: gl.constexpr, DFINAL: gl.constexpr,
    VARLEN: gl.constexpr, AFTER_STATES: gl.constexpr,
):  # fmt: skip
    """As ``hopper_gradients_kernel``, whose parameters it has; programs have all columns, sequences are not packed."""
    dtype: gl.constexpr = v.dtype.element_ty
    programs_q = gl.num_programs(0) // (segments + segments_q) * segments_q
    i = gl.program_id(0)
    for_q = i < programs_q
    i = gl.where(for_q, i, i - programs_q)
    count = gl.where(for_q, segments_q, segments)
    i_h, i = i % H, i // H
    i_s, i = i % count, i // count
    head, shared = i_h.to(gl.int64), (i_h // group).to(gl.int64)
    i_b, i_r, i_t = i.to(gl.int64), (i // pieces).to(gl.int64), (i % pieces).to(gl.int64) * T
    p_q = q + i_r * q_sb + i_t * q_st + head * q_sh
    p_k = k + i_r * k_sb + i_t * k_st + shared * k_sh
    p_v = v + i_r * v_sb + i_t * v_st + shared * v_sh
    p_do = do + i_r * do_sb + i_t * do_st + head * do_sh
    b_ld = gl.load(log_decay + i_h)
    if for_q:
        p_dq = dq + i_r * dq_sb + i_t * dq_st + head * K
        heads = (p_do, p_v, p_k, p_dq)
        strides = (do_st, v_st, k_st, dq_st)
        sizes = (i_b, i_h, i_s, T, H, split_len, splits_q, segments_q, split_rows_q)
        gl.warp_specialize([
            (_dq, (heads, strides, b_ld, split_states, initial, sizes, scale,
                   K, V, BK, BV, BC, STAGES, SPLIT_STATES, INITIAL, AFTER_STATES, 0)),
            (_dq, (heads, strides, b_ld, split_states, initial, sizes, scale,
                   K, V, BK, BV, BC, STAGES, SPLIT_STATES, INITIAL, AFTER_STATES, 1)),
        ], [4], [256])  # fmt: skip
    else:
        SK: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BC, BK], dtype)
        SV: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BC, BV], dtype)
        SS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BV, BK], dtype)
        d_q = tma.make_tensor_descriptor(p_q, [T, K], [q_st, 1], [BC, BK], SK)
        d_k = tma.make_tensor_descriptor(p_k, [T, K], [k_st, 1], [BC, BK], SK)
        d_v = tma.make_tensor_descriptor(p_v, [T, V], [v_st, 1], [BC, BV], SV)
        d_do = tma.make_tensor_descriptor(p_do, [T, V], [do_st, 1], [BC, BV], SV)
        d_dk = tma.make_tensor_descriptor(
            dk + i_r * dk_sb + i_t * dk_st + head * K, [T, K], [dk_st, 1], [BC, BK], SK
        )  # fmt: skip
        d_dv = tma.make_tensor_descriptor(
            dv + i_r * dv_sb + i_t * dv_st + head * V, [T, V], [dv_st, 1], [BC, BV], SV
        )  # fmt: skip
        q_buf = gl.allocate_shared_memory(dtype, [STAGES, BC, BK], SK)
        k_buf = gl.allocate_shared_memory(dtype, [STAGES, BC, BK], SK)
        v_buf = gl.allocate_shared_memory(dtype, [STAGES, BC, BV], SV)
        do_buf = gl.allocate_shared_memory(dtype, [STAGES, BC, BV], SV)
        dk_buf = gl.allocate_shared_memory(dtype, [BC, BK], SK)
        dv_buf = gl.allocate_shared_memory(dtype, [BC, BV], SV)
        s_buf = gl.allocate_shared_memory(dtype, [2, BV, BK], SS)
        bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        done = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        both = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
        for s in gl.static_range(STAGES):
            mbarrier.init(bars.index(s), count=1)
            mbarrier.init(done.index(s), count=1)
        mbarrier.init(both.index(0), count=2)
        fence_async_shared()
        gl.thread_barrier()
        i_s = segments - 1 - i_s
        begin = i_s * splits * split_len
        end = gl.minimum(T, begin + splits * split_len)
        inputs = (d_q, d_k, d_v, d_do)
        buffers = (q_buf, k_buf, v_buf, do_buf, s_buf)
        barriers = (bars, done, both.index(0))
        sizes = (i_b, i_h, begin, end, T, H, split_len, split_rows, split_first)
        gl.warp_specialize([
            (_gradient, (inputs, buffers, d_dv, dv_buf, barriers, b_ld, split_grads, dfinal, dinitial, sizes, scale,
                         K, V, BK, BV, BC, STAGES, SPLIT_GRADS, DFINAL, INITIAL, AFTER_STATES, False)),
            (_gradient, (inputs, buffers, d_dk, dk_buf, barriers, b_ld, split_grads, dfinal, dinitial, sizes, scale,
                         K, V, BK, BV, BC, STAGES, SPLIT_GRADS, DFINAL, INITIAL, AFTER_STATES, True)),
        ], [4], [256])  # fmt: skip
        for s in gl.static_range(STAGES):
            mbarrier.invalidate(bars.index(s))
            mbarrier.invalidate(done.index(s))
        mbarrier.invalidate(both.index(0))
