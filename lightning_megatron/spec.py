"""Builders of layer and block specs, and the targets of ``--spec``.

Names for ``--spec lightning_megatron.spec NAME`` of Megatron-LM's pretrain_gpt.py:
    lightning_spec         a callable, for Megatron >= 0.19: a block of lightning and softmax layers, which
                           --linear-attention-freq places
    lightning_layer_spec   one ModuleSpec, for code that needs a ModuleSpec rather than a callable: each layer looks up
                           its global number. The final norm of the block is then Megatron's own, which refuses sequence
                           parallelism unless TransformerEngine or apex is installed.
For other options put ``my_spec = make_spec(decay="minimax", scale=1.0)`` into a module of your own.

The builders ``get_...`` are pure: they print nothing and patch nothing. ``runtime.prepare`` does that, once on every
rank. The targets above call it; a program of your own calls it before it builds its model.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from operator import not_

from .compat import check_megatron

check_megatron()

try:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs, get_gpt_mtp_block_spec
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.enums import AttnMaskType, LayerType
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import (
        BaseTransformerLayer,
        TransformerLayer,
        get_transformer_layer_offset,
    )

    from .config import LightningOptions, expert_pattern, lightning_pattern, mtp_pattern
    from .layer import ChunkedLayer
    from .mixer import LightningAttention, LightningAttentionSubmodules
    from .mlp import BilinearMLP, fused
    from .norm import head_norm_spec, layer_norm_spec, prediction_norms
    from .residual import scaled_residual
    from .runtime import prepare, refuse
    from .softmax import DynamicSelfAttention, LatentAttention, SDPACoreAttention, TELatentAttention
except ImportError as error:
    # Megatron catches ImportError from a --spec module and trains plain softmax attention without another word.
    raise RuntimeError(f"lightning_megatron.spec cannot be used, an import failed: {error}") from error


def make_spec(options: LightningOptions | None = None, **overrides) -> Callable:
    """A spec function for Megatron's model builder, with other options than the defaults.

    Args:
        options: all options at once, or
        overrides: single fields of :class:`LightningOptions`, on top of ``options``.

    Returns:
        ``spec(config, vp_stage=None) -> TransformerBlockSubmodules``, where config is Megatron's GPTModelConfig or
        TransformerConfig. It calls ``runtime.prepare`` first.

    Example::

        my_spec = make_spec(decay="minimax", scale=1.0)  # in my_module: pretrain_gpt.py --spec my_module my_spec
    """
    options = dataclasses.replace(options or LightningOptions(), **overrides)

    def spec(config, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        transformer = getattr(config, "transformer", config)
        layout = prepare(transformer, options)
        return get_hybrid_block_spec(transformer, options, vp_stage=vp_stage, layout=layout)

    return spec


def get_lightning_layer_spec(config, options: LightningOptions | None = None, *, layout: str = "zigzag") -> ModuleSpec:
    """Spec of one TransformerLayer with lightning attention, dense MLP or MoE as the config's first layer has it."""
    options = options or LightningOptions()
    refuse(config, options, layout)
    if options.embedding_scale != 1.0:
        raise ValueError(
            f"embedding_scale={options.embedding_scale} belongs to the first layer alone, and this is a spec for any; "
            "use get_hybrid_layer_specs"
        )
    return _layer_specs(config, options, layout, [True] * config.num_layers)[0]


def get_hybrid_layer_specs(
    config, options: LightningOptions | None = None, *, layout: str = "zigzag"
) -> list[ModuleSpec]:
    """Specs of all layers of the model, over all pipeline stages: lightning or softmax, dense or MoE.

    MLPs, experts and projections are those of Megatron's own spec for ``config.transformer_impl``. For "local", this
    package's norms and softmax core take the place of Megatron's: they support sequence parallelism and long sequences.
    For "transformer_engine", norms that its fused layers cannot compute stand before its unfused ones.

    Args:
        config: Megatron's TransformerConfig.
        options: what the config does not say.
        layout: how the data loader cuts sequences over context-parallel ranks: ``"zigzag"``, which is Megatron's;
            ``"zigzag-documents"``, Megatron's with ``--sft``; or, for a loader of your own, ``"contiguous"``.

    Raises:
        ValueError: a config that lightning layers cannot honour.
    """
    options = options or LightningOptions()
    refuse(config, options, layout)
    return _layer_specs(config, options, layout, lightning_pattern(config.linear_attention_freq, config.num_layers))


