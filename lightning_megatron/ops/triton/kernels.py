"""Tiled lightning attention in Triton: one walk over the chunks serves o, dq, dk and dv.

Lightning Attention-2 (Qin et al. 2024, section 3.2) splits a sequence into chunks: ordinary attention products under a
decay mask within a chunk, a running state of K x V between chunks. With lambda = exp(log_decay), a chunk of n tokens
i = 0..n-1 and its incoming state S,

    o_i = scale ( sum_{j<=i} lambda^(i-j) (q_i.k_j) v_j + lambda^(i+1) q_i S )
    S  <- lambda^n S + sum_j lambda^(n-1-j) k_j^T v_j

The gradients are the same operator, for dk and dv in reversed time with the gradient state D that enters from the
right:

    dq_i = the line for o_i with (q, k, v, S) = (do, v, k, S^T)
    dk_i = scale sum_{j>=i} lambda^(j-i) (v_i.do_j) q_j + lambda^(n-1-i) v_i D^T
    dv_i = scale sum_{j>=i} lambda^(j-i) (k_i.q_j) do_j + lambda^(n-1-i) k_i D
    D   <- lambda^n D + scale sum_j lambda^(j+1) q_j^T do_j

Only positive powers of lambda occur. The kernels hold the state transposed, [V, K]: its accumulator is then the
register operand of the product with q, and so is v with its decays, while q and k go from memory to the tensor cores
untouched.

A sequence is cut into *splits* of many chunks. A first launch computes the state that each split alone leaves
(STATE_ONLY). A second one walks *segments* of one or more splits, as many as fill the GPU; each starts from the decayed
sum of the split states before it. A sequence of one segment needs the second launch only. The backward's second launch
walks for dk, dv and dq.

Packed sequences (cu_seqlens) need no other grid: chunks run over the packed tokens as if they were one sequence, and a
token reads, writes and attends only where ``doc`` says that the document is the same. Masks keep documents apart by
factors of 0, which infinities and NaN survive: they stay in the running state to the end of the segment or split. There
they are looked for, once, and where they may have reached another document the segment is walked again token by token
(``_walk_by_token``, ``_write_by_token``). The loop over chunks does nothing of this.

Parameters, of ``_walk`` (W), ``walk_kernel`` (F) and ``gradients_kernel`` (G); of B sequences of T tokens and H heads:

    q k v o          W F G  what reads, what is matched, what is summed, the result
    do dq dk dv          G  gradients; F and G get tensors [rows, pieces * T, heads, dim], W those of its head, [T, dim]
    *_sb *_st *_sh   W F G  strides from a row, token and head to the next, in elements; the last dim has stride 1
    log_decay          F G  [H] fp32; W gets that of its head, b_ld
    split_states     W F G  [B, split_rows, H, K, V] fp32, of splits from split_first on; STATE_ONLY writes them
    split_grads          G  the same of gradient states, for dk and dv
    incoming         W F    states that enter, [N, H, K, V] fp32: N = B with BY_ROW, else the number of documents
    outgoing         W F    states that leave, as incoming
    initial dfinal       G  incoming of the walk for dq, and of those for dk and dv
    dinitial             G  outgoing of the walk for dv
    doc              W F G  [B, T] int32, document of each token; W gets the sequence's row
    cu_seqlens       W F G  [B, documents + 1] int32, bounds of the documents; W gets the sequence's row
    group              F G  query heads per head of k and v
    pieces             F G  sequences that follow each other along T in a row of the batch
    documents          F G  of a sequence
    T H              W F G  tokens of a sequence, query heads
    split_len        W F G  tokens of a split
    splits segments  W F G  splits of a segment, segments of a sequence; in G for dk and dv, splits_q segments_q for dq
    split_rows       W F G  splits of a sequence whose states exist; in G of split_grads, split_rows_q of split_states
    split_first      W F G  number of the first of these splits
    i_b i_h i_v i_s  W      sequence, head, tile of V, and segment (STATE_ONLY: split) of this program
    read_scale       W F    factor of q S and, forward, of the products in the chunk (scale of o and dq; 1 in reverse)
    write_scale      W F    factor of what the state takes up and, in reverse, of the products in the chunk
    scale                G  the operator's
    K V              W F G  dims of q and k, and of v and o
    BK BV BC         W F G  tile: K (G also V) padded to a power of two, columns of V in a program, tokens of a chunk
    COLS_K COLS_V        G  columns of a program for dq or dk, and for dv
    REVERSE          W F    walk from the last token to the first
    TRANSPOSED       W      states lie in memory as [V, K]
    STATE_ONLY       W F    compute the states of splits; q and o are None
    SPLIT_STATES     W F G  split_states is given; SPLIT_GRADS: split_grads
    INCOMING         W F    incoming is given; OUTGOING: outgoing; in G INITIAL: initial and dinitial, DFINAL: dfinal
    VARLEN           W F G  doc and cu_seqlens are given
    BY_ROW           W F G  states are those of sequences, which may begin and end inside documents. Otherwise they are
                            those of documents and enter and leave inside the chunk that holds the document's edge
    DESCRIPTORS      W   G  move tiles by the copy engine of Hopper and later GPUs; needs splits of whole chunks
    PRECISION        W F G  input_precision of products
    WIDE_STATE       W F G  multiply the state by q in tf32: the range of fp16 is too small for a long sum
"""

