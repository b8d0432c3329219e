"""Train one variant with lightning_megatron.pretrain, in stretches: the same command again goes on.

    python -m examples.quality.train --variant 7:1 --data data/quality/data --runs runs --tokens 300e6 --seconds 540
    for variant in lightning 7:1; do ... ; done           # with CUDA_VISIBLE_DEVICES, a variant on each GPU

Writes RUNS/NAME/, NAME of variant, size, tokens, seed and learning rate:

    run.json        flags, parameters as Megatron counts them, commit, card, versions, seconds of each stretch
    losses.jsonl    a line for each step, as it comes: loss, gradient norm, learning rate, seconds
    valid.jsonl     a line for each validation
    checkpoint/     the last one, of Megatron
    log.txt         all that Megatron printed

A stretch that is cut in any way, by SIGKILL too, leaves its last checkpoint; the next one goes on from there, and drops
the lines of steps behind it. A loss that is no number ends a run for good: it is marked as diverged.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from examples import megatron_log
from examples.mortal import end_with_parent
from examples.provenance import output, when

from . import ROOT
from .variants import SIZES, WARM_UP, Size, flags

TRACKER = "latest_checkpointed_iteration.txt"
MODULE = "lightning_megatron.pretrain"
RESERVE = 30.0  # seconds of a stretch's limit for the step, validation and save under way
Run = Callable[[list[str], Path, bool, float], Iterable[str]]


def name_of(
    variant: str, size: str, tokens: float, seed: int, lr: float, tag: str = "", transformer_impl: str = "local"
) -> str:
    """The folder of a run, in letters that any file system takes."""
    words = [variant.replace(":", "to").replace(",", "-").replace("=", "-"), size, f"{tokens / 1e6:g}M"]
    words += [f"lr{lr:g}", f"seed{seed}", *(["te"] if transformer_impl == "transformer_engine" else [])]
    return "_".join(words + ([tag] if tag else []))


def steps_of(size: Size, tokens: float) -> int:
    return max(1, round(tokens / (size.batch * size.seq_length)))


def command(options: argparse.Namespace, folder: Path, gpu: bool) -> list[str]:
    """The training's module and its flags; ``options`` are those of ``parser``."""
    size = SIZES[options.size]
    steps = steps_of(size, options.tokens)
    micro = options.micro_batch or size.micro_batch
    words = flags(options.variant, size)
    words += f"""
        --micro-batch-size {micro} --global-batch-size {size.batch} --train-iters {steps} --seed {options.seed}
        --lr {options.lr:g} --min-lr {options.lr / 10:g} --lr-decay-style cosine
        --lr-warmup-iters {max(1, min(WARM_UP, steps // 5))} --clip-grad 1.0
        --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95
        --dataloader-inter-document-masking --cross-entropy-loss-fusion
        --tokenizer-type SentencePieceTokenizer --num-workers {2 if gpu else 0}
        --log-interval 1 --eval-interval {max(1, steps // 8)} --eval-iters {options.eval_iters}
        --save-interval {steps} --exit-signal-handler --no-check-for-nan-in-loss-and-grad
        --manual-gc --manual-gc-interval 100 --no-manual-gc-eval
    """.split()
    data, checkpoint = options.data, str(folder / "checkpoint")
    words += ["--tokenizer-model", str(data / "tokenizer.model"), "--data-cache-path", str(folder / "cache")]
    words += ["--train-data-path", str(data / "train_text_document")]
    words += ["--valid-data-path", str(data / "valid_text_document"), "--save", checkpoint, "--load", checkpoint]
    words += ["--transformer-impl", options.transformer_impl]
    words += ["--exit-interval", str(options.stop_at)] if options.stop_at else []
    words += ["--bf16"] if gpu and not options.fp32 else []
    return ["-m", options.module or MODULE, *words, *options.flags]


def launch(words: list[str], log: Path, gpu: bool, seconds: float) -> Iterator[str]:
    """Lines that the training prints, as they come; all goes to ``log``, too.

    After ``seconds`` it is told to save and end (SIGTERM, --exit-signal-handler). It is killed where the caller closes
    this generator before its end.

    Raises:
        RuntimeError: it failed; with the end of the log.
    """
    start = [sys.executable, *([] if gpu else ["examples/cpu_shim.py"]), *words]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("a") as file:
        process = subprocess.Popen(
            start, cwd=ROOT, env=env, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=end_with_parent,
        )  # fmt: skip
        assert process.stdout is not None
        timer = threading.Timer(seconds, process.terminate)
        timer.start()
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                yield line
            process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
    if process.returncode == -signal.SIGTERM:  # it had not come so far as to listen
        return
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}; {log} ends with\n" + log.read_text("utf-8")[-3000:])


