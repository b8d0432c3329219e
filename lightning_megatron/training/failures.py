"""What a user should know of an error of the training loop, beside its traceback."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.checkpoint import CheckpointException

from ..integrity import complete_iterations

ERRORS = (Exception, CheckpointException)  # the second, of torch's savers, is no Exception

_SAVING = ("save_checkpoint", "maybe_finalize_async_save")
_NO_ROOM = ("No space left on device", "Disk quota exceeded", "File too large", "unexpected pos")  # the last: torch
_PEER = ("Timed out waiting", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "timeout")

_LESS_MEMORY: tuple[tuple[Callable[[Namespace], bool], str], ...] = (  # the cheapest first, where a run lacks it
    (lambda args: args.micro_batch_size > 1, "--micro-batch-size below {micro_batch_size}"),
    (lambda args: args.data_parallel_size > 1 and not args.use_distributed_optimizer, "--use-distributed-optimizer"),
    (lambda args: not args.loss_chunk, "--lightning-loss-chunk 8192"),
    (
        lambda args: args.recompute_granularity != "full",
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    (lambda args: not args.lightning_recompute_chunk, "--lightning-recompute-chunk 32768 with full recompute"),
    (lambda args: not args.lightning_offload_activations, "--lightning-offload-activations with full recompute"),
    (lambda args: True, "more GPUs, by --tensor-model-parallel-size or --context-parallel-size"),
)


def explain(error: BaseException, args: Namespace | None) -> str | None:
    """One line on the cause and what to do; None for errors that say it themselves.

    Args:
        error: what came out of Megatron's training loop.
        args: Megatron's flags, if it came that far.
    """
    if args is None:
        return None
    text = "".join(traceback.format_exception(error))
    frames = {frame.f_code.co_name: frame for frame, _ in traceback.walk_tb(error.__traceback__)}
    if args.save and frames.keys() & set(_SAVING):
        number = frames["save_checkpoint"].f_locals.get("iteration") if "save_checkpoint" in frames else None
        return _saving(Path(args.save), text, "" if number is None else f" of iteration {number}")
    if isinstance(error, torch.OutOfMemoryError):
        return _memory(args)
    if "distributed" in text and any(words in text for words in _PEER):
        return (
            f"rank {args.rank} waited for another rank, which ended or hangs. Look in the log for the first error, and "
            "for lines on ranks that give no sign; --distributed-timeout-minutes "
            f"{args.distributed_timeout_minutes} is how long ranks wait"
        )
    return None


def _memory(args: Namespace) -> str:
    """Who holds the GPU's memory, and the options that this run does not use yet, the cheapest ones first."""
    held = ""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        own = torch.cuda.memory_reserved()
        held = f" ({own / 2**30:.1f} of {total / 2**30:.1f} GiB are this rank's"
        other = total - free - own
        held += f", {other / 2**30:.1f} other programs': see nvidia-smi)" if other > 2 * 2**30 else ")"
    less = "; ".join(words.format(**vars(args)) for unused, words in _LESS_MEMORY if unused(args))
    return f"rank {args.rank} has no GPU memory left{held}. What needs less: {less}. See docs/memory.md"


def end_data_workers() -> None:
    """End the processes that read data for this rank.

    With --exit-signal-handler they ignore SIGTERM, which is how Python ends them at its own end: it would wait for them
    forever, and all other ranks for this one.
    """
    if workers := [child for child in multiprocessing.active_children() if child.daemon]:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise that a worker was killed
        for worker in workers:
            worker.kill()


def _saving(folder: Path, text: str, which: str) -> str:
    found = next((words for words in _NO_ROOM[:-1] if words in text), None)
    try:
        free = os.statvfs(folder)
        room = free.f_bavail * free.f_frsize / 2**20
    except OSError:
        room = float("inf")
    if found or _NO_ROOM[-1] in text or room < 16:
        cause = f"{found or 'the disk is full'} ({room:.0f} MiB free in {folder})"
    else:
        cause = "the log above says what the writers met"
    return f"the checkpoint{which} was not saved: {cause}. {_last(folder)}"


def how_to_go_on(args: Namespace | None) -> str:
    """What a run that was stopped leaves behind."""
    return "nothing was saved" if args is None or not args.save else _last(Path(args.save))


def _last(folder: Path) -> str:
    whole = complete_iterations(folder)
    if not whole:
        return f"no complete checkpoint is in {folder}"
    return f"{whole[0]} in {folder} is whole: with --load {folder}, the same command goes on from it"
