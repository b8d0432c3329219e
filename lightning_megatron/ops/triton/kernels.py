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
they are looked for, once, and where they may have reached another document the program does its work again token by
token (``_walk_by_token``). The loop over chunks does nothing of this, and holds no register for it.

Parameters, of ``walk`` (W), ``walk_kernel`` (F) and ``gradients_kernel`` (G); of B sequences of T tokens and H heads:

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

from .walk import opaque, stores_arrived, walk

# Lengths and counts are not specialised: another T, B or H is not another kernel. Strides are, by their alignment.
_COUNTS = (
    "group", "pieces", "documents", "T", "H", "split_len", "splits", "segments", "split_rows", "split_first",
)  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
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
    rows = split_rows if STATE_ONLY else segments
    needed = True
    for BY_TOKEN in tl.static_range(2 if VARLEN else 1):  # by chunk, then where that is not enough
        if needed:
            if BY_TOKEN:
                stores_arrived(False)
            i = opaque(tl.program_id(0)) if BY_TOKEN else tl.program_id(0)
            i_v, i = i % columns, i // columns
            if STATE_ONLY:  # the last heads first: in most models they decay slowest and have most to do
                n = tl.num_programs(0) // (columns * H)
                i_h, i = H - group * (1 + i // (n * group)) + i % group, i // group % n
            else:
                i_h, i = i % H, i // H
            i_s, i = i % rows, i // rows
            i_b, i_r, i_t = i.to(tl.int64), (i // pieces).to(tl.int64), (i % pieces).to(tl.int64) * T
            head, shared = i_h.to(tl.int64), (i_h // group).to(tl.int64)
            p_q, p_o, p_doc, p_bounds = q, o, doc, cu_seqlens
            if VARLEN:
                p_doc += i_b * T
                p_bounds += i_b * (documents + 1)
            if STATE_ONLY:
                i_s += split_first
            else:
                p_q += i_r * q_sb + i_t * q_st + head * q_sh
                p_o += i_r * o_sb + i_t * o_st + head * o_sh
            p_k = k + i_r * k_sb + i_t * k_st + shared * k_sh
            p_v = v + i_r * v_sb + i_t * v_st + shared * v_sh
            needed = walk(
                p_q, p_k, p_v, p_o, q_st, k_st, v_st, o_st, tl.load(log_decay + i_h),
                split_states, incoming, outgoing, p_doc, p_bounds, i_b, i_h, i_v, i_s,
                T, H, split_len, splits, segments, split_rows, split_first, read_scale, write_scale,
                K, V, BK, BV, BC, REVERSE, False, STATE_ONLY, SPLIT_STATES, INCOMING, OUTGOING, VARLEN, BY_ROW,
                False, PRECISION, WIDE_STATE, BY_TOKEN,
            )  # fmt: skip


@triton.jit(do_not_specialize=(*_COUNTS, "splits_q", "segments_q", "split_rows_q"))
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
    batch = tl.num_programs(0) // (H * ((n_k + n_v) * segments + n_k * segments_q))
    programs_q = n_k * H * segments_q * batch
    needed = True
    for BY_TOKEN in tl.static_range(2 if VARLEN else 1):  # by chunk, then where that is not enough
        if needed:
            if BY_TOKEN:
                stores_arrived(DESCRIPTORS)
            i = opaque(tl.program_id(0)) if BY_TOKEN else tl.program_id(0)
            for_q = i < programs_q
            i = tl.where(for_q, i, i - programs_q)
            columns, count = tl.where(for_q, n_k, n_k + n_v), tl.where(for_q, segments_q, segments)
            i_v, i = i % columns, i // columns
            i_h, i = i % H, i // H
            i_s, i = i % count, i // count
            head, shared = i_h.to(tl.int64), (i_h // group).to(tl.int64)
            i_b, i_r, i_t = i.to(tl.int64), (i // pieces).to(tl.int64), (i % pieces).to(tl.int64) * T
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
            b_ld = tl.load(log_decay + i_h)
            again = i_h < 0
            # three ifs, not elif: Triton then gives all three walks the same shared memory
            if (i_v < n_k) & (not for_q):
                again = walk(
                    p_v, p_do, p_q, p_dk, v_st, do_st, q_st, dk_st, b_ld,
                    split_grads, dfinal, dinitial, p_doc, p_bounds, i_b, i_h, i_v, segments - 1 - i_s,
                    T, H, split_len, splits, segments, split_rows, split_first, 1.0, scale,
                    V, K, BV, COLS_K, BC, True, True, False, SPLIT_GRADS, DFINAL, False, VARLEN, BY_ROW,
                    DESCRIPTORS, PRECISION, WIDE_STATE, BY_TOKEN,
                )  # fmt: skip
            if (i_v >= n_k) & (not for_q):
                again = walk(
                    p_k, p_q, p_do, p_dv, k_st, q_st, do_st, dv_st, b_ld,
                    split_grads, dfinal, dinitial, p_doc, p_bounds, i_b, i_h, i_v - n_k, segments - 1 - i_s,
                    T, H, split_len, splits, segments, split_rows, split_first, 1.0, scale,
                    K, V, BK, COLS_V, BC, True, False, False, SPLIT_GRADS, DFINAL, INITIAL, VARLEN, BY_ROW,
                    DESCRIPTORS, PRECISION, WIDE_STATE, BY_TOKEN,
                )  # fmt: skip
            if for_q:
                again = walk(
                    p_do, p_v, p_k, p_dq, do_st, v_st, k_st, dq_st, b_ld,
                    split_states, initial, dinitial, p_doc, p_bounds, i_b, i_h, i_v, i_s,
                    T, H, split_len, splits_q, segments_q, split_rows_q, 0, scale, 1.0,
                    V, K, BV, COLS_K, BC, False, True, False, SPLIT_STATES, INITIAL, False, VARLEN, BY_ROW,
                    DESCRIPTORS, PRECISION, WIDE_STATE, BY_TOKEN,
                )  # fmt: skip
            needed = again
