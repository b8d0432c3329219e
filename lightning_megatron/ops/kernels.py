"""Tiled lightning attention in Triton: one walk over the chunks serves o, dq, dk and dv.

Lightning Attention-2 (Qin et al. 2024, section 3.2) splits a sequence into chunks: within a chunk ordinary attention
products under a decay mask, between chunks a running state of K x V. With lambda = exp(log_decay), a chunk of n tokens
i = 0..n-1 and the state S that enters it,

    o_i = scale ( sum_{j<=i} lambda^(i-j) (q_i.k_j) v_j + lambda^(i+1) q_i S )      S <- lambda^n S + sum_j lambda^(n-1-j) k_j^T v_j

and the gradients are the same operator, for dk and dv in reversed time with the gradient state D that enters from the right:

    dq_i = the line above with (q, k, v, S) = (do, v, k, S^T)
    dk_i = scale sum_{j>=i} lambda^(j-i) (v_i.do_j) q_j + lambda^(n-1-i) v_i D^T
    dv_i = scale sum_{j>=i} lambda^(j-i) (k_i.q_j) do_j + lambda^(n-1-i) k_i D      D <- lambda^n D + scale sum_j lambda^(j+1) q_j^T do_j

Only positive powers of lambda occur. Decays that belong to q are applied to the product's rows and those of k to v, so
that q and k go from memory to the tensor cores untouched.

Work is cut into segments of many chunks so that there are enough programs to fill a GPU: (1) every segment's own state
(``_walk`` with STATE_ONLY), (2) ``_scan`` turns them into the state that enters each segment, (3) ``_walk`` again, with
outputs. Segment lengths depend on T alone, so a result does not depend on the batch it was computed in. A sequence of
one segment needs (3) only.

Packed sequences (cu_seqlens) need no other grid: chunks run over the packed tokens as if they were one sequence, and a
token reads, writes and attends only where ``doc`` says the document is the same. States per document (initial_state,
final_state and their gradients) enter and leave inside the chunk that holds the document's edge.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _walk(
    q, k, v, o,  # [B, T, heads, dim], any strides but the last, which is 1
    log_decay,  # [H]
    s_in,  # state that enters each segment [B, H, segments, K, V], by strides; unused where HAS_IN is false
    s_out,  # STATE_ONLY: each segment's own state [B, H, segments, K, V]; else the state that leaves the last segment
    edge_in, edge_out,  # VARLEN: states per document that enter and leave [N, H, K, V]
    doc, cu_seqlens,  # VARLEN: document of each token [T], bounds [N+1]
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, o_sb, o_st, o_sh,
    in_sb, in_sh, in_ss, in_sk, in_sv,
    out_sb, out_sh, out_ss, out_sk, out_sv,
    ein_sn, ein_sh, ein_sk, ein_sv, eout_sn, eout_sh, eout_sk, eout_sv,
    q_group, k_group, v_group,  # query heads per head of this operand
    T, H, segment_len, segments,
    read_scale, write_scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr,
    REVERSE: tl.constexpr, STATE_ONLY: tl.constexpr, HAS_IN: tl.constexpr, HAS_OUT: tl.constexpr,
    VARLEN: tl.constexpr, EDGE_IN: tl.constexpr, EDGE_OUT: tl.constexpr,
    PRECISION: tl.constexpr, WIDE_STATE: tl.constexpr,
):  # fmt: skip
    """Walk one segment of one head; every program holds BV columns of v, o and the state.

    WIDE_STATE keeps the state in fp32 for its product with q (tf32): fp16 has too small a range for a long sum.
    """
    # all on the grid's first axis, for the others end at 65535; columns of one segment run side by side and share q and k
    columns = tl.cdiv(V, BV)
    i_v, i_bhs = tl.program_id(0) % columns, tl.program_id(0) // columns
    i_s, i_bh = i_bhs % segments, i_bhs // segments
    i_b, i_h = (i_bh // H).to(tl.int64), (i_bh % H).to(tl.int64)
    dtype = v.dtype.element_ty
    p = tl.arange(0, BC)
    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_kv = m_k[:, None] & m_v[None, :]
    b_ld = tl.load(log_decay + i_h)

    if not STATE_ONLY:
        q += i_b * q_sb + (i_h // q_group) * q_sh
        o += i_b * o_sb + i_h * o_sh
    k += i_b * k_sb + (i_h // k_group) * k_sh
    v += i_b * v_sb + (i_h // v_group) * v_sh
    if HAS_OUT:
        s_out += i_b * out_sb + i_h * out_sh + o_k[:, None] * out_sk + o_v[None, :] * out_sv
    if EDGE_IN:
        edge_in += i_h * ein_sh + o_k[:, None] * ein_sk + o_v[None, :] * ein_sv
    if EDGE_OUT:
        edge_out += i_h * eout_sh + o_k[:, None] * eout_sk + o_v[None, :] * eout_sv
    if HAS_IN:
        p_in = s_in + i_b * in_sb + i_h * in_sh + i_s.to(tl.int64) * in_ss + o_k[:, None] * in_sk + o_v[None, :] * in_sv
        b_s = tl.load(p_in, mask=m_kv, other=0.0).to(tl.float32)  # [BK, BV]
    else:
        b_s = tl.zeros([BK, BV], dtype=tl.float32)

    # distance from i to j of every pair of the chunk that may attend, and its decay
    b_d = (p[None, :] - p[:, None]) if REVERSE else (p[:, None] - p[None, :])  # [BC, BC]
    b_w = tl.where(b_d >= 0, tl.exp(b_ld * tl.where(b_d >= 0, b_d, 0).to(tl.float32)), 0.0)
    a_scale = write_scale if REVERSE else read_scale

    begin = i_s * segment_len
    end = tl.minimum(T, begin + segment_len)
    chunks = tl.cdiv(end - begin, BC)
    for i_c in range(chunks):
        start = begin + (chunks - 1 - i_c if REVERSE else i_c) * BC
        n = tl.minimum(BC, end - start)
        m_p = p < n
        start64 = start.to(tl.int64)
        p_k = k + start64 * k_st + p[:, None] * k_st + o_k[None, :]
        p_v = v + start64 * v_st + p[:, None] * v_st + o_v[None, :]
        b_k = tl.load(p_k, mask=m_p[:, None] & m_k[None, :], other=0.0)  # [BC, BK]
        b_v = tl.load(p_v, mask=m_p[:, None] & m_v[None, :], other=0.0)  # [BC, BV]

        e_left, e_right = p + 1, tl.where(m_p, n - 1 - p, 0)
        e_read, e_write = (e_right, e_left) if REVERSE else (e_left, e_right)
        b_read = tl.exp(b_ld * e_read.to(tl.float32))
        b_write = tl.exp(b_ld * e_write.to(tl.float32))
        b_carry = tl.exp(b_ld * n.to(tl.float32))
        if VARLEN:
            b_doc = tl.load(doc + start + p, mask=m_p, other=-2)  # [BC]
            before = tl.load(doc + start - 1, mask=start > 0, other=-1)
            after = tl.load(doc + start + n, mask=start + n < T, other=-1)
            first, last = tl.load(doc + start), tl.load(doc + start + n - 1)
            # `source` is the document that the incoming state belongs to, `sink` the one that the outgoing state will
            source, sink = (after, first) if REVERSE else (before, last)
            b_read = tl.where(b_doc == source, b_read, 0.0)
            b_write = tl.where(b_doc == sink, b_write, 0.0)
            b_carry = tl.where(source == sink, b_carry, 0.0)

        if not STATE_ONLY:
            p_q = q + start64 * q_st + p[:, None] * q_st + o_k[None, :]
            b_q = tl.load(p_q, mask=m_p[:, None] & m_k[None, :], other=0.0)  # [BC, BK]
            b_a = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (b_w * a_scale)  # [BC, BC]
            if VARLEN:
                b_a = tl.where(b_doc[:, None] == b_doc[None, :], b_a, 0.0)
            if WIDE_STATE:
                b_o = tl.dot(b_q.to(tl.float32), b_s, input_precision="tf32")
            else:
                b_o = tl.dot(b_q, b_s.to(dtype), input_precision=PRECISION)
            b_o = b_o * (b_read * read_scale)[:, None]
            b_o += tl.dot(b_a.to(dtype), b_v, input_precision=PRECISION)  # [BC, BV]

        b_enter = tl.zeros([BK, BV], dtype=tl.float32)
        if EDGE_IN:
            # documents whose entering edge (start, or end if reversed) lies in this chunk
            for i_n in range(first, last + 1):
                d_start, d_end = tl.load(cu_seqlens + i_n), tl.load(cu_seqlens + i_n + 1)
                enters = (d_end > start) & (d_end <= start + n) if REVERSE else (d_start >= start)
                if enters & (d_end > d_start):
                    p_e = edge_in + tl.cast(i_n, tl.int64) * ein_sn
                    b_e = tl.load(p_e, mask=m_kv, other=0.0).to(tl.float32)
                    if not STATE_ONLY:
                        e_edge = (d_end - 1 - start - p) if REVERSE else (start + p - d_start + 1)
                        b_f = tl.where(b_doc == i_n, tl.exp(b_ld * tl.maximum(e_edge, 0).to(tl.float32)), 0.0)
                        if WIDE_STATE:
                            b_x = tl.dot(b_q.to(tl.float32), b_e, input_precision="tf32")
                        else:
                            b_x = tl.dot(b_q, b_e.to(dtype), input_precision=PRECISION)
                        b_o += b_x * (b_f * read_scale)[:, None]
                    if i_n == sink:
                        inside = (d_end - start) if REVERSE else (start + n - d_start)
                        b_enter = b_e * tl.exp(b_ld * inside.to(tl.float32))
        if EDGE_OUT:
            # documents whose leaving edge (end, or start if reversed) lies in this chunk
            for i_n in range(first, last + 1):
                d_start, d_end = tl.load(cu_seqlens + i_n), tl.load(cu_seqlens + i_n + 1)
                leaves = (d_start >= start) if REVERSE else (d_end <= start + n)
                if leaves & (d_end > d_start):
                    lo, hi = tl.maximum(d_start, start), tl.minimum(d_end, start + n)
                    e_edge = (start + p - d_start + 1) if REVERSE else (d_end - 1 - start - p)
                    b_f = tl.where(b_doc == i_n, tl.exp(b_ld * tl.maximum(e_edge, 0).to(tl.float32)), 0.0)
                    b_l = tl.dot(tl.trans(b_k), (b_v * (b_f * write_scale)[:, None]).to(dtype), input_precision=PRECISION)
                    b_l += tl.where(i_n == source, b_s * tl.exp(b_ld * (hi - lo).to(tl.float32)), 0.0)
                    if EDGE_IN:
                        whole = (lo == d_start) & (hi == d_end)
                        if whole:
                            p_e = edge_in + tl.cast(i_n, tl.int64) * ein_sn
                            b_e = tl.load(p_e, mask=m_kv, other=0.0).to(tl.float32)
                            b_l += b_e * tl.exp(b_ld * (hi - lo).to(tl.float32))
                    tl.store(edge_out + tl.cast(i_n, tl.int64) * eout_sn, b_l, mask=m_kv)

        if not STATE_ONLY:
            p_o = o + start64 * o_st + p[:, None] * o_st + o_v[None, :]
            tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_p[:, None] & m_v[None, :])
        b_s = b_s * b_carry + b_enter
        b_s += tl.dot(tl.trans(b_k), (b_v * (b_write * write_scale)[:, None]).to(dtype), input_precision=PRECISION)

    if HAS_OUT:
        if STATE_ONLY:
            tl.store(s_out + i_s.to(tl.int64) * out_ss, b_s, mask=m_kv)
        else:
            if i_s == (0 if REVERSE else segments - 1):
                tl.store(s_out, b_s, mask=m_kv)


@triton.jit
def _scan(
    states,  # [B, H, segments, K*V] contiguous: each segment's own state in, the state that enters it out
    initial,  # [B, H, K*V] contiguous; unused where HAS_IN is false
    log_decay, doc,
    T, H, KV, segment_len, segments,
    BLOCK: tl.constexpr, REVERSE: tl.constexpr, HAS_IN: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    i_bh, i_x = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b_ld = tl.load(log_decay + i_bh % H)
    o_x = i_x * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < KV
    if HAS_IN:
        b_s = tl.load(initial + i_bh * KV + o_x, mask=m_x, other=0.0).to(tl.float32)
    else:
        b_s = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(segments):
        i_s = segments - 1 - i if REVERSE else i
        begin = i_s * segment_len
        end = tl.minimum(T, begin + segment_len)
        b_carry = tl.exp(b_ld * (end - begin).to(tl.float32))
        if VARLEN:
            # a segment hands a state on only where one document fills it and enters it from the side the walk comes from
            if REVERSE:
                source, sink = tl.load(doc + end, mask=end < T, other=-1), tl.load(doc + begin)
            else:
                source, sink = tl.load(doc + begin - 1, mask=begin > 0, other=-1), tl.load(doc + end - 1)
            b_carry = tl.where(source == sink, b_carry, 0.0)
        p_s = states + (i_bh * segments + i_s) * KV + o_x
        b_own = tl.load(p_s, mask=m_x, other=0.0)
        tl.store(p_s, b_s, mask=m_x)
        b_s = b_s * b_carry + b_own


def _segment_len(T: int) -> int:
    """Tokens per segment: a function of T alone, so that results do not depend on the batch. At most 16 segments."""
    return max(1024, -(-T // 16 // 64) * 64)


def _config(dtype: torch.dtype, K: int, V: int, T: int) -> dict[str, int]:
    """Tile sizes: the state tile [BK, BV] lives in registers, so wide K goes with narrow BV."""
    BK = max(16, triton.next_power_of_2(K))
    BV = max(16, triton.next_power_of_2(V))
    if dtype == torch.float32:  # plain fp32 arithmetic: correct, not fast
        return dict(BK=BK, BV=min(BV, 32), BC=16 if BK > 128 else 32, num_warps=4, num_stages=1)
    # Triton 3.6.0 miscompiles a [256, 16] or [256, 32] state on 4 warps (H100: out-of-range shared address): never below 64
    BV = 64 if BK > 128 else min(BV, 128)
    BC = 16 if T <= 16 else 64
    return dict(BK=BK, BV=BV, BC=BC, num_warps=8 if BK * BV >= 128 * 128 else 4, num_stages=2 if BK <= 128 else 1)


def _run_walk(
    q: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor | None, log_decay: torch.Tensor,
    *, heads: int, s_in=None, s_out=None, edge_in=None, edge_out=None, docs=None, reverse: bool,
    segment_len: int, read_scale: float = 1.0, write_scale: float = 1.0,
) -> None:  # fmt: skip
    """Launch ``_walk``. s_in is ``[B, H, segments, K, V]``; s_out likewise if there is no q, else ``[B, H, 1, K, V]``."""
    B, T, _, K = k.shape
    V = v.shape[-1]
    segments = triton.cdiv(T, segment_len)
    config = _config(v.dtype, K, V, T)
    state_only = q is None
    doc, cu_seqlens = docs if docs is not None else (None, None)

    def strides(x: torch.Tensor | None, count: int) -> tuple[int, ...]:
        return (0,) * count if x is None else x.stride()[:count]

    _walk[(triton.cdiv(V, config["BV"]) * segments * B * heads,)](
        q, k, v, o, log_decay, s_in, s_out, edge_in, edge_out, doc, cu_seqlens,
        *strides(q, 3), *strides(k, 3), *strides(v, 3), *strides(o, 3),
        *strides(s_in, 5), *strides(s_out, 5), *strides(edge_in, 4), *strides(edge_out, 4),
        1 if q is None else heads // q.shape[2], heads // k.shape[2], heads // v.shape[2],
        T, heads, segment_len, segments, read_scale, write_scale,
        K=K, V=V, REVERSE=reverse, STATE_ONLY=state_only, HAS_IN=s_in is not None, HAS_OUT=s_out is not None,
        VARLEN=docs is not None, EDGE_IN=edge_in is not None, EDGE_OUT=edge_out is not None,
        PRECISION="ieee" if v.dtype == torch.float32 else "tf32", WIDE_STATE=v.dtype == torch.float16, **config,
    )  # fmt: skip


def _entering_states(
    k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, *, heads: int, initial: torch.Tensor | None,
    docs, reverse: bool, segment_len: int, write_scale: float = 1.0,
) -> torch.Tensor | None:  # fmt: skip
    """The state that enters every segment ``[B, H, segments, K, V]`` fp32; None if that is zero everywhere."""
    B, T, _, K = k.shape
    V = v.shape[-1]
    segments = triton.cdiv(T, segment_len)
    packed = docs is not None
    if segments == 1:
        return None if initial is None or packed else initial[:, :, None]
    states = torch.empty(B, heads, segments, K, V, device=k.device, dtype=torch.float32)
    _run_walk(
        None, k, v, None, log_decay, heads=heads, s_out=states, edge_in=initial if packed else None, docs=docs,
        reverse=reverse, segment_len=segment_len, write_scale=write_scale,
    )  # fmt: skip
    block = 1024
    _scan[(B * heads, triton.cdiv(K * V, block))](
        states, None if packed else initial, log_decay, docs[0] if packed else None,
        T, heads, K * V, segment_len, segments,
        BLOCK=block, REVERSE=reverse, HAS_IN=initial is not None and not packed, VARLEN=packed,
    )  # fmt: skip
    return states


def _documents(cu_seqlens: torch.Tensor | None, T: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(document of each token [T], bounds [N+1]) in int32, made on the device without waiting for it."""
    if cu_seqlens is None:
        return None
    bounds = cu_seqlens.to(torch.int32).contiguous()
    tokens = torch.arange(T, device=bounds.device, dtype=torch.int32)
    return torch.bucketize(tokens, bounds[1:], right=True, out_int32=True), bounds