def _layer_specs(config, options: LightningOptions, layout: str, pattern: list[bool]) -> list[ModuleSpec]:
    """``get_hybrid_layer_specs`` for a pattern: True for a lightning layer."""
    softmax_specs, lightning_specs = (_megatron_specs(config, lightning) for lightning in (False, True))
    experts = expert_pattern(config.moe_layer_freq, config.num_layers, config.num_moe_experts)
    specs: list[ModuleSpec] = []
    for lightning, dense, *both in zip(pattern, map(not_, experts), softmax_specs, lightning_specs, strict=True):
        spec = _layer_spec(config, options, layout, both[lightning], lightning, dense, first=not specs)
        if options.recompute_chunk and spec.module is TransformerLayer:
            params = {**spec.params, "recompute_chunk": options.recompute_chunk}
            spec = dataclasses.replace(spec, module=ChunkedLayer, params=params)
        specs.append(spec)
    return specs


def _layer_spec(
    config, options: LightningOptions, layout: str, base: ModuleSpec, lightning: bool, dense: bool, first: bool = False
) -> ModuleSpec:
    """A layer with our parts in place of those of ``base``, Megatron's spec of it."""
    local, latent = config.transformer_impl == "local", config.multi_latent_attention
    layer, projections = dataclasses.replace(base.submodules), base.submodules.self_attention.submodules
    layer.sharded_state_dict_keys_map = {} if local else dict(layer.sharded_state_dict_keys_map)
    before_qkv = lightning or not latent
    # TransformerEngine's layers fuse their norms with what follows, and keep them where these are its own.
    norm, mlp_norm = layer_norm_spec(config, options, first=first), layer_norm_spec(config, options)
    if local or isinstance(norm, ModuleSpec):
        layer.input_layernorm = norm
        layer.sharded_state_dict_keys_map |= _norm_keys(before_qkv, False)
        if not local and before_qkv:
            projections = dataclasses.replace(projections, linear_qkv=_unfused())
    if local or isinstance(mlp_norm, ModuleSpec):
        layer.pre_mlp_layernorm = mlp_norm
        layer.sharded_state_dict_keys_map |= _norm_keys(False, dense)
        if not local and dense:
            mlp = dataclasses.replace(layer.mlp.keywords["submodules"], linear_fc1=_unfused())
            layer.mlp = functools.partial(layer.mlp, submodules=mlp)
    _set_residuals(layer, options, lightning)
    if options.bilinear_glu:
        layer.mlp = functools.partial(BilinearMLP.as_mlp_submodule, **layer.mlp.keywords)
    else:
        layer.mlp = fused(layer.mlp, config, options.backend)
    if lightning:
        layer.self_attention = ModuleSpec(
            module=LightningAttention,
            params={"options": options, "layout": layout},
            submodules=LightningAttentionSubmodules(projections.linear_qkv, projections.linear_proj),
        )
    else:
        module, params = layer.self_attention.module, dict(layer.self_attention.params)
        if local:
            core = ModuleSpec(module=SDPACoreAttention, params={"per_document": layout == "zigzag-documents"})
            projections = dataclasses.replace(projections, core_attention=core)
        if config.qk_layernorm and not config.qk_l2_norm and (local or latent):
            names = ("q_layernorm", "kv_layernorm" if latent else "k_layernorm")
            projections = dataclasses.replace(projections, **dict.fromkeys(names, head_norm_spec(config, options)))
            if not local:  # else it would be fused, under another name in checkpoints
                up = dict.fromkeys(("linear_q_up_proj", "linear_kv_up_proj"), _unfused())
                projections = dataclasses.replace(projections, **up)
        if latent and local:
            module, params = LatentAttention, params | {"layout": layout, "backend": options.backend}
        elif module is MLASelfAttention:
            module = TELatentAttention
        elif module is SelfAttention:
            module, params["before_dynamic"] = DynamicSelfAttention, _patch_rope
        layer.self_attention = ModuleSpec(module=module, params=params, submodules=projections)
    return dataclasses.replace(base, submodules=layer)


