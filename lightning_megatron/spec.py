"""Layer and block specs. ``--spec lightning_megatron.spec lightning_spec`` of Megatron-LM's pretrain_gpt.py points here.

Names for ``--spec``:
    lightning_spec         called by Megatron >= 0.19; a block of lightning and softmax layers, by --linear-attention-freq
    lightning_layer_spec   one ModuleSpec for code that uses the object uncalled; the layer chooses by its global number
                           (the block's final norm is then Megatron's: no sequence parallelism without TE or apex)
Options other than the defaults: ``my_spec = make_spec(decay="minimax", scale=1.0)`` in a module of your own.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import sys
from collections.abc import Callable

from .compat import check_megatron, importable, version

check_megatron()

try:
    import torch
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset

    from . import __version__
    from .config import LightningOptions, lightning_pattern, resolve_shape
    from .decay import log_decay
    from .mixer import LightningAttention, LightningAttentionSubmodules
    from .norm import TorchNorm
    from .softmax import SDPACoreAttention
except ImportError as error:
    # Megatron catches ImportError from a --spec module and trains plain softmax attention without another word.
    raise RuntimeError(f"lightning_megatron.spec cannot be used, an import failed: {error}") from error

logger = logging.getLogger("lightning_megatron")


def make_spec(options: LightningOptions | None = None, **overrides) -> Callable:
    """A spec function for Megatron's model builder, with other options than the defaults.

    Args:
        options: all options at once, or
        overrides: single fields of :class:`LightningOptions`, on top of ``options``.

    Returns:
        ``spec(config, vp_stage=None) -> TransformerBlockSubmodules``, where config is Megatron's GPTModelConfig or
        TransformerConfig.
    """
    options = dataclasses.replace(options or LightningOptions(), **overrides)

    def spec(config, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        transformer = getattr(config, "transformer", config)
        return get_hybrid_block_spec(transformer, options, vp_stage=vp_stage)

    return spec


def get_lightning_layer_spec(config, options: LightningOptions | None = None) -> ModuleSpec:
    """Spec of one TransformerLayer with lightning attention, dense MLP or MoE as the config's first layer has it."""
    config = dataclasses.replace(config, linear_attention_freq=None) if config.linear_attention_freq else config
    return get_hybrid_layer_specs(config, options)[0]


def get_hybrid_layer_specs(config, options: LightningOptions | None = None) -> list[ModuleSpec]:
    """Specs of all layers of the model, over all pipeline stages: lightning or softmax, dense or MoE.

    MLPs, experts and projections are those of Megatron's own spec for ``config.transformer_impl``. For "local", norms and
    softmax core attention are replaced by ones that support sequence parallelism and long sequences.

    Raises:
        ValueError: a config that lightning layers cannot honour.
    """
    options = _with_layout(options or LightningOptions())
    _refuse(config, options)
    base_specs = get_gpt_decoder_layer_specs(
        config, config.transformer_impl == "transformer_engine", config.normalization, config.qk_l2_norm
    )
    local = config.transformer_impl == "local"
    norm = layer_norm(config)
    specs = []
    for base, lightning in zip(
        base_specs, lightning_pattern(config.linear_attention_freq, config.num_layers), strict=True
    ):
        layer = dataclasses.replace(base.submodules)
        if local:
            layer.input_layernorm = layer.pre_mlp_layernorm = norm
        projections = layer.self_attention.submodules
        if lightning:
            layer.self_attention = ModuleSpec(
                module=LightningAttention,
                params={"options": options},
                submodules=LightningAttentionSubmodules(projections.linear_qkv, projections.linear_proj),
            )
        elif local:
            core = functools.partial(SDPACoreAttention, per_document=options.cp_layout == "zigzag-documents")
            replaced = dataclasses.replace(projections, core_attention=core)
            if config.qk_layernorm and not config.qk_l2_norm:
                replaced = dataclasses.replace(replaced, q_layernorm=norm, k_layernorm=norm)
            layer.self_attention = dataclasses.replace(layer.self_attention, submodules=replaced)
        specs.append(dataclasses.replace(base, submodules=layer))
    return specs