def _leaving_state(entering: torch.Tensor | None, like: tuple[int, ...], has_empty: bool, device: torch.device) -> torch.Tensor:
    """Where ``_walk`` puts states that leave. It skips empty sequences, which hand on what entered: that is put there first."""
    if not has_empty:
        return torch.empty(like, device=device, dtype=torch.float32)
    return torch.zeros(like, device=device, dtype=torch.float32) if entering is None else entering.clone()


def forward(q, k, v, log_decay, scale, initial_state, cu_seqlens, need_final):
    """``(o [B,T,H,V], final_state [N,H,K,V] fp32 or None, entering states of the segments for the backward or None)``."""
    B, T, H, K = q.shape
    V = v.shape[-1]
    segment_len = _segment_len(T)
    docs = _documents(cu_seqlens, T)
    packed = docs is not None
    sequences = cu_seqlens.numel() - 1 if packed else B
    initial_state = None if initial_state is None else initial_state.contiguous()
    o = torch.empty(B, T, H, V, device=q.device, dtype=q.dtype)
    final = _leaving_state(initial_state, (sequences, H, K, V), packed or T == 0, q.device) if need_final else None
    if T == 0:
        return o, final, None
    states = _entering_states(
        k, v, log_decay, heads=H, initial=initial_state, docs=docs, reverse=False, segment_len=segment_len
    )
    _run_walk(
        q, k, v, o, log_decay, heads=H, s_in=states, docs=docs, reverse=False, segment_len=segment_len, read_scale=scale,
        s_out=None if packed or final is None else final[:, :, None],
        edge_in=initial_state if packed else None, edge_out=final if packed else None,
    )  # fmt: skip
    return o, final, states


