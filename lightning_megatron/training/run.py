"""The run: configuration from the command line, the forward step, and Megatron's training loop."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_model_config,
    log_single_rank,
)
from megatron.training import get_args, get_timers, get_tokenizer, inprocess_restart, pretrain, set_startup_timestamps
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args, parse_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.config import PretrainConfigContainer
from megatron.training.training import update_seqlen_stats_from_cu_seqlens

from .. import hybrid_model, patches
from ..checkpoint_folder import check_folder
from ..config import LightningOptions
from ..hybrid_model import add_letter, checked, make_stack_spec
from ..logs import restore_settings
from ..models.hybrid import STAGES, pattern_of
from ..norm import norm_name
from ..patches import expert_padding, mtp_padding
from ..resume.function import check_model
from ..runtime import loader_layout
from ..runtime import refuse as refuse_model
from ..spec import make_spec
from . import sft, sources
from .arguments import (
    add_arguments,
    args_defaults,
    defaults_from_checkpoint,
    notes,
    options_from_args,
    parts_in_use,
    refuse_dropped,
    tokenizer_defaults,
)
from .data import (
    datasets_provider,
    get_batch,
    names_padding,
    packed_seq_params,
    padding_of_stage,
    tokens_per_sample,
)
from .loss import chunked_loss, loss_func, output_processed
from .models import defaults_of_model, table
from .refusals import (
    refuse,
    refuse_missing_tokenizer,
    refuse_small_vocabulary,
    refuse_too_many_samples,
    refuse_unwritable,
)
from .released import LIST
from .values import megatron_refuses, options_as_flags, refuse_contradictions, refuse_values
from .watch import Watch, shared_store

logger = logging.getLogger("lightning_megatron")
stimer = StragglerDetector()
_steps = [0]  # microbatches that this process computed, for the watch


def configure() -> tuple[PretrainConfigContainer, LightningOptions]:
    """Everything that the command line decides, checked, before any process talks to another.

    Raises:
        ValueError, AssertionError: the command line asks for something that cannot work.
    """
    raw, add, brought = parse_args(add_arguments), add_arguments, {}
    restore_settings(raw.logging_level)
    if raw.hybrid_layer_pattern is not None:
        add_letter()  # Megatron reads the pattern while it validates
    if raw.released_model == LIST:
        print(table())
        raise SystemExit
    if raw.released_model is not None:
        if raw.use_checkpoint_args:
            raise ValueError(
                f"--lightning-model {raw.released_model} and --use-checkpoint-args both choose the model: leave out one"
            )
        defaults, line = defaults_of_model(raw.released_model)
        log_single_rank(logger, logging.INFO, "lightning: %s", line)
        add = partial(add_arguments, checkpoint=defaults)
        raw = parse_args(add)
    refuse(raw)  # first, because Megatron opens files and builds the tokenizer while it validates
    refuse_values(raw)
    check_folder(raw)
    for line in notes(raw):
        log_single_rank(logger, logging.WARNING, "%s", line)
    if raw.use_checkpoint_args:
        brought, complete = from_checkpoint(raw)
        if "hybrid_layer_pattern" in brought and raw.hybrid_layer_pattern is None:
            complete.hybrid_layer_pattern = brought["hybrid_layer_pattern"]
        if brought.get("hybrid_layer_pattern") is not None:
            add_letter()
        refuse_contradictions(complete)
        # Megatron would put the checkpoint's tokenizer in the place of one that is given; as a default it does not.
        tokenizer = tokenizer_defaults(raw, brought)
        add = partial(add_arguments, checkpoint=brought | tokenizer)
        raw = parse_args(add)
        refuse_values(raw)
        refuse_missing_tokenizer(raw)
    with options_as_flags():
        options = options_from_args(raw)
    with megatron_refuses(raw):
        args = parse_and_validate_args(extra_args_provider=add, args_defaults=args_defaults(raw))
    refuse_dropped(raw, args, brought)
    args.spec = None  # --use-checkpoint-args brings the one that pretrain_gpt.py --spec saved
    refuse(args)
    refuse_small_vocabulary(args, get_tokenizer().vocab_size)
    sft.check(args, get_tokenizer())
    with megatron_refuses(raw):
        config = core_transformer_config_from_args(args)
    model: Any
    if args.hybrid_layer_pattern is not None:
        with options_as_flags():
            refuse_model(checked(config, options, args.hybrid_layer_pattern), options, loader_layout(args), args)
        with megatron_refuses(raw):
            model = hybrid_config_from_args(args, config=config)
        model.hybrid_stack_spec = make_stack_spec(options)
    else:
        with options_as_flags():
            refuse_model(config, options, loader_layout(args), args)
        with megatron_refuses(raw):
            model = gpt_config_from_args(args, config=config)
        model.transformer_layer_spec = make_spec(options)
    refuse_too_many_samples(args)
    sources.refuse_broken(args)
    refuse_unwritable(args)
    log_single_rank(logger, logging.INFO, parts_in_use(args, norm_name(config, options)))
    return pretrain_cfg_container_from_args(args, model), options


def apply_patches(options: LightningOptions) -> None:
    """The patches that the model of ``configure()`` needs, before it is built."""
    patches.apply_all(options)
    if get_args().hybrid_layer_pattern is not None:
        hybrid_model.apply()


def from_checkpoint(raw: Namespace) -> tuple[dict[str, Any], Namespace]:
    """Of the checkpoint that ``--use-checkpoint-args`` reads: its defaults, empty if there is none,
    and Megatron's flags as it completes them.
    """
    complete, defaults = copy.copy(raw), {}
    for name in ("pretrained_checkpoint", "load"):  # Megatron says the same when it reads them itself, in this order
        with contextlib.redirect_stdout(io.StringIO()):
            found = load_args_from_checkpoint(complete, name)
        if isinstance(found, tuple):
            if raw.hybrid_layer_pattern is not None:  # of a GPTModel it would contradict flags that nobody gave
                check_model(found[1], getattr(raw, name), raw)
            defaults |= defaults_from_checkpoint(found[1]) | _stages(raw, found[1])
    if not defaults:
        return {}, complete
    log_single_rank(
        logger,
        logging.INFO,
        "lightning: --use-checkpoint-args: unless given as flags, from the checkpoint: "
        + ", ".join(f"{name} {value}" for name, value in defaults.items() if getattr(raw, name, None) != value),
    )
    return defaults, complete


def _stages(raw: Namespace, saved: Namespace) -> dict[str, Any]:
    """The checkpoint's pattern of a HybridModel without its ``|``, where this run has other pipeline stages."""
    pattern, ranks = getattr(saved, "hybrid_layer_pattern", None) or "", raw.pipeline_model_parallel_size
    uneven = raw.decoder_first_pipeline_num_layers or raw.decoder_last_pipeline_num_layers
    stages = pattern.count(STAGES) + 1
    same = stages == ranks or ranks == getattr(saved, "pipeline_model_parallel_size", None)
    if stages == 1 or same and not uneven:
        return {}
    if raw.hybrid_layer_pattern is None:
        log_single_rank(
            logger,
            logging.INFO,
            "lightning: the %d pipeline stages of the checkpoint's --hybrid-layer-pattern %s are left out, as this run "
            "has other ones; give the flag with | between stages to choose them",
            stages,
            pattern,
        )
    return {"hybrid_layer_pattern": pattern_of(saved)}


