"""Which samples come next, and how many are left; what else decides how weights change, and no function."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from ..checkpoint_folder import CheckpointError, log
from ..config import flag_of
from .shown import others

# What decides which tokens see each other and count, and may change on purpose: named in the log.
_DATA = (
    "dataloader_inter_document_masking", "sft", "reset_position_ids", "eod_mask_loss", "lightning_sft_answers_only",
    "sft_tokenizer_prompt_format", "tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "tiktoken_pattern",
    "null_tokenizer_eod_id",
)  # fmt: skip
# What decides which samples come in which order.
_SAMPLES = (
    "seed", "data_path", "train_data_path", "data_args_path", "per_split_data_args_path", "split", "mock_data",
    "seq_length", "dataloader_type",
)  # fmt: skip
_SAMPLES_OF_CYCLIC = ("micro_batch_size", "data_parallel_size", "data_sharding")  # and how many they are, in its case
# What else decides how weights change, and no function.
_TRAINING = (
    "clip_grad", "hidden_dropout", "attention_dropout", "moe_router_load_balancing_type", "moe_aux_loss_coeff",
    "moe_z_loss_coeff", "moe_router_bias_update_rate", "moe_input_jitter_eps", "mtp_loss_scaling_factor",
    "mtp_detach_heads", "calculate_per_token_loss", "apply_wd_to_qk_layernorm",
    "muon_nesterov", "muon_scale_mode", "muon_coefficient_type", "muon_num_ns_steps", "muon_tp_mode",
    "muon_extra_scale_factor", "muon_split_qkv",
)  # fmt: skip


def check_asserted(saved: Any, load_dir: str, args: Namespace) -> None:
    """What else Megatron asserts (``check_checkpoint_args``, and its sampler in the first step), without a remedy."""
    by_flag = {
        "vocab_file": ("max_position_embeddings", "make_vocab_size_divisible_by", "tokenizer_type"),
        "data_parallel_random_init": ("data_parallel_random_init",),
        "phase_transition_iterations": ("global_batch_size",),
    }
    for given, names in by_flag.items():
        if not args.finetune and getattr(args, given, None) and (found := others(names, saved, args)):
            raise CheckpointError(
                f"with {flag_of(given)} Megatron goes on with the values of the checkpoint in {load_dir} alone: "
                f"{'; '.join(found)}. Give the checkpoint's; or load only its weights with --finetune"
            )
    read, ranks = getattr(saved, "consumed_train_samples", None), getattr(args, "data_parallel_size", 1)
    cyclic = getattr(args, "dataloader_type", None) == "cyclic" and not args.finetune and not args.skip_train
    if cyclic and read and read % (args.micro_batch_size * ranks):
        raise CheckpointError(
            f"--dataloader-type cyclic goes on behind {read} samples only where --micro-batch-size "
            f"{args.micro_batch_size} x {ranks} data-parallel ranks divides that number, which the checkpoint in "
            f"{load_dir} has read: give sizes that do, or --dataloader-type single"
        )


def check_parts(state: dict[str, Any], saved: Any, load_dir: str, args: Namespace) -> None:
    """What a training was told not to save; without it Megatron ends in a KeyError, or with status 0, or goes on
    without a word.
    """
    if args.finetune:
        return
    if getattr(saved, "no_save_optim", False) and "opt_param_scheduler" not in state and not args.no_load_optim:
        raise CheckpointError(
            f"the checkpoint in {load_dir} holds no state of the optimizer (--no-save-optim): to go on with a new one, "
            "whose schedule of the learning rate begins anew, too, give --no-load-optim"
        )
    if getattr(saved, "no_save_rng", False) and not args.no_load_rng:
        raise CheckpointError(
            f"the checkpoint in {load_dir} holds no states of random numbers (--no-save-rng): to go on with those of "
            "--seed, as a new training begins, give --no-load-rng"
        )


def set_last_iteration(state: dict[str, Any], saved: Any, load_dir: str, args: Namespace) -> None:
    """Where a training ends whose length is given in samples: Megatron counts iterations as if all of them, those of
    the checkpoint too, had the batch of this run.
    """
    iteration, read = state.get("iteration"), getattr(saved, "consumed_train_samples", None)
    if not iteration or args.finetune or args.skip_train or not args.train_iters:
        return
    if args.train_samples and read and getattr(args, "override_ckpt_iteration", None) is None:
        last = iteration + _iterations(args, read)
        if last != args.train_iters:
            log(
                f"the checkpoint in {load_dir} has read {read} samples in {iteration} iterations, in batches of other "
                f"sizes than this run's: it reads the others of --train-samples {args.train_samples}, and so ends at "
                f"iteration {last}, not {args.train_iters}"
            )
            args.train_iters = last
    if iteration >= args.train_iters:
        name = "train_samples" if args.train_samples else "train_iters"
        log(
            f"the checkpoint in {load_dir} is at iteration {iteration}, and {flag_of(name)} is {getattr(args, name)}: "
            "nothing is left to train"
        )


def _iterations(args: Namespace, read: int) -> int:
    """How many iterations read the samples of ``--train-samples`` behind the first ``read``."""
    if args.step_batch_size_schedule is None:
        return max(args.train_samples - read, 0) // args.global_batch_size
    from megatron.core.num_microbatches_calculator import get_current_global_batch_size, update_num_microbatches

    count = 0
    while read < args.train_samples:  # as Megatron counts them from the first; it sets the batch itself after loading
        update_num_microbatches(read, consistency_check=False)
        read, count = read + get_current_global_batch_size(), count + 1
    return count


def compare_data(saved: Any, load_dir: str, args: Namespace) -> None:
    if found := others(_DATA, saved, args):
        log(f"this run reads its data otherwise than the checkpoint in {load_dir} was trained: {'; '.join(found)}")
    if not args.finetune and (found := others(_TRAINING, saved, args)):
        log(f"this run trains otherwise than the checkpoint in {load_dir} was trained: {'; '.join(found)}")
    cyclic = all(getattr(x, "dataloader_type", None) == "cyclic" for x in (saved, args))
    if not args.finetune and (found := others(_SAMPLES + (_SAMPLES_OF_CYCLIC if cyclic else ()), saved, args)):
        log(
            f"this run goes on behind the samples that the checkpoint in {load_dir} has consumed, and they come in "
            f"another order, or are others, so that some are read twice or left out: {'; '.join(found)}"
        )
    was, now = (_all_samples(x) for x in (saved, args))
    if not args.finetune and None not in (was, now) and was != now:
        log(
            f"this run reads {now} samples in all, and the one that saved the checkpoint in {load_dir} was to read "
            f"{was} (--train-iters, --train-samples, --global-batch-size): of data that are read more than once, they "
            "come in another order, so that some are read once more or less often"
        )


def _all_samples(args: Any) -> int | None:
    """For how many Megatron shuffles the data; None if not known."""
    if samples := getattr(args, "train_samples", None):
        return samples
    iterations, batch = (getattr(args, name, None) for name in ("train_iters", "global_batch_size"))
    return iterations * batch if iterations and batch else None