def _patch_rope() -> None:
    from .patches import packed_rope

    packed_rope.apply()


def _unfused() -> type:
    """TransformerEngine's layer without a norm in the place of one that begins with a norm."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    return TEColumnParallelLinear


def _norm_keys(before_qkv: bool, dense: bool) -> dict[str, str]:
    """Names of the norms in checkpoints: those of TransformerEngine's layers, which fuse them with what follows.

    Megatron's local specs have others beside experts and multi-latent attention, so that a checkpoint would resume with
    one implementation only.
    """
    names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"} if before_qkv else {}
    return names | ({"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"} if dense else {})


def _set_residuals(layer, options: LightningOptions, lightning: bool) -> None:
    """Factors of the residual connections, where they are not 1."""
    kind = "attn" if lightning else "softmax"
    for connection, part in (("self_attn_bda", kind), ("mlp_bda", "mlp")):
        factors = getattr(options, f"{part}_alpha"), getattr(options, f"{part}_beta")
        if factors != (1.0, 1.0):
            setattr(layer, connection, scaled_residual(*factors))


def _megatron_specs(config, lightning: bool) -> list[ModuleSpec]:
    """Megatron's softmax layers, or those that lightning ones are made from."""
    if lightning and config.multi_latent_attention:  # whose layers have other projections
        config = copy.copy(config)
        config.multi_latent_attention = False
    return get_gpt_decoder_layer_specs(
        config, config.transformer_impl == "transformer_engine", config.normalization, config.qk_l2_norm
    )


@dataclasses.dataclass
class HybridBlockSubmodules(TransformerBlockSubmodules):
    """Layers of a stage, and how its multi-token prediction layers are made: ``mtp_block_spec(vp_stage=None)``."""

    mtp_block_spec: Callable | None = None


def get_hybrid_block_spec(
    config,
    options: LightningOptions | None = None,
    *,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    layout: str = "zigzag",
) -> TransformerBlockSubmodules:
    """The layers of one (virtual) pipeline stage, lightning or softmax by ``config.linear_attention_freq``.

    Args:
        config: Megatron's TransformerConfig. linear_attention_freq None: all lightning; N: every N-th layer is softmax;
            or a list with 1 (lightning) or 0 (softmax) for every layer of the model.
        options: what the config does not say.
        vp_stage, pp_rank: which stage; the pipeline rank defaults to this process's.
        layout: see ``get_hybrid_layer_specs``.

    Raises:
        ValueError: a config that lightning layers cannot honour, or a stage without layers.
    """
    options = options or LightningOptions()
    specs = get_hybrid_layer_specs(config, options, layout=layout)
    local = _layers_of_stage(config, vp_stage, pp_rank)
    if not local and config.pipeline_model_parallel_layout is None:
        raise ValueError(
            f"pipeline stage (pp_rank={pp_rank}, vp_stage={vp_stage}) gets none of the {config.num_layers} layers; use "
            "fewer stages, or say with --pipeline-model-parallel-layout which stages hold only embedding or loss"
        )
    norm = layer_norm_spec(config, options, final=True)
    mtp = functools.partial(get_mtp_block_spec, config, options, layout=layout)
    return HybridBlockSubmodules(layer_specs=[specs[i] for i in local], layer_norm=norm, mtp_block_spec=mtp)


