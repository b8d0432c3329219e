"""States of lightning layers in Megatron's dynamic inference engine.

Symbol:   megatron.core.inference.config.MambaInferenceStateConfig.from_model
          megatron.core.inference.contexts.dynamic_context.DynamicInferenceContext.{__init__, _allocate_memory_buffer}
Why:      the context keeps recurrent states per request, but only of Mamba layers in a HybridModel: a lightning layer
          would be taken for a softmax layer, with keys and values that it has not. A model without any softmax layer is
          refused (``NotImplementedError``): here it gets blocks of no bytes, by which requests are still counted.
          Latents of multi-latent attention are kept where the layers are ours (``softmax.latent``), without a flag.
Versions: megatron-core 0.19
Can go:   when layers say which states they keep, and a context may have no keys and values.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import torch
from megatron.core.utils import get_attr_wrapped_model, log_single_rank

from ..softmax import LatentAttention
from ..softmax.paged import refuse_unserved
from . import paged_attention
from ._replace import replace

SYMBOLS = (
    "megatron.core.inference.config.MambaInferenceStateConfig.from_model",
    "megatron.core.inference.contexts.dynamic_context.DynamicInferenceContext.__init__",
    "megatron.core.inference.contexts.dynamic_context.DynamicInferenceContext._allocate_memory_buffer",
)
MODEL, INIT, ALLOCATE = (
    ("model", "conv_states_dtype", "ssm_states_dtype"),
    ("self", "model_config", "inference_config"),
    ("self",),
)
LIGHTNING = "lightning_states"  # on a state config that this module made
LATENT_BLOCK = 64  # tokens; Megatron keeps latents in no other blocks

logger = logging.getLogger("lightning_megatron")


def _from_model(original: Callable) -> Callable:
    def from_model(model, conv_states_dtype=None, ssm_states_dtype=None):  # always called on the class
        layers = getattr(get_attr_wrapped_model(model, "decoder"), "layers", ())
        shapes = [getattr(getattr(layer, "self_attention", None), "state_shape", None) for layer in layers]
        if not any(shapes):
            return original(model, conv_states_dtype, ssm_states_dtype)
        for layer in layers:
            _refuse_softmax(layer)
        if ssm_states_dtype not in (None, torch.float32):
            raise ValueError(
                f"ssm_states_dtype={ssm_states_dtype}: states of lightning layers are fp32, in which they sum all "
                "tokens so far; leave it out"
            )
        from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

        largest = max((shape for shape in shapes if shape), key=lambda shape: shape[0] * shape[1] * shape[2])
        config = original.__self__(
            layer_type_list=[Symbols.MAMBA if shape else Symbols.ATTENTION for shape in shapes],
            conv_states_shape=(1, 0),
            ssm_states_shape=largest,
            conv_states_dtype=torch.float32,
            ssm_states_dtype=torch.float32,
        )
        setattr(config, LIGHTNING, True)
        return config

    return from_model


def _refuse_softmax(layer) -> None:
    """Refuse a softmax layer that would fail in the middle of a step."""
    from megatron.core.transformer.attention import Attention
    from megatron.core.transformer.multi_latent_attention import MultiLatentAttention

    attention = getattr(layer, "self_attention", None)
    if not isinstance(attention, Attention):
        return
    latent = isinstance(attention, LatentAttention)
    if isinstance(attention, MultiLatentAttention) and not latent:
        raise ValueError(
            f"layer {layer.layer_number} is Megatron's {type(attention).__name__}, which cannot run in the dynamic "
            "engine of megatron-core 0.19 (its call of FlashMLA lacks an argument); load the checkpoint with "
            "--transformer-impl local"
        )
    if latent or not paged_attention.flash_attention_installed():
        refuse_unserved(attention.config, layer.layer_number)


def _init(original: Callable) -> Callable:
    def __init__(self, model_config, inference_config):
        states = inference_config.mamba_inference_state_config
        self.lightning_without_keys = False
        if not getattr(states, LIGHTNING, False):
            return original(self, model_config, inference_config)
        from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

        if inference_config.num_speculative_tokens:
            raise ValueError(
                f"num_speculative_tokens={inference_config.num_speculative_tokens}: a lightning state cannot be taken "
                "back to before a token that is rejected; use 0"
            )
        if inference_config.enable_prefix_caching:
            raise ValueError(
                "enable_prefix_caching: states of lightning layers at the ends of cached blocks are not kept; leave "
                "it out"
            )
        if inference_config.num_cuda_graphs and inference_config.use_cuda_graphs_for_non_decode_steps:
            inference_config = copy.copy(inference_config)
            inference_config.use_cuda_graphs_for_non_decode_steps = False
            log_single_rank(
                logger,
                logging.INFO,
                "lightning: CUDA graphs serve steps that only decode; prompts are read eagerly",
            )
        if model_config.multi_latent_attention and Symbols.ATTENTION in states.layer_type_list:
            model_config, inference_config = copy.copy(model_config), copy.copy(inference_config)
            model_config.cache_mla_latents = True
            if inference_config.block_size_tokens != LATENT_BLOCK:
                log_single_rank(
                    logger, logging.INFO,
                    f"lightning: latents are kept in blocks of {LATENT_BLOCK} tokens, not of "
                    f"{inference_config.block_size_tokens}",
                )  # fmt: skip
                inference_config.block_size_tokens = LATENT_BLOCK
        if Symbols.ATTENTION not in states.layer_type_list:
            self.lightning_without_keys = True
            inference_config, states = copy.copy(inference_config), copy.copy(states)
            states.layer_type_list = [*states.layer_type_list, Symbols.ATTENTION]  # of blocks without bytes
            inference_config.mamba_inference_state_config = states
            inference_config.block_size_tokens = max(
                inference_config.block_size_tokens, inference_config.max_sequence_length
            )
            model_config = copy.copy(model_config)
            model_config.num_query_groups, model_config.kv_channels = model_config.tensor_model_parallel_size, 1
        return original(self, model_config, inference_config)

    return __init__


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


def apply() -> None:
    """Apply the patches, and ``paged_attention``; a second call does nothing. Contexts of models without lightning
    layers stay as they are.
    """
    replace(SYMBOLS[0], MODEL, _from_model, "states of lightning layers are kept per request")
    replace(SYMBOLS[1], INIT, _init, "models without softmax layers are served")
    replace(SYMBOLS[2], ALLOCATE, _allocate, "models without softmax layers have no keys and values")
    paged_attention.apply()
