"""Tiled lightning attention in Triton: one walk over the chunks serves o, dq, dk and dv.

Lightning Attention-2 (Qin et al. 2024, section 3.2) splits a sequence into chunks: within a chunk ordinary attention
products under a decay mask, between chunks a running state of K x V. With lambda = exp(log_decay), a chunk of n tokens
i = 0..n-1 and the state S that enters it,

    o_i = scale ( sum_{j<=i} lambda^(i-j) (q_i.k_j) v_j + lambda^(i+1) q_i S )      S <- lambda^n S + sum_j lambda^(n-1-j) k_j^T v_j

and the gradients are the same operator, for dk and dv in reversed time with the gradient state D that enters from the right:

    dq_i = the line above with (q, k, v, S) = (do, v, k, S^T)
    dk_i = scale sum_{j>=i} lambda^(j-i) (v_i.do_j) q_j + lambda^(n-1-i) v_i D^T
    dv_i = scale sum_{j>=i} lambda^(j-i) (k_i.q_j) do_j + lambda^(n-1-i) k_i D      D <- lambda^n D + scale sum_j lambda^(j+1) q_j^T do_j

Only positive powers of lambda occur. The state is kept transposed, [V, K]: its accumulator is then an operand in
registers of the product with q, and so is v with its decays, while q and k go from memory to the tensor cores untouched.

A sequence is cut into parts of many chunks. A first launch computes every part's own state (``_walk`` with STATE_ONLY); a
second one walks segments of one or more parts, as many as fill the GPU, each from the decayed sum of the states before
it. A sequence of one segment needs the second launch only. The backward's second launch walks for dk, dv and dq.

Packed sequences (cu_seqlens) need no other grid: chunks run over the packed tokens as if they were one sequence, and a
token reads, writes and attends only where ``doc`` says the document is the same. States (initial_state, final_state and
their gradients) are of sequences (BY_ROW), or of packed documents: these enter and leave inside the chunk that holds the
document's edge. A packed sequence with states BY_ROW is a part of a longer one: its first document may have begun before.
"""

from __future__ import annotations

import triton
import triton.language as tl

# exp(-88) is below the smallest normal fp32: what has decayed so far adds nothing to a sum
UNDERFLOW = tl.constexpr(88.0)


