"""States of lightning layers in Megatron's dynamic inference context: one ``[H, K, V]`` for each request.

Megatron keeps recurrent states of Mamba layers per request, in slots that it gives out, zeroes and takes back
(``DynamicInferenceContext``, ``MambaMetadata``); a lightning state is such a state without a convolution
(``patches.dynamic_inference``). In the batch of a step the requests that decode come first, with one token each, then
those that still read their prompts, whole or in part, with any number.
"""

from __future__ import annotations

import math
from typing import NamedTuple

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
    return _as_states(context.mamba_states_cache(layer_number)[1], shape)


def kept_states(context, layer_number: int, shape: tuple[int, int, int]) -> torch.Tensor | None:
    """Where a step leaves states within prompts, at ends of blocks, for prompts that begin with the same tokens.

    As ``own_states``; None without prefix caching.
    """
    allocator = context.mamba_slot_allocator
    if allocator is None:
        return None
    return _as_states(allocator.intermediate_ssm_out[context.layer_map[layer_number - 1]], shape)


def _as_states(memory: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    return memory.flatten(1)[:, : math.prod(shape)].unflatten(1, shape)


def attend_requests(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, states: torch.Tensor,
    kept: torch.Tensor | None, context, *, scale: float, backend: str | None,
) -> torch.Tensor:  # fmt: skip
    """Lightning attention of every request's new tokens, from its state, which is brought up to date in place.

    Args:
        q, k, v: ``[tokens, 1, heads, dim]``, the tokens of a step one after another, padding last.
        states: ``[slots, H, K, V]`` of this layer.
        kept: ``[n, H, K, V]`` where states within prompts go that Megatron asks for (``kept_states``).

    Returns:
        ``[tokens, 1, H, V]``; zeros for padding.
    """
    dims, metadata = context.padded_batch_dimensions, context.mamba_metadata
    decoding = dims.decode_req_count
    o = q.new_zeros(*q.shape[:3], v.shape[3])
    if decoding:
        _decode(q[:decoding], k[:decoding], v[:decoding], log_decay, states, metadata.batch_indices_decode, o, scale)
    if dims.prefill_req_count and metadata.real_prefill_token_count:
        slots = metadata.batch_indices_prefill[: len(metadata.cu_seqlens_list) - 1].long()
        how = dict(scale=scale, backend=backend, output_final_state=True)
        for part in _parts(context, q.device):
            which = slots if part.requests is None else slots[part.requests]
            new, final = lightning_attn(
                *(x[part.tokens].transpose(0, 1) for x in (q, k, v)), log_decay, initial_state=states[which],
                cu_seqlens=part.bounds, **how,
            )  # fmt: skip
            o[part.tokens] = new.transpose(0, 1)
            states[which] = final
            if part.keep:
                kept[part.keep] = final[part.kept]
    return o


class _Part(NamedTuple):
    """Tokens of prompts that are read at once, of one or more requests."""

    tokens: slice | torch.Tensor
    bounds: torch.Tensor  # where each request's begin, and the end
    requests: torch.Tensor | None  # which of those that read prompts; None for all
    keep: list[int]  # where final states are kept ...
    kept: list[int]  # ... of which of these requests


def _parts(context, device: torch.device) -> list[_Part]:
    """Usually one. A prompt whose states are kept for other prompts with the same begin is cut where Megatron says."""
    metadata, decoding = context.mamba_metadata, context.padded_batch_dimensions.decode_req_count
    bounds = metadata.cu_seqlens_list
    if not metadata.intermediate_count:
        tokens = slice(decoding, decoding + metadata.real_prefill_token_count)
        return [_Part(tokens, metadata.cu_seqlens[: len(bounds)], None, [], [])]
    offsets, counts = (x.tolist() for x in context.mamba_slot_allocator.get_intermediate_cpu_data())
    cuts, places, place = [], [], 0
    for start, end, at, count in zip(bounds, bounds[1:], offsets, counts, strict=False):
        cuts.append([start, *(start + x for x in at[:count]), end])
        places.append(range(place, place + count))
        place += count
    parts = []
    for number in range(max(map(len, cuts)) - 1):
        requests = [i for i, cut in enumerate(cuts) if number < len(cut) - 1]
        pieces = [cuts[i][number : number + 2] for i in requests]
        lengths = torch.tensor([0, *(end - start for start, end in pieces)])
        kept = [j for j, i in enumerate(requests) if number < len(places[i])]
        parts.append(
            _Part(
                torch.cat([torch.arange(start, end) for start, end in pieces]).add(decoding).to(device),
                lengths.cumsum(0, dtype=torch.int32).to(device),
                torch.tensor(requests).to(device),
                [places[requests[j]][number] for j in kept],
                kept,
            )
        )
    return parts


def _decode(q, k, v, log_decay, states, slots, o, scale) -> None:
    rows = (slots >= 0).nonzero().squeeze(1)
    at = slots[rows]
    group = q.shape[2] // k.shape[2]
    kf, vf = (x[rows, 0].float().repeat_interleave(group, 1) for x in (k, v))
    s = states[at] * log_decay.exp()[None, :, None, None] + kf[..., :, None] * vf[..., None, :]
    states[at] = s
    o[rows, 0] = (torch.einsum("rhk,rhkv->rhv", q[rows, 0].float(), s) * scale).to(o.dtype)
