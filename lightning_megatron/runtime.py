"""What happens once per model on every rank, before it is built: refusals, patches, announcement.

Builders of specs (spec.py) are pure; everything that acts on the process is here, and only on call.
"""

from __future__ import annotations

import logging
import sys
from argparse import Namespace

import torch
from megatron.core.utils import log_single_rank, nvtx_range_pop, nvtx_range_push

from .config import (
    LightningOptions,
    LightningShape,
    check_latent_sizes,
    facts,
    lightning_depths,
    lightning_pattern,
    mark_prepared,
    mtp_pattern,
    prepared_with,
    resolve_shape,
)
from .decay import log_decay
from .flags import messages_of_refusal, refuse_parts, warnings_of
from .logs import restore_settings
from .ops.backend import by_triton
from .ops.checks import HEAD_DIM_STEP, MAX_HEAD_DIM, MIN_HEAD_DIM
from .parallel import LAYOUTS, mark_by
from .peak import peak_tflops
from .record import ATTRIBUTE, function_record
from .router_log import make_room
from .softmax.core import refuse_unsupported
from .summary import layer_map

logger = logging.getLogger("lightning_megatron")


def prepare(config, options: LightningOptions | None = None, *, layout: str | None = None) -> str:
    """Check what was asked for, patch what no spec can reach, and print which layers are lightning.

    Call it on every rank before the model is built. ``--spec lightning_megatron.spec`` and
    ``lightning_megatron.pretrain`` do; a program of your own calls it with the config of its model. A second
    call with the same arguments, and a config that has not changed, does nothing.

    Args:
        config: Megatron's TransformerConfig.
        options: what the config does not say.
        layout: how the data loader cuts sequences over context-parallel ranks (``spec.get_hybrid_layer_specs``). Where
            Megatron's training loop runs, its flags say so: leave it out.

    Returns:
        The layout, for the builders of specs.

    Raises:
        ValueError: a config, an option or a flag that lightning layers cannot honour.

    Example::

        options = LightningOptions(decay="minimax", scale=1.0)
        layout = prepare(config, options)
        model = GPTModel(config, get_hybrid_block_spec(config, options, layout=layout), ...)
    """
    options, args = options or LightningOptions(), training_args()
    restore_settings(getattr(args, "logging_level", None))
    loaded = loader_layout(args)
    if args is not None and layout not in (None, loaded):
        raise ValueError(
            f"layout={layout!r}, but Megatron's data loader cuts sequences as {loaded!r}: leave layout out"
        )
    layout = layout or loaded
    if options.lrpe_layers:  # layers differ, and checkpoints keep each under its own name
        config.hetereogenous_dist_checkpoint = True
    given = options, layout, facts(config)  # a copy of a prepared config, changed since, has the mark too
    if prepared_with(config) == given:
        return layout
    refuse(config, options, layout, args)
    for name, default in (("log_norms", False), ("peak_tflops", None), ("checksums", True)):
        if args is None and getattr(options, name) != default:
            raise ValueError(
                f"{name}={getattr(options, name)} is for Megatron's training loop, and none is running; leave it out"
            )
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if first and getattr(args, "rank", 0) == 0:
        for line in warnings_of(config, options, layout, args):
            logger.warning("%s", line)
    if args is not None:
        setattr(args, ATTRIBUTE, function_record(config, options, args))  # Megatron saves it with its args
    apply_patches(config, options, layout, args)
    if args is not None and config.num_moe_experts and getattr(args, "hybrid_layer_pattern", None) is None:
        make_room(config)  # HybridModel does it once it knows how many layers Megatron counts
    mark_by(nvtx_range_push, nvtx_range_pop)  # which do nothing until --profile --nvtx-ranges begins
    if first:
        print(layer_map(config, options), flush=True)
    mark_prepared(config, given)
    return layout


def training_args() -> Namespace | None:
    """Megatron's parsed flags, or None outside of its training loop."""
    return getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)


def loader_layout(args: Namespace | None) -> str:
    """How Megatron's data loader cuts sequences over context-parallel ranks: a fact of the loader, not an option."""
    return "zigzag-documents" if getattr(args, "sft", False) else "zigzag"