@triton.jit
def _state_tile(states, index, H, i_h, o_k, o_v, K: tl.constexpr, V: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Addresses of the tile [o_v, o_k] of ``states[index, i_h]``, which memory holds as [K, V] or, TRANSPOSED, as [V, K]."""
    base = states + (index * H + i_h) * K * V
    if TRANSPOSED:
        return base + o_v[:, None] * K + o_k[None, :]
    else:
        return base + o_k[None, :] * V + o_v[:, None]


@triton.jit
def _reach(b_ld):
    """Tokens after which a decay underflows; many for no decay."""
    return tl.minimum(UNDERFLOW / tl.maximum(-b_ld, 1e-30), 2e9).to(tl.int32)


@triton.jit
def _descriptor(x, stride, T, dim: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr):
    """Of tiles [BC, BD] of ``x [T, dim]``, for the copy engine of Hopper and later GPUs."""
    return tl.make_tensor_descriptor(x, [T, dim], [tl.cast(stride, tl.int64), 1], [BC, BD])


@triton.jit
def _rows(x, stride, start, p, o_d):
    """Addresses of the tile [p, o_d] from row ``start`` on of x."""
    return x + tl.cast(start, tl.int64) * stride + p[:, None] * stride + o_d[None, :]


@triton.jit
def _wide(b_s):
    """fp32 rounded to tf32, for the tensor cores cut the digits off: all errors would have one sign."""
    rounded = (b_s.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(b_s == b_s, rounded.to(tl.float32, bitcast=True), b_s)  # not a number stays that


@triton.jit
def _chunk_documents(doc, cu_seqlens, start, n, T, current, c_start, c_end, REVERSE: tl.constexpr):
    """The documents of a chunk in scalars alone: layouts of vectors would cost shared memory.

    ``first`` and ``last`` are the documents of its first and last token, ``source`` is the one that the incoming state
    belongs to. Tokens of ``source`` end before ``r_edge``, reversed they begin there. The document of the outgoing state
    begins at ``w_edge``, reversed it ends before it; it is the new ``current``, from ``c_start`` to ``c_end``.

    A chunk that lies wholly in ``current``, the document of the chunk before, loads nothing: these loads are not pipelined,
    so that each would stop the walk.
    """
    if (c_start <= start) & (start + n <= c_end):
        first = current
        last = current
        source = current
        r_edge = c_start if REVERSE else c_end
    else:
        first = tl.load(doc + start)
        last = tl.load(doc + start + n - 1)
        if REVERSE:
            source = tl.load(
                doc + tl.minimum(start + n, T - 1)
            )  # at the end of the sequence: the one that goes on there
            r_edge = tl.load(cu_seqlens + source)
            current = first
        else:
            source = tl.load(doc + tl.maximum(start - 1, 0))
            r_edge = tl.load(cu_seqlens + source + 1)
            current = last
        c_start = tl.load(cu_seqlens + current)
        c_end = tl.load(cu_seqlens + current + 1)
    w_edge = c_end if REVERSE else c_start
    return first, last, source, r_edge, w_edge, current, c_start, c_end


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
def _attend_by_token(b_o, b_a, v, v_st, doc, start, n, p, o_v, m_v):
    """Add v times the weights b_a [BC of j, BC of i] to b_o [BV, BC], one token j after another, within documents."""
    b_i = tl.load(doc + start + p, mask=p < n, other=-1)
    for j in range(n):
        b_p = tl.sum(tl.where(p[:, None] == j, b_a, 0.0), axis=0)
        b_v = tl.load(v + tl.cast(start + j, tl.int64) * v_st + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_o += tl.where((b_i == tl.load(doc + start + j))[None, :], b_v[:, None] * b_p[None, :], 0.0)
    return b_o


@triton.jit
def _write_by_token(b_s, k, v, k_st, v_st, lo, hi, b_ld, write_scale, o_k, o_v, m_k, m_v, REVERSE: tl.constexpr):
    """What the tokens from lo to hi write to a state, one token after another.

    It takes the place of b_s [BV, BK], whose layout it keeps: zeros would get another, and the way back takes shared memory.
    """
    for t in range(lo, hi):
        passed = t - lo + 1 if REVERSE else hi - 1 - t
        b_k = tl.load(k + tl.cast(t, tl.int64) * k_st + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_v = tl.load(v + tl.cast(t, tl.int64) * v_st + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_v *= tl.exp(b_ld * passed.to(tl.float32)) * write_scale
        b_s = tl.where(t == lo, 0.0, b_s) + b_v[:, None] * b_k[None, :]
    return b_s


@triton.jit
def _incoming_state(
    split_states, split_rows, split_first, incoming, doc, b_ld, i_b, i_h, o_k, o_v, m_vk, begin, end, T, H, split_len,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, SPLIT_STATES: tl.constexpr, INCOMING: tl.constexpr,
    VARLEN: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """State [BV, BK] that enters the segment from ``begin`` to ``end``: of the parts before it, as far as their decay reaches.

    The sequence's own end is a segment too: (T, T), or reversed (0, 0).
    """
    b_s = tl.zeros([BV, BK], dtype=tl.float32)
    if SPLIT_STATES:
        first = tl.cdiv(end, split_len) if REVERSE else tl.cdiv(begin, split_len) - 1  # the nearest part
        passed = tl.cdiv(T, split_len) - first if REVERSE else first + 1
        for i in range(tl.minimum(passed, _reach(b_ld) // split_len + 2)):
            i_o = first + i if REVERSE else first - i
            edge = i_o * split_len if REVERSE else tl.minimum((i_o + 1) * split_len, begin)  # of the part, on this side
            b_f = tl.exp(b_ld * (edge - end if REVERSE else begin - edge).to(tl.float32))
            m_s = m_vk
            if (
                VARLEN
            ):  # only of the document that crosses into this segment: others are not read, for 0 times NaN is NaN
                if REVERSE:
                    m_s = m_vk & (tl.load(doc + edge) == tl.load(doc + end))
                else:
                    m_s = m_vk & (tl.load(doc + edge - 1) == tl.load(doc + begin - 1))
            i_o += i_b * split_rows - split_first
            p_s = _state_tile(split_states, i_o, H, i_h, o_k, o_v, K, V, TRANSPOSED)
            b_s += b_f * tl.load(p_s, mask=m_s, other=0.0)
    if INCOMING and BY_ROW:
        b_f = tl.exp(b_ld * (T - end if REVERSE else begin).to(tl.float32))
        m_s = m_vk
        if VARLEN:  # only if the document at the sequence's edge reaches this segment
            if REVERSE:
                m_s = m_vk & (tl.load(doc + T - 1) == tl.load(doc + tl.minimum(end, T - 1)))
            else:
                m_s = m_vk & (tl.load(doc) == tl.load(doc + tl.maximum(begin - 1, 0)))
        b_s += b_f * tl.load(_state_tile(incoming, i_b, H, i_h, o_k, o_v, K, V, TRANSPOSED), mask=m_s, other=0.0)
    return b_s


@triton.jit
def _walk(
    q, k, v, o,  # at token 0 of this batch row and head: [T, dim] with strides q_st .. o_st and 1
    q_st, k_st, v_st, o_st,
    b_ld,  # log_decay of this head
    split_states,  # states of splits [B, own_rows, H, K, V], from part own_first on: written if STATE_ONLY, else read
    incoming, outgoing,  # states that enter and leave sequences [B, H, K, V], not BY_ROW documents [N, H, K, V]
    doc, cu_seqlens,  # VARLEN: document of each token [T], bounds [N+1]
    i_b, i_h, i_v,
    i_s,  # segment, or with STATE_ONLY the part
    T, H,
    split_len, splits, segments, split_rows, split_first,  # tokens of a part, parts of a segment
    read_scale, write_scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, STATE_ONLY: tl.constexpr,
    SPLIT_STATES: tl.constexpr, INCOMING: tl.constexpr, OUTGOING: tl.constexpr, VARLEN: tl.constexpr, BY_ROW: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, WIDE_STATE: tl.constexpr,
):  # fmt: skip
    """Walk one segment (STATE_ONLY: one part) of one head; a program holds BV columns of v, o and the state.

    TRANSPOSED: states lie in memory as [V, K]. DESCRIPTORS needs parts of whole chunks. WIDE_STATE keeps the state in fp32
    for its product with q (tf32): fp16 has too small a range for a long sum.
    """
    dtype = v.dtype.element_ty
    p = tl.arange(0, BC)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_vk = m_v[:, None] & m_k[None, :]
    if STATE_ONLY:
        begin = i_s * split_len
        end = tl.minimum(T, begin + split_len)
        # parts between this one and the segment (or end of the sequence) that needs it first; nothing of it is left there if
        # not `used`: `_entering` reads no further
        between = i_s % splits if REVERSE else tl.minimum(splits - 1 - i_s % splits, tl.cdiv(T, split_len) - 1 - i_s)
        used = between < _reach(b_ld) // split_len + 2
        skip = tl.maximum(end - begin - _reach(b_ld), 0) // BC  # chunks of which nothing is left at the part's end
        skip = tl.where(used, skip, tl.cdiv(split_len, BC))
        b_s = tl.zeros([BV, BK], dtype=tl.float32)
    else:
        begin = i_s * splits * split_len
        end = tl.minimum(T, begin + splits * split_len)
        skip = 0
        b_s = _incoming_state(
            split_states, split_rows, split_first, incoming, doc, b_ld, i_b, i_h, o_k, o_v, m_vk, begin, end, T, H, split_len,
            K, V, BK, BV, REVERSE, TRANSPOSED, SPLIT_STATES, INCOMING, VARLEN, BY_ROW,
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
            first, last, source, r_edge, w_edge, current, c_start, c_end = _chunk_documents(
                doc, cu_seqlens, start, n, T, current, c_start, c_end, REVERSE
            )
            several = first != last
            if not STATE_ONLY:
                if source != (last if REVERSE else first):  # no token here is of the state's document
                    b_s = tl.zeros([BV, BK], dtype=tl.float32)
            token = start + p
            m_read = (token >= r_edge) if REVERSE else (token < r_edge)
            b_read = tl.where(m_read, b_read, 0.0)
            b_write = tl.where((token < w_edge) if REVERSE else (token >= w_edge), b_write, 0.0)
            b_carry = tl.where(source == current, b_carry, 0.0)

        if not STATE_ONLY:
            if DESCRIPTORS:
                b_q = d_q.load([start, 0])
            else:
                b_q = tl.load(_rows(q, q_st, start, p, o_k), mask=m_p[:, None] & m_k[None, :], other=0.0)  # [BC, BK]
            b_a = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * b_w  # [BC of j, BC of i]
            if VARLEN:
                if several:
                    b_j = tl.load(doc + start + p[:, None], mask=m_p[:, None], other=-1)
                    b_i = tl.load(doc + start + p[None, :], mask=m_p[None, :], other=-1)
                    b_a = tl.where(b_j == b_i, b_a, 0.0)
            b_o = _read_state(b_s, b_q, dtype, PRECISION, WIDE_STATE)
            b_o = b_o * (b_read * read_scale)[None, :]
            b_p = b_a.to(dtype)
            b_o += tl.dot(tl.trans(b_v), b_p, input_precision=PRECISION)  # [BV, BC]
            if dtype == tl.bfloat16:
                # What bf16 cut off. Short chunks make more of the sum come from the state, which is rounded to bf16 as well:
                # this is the cheaper one to mend.
                b_o += tl.dot(tl.trans(b_v), (b_a - b_p).to(dtype), input_precision=PRECISION)
            if VARLEN:
                if BY_ROW or not INCOMING:  # nothing is added below; layouts of o are changed in its own dtype
                    b_o = b_o.to(o.dtype.element_ty)
                poisoned = several
                if several:
                    poisoned = _not_finite(b_o)
                    if poisoned:
                        b_x = _read_state(b_s, b_q, dtype, PRECISION, WIDE_STATE) * (b_read * read_scale)[None, :]
                        b_x = tl.where(m_read[None, :], b_x, 0.0)
                        b_a = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * b_w
                        b_o = _attend_by_token(b_x, b_a, v, v_st, doc, start, n, p, o_v, m_v).to(b_o.dtype)

        b_enter = tl.zeros([BV, BK], dtype=tl.float32)
        if INCOMING and not BY_ROW:
            # documents whose entering edge (start, or end if reversed) lies in this chunk
            for i_n in range(first, last + 1):
                d_start, d_end = tl.load(cu_seqlens + i_n), tl.load(cu_seqlens + i_n + 1)
                enters = (d_end > start) & (d_end <= start + n) if REVERSE else (d_start >= start)
                if enters & (d_end > d_start):
                    p_e = _state_tile(incoming, tl.cast(i_n, tl.int64), H, i_h, o_k, o_v, K, V, TRANSPOSED)
                    b_e = tl.load(p_e, mask=m_vk, other=0.0)
                    if not STATE_ONLY:
                        e_edge = (d_end - 1 - start - p) if REVERSE else (start + p - d_start + 1)
                        b_f = tl.exp(b_ld * tl.maximum(e_edge, 0).to(tl.float32)) * read_scale
                        b_x = _read_state(b_e, b_q, dtype, PRECISION, WIDE_STATE) * b_f[None, :]
                        b_o += tl.where(((token >= d_start) & (token < d_end))[None, :], b_x, 0.0)
                    if i_n == current:
                        after = (d_end - start) if REVERSE else (start + n - d_start)
                        b_enter = b_e * tl.exp(b_ld * after.to(tl.float32))
        if OUTGOING and not BY_ROW:
            # documents whose leaving edge (end, or start if reversed) lies in this chunk
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
                    if poisoned:
                        b_l = _write_by_token(
                            b_l, k, v, k_st, v_st, lo, hi, b_ld, write_scale, o_k, o_v, m_k, m_v, REVERSE
                        )
                    b_l += tl.where(i_n == source, b_s * tl.exp(b_ld * (hi - lo).to(tl.float32)), 0.0)
                    if INCOMING:
                        whole = (lo == d_start) & (hi == d_end)
                        if whole:
                            p_e = _state_tile(incoming, tl.cast(i_n, tl.int64), H, i_h, o_k, o_v, K, V, TRANSPOSED)
                            b_e = tl.load(p_e, mask=m_vk, other=0.0)
                            b_l += b_e * tl.exp(b_ld * (hi - lo).to(tl.float32))
                    p_e = _state_tile(outgoing, tl.cast(i_n, tl.int64), H, i_h, o_k, o_v, K, V, TRANSPOSED)
                    tl.store(p_e, b_l, mask=m_vk)

        if not STATE_ONLY:
            b_o = tl.trans(b_o.to(o.dtype.element_ty))  # [BC, BV]
            if DESCRIPTORS:
                d_o.store([start, i_v * BV], b_o)
            else:
                tl.store(_rows(o, o_st, start, p, o_v), b_o, mask=m_p[:, None] & m_v[None, :])
        b_s = b_s * b_carry + b_enter
        b_s += tl.dot(tl.trans((b_v * (b_write * write_scale)[:, None]).to(dtype)), b_k, input_precision=PRECISION)
        if VARLEN and not STATE_ONLY:
            if several:
                if poisoned:  # what entered the chunk is of another document
                    lo, hi = tl.maximum(c_start, start), tl.minimum(c_end, start + n)
                    b_s = _write_by_token(b_s, k, v, k_st, v_st, lo, hi, b_ld, write_scale, o_k, o_v, m_k, m_v, REVERSE)
                    if INCOMING and not BY_ROW:
                        p_e = _state_tile(incoming, tl.cast(current, tl.int64), H, i_h, o_k, o_v, K, V, TRANSPOSED)
                        b_s += tl.load(p_e, mask=m_vk, other=0.0) * tl.exp(b_ld * (hi - lo).to(tl.float32))

    if STATE_ONLY:
        if VARLEN:
            if (c_start > begin) | (c_end < end):  # other documents may have got in
                if _not_finite(b_s):
                    lo, hi = tl.maximum(c_start, begin), tl.minimum(c_end, end)
                    b_s = _write_by_token(b_s, k, v, k_st, v_st, lo, hi, b_ld, write_scale, o_k, o_v, m_k, m_v, REVERSE)
                    if INCOMING and not BY_ROW:
                        if (c_end <= end) if REVERSE else (c_start >= begin):
                            p_e = _state_tile(incoming, tl.cast(current, tl.int64), H, i_h, o_k, o_v, K, V, TRANSPOSED)
                            b_s += tl.load(p_e, mask=m_vk, other=0.0) * tl.exp(b_ld * (hi - lo).to(tl.float32))
        i_o = i_b * split_rows + i_s - split_first
        tl.store(_state_tile(split_states, i_o, H, i_h, o_k, o_v, K, V, TRANSPOSED), b_s, mask=m_vk & used)
    else:
        if OUTGOING and BY_ROW:
            if i_s == (0 if REVERSE else segments - 1):
                tl.store(_state_tile(outgoing, i_b, H, i_h, o_k, o_v, K, V, TRANSPOSED), b_s, mask=m_vk)


# Lengths and counts are not specialised: another T, B or H is not another kernel. Strides are, by their alignment.
@triton.jit(
    do_not_specialize=(
        "group",
        "pieces",
        "documents",
        "T",
        "H",
        "split_len",
        "splits",
        "segments",
        "split_rows",
        "split_first",
    )
)
def walk_kernel(
    q, k, v, o, log_decay, split_states, incoming, outgoing, doc, cu_seqlens,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, o_sb, o_st, o_sh,
    group, pieces,  # query heads per head of k and v; sequences that follow each other along T in a row of the batch
    documents,  # of a sequence: doc [B, T], cu_seqlens [B, documents + 1]
    T, H, split_len, splits, segments, split_rows, split_first, read_scale, write_scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr,
    REVERSE: tl.constexpr, STATE_ONLY: tl.constexpr,
    SPLIT_STATES: tl.constexpr, INCOMING: tl.constexpr, OUTGOING: tl.constexpr, VARLEN: tl.constexpr, BY_ROW: tl.constexpr,
    PRECISION: tl.constexpr, WIDE_STATE: tl.constexpr,
):  # fmt: skip
    """o and the final states, or with STATE_ONLY the own states of ``own_rows`` parts.

    All programs are on the grid's first axis, for the others end at 65535. Columns of one segment run side by side. Tensor
    descriptors gain nothing here.
    """
    columns = tl.cdiv(V, BV)
    i = tl.program_id(0)
    i_v, i = i % columns, i // columns
    rows = split_rows if STATE_ONLY else segments
    if STATE_ONLY:  # first the last heads, whose decay is slowest in most models: they have most to do
        n = tl.num_programs(0) // (columns * H)
        i_h, i = H - group * (1 + i // (n * group)) + i % group, i // group % n
    else:
        i_h, i = i % H, i // H
    i_s, i_b = i % rows, (i // rows).to(tl.int64)
    i_r, i_t = i_b // pieces, i_b % pieces * T
    if VARLEN:
        doc += i_b * T
        cu_seqlens += i_b * (documents + 1)
    if STATE_ONLY:
        i_s += split_first
    else:
        q += i_r * q_sb + i_t * q_st + i_h.to(tl.int64) * q_sh
        o += i_r * o_sb + i_t * o_st + i_h.to(tl.int64) * o_sh
    k += i_r * k_sb + i_t * k_st + (i_h // group).to(tl.int64) * k_sh
    v += i_r * v_sb + i_t * v_st + (i_h // group).to(tl.int64) * v_sh
    _walk(
        q, k, v, o, q_st, k_st, v_st, o_st, tl.load(log_decay + i_h), split_states, incoming, outgoing, doc, cu_seqlens,
        i_b, i_h, i_v, i_s, T, H, split_len, splits, segments, split_rows, split_first, read_scale, write_scale,
        K, V, BK, BV, BC, REVERSE, False, STATE_ONLY, SPLIT_STATES, INCOMING, OUTGOING, VARLEN, BY_ROW, False, PRECISION, WIDE_STATE,
    )  # fmt: skip


_COUNTS = (
    "group", "pieces", "documents", "T", "H", "split_len", "splits", "segments", "split_rows", "split_first",
    "splits_q", "segments_q", "split_rows_q",
)  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def gradients_kernel(
    q, k, v, do, dq, dk, dv, log_decay,
    split_states, split_grads, initial, dfinal, dinitial, doc, cu_seqlens,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, do_sb, do_st, do_sh,
    dq_sb, dq_st, dk_sb, dk_st, dv_sb, dv_st,  # heads of these are K, K and V elements apart
    group, pieces, documents, T, H, split_len,
    splits, segments, split_rows, split_first,  # of the walks for dk and dv
    splits_q, segments_q, split_rows_q,  # of the walk for dq
    scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    COLS_K: tl.constexpr, COLS_V: tl.constexpr,  # columns of a program for dq or dk, and for dv
    BC: tl.constexpr, SPLIT_STATES: tl.constexpr, SPLIT_GRADS: tl.constexpr, INITIAL: tl.constexpr, DFINAL: tl.constexpr,
    VARLEN: tl.constexpr, BY_ROW: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, WIDE_STATE: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv and d(initial_state) in one launch: first the programs for dq, then those for dk and dv.

    dk and dv of one segment read the same four tensors. Their programs run side by side and at the same pace, so that
    what one has read the other finds in the L2 cache.
    """
    n_k, n_v = tl.cdiv(K, COLS_K), tl.cdiv(V, COLS_V)
    i = tl.program_id(0)
    batch = tl.num_programs(0) // (H * ((n_k + n_v) * segments + n_k * segments_q))
    programs_q = n_k * H * segments_q * batch
    for_q = i < programs_q
    i = tl.where(for_q, i, i - programs_q)
    columns, count = tl.where(for_q, n_k, n_k + n_v), tl.where(for_q, segments_q, segments)
    i_v, i = i % columns, i // columns
    i_h, i = i % H, i // H
    i_s, i_b = i % count, (i // count).to(tl.int64)
    head, shared = i_h.to(tl.int64), (i_h // group).to(tl.int64)
    i_r, i_t = i_b // pieces, i_b % pieces * T
    if VARLEN:
        doc += i_b * T
        cu_seqlens += i_b * (documents + 1)
    q += i_r * q_sb + i_t * q_st + head * q_sh
    k += i_r * k_sb + i_t * k_st + shared * k_sh
    v += i_r * v_sb + i_t * v_st + shared * v_sh
    do += i_r * do_sb + i_t * do_st + head * do_sh
    dq += i_r * dq_sb + i_t * dq_st + head * K
    dk += i_r * dk_sb + i_t * dk_st + head * K
    dv += i_r * dv_sb + i_t * dv_st + head * V
    b_ld = tl.load(log_decay + i_h)
    # three ifs, not elif: Triton then gives the three the same shared memory
    if (i_v < n_k) & (not for_q):
        _walk(
            v, do, q, dk, v_st, do_st, q_st, dk_st, b_ld, split_grads, dfinal, dinitial, doc, cu_seqlens,
            i_b, i_h, i_v, segments - 1 - i_s, T, H, split_len, splits, segments, split_rows, split_first, 1.0, scale,
            V, K, BV, COLS_K, BC, True, True, False, SPLIT_GRADS, DFINAL, False, VARLEN, BY_ROW, DESCRIPTORS, PRECISION, WIDE_STATE,
        )  # fmt: skip
    if (i_v >= n_k) & (not for_q):
        _walk(
            k, q, do, dv, k_st, q_st, do_st, dv_st, b_ld, split_grads, dfinal, dinitial, doc, cu_seqlens,
            i_b, i_h, i_v - n_k, segments - 1 - i_s, T, H, split_len, splits, segments, split_rows, split_first, 1.0, scale,
            K, V, BK, COLS_V, BC, True, False, False, SPLIT_GRADS, DFINAL, INITIAL, VARLEN, BY_ROW, DESCRIPTORS, PRECISION, WIDE_STATE,
        )  # fmt: skip
    if for_q:
        _walk(
            do, v, k, dq, do_st, v_st, k_st, dq_st, b_ld, split_states, initial, dinitial, doc, cu_seqlens,
            i_b, i_h, i_v, i_s, T, H, split_len, splits_q, segments_q, split_rows_q, 0, scale, 1.0,
            V, K, BV, COLS_K, BC, False, True, False, SPLIT_STATES, INITIAL, False, VARLEN, BY_ROW, DESCRIPTORS, PRECISION, WIDE_STATE,
        )  # fmt: skip


@triton.jit(do_not_specialize=("group", "H"))
def step_kernel(
    q, k, v, o, log_decay, initial, final,  # one token: [B, 1, heads, dim]; states [B, H, K, V]
    q_sb, q_sh, k_sb, k_sh, v_sb, v_sh, o_sb, group, H, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """One token, as in decoding: bound by reading and writing the state. In fp32 throughout."""
    columns = tl.cdiv(V, BV)
    i = tl.program_id(0)
    i_v, i = i % columns, i // columns
    i_h, i_b = i % H, (i // H).to(tl.int64)
    shared = (i_h // group).to(tl.int64)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_vk = m_v[:, None] & m_k[None, :]
    b_q = tl.load(q + i_b * q_sb + i_h.to(tl.int64) * q_sh + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_k = tl.load(k + i_b * k_sb + shared * k_sh + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_v = tl.load(v + i_b * v_sb + shared * v_sh + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_s = b_v[:, None] * b_k[None, :]
    if INITIAL:
        b_s += tl.exp(tl.load(log_decay + i_h)) * tl.load(
            _state_tile(initial, i_b, H, i_h, o_k, o_v, K, V, False), mask=m_vk, other=0.0
        )
    b_o = tl.sum(b_q[None, :] * b_s, axis=1) * scale
    tl.store(o + i_b * o_sb + i_h * V + o_v, b_o.to(o.dtype.element_ty), mask=m_v)
    if FINAL:
        tl.store(_state_tile(final, i_b, H, i_h, o_k, o_v, K, V, False), b_s, mask=m_vk)
