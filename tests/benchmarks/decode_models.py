"""What tests.benchmarks.decode serves: models of equal size with random weights, Megatron's dynamic engine, bytes.

A decoding step of B requests must read every weight but the embedding once, read and write B states, and read the keys
and values of B requests of N tokens:

    bound = (weights + 2 B state + B N kv) / bandwidth of a copy

Lightning: state = layers * H K V * 4 bytes, kv = 0. Softmax: state = 0, kv = layers * 2 Hkv K * 2 bytes. Mamba-2:
convolution and SSM states as Megatron keeps them, kv of its one softmax layer.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from .training_models import MODELS, Model

SOFTMAX_GROUPS = 8  # key/value heads of softmax layers: grouped, as models of today have it; half of the 1B's keys
BLOCK = 256  # tokens of a block of keys and values, Megatron's default
ROOM = 512  # tokens that a request may grow beyond its context
# Layers of Megatron's HybridModel: M Mamba-2, - MLP, * softmax, of which its dynamic engine asks for at least one.
# 1B: 13 * 29.6 + 12.6 + 14 * 34.6 = 882 million with the embeddings apart, lightning layers have 890.
MAMBA = {"toy": "M-*-", "1B": "M-" * 7 + "*-" + "M-" * 6}
ATTENTIONS = ("lightning", "softmax", "mamba")


def config_of(model: Model, attention: str, *, cuda_graph: bool, gpu: bool):
    """Megatron's TransformerConfig."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import InferenceCudaGraphScope

    groups = model.kv_heads if attention == "lightning" else min(SOFTMAX_GROUPS, model.kv_heads)
    extra: dict[str, Any] = {}
    if cuda_graph:
        extra |= dict(cuda_graph_impl="local", inference_cuda_graph_scope=InferenceCudaGraphScope.block)
    if attention == "mamba":
        extra |= dict(is_hybrid_model=True)
        if not gpu:
            extra |= dict(mamba_head_dim=16, mamba_num_groups=2, mamba_state_dim=16)
    return TransformerConfig(
        num_layers=len(MAMBA[name_of(model)]) if attention == "mamba" else model.layers, hidden_size=model.hidden,
        num_attention_heads=model.heads, num_query_groups=groups, ffn_hidden_size=model.ffn, gated_linear_unit=True,
        activation_func=F.silu, bias_activation_fusion=gpu, add_bias_linear=False, normalization="RMSNorm",
        transformer_impl="local", params_dtype=torch.bfloat16 if gpu else torch.float32, bf16=gpu,
        use_cpu_initialization=not gpu, gradient_accumulation_fusion=False, bias_dropout_fusion=False,
        apply_rope_fusion=False, attention_dropout=0.0, hidden_dropout=0.0, **extra,
    )  # fmt: skip


def name_of(model: Model) -> str:
    return next(name for name, other in MODELS.items() if other == model)


def build(name: str, attention: str, *, cuda_graph: bool, gpu: bool):
    """A model for inference with random weights.

    Args:
        name: of ``training_models.MODELS``.
        attention: of ``ATTENTIONS``.
        cuda_graph: its layers are captured by the engine.
        gpu: in bf16 on the GPU; else in fp32, small, on the CPU.
    """
    from megatron.core.models.gpt import GPTModel

    from lightning_megatron.config import LightningOptions
    from lightning_megatron.patches import dynamic_inference
    from lightning_megatron.runtime import prepare
    from lightning_megatron.spec import get_hybrid_block_spec

    model = MODELS[name]
    config = config_of(model, attention, cuda_graph=cuda_graph, gpu=gpu)
    options = LightningOptions()
    dynamic_inference.apply()  # which serves softmax layers without flash-attn, too
    softmax_too = dataclasses.replace(config, linear_attention_freq=[1] + [0] * (config.num_layers - 1))
    if attention == "lightning":
        prepare(config, options)
    if attention == "mamba":
        return _mamba(config, softmax_too, options, MAMBA[name], model.vocabulary)
    if attention == "lightning":
        spec = get_hybrid_block_spec(config, options)
    else:
        spec = get_hybrid_block_spec(softmax_too, options)
        spec.layer_specs = spec.layer_specs[-1:] * config.num_layers
    built = GPTModel(
        config, spec, vocab_size=model.vocabulary, max_sequence_length=BLOCK, share_embeddings_and_output_weights=False,
        position_embedding_type="none" if attention == "lightning" else "rope",
    )  # fmt: skip
    return (built.to(torch.cuda.current_device()).bfloat16() if gpu else built).eval()  # as Float16Module does


