"""Train and evaluate several variants on a machine that is lent for a while.

    python -m examples.quality.session 7:1 softmax@2 --data data/quality/data --runs runs --results out --seconds 1500

A job is VARIANT or VARIANT@SEED, either with /LR, such as softmax@2/1e-3. One after the other they are trained and,
once complete, evaluated, with --beside while the next one trains; after every stage their JSON is in --results, so that
a cut leaves what there is. Everything ends within --seconds. The same command goes on where it stopped; words behind --
go to ``evaluate``. Exit status 1 if a job failed; the others are done all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from examples.mortal import end_with_parent

from . import ROOT, results, train
from .variants import variant

Start = Callable[[str, list[str], float], None]


def start(module: str, words: list[str], seconds: float) -> None:
    """Run a module as its command, in a process of its own: one that has Megatron already cannot turn to the CPU.

    Raises:
        RuntimeError: it failed, or took longer.
    """
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        ended = subprocess.run(
            [sys.executable, "-m", module, *words], cwd=ROOT, env=env, timeout=max(1.0, seconds),
            preexec_fn=end_with_parent,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{module} did not end in {seconds:.0f} s") from error
    if ended.returncode:
        raise RuntimeError(f"{module}: exit status {ended.returncode}")


def session(options: argparse.Namespace, run: train.Run = train.launch, begin: Start = start) -> dict[str, str]:
    """All jobs of ``options``; returns what became of each: its state, or the error.

    Args:
        run: starts a training, as ``train.launch``.
        begin: runs a module with a command line, as ``start``.

    Raises:
        ValueError: an unknown variant, or the folder of another run.
    """
    end = time.time() + options.seconds
    found: dict[str, str] = {}

    def ended(job: str, one: argparse.Namespace, what: Callable[[], str]) -> None:
        try:
            found[job] = what()
        except RuntimeError as error:
            found[job] = f"failed: {error}"
        results.collect(options.runs, options.results, [train.folder_of(one).name])
        print(f"==> {job}: {found[job].splitlines()[0]}, {end - time.time():.0f} s are left", flush=True)

    asked: list[Future] = []
    with ThreadPoolExecutor(1) as beside:
        for job, one in {job: _one(job, options) for job in options.jobs}.items():
            one.shared |= not all(future.done() for future in asked)
            ended(job, one, lambda one=one: _train(one, options, end, run))
            if found[job] == "complete" and not options.train_only:
                asked.append(beside.submit(ended, job, one, lambda one=one: _evaluate(one, options, end, begin)))
                if not options.beside:
                    asked[-1].result()
        for future in asked:
            future.result()
    return found


def _train(one: argparse.Namespace, options: argparse.Namespace, end: float, run: train.Run) -> str:
    """The state of the run then."""
    one.seconds = end - time.time()
    folder = train.folder_of(one)
    if one.seconds > one.reserve:
        train.train(one, run)
    return train.state(folder) if (folder / "run.json").is_file() else "no time"


def _evaluate(one: argparse.Namespace, options: argparse.Namespace, end: float, begin: Start) -> str:
    folder, left = train.folder_of(one), end - time.time()
    if left <= 0:
        return "complete"
    begin("examples.quality.evaluate", [str(folder), "--data", str(options.data), *options.questions], left)
    tasks = json.loads((folder / "evaluate.json").read_text("utf-8"))["tasks"]
    return f"complete, with {', '.join(tasks)}"


def _one(job: str, options: argparse.Namespace) -> argparse.Namespace:
    """Options of ``train`` for a job.

    Raises:
        ValueError: no such variant, or no number behind @ or /.
    """
    word, _, lr = job.partition("/")
    name, _, seed = word.partition("@")
    variant(name)
    try:
        more = {"variant": name, "seed": int(seed or 1), "lr": float(lr or options.lr)}
    except ValueError as error:
        raise ValueError(f"job {job!r} is not VARIANT[@SEED][/LR], such as softmax@2/1e-3: {error}") from error
    return argparse.Namespace(**vars(options) | more | {"tag": "", "stop_at": None, "flags": []})


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("jobs", nargs="+", metavar="JOB", help="VARIANT or VARIANT@SEED, and /LR in place of --lr")
    made.add_argument("--results", type=Path, required=True, help="folder for the JSON of all runs")
    made.add_argument(
        "--beside", action="store_true", help="evaluate while the next one trains, whose speed then does not count"
    )
    made.add_argument("--train-only", action="store_true", help="evaluate nothing: for speeds")
    return train.add_options(made)


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    cut = words.index("--") if "--" in words else len(words)
    options = parser().parse_args(words[:cut])
    options.questions = words[cut + 1 :]
    options.data, options.runs = options.data.resolve(), options.runs.resolve()
    try:
        found = session(options)
    except ValueError as error:
        raise SystemExit(f"session: {error}") from error
    for job, what in found.items():
        print(f"{job}: {what}", flush=True)
    if any(what.startswith("failed") for what in found.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