def read_lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines; none where it is missing. A last line that was cut is left out."""
    text = path.read_text("utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def write_json(path: Path, value: dict) -> None:
    """The file is whole at any time."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value, indent=1) + "\n")
    new.replace(path)


def done(folder: Path) -> int:
    """Steps in the last checkpoint; 0 without one."""
    tracker = folder / "checkpoint" / TRACKER
    return int(tracker.read_text()) if tracker.is_file() else 0


def card(gpu: bool) -> str:
    import torch

    return torch.cuda.get_device_name() if gpu else f"CPU ({os.cpu_count()} cores)"


def stats(data: Path) -> dict:
    """What ``tokens`` says of its datasets.

    Raises:
        ValueError: it wrote none there.
    """
    path = data / "stats.json"
    if not path.is_file():
        raise ValueError(f"--data {data}: no {path.name} there; give the folder that examples.quality.tokens wrote")
    return json.loads(path.read_text("utf-8"))


def about(options: argparse.Namespace, gpu: bool) -> dict:
    """What a run is, whatever happens in it.

    Raises:
        ValueError: an unknown variant, or no data.
    """
    size = SIZES[options.size]
    steps = steps_of(size, options.tokens)
    return {
        "variant": options.variant, "size": options.size, "seed": options.seed, "lr": options.lr, "tag": options.tag,
        "tokens": steps * size.batch * size.seq_length, "seq_length": size.seq_length,
        "steps": steps, "fp32": options.fp32 or not gpu, "transformer_impl": options.transformer_impl,
        "shared": options.shared, "module": options.module or MODULE,
        "flags": flags(options.variant, size) + options.flags,
        "data": stats(options.data)["sha256"]["train_text_document.bin"],
    }  # fmt: skip


class Record:
    """The files of a run: run.json, and lines of steps and validations, which are on disk as soon as they come."""

    def __init__(self, folder: Path, what: dict):
        """Raises ValueError where the folder is of another run than ``what``."""
        self.path = folder / "run.json"
        self.run = json.loads(self.path.read_text("utf-8")) if self.path.is_file() else what | {"stretches": []}
        older = {"transformer_impl": "local", "shared": False, "module": MODULE}  # files that do not say
        self.run = older | self.run
        if other := [key for key, value in what.items() if key != "shared" and self.run.get(key) != value]:
            raise ValueError(f"{folder} is of a run with other {', '.join(other)}: give another --runs, or remove it")
        self.run["shared"] |= what["shared"]  # of one stretch is enough
        self._last: dict[str, int] = {}
        self._files = {name: folder / f"{name}.jsonl" for name in ("losses", "valid")}

    def save(self) -> None:
        write_json(self.path, self.run)

    def cut(self, last: int) -> None:
        """Drop what was read behind step ``last``, the checkpoint's: it is computed again."""
        for path in self._files.values():
            rows = [row for row in read_lines(path) if row["iteration"] <= last]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def end_of_killed(self) -> None:
        """A stretch that was killed with this program has None as its ``to``; it took time up to its last row."""
        for stretch in self.run["stretches"][-1:]:
            if stretch["to"] is None and self._files["losses"].is_file():
                took = self._files["losses"].stat().st_mtime - stretch["began"]
                stretch["wall_seconds"] = round(max(0.0, took), 1)

    def add(self, name: str, row: dict) -> None:
        """One row; a second validation at the same step, which Megatron makes at the end, is left out."""
        if self._last.get(name) == row["iteration"]:
            return
        self._last[name] = row["iteration"]
        with self._files[name].open("a") as file:
            file.write(json.dumps(row) + "\n")