from __future__ import annotations

import triton
import triton.language as tl

# exp(-88) is below the smallest normal fp32: what has decayed so far adds nothing to a sum
UNDERFLOW = tl.constexpr(88.0)


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
    """Number of tokens after which a decay underflows; without decay very large."""
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
def _other_documents(doc, begin, end, T, REVERSE: tl.constexpr):
    """Whether the tokens of a segment and the one before them (reversed behind them) are of several documents."""
    if REVERSE:
        return tl.load(doc + begin) != tl.load(doc + tl.minimum(end, T - 1))
    else:
        return tl.load(doc + tl.maximum(begin - 1, 0)) != tl.load(doc + end - 1)


@triton.jit
def _stores_arrived(DESCRIPTORS: tl.constexpr):
    """Wait until what this program has stored is in memory, so that it may be stored anew."""
    if DESCRIPTORS:  # the copy engine stores on its own
        tl.inline_asm_elementwise(
            "cp.async.bulk.wait_group 0; mov.b32 $0, $1;", "=r,r", [tl.arange(0, 128)], tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()


@triton.jit
def _walk_by_token(
    q, k, v, o, q_st, k_st, v_st, o_st, b_s, b_ld, incoming, outgoing, doc, cu_seqlens,
    i_b, i_h, o_k, o_v, m_k, m_v, begin, end, T, H, last_segment, read_scale, write_scale,
    K: tl.constexpr, V: tl.constexpr, REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr,
    INCOMING: tl.constexpr, OUTGOING: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """Walk a packed segment token by token from the incoming state b_s [BV, BK].

    Chunks multiply what belongs to another document by 0, and 0 times NaN is NaN. Here tokens of other documents are
    never touched.
    """
    m_vk = m_v[:, None] & m_k[None, :]
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
        b_q = tl.load(q + at * q_st + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_k = tl.load(k + at * k_st + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_v = tl.load(v + at * v_st + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_kv = b_v[:, None] * b_k[None, :] * write_scale
        b_s = b_s + b_kv if REVERSE else b_s * b_decay + b_kv
        b_o = tl.sum(b_s * b_q[None, :], axis=1) * read_scale
        tl.store(o + at * o_st + o_v, b_o.to(o.dtype.element_ty), mask=m_v)
        if REVERSE:
            b_s *= b_decay
        if OUTGOING and not BY_ROW:
            p_e = state_tile(outgoing, tl.cast(current, tl.int64), H, i_h, o_k, o_v, K, V, TRANSPOSED)
            tl.store(p_e, b_s, mask=m_vk & (t == (d_start if REVERSE else d_end - 1)))
    if OUTGOING and BY_ROW:
        p_e = state_tile(outgoing, i_b, H, i_h, o_k, o_v, K, V, TRANSPOSED)
        tl.store(p_e, b_s, mask=m_vk & last_segment)


@triton.jit
def _write_by_token(b_s, k, v, k_st, v_st, lo, hi, b_ld, write_scale, o_k, o_v, m_k, m_v, REVERSE: tl.constexpr):
    """What the tokens from lo to hi write to a state, one token after another.

    The result replaces b_s [BV, BK] and keeps its layout. Zeros would get another layout, and converting it back would
    take shared memory.
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
    split_states, split_rows, split_first, incoming, doc, cu_seqlens, b_ld,
    i_b, i_h, o_k, o_v, m_vk, begin, end, T, H, split_len,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, SPLIT_STATES: tl.constexpr, INCOMING: tl.constexpr,
    VARLEN: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """State [BV, BK] that enters the segment from ``begin`` to ``end``: the decayed sum of the splits before it.

    Splits too far away for their decay to leave anything are not read, nor are those of other documents. (T, T),
    reversed (0, 0), gives the state that leaves the sequence.
    """
    b_s = tl.zeros([BV, BK], dtype=tl.float32)
    if VARLEN and (SPLIT_STATES or (INCOMING and BY_ROW)):  # the document that crosses into this segment
        if REVERSE:  # ends here
            d_edge = tl.load(cu_seqlens + tl.load(doc + tl.minimum(end, T - 1)) + 1)
        else:  # begins here
            d_edge = tl.load(cu_seqlens + tl.load(doc + tl.maximum(begin - 1, 0)))
    if SPLIT_STATES:
        first = tl.cdiv(end, split_len) if REVERSE else tl.cdiv(begin, split_len) - 1  # the nearest split
        passed = tl.cdiv(T, split_len) - first if REVERSE else first + 1
        if VARLEN:  # counted, not masked: a load that waits for a mask is not in flight beside the one before
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
def _walk(
    q, k, v, o, q_st, k_st, v_st, o_st, b_ld, split_states, incoming, outgoing, doc, cu_seqlens,
    i_b, i_h, i_v, i_s, T, H, split_len, splits, segments, split_rows, split_first, read_scale, write_scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, STATE_ONLY: tl.constexpr,
    SPLIT_STATES: tl.constexpr, INCOMING: tl.constexpr, OUTGOING: tl.constexpr,
    VARLEN: tl.constexpr, BY_ROW: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, WIDE_STATE: tl.constexpr,
):  # fmt: skip
    """Walk one segment (STATE_ONLY: one split) of one head; a program holds BV columns of v, o and the state."""
    dtype = v.dtype.element_ty
    p = tl.arange(0, BC)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_vk = m_v[:, None] & m_k[None, :]
    if STATE_ONLY:
        begin = i_s * split_len
        end = tl.minimum(T, begin + split_len)
        # splits between this one and the segment (or end of the sequence) that needs it first. `_incoming_state` reads
        # only as far as decay leaves something; no segment uses a split beyond that
        between = i_s % splits if REVERSE else tl.minimum(splits - 1 - i_s % splits, tl.cdiv(T, split_len) - 1 - i_s)
        used = between < _reach(b_ld) // split_len + 2
        skip = tl.maximum(end - begin - _reach(b_ld), 0) // BC  # decayed to nothing at the end
        skip = tl.where(used, skip, tl.cdiv(split_len, BC))
        b_s = tl.zeros([BV, BK], dtype=tl.float32)
    else:
        begin = i_s * splits * split_len
        end = tl.minimum(T, begin + splits * split_len)
        skip = 0
        b_s = _incoming_state(
            split_states, split_rows, split_first, incoming, doc, cu_seqlens, b_ld,
            i_b, i_h, o_k, o_v, m_vk, begin, end, T, H, split_len,
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
        if VARLEN:
            if (c_start > begin) | (c_end < end):  # other documents were in the same chunks
                if _not_finite(b_s):
                    lo, hi = tl.maximum(c_start, begin), tl.minimum(c_end, end)
                    b_s = _write_by_token(b_s, k, v, k_st, v_st, lo, hi, b_ld, write_scale, o_k, o_v, m_k, m_v, REVERSE)
                    if INCOMING and not BY_ROW:
                        if (c_end <= end) if REVERSE else (c_start >= begin):
                            p_e = state_tile(incoming, tl.cast(current, tl.int64), H, i_h, o_k, o_v, K, V, TRANSPOSED)
                            b_s += tl.load(p_e, mask=m_vk, other=0.0) * tl.exp(b_ld * (hi - lo).to(tl.float32))
        i_o = i_b * split_rows + i_s - split_first
        tl.store(state_tile(split_states, i_o, H, i_h, o_k, o_v, K, V, TRANSPOSED), b_s, mask=m_vk & used)
    else:
        last_segment = i_s == (0 if REVERSE else segments - 1)
        if OUTGOING and BY_ROW:
            if last_segment:
                tl.store(state_tile(outgoing, i_b, H, i_h, o_k, o_v, K, V, TRANSPOSED), b_s, mask=m_vk)
        if VARLEN:
            # What is not finite stays in b_s up to here, for 0 times NaN is NaN: had the segment other documents too,
            # it may have reached them
            if _other_documents(doc, begin, end, T, REVERSE) & _not_finite(b_s):
                _stores_arrived(DESCRIPTORS)
                b_first = _incoming_state(
                    split_states, split_rows, split_first, incoming, doc, cu_seqlens, b_ld,
                    i_b, i_h, o_k, o_v, m_vk, begin, end, T, H, split_len,
                    K, V, BK, BV, REVERSE, TRANSPOSED, SPLIT_STATES, INCOMING, VARLEN, BY_ROW,
                )  # fmt: skip
                _walk_by_token(
                    q, k, v, o, q_st, k_st, v_st, o_st, b_first, b_ld, incoming, outgoing, doc, cu_seqlens,
                    i_b, i_h, o_k, o_v, m_k, m_v, begin, end, T, H, last_segment, read_scale, write_scale,
                    K, V, REVERSE, TRANSPOSED, INCOMING, OUTGOING, BY_ROW,
                )  # fmt: skip


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
    group, pieces, documents,
    T, H, split_len, splits, segments, split_rows, split_first, read_scale, write_scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr,
    REVERSE: tl.constexpr, STATE_ONLY: tl.constexpr,
    SPLIT_STATES: tl.constexpr, INCOMING: tl.constexpr, OUTGOING: tl.constexpr,
    VARLEN: tl.constexpr, BY_ROW: tl.constexpr, PRECISION: tl.constexpr, WIDE_STATE: tl.constexpr,
):  # fmt: skip
    """o and the final states, or with STATE_ONLY the states of ``split_rows`` splits.

    All programs are on the grid's first axis, because the others end at 65535. Programs for the columns of one segment
    run side by side. Tensor descriptors gain nothing here.
    """
    columns = tl.cdiv(V, BV)
    i = tl.program_id(0)
    i_v, i = i % columns, i // columns
    rows = split_rows if STATE_ONLY else segments
    if STATE_ONLY:  # the last heads first: in most models they decay slowest and have most to do
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
        K, V, BK, BV, BC, REVERSE, False, STATE_ONLY, SPLIT_STATES, INCOMING, OUTGOING, VARLEN, BY_ROW,
        False, PRECISION, WIDE_STATE,
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
    dq_sb, dq_st, dk_sb, dk_st, dv_sb, dv_st, group, pieces, documents, T, H, split_len,
    splits, segments, split_rows, split_first, splits_q, segments_q, split_rows_q, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    COLS_K: tl.constexpr, COLS_V: tl.constexpr, BC: tl.constexpr,
    SPLIT_STATES: tl.constexpr, SPLIT_GRADS: tl.constexpr, INITIAL: tl.constexpr, DFINAL: tl.constexpr,
    VARLEN: tl.constexpr, BY_ROW: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, WIDE_STATE: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv and d(initial_state) in one launch: first the programs for dq, then those for dk and dv.

    The programs for dk and dv of one segment read the same four tensors. They run side by side and at the same pace, so
    that one finds in the L2 cache what the other has read. dq, dk and dv are dense: their heads are K, K and V elements
    apart.
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
    # three ifs, not elif: Triton then gives all three walks the same shared memory
    if (i_v < n_k) & (not for_q):
        _walk(
            v, do, q, dk, v_st, do_st, q_st, dk_st, b_ld, split_grads, dfinal, dinitial, doc, cu_seqlens,
            i_b, i_h, i_v, segments - 1 - i_s,
            T, H, split_len, splits, segments, split_rows, split_first, 1.0, scale,
            V, K, BV, COLS_K, BC, True, True, False, SPLIT_GRADS, DFINAL, False, VARLEN, BY_ROW,
            DESCRIPTORS, PRECISION, WIDE_STATE,
        )  # fmt: skip
    if (i_v >= n_k) & (not for_q):
        _walk(
            k, q, do, dv, k_st, q_st, do_st, dv_st, b_ld, split_grads, dfinal, dinitial, doc, cu_seqlens,
            i_b, i_h, i_v - n_k, segments - 1 - i_s,
            T, H, split_len, splits, segments, split_rows, split_first, 1.0, scale,
            K, V, BK, COLS_V, BC, True, False, False, SPLIT_GRADS, DFINAL, INITIAL, VARLEN, BY_ROW,
            DESCRIPTORS, PRECISION, WIDE_STATE,
        )  # fmt: skip
    if for_q:
        _walk(
            do, v, k, dq, do_st, v_st, k_st, dq_st, b_ld, split_states, initial, dinitial, doc, cu_seqlens,
            i_b, i_h, i_v, i_s, T, H, split_len, splits_q, segments_q, split_rows_q, 0, scale, 1.0,
            V, K, BV, COLS_K, BC, False, True, False, SPLIT_STATES, INITIAL, False, VARLEN, BY_ROW,
            DESCRIPTORS, PRECISION, WIDE_STATE,
        )  # fmt: skip
