"""The whole pipeline at toy size on a CPU, without a network: ``make quality-smoke``, under 5 minutes on 2 cores.

    python -m examples.quality.smoke [--out folder]

Corpus of the standard library and this repository, tokenizer, shards; three variants, trained and evaluated by
``session``; fidelity; report. One training ends early, is killed (SIGKILL) in its next stretch and goes on: its last
checkpoint must hold the bits of a training that was left alone. One is stopped by its time limit. Each step runs as
its command does, and what it wrote is checked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from examples import megatron_log

from . import corpus, evaluate, fidelity, report, session, tokens, train
from .variants import MAIN, SIZES, Plan

CHOSEN = ("3:1", "lightning", "softmax")  # the first one is cut


@dataclass(frozen=True)
class Scale:
    """How much is done."""

    size: str
    steps: int
    packages: int | None
    """Of the corpus."""
    sample_bytes: int
    fidelity_steps: int
    questions: tuple[str, ...]
    """Options of evaluate."""
    seconds: float | None = None
    """Limit of a training that must end by it; None for no such training."""
    variants: tuple[str, ...] = CHOSEN


TOY = Scale(
    "toy", 30, 60, 500_000, 6,
    ("--loss-tokens", "6400", "--context-tokens", "8400", "--pairs", "4", "8", "--cases", "1", "--depths", "0.5"),
    seconds=60,
)  # fmt: skip


def cut_at(step: int) -> train.Run:
    """Megatron, killed once it has printed ``step``."""

    def cut(words: list[str], log: Path, gpu: bool, seconds: float) -> Iterator[str]:
        read = megatron_log.Reader()
        with contextlib.closing(train.launch(words, log, gpu, seconds)) as lines:
            for line in lines:
                yield line
                if isinstance(row := read(line), megatron_log.Step) and row.iteration == step:
                    raise RuntimeError("killed")

    return cut


class Pipeline:
    """The steps, into ``out``, an empty folder.

    Args:
        run: starts a training, as ``train.launch``.
        begin: runs a module with a command line, as ``session.start``.
        cut: ``cut(step)`` is a ``run`` that is killed behind that step.

    Every method raises AssertionError where a step did not do what it must.
    """

    def __init__(
        self, out: Path, scale: Scale, run: train.Run = train.launch, begin: session.Start = session.start,
        cut: Callable[[int], train.Run] = cut_at,
    ):  # fmt: skip
        self.out, self.scale, self.run, self.begin, self.cut = out, scale, run, begin, cut
        self.data, self.runs, self.results, self.shape = out / "data", out / "runs", out / "results", SIZES[scale.size]
        self.tokens = scale.steps * self.shape.batch * self.shape.seq_length

    def text(self) -> None:
        local = ["--local", "--held-out", "0.05"]
        local += ["--packages", str(self.scale.packages)] if self.scale.packages else []
        step("corpus", lambda: corpus.main(["--out", str(self.out), *local]))
        words = ["--vocab-size", str(self.shape.vocabulary), "--sample-bytes", str(self.scale.sample_bytes)]
        step("tokenizer, datasets", lambda: tokens.main(["prepare", "--out", str(self.out), *words]))
        before = (self.data / "train_text_document.bin").read_bytes()
        step("shards", lambda: tokens.main(["split", "--out", str(self.out), "--megabytes", "9"]))
        (self.data / "train_text_document.bin").unlink()
        step("shards joined", lambda: tokens.main(["join", "--out", str(self.out)]))
        assert (self.data / "train_text_document.bin").read_bytes() == before

    def common(self, runs: Path, tokens: int | None = None) -> list[str]:
        words = ["--data", str(self.data), "--runs", str(runs), "--size", self.scale.size, "--lr", "3e-3"]
        return [*words, "--tokens", str(tokens or self.tokens), "--eval-iters", "1"]

    def train(self, runs: Path, *words: str, run: train.Run | None = None) -> Path:
        options = train.parser().parse_args([*self.common(runs), "--variant", self.scale.variants[0], *words])
        return train.train(options, run or self.run)

    def cuts(self) -> None:
        """A training in three stretches, of which the second one is killed, and its twin in one."""
        third = self.scale.steps // 3
        whole = self.out / "whole"

        def in_stretches() -> None:
            folder = self.train(self.runs, "--stop-at", str(third))
            assert train.done(folder) == third
            with contextlib.suppress(RuntimeError):
                self.train(self.runs, run=self.cut(2 * third))
            kept, lines = train.done(folder), train.read_lines(folder / "losses.jsonl")
            assert kept == third and lines[-1]["iteration"] >= 2 * third, f"{kept} saved, {lines[-1]} read"
            self.train(self.runs)

        side_by_side("one left alone, one in three stretches", lambda: self.train(whole), in_stretches)
        (folder,) = whole.glob("*/")
        found, alone = ((runs / folder.name) for runs in (self.runs, whole))
        check_same(found / "checkpoint", alone / "checkpoint")
        both = [[row["loss"] for row in train.read_lines(x / "losses.jsonl")] for x in (found, alone)]
        gap = max(abs(x - y) for x, y in zip(*both, strict=True))
        assert gap < 4e-6, (
            f"losses differ by {gap}"
        )  # Megatron prints six digits, and a mean for the second of a process
        print(f"    {len(both[0])} losses and all bits of the checkpoints are equal")

    def limit(self) -> None:
        """A training that takes hours, stopped and saved in time."""
        seconds = self.scale.seconds
        assert seconds is not None
        words = ["--variant", "lightning", "--tag", "limit", "--seconds", str(seconds), "--reserve", str(seconds / 4)]
        options = train.parser().parse_args([*self.common(self.runs, 10_000 * self.tokens), *words])
        start = time.time()
        folder = train.train(options, self.run)
        took, steps = time.time() - start, train.done(folder)
        assert took <= seconds, f"a limit of {seconds} s ended after {took:.1f} s"
        read = len(train.read_lines(folder / "losses.jsonl"))
        assert 0 < steps == read, f"{steps} steps are saved, {read} were read in {took:.0f} s"
        print(f"    {steps} steps and their checkpoint in {took:.1f} s of {seconds:g}")

    def session(self) -> None:
        """All variants, one command for each core."""
        rest = self.scale.variants[1:]

        def of(*jobs: str) -> Callable[[], None]:
            words = [*jobs, *self.common(self.runs), "--results", str(self.results)]
            options = session.parser().parse_args(words)
            options.questions = [*self.scale.questions, "--chunk", "256"]
            return lambda: check_session(session.session(options, self.run, self.begin))

        side_by_side(f"session: {', '.join(self.scale.variants)}", of(self.scale.variants[0], *rest[1:]), of(rest[0]))
        folders = [path.parent for path in self.runs.glob("*/evaluate.json")]
        assert len(folders) == len(self.scale.variants), folders
        check_runs(folders, self.scale)
        for folder in folders:
            check_evaluation(json.loads((folder / "evaluate.json").read_text("utf-8")))

    def fidelity(self) -> None:
        words = ["--data", str(self.data), "--runs", str(self.runs), "--size", self.scale.size]
        words += ["--steps", str(self.scale.fidelity_steps), "--together", "1"]  # the time limit has the other core
        options = fidelity.parser().parse_args(["train", *words])
        options.questions = list(self.scale.questions[:2])
        step("fidelity: training", lambda: fidelity.train_paths(options, fidelity.ON_CPU, self.run, self.begin))
        words = ["states", *words, "--states-tokens", "1000", "--chunk", "100"]
        step("fidelity: states", lambda: self.begin("examples.quality.fidelity", words, 600))
        check_fidelity(fidelity.held(self.runs))

    def report(self) -> None:
        page = self.out / "quality.md"
        page.write_text(f"# Quality\n\n{report.BEGIN}\n{report.END}\n")
        plan = Plan(self.scale.size, self.tokens, self.tokens / 5, self.scale.size, self.tokens / 10, "local")
        step("report", lambda: (report.collect(self.runs, self.results), report.write(self.results, page, plan)))
        check_page(page.read_text("utf-8"), self.scale)


def step(title: str, work: Callable[[], object]) -> None:
    start = time.time()
    print(f"==> {title}", flush=True)
    work()
    print(f"    {time.time() - start:.0f} s", flush=True)


def side_by_side(title: str, *work: Callable[[], object]) -> None:
    """Each on a core of its own."""

    def all_of_it() -> None:
        with ThreadPoolExecutor(len(work)) as pool:
            for one in [pool.submit(x) for x in work]:
                one.result()

    step(title, all_of_it)


def pipeline(made: Pipeline) -> None:
    """All of it."""
    made.text()
    made.cuts()
    made.session()
    if made.scale.seconds is not None:
        side_by_side("fidelity; a time limit", made.fidelity, made.limit)
    else:
        made.fidelity()
    made.report()


# ---- what must hold --------------------------------------------------------------------------------------------------


def check_same(*checkpoints: Path) -> None:
    """Weights, optimizer, and states of random generators of the last checkpoints have the same bits."""
    one, other = (stored(path / f"iter_{int((path / train.TRACKER).read_text()):07d}") for path in checkpoints)
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    kinds = {kind for kind in ("optimizer", "rng_state", "decoder") if any(kind in key for key in one)}
    assert kinds == {"optimizer", "rng_state", "decoder"}, f"the checkpoint holds {sorted(one)[:20]}"
    unequal = [key for key, value in one.items() if not same(value, other[key])]
    assert not unequal, f"{len(unequal)} of {len(one)} differ: {unequal[:5]}"


def stored(folder: Path) -> dict[str, object]:
    """All tensors of a checkpoint, and the states of random generators."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(folder)
    state: dict[str, object] = {}
    for key, about in reader.read_metadata().state_dict_metadata.items():
        if isinstance(about, TensorStorageMetadata):
            state[key] = torch.empty(about.size, dtype=about.properties.dtype)
        elif "rng_state" in key:
            state[key] = None
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def same(one: object, other: object) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(np.array_equal(one, other)) if isinstance(one, np.ndarray) else one == other


