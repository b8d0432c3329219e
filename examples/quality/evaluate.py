"""Evaluate checkpoints of ``train``: losses, long contexts, recall, needles, copies.

    python -m examples.quality.evaluate --data data/quality/data runs/7to1_base_300M_lr0.001_seed1

Writes RUN/evaluate.json after each task, and skips tasks that are there, so that the same command goes on. Losses come
from lightning_megatron.inference (perplexity, LossReader), continuations from its generate().

    loss      mean loss of held-out windows of the training length, and by position
    context   perplexity of the same text in windows of 1, 4, 16 and 64 times the training length, states carried
    recall    multi-query associative recall, by number of pairs
    needle    a number in held-out text, by length and depth
    copy      a long identifier, by distance
"""

from __future__ import annotations

import argparse
import json
import random
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from examples.provenance import when

from . import tasks
from .train import TRACKER, card

POSITIONS = 64  # parts of a window in which losses are averaged
MULTIPLES = (1, 4, 16, 64)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SEED = 20


class Asked:
    """A loaded model, and what it is asked about."""

    def __init__(self, model: torch.nn.Module, tokenizer, processor, text, options: Namespace, length: int):
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        self.text, self.options, self.length = text, options, length
        self.vocabulary = tokenizer.vocab_size

    def encode(self, text: str) -> list[int]:
        return list(self.processor.encode(text))

    @torch.inference_mode()
    def logits(self, tokens: list[int], places: list[int]) -> torch.Tensor:
        """[places, vocabulary] of one pass over ``tokens``."""
        device = torch.cuda.current_device()
        ids = torch.tensor([tokens], device=device)
        found = self.model(ids, torch.arange(len(tokens), device=device)[None], None)[0]
        return found[places, : self.vocabulary]

    def go_on(self, prompt: list[int], count: int) -> list[int]:
        from lightning_megatron.inference.generate import generate
        from lightning_megatron.inference.sampling import Sampling

        sampling = Sampling(tokens=count, temperature=0)
        return [piece.token for piece in generate(self.model, self.tokenizer, [prompt], sampling)]

    @torch.inference_mode()
    def nll(self, prompt: list[int], answer: list[int]) -> float:
        from lightning_megatron.inference.losses import LossReader

        tokens, found = [*prompt, *answer], []
        with LossReader.opened(self.model, self.vocabulary, len(tokens), self.options.chunk) as reader:
            for start in range(0, len(tokens) - 1, self.options.chunk):
                targets = tokens[start + 1 : start + 1 + self.options.chunk]
                found = [*found[-1:], reader.losses(tokens[start : start + len(targets)], targets)]
        return float(torch.cat(found)[-len(answer) :].double().mean())


@torch.inference_mode()
def loss(asked: Asked) -> dict:
    """Mean loss of windows of the training length, and by position in 64 parts."""
    from lightning_megatron.inference.losses import LossReader

    length, sums, windows = asked.length, 0.0, 0
    limit = min(len(asked.text), asked.options.loss_tokens)
    with LossReader.opened(asked.model, asked.vocabulary, length, length) as reader:
        for start in range(0, limit - length, length):
            window = [int(token) for token in asked.text[start : start + length + 1]]
            sums = sums + reader.losses(window[:-1], window[1:]).double()
            windows += 1
            reader.forget()
    means = (sums / windows).cpu()
    parts = [float(part.mean()) for part in means.chunk(min(POSITIONS, length))]
    return {"nll": float(means.mean()), "windows": windows, "length": length, "by_position": parts}


def context(asked: Asked) -> dict:
    """Perplexity of the same tokens at several lengths of context; null where the text is shorter than one window."""
    from lightning_megatron.inference.perplexity import perplexity

    tokens = [int(token) for token in asked.text[: asked.options.context_tokens]]
    rows = []
    for multiple in asked.options.multiples:
        window = multiple * asked.length
        row: dict = {"multiple": multiple, "context": window, "tokens": len(tokens)}
        if len(tokens) > window:
            found = perplexity(
                asked.model, iter(tokens), vocab_size=asked.vocabulary, context=window, chunk=asked.options.chunk
            )
            buckets = [{"begin": b.begin, "end": b.end, "tokens": b.tokens, "nll": b.nll} for b in found.buckets]
            row |= {"nll": found.nll, "perplexity": found.perplexity, "buckets": buckets}
        rows.append(row)
    return {"rows": rows}


def recall(asked: Asked) -> dict:
    """Multi-query associative recall; numbers of pairs whose lines are longer than the training length are left out."""
    words = tasks.word_tokens(asked.processor)
    equals, newline = asked.encode("=")[-1], asked.encode("\n")[-1]
    rows = []
    for pairs in asked.options.pairs:
        if 8 * pairs > asked.length or 2 * pairs > len(words):
            continue
        rng = random.Random(SEED + pairs)
        cases = [tasks.recall(words, equals, newline, pairs, rng) for _ in range(asked.options.cases)]
        rows.append({"pairs": pairs, "chance": 1 / pairs} | tasks.score_recall(cases, asked.logits))
    return {"rows": rows}