def _mamba(config, softmax_too, options, pattern: str, vocabulary: int):
    """Megatron's HybridModel of the same linear layers, norms, MLPs and softmax layers; it knows those of TE only."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    from lightning_megatron.norm import layer_norm
    from lightning_megatron.spec import get_hybrid_layer_specs

    norm = layer_norm(config)
    layer = get_hybrid_layer_specs(softmax_too, options)[-1].submodules
    mixer = MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    mamba = MambaLayerSubmodules(
        norm=norm, mixer=ModuleSpec(module=MambaMixer, submodules=mixer), mamba_bda=get_bias_dropout_add
    )
    softmax = TransformerLayerSubmodules(
        input_layernorm=layer.input_layernorm, self_attention=layer.self_attention, self_attn_bda=layer.self_attn_bda
    )
    dense = TransformerLayerSubmodules(pre_mlp_layernorm=layer.pre_mlp_layernorm, mlp=layer.mlp, mlp_bda=layer.mlp_bda)
    submodules = hybrid_block.HybridStackSubmodules(
        mamba_layer=ModuleSpec(module=MambaLayer, submodules=mamba),
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=softmax),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=dense),
    )
    spec = ModuleSpec(module=hybrid_block.HybridStack, submodules=submodules)
    with mock.patch.object(hybrid_block, "TENorm", norm):  # the final norm, which no spec reaches
        built = HybridModel(
            config, spec, vocab_size=vocabulary, max_sequence_length=BLOCK, hybrid_layer_pattern=pattern,
            share_embeddings_and_output_weights=False,
        )  # fmt: skip
    return (built.to(torch.cuda.current_device()).bfloat16() if config.bf16 else built).eval()  # as Float16Module does


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of a decoding step, see the module's docstring."""

    weights: int
    state: int
    kv: int

    @classmethod
    def of(cls, model, states) -> Traffic:
        """``states``: Megatron's MambaInferenceStateConfig of the model, or None."""
        weights = sum(
            p.numel() * p.element_size() for name, p in model.named_parameters() if "word_embeddings" not in name
        )
        config, state, softmax = model.config, 0, model.config.num_layers
        if states is not None:
            recurrent, softmax = states.layer_type_list.count("M"), states.layer_type_list.count("*")
            state = recurrent * (
                math.prod(states.conv_states_shape) * states.conv_states_dtype.itemsize
                + math.prod(states.ssm_states_shape) * states.ssm_states_dtype.itemsize
            )
        kv = softmax * 2 * config.num_query_groups * config.kv_channels * config.params_dtype.itemsize
        return cls(weights, state, kv)

    def step(self, batch: int, context: int) -> int:
        return self.weights + 2 * batch * self.state + batch * context * self.kv

    def request(self, context: int) -> int:
        """What a request of ``context`` tokens keeps, in whole blocks and with room for new tokens."""
        return self.state + blocks_of(context) * BLOCK * self.kv


def states_of(model):
    from megatron.core.inference.config import MambaInferenceStateConfig

    return MambaInferenceStateConfig.from_model(model)


def blocks_of(context: int) -> int:
    """Blocks of keys and values of a request of ``context`` tokens, with room for new ones."""
    return math.ceil((context + ROOM) / BLOCK)


def context_of(
    model, traffic: Traffic, longest: int, batch: int, max_tokens: int, *, blocks: int, cuda_graph: bool = False
):
    """A DynamicInferenceContext for ``batch`` requests of at most ``longest`` tokens, which share ``blocks`` blocks."""
    from megatron.core.inference.config import InferenceConfig
    from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext

    kv = (blocks + 2) * BLOCK * traffic.kv  # one that no request uses, and one to spare
    if not traffic.kv:  # blocks without bytes, which are counted as if they had: one of all tokens for each request
        kv = (batch + 3) * 2 * model.config.params_dtype.itemsize * max(BLOCK, longest + ROOM)
    config = InferenceConfig(
        max_sequence_length=longest + ROOM, buffer_size_gb=(kv + (batch + 1) * traffic.state) / 2**30,
        max_requests=batch, max_tokens=max(max_tokens, batch), block_size_tokens=BLOCK, enable_chunked_prefill=True,
        num_cuda_graphs=-1 if cuda_graph else None, use_cuda_graphs_for_non_decode_steps=False,
        mamba_inference_state_config=states_of(model),
    )  # fmt: skip
    return DynamicInferenceContext(model.config, config)


class Tokenizer:
    """Numbers are their own text."""

    bos = None

    def __init__(self, vocabulary: int):
        self.vocab_size, self.eod = vocabulary, vocabulary - 1

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def detokenize(self, tokens: list[int], **_) -> str:
        return " ".join(map(str, tokens))


def engine_of(model, context):
    """Megatron's dynamic engine, which captures the context's CUDA graphs now."""
    from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
    from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController

    wrapper = GPTInferenceWrapper(model, context)
    controller = TextGenerationController(inference_wrapped_model=wrapper, tokenizer=Tokenizer(model.vocab_size))
    return DynamicInferenceEngine(controller=controller, context=context)
