"""Counts lightning layers as lightning layers in Megatron's FLOPs, and so in ``--log-throughput``.

Symbol:   megatron.training.training.num_floating_point_operations
Why:      it counts every attention layer that it does not know as causal softmax attention, whose cost grows with
          the square of the length; at 32K tokens that overstates a lightning model several times.
Versions: megatron-core 0.19, 0.20
Can go:   when layers report their own FLOPs, or the function takes a hook for them.

Formula, for the forward and backward of one lightning layer over the batch (``tokens`` real tokens of width h; H query
heads of head dims K and V; P = columns of the fused q, gate, k, v projection):

    6 tokens [ h P + H V h + H (C/2 (K + V) + 2 K V) ]

6 is 2 operations per multiply-add times 3 for forward, grad of inputs and grad of weights, as everywhere in
Megatron's count. Inside a chunk of C = 64 tokens, q k^T and its product with v touch C/2 earlier tokens on average;
between chunks, q S and k^T v cost K V each. Norm, decay, gate and activation are elementwise and not counted, as in
Megatron. C is the chunk of the published count, whichever block sizes a kernel picks. Megatron's own function keeps
counting MLP, MoE, embedding and the softmax layers, those of multi-token prediction, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..config import LightningOptions, lightning_depths, lightning_pattern, mtp_pattern, resolve_shape
from ._replace import replace
from .hybrid_symbol import LETTER

SYMBOLS = ("megatron.training.training.num_floating_point_operations",)
PARAMETERS = ("args", "batch_size", "seqlen_squared_sum_in_batch", "total_real_tokens_in_batch")
CHUNK = 64
FORWARD_BACKWARD_FMA = 3 * 2

_options: LightningOptions | None = None


def lightning_layer_flops(args: Any, options: LightningOptions, tokens: float, *, lrpe: bool = False) -> float:
    """Operations of one lightning layer over ``tokens`` tokens, forward and backward, over all ranks.

    With ``lrpe``, K is twice as large between projections and output.
    """
    shape = resolve_shape(args, options, tp=1)
    projections = args.hidden_size * (shape.projection_dim + shape.output_dim)
    key_dim = shape.key_dim * (2 if lrpe else 1)
    per_head = CHUNK / 2 * (key_dim + shape.value_dim) + 2 * key_dim * shape.value_dim
    return FORWARD_BACKWARD_FMA * tokens * (projections + shape.num_heads * per_head)


def softmax_layer_flops(args: Any, tokens: float, seqlen_squared_sum: float) -> float:
    """Operations that Megatron counts for one self attention layer (MHA or GQA), forward and backward."""
    query = args.kv_channels * args.num_attention_heads
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    gate = query if args.attention_output_gate else 0
    projections = args.hidden_size * (query + gate + 2 * args.kv_channels * groups + query)
    return FORWARD_BACKWARD_FMA * (tokens * projections + seqlen_squared_sum * query)


def latent_layer_flops(args: Any, tokens: float, seqlen_squared_sum: float) -> float:
    """Operations that Megatron counts for one layer of multi-latent attention, forward and backward."""
    heads, key = args.num_attention_heads, args.qk_head_dim + args.qk_pos_emb_head_dim
    if args.q_lora_rank is None:
        queries = args.hidden_size * heads * key
    else:
        queries = args.q_lora_rank * (args.hidden_size + heads * key + 1)
    latent = args.kv_lora_rank * (args.hidden_size + heads * (args.qk_head_dim + args.v_head_dim) + 1)
    rest = args.hidden_size * (args.qk_pos_emb_head_dim + heads * args.v_head_dim)
    core = heads * (key + args.v_head_dim) / 2
    return FORWARD_BACKWARD_FMA * (tokens * (queries + latent + rest) + seqlen_squared_sum * core)


def _wrap(original: Callable[..., float]) -> Callable[..., float]:
    def num_floating_point_operations(
        args: Any,
        batch_size: int,
        seqlen_squared_sum_in_batch: float | None = None,
        total_real_tokens_in_batch: float | None = None,
    ) -> float:
        total = original(args, batch_size, seqlen_squared_sum_in_batch, total_real_tokens_in_batch)
        letters = getattr(args, "hybrid_layer_pattern", None)
        assert _options is not None
        if letters is not None:  # of HybridModel: the layers of MTP, behind /, are none of ours
            depths = lightning_depths([x == LETTER for x in letters.partition("/")[0] if x not in "-E|"], [])
        else:
            pattern = lightning_pattern(args.linear_attention_freq, args.num_layers)
            depths = lightning_depths(pattern, mtp_pattern(args.mtp_num_layers, _options))
        if not depths:
            return total
        tokens, squared = total_real_tokens_in_batch, seqlen_squared_sum_in_batch
        if tokens is None:
            tokens = batch_size * args.seq_length
        if squared is None:
            squared = batch_size * args.seq_length**2
        with_lrpe = sum(depth < _options.lrpe_layers for depth in depths)
        plain, lrpe = (lightning_layer_flops(args, _options, tokens, lrpe=lrpe) for lrpe in (False, True))
        if letters is not None:  # of a letter that it does not know, Megatron counts nothing
            return total + len(depths) * plain + with_lrpe * (lrpe - plain)
        softmax = (latent_layer_flops if args.multi_latent_attention else softmax_layer_flops)(args, tokens, squared)
        return total + len(depths) * (plain - softmax) + with_lrpe * (lrpe - plain)

    return num_floating_point_operations


def apply(options: LightningOptions) -> None:
    """Apply the patch; a second call only changes which options are counted."""
    global _options
    replace(SYMBOLS[0], PARAMETERS, _wrap, "lightning layers count as linear attention")
    _options = options