def get_hybrid_block_spec(
    config, options: LightningOptions | None = None, *, vp_stage: int | None = None, pp_rank: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of one (virtual) pipeline stage, lightning or softmax by ``config.linear_attention_freq``.

    Args:
        config: Megatron's TransformerConfig. linear_attention_freq None: all lightning; N: every N-th layer is softmax;
            or a list with 1 (lightning) or 0 (softmax) for every layer of the model.
        options: what the config does not say.
        vp_stage, pp_rank: which stage; the pipeline rank defaults to this process's.

    Raises:
        ValueError: a config that lightning layers cannot honour, or a stage without layers.
    """
    options = options or LightningOptions()
    specs = get_hybrid_layer_specs(config, options)
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        local = list(layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank))
    else:
        offset = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
        local = list(range(offset, offset + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)))
        if not local:
            raise ValueError(
                f"pipeline stage (pp_rank={pp_rank}, vp_stage={vp_stage}) gets none of the {config.num_layers} layers; use fewer "
                "stages, or say with --pipeline-model-parallel-layout which stages hold only embedding or loss"
            )
    if vp_stage in (None, 0):
        _announce(config, options)
    return TransformerBlockSubmodules(layer_specs=[specs[i] for i in local], layer_norm=layer_norm(config))


class LightningDispatchLayer(BaseTransformerLayer):
    """Builds the TransformerLayer, lightning or softmax, that belongs at a global layer number.

    For places that take one ModuleSpec for all layers and never call it (``lightning_layer_spec``).
    """

    def __new__(cls, config, layer_number: int = 1, options: LightningOptions | None = None, **arguments):
        index = layer_number - 1
        if arguments.get("add_layer_offset", True) and not arguments.get("is_mtp_layer", False):
            groups = arguments.get("pg_collection")
            pp_rank = groups.pp.rank() if groups is not None else None
            index += get_transformer_layer_offset(config, arguments.get("vp_stage"), pp_rank)
        if index == 0:
            _announce(config, options or LightningOptions())
        return build_module(
            get_hybrid_layer_specs(config, options)[index], config=config, layer_number=layer_number, **arguments
        )


lightning_spec = make_spec()
lightning_layer_spec = ModuleSpec(module=LightningDispatchLayer)


def layer_norm(config) -> type:
    """The norm of layers and of the block's end: TransformerEngine's, apex's (LayerNorm only), or torch's."""
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    if config.normalization == "LayerNorm" and importable("apex.normalization.fused_layer_norm"):
        from megatron.core.fusions.fused_layer_norm import FusedLayerNorm

        return FusedLayerNorm
    return TorchNorm


def _with_layout(options: LightningOptions) -> LightningOptions:
    """Say how documents are cut over context-parallel ranks, where Megatron's training loop runs."""
    if options.cp_layout == "auto" and getattr(_training_args(), "sft", False):
        return dataclasses.replace(options, cp_layout="zigzag-documents")
    return options


def _training_args():
    """Megatron's parsed flags, or None outside of its training loop."""
    return getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)


def _refuse(config, options: LightningOptions) -> None:
    if config.transformer_impl not in ("local", "transformer_engine"):
        raise ValueError(
            f"--transformer-impl {config.transformer_impl} is not supported by lightning specs; use local or transformer_engine"
        )
    if config.transformer_impl == "transformer_engine" and not importable("transformer_engine.pytorch"):
        raise ValueError(
            "--transformer-impl transformer_engine, but transformer_engine is not installed; install it, or pass "
            "--transformer-impl local"
        )
    for name in ("multi_latent_attention", "experimental_attention_variant", "heterogeneous_block_specs"):
        value = getattr(config, name, None)
        if value:
            raise ValueError(
                f"{name}={value!r} chooses another attention than lightning_megatron's specs; leave it out"
            )
    pattern = lightning_pattern(config.linear_attention_freq, config.num_layers)
    if config.context_parallel_size > 1 and not all(pattern):
        if options.cp_layout == "contiguous":
            raise ValueError(
                "cp_layout='contiguous' has no softmax attention, and this model has softmax layers; use cp_layout='zigzag', or leave "
                "--linear-attention-freq out"
            )
        packed = getattr(_training_args(), "dataloader_inter_document_masking", False)
        if packed and options.cp_layout != "zigzag-documents" and config.transformer_impl == "transformer_engine":
            raise ValueError(
                "--dataloader-inter-document-masking with context parallelism lets documents cross the ranks' chunks, which "
                "TransformerEngine's softmax attention does not take; use --transformer-impl local"
            )
    if not any(pattern):
        raise ValueError(
            f"--linear-attention-freq {config.linear_attention_freq} has no lightning layer; leave it out for all-lightning, "
            "or train without this spec"
        )


