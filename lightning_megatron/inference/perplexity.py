"""How well a model foresees a text, at any length of context: ``lightning-perplexity``.

    lightning-perplexity --load CKPT --text book.txt
    lightning-perplexity --load CKPT --text book.txt --context 8192 --json

The text is read in chunks, and states are carried over them: memory of a model whose layers are all lightning layers
does not grow with the context. Softmax layers keep the keys and values of all tokens of the context.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import has_softmax_layers
from .command import Parser, UsageError, build_tokenizer, check_layout, rank, run_command, tokenize, tokenizer_args

if TYPE_CHECKING:
    import torch

FIRST_BUCKET = 1024  # tokens; each further bucket ends at twice the position
_BLOCK = 1 << 20  # characters that are tokenized at once
_BUCKETS = 64


@dataclass(frozen=True)
class Bucket:
    """Tokens that were foreseen with ``begin`` + 1 to ``end`` tokens before them."""

    begin: int
    end: int
    tokens: int
    nll: float
    """Mean of -log p, in nats."""


@dataclass(frozen=True)
class Perplexity:
    """What a model makes of a text."""

    tokens: int
    """Tokens that were foreseen: all but the first."""
    nll: float
    """Mean of -log p, in nats."""
    buckets: tuple[Bucket, ...]

    @property
    def perplexity(self) -> float:
        """exp(nll)"""
        return math.exp(self.nll) if self.nll < 700 else math.inf


def perplexity(
    model: torch.nn.Module,
    tokens: Iterable[int],
    *,
    vocab_size: int,
    context: int | None = None,
    chunk: int = 8192,
    max_sequence_length: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> Perplexity:
    """exp of the mean of -log p(token | tokens before it in its window), over all tokens but the first.

    A window of ``context`` tokens is read from empty states; its last token begins the next window, so that every token
    is foreseen once. Position i of a window has i + 1 tokens before it. All ranks of the model call it with the same
    arguments, and get the same result.

    Args:
        model: as ``loading.loaded_model`` yields it.
        tokens: ids, read once, as they come.
        vocab_size: without padding; p is over these tokens.
        context: length of a window; the whole text is one if None.
        chunk: tokens read at once. More is faster, and takes more memory.
        max_sequence_length: the most tokens that softmax layers may keep the keys and values of; no limit if None.
        tell: gets a line, on rank 0 and after the first chunk: what memory softmax layers take.

    Raises:
        ValueError: fewer than two tokens, numbers below 1, or a window longer than allowed or than learned positions.
    """
    import torch

    from .losses import LossReader
    from .reader import from_last_stage

    for name, value in (("context", context), ("chunk", chunk), ("max_sequence_length", max_sequence_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value} must be at least 1 token, or None")
    limit = model.max_sequence_length if model.position_embedding_type == "learned_absolute" else None
    if limit is not None and (context is None or context > limit):
        raise ValueError(
            f"context {'unlimited' if context is None else context}, but the model has learned {limit} positions: give "
            f"at most {limit}"
        )
    source = iter(tokens)
    last = next(source, None)
    device = torch.empty(0, device=torch.cuda.current_device()).device
    sums, counts = torch.zeros(_BUCKETS, dtype=torch.float64, device=device), [0] * _BUCKETS
    position = 0
    with LossReader.opened(model, vocab_size, context, chunk) as reader:
        softmax = has_softmax_layers(model.config)
        while targets := list(itertools.islice(source, chunk if context is None else min(chunk, context - position))):
            end = position + len(targets)
            if softmax and max_sequence_length is not None and end > max_sequence_length:
                raise ValueError(
                    f"softmax layers would keep keys and values of {end} tokens, and max_sequence_length is "
                    f"{max_sequence_length}: allow more, or give a context of at most {max_sequence_length}"
                )
            losses = reader.losses([last, *targets[:-1]], targets)
            for bucket, begin, stop in _split(position, end):
                counts[bucket] += stop - begin
                if losses is not None:
                    sums[bucket] += losses[begin - position : stop - position].double().sum()
            if tell and softmax and sum(counts) == len(targets) and rank() == 0:
                tell(_what_is_kept(reader.softmax_bytes(), context))
            last, position = targets[-1], end
            if position == context:
                position = 0
                reader.forget()
    if not sum(counts):
        raise ValueError("a text needs 2 tokens or more: the first one is not foreseen")
    sums = from_last_stage(sums, sums).cpu()
    buckets = [
        Bucket(0 if i == 0 else FIRST_BUCKET << (i - 1), FIRST_BUCKET << i, n, float(sums[i]) / n)
        for i, n in enumerate(counts)
        if n
    ]
    return Perplexity(sum(counts), float(sums.sum()) / sum(counts), tuple(buckets))


def _split(begin: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(bucket, begin, end) of the parts of a range of positions."""
    while begin < end:
        bucket = (begin // FIRST_BUCKET).bit_length()
        stop = min(end, FIRST_BUCKET << bucket)
        yield bucket, begin, stop
        begin = stop


def _what_is_kept(size: int, context: int | None) -> str:
    each = f"{size / 1024:.1f} KiB for each token of the context on this rank"
    much = "" if context is None else f", {size * context / 2**20:.0f} MiB at {context} tokens"
    return f"[softmax layers keep keys and values: {each}{much}]"


# ---- the command -----------------------------------------------------------------------------------------------------


def parser() -> Parser:
    """The command line; flags that are not in it are Megatron's."""
    made = Parser("lightning-perplexity", __doc__)
    add = made.add_argument
    add("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text; it may be larger than memory")
    add(
        "--context",
        type=_length,
        default=None,
        metavar="N",
        help="read windows of N tokens, each from empty states (default: unlimited, the text is one window)",
    )
    add("--chunk", type=int, default=8192, metavar="N", help="tokens read at once (%(default)s)")
    add("--max-sequence-length", type=int, metavar="N", help="the most tokens that softmax layers may keep")
    add("--json", action="store_true", help="one JSON object, and nothing else, on standard output")
    return made


def _length(value: str) -> int | None:
    if value != "unlimited" and not value.isdecimal():
        raise argparse.ArgumentTypeError(f"{value} is neither a number of tokens nor unlimited")
    return None if value == "unlimited" else int(value)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``lightning-perplexity``. Exit status: 0 done, 1 no checkpoint to load, 2 asked for wrongly."""
    made = parser()
    options, flags = made.parse_known_args(argv)
    run_command(made, lambda: _run(options, flags))


def _run(options: Namespace, flags: list[str]) -> None:
    from .loading import loaded_model, process_group, read_checkpoint, say

    for name in ("context", "chunk", "max_sequence_length"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value} must be at least 1 token")
        if value is not None and value > sys.maxsize:
            raise UsageError(f"--{name.replace('_', '-')} {value} must be at most {sys.maxsize} tokens")
    check_layout(flags)
    saved = read_checkpoint(options.load, options.ckpt_step)
    limit = saved.args.max_position_embeddings
    if saved.args.position_embedding_type == "learned_absolute" and (options.context or limit + 1) > limit:
        raise UsageError(
            f"--context {options.context or 'unlimited'}: the model has learned {limit} positions: give --context "
            f"{limit} or less"
        )
    with process_group():
        args = tokenizer_args(options, saved.args)
        tokenizer, kind = build_tokenizer(args), args.tokenizer_type
        tokens = tokens_of(options.text, tokenizer, kind)
        first = list(itertools.islice(tokens, 2))
        if len(first) < 2:
            raise UsageError(f"--text {options.text} has {len(first)} tokens: give a text of 2 or more")
        with loaded_model(saved, vocab_size=tokenizer.vocab_size, flags=flags) as model:
            began = time.perf_counter()
            try:
                result = perplexity(
                    model, itertools.chain(first, tokens), vocab_size=tokenizer.vocab_size, context=options.context,
                    chunk=options.chunk, max_sequence_length=options.max_sequence_length, tell=say,
                )  # fmt: skip
            except ValueError as error:
                raise UsageError(str(error)) from error
            seconds = time.perf_counter() - began
    if rank() == 0:
        (_show_json if options.json else _show)(result, options, seconds)
    if not math.isfinite(result.nll):
        raise UsageError(f"the mean of -log p is {result.nll}: the model's outputs are not finite on this text")


def tokens_of(path: Path, tokenizer: Any, kind: str) -> Iterator[int]:
    """Token ids of a file, tokenized in blocks of a million characters that end with a line.

    Raises:
        UsageError: it cannot be read, or is no text.
    """
    for block in blocks_of(path):
        text = " ".join(block.split()) if kind == "NullTokenizer" else block
        if text:
            yield from tokenize(tokenizer, text, f"--text {path}", kind)


def blocks_of(path: Path, size: int = _BLOCK) -> Iterator[str]:
    """The text of a file in pieces of some ``size`` characters, cut where a line begins.

    Where lines are longer than that, it is cut before a space, and without spaces anywhere.
    """
    rest = ""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            while more := file.read(size):
                rest += more
                if cut := _last_start(rest) or len(rest) >= 2 * size and (_last_space(rest) or len(rest)):
                    yield rest[:cut]
                    rest = rest[cut:]
    except OSError as error:
        raise UsageError(f"--text {path}: {error.strerror}; give a file with text") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--text {path} is no UTF-8 text ({error.reason}): convert it to UTF-8") from error
    if rest:
        yield rest


def _last_start(text: str) -> int:
    """Where the last line begins that does not begin with a space, so that no token spans the cut; 0 if nowhere."""
    cut = len(text)
    while (cut := text.rfind("\n", 0, cut)) >= 0:
        if cut + 1 < len(text) and not text[cut + 1].isspace():
            return cut + 1
    return 0


def _last_space(text: str) -> int:
    """Where the last space after a word is; 0 if nowhere."""
    cut = len(text)
    while (cut := text.rfind(" ", 0, cut)) > 0:
        if not text[cut - 1].isspace():
            return cut
    return 0


def _show(result: Perplexity, options: Namespace, seconds: float) -> None:
    window = "the whole text" if options.context is None else f"windows of {options.context} tokens"
    print(f"{result.tokens} tokens of {options.text}, in {window}: {result.tokens / seconds:.0f} tokens/s")
    print(f"nll {result.nll:.6f} nats per token, perplexity {result.perplexity:.4f}\n")
    print(f"{'tokens before':>22} {'tokens':>12} {'nll':>10} {'perplexity':>12}")
    for b in result.buckets:
        ppl = Perplexity(b.tokens, b.nll, ()).perplexity
        print(f"{f'{b.begin + 1} to {b.end}':>22} {b.tokens:>12} {b.nll:>10.4f} {ppl:>12.4f}")


def _show_json(result: Perplexity, options: Namespace, seconds: float) -> None:
    buckets = [dict(begin=b.begin, end=b.end, tokens=b.tokens, nll=b.nll) for b in result.buckets]
    found = dict(
        text=str(options.text), context=options.context, chunk=options.chunk, tokens=result.tokens, nll=result.nll,
        perplexity=result.perplexity, seconds=round(seconds, 3), buckets=buckets,
    )  # fmt: skip
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