def train(options: argparse.Namespace, run: Run = launch) -> Path:
    """Train until the end, the time limit or ``--stop-at``; returns the folder of the run.

    Args:
        options: of ``parser``.
        run: starts Megatron; yields what it prints.

    Raises:
        ValueError: the folder is of another run, or there is no data, or no such variant.
        RuntimeError: the training failed.
    """
    import torch

    start, gpu = time.time(), torch.cuda.is_available()
    options.data, options.runs = options.data.resolve(), options.runs.resolve()
    folder, what = folder_of(options), about(options, gpu)
    folder.mkdir(parents=True, exist_ok=True)
    record, steps, before = Record(folder, what), what["steps"], done(folder)
    if before >= steps or "diverged" in record.run:
        print(f"{folder.name}: {state(folder)}", flush=True)
        return folder
    record.end_of_killed()
    record.cut(before)
    stretch: dict = {"from": before, "to": None, "began": start, "card": card(gpu), **when(), **versions()}
    record.run["stretches"].append(stretch)
    record.save()
    left = start + options.seconds - options.reserve - time.time()
    lines = run(command(options, folder, gpu), folder / "log.txt", gpu, max(1.0, left))
    last, time_of_steps = before, 0.0
    try:
        for row in megatron_log.read(lines):
            if isinstance(row, megatron_log.Parameters):
                record.run["parameters"] = row.count
            elif isinstance(row, megatron_log.Validation):
                record.add("valid", {"iteration": row.iteration, "valid_loss": row.loss})
            else:
                last, time_of_steps = row.iteration, time_of_steps + row.seconds
                loss = math.nan if row.loss is None else row.loss  # Megatron leaves out what is no number
                step = {key: value for key, value in row._asdict().items() if key != "last"}
                record.add("losses", step | {"loss": loss})
                if not math.isfinite(loss):
                    record.run["diverged"] = last
                    break
                if last % max(1, steps // 20) == 0:
                    print(f"{folder.name}: step {last}/{steps} loss {loss:.4f}", flush=True)
    finally:
        if close := getattr(lines, "close", None):
            close()  # kills Megatron, unless it has ended
        stretch |= {"to": done(folder), "read": last, "wall_seconds": round(time.time() - start, 1)}
        stretch |= {"gpu_seconds": round(time_of_steps, 1)}
        record.save()
    print(f"{folder.name}: {state(folder)}", flush=True)
    return folder


def folder_of(options: argparse.Namespace) -> Path:
    name = name_of(
        options.variant, options.size, options.tokens, options.seed, options.lr, options.tag, options.transformer_impl
    )
    return options.runs / name


def state(folder: Path) -> str:
    """complete, diverged, or how many steps are saved."""
    run = json.loads((folder / "run.json").read_text("utf-8"))
    if "diverged" in run:
        return f"diverged at step {run['diverged']}"
    return "complete" if done(folder) >= run["steps"] else f"{done(folder)} of {run['steps']} steps are saved"


def versions() -> dict[str, str]:
    import torch

    found = {"torch": torch.__version__}
    found["driver"] = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    names = {"megatron": "megatron-core", "triton": "triton", "transformer_engine": "transformer-engine"}
    for key, name in names.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[key] = importlib.metadata.version(name)
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--variant", required=True, help="of variants.py, such as lightning, 7:1, softmax")
    add("--seed", type=int, default=1, help="of values at the start and of the data order (%(default)s)")
    add("--stop-at", type=int, metavar="N", help="end the stretch at a step that N divides")
    add("--tag", default="", help="a word more in the name of the run")
    add("flags", nargs="*", metavar="-- FLAG", help="more flags of the training, behind --")
    return add_options(made)


def add_options(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds what variants that are compared have in common."""
    add = made.add_argument
    add("--data", type=Path, required=True, help="folder with tokenizer and datasets")
    add("--runs", type=Path, required=True, help="folder of all runs")
    add("--size", default="base", choices=SIZES, help="of the model (%(default)s)")
    add("--tokens", type=float, default=300e6, help="of the whole training (%(default)g)")
    add("--lr", type=float, default=1e-3, help="largest learning rate (%(default)g)")
    add("--seconds", type=float, default=540, help="after which it has saved and ended (%(default)g)")
    add("--reserve", type=float, default=RESERVE, help="of these, for the last step and the save (%(default)g)")
    add("--micro-batch", type=int, help="sequences of a pass (default: by the size)")
    add("--eval-iters", type=int, default=4, help="batches of a validation (%(default)s)")
    add("--fp32", action="store_true", help="train in fp32, not bf16 (a CPU always does)")
    add("--shared", action="store_true", help="others use the GPU at the same time: its seconds are no speed")
    layers = ("local", "transformer_engine")
    add("--transformer-impl", default="local", choices=layers, help="whose layers surround attention (%(default)s)")
    made.set_defaults(module=None)
    return made


def main(argv: list[str] | None = None) -> None:
    try:
        train(parser().parse_args(argv))
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"train: {error}") from error


if __name__ == "__main__":
    main()