def attention_parameters(config, options: LightningOptions) -> tuple[int, int]:
    """Parameters of the attention module of one lightning and of one softmax layer, over all tensor-parallel ranks."""
    shape = resolve_shape(config, options, tp=1)
    hidden, bias = config.hidden_size, config.add_bias_linear
    qkv_bias = bias or config.add_qkv_bias

    def projections(columns: int, rows: int) -> int:
        return hidden * (columns + rows) + columns * qkv_bias + hidden * bias

    norms = shape.output_dim * bool(shape.norm_groups and options.norm_affine) + 2 * shape.key_dim * options.qk_norm
    query = config.kv_channels * config.num_attention_heads
    gate = query if config.attention_output_gate else 0
    key_value = 2 * config.kv_channels * config.num_query_groups
    qk_weights = config.qk_layernorm and not config.qk_l2_norm
    softmax_norms = 2 * config.kv_channels * (1 if config.normalization == "RMSNorm" else 2) * qk_weights
    return projections(shape.projection_dim, shape.output_dim) + norms, projections(
        query + gate + key_value, query
    ) + softmax_norms


def layer_map(config, options: LightningOptions) -> str:
    """What will be trained, for the log: which layers are lightning, with which sizes, decays and parts."""
    pattern = lightning_pattern(config.linear_attention_freq, config.num_layers)
    shape = resolve_shape(config, options, config.tensor_model_parallel_size)
    marks = "".join("L" if lightning else "s" for lightning in pattern)
    rows = "\n".join(f"  {start:4d}  " + marks[start : start + 64] for start in range(0, len(marks), 64))
    decays = torch.cat(
        [
            log_decay(options.decay, shape.num_heads, layer, config.num_layers, offset=options.decay_offset)
            for layer, lightning in enumerate(pattern)
            if lightning
        ]
    )
    lightning_size, softmax_size = attention_parameters(config, options)
    scale = shape.key_dim**-0.5 if options.scale is None else options.scale
    te = config.transformer_impl == "transformer_engine"
    softmax = sum(not lightning for lightning in pattern)
    core = "TransformerEngine's core attention" if te else "torch's scaled_dot_product_attention"
    return (
        f"lightning_megatron {__version__}: {sum(pattern)} lightning layers (L), {softmax} softmax layers (s)\n{rows}\n"
        f"  lightning: {shape.num_heads} heads, {shape.num_kv_heads} of k and v, K {shape.key_dim}, V {shape.value_dim}, "
        f"scale {scale:.4g}, feature map {options.feature_map}, norm {options.norm}, gate {options.gate}, "
        f"rope {'on' if options.rope else 'off'}, q/k norm {'on' if options.qk_norm else 'off'}, backend {options.backend}\n"
        f"  decay {options.decay}: log_decay {decays.min():.3g} to {decays.max():.3g} per token, half-life "
        f"{_half_life(decays.min())} to {_half_life(decays.max())} tokens\n"
        f"  attention parameters a layer: lightning {lightning_size:,}" + (f", softmax {softmax_size:,}" if softmax else "")
        + f"\n  parts: {layer_norm(config).__name__} for layer norms" + (f", {core} for softmax layers" if softmax else "")
        + f"; megatron-core {version('megatron-core')}, torch {version('torch')}, triton {version('triton')}"
    )  # fmt: skip


def _half_life(value: torch.Tensor) -> str:
    return "infinitely many" if value == 0 else f"{math.log(0.5) / float(value):.3g}"


def _announce(config, options: LightningOptions) -> None:
    """Print the layer map once a model, on rank 0; where Megatron's training loop runs, look at its flags too."""
    args = _training_args()
    if args is not None:
        _check_training(args, options)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(layer_map(config, options), flush=True)


def _check_training(args, options: LightningOptions) -> None:
    if getattr(args, "reset_attention_mask", False):
        raise ValueError(
            "--reset-attention-mask has no effect on lightning layers and on causal softmax kernels, so documents would see "
            "each other; use --dataloader-inter-document-masking"
        )
    if getattr(args, "create_attention_mask_in_dataloader", False) and getattr(args, "rank", 0) == 0:
        logger.warning(
            "the data loader builds a %d x %d attention mask that no layer here reads; pass "
            "--no-create-attention-mask-in-dataloader, which doubles the speed at a length of 32K",
            args.seq_length,
            args.seq_length,
        )
    from .patches import flops, packed_rope, recompute

    cut_whole = getattr(args, "dataloader_inter_document_masking", False) and not args.sft
    if cut_whole and args.context_parallel_size > 1:
        packed_rope.apply()
    recomputed = getattr(args, "recompute_granularity", None) == "full"
    if recomputed and args.context_parallel_size > 1 and options.cp_keep_states:
        recompute.apply()
    flops.apply(options)  # else Megatron's TFLOP/s count lightning layers as softmax
