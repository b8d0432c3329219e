"""Continue prompts from a checkpoint, token by token: ``lightning-generate``.

    lightning-generate --load CKPT --prompt "def main(" --temperature 0.7 --top-p 0.9
    lightning-generate --load CKPT --prompts-file questions.jsonl --samples 4 --json > answers.jsonl
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
from dataclasses import dataclass
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

    from .sampling import Sampling


@dataclass(frozen=True)
class Piece:
    """One token of one sample."""

    request: int
    sample: int
    text: str
    """What can be printed now: parts of a character, or of a stop word, wait for the next tokens."""
    token: int
    finish: str | None = None
    """After the last token: length, stop or eod."""
    cache: dict[str, int] | None = None
    """After the last token: bytes that this rank keeps, by kind of layer."""


def generate(
    model: torch.nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> Iterator[Piece]:
    """Continue every prompt, one sample after the other.

    All ranks of the model call it with the same arguments, and get the same pieces.

    Args:
        model: as ``loading.loaded_model`` yields it.
        tokenizer: ``detokenize``, ``vocab_size`` and ``eod`` are used. The model's table is padded for tensor
            parallelism: its rows from ``vocab_size`` on are no tokens, and are never drawn.
        prompts: token ids, at least one each.
        sampling: how to draw, and when to stop.
    """
    import torch

    from .reader import Reader, from_last_stage
    from .sampling import Text

    device = torch.empty(0, device=torch.cuda.current_device()).device
    place = torch.zeros(1, dtype=torch.int64, device=device)
    for request, prompt in enumerate(prompts):
        reader = Reader(model, max_length=len(prompt) + sampling.tokens)
        first = reader.read(prompt)
        after_prompt = reader.place()
        for sample in range(sampling.samples):
            reader.go_back(after_prompt)
            text, logits = Text(tokenizer, prompt, sampling.stop), first
            random = sampling.generator(request, sample, device)
            for count in range(1, sampling.tokens + 1):
                drawn = None if logits is None else sampling.draw(logits[:, : tokenizer.vocab_size], random)
                token = int(from_last_stage(drawn, place))
                if sampling.stop_at_eod and token == tokenizer.eod:
                    finish, new = "eod", ""
                else:
                    new = text.push(token)
                    finish = "stop" if text.stopped else "length" if count == sampling.tokens else None
                if finish is not None:
                    yield Piece(request, sample, new + text.flush(), token, finish, reader.cache_sizes())
                    break
                yield Piece(request, sample, new, token)
                logits = reader.read([token])


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
    add("--json", action="store_true", help="one JSON object for each sample, and nothing else, on standard output")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``lightning-generate``. Exit status: 0 done, 1 no checkpoint to load, 2 asked for wrongly."""
    made = parser()
    options, flags = made.parse_known_args(argv)
    run_command(made, lambda: _run(options, flags))


def _run(options: Namespace, flags: list[str]) -> None:
    from .loading import loaded_model, process_group, read_checkpoint
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
        with loaded_model(saved, vocab_size=tokenizer.vocab_size, flags=flags) as model:
            show = _Lines(tokenizer, texts, prompts) if options.json else _Screen(tokenizer, prompts, sampling.samples)
            for piece in generate(model, tokenizer, prompts, sampling):
                if rank() == 0:
                    show(piece)


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
    """Prompt and continuation as they come, and a line of figures after each sample."""

    def __init__(self, tokenizer: Any, prompts: list[list[int]], samples: int):
        self.tokenizer, self.prompts, self.samples = tokenizer, prompts, samples
        self.current: tuple[int, int] | None = None
        self.count, self.began = 0, time.perf_counter()

    def __call__(self, piece: Piece) -> None:
        prompt = self.prompts[piece.request]
        if self.current != (piece.request, piece.sample):
            if len(self.prompts) > 1 or self.samples > 1:
                print(f"==> prompt {piece.request + 1}, sample {piece.sample + 1}")
            print(self.tokenizer.detokenize(prompt), end="")
            self.current, self.count = (piece.request, piece.sample), 0
        self.count += piece.finish != "eod"
        print(piece.text, end="", flush=True)
        if piece.finish is None:
            return
        assert piece.cache is not None
        seconds, self.began = time.perf_counter() - self.began, time.perf_counter()
        sizes = {kind: f"{size / 1024:.0f} KiB" for kind, size in piece.cache.items()}
        print(
            f"\n\n[{len(prompt)} prompt tokens, {self.count} generated, {self.count / seconds:.0f} tokens/s; "
            f"cache: lightning layers {sizes['lightning']} at any length, softmax layers {sizes['softmax']} at this "
            "one]",
            flush=True,
        )


class _Lines:
    """A JSON object for each sample."""

    def __init__(self, tokenizer: Any, texts: list[tuple[str, str]], prompts: list[list[int]]):
        del tokenizer
        self.texts, self.prompts = texts, prompts
        self.text: list[str] = []
        self.tokens: list[int] = []
        self.began = time.perf_counter()

    def __call__(self, piece: Piece) -> None:
        self.text.append(piece.text)
        self.tokens += [piece.token]
        if piece.finish is None:
            return
        seconds = time.perf_counter() - self.began
        result = {
            "prompt": self.texts[piece.request][1],
            "request": piece.request,
            "sample": piece.sample,
            "text": "".join(self.text),
            "tokens": self.tokens,
            "finish": piece.finish,
            "prompt_tokens": len(self.prompts[piece.request]),
            "generated_tokens": len(self.tokens),
            "seconds": round(seconds, 4),
            "tokens_per_second": round(len(self.tokens) / seconds, 1),
            "cache_bytes": piece.cache,
        }
        print(json.dumps(result, ensure_ascii=False), flush=True)
        self.text, self.tokens, self.began = [], [], time.perf_counter()


if __name__ == "__main__":
    main()