def check_session(found: dict[str, str]) -> None:
    for job, what in found.items():
        assert what == f"complete, with {', '.join(evaluate.TASKS)}", f"{job}: {what}"


def check_runs(folders: list[Path], scale: Scale) -> None:
    counts = {}
    for folder in folders:
        run, rows = json.loads((folder / "run.json").read_text("utf-8")), train.read_lines(folder / "losses.jsonl")
        losses = [row["loss"] for row in rows]
        assert [row["iteration"] for row in rows] == list(range(1, scale.steps + 1)), f"steps of {folder.name}"
        part = max(1, scale.steps // 6)
        first, last = statistics.mean(losses[:part]), statistics.mean(losses[-part:])
        assert last < first - 0.05, f"{folder.name}: the loss went from {first:.3f} to {last:.3f}"
        counts[run["variant"]] = run["parameters"]
        cut = run["variant"] == scale.variants[0]
        third = scale.steps // 3
        ends = [(0, third), (third, third), (third, scale.steps)] if cut else [(0, scale.steps)]
        assert [(x["from"], x["to"]) for x in run["stretches"]] == ends, run["stretches"]
    assert max(counts.values()) <= 1.02 * min(counts.values()), f"parameters differ by more than 2%: {counts}"


def check_evaluation(found: dict) -> None:
    done = found["tasks"]
    assert set(done) == set(evaluate.TASKS), f"tasks {set(done)}"
    assert done["loss"]["windows"] > 0 and len(done["loss"]["by_position"]) > 1
    assert any("perplexity" in row for row in done["context"]["rows"])
    for name in ("recall", "needle", "copy"):
        assert done[name]["rows"], f"{name} has no row"
    assert all(0 <= row["among"] <= 1 for row in done["recall"]["rows"])


def check_fidelity(found: dict) -> None:
    distances = found["curves"]["distances"]
    (states,) = found["states"].values()
    assert set(distances) == set(fidelity.ON_CPU[1:]), distances
    exact = distances.pop("torch-fp64")  # may be the same in all digits that Megatron prints
    assert exact["to"] == "torch-fp32" and exact["largest"] < 1e-3, exact
    assert all(x["largest"] > 0 and x["difference"] for x in distances.values()), distances
    assert len(states["rows"]) == 10 and all(0 < row["weakest"] <= row["all"] for row in states["rows"]), states


def check_page(text: str, scale: Scale) -> None:
    """All that was done is told, and all that was not is missing by name."""
    titles = "equal GPU time|by position|Perplexity by context|Recall of N|Needle, nats|Copy|Ablations|Learning rates"
    for word in (*titles.split("|"), *scale.variants, "Fidelity", "complete", "loss.png", "recall.png", "needle.png"):
        assert word in text, f"the report lacks {word}"
    left = [name for name in MAIN if name not in scale.variants]
    told = text.split("Missing, of ")[1].splitlines()[0]
    assert all(f"`{name}`" in told for name in left) and f"| `{left[0]}` | missing |" in text, told
    if scale.seconds is not None:
        assert "stopped at" in text, "the report lacks the run that its time limit stopped"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="an empty folder for all results (default: one that is removed)")
    options = parser.parse_args(argv)
    if torch.cuda.is_available():
        raise SystemExit("quality-smoke runs on a CPU: set CUDA_VISIBLE_DEVICES= (empty)")
    start = time.time()
    with contextlib.ExitStack() as stack:
        folder = options.out or stack.enter_context(tempfile.TemporaryDirectory(prefix="quality-smoke-"))
        pipeline(Pipeline(Path(folder).resolve(), TOY))
    print(f"==> quality-smoke: all steps done and checked in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
