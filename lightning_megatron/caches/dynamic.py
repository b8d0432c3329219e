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

from ..ops import lightning_attn, lightning_decode, lightning_step


def token_index(context, tokens: int) -> slice | torch.Tensor:
    """Positions of this step's tokens in their requests, to index a table that holds every position."""
    if context.is_static_batching():
        return slice(context.sequence_len_offset, context.sequence_len_offset + tokens)
    return context.gpu_view.token_to_pos_ids[:tokens]


class RequestStates:
    """The states of one layer in a DynamicInferenceContext, which a step reads and brings up to date in place.

    Args:
        context: Megatron's DynamicInferenceContext, with the batch of this step.
        layer_number: on this pipeline stage, from 1.
        shape: ``(H, K, V)`` of the layer's state, at most what the context was told (``patches.dynamic_inference``).
    """

    initial = None  # an attribute of StaticStates: here each request has its own

    def __init__(self, context, layer_number: int, shape: tuple[int, int, int]):
        self.context = context
        if not context.is_hybrid_model:
            raise ValueError(
                f"this {type(context).__name__} keeps no states of lightning layers: call "
                "lightning_megatron.patches.dynamic_inference.apply(), and build it with "
                "InferenceConfig(mamba_inference_state_config=MambaInferenceStateConfig.from_model(model), ...)"
            )
        _, states = context.mamba_states_cache(layer_number)
        self._states, self._kept = _as_states(states, shape), None  # [slots, H, K, V], views
        if context.mamba_slot_allocator is not None:  # prefix caching takes states within prompts, at ends of blocks
            kept = context.mamba_slot_allocator.intermediate_ssm_out[context.layer_map[layer_number - 1]]
            self._kept = _as_states(kept, shape)

    @property
    def only_decodes(self) -> bool:
        """Whether every request of this step has one new token."""
        dims = self.context.padded_batch_dimensions
        return dims.prefill_req_count == 0 and dims.decode_req_count == dims.token_count

    @property
    def positions(self) -> torch.Tensor:
        """Of this step's tokens in their requests."""
        return token_index(self.context, self.context.padded_batch_dimensions.token_count)

    def decode(self, mixed: torch.Tensor, log_decay: torch.Tensor, **how) -> torch.Tensor:
        """All between a layer's projections where the step ``only_decodes``: ``[tokens, 1, c]`` ->
        ``[tokens, 1, H * V]``; ``how`` as of ``ops.lightning_decode``.
        """
        slots = self.context.mamba_metadata.batch_indices_decode
        if how.get("angles") is not None:
            how["positions"] = self.positions
        return lightning_decode(mixed[:, 0], log_decay, self._states, slots, **how)[:, None]

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, *, scale: float,
        backend: str | None,
    ) -> torch.Tensor:  # fmt: skip
        """Lightning attention of every request's new tokens ``[tokens, 1, heads, dim]``, padding last.

        Returns:
            ``[tokens, 1, H, V]``; zeros for padding.
        """
        dims, metadata = self.context.padded_batch_dimensions, self.context.mamba_metadata
        decoding = dims.decode_req_count
        o = q.new_zeros(*q.shape[:3], v.shape[3])
        if decoding:
            slots = metadata.batch_indices_decode
            step = [x[:decoding] for x in (q, k, v)]
            o[:decoding] = lightning_step(*step, log_decay, self._states, slots, scale=scale, backend=backend)
        if dims.prefill_req_count and metadata.real_prefill_token_count:
            slots = metadata.batch_indices_prefill[: len(metadata.cu_seqlens_list) - 1].long()
            for part in _parts(self.context, q.device):
                which = slots if part.requests is None else slots[part.requests]
                new, final = lightning_attn(
                    *(x[part.tokens].transpose(0, 1) for x in (q, k, v)), log_decay, scale=scale, backend=backend,
                    initial_state=self._states[which], output_final_state=True, cu_seqlens=part.bounds,
                )  # fmt: skip
                o[part.tokens] = new.transpose(0, 1)
                self._states[which] = final
                if part.keep:
                    self._kept[part.keep] = final[part.kept]
        return o


def _as_states(memory: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    return memory.flatten(1)[:, : math.prod(shape)].unflatten(1, shape)


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
