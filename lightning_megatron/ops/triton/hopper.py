"""The walk of ``walk.py`` for Hopper GPUs, with its products in flight beside other work, in bf16.

Triton waits for every product before it goes on. Here the copy engine brings chunks of 64 tokens, STAGES of them ahead,
and a chunk's products overlap: the one with the state runs while the products of the chunk are weighted, rounded and
stored, the state's update runs while outputs are stored.

A program of 4 warps holds BV = 64 columns of the state in registers, [BV, BK], one of 8 warps 128. States are those of
sequences (BY_ROW): those of documents would enter and leave inside chunks. Everything else, names included, is as in
``kernels.py``, but for two parameters: STAGES, and AFTER_STATES, which says that the launch before this one computes
the states of splits and may still run.
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

from .walk import incoming_state, state_tile, walk_by_token

LOG2E = gl.constexpr(1.4426950408889634)
# Triton 3.6 has other names
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def _rounded(b_x):
    """To bf16, two numbers in one instruction; the compiler takes one for each, four times as slow, where it sees no
    pairs."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [b_x], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def _opaque(i):
    """As in ``walk.py``: what is computed from it is not kept through a loop."""
    return gl.inline_asm_elementwise("", "=r,0", [i], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _sum_over_k(a, b, zero, FIRST: gl.constexpr, REST: gl.constexpr):
    """a [., FIRST + REST] b [FIRST + REST, .], in flight; columns beyond are zeros."""
    if REST == 0:
        return warpgroup_mma(a, b, zero, use_acc=False, is_async=True)
    else:
        first = warpgroup_mma(a.slice(0, FIRST, 1), b.slice(0, FIRST, 0), zero, use_acc=False, is_async=True)
        return warpgroup_mma(a.slice(FIRST, REST, 1), b.slice(FIRST, REST, 0), first, is_async=True)


@gluon.jit
def _fetch(d_q, d_k, d_v, s_q, s_k, s_v, start, column, bar, BYTES: gl.constexpr, there):
    """Ask for the chunk from ``start`` on, if it is ``there``; ``bar`` says when it has come."""
    mbarrier.expect(bar, BYTES, pred=there)
    _load(d_k, [start, 0], bar, s_k, pred=there)
    _load(d_q, [start, 0], bar, s_q, pred=there)
    _load(d_v, [start, column], bar, s_v, pred=there)


@gluon.jit
def _stored(i):
    """``i``, opaque to the compiler as in ``walk.py``, once what this program has stored is in memory."""
    asm: gl.constexpr = "cp.async.bulk.wait_group 0; mov.b32 $0, $1;"
    i = gl.inline_asm_elementwise(asm, "=r,r", [i], dtype=gl.int32, is_pure=False, pack=1)
    _barrier()
    return i


@gluon.jit(noinline=True)
def _walk_by_token(
    q, k, v, o, q_st, k_st, v_st, o_st, b_ld, split_states, incoming, outgoing, doc, cu_seqlens,
    i_b, i_h, i_v, i_s, T, H, split_len, splits, segments, split_rows, split_first, read_scale, write_scale,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, REVERSE: gl.constexpr,
    TRANSPOSED: gl.constexpr, SPLIT_STATES: gl.constexpr, INCOMING: gl.constexpr, OUTGOING: gl.constexpr,
):  # fmt: skip
    LS: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [gl.num_warps(), 1], [1, 0])
    o_k, o_v = gl.arange(0, BK, gl.SliceLayout(0, LS)), i_v * BV + gl.arange(0, BV, gl.SliceLayout(1, LS))
    walk_by_token(
        o_k, o_v, gl.zeros([BV, BK], gl.float32, LS), q, k, v, o, q_st, k_st, v_st, o_st, b_ld,
        split_states, incoming, outgoing, doc, cu_seqlens,
        i_b, i_h, i_s, T, H, split_len, splits, segments, split_rows, split_first, read_scale, write_scale,
        K, V, REVERSE, TRANSPOSED, False, SPLIT_STATES, INCOMING, OUTGOING, True,
    )  # fmt: skip


