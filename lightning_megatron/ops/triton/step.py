"""One token of every sequence, as in decoding, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .walk import state_tile


@triton.jit(do_not_specialize=("group", "H"))
def step_kernel(
    q, k, v, o, log_decay, initial, final,  # one token: [B, 1, heads, dim]; states [B, H, K, V]
    q_sb, q_sh, k_sb, k_sh, v_sb, v_sh, o_sb, group, H, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr,
):  # fmt: skip
    """Bound by reading and writing the state. Computes in fp32."""
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
            state_tile(initial, i_b, H, i_h, o_k, o_v, K, V, False), mask=m_vk, other=0.0
        )
    b_o = tl.sum(b_q[None, :] * b_s, axis=1) * scale
    tl.store(o + i_b * o_sb + i_h * V + o_v, b_o.to(o.dtype.element_ty), mask=m_v)
    if FINAL:
        tl.store(state_tile(final, i_b, H, i_h, o_k, o_v, K, V, False), b_s, mask=m_vk)