def get_mtp_block_spec(
    config,
    options: LightningOptions | None = None,
    *,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    layout: str = "zigzag",
) -> MultiTokenPredictionBlockSubmodules | None:
    """The multi-token prediction layers (``--mtp-num-layers``) of one (virtual) pipeline stage, for GPTModel.

    Layer k (DeepSeek-V3, arXiv 2412.19437, section 2.2) joins the states before it with the embeddings of the tokens k
    places ahead, h' = W [norm(e), norm(h)], and is then like the softmax or the lightning layers of the model, by
    ``options.mtp_attention``, with the MLP or experts of its last layer, and its decay. Megatron's own spec of it knows
    neither this package's parts nor options. In Megatron's training loop it is found by itself (patches/mtp_spec.py).

    Args:
        config, options, vp_stage, pp_rank, layout: as of ``get_hybrid_block_spec``.

    Returns:
        None where the stage has none of these layers.

    Raises:
        ValueError: a config that cannot be honoured.

    Example::

        block = get_hybrid_block_spec(config, options)
        model = GPTModel(config, block, ..., mtp_block_spec=get_mtp_block_spec(config, options))
    """
    options = options or LightningOptions()
    refuse(config, options, layout)
    dense = not expert_pattern(config.moe_layer_freq, config.num_layers, config.num_moe_experts)[-1]
    lightning = any(mtp_pattern(config.mtp_num_layers, options))
    # Not in chunks (ChunkedLayer): the norm behind it is recomputed with it, and needs its values.
    layer = _layer_spec(config, options, layout, _megatron_specs(config, lightning)[-1], lightning, dense)
    if lightning:
        layer.submodules.self_attention.params |= {
            "depth": (config.num_layers - 1, config.num_layers), "attn_mask_type": AttnMaskType.causal,
        }  # fmt: skip
    use_te = config.transformer_impl == "transformer_engine"
    block = get_gpt_mtp_block_spec(config, layer, use_te, vp_stage=vp_stage, pp_rank=pp_rank)
    if block is not None:
        norms = prediction_norms(config, options)
        block.layer_specs = [
            dataclasses.replace(spec, submodules=dataclasses.replace(spec.submodules, **norms))
            for spec in block.layer_specs
        ]
    return block


def _layers_of_stage(config, vp_stage: int | None, pp_rank: int | None) -> list[int]:
    """Numbers of the layers of one (virtual) pipeline stage, from 0."""
    stages = config.pipeline_model_parallel_layout
    if stages is not None:
        return list(stages.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank))
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return list(range(offset, offset + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)))


class LightningDispatchLayer(BaseTransformerLayer):
    """Builds the TransformerLayer, lightning or softmax, that belongs at a global layer number.

    For places that take one ModuleSpec for all layers and never call it (``lightning_layer_spec``).
    """

    def __new__(cls, config, layer_number: int = 1, options: LightningOptions | None = None, **arguments):
        _refuse_ranks_without_layers(config)
        index = layer_number - 1
        if arguments.get("add_layer_offset", True) and not arguments.get("is_mtp_layer", False):
            groups = arguments.get("pg_collection")
            pp_rank = groups.pp.rank() if groups is not None else None
            index += get_transformer_layer_offset(config, arguments.get("vp_stage"), pp_rank)
        layout = prepare(config, options)
        if config.mtp_num_layers:
            raise ValueError(
                f"--mtp-num-layers {config.mtp_num_layers}: lightning_layer_spec cannot say what Megatron builds its "
                "multi-token prediction layers of; use lightning_spec, or leave it out"
            )
        if options is not None and not options.layernorm_affine:
            raise ValueError(
                "layernorm_affine=False holds for the final norm, too, which Megatron builds with a weight here; use "
                "make_spec(layernorm_affine=False)"
            )
        spec = get_hybrid_layer_specs(config, options, layout=layout)[index]
        return build_module(spec, config=config, layer_number=layer_number, **arguments)


def _refuse_ranks_without_layers(config) -> None:
    """Only layers ask for ``prepare`` here: a rank without them would have no map, no record and no patches."""
    count = config.virtual_pipeline_model_parallel_size or 1
    stages = range(count) if count > 1 else (None,)
    for rank in range(config.pipeline_model_parallel_size):
        if not any(_layers_of_stage(config, stage, rank) for stage in stages):
            raise ValueError(
                f"lightning_layer_spec needs a layer on every pipeline rank, but pipeline rank {rank} has no layer "
                "(--pipeline-model-parallel-layout, or embedding and loss counted as layers); use lightning_spec"
            )


lightning_spec = make_spec()
lightning_layer_spec = ModuleSpec(module=LightningDispatchLayer)
