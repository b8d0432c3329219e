"""States of lightning layers in Megatron's dynamic inference context: one ``[H, K, V]`` for each request.

Megatron keeps recurrent states of Mamba layers per request, in slots that it gives out, zeroes and takes back
(``DynamicInferenceContext``, ``MambaMetadata``); a lightning state is such a state without a convolution
(``patches.dynamic_inference``). In the batch of a step the requests that decode come first, with one token each, then
those that still read their prompts, whole or in part, with any number.
"""

from __future__ import annotations

import torch

from .ops import lightning_attn


def token_index(context, tokens: int) -> slice | torch.Tensor:
    """Positions of this step's tokens in their requests, to index a table that holds every position."""
    if context.is_static_batching():
        return slice(context.sequence_len_offset, context.sequence_len_offset + tokens)
    return context.gpu_view.token_to_pos_ids[:tokens]


def own_states(context, layer_number: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """Every slot's state of one layer, fp32 ``[slots, H, K, V]``: a view of the context's memory.

    Args:
        layer_number: on this pipeline stage, from 1.
        shape: ``(H, K, V)``, at most what the context was told (``patches.dynamic_inference``).
    """
    _, states = context.mamba_states_cache(layer_number)
    numbers = shape[0] * shape[1] * shape[2]
    return states.flatten(1)[:, :numbers].unflatten(1, shape)


def attend_requests(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, states: torch.Tensor, context, *,
    scale: float, backend: str | None,
) -> torch.Tensor:  # fmt: skip
    """Lightning attention of every request's new tokens, from its state, which is brought up to date in place.

    Args:
        q, k, v: ``[tokens, 1, heads, dim]``, the tokens of a step one after another, padding last.
        states: ``[slots, H, K, V]`` of this layer.

    Returns:
        ``[tokens, 1, H, V]``; zeros for padding.
    """
    dims, metadata = context.padded_batch_dimensions, context.mamba_metadata
    decoding = dims.decode_req_count
    o = q.new_zeros(*q.shape[:3], v.shape[3])
    if decoding:
        _decode(q[:decoding], k[:decoding], v[:decoding], log_decay, states, metadata.batch_indices_decode, o, scale)
    if dims.prefill_req_count and metadata.real_prefill_token_count:
        bounds = metadata.cu_seqlens_list
        tokens = slice(decoding, decoding + metadata.real_prefill_token_count)
        slots = metadata.batch_indices_prefill[: len(bounds) - 1].long()
        new, final = lightning_attn(
            *(x[tokens].transpose(0, 1) for x in (q, k, v)), log_decay, scale=scale, backend=backend,
            initial_state=states[slots], output_final_state=True, cu_seqlens=metadata.cu_seqlens[: len(bounds)],
        )  # fmt: skip
        o[tokens] = new.transpose(0, 1)
        states[slots] = final
    return o


def _decode(q, k, v, log_decay, states, slots, o, scale) -> None:
    rows = (slots >= 0).nonzero().squeeze(1)
    at = slots[rows]
    group = q.shape[2] // k.shape[2]
    kf, vf = (x[rows, 0].float().repeat_interleave(group, 1) for x in (k, v))
    s = states[at] * log_decay.exp()[None, :, None, None] + kf[..., :, None] * vf[..., None, :]
    states[at] = s
    o[rows, 0] = (torch.einsum("rhk,rhkv->rhv", q[rows, 0].float(), s) * scale).to(o.dtype)