def refuse(config, options: LightningOptions, layout: str, args: Namespace | None = None) -> None:
    """Refuse what cannot be honoured, before anything is built or patched.

    Args:
        args: Megatron's flags, or None outside of its training loop.

    Raises:
        ValueError: naming what was given, and the remedy.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    shape = resolve_shape(config, options, config.tensor_model_parallel_size)
    pattern = lightning_pattern(config.linear_attention_freq, config.num_layers)
    ahead = mtp_pattern(config.mtp_num_layers, options)
    if any(pattern + ahead):
        _refuse_head_dims(shape)
    refuse_parts(config)
    if config.multi_latent_attention:
        check_latent_sizes(config)
    if args is not None:
        refuse_parts(args)
    for depth in lightning_depths(pattern, ahead[:1]):
        log_decay(options.decay, shape.num_heads, depth, config.num_layers, offset=options.decay_offset)
    if config.context_parallel_size > 1 and not all(pattern + ahead):
        if layout == "contiguous":
            raise ValueError(
                "layout='contiguous' has no softmax attention, and this model has softmax layers; use layout='zigzag', "
                "or leave --linear-attention-freq out; with --mtp-num-layers add --lightning-mtp-attention lightning"
            )
    if options.rotary_percent is not None and not config.multi_latent_attention:
        raise ValueError(
            f"--lightning-rotary-percent {options.rotary_percent} needs --multi-latent-attention; in other models all "
            "layers have the same angles: use --rotary-percent"
        )
    for message in messages_of_refusal(config, options, layout, args):
        raise ValueError(message)
    if config.transformer_impl == "local":
        for layers in (pattern, ahead):  # which count by themselves
            for number, lightning in enumerate(layers, start=1):
                if not lightning:
                    refuse_unsupported(config, number)


def _refuse_head_dims(shape: LightningShape) -> None:
    for flags, dim in (
        ("--lightning-key-head-dim (default: --kv-channels)", shape.key_dim),
        ("--lightning-value-head-dim (default: that of keys)", shape.value_dim),
    ):
        if not MIN_HEAD_DIM <= dim <= MAX_HEAD_DIM or dim % HEAD_DIM_STEP:
            raise ValueError(
                f"{flags} is {dim}, and the operator takes multiples of {HEAD_DIM_STEP} from {MIN_HEAD_DIM} to "
                f"{MAX_HEAD_DIM}; choose one of them"
            )


def _peak(config, options: LightningOptions) -> float | None:
    """The peak that MFU is a share of, with a line in the log that says which, or that there is none."""
    known = (config.bf16 or config.fp16) and torch.cuda.is_available()
    card = torch.cuda.get_device_name() if known else ""
    peak, of = options.peak_tflops or peak_tflops(card), "--lightning-peak-tflops"
    if options.peak_tflops is None:
        of = f"dense bf16 of {card}"
    if peak is not None:
        log_single_rank(logger, logging.INFO, f"lightning: MFU is the share of {peak:g} TFLOP/s ({of})")
        return peak
    why = f"the peak of {card!r} is not known here" if known else "only the peaks of GPUs in bf16 and fp16 are known"
    log_single_rank(
        logger, logging.WARNING, f"lightning: --log-throughput shows no MFU: {why}; give --lightning-peak-tflops"
    )
    return None


def apply_patches(config, options: LightningOptions, layout: str, args: Namespace | None) -> None:
    """The patches that this model needs, however it was started; ``patches.apply_all`` has the entry point's own."""
    from .patches import (
        bucket_padding,
        checkpoint_args,
        dynamic_inference,
        flops,
        layer_log,
        mfu,
        mtp_spec,
        mtp_without_te,
        packed_roll,
        packed_rope,
        recompute,
    )

    mtp, ahead = bool(config.mtp_num_layers), mtp_pattern(config.mtp_num_layers, options)
    softmax = not all(lightning_pattern(config.linear_attention_freq, config.num_layers) + ahead)
    packed = args is None or getattr(args, "sft", False) or getattr(args, "dataloader_inter_document_masking", False)
    over_ranks = config.context_parallel_size > 1
    if mtp:
        mtp_without_te.apply()
    if mtp and packed:
        packed_roll.apply(layout if over_ranks else None)
    kernel = by_triton(options.backend) and not config.apply_rope_fusion
    across = over_ranks and packed and layout == "zigzag"
    if softmax and (kernel or across):
        packed_rope.apply(across=across)
    if mtp and (args is not None or "megatron.training.models.gpt" in sys.modules):
        mtp_spec.apply()  # else the program gives GPTModel spec.get_mtp_block_spec(...)
    if config.recompute_granularity == "full":
        recompute.apply(
            keep_states=options.recompute_chunk is not None
            or (config.context_parallel_size > 1 and options.cp_keep_states),
            offload=options.offload_activations,
            quantized=bool(config.fp8 or config.fp4),
        )
    if getattr(args, "log_throughput", False):
        peak = _peak(config, options)
        if peak is not None:
            mfu.apply(peak)
    if options.log_norms:
        layer_log.apply()
    if args is not None:
        dynamic_inference.apply()  # else inference.engine does, or the program
        checkpoint_args.apply()
        if getattr(args, "use_distributed_optimizer", False):  # a checkpoint may have another format than is saved
            bucket_padding.apply()
        flops.apply(options)  # else Megatron's TFLOP/s count lightning layers as softmax