def forward_step(
    data_iterator: Iterator[dict] | None, model: torch.nn.Module, return_schedule_plan: bool = False
) -> tuple[Any, Callable]:
    """One microbatch through this pipeline stage; what Megatron's schedules call."""
    args, timers = get_args(), get_timers()
    _steps[0] += 1
    timers("batch-generator", log_level=2).start()
    with stimer(bdata=True):
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        samples = args.micro_batch_size if model.training else args.eval_micro_batch_size
        batch = get_batch(data_iterator, get_model_config(model), vp_stage, samples)
    packed = packed_seq_params(batch, tokens_per_sample(args))
    if packed is not None and not vp_stage and model.training:
        # Feeds the FLOPs count of one training step: once per microbatch, not once per chunk or evaluation.
        update_seqlen_stats_from_cu_seqlens(batch["cu_seqlens"].squeeze(0))
    timers("batch-generator").stop()

    # --overlap-moe-expert-parallel-comm asks for the plan of the step instead of the step.
    forward = model.build_schedule_plan if return_schedule_plan else model
    others: dict[str, Any] = {}
    processed: contextlib.AbstractContextManager = contextlib.nullcontext({"labels": batch["labels"]})
    if args.loss_chunk:
        processor = partial(chunked_loss, backend=args.lightning_backend)
        processed = output_processed(model, processor, batch["labels"], args.loss_chunk)
    if batch["padding_mask"] is not None:
        first = get_attr_wrapped_model(model, "pre_process")
        others["padding_mask"] = padding_of_stage(batch["padding_mask"], args, first)
    with stimer, processed as arguments:
        output = forward(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            loss_mask=batch["loss_mask"],
            packed_seq_params=packed,
            **arguments,
            **others,
        )
    return output, partial(loss_func, batch["loss_mask"])


def embedding_ranks(config: TransformerConfig, tied: bool, pp_ranks: list[int]) -> list[int]:
    """Ranks of a pipeline group with a word embedding: the first, the last if tied to it, those with MTP layers."""
    ranks = {pp_ranks[0]}
    if len(pp_ranks) > 1:
        ranks |= {pp_ranks[-1]} if tied else set()
        ranks |= set(get_mtp_ranks(pp_ranks, config))
    return sorted(ranks)


def run(container: PretrainConfigContainer, program_start: float, main_entry: float) -> None:
    """Train, once everything is decided and patched. The two times are for Megatron's start-up report."""
    set_startup_timestamps(program_start=program_start, main_entry=main_entry)
    train, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    config = container.model.transformer
    provider = partial(datasets_provider, config)
    provider.is_distributed = True  # every rank calls it, and each decides what it reads
    tied = container.model.share_embeddings_and_output_weights
    args = get_args()
    if names_padding(config, args):
        expert_padding.apply()
        if config.mtp_num_layers:
            mtp_padding.apply()
    watch = Watch(args.rank, args.world_size, 60.0 * args.distributed_timeout_minutes, lambda: _steps[0], shared_store)
    if args.world_size > 1:
        watch.start()
    try:
        train(
            container,
            provider,
            ModelType.encoder_or_decoder,
            forward_step,
            store=store,
            get_embedding_ranks=partial(embedding_ranks, config, tied),
        )
    finally:
        watch.stop()
