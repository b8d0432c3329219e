"""What the commands share: starting up, checks, tokenizers, and how they end.

This module stays light: ``start`` decides between GPU and CPU before anything of Megatron is imported.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..compat import check_megatron


class Parser(argparse.ArgumentParser):
    """Errors are one line, on rank 0, with exit status 2."""

    def __init__(self, prog: str, text: str | None):
        super().__init__(
            prog, description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
            usage=f"{prog} --load FOLDER [options] [flags of Megatron, such as --tensor-model-parallel-size 2]",
        )  # fmt: skip
        self.add_argument("--load", type=Path, required=True, help="the folder that --save of the training named")
        self.add_argument("--ckpt-step", type=int, metavar="N", help="iteration to load (default: the last one)")
        self.add_argument(
            "--tokenizer-model", metavar="PATH", help="model or folder of the tokenizer (default: that of the training)"
        )
        self.add_argument(
            "--tokenizer-type", metavar="TYPE", help="Megatron's name of the tokenizer (default: that of the training)"
        )

    def error(self, message: str) -> NoReturn:
        if rank() == 0:
            print(f"{self.prog}: error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)


def rank() -> int:
    """Of torchrun; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def start(prog: str) -> None:
    """Let Megatron run on the CPU where there is no GPU, and check its version.

    Raises:
        RuntimeError: a wrong megatron-core; the message names both versions.
    """
    import torch

    # what is not installed is told by training
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    if not torch.cuda.is_available():  # before the check, which imports Megatron
        from .. import cpu

        cpu.enable_inference()
        if rank() == 0:
            print(f"[{prog}: no GPU, so it runs on the CPU]", file=sys.stderr, flush=True)
    check_megatron()


def run_command(parser: Parser, work: Callable[[], None]) -> None:
    """``work()``; what a user can mend ends it with a line and status 2 or 1, everything else with a traceback."""
    try:
        start(parser.prog)
    except RuntimeError as error:
        parser.error(str(error))
    from .loading import LoadError

    try:
        work()
    except LoadError as error:  # one rank may see other files than the others
        where = f" (rank {rank()})" if rank() else ""
        print(f"{parser.prog}: {error}{where}", file=sys.stderr, flush=True)
        sys.exit(1)
    except UsageError as error:
        parser.error(str(error))
    except BrokenPipeError:  # ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


class UsageError(ValueError):
    """What was asked for cannot be done; the same on every rank."""


def check_layout(flags: Sequence[str]) -> None:
    """Refuse Megatron's flags that no model is used with, or not with as many processes as were started.

    Raises:
        UsageError: as ``loading.check_flags`` says it.
    """
    from .loading import check_flags, world_size

    try:
        check_flags(flags, world_size())
    except ValueError as error:
        raise UsageError(str(error)) from error


def on_first_rank(read: Any) -> Any:
    """What ``read()`` returns on rank 0, on every rank; a ``UsageError`` of it is raised on every rank."""
    import torch.distributed as dist

    result: list[Any] = [None, None]
    if rank() == 0:
        try:
            result[0] = read()
        except UsageError as error:
            result[1] = str(error)
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise UsageError(result[1])
    return result[0]


def tokenizer_args(options: Namespace, saved: Namespace) -> Namespace:
    """The saved args with the tokenizer to use: that of the training, of the import, or what ``options`` names.

    Args:
        options: of ``Parser``.
        saved: the args in the checkpoint.

    Raises:
        UsageError: ``--tokenizer-model`` for a type without a model.
    """
    args = copy.copy(saved)
    brought = options.load / "huggingface"  # by lightning-convert import, whose args name no tokenizer
    if options.tokenizer_type:
        args.tokenizer_type = options.tokenizer_type
    elif args.tokenizer_type == "NullTokenizer" and _has_tokenizer(brought):
        args.tokenizer_type, args.tokenizer_model = "HuggingFaceTokenizer", str(brought)
    if options.tokenizer_model:
        if args.tokenizer_type == "NullTokenizer":
            raise UsageError(
                "--tokenizer-model: the training used NullTokenizer, which has no model; leave it out, or give "
                "--tokenizer-type, too"
            )
        args.tokenizer_model = options.tokenizer_model
    return args


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def build_tokenizer(args: Namespace) -> Any:
    """Megatron's tokenizer of ``tokenizer_args``.

    Raises:
        UsageError: it cannot be built, and what to give.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    if args.tokenizer_type == "NullTokenizer" and args.vocab_size is None:
        raise UsageError(
            "the checkpoint names no tokenizer: give --tokenizer-type, such as HuggingFaceTokenizer, and "
            "--tokenizer-model"
        )
    try:
        return build_tokenizer(args)
    except Exception as error:  # of any tokenizer library
        raise UsageError(
            f"{args.tokenizer_type} {args.tokenizer_model or ''} cannot be used: {_first_line(error)}; give "
            "--tokenizer-model"
        ) from error


def tokenize(tokenizer: Any, text: Any, name: str, kind: str) -> list[int]:
    """Token ids of ``text``; ``name`` says which it is, ``kind`` which tokenizer.

    Raises:
        UsageError: it cannot be read, has no tokens, or tokens that the model does not have.
    """
    try:
        tokens = [int(token) for token in tokenizer.tokenize(text)]
    except Exception as error:
        known = "numbers, such as 1 2 3, or --tokenizer-type" if kind == "NullTokenizer" else "--tokenizer-model"
        raise UsageError(f"{kind} cannot read {name}: {_first_line(error)}; give {known}") from error
    wrong = next((token for token in tokens if not 0 <= token < tokenizer.vocab_size), None)
    if wrong is not None:
        raise UsageError(f"{name} has token {wrong}, but the vocabulary ends at {tokenizer.vocab_size - 1}")
    return tokens


def _first_line(error: Exception) -> str:
    return (str(error) or traceback.format_exception_only(error)[-1]).strip().splitlines()[0]
