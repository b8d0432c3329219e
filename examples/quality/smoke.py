"""The whole pipeline at toy size on a CPU, without a network: ``make quality-smoke``, under 5 minutes on 2 cores.

    python -m examples.quality.smoke [--out folder]

Corpus of the standard library and this repository, tokenizer, shards, three variants of which one in two stretches,
evaluation, fidelity, report. Each step runs as its command does, and what it wrote is checked.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import ROOT, corpus, evaluate, fidelity, report, tokens, train
from .variants import SIZES

CHOSEN = ("lightning", "3:1", "softmax")


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


TOY = Scale(
    "toy", 60, 80, 1_000_000, 6,
    ("--loss-tokens", "12800", "--context-tokens", "8400", "--pairs", "4", "8", "--cases", "1", "--depths", "0.5"),
)  # fmt: skip


def command(module: str, words: list[str]) -> None:
    """Run a module as its command, in a process of its own: one that has Megatron already cannot turn to the CPU."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-m", module, *words], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 0, f"{module}: exit status {ended.returncode}\n{ended.stderr[-3000:]}"


def step(title: str, work: Callable[[], object]) -> None:
    start = time.time()
    print(f"==> {title}", flush=True)
    work()
    print(f"    {time.time() - start:.0f} s", flush=True)


def pipeline(out: Path, scale: Scale, run: Callable = train.launch, start: Callable = command) -> None:
    """All steps into ``out``, an empty folder.

    Args:
        run: starts a training, as ``train.launch``.
        start: runs a module with a command line, as ``command``.

    Raises:
        AssertionError: a step did not do what it must.
    """
    data, runs, shape = out / "data", out / "runs", SIZES[scale.size]
    local = ["--local", "--held-out", "0.05", *(["--packages", str(scale.packages)] if scale.packages else [])]
    step("corpus", lambda: corpus.main(["--out", str(out), *local]))
    words = ["--out", str(out), "--vocab-size", str(shape.vocabulary), "--sample-bytes", str(scale.sample_bytes)]
    step("tokenizer, datasets", lambda: tokens.main(["prepare", *words]))
    before = (data / "train_text_document.bin").read_bytes()
    step("shards", lambda: tokens.main(["split", "--out", str(out), "--megabytes", "9"]))
    (data / "train_text_document.bin").unlink()
    step("shards joined", lambda: tokens.main(["join", "--out", str(out)]))
    assert (data / "train_text_document.bin").read_bytes() == before

    count = str(scale.steps * shape.batch * shape.seq_length)
    common = ["--data", str(data), "--runs", str(runs), "--size", scale.size, "--tokens", count, "--lr", "3e-3"]
    common += ["--eval-iters", "1"]
    folders = []
    for name in CHOSEN:
        words = ["--variant", name, *common]
        half = ["--stop-at", str(scale.steps // 2)] if name == "3:1" else []
        if half:
            step(f"{name}: first half", lambda: train.train(train.parser().parse_args([*words, *half]), run))  # noqa: B023
        options = train.parser().parse_args(words)
        step(f"{name}: training", lambda: folders.append(train.train(options, run)))  # noqa: B023
    check_runs(folders, scale)
    words = [*map(str, folders), "--data", str(data), *scale.questions, "--chunk", "256"]
    step("evaluation", lambda: start("examples.quality.evaluate", words))
    for folder in folders:
        check_evaluation(json.loads((folder / "evaluate.json").read_text("utf-8")))

    words = ["--data", str(data), "--runs", str(runs), "--size", scale.size, "--steps", str(scale.fidelity_steps)]
    options = fidelity.parser().parse_args(["train", *words])
    step("fidelity: training", lambda: fidelity.train_paths(options, fidelity.ON_CPU, run))
    words = ["states", *words, "--states-tokens", "1000", "--chunk", "100"]
    step("fidelity: states", lambda: start("examples.quality.fidelity", words))
    check_fidelity(json.loads((runs / "fidelity.json").read_text("utf-8")))

    page, results = out / "quality.md", out / "results"
    page.write_text(f"# Quality\n\n{report.BEGIN}\n{report.END}\n")
    step("report", lambda: (report.collect(runs, results), report.write(results, page)))
    text = page.read_text("utf-8")
    for word in (
        *CHOSEN,
        "Perplexity by context",
        "Recall of N pairs",
        "Needle",
        "Copy",
        "Fidelity",
        "complete",
        ".png",
    ):
        assert word in text, f"the report lacks {word}"


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
    distances, rows = found["curves"]["distances"], found["states"]["rows"]
    assert set(distances) == set(fidelity.ON_CPU[1:]) and all(x["mean"] > 0 for x in distances.values())
    assert len(rows) == 10 and all(0 < row["weakest"] <= row["all"] for row in rows), rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="an empty folder for all results (default: one that is removed)")
    options = parser.parse_args(argv)
    if torch.cuda.is_available():
        raise SystemExit("quality-smoke runs on a CPU: set CUDA_VISIBLE_DEVICES= (empty)")
    start = time.time()
    if options.out is not None:
        pipeline(options.out.resolve(), TOY)
    else:
        with tempfile.TemporaryDirectory(prefix="quality-smoke-") as folder:
            pipeline(Path(folder), TOY)
    print(f"==> quality-smoke: all steps done and checked in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
