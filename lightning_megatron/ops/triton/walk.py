"""One walk over the chunks of a segment, which the kernels call: see ``kernels.py`` for formulas and parameters."""

from __future__ import annotations

import triton
import triton.language as tl

from ..backend import triton_interpreted

COMPILED = tl.constexpr(not triton_interpreted())  # the interpreter lacks inline assembly
# What has decayed to exp(-50), 2e-22, adds nothing to a sum in fp32, which ends at 6e-8 of what is not so far away
UNDERFLOW = tl.constexpr(50.0)


@triton.jit
def state_tile(states, index, H, i_h, o_k, o_v, K: tl.constexpr, V: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Addresses of the tile [o_v, o_k] of ``states[index, i_h]``, in memory [K, V] or, TRANSPOSED, [V, K]."""
    base = states + (index * H + i_h) * K * V
    if TRANSPOSED:
        return base + o_v[:, None] * K + o_k[None, :]
    else:
        return base + o_k[None, :] * V + o_v[:, None]


@triton.jit
def _reach(b_ld):
    """Number of tokens after which what has decayed adds nothing; without decay very large."""
    return tl.minimum(UNDERFLOW / tl.maximum(-b_ld, 1e-30), 2e9).to(tl.int32)


@triton.jit
def _descriptor(x, stride, T, dim: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr):
    """Tensor descriptor of tiles [BC, BD] of ``x [T, dim]``."""
    return tl.make_tensor_descriptor(x, [T, dim], [tl.cast(stride, tl.int64), 1], [BC, BD])


@triton.jit
def _rows(x, stride, start, p, o_d):
    """Addresses of the tile [p, o_d] of x from row ``start`` on."""
    return x + tl.cast(start, tl.int64) * stride + p[:, None] * stride + o_d[None, :]


@triton.jit
def _wide(b_s):
    """Round fp32 to tf32. The tensor cores would truncate, and all errors would have one sign."""
    rounded = (b_s.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(b_s == b_s, rounded.to(tl.float32, bitcast=True), b_s)  # NaN stays NaN


@triton.jit
def _chunk_documents(doc, cu_seqlens, start, n, T, current, c_start, c_end, REVERSE: tl.constexpr):
    """The documents of a chunk in scalars alone: layouts of vectors would cost shared memory.

    ``first`` and ``last`` are the documents of its first and last token, ``source`` is the one that the incoming state
    belongs to (-1: none). Tokens of ``source`` end before ``r_edge``, reversed they begin there. The document of the
    outgoing state begins at ``w_edge``, reversed it ends before it; it is the new ``current``, from ``c_start`` to
    ``c_end``.

    ``inside``: the chunk lies wholly in ``current``, the document of the chunk before. Nothing is loaded then: these
    loads are not pipelined, each would stall the walk.
    """
    inside = (c_start <= start) & (start + n <= c_end)
    if inside:
        first = current
        last = current
        if REVERSE:
            goes_on = start + n < c_end
            r_edge = tl.where(goes_on, c_start, start + n)
            w_edge = c_end
        else:
            goes_on = c_start < start
            r_edge = tl.where(goes_on, c_end, start)
            w_edge = c_start
        source = tl.where(goes_on, current, -1)
    else:
        first = tl.load(doc + start)
        last = tl.load(doc + start + n - 1)
        if REVERSE:
            source = tl.load(doc + tl.minimum(start + n, T - 1))  # at the end the one that goes on there
            r_edge = tl.load(cu_seqlens + source)
            current = first
        else:
            source = tl.load(doc + tl.maximum(start - 1, 0))
            r_edge = tl.load(cu_seqlens + source + 1)
            current = last
        c_start = tl.load(cu_seqlens + current)
        c_end = tl.load(cu_seqlens + current + 1)
        w_edge = c_end if REVERSE else c_start
    return inside, first, last, source, r_edge, w_edge, current, c_start, c_end


@triton.jit
def _read_state(b_s, b_q, dtype: tl.constexpr, PRECISION: tl.constexpr, WIDE_STATE: tl.constexpr):
    """State [BV, BK] times q: [BV, BC]."""
    if WIDE_STATE:
        return tl.dot(_wide(b_s), tl.trans(b_q.to(tl.float32)), input_precision="tf32")
    else:
        return tl.dot(b_s.to(dtype), tl.trans(b_q), input_precision=PRECISION)


@triton.jit
def _not_finite(b_x):
    """Whether a tile holds an infinity or a NaN."""
    return tl.sum(b_x.to(tl.float32) * 0.0) != 0.0  # in place of 0, NaN


@triton.jit
def stores_arrived(DESCRIPTORS: tl.constexpr):
    """Wait until what this program has stored is in memory, so that it may be stored anew."""
    if DESCRIPTORS:  # the copy engine stores on its own
        tl.inline_asm_elementwise(
            "cp.async.bulk.wait_group 0; mov.b32 $0, $1;", "=r,r", [tl.arange(0, 128)], tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()


@triton.jit
def incoming_state(
    b_s, split_states, split_rows, split_first, incoming, doc, cu_seqlens, b_ld,
    i_b, i_h, o_k, o_v, m_vk, begin, end, T, H, split_len,
    K: tl.constexpr, V: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, SPLIT_STATES: tl.constexpr, INCOMING: tl.constexpr,
    VARLEN: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """State [BV, BK] that enters the segment from ``begin`` to ``end``: b_s, zeros, and the decayed sum of the splits
    before it.

    Splits too far away for their decay to leave anything are not read, nor are those of other documents. (T, T),
    reversed (0, 0), gives the state that leaves the sequence.
    """
    if VARLEN and (SPLIT_STATES or (INCOMING and BY_ROW)):  # the document that crosses into this segment
        if REVERSE:  # ends here
            d_edge = tl.load(cu_seqlens + tl.load(doc + tl.minimum(end, T - 1)) + 1)
        else:  # begins here
            d_edge = tl.load(cu_seqlens + tl.load(doc + tl.maximum(begin - 1, 0)))
    if SPLIT_STATES:
        first = tl.cdiv(end, split_len) if REVERSE else tl.cdiv(begin, split_len) - 1  # the nearest split
        passed = tl.cdiv(T, split_len) - first if REVERSE else first + 1
        if VARLEN:  # no further than this document reaches: a factor of 0 would let NaN pass
            passed = tl.cdiv(d_edge, split_len) - first if REVERSE else first + 1 - d_edge // split_len
        for i in range(tl.minimum(passed, _reach(b_ld) // split_len + 2)):
            i_o = first + i if REVERSE else first - i
            edge = i_o * split_len if REVERSE else tl.minimum((i_o + 1) * split_len, begin)  # its near edge
            b_f = tl.exp(b_ld * (edge - end if REVERSE else begin - edge).to(tl.float32))
            i_o += i_b * split_rows - split_first
            p_s = state_tile(split_states, i_o, H, i_h, o_k, o_v, K, V, TRANSPOSED)
            b_s += b_f * tl.load(p_s, mask=m_vk, other=0.0)
    if INCOMING and BY_ROW:
        b_f = tl.exp(b_ld * (T - end if REVERSE else begin).to(tl.float32))
        m_s = m_vk
        if VARLEN:  # only if this document reaches from the sequence's edge to here
            m_s = m_vk & (d_edge == (T if REVERSE else 0))
        b_s += b_f * tl.load(state_tile(incoming, i_b, H, i_h, o_k, o_v, K, V, TRANSPOSED), mask=m_s, other=0.0)
    return b_s


@triton.jit
def opaque(i):
    """``i`` as a number of which the compiler knows nothing.

    What is computed from it is then computed anew. Otherwise it would be kept through the loop over chunks, which has
    no register to spare: 3% of the time of a packed forward.
    """
    if COMPILED:
        return tl.inline_asm_elementwise("", "=r,0", [i], tl.int32, is_pure=False, pack=1)
    else:
        return i


@triton.jit
def walk_by_token(
    o_k, o_v, b_s, q, k, v, o, q_st, k_st, v_st, o_st, b_ld, split_states, incoming, outgoing, doc, cu_seqlens,
    i_b, i_h, i_s, T, H, split_len, splits, segments, split_rows, split_first, read_scale, write_scale,
    K: tl.constexpr, V: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, STATE_ONLY: tl.constexpr,
    SPLIT_STATES: tl.constexpr, INCOMING: tl.constexpr, OUTGOING: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """Walk one packed segment (STATE_ONLY: one split) anew, token by token, from b_s on: zeros [BV of o_v, BK of o_k].

    Chunks multiply what belongs to another document by 0, and 0 times NaN is NaN. Here tokens of other documents are
    never touched.
    """
    m_k, m_v = o_k < K, o_v < V
    m_vk = m_v[:, None] & m_k[None, :]
    tokens = split_len if STATE_ONLY else splits * split_len
    begin = i_s * tokens
    end = tl.minimum(T, begin + tokens)
    if not STATE_ONLY:
        b_s = incoming_state(
            b_s, split_states, split_rows, split_first, incoming, doc, cu_seqlens, b_ld,
            i_b, i_h, o_k, o_v, m_vk, begin, end, T, H, split_len,
            K, V, REVERSE, TRANSPOSED, SPLIT_STATES, INCOMING, True, BY_ROW,
        )  # fmt: skip
    b_decay = tl.exp(b_ld)
    previous = tl.load(doc + (tl.minimum(end, T - 1) if REVERSE else tl.maximum(begin - 1, 0)))
    for i in range(end - begin):
        t = end - 1 - i if REVERSE else begin + i
        current = tl.load(doc + t)
        d_start, d_end = tl.load(cu_seqlens + current), tl.load(cu_seqlens + current + 1)
        b_s = tl.where(current == previous, b_s, 0.0)
        previous = current
        if INCOMING and not BY_ROW:
            p_e = state_tile(incoming, tl.cast(current, tl.int64), H, i_h, o_k, o_v, K, V, TRANSPOSED)
            enters = t == (d_end - 1 if REVERSE else d_start)
            b_s = tl.where(enters, tl.load(p_e, mask=m_vk & enters, other=0.0), b_s)
        at = tl.cast(t, tl.int64)
        b_k = tl.load(k + at * k_st + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_v = tl.load(v + at * v_st + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_kv = b_v[:, None] * b_k[None, :] * write_scale
        b_s = b_s + b_kv if REVERSE else b_s * b_decay + b_kv
        if not STATE_ONLY:
            b_q = tl.load(q + at * q_st + o_k, mask=m_k, other=0.0).to(tl.float32)
            b_o = tl.sum(b_s * b_q[None, :], axis=1) * read_scale
            tl.store(o + at * o_st + o_v, b_o.to(o.dtype.element_ty), mask=m_v)
        if REVERSE:
            b_s *= b_decay
        if OUTGOING and not BY_ROW:
            p_e = state_tile(outgoing, tl.cast(current, tl.int64), H, i_h, o_k, o_v, K, V, TRANSPOSED)
            tl.store(p_e, b_s, mask=m_vk & (t == (d_start if REVERSE else d_end - 1)))
    if STATE_ONLY:
        i_o = i_b * split_rows + i_s - split_first
        tl.store(state_tile(split_states, i_o, H, i_h, o_k, o_v, K, V, TRANSPOSED), b_s, mask=m_vk)
    elif OUTGOING and BY_ROW:
        p_e = state_tile(outgoing, i_b, H, i_h, o_k, o_v, K, V, TRANSPOSED)
        tl.store(p_e, b_s, mask=m_vk & (i_s == (0 if REVERSE else segments - 1)))


@triton.jit(noinline=True)
def _walk_by_token(
    q, k, v, o, q_st, k_st, v_st, o_st, b_ld, split_states, incoming, outgoing, doc, cu_seqlens,
    i_b, i_h, i_v, i_s, T, H, split_len, splits, segments, split_rows, split_first, read_scale, write_scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, STATE_ONLY: tl.constexpr,
    SPLIT_STATES: tl.constexpr, INCOMING: tl.constexpr, OUTGOING: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """``walk_by_token``, not inlined: that would take registers from the loop over chunks, which has none to spare."""
    walk_by_token(
        tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.zeros([BV, BK], dtype=tl.float32),
        q, k, v, o, q_st, k_st, v_st, o_st, b_ld, split_states, incoming, outgoing, doc, cu_seqlens,
        i_b, i_h, i_s, T, H, split_len, splits, segments, split_rows, split_first, read_scale, write_scale,
        K, V, REVERSE, TRANSPOSED, STATE_ONLY, SPLIT_STATES, INCOMING, OUTGOING, BY_ROW,
    )  # fmt: skip


@triton.jit
def _walk_by_chunk(
    q, k, v, o, q_st, k_st, v_st, o_st, b_ld, split_states, incoming, outgoing, doc, cu_seqlens,
    i_b, i_h, i_v, i_s, T, H, split_len, splits, segments, split_rows, split_first, read_scale, write_scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, STATE_ONLY: tl.constexpr,
    SPLIT_STATES: tl.constexpr, INCOMING: tl.constexpr, OUTGOING: tl.constexpr,
    VARLEN: tl.constexpr, BY_ROW: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, WIDE_STATE: tl.constexpr,
):  # fmt: skip
    """Walk one segment (STATE_ONLY: one split) of one head; a program holds BV columns of v, o and the state.

    Returns whether ``_walk_by_token`` must do it anew, because what is not finite may have left its document.
    """
    dtype = v.dtype.element_ty
    p = tl.arange(0, BC)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_vk = m_v[:, None] & m_k[None, :]
    b_s = tl.zeros([BV, BK], dtype=tl.float32)
    if STATE_ONLY:
        begin = i_s * split_len
        end = tl.minimum(T, begin + split_len)
        # splits between this one and the segment (or end of the sequence) that needs it first. `incoming_state` reads
        # only as far as decay leaves something; no segment uses a split beyond that
        between = i_s % splits if REVERSE else tl.minimum(splits - 1 - i_s % splits, tl.cdiv(T, split_len) - 1 - i_s)
        used = between < _reach(b_ld) // split_len + 2
        skip = tl.maximum(end - begin - _reach(b_ld), 0) // BC  # decayed to nothing at the end
        skip = tl.where(used, skip, tl.cdiv(split_len, BC))
    else:
        begin = i_s * splits * split_len
        end = tl.minimum(T, begin + splits * split_len)
        skip = 0
        b_s = incoming_state(
            b_s, split_states, split_rows, split_first, incoming, doc, cu_seqlens, b_ld,
            i_b, i_h, o_k, o_v, m_vk, begin, end, T, H, split_len,
            K, V, REVERSE, TRANSPOSED, SPLIT_STATES, INCOMING, VARLEN, BY_ROW,
        )  # fmt: skip
        # distance from j to i of every pair of the chunk that may attend, and its decay
        b_d = (p[:, None] - p[None, :]) if REVERSE else (p[None, :] - p[:, None])  # [BC of j, BC of i]
        b_w = tl.where(b_d >= 0, tl.exp(b_ld * tl.where(b_d >= 0, b_d, 0).to(tl.float32)), 0.0)
        b_w *= write_scale if REVERSE else read_scale
    if DESCRIPTORS:
        d_k, d_v = _descriptor(k, k_st, T, K, BC, BK), _descriptor(v, v_st, T, V, BC, BV)
        if not STATE_ONLY:
            d_q, d_o = _descriptor(q, q_st, T, K, BC, BK), _descriptor(o, o_st, T, V, BC, BV)

    if VARLEN:  # no document yet
        current = tl.full([], -1, tl.int32)
        c_start, c_end = current, current
    chunks = tl.cdiv(end - begin, BC)
    for i_c in range(skip, chunks):
        start = begin + (chunks - 1 - i_c if REVERSE else i_c) * BC
        n = tl.minimum(BC, end - start)
        m_p = p < n
        if DESCRIPTORS:
            b_k, b_v = d_k.load([start, 0]), d_v.load([start, i_v * BV])
        else:
            b_k = tl.load(_rows(k, k_st, start, p, o_k), mask=m_p[:, None] & m_k[None, :], other=0.0)  # [BC, BK]
            b_v = tl.load(_rows(v, v_st, start, p, o_v), mask=m_p[:, None] & m_v[None, :], other=0.0)  # [BC, BV]

        e_left, e_right = p + 1, tl.where(m_p, n - 1 - p, 0)
        e_read, e_write = (e_right, e_left) if REVERSE else (e_left, e_right)
        b_read = tl.exp(b_ld * e_read.to(tl.float32))
        b_write = tl.exp(b_ld * e_write.to(tl.float32))
        b_carry = tl.exp(b_ld * n.to(tl.float32))
        if VARLEN:
            inside, first, last, source, r_edge, w_edge, current, c_start, c_end = _chunk_documents(
                doc, cu_seqlens, start, n, T, current, c_start, c_end, REVERSE
            )
            token = start + p
            b_read = tl.where((token >= r_edge) if REVERSE else (token < r_edge), b_read, 0.0)
            b_write = tl.where((token < w_edge) if REVERSE else (token >= w_edge), b_write, 0.0)
            b_carry = tl.where(source == current, b_carry, 0.0)

        if not STATE_ONLY:
            if DESCRIPTORS:
                b_q = d_q.load([start, 0])
            else:
                b_q = tl.load(_rows(q, q_st, start, p, o_k), mask=m_p[:, None] & m_k[None, :], other=0.0)  # [BC, BK]
            b_a = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * b_w  # [BC of j, BC of i]
            if VARLEN:
                if not inside:
                    b_j = tl.load(doc + start + p[:, None], mask=m_p[:, None], other=-1)
                    b_i = tl.load(doc + start + p[None, :], mask=m_p[None, :], other=-1)
                    b_a = tl.where(b_j == b_i, b_a, 0.0)
            b_o = _read_state(b_s, b_q, dtype, PRECISION, WIDE_STATE)
            b_o = b_o * (b_read * read_scale)[None, :]
            b_p = b_a.to(dtype)
            b_o += tl.dot(tl.trans(b_v), b_p, input_precision=PRECISION)  # [BV, BC]
            if dtype == tl.bfloat16:
                # What rounding to bf16 cut off. The state is rounded too, and shorter chunks take more of the sum from
                # it; this error is the cheaper one to correct.
                b_o += tl.dot(tl.trans(b_v), (b_a - b_p).to(dtype), input_precision=PRECISION)

        b_enter = tl.zeros([BV, BK], dtype=tl.float32)
        if INCOMING and not BY_ROW:
            # documents that enter in this chunk: begin here, or reversed end
            for i_n in range(first, last + 1):
                d_start, d_end = tl.load(cu_seqlens + i_n), tl.load(cu_seqlens + i_n + 1)
                enters = (d_end > start) & (d_end <= start + n) if REVERSE else (d_start >= start)
                if enters & (d_end > d_start):
                    p_e = state_tile(incoming, tl.cast(i_n, tl.int64), H, i_h, o_k, o_v, K, V, TRANSPOSED)
                    b_e = tl.load(p_e, mask=m_vk, other=0.0)
                    if not STATE_ONLY:
                        e_edge = (d_end - 1 - start - p) if REVERSE else (start + p - d_start + 1)
                        b_f = tl.exp(b_ld * tl.maximum(e_edge, 0).to(tl.float32))
                        m_d = (token >= d_start) & (token < d_end)
                        b_f = tl.where(m_d, b_f, 0.0)
                        b_x = tl.where(m_d[None, :], _read_state(b_e, b_q, dtype, PRECISION, WIDE_STATE), 0.0)
                        b_o += b_x * (b_f * read_scale)[None, :]
                    if i_n == current:
                        after = (d_end - start) if REVERSE else (start + n - d_start)
                        b_enter = b_e * tl.exp(b_ld * after.to(tl.float32))
        if OUTGOING and not BY_ROW:
            # documents that leave in this chunk: end here, or reversed begin
            for i_n in range(first, last + 1):
                d_start, d_end = tl.load(cu_seqlens + i_n), tl.load(cu_seqlens + i_n + 1)
                leaves = (d_start >= start) if REVERSE else (d_end <= start + n)
                if leaves & (d_end > d_start):
                    lo, hi = tl.maximum(d_start, start), tl.minimum(d_end, start + n)
                    e_edge = (start + p - d_start + 1) if REVERSE else (d_end - 1 - start - p)
                    b_f = tl.exp(b_ld * tl.maximum(e_edge, 0).to(tl.float32))
                    b_f = tl.where((token >= d_start) & (token < d_end), b_f, 0.0)
                    b_l = tl.dot(
                        tl.trans((b_v * (b_f * write_scale)[:, None]).to(dtype)), b_k, input_precision=PRECISION
                    )
                    b_l += tl.where(i_n == source, b_s * tl.exp(b_ld * (hi - lo).to(tl.float32)), 0.0)
                    if INCOMING:
                        whole = (lo == d_start) & (hi == d_end)
                        if whole:
                            p_e = state_tile(incoming, tl.cast(i_n, tl.int64), H, i_h, o_k, o_v, K, V, TRANSPOSED)
                            b_e = tl.load(p_e, mask=m_vk, other=0.0)
                            b_l += b_e * tl.exp(b_ld * (hi - lo).to(tl.float32))
                    p_e = state_tile(outgoing, tl.cast(i_n, tl.int64), H, i_h, o_k, o_v, K, V, TRANSPOSED)
                    tl.store(p_e, b_l, mask=m_vk)

        if not STATE_ONLY:
            b_o = tl.trans(b_o.to(o.dtype.element_ty))  # [BC, BV]
            if DESCRIPTORS:
                d_o.store([start, i_v * BV], b_o)
            else:
                tl.store(_rows(o, o_st, start, p, o_v), b_o, mask=m_p[:, None] & m_v[None, :])
        b_s = b_s * b_carry + b_enter
        b_s += tl.dot(tl.trans((b_v * (b_write * write_scale)[:, None]).to(dtype)), b_k, input_precision=PRECISION)
    if STATE_ONLY:
        i_o = i_b * split_rows + i_s - split_first
        tl.store(state_tile(split_states, i_o, H, i_h, o_k, o_v, K, V, TRANSPOSED), b_s, mask=m_vk & used)
    elif OUTGOING and BY_ROW:
        if i_s == (0 if REVERSE else segments - 1):
            tl.store(state_tile(outgoing, i_b, H, i_h, o_k, o_v, K, V, TRANSPOSED), b_s, mask=m_vk)
    if VARLEN:
        # What is not finite stays in b_s up to here, for 0 times NaN is NaN. It may have reached another document if
        # the last one did not enter from another segment
        others = (c_end <= tl.minimum(end, T - 1)) if REVERSE else (c_start >= tl.maximum(begin, 1))
        return others & _not_finite(b_s)
    else:
        return i_s < 0  # no


@triton.jit
def walk(
    q, k, v, o, q_st, k_st, v_st, o_st, b_ld, split_states, incoming, outgoing, doc, cu_seqlens,
    i_b, i_h, i_v, i_s, T, H, split_len, splits, segments, split_rows, split_first, read_scale, write_scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, STATE_ONLY: tl.constexpr,
    SPLIT_STATES: tl.constexpr, INCOMING: tl.constexpr, OUTGOING: tl.constexpr,
    VARLEN: tl.constexpr, BY_ROW: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, WIDE_STATE: tl.constexpr, BY_TOKEN: tl.constexpr,
):  # fmt: skip
    """``_walk_by_chunk``, or BY_TOKEN ``_walk_by_token``, which never asks for more."""
    if BY_TOKEN:
        _walk_by_token(
            q, k, v, o, q_st, k_st, v_st, o_st, b_ld, split_states, incoming, outgoing, doc, cu_seqlens,
            i_b, i_h, i_v, i_s, T, H, split_len, splits, segments, split_rows, split_first, read_scale, write_scale,
            K, V, BK, BV, REVERSE, TRANSPOSED, STATE_ONLY, SPLIT_STATES, INCOMING, OUTGOING, BY_ROW,
        )  # fmt: skip
        return i_s < 0  # no
    else:
        return _walk_by_chunk(
            q, k, v, o, q_st, k_st, v_st, o_st, b_ld, split_states, incoming, outgoing, doc, cu_seqlens,
            i_b, i_h, i_v, i_s, T, H, split_len, splits, segments, split_rows, split_first, read_scale, write_scale,
            K, V, BK, BV, BC, REVERSE, TRANSPOSED, STATE_ONLY, SPLIT_STATES, INCOMING, OUTGOING, VARLEN, BY_ROW,
            DESCRIPTORS, PRECISION, WIDE_STATE,
        )  # fmt: skip
