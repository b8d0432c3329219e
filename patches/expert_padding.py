"""Padding that is named counts for nothing among the tokens of experts.

Symbol:   megatron.core.transformer.moe.router.TopKRouter._apply_expert_bias,
          megatron.core.transformer.moe.router.get_tokens_per_expert_and_token_count
Why:      the first combines a mask ``[tokens]`` with a map ``[tokens, experts]``, and the shapes do not match: a model
          with ``--moe-router-enable-expert-bias`` does not train with ``padding_mask``. The second counts this rank's
          tokens in a tensor that the sum over ranks has been written to: with ``--calculate-per-token-loss`` the losses
          that balance experts weigh as many times too much as ranks share a sequence. This rank's own tokens would be
          wrong, too: what they are multiplied by holds for the mean of these ranks, and padding is at the ends of
          conversations, which the first of them has.
Versions: megatron-core 0.19, 0.20, in which only the second is wrong
Can go:   when context-parallel ranks train on padded conversations, with both, as one rank does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ._replace import replace

SYMBOLS = (
    "megatron.core.transformer.moe.router.TopKRouter._apply_expert_bias",
    "megatron.core.transformer.moe.router.get_tokens_per_expert_and_token_count",
)
PARAMETERS = (("self", "routing_map", "padding_mask"), ("routing_map", "reduce_group", "topk", "with_padding_mask"))


def _wrap_bias(original: Callable) -> Callable:
    def _apply_expert_bias(self: Any, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        if padding_mask is not None:
            routing_map = routing_map & ~padding_mask.unsqueeze(-1)
        original(self, routing_map)

    return _apply_expert_bias


def _wrap_counts(original: Callable) -> Callable:
    def get_tokens_per_expert_and_token_count(
        routing_map: torch.Tensor,
        reduce_group: dist.ProcessGroup,
        topk: int | None = None,
        with_padding_mask: bool = False,
    ) -> tuple[torch.Tensor, Any, Any]:
        of_experts, here, everywhere = original(routing_map, reduce_group, topk, with_padding_mask)
        if with_padding_mask:
            here = everywhere / reduce_group.size()
        return of_experts, here, everywhere

    return get_tokens_per_expert_and_token_count


def apply() -> None:
    """Apply the patch; a second call does nothing."""
    replace(SYMBOLS[0], PARAMETERS[0], _wrap_bias, "padding moves no biases of experts")
    replace(SYMBOLS[1], PARAMETERS[1], _wrap_counts, "ranks weigh losses of experts by their mean of tokens")
