"""Evaluate checkpoints of ``train``: losses, long contexts, recall, needles, copies.

    python -m examples.quality.evaluate --data data/quality/data runs/7to1_base_300M_lr0.001_seed1

Writes RUN/evaluate.json after each stage of a task, such as the needles of one length, and skips those that are there,
so that the same command goes on. Losses come from lightning_megatron.inference (perplexity, LossReader), continuations
from its Reader.

    loss      mean loss of windows of the training length all over the held-out text, by position and by package
    context   perplexity of the same text in windows of 1, 4, 16 and 64 times the training length, states carried
    recall    multi-query associative recall, by number of pairs, in two forms
    copy      a long identifier, by distance
    needle    a number in held-out text, by length and depth

Beyond the training length softmax layers have angles of a base that grows with the length (NTK-aware scaling, as it is
deployed without further training); ``context`` also shows those that they were trained with.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import random
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from examples.provenance import when

from . import tasks
from .train import TRACKER, card, stats, write_json

POSITIONS = 64  # parts of a window in which losses are averaged
MULTIPLES = (1, 4, 16, 64)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SEED = 20
FEWEST = 4  # needles of a length and depth, however long they are
UNFINISHED = "unfinished"  # of a task in evaluate.json: how many of its stages are there, until all are
Stages = Iterator[Callable[[], dict]]
"""Parts of a task, in the order in which they are asked: each returns what evaluate.json gets, ``rows`` behind those of
the parts before."""


class Asked:
    """A loaded model, and what it is asked about."""

    def __init__(
        self, model: torch.nn.Module, vocabulary: int, processor, documents: list, packages: list[str],
        options: Namespace, length: int,
    ):  # fmt: skip
        """``documents``: held-out ones, arrays of tokens; ``packages``: whose each is; ``length``: of the training."""
        import numpy as np

        self.model, self.vocabulary, self.processor = model, vocabulary, processor
        self.text, self.packages = np.concatenate(documents), packages
        self.ends = np.cumsum([len(document) for document in documents])
        self.options, self.length = options, length

    def angles(self, multiple: int) -> tuple[bool, ...]:
        """With which angles to ask at so many times the training length: those trained (False), scaled ones (True)."""
        from lightning_megatron.config import has_softmax_layers

        turned = hasattr(self.model, "rotary_pos_emb") and self.model.position_embedding_type == "rope"
        return (False, True) if turned and multiple > 1 and has_softmax_layers(self.model.config) else (False,)

    @contextlib.contextmanager
    def scaled(self, multiple: float) -> Iterator[None]:
        """Angles of a base that is multiple^(d / (d - 2)) times as large, so that the slowest one turns as far as it
        did in training (NTK-aware scaling: B. Peng et al., arXiv 2309.00071, section 3.1).
        """
        embedding = self.model.rotary_pos_emb
        trained = embedding.inv_freq
        share = torch.linspace(0, 1, trained.numel(), dtype=torch.float64, device=trained.device)
        embedding.inv_freq = (trained.double() * multiple**-share).to(trained.dtype)
        type(embedding).forward.cache_clear()  # Megatron keeps the angles of lengths
        try:
            yield
        finally:
            embedding.inv_freq = trained
            type(embedding).forward.cache_clear()

    def encode(self, text: str) -> list[int]:
        return list(self.processor.encode(text))

    @torch.inference_mode()
    def logits(self, tokens: list[int], places: list[int]) -> torch.Tensor:
        """[places, vocabulary] of one pass over ``tokens``."""
        device = torch.cuda.current_device()
        ids = torch.tensor([tokens], device=device)
        found = self.model(ids, torch.arange(len(tokens), device=device)[None], None)[0]
        return found[places, : self.vocabulary]

    @torch.inference_mode()
    def ask(self, prompt: list[int], answer: list[int]) -> tuple[int, float]:
        """How far the greedy continuation is ``answer``, and its mean -log p. The answer is read at once behind the
        prompt: up to the first wrong token, the likeliest one after the answer's so far is what greedy generation says.
        """
        from lightning_megatron.inference.angles import angles_on_demand
        from lightning_megatron.inference.reader import Reader

        before, length = prompt[:-1], len(prompt) + len(answer)
        with angles_on_demand(self.model):
            reader = Reader(self.model, max_length=length)
            for start in range(0, len(before), self.options.chunk):
                reader.read(before[start : start + self.options.chunk])
            logits = reader.read_all([prompt[-1], *answer[:-1]])
        found = logits[:, : self.vocabulary].double().log_softmax(-1)
        expected = torch.tensor(answer, device=found.device)
        right = found.argmax(-1) == expected
        nll = -found.gather(1, expected[:, None]).mean()
        return int(right.cumprod(0).sum()), float(nll)

    def score(self, cases: list[tasks.Case]) -> dict:
        """Rows of cases of one length; angles are scaled if that is beyond the training length."""
        multiple = -(-max(len(case.prompt) + len(case.answer) for case in cases) // self.length)
        scaled = self.angles(multiple)[-1]
        with self.scaled(multiple) if scaled else contextlib.nullcontext():
            return {"rows": [row | {"scaled": scaled} for row in tasks.score_cases(cases, self.ask)]}


def spread(tokens: int, length: int, count: int) -> list[int]:
    """Where ``count`` pieces of ``length`` begin that lie evenly in a text of ``tokens``, the first at 0."""
    return [0] if count == 1 else [i * (tokens - length) // (count - 1) for i in range(count)]


def loss(asked: Asked) -> Stages:
    """Mean loss of windows of the training length all over the text, by position in 64 parts, and by package; of one
    window where the text is shorter.
    """
    yield functools.partial(_loss, asked)


@torch.inference_mode()
def _loss(asked: Asked) -> dict:
    import numpy as np

    from lightning_megatron.inference.losses import LossReader

    length, found = min(asked.length, len(asked.text) - 1), []
    count = max(1, min(len(asked.text), asked.options.loss_tokens) // length)
    starts = spread(len(asked.text), length + 1, count)
    with LossReader.opened(asked.model, asked.vocabulary, length, length) as reader:
        for start in starts:
            window = [int(token) for token in asked.text[start : start + length + 1]]
            found.append(reader.losses(window[:-1], window[1:]).double())
            reader.forget()
    losses = torch.stack(found).cpu()
    parts = [float(part.mean()) for part in losses.mean(0).chunk(min(POSITIONS, length))]
    places = np.asarray(starts)[:, None] + 1 + np.arange(length)  # of the tokens that are foreseen
    owners, by_package = np.asarray(asked.packages)[np.searchsorted(asked.ends, places, side="right")], {}
    for name in dict.fromkeys(asked.packages):
        own = losses[torch.from_numpy(owners == name)]
        if len(own):
            by_package[name] = {"tokens": len(own), "nll": float(own.mean())}
    nll = float(losses.mean())
    return {"nll": nll, "windows": count, "length": length, "by_position": parts, "by_package": by_package}


def context(asked: Asked) -> Stages:
    """Perplexity of the same pieces of text at several lengths of context, of which the longest is one piece; null
    where the text is shorter.
    """
    from lightning_megatron.inference.perplexity import perplexity

    multiples = [x for x in asked.options.multiples if x * asked.length < len(asked.text)]
    piece = max(multiples, default=0) * asked.length + 1
    count = max(1, min(len(asked.text), asked.options.context_tokens) // piece)
    starts = spread(len(asked.text), piece, count)

    def read(multiple: int, scaled: bool) -> dict:
        length, found = multiple * asked.length, []
        row = {"multiple": multiple, "context": length, "tokens": count * piece, "scaled": scaled}
        if multiple not in multiples:
            return {"rows": [row]}
        with asked.scaled(multiple) if scaled else contextlib.nullcontext():
            for start in starts:
                tokens = (int(token) for token in asked.text[start : start + piece])
                found.append(
                    perplexity(
                        asked.model, tokens, vocab_size=asked.vocabulary, context=length, chunk=asked.options.chunk
                    )
                )
        nll = statistics.fmean(x.nll for x in found)  # pieces are equally long
        buckets = [
            {"begin": same[0].begin, "end": same[0].end, "tokens": count * same[0].tokens}
            | {"nll": statistics.fmean(x.nll for x in same)}
            for same in zip(*(x.buckets for x in found), strict=True)
        ]
        return {"rows": [row | {"nll": nll, "perplexity": math.exp(nll), "buckets": buckets}]}

    for multiple in asked.options.multiples:
        for scaled in asked.angles(multiple) if multiple in multiples else (False,):
            yield functools.partial(read, multiple, scaled)


def recall(asked: Asked) -> Stages:
    """Multi-query associative recall; numbers of pairs whose lines are longer than the training length are left out."""
    words = tasks.word_tokens(asked.processor)
    equals, newline = asked.encode("=")[-1], asked.encode("\n")[-1]

    def ask(form: str, pairs: int) -> dict:
        rng = random.Random(SEED + pairs)
        cases = [tasks.recall(words, equals, newline, form, pairs, rng) for _ in range(asked.options.cases)]
        row = {"form": form, "pairs": pairs, "chance": 1 / pairs}
        return {"rows": [row | tasks.score_recall(cases, asked.logits)]}

    for form in tasks.FORMS:
        for pairs in asked.options.pairs:
            if 8 * pairs <= asked.length and 2 * pairs <= len(words):
                yield functools.partial(ask, form, pairs)


def copy(asked: Asked) -> Stages:
    """Copies of an identifier from further and further away."""
    pieces = [asked.processor.id_to_piece(token)[1:] for token in tasks.word_tokens(asked.processor)]
    rng = random.Random(SEED)
    for distance in (asked.length // 16, asked.length // 2, 4 * asked.length):
        if 2 * distance <= len(asked.text):
            each = range(asked.options.cases)
            cases = [tasks.copy(asked.text, asked.encode, pieces, distance, rng) for _ in each]
            yield functools.partial(asked.score, cases)


def needle(asked: Asked) -> Stages:
    """A needle by length and depth; lengths beyond the held-out text are left out."""
    rng = random.Random(SEED)
    for multiple in asked.options.multiples:
        length = multiple * asked.length
        if length <= len(asked.text):
            count = max(min(FEWEST, asked.options.cases), asked.options.cases // multiple)
            depths = [x for x in asked.options.depths for _ in range(count)]
            cases = [tasks.needle(asked.text, asked.encode, length, x, rng) for x in depths]
            yield functools.partial(asked.score, cases)


TASKS: dict[str, Callable[[Asked], Stages]] = {
    "loss": loss, "context": context, "recall": recall, "copy": copy, "needle": needle,
}  # fmt: skip


OPTIONS = {  # that decide what a task asks
    "loss": ("loss_tokens",), "context": ("context_tokens", "multiples"), "recall": ("pairs", "cases"),
    "copy": ("cases",), "needle": ("multiples", "depths", "cases"),
}  # fmt: skip


def asked_with(name: str, options: Namespace) -> dict:
    """The options of a task, as JSON holds them."""
    found = {key: getattr(options, key) for key in OPTIONS[name]}
    return {key: list(value) if isinstance(value, (list, tuple)) else value for key, value in found.items()}


def others(name: str, task: dict, options: Namespace) -> str:
    """With which other options a task was asked; empty if with these, or if an older file does not say."""
    now = asked_with(name, options)
    was = task.get("asked", now)
    return ", ".join(f"--{key.replace('_', '-')} {was[key]}, not {now[key]}" for key in now if was[key] != now[key])


def check_data(folder: Path, data: dict) -> None:
    """Refuse data that are not those of the training, whose tokens would mean something else.

    Raises:
        ValueError: naming both.
    """
    path = folder / "run.json"
    trained = json.loads(path.read_text("utf-8"))["data"] if path.is_file() else None
    if trained not in (None, now := data["sha256"]["train_text_document.bin"]):
        raise ValueError(
            f"{folder.name} was trained on data of SHA-256 {trained[:12]}, and --data has {now[:12]}: give the folder "
            "of the training"
        )


def held_out(data: Path) -> list:
    """The held-out documents, each an array of tokens: copies, since the data set takes its memory with it."""
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = IndexedDataset(str(data / "valid_text_document"))
    return [np.array(documents[i]) for i in range(len(documents))]


def evaluate(folder: Path, options: Namespace) -> dict:
    """All stages of the tasks of ``options`` that RUN/evaluate.json does not have yet; returns what it holds then.

    Raises:
        LoadError: no checkpoint there that can be loaded.
        ValueError: other data than those of the training, or a task that was begun with other options.
    """
    import sentencepiece

    from lightning_megatron.inference.command import build_tokenizer, tokenizer_args
    from lightning_megatron.inference.loading import loaded_model, read_checkpoint

    data = stats(options.data)
    check_data(folder, data)
    load, path = folder / "checkpoint", folder / "evaluate.json"
    saved, model_file = read_checkpoint(load), str(options.data / "tokenizer.model")
    step = int((load / TRACKER).read_text())
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if found.get("step") != step:
        found = {"run": folder.name, "step": step, "tasks": {}}
    if options.again:
        found["tasks"] = {name: task for name, task in found["tasks"].items() if name not in options.tasks}
    missing = [name for name in options.tasks if UNFINISHED in found["tasks"].get(name, {UNFINISHED: 0})]
    for name, task in found["tasks"].items():
        if name in options.tasks and (other := others(name, task, options)):
            if name in missing:
                raise ValueError(f"{path}: task {name} was begun with {other}: give those, or --again to begin anew")
            print(f"{folder.name}: {name} is there, asked with {other}; --again asks anew", flush=True)
    if not missing:
        return found
    chosen = Namespace(load=load, tokenizer_type=None, tokenizer_model=model_file)
    tokenizer = build_tokenizer(tokenizer_args(chosen, saved.args))
    processor = sentencepiece.SentencePieceProcessor(model_file=model_file)
    flags = ["--transformer-impl", "local", *options.flags]  # whose softmax layers read texts in chunks
    with loaded_model(saved, vocab_size=tokenizer.vocab_size, flags=flags) as model:
        packages = data["valid_packages"]
        documents, length = held_out(options.data), saved.args.seq_length
        asked = Asked(model, tokenizer.vocab_size, processor, documents, packages, options, length)
        for name in missing:
            task = found["tasks"].setdefault(name, {"seconds": 0.0, UNFINISHED: 0})
            task.setdefault("asked", asked_with(name, options))
            for stage in itertools.islice(TASKS[name](asked), task[UNFINISHED], None):
                start = time.time()
                more = stage()
                rows = task.get("rows", []) + more.get("rows", [])
                task.update(more | ({"rows": rows} if rows else {}) | {"card": card(options.gpu), **when()})
                task["seconds"] = round(task["seconds"] + time.time() - start, 1)
                task[UNFINISHED] += 1
                write_json(path, found)
            if not task.pop(UNFINISHED):  # no text is long enough
                task["rows"] = []
            write_json(path, found)
            print(f"{folder.name}: {name} in {task['seconds']} s", flush=True)
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
    add("--chunk", type=int, default=65536, help="tokens read at once (%(default)s)")
    add("--flags", nargs=argparse.REMAINDER, default=[], metavar="FLAG", help="more flags of loading, last on the line")
    return made


def main(argv: list[str] | None = None) -> None:
    from lightning_megatron.inference.command import start

    options = parser().parse_args(argv)
    options.data, options.gpu = options.data.resolve(), torch.cuda.is_available()
    start("evaluate")
    from lightning_megatron.inference.loading import LoadError  # which imports Megatron

    for folder in options.runs:
        try:
            evaluate(folder.resolve(), options)
        except (LoadError, ValueError) as error:
            raise SystemExit(f"evaluate: {error}") from error


if __name__ == "__main__":
    main()
