"""The folder of a checkpoint: whether there is one, whether its files are whole, and whether these ranks can read them.

``lightning_megatron.pretrain`` calls ``check_folder`` before anything else; ``patches.checkpoint_args`` calls
``refuse_broken`` and ``gave_up`` in both ways of starting.
"""

from __future__ import annotations

import itertools
import logging
import time
from argparse import Namespace
from pathlib import Path

import torch.distributed as dist

from .integrity import BrokenFile, complete_iterations, format_of, is_distributed, verify
from .record import ATTRIBUTE

logger = logging.getLogger("lightning_megatron")

TRACKER = "latest_checkpointed_iteration.txt"


class CheckpointError(ValueError):
    """A checkpoint that this run cannot go on from; the message names the remedy."""


def check_folder(args: Namespace) -> None:
    """Refuse a ``--load`` that has no checkpoint, where Megatron trains from scratch or ends with exit status 0.

    ``--load`` equal to ``--save`` may be empty: that is the first start of a run. Where it is, and
    ``--pretrained-checkpoint`` is given, that one is checked.

    Raises:
        CheckpointError: naming the folder and the remedy.
    """
    flag, load = "--load", args.load
    if args.pretrained_checkpoint is not None and not (load and ("://" in load or Path(load, TRACKER).is_file())):
        flag, load = "--pretrained-checkpoint", args.pretrained_checkpoint
    if load is None or "://" in load:  # not a file system: left to Megatron
        return
    tracker = Path(load, TRACKER)
    chosen = tracker.with_name(f"iter_{args.ckpt_step or 0:07d}")
    if args.ckpt_step and not chosen.is_dir() and not args.non_persistent_save_interval:
        there = ", ".join(sorted(path.name for path in Path(load).glob("iter_*"))) or "none"
        raise CheckpointError(
            f"--ckpt-step {args.ckpt_step}: no {chosen.name} in {flag} {load}; give one of those that are there "
            f"({there})"
        )
    if not tracker.is_file():
        if flag != "--load":
            raise CheckpointError(
                f"{flag} {load}: no {TRACKER} there; give the folder that --save of the training named"
            )
        elsewhere = (args.ckpt_step, args.non_persistent_save_interval)
        first_start = args.save is not None and Path(args.save).resolve() == Path(load).resolve()
        if any(elsewhere) or (first_start and not args.exit_on_missing_checkpoint):
            return
        raise CheckpointError(
            f"--load {load}: no {TRACKER} there, so nothing would be loaded and training would start from random "
            "values. Give the folder that --save of the training named; or leave --load out to train from scratch "
            "(where it equals --save, a first start finds nothing)"
        )
    text = tracker.read_text("utf-8", errors="replace").strip()
    if text != "release" and not (text.isascii() and text.isdigit()):
        raise CheckpointError(_unreadable(tracker, text))
    folder = tracker.with_name("release" if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir() and not args.ckpt_step:
        raise CheckpointError(
            f"{flag} {load}: {TRACKER} names {folder.name}, which is not there; write the number of an "
            "iter_ folder that is complete into the file, or give another folder"
        )
    found = _to_load(load, args)
    if args.rank == 0 and found is not None and found.is_dir():  # checksums wait for all ranks, which share them
        _refuse_other_format(found, args)
        try:
            verify(found, contents=False, of_megatron=args.ckpt_format == "torch_dist")
        except BrokenFile as error:
            raise _broken(error, found) from error


def _to_load(load_dir: str | None, args: Namespace) -> Path | None:
    """The iteration that Megatron will load; None where there is none, or not in a file system.

    A checkpoint of ``--non-persistent-ckpt-type global`` goes before one that is not newer. Those of ``local`` are in
    files of nvidia-resiliency-ext, and are not looked at.
    """
    if not load_dir or "://" in load_dir:
        return None
    tracker, text = Path(load_dir, TRACKER), str(args.ckpt_step or "")
    if not text and tracker.is_file():
        text = tracker.read_text("utf-8", errors="replace").strip()
    iteration = int(text) if text.isdigit() else 0
    if getattr(args, "non_persistent_ckpt_type", None) == "global":
        elsewhere = args.non_persistent_global_ckpt_dir or str(tracker.with_name("non_persistent"))
        short = Path(elsewhere, TRACKER)
        newest = short.read_text("utf-8", errors="replace").strip() if short.is_file() else ""
        if newest.isdigit() and int(newest) >= iteration:
            return short.with_name(f"iter_{int(newest):07d}")
    return tracker.with_name("release" if text == "release" else f"iter_{iteration:07d}") if text else None


def _broken(error: BrokenFile | str, folder: Path) -> CheckpointError:
    others = ", ".join(name for name in complete_iterations(folder.parent) if name != folder.name) or "none here"
    return CheckpointError(
        f"{error}, so {folder} cannot be loaded. Take the file from a copy of the checkpoint; or go on from another "
        f"iteration: write its number into {folder.parent / TRACKER} (complete: {others})"
    )


def refuse_broken(load_dir: str | None, args: Namespace) -> None:
    """Refuse a checkpoint with a file that is missing, cut off or altered, before Megatron reads it.

    Call it on all ranks: each reads a part of the files, and all raise the same error. Without the option ``checksums``
    of this run nothing but names and sizes of the weights' files is looked at, and the log says so.

    Raises:
        CheckpointError: naming the file and the remedy.
    """
    folder = _to_load(load_dir, args)
    if folder is None or not folder.is_dir():
        return  # left to gave_up
    if not is_distributed(folder) and not args.use_mp_args_from_checkpoint_args:  # which takes the sizes from it
        _refuse_other_sizes(folder, args)
    _refuse_other_format(folder, args)
    together, start = dist.is_initialized(), time.monotonic()
    rank, world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    checksums = getattr(args, ATTRIBUTE, {"options": {}})["options"].get("checksums", True)
    found: str | None = None
    try:
        verify(folder, rank, world, contents=together and checksums, of_megatron=args.ckpt_format == "torch_dist")
    except BrokenFile as error:
        found = str(error)
    everywhere: list[str | None] = [found]
    if together:
        everywhere = [None] * world
        dist.all_gather_object(everywhere, found)
    for text in filter(None, everywhere):
        raise _broken(text, folder)
    if not checksums:
        return log(
            f"{folder}: all files are there and long enough; their checksums are not compared "
            "(--no-lightning-checksums), so that altered bytes would not be seen"
        )
    log(f"{folder}: all files are whole (checked in {time.monotonic() - start:.1f} s)", logging.INFO)


def log(message: str, level: int = logging.WARNING) -> None:
    """On the first rank alone."""
    from megatron.core.utils import log_single_rank

    log_single_rank(logger, level, message)


def _refuse_other_format(folder: Path, args: Namespace) -> None:
    """Megatron ends in a KeyError, with --auto-detect-ckpt-format, too, or misses a file that this format has not."""
    saved, now = format_of(folder), args.ckpt_format
    if saved == now or (saved, now) == ("torch", "torch_dist"):
        return
    remedy = "leave the flag out (torch_dist is the default, and also loads what was saved with torch)"
    if now == "fsdp_dtensor":
        remedy = "leave the flag and --use-megatron-fsdp out"
    if saved == "fsdp_dtensor":
        remedy = "give --use-megatron-fsdp --ckpt-format fsdp_dtensor"
    if saved == "torch_dcp":
        remedy = "Megatron 0.19 loads it in no run; train again, and save without --ckpt-format torch_dcp"
    raise CheckpointError(
        f"{folder} was saved with --ckpt-format {saved}, which a run with --ckpt-format {now} does not load: {remedy}"
    )


def _refuse_other_sizes(folder: Path, args: Namespace) -> None:
    """Of ``--ckpt-format torch``, which has a folder for each rank of the model, named by its places in it."""
    found = {path.parent.name for path in folder.glob("mp_rank_*/*.pt")}
    sizes = args.pipeline_model_parallel_size, args.expert_model_parallel_size
    places = itertools.product(*(range(size) for size in sizes if size > 1))
    ends = ["".join(f"_{n:03d}" for n in place) for place in places]
    wanted = {f"mp_rank_{t:02d}{end}" for t in range(args.tensor_model_parallel_size) for end in ends}
    if found in (set(), wanted):
        return
    counts = [len(set(numbers)) for numbers in zip(*(name.split("_")[2:] for name in found), strict=False)]
    flags = ["--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--expert-model-parallel-size"]
    if len(counts) == 2:  # one more than 1, and names do not say which
        flags[1:] = [" or ".join(flags[1:])]
    given = " ".join(f"{flag} {count}" for flag, count in zip(flags, counts, strict=False))
    raise CheckpointError(
        f"{folder} was saved with --ckpt-format torch, which loads with the sizes that saved it alone, and this run "
        f"has others: {_some(found)} are there, {_some(wanted)} would be read. Give {given}; to go on with other sizes "
        "load it with these, save it once without --ckpt-format torch, and load what was saved"
    )


def _some(names: set[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join([*first, f"... ({len(names)} in all)"] if len(names) > len(first) else first)


def _unreadable(tracker: Path, text: str) -> str:
    return (
        f"{tracker} says {text[:40]!r}, where the number of an iteration (or release) should be. Write the number "
        "of the last complete iter_ folder into it "  # --ckpt-step does not help: Megatron reads the file all the same
        f"(complete: {', '.join(complete_iterations(tracker.parent)) or 'none here'})"
    )


def gave_up(load_dir: str | None, args: Namespace) -> CheckpointError | None:
    """Why Megatron called ``sys.exit()`` without a status while looking for a checkpoint; None: the user wanted it."""
    tracker = Path(load_dir or "", TRACKER)
    if load_dir and tracker.is_file():
        text = tracker.read_text("utf-8", errors="replace").strip()
        if text != "release" and not text.isdigit():
            return CheckpointError(_unreadable(tracker, text))
        return CheckpointError(f"the checkpoint in {load_dir} cannot be read; the log above says why")
    return None if args.exit_on_missing_checkpoint else CheckpointError(f"Megatron found nothing to load in {load_dir}")