@gluon.jit
def _walk_by_chunk(
    q, k, v, o, q_st, k_st, v_st, o_st, b_ld, split_states, incoming, outgoing, doc, cu_seqlens,
    i_b, i_h, i_v, i_s, T, H, split_len, splits, segments, split_rows, split_first, read_scale, write_scale,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, BC: gl.constexpr, STAGES: gl.constexpr,
    REVERSE: gl.constexpr, TRANSPOSED: gl.constexpr, SPLIT_STATES: gl.constexpr, INCOMING: gl.constexpr,
    OUTGOING: gl.constexpr, VARLEN: gl.constexpr, AFTER_STATES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = v.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    GROUPS: gl.constexpr = WARPS // 4
    # What a wide state has beyond 128 of K is a tile of its own, b_t: only one of the two is in bf16 at a time
    FIRST: gl.constexpr = 128 if BK > 128 else BK
    REST: gl.constexpr = 0 if BK <= 128 else 64 if K <= 192 else 128
    LA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, GROUPS], [16, BC // GROUPS, 16])
    LO: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BC, 16])
    LS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, REST if REST > 0 else BK, 16])
    READ: gl.constexpr = gl.DotOperandLayout(0, LO, 2)
    WRITE: gl.constexpr = gl.DotOperandLayout(0, LS, 2)
    SK: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BC, BK], dtype)
    SV: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BC, BV], dtype)
    SP: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BC, BC], dtype)

    o_k, o_v = gl.arange(0, FIRST, gl.SliceLayout(0, LS)), i_v * BV + gl.arange(0, BV, gl.SliceLayout(1, LS))
    m_vk = (o_v < V)[:, None] & (o_k < K)[None, :]
    if REST > 0:
        o_t = FIRST + gl.arange(0, REST, gl.SliceLayout(0, LS))
        m_vt = (o_v < V)[:, None] & (o_t < K)[None, :]
    begin = i_s * splits * split_len
    end = gl.minimum(T, begin + splits * split_len)
    ld2 = b_ld * LOG2E
    p_j, p_i = gl.arange(0, BC, gl.SliceLayout(1, LA)), gl.arange(0, BC, gl.SliceLayout(0, LA))
    b_d = p_j[:, None] - p_i[None, :] if REVERSE else p_i[None, :] - p_j[:, None]
    b_w = gl.where(b_d >= 0, gl.exp2(ld2 * gl.maximum(b_d, 0).to(gl.float32)), 0.0)
    b_w *= write_scale if REVERSE else read_scale
    p_read = gl.arange(0, BC, gl.SliceLayout(0, LO))
    p_write = gl.arange(0, BC, gl.SliceLayout(0, WRITE))

    d_q = tma.make_tensor_descriptor(q, [T, K], [q_st, 1], [BC, BK], SK)
    d_k = tma.make_tensor_descriptor(k, [T, K], [k_st, 1], [BC, BK], SK)
    d_v = tma.make_tensor_descriptor(v, [T, V], [v_st, 1], [BC, BV], SV)
    d_o = tma.make_tensor_descriptor(o, [T, V], [o_st, 1], [BC, BV], SV)
    q_buf = gl.allocate_shared_memory(dtype, [STAGES, BC, BK], SK)
    k_buf = gl.allocate_shared_memory(dtype, [STAGES, BC, BK], SK)
    v_buf = gl.allocate_shared_memory(dtype, [STAGES, BC, BV], SV)
    o_buf = gl.allocate_shared_memory(dtype, [BC, BV], SV)
    p_buf = gl.allocate_shared_memory(dtype, [2, BC, BC], SP)
    if REST == 128:  # registers are short
        w_buf = gl.allocate_shared_memory(gl.float32, [BC, BC], gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))
        w_buf.store(b_w)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    _barrier()

    chunks = gl.cdiv(end - begin, BC)
    BYTES: gl.constexpr = 2 * BC * (2 * BK + BV)
    for i in gl.static_range(STAGES):
        start = begin + (chunks - 1 - i if REVERSE else i) * BC
        s_q, s_k, s_v = q_buf.index(i), k_buf.index(i), v_buf.index(i)
        _fetch(d_q, d_k, d_v, s_q, s_k, s_v, start, i_v * BV, bars.index(i), BYTES, i < chunks)
    if AFTER_STATES:  # the launch that computes them is the one before this, and may still run
        gdc_wait()
    b_s = incoming_state(
        gl.zeros([BV, FIRST], gl.float32, LS), split_states, split_rows, split_first, incoming, doc, cu_seqlens, b_ld,
        i_b, i_h, o_k, o_v, m_vk, begin, end, T, H, split_len,
        K, V, REVERSE, TRANSPOSED, SPLIT_STATES, INCOMING, VARLEN, True,
    )  # fmt: skip
    if REST > 0:
        b_t = incoming_state(
            gl.zeros([BV, REST], gl.float32, LS), split_states, split_rows, split_first, incoming, doc, cu_seqlens,
            b_ld, i_b, i_h, o_t, o_v, m_vt, begin, end, T, H, split_len,
            K, V, REVERSE, TRANSPOSED, SPLIT_STATES, INCOMING, VARLEN, True,
        )  # fmt: skip
    else:
        b_t = 0
    zero_a = gl.zeros([BC, BC], gl.float32, LA)
    zero_o = gl.zeros([BV, BC], gl.float32, LO)
    stage, phase = 0, 0
    if VARLEN:
        c_start, c_end = -1, -1  # no document yet
    for i_c in range(chunks):
        start = begin + (chunks - 1 - i_c if REVERSE else i_c) * BC
        n = gl.minimum(BC, end - start)
        bar, s_q, s_k, s_v = bars.index(stage), q_buf.index(stage), k_buf.index(stage), v_buf.index(stage)
        mbarrier.wait(bar, phase)
        s_qt, s_vt = s_q.permute([1, 0]), s_v.permute([1, 0])
        b_r = gl.convert_layout(_rounded(b_s), READ)
        b_a = _sum_over_k(s_k, s_qt, zero_a, FIRST, REST)  # [BC of j, BC of i]
        s_qf = s_qt.slice(0, FIRST, 0) if REST > 0 else s_qt
        b_o = warpgroup_mma(b_r, s_qf, zero_o, use_acc=False, is_async=True)  # [BV, BC]
        if VARLEN:
            # the document of the outgoing state; nothing else is kept while products run, registers are short
            inside = (c_start <= start) & (start + n <= c_end)
            if not inside:
                current = gl.load(doc + (start if REVERSE else start + n - 1))
                c_start, c_end = gl.load(cu_seqlens + current), gl.load(cu_seqlens + current + 1)
        b_a = warpgroup_mma_wait(1, deps=[b_a])
        b_a = b_a * (w_buf.load(LA) if REST == 128 else b_w)
        if VARLEN:
            if not inside:
                # with the bounds of j's document: to load that of i, too, would take registers
                b_n = gl.load(doc + start + p_j, mask=p_j < n, other=0)
                b_from, b_to = gl.load(cu_seqlens + b_n), gl.load(cu_seqlens + b_n + 1)
                token = (start + p_i)[None, :]  # computed here: p_i alone would be kept in registers, too
                b_a = gl.where((token >= b_from[:, None]) & (token < b_to[:, None]), b_a, 0.0)
        b_p = _rounded(b_a)
        p_buf.index(0).store(b_p)
        p_buf.index(1).store(_rounded(b_a - b_p.to(gl.float32)))  # what rounding cut off
        fence_async_shared()
        e_read = gl.maximum(n - 1 - p_read, 0) if REVERSE else p_read + 1
        if VARLEN:  # not the same in all chunks, or 16 registers would keep it: tokens from n on are 0
            e_read = gl.minimum(e_read, n)
        b_read = gl.exp2(ld2 * e_read.to(gl.float32)) * read_scale
        if VARLEN:
            if not inside:  # tokens of the document that the incoming state belongs to
                if REVERSE:
                    r_edge = gl.load(cu_seqlens + gl.load(doc + gl.minimum(start + n, T - 1)))
                    b_read = gl.where(p_read >= r_edge - start, b_read, 0.0)
                else:
                    r_edge = gl.load(cu_seqlens + gl.load(doc + gl.maximum(start - 1, 0)) + 1)
                    b_read = gl.where(p_read < r_edge - start, b_read, 0.0)
        b_o = warpgroup_mma_wait(0, deps=[b_o])
        if REST > 0:
            b_r = gl.convert_layout(_rounded(b_t), READ)
            b_o = warpgroup_mma(b_r, s_qt.slice(FIRST, REST, 0), b_o, is_async=True)
            b_o = warpgroup_mma_wait(0, deps=[b_o])
        b_o = b_o * b_read[None, :]
        _barrier()
        b_o = warpgroup_mma(s_vt, p_buf.index(0), b_o, is_async=True)
        b_o = warpgroup_mma(s_vt, p_buf.index(1), b_o, is_async=True)
        e_write = p_write + 1 if REVERSE else gl.maximum(n - 1 - p_write, 0)
        if VARLEN:
            e_write = gl.minimum(e_write, n)
        b_write = gl.exp2(ld2 * e_write.to(gl.float32)) * write_scale
        if VARLEN:
            if not inside:
                m_write = (p_write < c_end - start) if REVERSE else (p_write >= c_start - start)
                b_write = gl.where(m_write, b_write, 0.0)
        b_v = _rounded(s_vt.load(WRITE).to(gl.float32) * b_write[None, :])
        b_carry = gl.exp2(ld2 * n.to(gl.float32))
        if VARLEN:
            goes_on = (c_end > gl.minimum(start + n, T - 1)) if REVERSE else (c_start < gl.maximum(start, 1))
            b_carry = gl.where(goes_on, b_carry, 0.0)
        b_s = b_s * b_carry
        if REST > 0:
            b_t = b_t * b_carry
            b_s = warpgroup_mma(b_v, s_k.slice(0, FIRST, 1), b_s, is_async=True)
            b_t = warpgroup_mma(b_v, s_k.slice(FIRST, REST, 1), b_t, is_async=True)
            b_o = warpgroup_mma_wait(2, deps=[b_o])
        else:
            b_s = warpgroup_mma(b_v, s_k, b_s, is_async=True)
            b_o = warpgroup_mma_wait(1, deps=[b_o])
        tma.store_wait(0)
        _barrier()
        o_buf.permute([1, 0]).store(_rounded(b_o))
        fence_async_shared()
        _barrier()
        _store(d_o, [start, i_v * BV], o_buf)
        if REST > 0:
            b_s, b_t = warpgroup_mma_wait(0, deps=[b_s, b_t])
        else:
            b_s = warpgroup_mma_wait(0, deps=[b_s])
        _barrier()
        then = i_c + STAGES
        start = begin + (chunks - 1 - then if REVERSE else then) * BC
        _fetch(d_q, d_k, d_v, s_q, s_k, s_v, start, i_v * BV, bar, BYTES, then < chunks)
        stage += 1
        wrapped = stage == STAGES
        stage = gl.where(wrapped, 0, stage)
        phase = gl.where(wrapped, phase ^ 1, phase)
    tma.store_wait(0)
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(bars.index(i))
    if OUTGOING:
        if i_s == (0 if REVERSE else segments - 1):
            if VARLEN:  # anew: the loop has no register for it
                o_k = _opaque(i_h * 0) + gl.arange(0, FIRST, gl.SliceLayout(0, LS))
                o_v = _opaque(i_v) * BV + gl.arange(0, BV, gl.SliceLayout(1, LS))
                m_vk = (o_v < V)[:, None] & (o_k < K)[None, :]
                if REST > 0:
                    o_t = FIRST + _opaque(i_h * 0) + gl.arange(0, REST, gl.SliceLayout(0, LS))
                    m_vt = (o_v < V)[:, None] & (o_t < K)[None, :]
            gl.store(state_tile(outgoing, i_b, H, i_h, o_k, o_v, K, V, TRANSPOSED), b_s, mask=m_vk)
            if REST > 0:
                gl.store(state_tile(outgoing, i_b, H, i_h, o_t, o_v, K, V, TRANSPOSED), b_t, mask=m_vt)
    if VARLEN:  # as in ``walk.py``
        others = (c_end <= gl.minimum(end, T - 1)) if REVERSE else (c_start >= gl.maximum(begin, 1))
        not_finite = gl.sum(gl.sum(b_s * 0.0, 1), 0)
        if REST > 0:
            not_finite += gl.sum(gl.sum(b_t * 0.0, 1), 0)
        return others & (not_finite != 0.0)
    else:
        return i_s < 0  # no