def needle(asked: Asked) -> dict:
    """A needle by length and depth; lengths beyond the held-out text are left out."""
    rng, cases = random.Random(SEED), []
    for multiple in asked.options.multiples:
        length = multiple * asked.length
        if length <= len(asked.text):
            count = max(1, asked.options.cases // multiple)
            depths = [x for x in asked.options.depths for _ in range(count)]
            cases += [tasks.needle(asked.text, asked.encode, length, x, rng) for x in depths]
    return {"rows": tasks.score_cases(cases, asked.go_on, asked.nll)}


def copy(asked: Asked) -> dict:
    """Copies of an identifier from further and further away."""
    pieces = [asked.processor.id_to_piece(token)[1:] for token in tasks.word_tokens(asked.processor)]
    rng, cases = random.Random(SEED), []
    for distance in (asked.length // 16, asked.length // 2, 4 * asked.length):
        if 2 * distance <= len(asked.text):
            for _ in range(asked.options.cases):
                cases.append(tasks.copy(asked.text, asked.encode, pieces, distance, rng))
    return {"rows": tasks.score_cases(cases, asked.go_on, asked.nll)}


TASKS: dict[str, Callable[[Asked], dict]] = {
    "loss": loss, "context": context, "recall": recall, "needle": needle, "copy": copy,
}  # fmt: skip


def held_out_tokens(data: Path):
    """All tokens of the held-out documents, one behind the other, [tokens]."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = IndexedDataset(str(data / "valid_text_document"))
    return np.concatenate([documents[i] for i in range(len(documents))])


def evaluate(folder: Path, options: Namespace) -> dict:
    """All tasks of ``options`` that RUN/evaluate.json does not have yet; returns what it holds then.

    Raises:
        LoadError: no checkpoint there that can be loaded.
    """
    import sentencepiece

    from lightning_megatron.inference.command import build_tokenizer, tokenizer_args
    from lightning_megatron.inference.loading import loaded_model, read_checkpoint

    load, path = folder / "checkpoint", folder / "evaluate.json"
    saved, model_file = read_checkpoint(load), str(options.data / "tokenizer.model")
    step = int((load / TRACKER).read_text())
    found = json.loads(path.read_text("utf-8")) if path.is_file() and not options.again else {}
    if found.get("step") != step:
        found = {"run": folder.name, "step": step, "tasks": {}}
    missing = [name for name in options.tasks if name not in found["tasks"]]
    if not missing:
        return found
    chosen = Namespace(load=load, tokenizer_type=None, tokenizer_model=model_file)
    tokenizer = build_tokenizer(tokenizer_args(chosen, saved.args))
    processor = sentencepiece.SentencePieceProcessor(model_file=model_file)
    with loaded_model(saved, vocab_size=tokenizer.vocab_size, flags=options.flags) as model:
        text = held_out_tokens(options.data)
        asked = Asked(model, tokenizer, processor, text, options, saved.args.seq_length)
        for name in missing:
            start = time.time()
            result = TASKS[name](asked)
            seconds = round(time.time() - start, 1)
            found["tasks"][name] = result | {"seconds": seconds, "card": card(options.gpu), **when()}
            path.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{folder.name}: {name} in {seconds} s", flush=True)
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("runs", type=Path, nargs="+", help="folders of train")
    add("--data", type=Path, required=True, help="folder with tokenizer and datasets")
    add("--tasks", nargs="+", default=list(TASKS), choices=TASKS, help="(all)")
    add("--again", action="store_true", help="also the tasks that are there")
    add("--loss-tokens", type=int, default=2_000_000, help="of task loss, at most (%(default)s)")
    add("--context-tokens", type=int, default=2_097_152, help="of task context, at most (%(default)s)")
    add("--multiples", type=int, nargs="+", default=MULTIPLES, help="of the training length (%(default)s)")
    add("--depths", type=float, nargs="+", default=DEPTHS, help="of needles (%(default)s)")
    add("--pairs", type=int, nargs="+", default=(8, 32, 128, 512), help="of recall (%(default)s)")
    add("--cases", type=int, default=32, help="of each kind; of needles fewer at longer lengths (%(default)s)")
    add("--chunk", type=int, default=8192, help="tokens read at once (%(default)s)")
    add("--flags", nargs="+", default=[], metavar="FLAG", help="more flags of loading, last on the line")
    return made


def main(argv: list[str] | None = None) -> None:
    from lightning_megatron.inference.command import start

    options = parser().parse_args(argv)
    options.data, options.gpu = options.data.resolve(), torch.cuda.is_available()
    start("evaluate")
    for folder in options.runs:
        evaluate(folder.resolve(), options)


if __name__ == "__main__":
    main()
