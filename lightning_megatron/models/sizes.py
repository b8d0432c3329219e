"""How large a model is, counted over its units."""

from __future__ import annotations

import math
import re

from ..config import lightning_pattern
from .family import Config, command_line, family_of, saved_args

_EXPERT = re.compile(r"\.experts\.experts\.")


def sizes(config: Config) -> tuple[str, ...]:
    """layers, softmax layers, hidden size, heads, experts (chosen / all), parameters, those that a token uses."""
    family = family_of(config)
    args = saved_args(command_line(family.flags(config)))
    every = active = 0.0
    for unit in family.units(args, config):
        for piece in unit.megatron:
            count = math.prod(piece.shape)
            every += count
            active += count * args.moe_router_topk / args.num_experts if _EXPERT.search(piece.key) else count
    softmax = args.num_layers - sum(lightning_pattern(args.linear_attention_freq, args.num_layers))
    experts = f"{args.moe_router_topk}/{args.num_experts}" if args.num_experts else "-"
    numbers = (args.num_layers, softmax, args.hidden_size, args.num_attention_heads)
    return (*map(str, numbers), experts, readable(every), readable(active))


def readable(count: float) -> str:
    """1234567890 -> 1.23B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"