@gluon.jit
def walk(
    q, k, v, o, q_st, k_st, v_st, o_st, b_ld, split_states, incoming, outgoing, doc, cu_seqlens,
    i_b, i_h, i_v, i_s, T, H, split_len, splits, segments, split_rows, split_first, read_scale, write_scale,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, BC: gl.constexpr, STAGES: gl.constexpr,
    REVERSE: gl.constexpr, TRANSPOSED: gl.constexpr, SPLIT_STATES: gl.constexpr, INCOMING: gl.constexpr,
    OUTGOING: gl.constexpr, VARLEN: gl.constexpr, AFTER_STATES: gl.constexpr, BY_TOKEN: gl.constexpr,
):  # fmt: skip
    """As in ``walk.py``: by chunk, which says whether it must be done anew BY_TOKEN."""
    if BY_TOKEN:
        _walk_by_token(
            q, k, v, o, q_st, k_st, v_st, o_st, b_ld, split_states, incoming, outgoing, doc, cu_seqlens,
            i_b, i_h, i_v, i_s, T, H, split_len, splits, segments, split_rows, split_first, read_scale, write_scale,
            K, V, BK, BV, REVERSE, TRANSPOSED, SPLIT_STATES, INCOMING, OUTGOING,
        )  # fmt: skip
        return i_s < 0  # no
    else:
        return _walk_by_chunk(
            q, k, v, o, q_st, k_st, v_st, o_st, b_ld, split_states, incoming, outgoing, doc, cu_seqlens,
            i_b, i_h, i_v, i_s, T, H, split_len, splits, segments, split_rows, split_first, read_scale, write_scale,
            K, V, BK, BV, BC, STAGES, REVERSE, TRANSPOSED, SPLIT_STATES, INCOMING, OUTGOING, VARLEN, AFTER_STATES,
        )  # fmt: skip


