"""Train one variant with lightning_megatron.pretrain, in stretches: the same command again goes on.

    python -m examples.quality.train --variant 7:1 --data data/quality/data --runs runs --tokens 300e6 --minutes 9
    for variant in lightning 7:1; do ... ; done           # with CUDA_VISIBLE_DEVICES, a variant on each GPU

Writes RUNS/NAME/, NAME of variant, size, tokens, seed and learning rate:

    run.json        flags, parameters as Megatron counts them, commit, card, versions, seconds of each stretch
    losses.jsonl    a line for each step: loss, gradient norm, learning rate, seconds
    valid.jsonl     a line for each validation
    checkpoint/     the last one, of Megatron
    log.txt         all that Megatron printed
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from examples import megatron_log
from examples.provenance import output, when

from . import ROOT
from .variants import SIZES, Size, flags

TRACKER = "latest_checkpointed_iteration.txt"
MODULE = "lightning_megatron.pretrain"


def name_of(variant: str, size: str, tokens: float, seed: int, lr: float, tag: str = "") -> str:
    """The folder of a run, in letters that any file system takes."""
    words = (variant.replace(":", "to").replace(",", "-").replace("=", "-"), size, f"{tokens / 1e6:g}M")
    return "_".join((*words, f"lr{lr:g}", f"seed{seed}", *([tag] if tag else [])))


def steps_of(size: Size, tokens: float) -> int:
    return max(1, round(tokens / (size.batch * size.seq_length)))


def command(options: argparse.Namespace, folder: Path, gpu: bool) -> list[str]:
    """Flags of the training; ``options`` are those of ``parser``."""
    size = SIZES[options.size]
    steps = steps_of(size, options.tokens)
    micro = options.micro_batch or size.micro_batch
    words = flags(options.variant, size)
    words += f"""
        --micro-batch-size {micro} --global-batch-size {size.batch} --train-iters {steps} --seed {options.seed}
        --lr {options.lr:g} --min-lr {options.lr / 10:g} --lr-decay-style cosine
        --lr-warmup-iters {max(1, steps // 20)} --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --clip-grad 1.0
        --dataloader-inter-document-masking --cross-entropy-loss-fusion
        --tokenizer-type SentencePieceTokenizer --num-workers {2 if gpu else 0}
        --log-interval 1 --eval-interval {max(1, steps // 8)} --eval-iters {options.eval_iters}
        --save-interval {steps} --exit-duration-in-mins {options.minutes}
    """.split()
    data, checkpoint = options.data, str(folder / "checkpoint")
    words += ["--tokenizer-model", str(data / "tokenizer.model"), "--data-cache-path", str(folder / "cache")]
    words += ["--train-data-path", str(data / "train_text_document")]
    words += ["--valid-data-path", str(data / "valid_text_document"), "--save", checkpoint, "--load", checkpoint]
    words += ["--exit-interval", str(options.stop_at)] if options.stop_at else []
    words += ["--bf16"] if gpu and not options.fp32 else []
    return words + options.flags


def launch(words: list[str], log: Path, gpu: bool) -> Iterable[str]:
    """Lines that the training prints, as they come; all goes to ``log``, too.

    Raises:
        RuntimeError: it failed; with the end of the log.
    """
    start = [sys.executable, *([] if gpu else ["examples/cpu_shim.py"]), "-m", MODULE, *words]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("a") as file:
        process = subprocess.Popen(
            start, cwd=ROOT, env=env, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                yield line
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.terminate()
            process.wait()
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}; {log} ends with\n" + log.read_text("utf-8")[-3000:])


def read_lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines; none where it is missing."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def done(folder: Path) -> int:
    """Steps in the last checkpoint; 0 without one."""
    tracker = folder / "checkpoint" / TRACKER
    return int(tracker.read_text()) if tracker.is_file() else 0


def card(gpu: bool) -> str:
    import torch

    return torch.cuda.get_device_name() if gpu else f"CPU ({os.cpu_count()} cores)"


def about(options: argparse.Namespace, gpu: bool) -> dict:
    """What a run is, whatever happens in it."""
    size = SIZES[options.size]
    steps = steps_of(size, options.tokens)
    return {
        "variant": options.variant, "size": options.size, "seed": options.seed, "lr": options.lr, "tag": options.tag,
        "tokens": steps * size.batch * size.seq_length, "seq_length": size.seq_length,
        "steps": steps, "fp32": options.fp32 or not gpu, "flags": flags(options.variant, size) + options.flags,
        "data": json.loads((options.data / "stats.json").read_text("utf-8"))["sha256"]["train_text_document.bin"],
    }  # fmt: skip


def train(options: argparse.Namespace, run: Callable[[list[str], Path, bool], Iterable[str]] = launch) -> Path:
    """Train until the end, the time limit or ``--stop-at``; returns the folder of the run.

    Args:
        options: of ``parser``.
        run: starts Megatron; yields what it prints.

    Raises:
        ValueError: the folder is of another run.
        RuntimeError: the training failed.
    """
    import torch

    gpu = torch.cuda.is_available()
    options.data, options.runs = options.data.resolve(), options.runs.resolve()
    folder = options.runs / name_of(
        options.variant, options.size, options.tokens, options.seed, options.lr, options.tag
    )
    folder.mkdir(parents=True, exist_ok=True)
    path, what = folder / "run.json", about(options, gpu)
    held = json.loads(path.read_text("utf-8")) if path.is_file() else what | {"stretches": []}
    if other := [key for key, value in what.items() if held[key] != value]:
        raise ValueError(f"{folder} is of a run with other {', '.join(other)}: give another --runs, or remove it")
    before = done(folder)
    if before >= what["steps"]:
        print(f"{folder.name}: complete, {before} steps", flush=True)
        return folder
    losses = [row for row in read_lines(folder / "losses.jsonl") if row["iteration"] <= before]
    valid = [row for row in read_lines(folder / "valid.jsonl") if row["iteration"] <= before]
    start, time_of_steps = time.time(), 0.0
    try:
        for row in megatron_log.read(run(command(options, folder, gpu), folder / "log.txt", gpu)):
            if isinstance(row, megatron_log.Parameters):
                held["parameters"] = row.count
            elif isinstance(row, megatron_log.Validation):  # after the last step there are two
                valid = [x for x in valid if x["iteration"] != row.iteration]
                valid.append({"iteration": row.iteration, "valid_loss": row.loss})
            elif row.loss is not None:
                losses.append({key: value for key, value in row._asdict().items() if key != "last"})
                time_of_steps += row.seconds
                if row.iteration % max(1, what["steps"] // 20) == 0:
                    print(f"{folder.name}: step {row.iteration}/{what['steps']} loss {row.loss:.4f}", flush=True)
    finally:
        after = done(folder)
        for name, rows in (("losses.jsonl", losses), ("valid.jsonl", valid)):
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        held["stretches"].append(
            {
                "from": before, "to": after, "wall_seconds": round(time.time() - start, 1),
                "gpu_seconds": round(time_of_steps, 1), "card": card(gpu), **when(), "torch": torch.__version__,
                "megatron": importlib.metadata.version("megatron-core"), "triton": importlib.metadata.version("triton"),
                "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            }
        )  # fmt: skip
        path.write_text(json.dumps(held, indent=1) + "\n")
    print(f"{folder.name}: {after} of {what['steps']} steps are saved", flush=True)
    return folder


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("--variant", required=True, help="of variants.py, such as lightning, 7:1, softmax")
    add("--data", type=Path, required=True, help="folder with tokenizer and datasets")
    add("--runs", type=Path, required=True, help="folder of all runs")
    add("--size", default="base", choices=SIZES, help="of the model (%(default)s)")
    add("--tokens", type=float, default=300e6, help="of the whole training (%(default)g)")
    add("--lr", type=float, default=1e-3, help="largest learning rate (%(default)g)")
    add("--seed", type=int, default=1, help="of values at the start and of the data order (%(default)s)")
    add("--minutes", type=int, default=9, help="of this stretch, at most (%(default)s)")
    add("--stop-at", type=int, metavar="N", help="end the stretch at a step that N divides")
    add("--micro-batch", type=int, help="sequences of a pass (default: by the size)")
    add("--eval-iters", type=int, default=16, help="batches of a validation (%(default)s)")
    add("--fp32", action="store_true", help="train in fp32, not bf16 (a CPU always does)")
    add("--tag", default="", help="a word more in the name of the run")
    add("flags", nargs="*", metavar="-- FLAG", help="more flags of the training, behind --")
    return made


def main(argv: list[str] | None = None) -> None:
    try:
        train(parser().parse_args(argv))
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"train: {error}") from error


if __name__ == "__main__":
    main()
