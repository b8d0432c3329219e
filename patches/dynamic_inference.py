"""States of lightning layers in Megatron's dynamic inference engine.

Symbol:   megatron.core.inference.config.MambaInferenceStateConfig.from_model
          megatron.core.inference.contexts.dynamic_context.DynamicInferenceContext.{__init__, _allocate_memory_buffer,
          _compute_prefix_match}
Why:      the context keeps recurrent states per request, but only of Mamba layers in a HybridModel: a lightning layer
          would be taken for a softmax layer, with keys and values that it has not. A model without any softmax layer is
          refused (``NotImplementedError``): here it gets blocks of no bytes, by which requests are still counted.
          Layers that Megatron's HybridModel builds for attention, MLPs and experts are told apart by what they keep.
          With prefix caching, a chunk of a prompt that is not its first skips tokens whose keys are cached, and one of
          a single token skips up to the end of any block: states then lack those tokens.
          Latents of multi-latent attention are kept where the layers are ours (``softmax.latent``), without a flag.
Versions: megatron-core 0.19, 0.20
Can go:   when layers say which states they keep, and a context may have no keys and values.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable

import torch
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.utils import get_attr_wrapped_model, log_single_rank

from ..config import prepared_with, resolve_shape
from ..softmax import LatentAttention
from ..softmax.paged import refuse_unserved
from . import paged_attention
from ._replace import replace

SYMBOLS = (
    "megatron.core.inference.config.MambaInferenceStateConfig.from_model",
    "megatron.core.inference.contexts.dynamic_context.DynamicInferenceContext.__init__",
    "megatron.core.inference.contexts.dynamic_context.DynamicInferenceContext._allocate_memory_buffer",
    "megatron.core.inference.contexts.dynamic_context.DynamicInferenceContext._compute_prefix_match",
)
MODEL, INIT, ALLOCATE, MATCH = (
    ("model", "conv_states_dtype", "ssm_states_dtype"),
    ("self", "model_config", "inference_config"),
    ("self",),
    ("self", "req", "prefill_chunk_length", "record_mamba_match"),
)
LIGHTNING = "lightning_states"  # on a state config that this module made
_ALIGNMENT = "ssm_chunk_alignment"  # of a state config since 0.20: like mamba_chunk_size, where states are kept
LATENT_BLOCK = 64  # tokens; Megatron keeps latents in no other blocks

logger = logging.getLogger("lightning_megatron")


def _from_model(original: Callable) -> Callable:
    def from_model(model, conv_states_dtype=None, ssm_states_dtype=None):  # always called on the class
        layers = getattr(get_attr_wrapped_model(model, "decoder"), "layers", ())
        shapes = [getattr(getattr(layer, "self_attention", None), "state_shape", None) for layer in layers]
        largest = max(filter(None, shapes), key=math.prod, default=None) or _shape_elsewhere(model)
        if largest is None:
            return original(model, conv_states_dtype, ssm_states_dtype)
        if ssm_states_dtype not in (None, torch.float32):
            raise ValueError(
                f"ssm_states_dtype={ssm_states_dtype}: states of lightning layers are fp32, in which they sum all "
                "tokens so far; leave it out"
            )
        config = original.__self__(
            layer_type_list=[_kind(layer) for layer in layers],
            conv_states_shape=(1, 0),
            ssm_states_shape=largest,
            conv_states_dtype=torch.float32,
            ssm_states_dtype=torch.float32,
        )
        setattr(config, LIGHTNING, True)
        return config

    return from_model


def _kind(layer) -> str:
    """What a layer keeps, by Megatron's letters: states, as Mamba layers do, keys and values, or nothing.

    Raises:
        ValueError: a layer that would fail in the middle of a step.
    """
    from megatron.core.transformer.attention import Attention

    attention = getattr(layer, "self_attention", None)
    if isinstance(attention, IdentityOp):
        return Symbols.MLP  # or experts: in HybridModel they are layers by themselves
    if getattr(attention, "state_shape", None):
        return Symbols.MAMBA
    if not isinstance(attention, Attention):
        raise ValueError(
            f"layer {layer.layer_number} is {type(attention or layer).__name__}, and beside lightning layers the "
            "dynamic engine keeps only keys and values of softmax layers: use a model without it"
        )
    _refuse_softmax(layer, attention)
    return Symbols.ATTENTION


def _refuse_softmax(layer, attention) -> None:
    """Refuse a softmax layer that would fail in the middle of a step."""
    from megatron.core.transformer.multi_latent_attention import MultiLatentAttention

    latent = isinstance(attention, LatentAttention)
    if isinstance(attention, MultiLatentAttention) and not latent:
        raise ValueError(
            f"layer {layer.layer_number} is Megatron's {type(attention).__name__}, which cannot run in the dynamic "
            "engine of megatron-core 0.19 (its call of FlashMLA lacks an argument); load the checkpoint with "
            "--transformer-impl local"
        )
    if latent or not paged_attention.flash_attention_installed():
        refuse_unserved(attention.config, layer.layer_number)


def _shape_elsewhere(model) -> tuple[int, int, int] | None:
    """Of a state on other pipeline stages, where this one has no lightning layer; None if the model has none."""
    config = get_attr_wrapped_model(model, "config")
    prepared = prepared_with(config)  # as only models with lightning layers are
    if prepared is None or config.pipeline_model_parallel_size == 1:
        return None
    shape = resolve_shape(config, prepared[0], config.tensor_model_parallel_size)
    return shape.num_heads // config.tensor_model_parallel_size, shape.key_dim, shape.value_dim


def _init(original: Callable) -> Callable:
    def __init__(self, model_config, inference_config):
        states = inference_config.mamba_inference_state_config
        self.lightning_without_keys = False
        if not getattr(states, LIGHTNING, False):
            return original(self, model_config, inference_config)
        _refuse(model_config, inference_config)
        inference_config, states = copy.copy(inference_config), copy.copy(states)
        inference_config.mamba_inference_state_config = states
        if inference_config.num_cuda_graphs and inference_config.use_cuda_graphs_for_non_decode_steps:
            inference_config.use_cuda_graphs_for_non_decode_steps = False
            _log("CUDA graphs serve steps that only decode; prompts are read eagerly")
        if model_config.mtp_num_layers:
            _log(f"{model_config.mtp_num_layers} multi-token prediction layers are left out: they only help training")
        # Every stage counts blocks and pauses requests by itself, so their sizes may not depend on a stage's layers
        stages = _of_stages(states.layer_type_list, model_config, inference_config)
        _refuse_uneven_states([stage.count(Symbols.MAMBA) for stage in stages], inference_config)
        if not any(Symbols.ATTENTION in stage for stage in stages):
            if not inference_config.enable_prefix_caching:
                inference_config.block_size_tokens = max(  # one block for each request
                    inference_config.block_size_tokens, inference_config.max_sequence_length
                )
        elif model_config.multi_latent_attention:
            model_config = copy.copy(model_config)
            model_config.cache_mla_latents = True
            if inference_config.block_size_tokens != LATENT_BLOCK:
                _log(
                    f"latents are kept in blocks of {LATENT_BLOCK} tokens, not of {inference_config.block_size_tokens}"
                )
                inference_config.block_size_tokens = LATENT_BLOCK
        if Symbols.ATTENTION not in states.layer_type_list:
            self.lightning_without_keys = True
            states.layer_type_list = [*states.layer_type_list, Symbols.ATTENTION]  # of blocks without bytes
            model_config = copy.copy(model_config)
            model_config.num_query_groups = model_config.tensor_model_parallel_size
            model_config.kv_channels = _channels_of_blocks(model_config, inference_config)
        # Megatron asks for states at multiples of it only; any position would do, but it lists all chunks on the host
        states.mamba_chunk_size = inference_config.block_size_tokens
        if hasattr(states, _ALIGNMENT):
            setattr(states, _ALIGNMENT, states.mamba_chunk_size)
        return original(self, model_config, inference_config)

    return __init__


def _channels_of_blocks(model_config, inference_config) -> int:
    """How many channels the blocks without bytes pretend to have, so that their number stays in proportion.

    Megatron fills with blocks what the states leave of the buffer, and lists them all on the host. Four times as many
    as the requests need at once is enough for prefixes that outlive their requests.
    """
    states, ratio, requests = (
        getattr(inference_config, name)
        for name in ("mamba_inference_state_config", "mamba_memory_ratio", "max_requests")
    )
    if requests is None:  # then each block is counted with the states of a request
        return 1
    active = inference_config.buffer_size_gb * 2**30
    if ratio is None:
        total = active + (inference_config.paused_buffer_size_gb or 0) * 2**30
        count = states.layer_type_list.count(Symbols.MAMBA)
        ratio = requests * count * 4 * math.prod(states.ssm_states_shape) / total
    size = inference_config.block_size_tokens
    blocks = 4 * requests * math.ceil(inference_config.max_sequence_length / size) + 2
    return max(1, int(active * (1 - ratio) / (blocks * 2 * size * model_config.params_dtype.itemsize)))


def _refuse(model_config, inference_config) -> None:
    if inference_config.num_speculative_tokens:
        raise ValueError(
            f"num_speculative_tokens={inference_config.num_speculative_tokens}: a lightning state cannot be taken "
            "back to before a token that is rejected; use 0"
        )
    if model_config.batch_invariant_mode and hasattr(inference_config.mamba_inference_state_config, _ALIGNMENT):
        raise ValueError(
            "--batch-invariant-mode: since 0.20 Megatron's dynamic engine then reads prompts as its Mamba kernels need "
            "it, which lightning layers do not follow; leave it out when you generate"
        )
    if model_config.context_parallel_size > 1:
        raise ValueError(
            f"lightning layers do not generate with context-parallel size {model_config.context_parallel_size}; load "
            "the checkpoint with --context-parallel-size 1"
        )
    if model_config.expert_model_parallel_size > 1 and model_config.moe_token_dispatcher_type == "allgather":
        raise ValueError(
            "--moe-token-dispatcher-type allgather needs as many tokens on every expert rank, and ranks that serve "
            "other requests have not; use alltoall"
        )
    if (virtual := model_config.virtual_pipeline_model_parallel_size) is not None:
        raise ValueError(
            f"Megatron's dynamic inference runs one model part on each pipeline stage, and virtual pipeline size "
            f"{virtual} makes several; load the checkpoint without --num-layers-per-virtual-pipeline-stage"
        )


def _of_stages(kinds: list[str], model_config, inference_config) -> list[list[str]]:
    """The kinds of layers on every pipeline stage."""
    groups = inference_config.pg_collection
    if groups is None and model_config.pipeline_model_parallel_size == 1:
        return [kinds]
    group = parallel_state.get_pipeline_model_parallel_group() if groups is None else groups.pp
    stages: list = [None] * group.size()
    torch.distributed.all_gather_object(stages, kinds, group=group)
    return stages


def _refuse_uneven_states(counts: list[int], inference_config) -> None:
    ratio = inference_config.mamba_memory_ratio
    if ratio is None or len(set(counts)) == 1 and all(counts):
        return
    if inference_config.max_requests is None or not all(counts):
        raise ValueError(
            f"mamba_memory_ratio={ratio} gives pipeline stages with {counts} lightning layers room for different "
            "numbers of requests; leave it out, and give max_requests"
        )


def _log(message: str) -> None:
    log_single_rank(logger, logging.INFO, f"lightning: {message}")


def _allocate(original: Callable) -> Callable:
    def _allocate_memory_buffer(self):
        if not self.lightning_without_keys:
            return original(self)
        layers, self.num_attention_layers = self.num_attention_layers, 0
        try:
            return original(self)
        finally:
            self.num_attention_layers = layers

    return _allocate_memory_buffer


def _match(original: Callable) -> Callable:
    def _compute_prefix_match(self, req, prefill_chunk_length, record_mamba_match=False):
        match = original(self, req, prefill_chunk_length, record_mamba_match)
        *blocks, skipped, _ = match
        if not getattr(self.config.mamba_inference_state_config, LIGHTNING, False) or not skipped:
            return match
        size = self.block_size_tokens
        first = req.finished_chunk_token_count == 0  # later chunks go on from the state of the one before
        skipped = self._find_mamba_match_count(req, 0, skipped // size) * size if first else 0
        return (*blocks, skipped, prefill_chunk_length - skipped)

    return _compute_prefix_match


def apply() -> None:
    """Apply the patches, and ``paged_attention``; a second call does nothing. Contexts of models without lightning
    layers stay as they are.
    """
    replace(SYMBOLS[0], MODEL, _from_model, "states of lightning layers are kept per request")
    replace(SYMBOLS[1], INIT, _init, "models without softmax layers are served")
    replace(SYMBOLS[2], ALLOCATE, _allocate, "models without softmax layers have no keys and values")
    replace(SYMBOLS[3], MATCH, _match, "tokens are skipped only where the state behind them is kept")
    paged_attention.apply()
