"""Rows of the tables of flags for ``--fp8-format`` and ``--fp4-format``: GPUs, sizes of matrices, numbers of tokens.

Which tensors are in fp8 is Megatron's choice: inputs, weights and output gradients of all linear layers within decoder
and multi-token prediction layers, not the embedding, the output layer, routers and attention. TransformerEngine's
products take matrices whose rows and columns are multiples of 16 (mxfp8: 32), in the forward and both backward
products, so that a rank's share of the rows of a weight, its columns, and the tokens of a microbatch must be such.
(Its block-scaled recipe takes shapes that are no multiples of 128, too, and pads the blocks.) What it says of others is
a shape in the first step. Lightning layers always fit: their ranks hold whole heads, whose dims are multiples of 16;
with mxfp8 their sizes are among those that are checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..config import flag_of, resolve_shape
from .rules import Rule, Run

_CAPABILITY = {  # of a GPU, at least; TransformerEngine's own checks come after the model is built
    "delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0), "nvfp4": (10, 0),
}  # fmt: skip


def _name(recipe: Any) -> str:
    return str(getattr(recipe, "value", recipe))


def _too_old(recipe: Any) -> bool:
    wanted = _CAPABILITY.get(_name(recipe))
    return wanted is not None and torch.cuda.is_available() and torch.cuda.get_device_capability() < wanted


def _step(run: Run) -> int:
    return 32 if _name(run.get("fp8_recipe")) == "mxfp8" else 16


def sizes(run: Run) -> Iterator[tuple[str, int, str]]:
    """Rows and columns of the weights on one tensor-parallel rank: flags, number, and what it is."""
    config = run.config
    tp = config.tensor_model_parallel_size
    shape = resolve_shape(config, run.options, tp)
    yield "--hidden-size", config.hidden_size, "the hidden size"
    yield "--lightning-num-kv-heads", shape.projection_dim // tp, "the fused projection of lightning layers"
    yield "--num-attention-heads", shape.output_dim // tp, "the output projection of lightning layers"
    if not all(run.routed):
        yield "--ffn-hidden-size", config.ffn_hidden_size // tp, "the MLP"
    if run.experts:
        expert_tp = config.expert_tensor_parallel_size or tp
        yield "--moe-ffn-hidden-size", (config.moe_ffn_hidden_size or config.ffn_hidden_size) // expert_tp, "an expert"
        if config.moe_shared_expert_intermediate_size:
            width = config.moe_shared_expert_intermediate_size // tp
            yield "--moe-shared-expert-intermediate-size", width, "the shared expert"
    if not run.attends:
        return
    heads = config.num_attention_heads // tp
    if not run.latent:
        groups = max(1, (config.num_query_groups or config.num_attention_heads) // tp)
        rows = heads * (1 + bool(config.attention_output_gate)) + 2 * groups
        yield "--kv-channels", rows * config.kv_channels, "the fused projection of softmax layers"
        yield "--kv-channels", heads * config.kv_channels, "the output projection of softmax layers"
        return
    turned, values = config.qk_pos_emb_head_dim, config.v_head_dim
    if config.q_lora_rank:
        yield "--q-lora-rank", config.q_lora_rank, "the latents of q"
    yield "--kv-lora-rank", config.kv_lora_rank, "the latents of k and v"
    yield "--qk-pos-emb-head-dim", config.kv_lora_rank + turned, "the down projection of k and v"
    yield "--qk-head-dim", heads * (config.qk_head_dim + turned), "the projection of q"
    yield "--v-head-dim", heads * (config.qk_head_dim + values), "the up projection of k and v"
    yield "--v-head-dim", heads * values, "the output projection of softmax layers"


def _unaligned(run: Run) -> str | None:
    step, tp = _step(run), run.config.tensor_model_parallel_size
    share = f" on each of {tp} tensor-parallel ranks" if tp > 1 else ""
    for flag, size, what in sizes(run):
        if size % step:
            return f"needs multiples of {step} in every matrix, and {what} has {size}{share}: change {flag}"
    for name in ("micro_batch_size", "eval_micro_batch_size"):
        rows, length = run.get(name), run.get("seq_length")
        if rows and length and (tokens := rows * length // run.config.context_parallel_size) % step:
            flag = flag_of(name)
            return (
                f"needs multiples of {step} tokens in a microbatch, and {flag} {rows} with --seq-length {length} gives "
                f"a rank {tokens}: change one of them"
            )
    return None


REFUSED = (
    *(
        Rule(
            name,
            lambda run, recipe=recipe: _too_old(run.get(recipe)),
            lambda run, recipe=recipe, instead=instead: (
                f"with --{recipe.replace('_', '-')} {_name(run.get(recipe))} needs a GPU of compute capability "
                f"{'.'.join(map(str, _CAPABILITY[_name(run.get(recipe))]))} or more, and this one has "
                f"{'.'.join(map(str, torch.cuda.get_device_capability()))}: {instead}"
            ),
            flag,
        )
        for name, recipe, flag, instead in (
            ("fp8", "fp8_recipe", "--fp8-format", "use --fp8-recipe delayed, tensorwise or (9.0) blockwise"),
            ("fp4", "fp4_recipe", "--fp4-format", "use --fp8-format hybrid"),
        )
    ),
    Rule("fp8", lambda run: not run.local and _unaligned(run), _unaligned, "--fp8-format"),
    Rule(
        "mlp_chunks_for_training",
        lambda run: (
            run.config.mlp_chunks_for_training > 1 and run.get("fp8") and _name(run.get("fp8_recipe")) == "delayed"
        ),
        "calls an MLP several times in a step, and delayed scaling would keep the largest values of the last call "
        "alone; use --fp8-recipe tensorwise, or leave it out",
    ),
)