def backward(q, k, v, log_decay, scale, initial_state, cu_seqlens, states, do, dfinal):
    """``(dq, dk, dv, dinitial)``; ``states`` is what ``forward`` returned third."""
    B, T, H, K = q.shape
    V, kv_heads = v.shape[-1], k.shape[2]
    segment_len = _segment_len(T)
    docs = _documents(cu_seqlens, T)
    packed = docs is not None
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    # one dk and dv per query head where heads share them: summed in fp32 afterwards
    shared = kv_heads != H
    dk = torch.empty(B, T, H, K, device=q.device, dtype=torch.float32 if shared else k.dtype)
    dv = torch.empty(B, T, H, V, device=q.device, dtype=torch.float32 if shared else v.dtype)
    dfinal = None if dfinal is None else dfinal.contiguous()
    dinitial = None
    if initial_state is not None:
        initial_state = initial_state.contiguous()
        dinitial = _leaving_state(dfinal, initial_state.shape, packed or T == 0, q.device)
    if T > 0:
        common = dict(heads=H, docs=docs, segment_len=segment_len)

        def transposed(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.transpose(-1, -2)

        _run_walk(
            do, v, k, dq, log_decay, s_in=transposed(states), edge_in=transposed(initial_state) if packed else None,
            reverse=False, read_scale=scale, **common,
        )  # fmt: skip
        d_states = _entering_states(q, do, log_decay, initial=dfinal, reverse=True, write_scale=scale, **common)
        edge = dfinal if packed else None
        _run_walk(
            v, do, q, dk, log_decay, s_in=transposed(d_states), edge_in=transposed(edge),
            reverse=True, write_scale=scale, **common,
        )  # fmt: skip
        _run_walk(
            k, q, do, dv, log_decay, s_in=d_states, edge_in=edge, edge_out=dinitial if packed else None,
            s_out=None if packed or dinitial is None else dinitial[:, :, None],
            reverse=True, write_scale=scale, **common,
        )  # fmt: skip
    if shared:
        dk, dv = (x.unflatten(2, (kv_heads, -1)).sum(3).to(k.dtype) for x in (dk, dv))
    return dq, dk, dv, dinitial
