"""``lightning-convert import | export | roundtrip | verify``."""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import os
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .errors import ConvertError, refuse_remote

_DESCRIPTION = (
    "Convert models between Hugging Face folders and Megatron's torch_dist checkpoints, on CPUs, in little memory."
)
_EXAMPLES = """\
examples:
  lightning-convert import Ring-mini-linear-2.0 ring-mini     # then train: --load ring-mini --use-checkpoint-args
  lightning-convert import Ring-mini-linear-2.0 ring-mini --hybrid-model    # HybridModel in the place of GPTModel
  lightning-convert export checkpoints ring-mini-tuned --like Ring-mini-linear-2.0
  lightning-convert roundtrip Ring-mini-linear-2.0            # import, export, compare bit for bit
  lightning-convert verify Ring-mini-linear-2.0 ring-mini     # tensors, and what both models compute

Only local folders are taken: `hf download ORG/NAME --local-dir FOLDER` makes one. A run that was stopped leaves
TARGET.partial, and goes on where it stopped when the same command is given again. Exit status: 0 done, 1 failed,
2 asked for wrongly."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"lightning-convert: error: {message}\n")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    top = _Parser("lightning-convert", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=raw)
    commands = top.add_subparsers(dest="command", required=True, metavar="import | export | roundtrip | verify")

    def command(name: str, text: str, more: str = "") -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}. {more}", allow_abbrev=False
        )
        made.add_argument(
            "--jobs",
            type=_positive,
            default=min(4, os.cpu_count() or 1),
            metavar="N",
            help="threads (%(default)s here)",
        )
        return made

    to_megatron = command(
        "import",
        "Hugging Face folder to Megatron checkpoint",
        "The checkpoint loads at any tensor, pipeline, expert and context parallel size. Block-scaled fp8 weights "
        "become bf16, all other tensors keep their dtype. Config and tokenizer are kept in TARGET/huggingface.",
    )
    to_megatron.add_argument("source", type=_path, metavar="SOURCE", help="folder with config.json and *.safetensors")
    to_megatron.add_argument("target", type=_path, metavar="TARGET", help="new folder, for --load of a training")
    to_megatron.add_argument("--overwrite", action="store_true", help="replace TARGET, once the new one is complete")

    to_hf = command(
        "export",
        "Megatron checkpoint to Hugging Face folder",
        "Tensors keep their dtype. The optimizer is left out.",
    )
    to_hf.add_argument("source", type=_path, metavar="SOURCE", help="folder of --save of a training, or of an import")
    to_hf.add_argument("target", type=_path, metavar="TARGET", help="new folder")
    to_hf.add_argument("--step", type=_step, metavar="N", help="iteration to export (default: the last one)")
    to_hf.add_argument(
        "--like",
        type=_path,
        metavar="FOLDER",
        help="Hugging Face folder to take tokenizer and further fields of config.json from (default: "
        "SOURCE/huggingface, which an import wrote)",
    )
    to_hf.add_argument("--overwrite", action="store_true", help="replace TARGET, once the new one is complete")

    there_and_back = command(
        "roundtrip",
        "import, export and compare every tensor bit for bit",
        "Needs space for twice the model; what it writes is removed.",
    )
    there_and_back.add_argument(
        "source", type=_path, metavar="SOURCE", help="folder with config.json and *.safetensors"
    )
    there_and_back.add_argument("--work", type=_path, metavar="FOLDER", help="where to write (default: beside SOURCE)")

    compared = command(
        "verify",
        "compare a Hugging Face folder with a Megatron checkpoint: tensors, and what both compute",
        "Every tensor is compared. Then Megatron loads the checkpoint as a training does, and the outputs of every "
        "layer, the logits and the greedy tokens are compared with those of an independent reference: transformers "
        "where it has the model, else formulas. On the CPU, in fp32; no code of a folder is executed.",
    )
    compared.add_argument("source", type=_path, metavar="HF_FOLDER", help="folder with config.json and *.safetensors")
    compared.add_argument(
        "checkpoint", type=_path, metavar="MEGATRON_CHECKPOINT", help="folder of --save of a training, or of an import"
    )
    compared.add_argument("--step", type=_step, metavar="N", help="iteration to compare (default: the last one)")
    compared.add_argument("--prompt", metavar="TEXT", help="what both read (default: a text, or random token ids)")
    compared.add_argument(
        "--tokens", type=_positive, default=64, metavar="N", help="how many tokens both write (%(default)s)"
    )
    compared.add_argument(
        "--tolerance",
        type=_above_zero,
        default=1e-5,
        metavar="X",
        help="largest difference, by the largest value of the reference (%(default)s)",
    )
    compared.add_argument("--tensors-only", action="store_true", help="run no model: for those that do not fit")
    compared.add_argument(
        "--table", type=_path, metavar="FILE", help="JSON with a row for every tensor (default: NAME.tensors.json)"
    )
    compared.add_argument("--card", type=_path, metavar="FOLDER", help="write the card FOLDER/NAME.md and NAME.json")
    compared.add_argument("--name", help="of the model, for the card (default: that of HF_FOLDER)")
    compared.add_argument(
        "--revision", help="of the model, for the card (default: the commit that hf download noted, else a digest)"
    )
    compared.add_argument("--note", metavar="TEXT", help="a sentence for the card")
    for made in (to_megatron, there_and_back):
        made.add_argument(
            "--hybrid-model",
            action="store_true",
            help="for Megatron's HybridModel (--hybrid-layer-pattern), in the place of GPTModel; export and verify see "
            "which of them a checkpoint is of",
        )
    for made in (to_megatron, there_and_back, compared):
        made.add_argument(
            "--no-prediction",
            dest="prediction",
            action="store_false",
            help="leave out layers of multi-token prediction, which only help training",
        )
    for made in (to_hf, there_and_back):
        made.add_argument(
            "--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="of a file, as 500MB (%(default)s)"
        )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; returns the exit status."""
    args = parser().parse_args(argv)
    # what is not installed and not needed, told by Megatron when it is imported
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    if args.command == "verify":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch looks for GPUs; both models run on the CPU
    for package in ("safetensors", "tqdm", "megatron.training"):
        if not _found(package):
            print(
                f"lightning-convert: error: {package} is not installed: pip install 'lightning-megatron[convert]'",
                file=sys.stderr,
            )
            return 1
    from .comparing import roundtrip

    _keep_memory()
    from .exporting import export_checkpoint  # torch takes seconds; --help and bad usage need not wait
    from .importing import import_checkpoint
    from .verifying import verify

    def say(text: str) -> None:
        print(text, flush=True)

    before = _stop_as_asked()
    try:
        if args.command == "import":
            flags = import_checkpoint(
                args.source,
                args.target,
                hybrid_model=args.hybrid_model,
                prediction=args.prediction,
                overwrite=args.overwrite,
                jobs=args.jobs,
                say=say,
            )
            load = shlex.quote(str(args.target))
            say(f"train with --load {load} --use-checkpoint-args, or with the flags:\n  {shlex.join(flags)}")
        elif args.command == "export":
            export_checkpoint(
                args.source,
                args.target,
                step=args.step,
                like=args.like,
                max_shard_bytes=args.max_shard_size,
                overwrite=args.overwrite,
                jobs=args.jobs,
                say=say,
            )
        elif args.command == "verify":
            given = {key: value for key, value in vars(args).items() if key not in ("command", "source", "checkpoint")}
            name = args.name or args.source.resolve().name
            given |= {"name": name, "table": args.table or Path(f"{name}.tensors.json")}
            words = shlex.join(["lightning-convert", *(sys.argv[1:] if argv is None else argv)])
            same = verify(args.source, args.checkpoint, command=words, say=say, **given)
            return 0 if same else 1
        else:
            same = roundtrip(
                args.source,
                work=args.work,
                hybrid_model=args.hybrid_model,
                prediction=args.prediction,
                max_shard_bytes=args.max_shard_size,
                jobs=args.jobs,
                say=say,
            )
            return 0 if same else 1
    except ConvertError as error:
        print(f"lightning-convert: error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt as stop:
        more = "; the same command goes on from here" if args.command in ("import", "export") else ""
        print(f"lightning-convert: stopped{more}", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM."""


def _stop_as_asked() -> Any:
    """Take SIGTERM, of ``kill`` and schedulers, as Ctrl-C, so that temporary files are removed; the handler before."""

    def stop(*_: object) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # which alone may have handlers
        return None
    return signal.signal(signal.SIGTERM, stop)


def _found(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package that this is a part of
        return False


def _keep_memory() -> None:
    """Take blocks of memory again in place of giving each back: half of the time went into clearing new pages.

    Settings of torch's allocator (huge pages, read when torch is imported) and of glibc's (one arena, which keeps up to
    1 GB; blocks of more than 32 MB are given back as before). Hints: without glibc, nothing changes.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((-8, 1), (-3, 32 << 20), (-1, 1 << 30)):  # M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_...
            mallopt(parameter, value)


def _path(text: str) -> Path:
    try:
        refuse_remote(text)  # a Path has lost the second slash, and takes an empty text for this folder
    except ConvertError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _step(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} must be the number of an iteration, as 500 of iter_0000500")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0, as 1e-5")
    return value


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 500MB or 2GiB.

    Raises:
        ValueError: not such a size, or zero.

    Example:
        >>> parse_size("5GB")
        5000000000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    size = 0
    if match:
        number, unit, binary = match.groups()
        size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
    if size <= 0:
        raise ValueError(f"{text!r} is no size; write for example 5GB, 500MB or 2GiB")
    return size
