"""Continue prompts from a checkpoint, token by token: ``lightning-generate``.

    lightning-generate --load CKPT --prompt "def main(" --temperature 0.7 --top-p 0.9
    lightning-generate --load CKPT --prompts-file questions.jsonl --samples 4 --batch 64 --json > answers.jsonl
    torchrun --nproc-per-node 2 -m lightning_megatron.inference.generate --load CKPT --prompt - \\
        --tensor-model-parallel-size 2 < prompt.txt

A prompt is read in one forward pass; after it every token costs the same. A lightning layer keeps one K x V state a
head, however many tokens there were, a softmax layer keeps the keys and values of all of them: the sizes are printed at
the end. Model sizes and options come from the checkpoint, whatever layout saved it; the layout of this run is given by
Megatron's flags.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import (
    Parser,
    UsageError,
    build_tokenizer,
    check_layout,
    on_first_rank,
    rank,
    run_command,
    tokenize,
    tokenizer_args,
)

if TYPE_CHECKING:
    import torch

    from .sample import Piece
    from .sampling import Sampling


def generate(
    model: torch.nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, batch: int = 1
) -> Iterator[Piece]:
    """Continue every prompt. A sample depends on the seed and its number alone, up to rounding, and not on ``batch``.

    All ranks of the model call it with the same arguments, and get the same pieces.

    Args:
        model: as ``loading.loaded_model`` yields it.
        tokenizer: ``detokenize``, ``vocab_size`` and ``eod`` are used. The model's table is padded for tensor
            parallelism: its rows from ``vocab_size`` on are no tokens, and are never drawn.
        prompts: token ids, at least one each.
        sampling: how to draw, and when to stop.
        batch: samples at once. 1 reads with Megatron's static caches, one sample after the other; more read in steps
            of the dynamic engine, whose pieces are those of several samples by turns.

    Raises:
        ValueError: the dynamic engine does not serve this model, or has no room; it says what to do.
    """
    import torch

    from .reader import one_by_one
    from .sample import Sample
    from .together import Together

    device = torch.empty(0, device=torch.cuda.current_device()).device
    samples = (
        Sample(request, number, prompt, tokenizer, sampling, device)
        for request, prompt in enumerate(prompts)
        for number in range(sampling.samples)
    )
    if batch == 1:
        return one_by_one(model, tokenizer, sampling, samples)
    size = min(batch, len(prompts) * sampling.samples)
    return Together(model, tokenizer, sampling, size, max(map(len, prompts)) + sampling.tokens).pieces(samples)


# ---- the command -----------------------------------------------------------------------------------------------------


def parser() -> Parser:
    """The command line; flags that are not in it are Megatron's."""
    made = Parser("lightning-generate", __doc__)
    add = made.add_argument
    add("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be repeated; - is stdin")
    add("--prompt-file", action="append", default=[], metavar="FILE", help="a file that is one prompt; - is stdin")
    add(
        "--prompts-file",
        action="append",
        default=[],
        metavar="FILE",
        help="a file with one prompt a line; in FILE.jsonl each line is a JSON string, or an object with prompt",
    )
    add("--chat", action="store_true", help="ask each prompt as a user, after training with --sft")
    add("--tokens", type=int, default=64, metavar="N", help="generate at most N tokens a sample (%(default)s)")
    add("--temperature", type=float, default=0.7, metavar="X", help="0 takes the likeliest token (%(default)s)")
    add("--top-k", type=int, metavar="N", help="draw from the N likeliest tokens")
    add("--top-p", type=float, metavar="X", help="draw from the fewest likeliest tokens whose probabilities sum to X")
    add("--seed", type=int, default=0, metavar="N", help="of the random numbers (%(default)s)")
    add("--samples", type=int, default=1, metavar="N", help="continuations of each prompt (%(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end a sample before this text; may be repeated")
    add("--stop-at-eod", action="store_true", help="end a sample at the end of a document (with --chat always)")
    add("--batch", type=int, default=1, metavar="N", help="samples at once, which change no sample (%(default)s)")
    add("--json", action="store_true", help="one JSON object for each sample, and nothing else, on standard output")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``lightning-generate``. Exit status: 0 done, 1 no checkpoint to load, 2 asked for wrongly."""
    made = parser()
    options, flags = made.parse_known_args(argv)
    run_command(made, lambda: _run(options, flags))


def _run(options: Namespace, flags: list[str]) -> None:
    from .loading import loaded_model, process_group, read_checkpoint, say
    from .sampling import Sampling

    names = ("tokens", "temperature", "top_k", "top_p", "seed", "samples")
    given = {name: getattr(options, name) for name in names}
    sampling = Sampling(**given, stop=tuple(options.stop), stop_at_eod=options.stop_at_eod or options.chat)
    if not (options.prompt or options.prompt_file or options.prompts_file):
        raise UsageError(
            "nothing to continue: give --prompt TEXT, --prompt-file FILE, --prompts-file FILE or --prompt -"
        )
    try:
        sampling.check()
    except ValueError as error:
        raise UsageError(str(error)) from error
    if options.batch < 1:
        raise UsageError(f"--batch {options.batch} must be at least 1")
    check_layout(flags)
    saved = read_checkpoint(options.load, options.ckpt_step)
    args = tokenizer_args(options, saved.args)
    kind = args.tokenizer_type
    if options.chat and kind != "SFTTokenizer":
        raise UsageError(f"--chat: the training used {kind} and no --sft, so that there is no chat template")
    with process_group():
        texts = on_first_rank(lambda: read_prompts(options))
        tokenizer = build_tokenizer(args)
        prompts = [_tokens(tokenizer, text, name, kind, options.chat) for name, text in texts]
        try:
            sampling.check_vocabulary(tokenizer.vocab_size)
        except ValueError as error:
            raise UsageError(str(error)) from error
        _check_lengths(saved.args, prompts, [name for name, _ in texts], sampling.tokens)
        if options.batch > 1 and saved.args.num_experts:
            from .engine import EXPERTS

            flags = [*EXPERTS, *flags]
        with loaded_model(saved, vocab_size=tokenizer.vocab_size, flags=flags) as model:
            try:
                pieces = generate(model, tokenizer, prompts, sampling, options.batch)
            except ValueError as error:
                raise UsageError(f"{error} (--batch {options.batch})") from error
            show = _Lines(texts, prompts, sampling) if options.json else _Screen(tokenizer, prompts, sampling, options)
            began, total = time.perf_counter(), 0
            for piece in pieces:
                total += 1
                if rank() == 0:
                    show(piece)
            if rank() == 0 and options.batch > 1:
                seconds, samples = time.perf_counter() - began, len(prompts) * sampling.samples
                say(f"[{samples} samples, {total} tokens in {seconds:.1f} s, {total / seconds:.0f} tokens/s]")


def read_prompts(options: Namespace) -> list[tuple[str, str]]:
    """(what to call it in messages, text) of each prompt, in the order of the help text.

    Raises:
        UsageError: a file that is missing, empty, or no text.
    """
    found = []
    for text in options.prompt:
        found.append(("--prompt -", _read("--prompt", "-")) if text == "-" else (f"--prompt {text!r}", text))
    found += [(f"--prompt-file {path}", _read("--prompt-file", path)) for path in options.prompt_file]
    for path in options.prompts_file:
        lines = [(i, line) for i, line in enumerate(_read("--prompts-file", path).splitlines(), 1) if line.strip()]
        if not lines:
            raise UsageError(f"--prompts-file {path} has no lines with text: give one prompt a line")
        for number, line in lines:
            name = f"line {number} of --prompts-file {path}"
            found.append((name, _of_json(line, name) if path.endswith(".jsonl") else line))
    for name, text in found:
        if not text:
            raise UsageError(f"{name} has no tokens; give some text to continue")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes of a command line, or half of a surrogate pair in JSON
            raise UsageError(f"{name} is no UTF-8 text (character {error.start}): convert it to UTF-8") from None
    return found


def _read(flag: str, path: str) -> str:
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror}; give a file with text") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{flag} {path} is no UTF-8 text (byte {error.start}): convert it to UTF-8") from error
    if not text:
        raise UsageError(f"{flag} {path} is empty; give some text to continue")
    return text


def _of_json(line: str, name: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{name} is no JSON: {error}") from error
    text = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise UsageError(f'{name} must be a JSON string, or an object such as {{"prompt": "some text"}}')
    return text


def _tokens(tokenizer: Any, text: str, name: str, kind: str, chat: bool) -> list[int]:
    tokens = tokenize(tokenizer, [{"role": "user", "content": text}] if chat else text, name, kind)
    if not tokens:
        raise UsageError(f"{name} has no tokens; give some text to continue")
    return tokens


def _check_lengths(args: Namespace, prompts: list[list[int]], names: list[str], tokens: int) -> None:
    """Learned positions end; angles do not."""
    limit = args.max_position_embeddings
    for prompt, name in zip(prompts, names, strict=True):
        if args.position_embedding_type == "learned_absolute" and len(prompt) + tokens > limit:
            raise UsageError(
                f"{name} has {len(prompt)} tokens, and --tokens {tokens} more make {len(prompt) + tokens}, but the "
                f"model has learned {limit} positions (--max-position-embeddings): give less"
            )


class _Screen:
    """Prompt and continuation as they come, or, of samples at once, when they end; then a line of figures."""

    def __init__(self, tokenizer: Any, prompts: list[list[int]], sampling: Sampling, options: Namespace):
        self.tokenizer, self.prompts = tokenizer, prompts
        self.titles, self.whole = len(prompts) > 1 or sampling.samples > 1, options.batch > 1
        self.open: dict[tuple[int, int], list[Piece]] = {}

    def __call__(self, piece: Piece) -> None:
        pieces = self.open.setdefault((piece.request, piece.sample), [])
        pieces.append(piece)
        if self.whole and piece.finish is None:
            return
        if self.whole or len(pieces) == 1:
            if self.titles:
                print(f"==> prompt {piece.request + 1}, sample {piece.sample + 1}")
            print(self.tokenizer.detokenize(self.prompts[piece.request]), end="")
        print("".join(x.text for x in pieces) if self.whole else piece.text, end="", flush=True)
        if piece.finish is not None:
            self._end(piece, len(pieces) - (piece.finish == "eod"))
            del self.open[piece.request, piece.sample]

    def _end(self, piece: Piece, count: int) -> None:
        assert piece.cache is not None and piece.seconds is not None
        sizes = {kind: f"{size / 1024:.0f} KiB" for kind, size in piece.cache.items()}
        print(
            f"\n\n[{len(self.prompts[piece.request])} prompt tokens, {count} generated, "
            f"{count / piece.seconds:.0f} tokens/s; cache: lightning layers {sizes['lightning']} at any length, "
            f"softmax layers {sizes['softmax']} at this one]",
            flush=True,
        )


class _Lines:
    """A JSON object for each sample, in the order of prompts and samples: one that ends early waits for its turn."""

    def __init__(self, texts: list[tuple[str, str]], prompts: list[list[int]], sampling: Sampling):
        self.texts, self.prompts, self.samples = texts, prompts, sampling.samples
        self.open: dict[int, list[Piece]] = {}
        self.ended: dict[int, str] = {}
        self.next = 0

    def __call__(self, piece: Piece) -> None:
        place = piece.request * self.samples + piece.sample
        pieces = self.open.setdefault(place, [])
        pieces.append(piece)
        if piece.finish is None:
            return
        self.ended[place] = json.dumps(self._result(self.open.pop(place)), ensure_ascii=False)
        while self.next in self.ended:
            print(self.ended.pop(self.next), flush=True)
            self.next += 1

    def _result(self, pieces: list[Piece]) -> dict[str, Any]:
        last = pieces[-1]
        assert last.seconds is not None
        return {
            "prompt": self.texts[last.request][1],
            "request": last.request,
            "sample": last.sample,
            "text": "".join(piece.text for piece in pieces),
            "tokens": [piece.token for piece in pieces],
            "finish": last.finish,
            "prompt_tokens": len(self.prompts[last.request]),
            "generated_tokens": len(pieces),
            "seconds": round(last.seconds, 4),
            "tokens_per_second": round(len(pieces) / last.seconds, 1),
            "cache_bytes": last.cache,
        }


if __name__ == "__main__":
    main()