_COUNTS = ("group", "pieces", "documents", "T", "H", "split_len", "splits", "segments", "split_rows", "split_first")


@gluon.jit(do_not_specialize=_COUNTS)
def hopper_walk_kernel(
    q, k, v, o, log_decay, split_states, incoming, outgoing, doc, cu_seqlens,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, o_sb, o_st, o_sh,
    group, pieces, documents, T, H, split_len, splits, segments, split_rows, split_first, read_scale, write_scale,
    K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, BV: gl.constexpr, BC: gl.constexpr, STAGES: gl.constexpr,
    REVERSE: gl.constexpr, SPLIT_STATES: gl.constexpr, INCOMING: gl.constexpr, OUTGOING: gl.constexpr,
    VARLEN: gl.constexpr, AFTER_STATES: gl.constexpr,
):  # fmt: skip
    columns = gl.cdiv(V, BV)
    needed = True
    for BY_TOKEN in gl.static_range(2 if VARLEN else 1):  # by chunk, then where that is not enough
        if needed:
            i = _stored(gl.program_id(0)) if BY_TOKEN else gl.program_id(0)
            i_v, i = i % columns, i // columns
            i_h, i = i % H, i // H
            i_s, i = i % segments, i // segments
            i_b, i_r, i_t = i.to(gl.int64), (i // pieces).to(gl.int64), (i % pieces).to(gl.int64) * T
            head, shared = i_h.to(gl.int64), (i_h // group).to(gl.int64)
            p_doc, p_bounds = doc, cu_seqlens
            if VARLEN:
                p_doc += i_b * T
                p_bounds += i_b * (documents + 1)
            needed = walk(
                q + i_r * q_sb + i_t * q_st + head * q_sh, k + i_r * k_sb + i_t * k_st + shared * k_sh,
                v + i_r * v_sb + i_t * v_st + shared * v_sh, o + i_r * o_sb + i_t * o_st + head * o_sh,
                q_st, k_st, v_st, o_st, gl.load(log_decay + i_h), split_states, incoming, outgoing, p_doc, p_bounds,
                i_b, i_h, i_v, i_s, T, H, split_len, splits, segments, split_rows, split_first, read_scale, write_scale,
                K, V, BK, BV, BC, STAGES, REVERSE, False, SPLIT_STATES, INCOMING, OUTGOING, VARLEN, AFTER_STATES,
                BY_TOKEN,
            )  # fmt: skip


@gluon.jit(do_not_specialize=(*_COUNTS, "splits_q", "segments_q", "split_rows_q"))
def hopper_gradients_kernel(
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
    n_k, n_v = gl.cdiv(K, COLS_K), gl.cdiv(V, COLS_V)
    batch = gl.num_programs(0) // (H * ((n_k + n_v) * segments + n_k * segments_q))
    programs_q = n_k * H * segments_q * batch
    needed = True
    for BY_TOKEN in gl.static_range(2 if VARLEN else 1):  # by chunk, then where that is not enough
        if needed:
            i = _stored(gl.program_id(0)) if BY_TOKEN else gl.program_id(0)
            for_q = i < programs_q
            i = gl.where(for_q, i, i - programs_q)
            columns, count = gl.where(for_q, n_k, n_k + n_v), gl.where(for_q, segments_q, segments)
            i_v, i = i % columns, i // columns
            i_h, i = i % H, i // H
            i_s, i = i % count, i // count
            head, shared = i_h.to(gl.int64), (i_h // group).to(gl.int64)
            i_b, i_r, i_t = i.to(gl.int64), (i // pieces).to(gl.int64), (i % pieces).to(gl.int64) * T
            p_doc, p_bounds = doc, cu_seqlens
            if VARLEN:
                p_doc += i_b * T
                p_bounds += i_b * (documents + 1)
            p_q = q + i_r * q_sb + i_t * q_st + head * q_sh
            p_k = k + i_r * k_sb + i_t * k_st + shared * k_sh
            p_v = v + i_r * v_sb + i_t * v_st + shared * v_sh
            p_do = do + i_r * do_sb + i_t * do_st + head * do_sh
            p_dq = dq + i_r * dq_sb + i_t * dq_st + head * K
            p_dk = dk + i_r * dk_sb + i_t * dk_st + head * K
            p_dv = dv + i_r * dv_sb + i_t * dv_st + head * V
            b_ld = gl.load(log_decay + i_h)
            again = i_h < 0
            if (i_v < n_k) & (not for_q):
                again = walk(
                    p_v, p_do, p_q, p_dk, v_st, do_st, q_st, dk_st, b_ld,
                    split_grads, dfinal, dinitial, p_doc, p_bounds, i_b, i_h, i_v, segments - 1 - i_s,
                    T, H, split_len, splits, segments, split_rows, split_first, 1.0, scale,
                    V, K, BV, COLS_K, BC, STAGES, True, True, SPLIT_GRADS, DFINAL, False, VARLEN, AFTER_STATES,
                    BY_TOKEN,
                )  # fmt: skip
            if (i_v >= n_k) & (not for_q):
                again = walk(
                    p_k, p_q, p_do, p_dv, k_st, q_st, do_st, dv_st, b_ld,
                    split_grads, dfinal, dinitial, p_doc, p_bounds, i_b, i_h, i_v - n_k, segments - 1 - i_s,
                    T, H, split_len, splits, segments, split_rows, split_first, 1.0, scale,
                    K, V, BK, COLS_V, BC, STAGES, True, False, SPLIT_GRADS, DFINAL, INITIAL, VARLEN, AFTER_STATES,
                    BY_TOKEN,
                )  # fmt: skip
            if for_q:
                again = walk(
                    p_do, p_v, p_k, p_dq, do_st, v_st, k_st, dq_st, b_ld,
                    split_states, initial, dinitial, p_doc, p_bounds, i_b, i_h, i_v, i_s,
                    T, H, split_len, splits_q, segments_q, split_rows_q, 0, scale, 1.0,
                    V, K, BV, COLS_K, BC, STAGES, False, True, SPLIT_STATES, INITIAL, False, VARLEN, AFTER_STATES,
                    BY_TOKEN,
                )  # fmt: skip
            needed = again
