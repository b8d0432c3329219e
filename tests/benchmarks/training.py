"""Training speed against sequence length, as in Table 1 of Lightning Attention-2 (arXiv 2401.04658), through Megatron.

    run="python -m tests.benchmarks.training"
    $run --models 0.4B --attentions lightning softmax --recompute
    $run --models 3B --lengths 8K 64K --tensor-parallel 2 --append
    $run --models 0.4B --lengths 64K 1M --context-parallel 2 --loss-chunk 8K --recompute --append
    $run --models 0.4B --lengths 32K 512K --data-parallel 2 --loss-chunk 8K --recompute --append
    $run --models 0.4B --lengths 8K --attentions lightning --profile
    $run --models 1B --lengths 8K 32K --attentions lightning --layers local te te-delayed te-tensorwise te-blockwise
    $run --models 0.4B --lengths 2K 4K 8K --attentions lightning --cuda-graph local --profile --append
    $run --models toy --lengths 64 128 --tokens-per-step 512 --tokens-per-microbatch 128 --cpu

Prints tokens per GPU and second, and writes <out>/training.json. Every step has the same number of tokens at every
length (to the nearest whole sequence), and so has every microbatch up to --tokens-per-microbatch; beyond, a microbatch
is one sequence. One process per model and attention trains at all lengths (training_run.py says how; it is Megatron's
pretrain() with lightning_megatron's model, optimizer, data and train_step); --no-in-process starts
``-m lightning_megatron.pretrain`` anew for every cell and reads Megatron's log. The first WARMUP steps at a length are
dropped, the median of the others counts.

Layers: Megatron's local ones, or TransformerEngine's, in bf16 or fp8 by one of its recipes (training_models.LAYERS).

Attention: "lightning" in all layers; "softmax" in all layers, through torch's flash kernels, with rope; "hybrid", every
eighth layer softmax. Lightning layers have an output gate: their models are larger (0.4B: 0.40 and 0.37 billion).

MFU is of 989 TFLOP/s; training_models.py has the formula. Where a length does not fit, longer ones are not tried; with
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True it is not fragmentation that decides.

The paper's numbers for 0.4B on A100s: Lightning Attention-2 38,615 tokens/s at 1K and 38,596 at 92K; FlashAttention-2
35,931 and 4,078.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from examples import megatron_log
from examples.provenance import output, when
from lightning_megatron.compat import version
from tests.launch import excerpt

from .report import write
from .training_models import (
    KEY,
    LAYERS,
    MODELS,
    PARALLEL,
    PEAK,
    WARMUP,
    batch,
    command,
    gpus,
    how,
    key_of,
    parse_length,
    show_length,
)

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
LENGTHS = "1K 2K 4K 8K 16K 32K 64K 80K 92K 128K"
ATTENTIONS = ("lightning", "softmax", "hybrid")
NO_MEMORY = "does not fit"
OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)
RAISED = re.compile(
    r"^(?:\[rank\d+\]: )?((?!torch\.distributed\.elastic)\w[\w.]*(?:Error|Exception)\b.*|\S+\.py: error: .*)$",
    re.MULTILINE,
)


def from_log(log: str, length: int) -> dict:
    """The row that training_run would have written, from the log of a plain pretrain()."""
    steps = megatron_log.steps(log)
    vocabulary = re.search(r"padded vocab .*new size: (\d+)", log)
    return {
        "length": length,
        "seconds": [step.seconds for step in steps[WARMUP:]],
        "losses": [math.nan if step.loss is None else step.loss for step in steps],
        "peak_gib": max([float(mb) / 1024 for mb in re.findall(r"\| max allocated: ([\d.]+)", log)], default=0),
        "vocabulary": vocabulary and int(vocabulary[1]),
    }


def cell(name: str, attention: str, length: int, options: argparse.Namespace) -> dict:
    """What tells a row from the others."""
    values = (name, attention, length, options.recompute or "none", *(getattr(options, key) for key in PARALLEL))
    values = (*values, options.cuda_graph, options.loss_chunk, options.extra, options.layers)
    return dict(zip(KEY, values, strict=True))


def finish(raw: dict, name: str, attention: str, options: argparse.Namespace) -> dict:
    """A row of the table from the times of the steps."""
    length, seconds = raw["length"], statistics.median(raw["seconds"])
    micro, whole = batch(length, options)
    row = cell(name, attention, length, options) | {"micro_batch": micro, "tokens_per_step": whole * length}
    microbatches = whole // (micro * options.data_parallel) * raw.get("passes", len(raw["losses"]))
    wanted = {f"{micro}x{length // options.context_parallel}": microbatches}
    if raw.get("batches", wanted) != wanted:
        return row | {"error": f"the model got {raw['batches']}, not {wanted}"}
    if not all(map(math.isfinite, raw["losses"])):
        return row | {"error": f"losses {raw['losses']}"}
    speed = whole * length / seconds / gpus(options)
    row |= {"tokens_per_second": speed, "ms_per_step": seconds * 1e3, "peak_gib": raw["peak_gib"]}
    row |= {"mfu": speed * MODELS[name].flops(attention, length, raw["vocabulary"]) / PEAK, "loss": raw["losses"][-1]}
    row |= {"seconds": raw["seconds"]}
    return row | {key: raw[key] for key in ("sizes", "profile") if key in raw}


def measure(name: str, attention: str, lengths: list[int], options: argparse.Namespace) -> Iterator[dict]:
    """Run one process; a row for each length, as soon as it is there. If the process fails, the last has an "error"."""
    env = {"OMP_NUM_THREADS": "1"} if options.cpu else {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        path, left, text, ended = Path(folder, "rows"), list(lengths), "", False
        line = command(name, attention, lengths, options, str(path))
        with Path(folder, "log").open("w+", errors="replace") as out, path.open("w+") as file:
            process = subprocess.Popen(line, cwd=ROOT, env={**env, **os.environ}, stdout=out, stderr=out)
            try:
                while not ended:
                    ended = process.poll() is not None  # before the last look at the file
                    *raw, text = (text + file.read()).split("\n")
                    for row in raw:
                        yield finish(json.loads(row), name, attention, options)
                        left.pop(0)
                    time.sleep(0 if ended else 0.5)
            finally:
                if not ended:
                    process.terminate()  # torchrun ends its ranks
                    process.wait()
            out.seek(0)
            log = out.read()
    if not options.in_process and process.returncode == 0 and (row := from_log(log, lengths[0]))["seconds"]:
        yield finish(row, name, attention, options)
        left.pop(0)
    if left:
        said = RAISED.search(log)
        error = f"exit status {process.returncode}" + (f", {said[1]}" if said else "")
        if OUT_OF_MEMORY.search(log):
            error = NO_MEMORY
        else:
            print(f"\n{shlex.join(line)}\n{excerpt(log)}\n")
        yield cell(name, attention, left[0], options) | {"error": error}


def in_one_process(options: argparse.Namespace) -> bool:
    """Whether all lengths share a process: not with CUDA graphs, which Megatron keeps as long as its process lives."""
    return options.in_process and not options.cuda_graph


def sweep(name: str, attention: str, options: argparse.Namespace) -> Iterator[dict]:
    """Rows of all lengths, ascending. Beyond one that does not fit none is tried: microbatches are no smaller there."""
    left = sorted(options.lengths)
    together = in_one_process(options)
    while left:
        count = 0
        for row in measure(name, attention, left if together else left[:1], options):
            yield row
            count += 1
        left = left[count:]
        error = row.get("error")
        if error == NO_MEMORY or (error and count == 1 and together):  # nothing works, not even the first
            yield from (row | {"length": length} for length in left)
            break


def describe(row: dict, profile: bool = True) -> str:
    """One line for one cell, and its ``profile`` in whole."""
    start = f"{row['model']} {row['attention']:9s} {row['layers']:13s} {show_length(row['length']):>5s}  "
    start += f"{row['extra']}  " if row["extra"] else ""
    if "error" in row:
        return start + row["error"]
    text = start + (
        f"{row['tokens_per_second']:10,.0f} tokens/GPU/s {row['ms_per_step']:9,.1f} ms/step  MFU {row['mfu']:6.1%}  "
        f"peak {row['peak_gib']:5.1f} GiB  loss {row['loss']:.3f}"
    )
    if "profile" in row:
        shown = row["profile"]
        text += f"\n{shown['launches']:,.0f} launches a step, GPU idle {shown['idle']:.1%} of it"
        if not profile:
            return text
        text += "\n"
        text += "  ms/step  % step    calls  kernel"
        for x in shown["kernels"]:
            text += f"\n{x['ms']:9.2f} {x['percent']:7.1f} {x['calls']:8.0f}  {x['name'][:150]}"
        text += "\n  ms/step    calls  longest gaps, after -> before"
        for x in shown["gaps"]:
            text += f"\n{x['ms']:9.2f} {x['calls']:8.0f}  {x['after'][:70]} -> {x['before'][:70]}"
    return text


def table(rows: list[dict]) -> str:
    """Tokens per GPU and second: a line per model and attention, a column per length; then spread and ratios.

    Where rows differ in what is recomputed, their memory is there, too; where they have a profile, how long GPUs idle.
    """
    lengths = sorted({row["length"] for row in rows})
    groups: dict[tuple, dict[int, dict]] = {}
    for row in rows:
        model, attention, length, *rest = key_of(row)
        groups.setdefault((model, attention, *rest), {})[length] = row

    def line(name: str, cells: list[str]) -> str:
        return f"{name:46s}" + "".join(f"{cell:>9s}" for cell in cells)

    def show(row: dict | None) -> str:
        if row is None:
            return "-"
        if "error" in row:
            return "no mem" if row["error"] == NO_MEMORY else "failed"
        return f"{row['tokens_per_second']:,.0f}"

    shares = {"peak GiB": lambda x: f"{x['peak_gib']:.1f}", "GPU idle": lambda x: f"{x['profile']['idle']:.0%}"}
    shown = {"peak GiB": len({row["recompute"] for row in rows}) > 1, "GPU idle": True}
    out, below = [line("tokens/GPU/s", [show_length(length) for length in lengths])], []
    for (model, attention, *rest), found in groups.items():
        said = how(next(iter(found.values())))
        out.append(line(f"{model} {attention}{said}", [show(found.get(length)) for length in lengths]))
        for name, said_of in shares.items():
            held = {n: x for n, x in found.items() if ("peak_gib" if name == "peak GiB" else "profile") in x}
            if held and shown[name]:
                out.append(line(f"    {name}", [said_of(held[n]) if n in held else "-" for n in lengths]))
        if attention != "lightning":
            continue
        speeds = [x["tokens_per_second"] for n, x in found.items() if n >= 2048 and "error" not in x]
        if len(speeds) > 1:
            spread = (max(speeds) - min(speeds)) / statistics.mean(speeds)
            below.append(f"{model} lightning{said}: (max - min) / mean from 2K up {spread:.1%}")
        other = groups.get((model, "softmax", *rest), {})
        good = {n for n in found.keys() & other.keys() if "error" not in found[n] and "error" not in other[n]}
        ratio = {n: found[n]["tokens_per_second"] / other[n]["tokens_per_second"] for n in good}
        cells = [f"{ratio[n]:.2f}" if n in ratio else "-" for n in lengths]
        out += [line(f"{model} lightning / softmax{said}", cells)] if ratio else []
    return "\n".join(out + below)


def machine(cpu: bool) -> dict[str, str]:
    """What rows must have in common to stand in one table."""
    query = "CPU, none" if cpu else output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    card, _, driver = query.partition(", ")
    versions = {package: importlib.metadata.version(package) for package in ("torch", "triton", "megatron-core")}
    if (te := version("transformer-engine")) != "not installed":
        versions["transformer-engine"] = te
    return {"card": card, "driver": driver, "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""), **versions}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=["0.4B"])
    add("--lengths", nargs="+", type=parse_length, default=[parse_length(x) for x in LENGTHS.split()], help=LENGTHS)
    add("--attentions", nargs="+", choices=ATTENTIONS, default=["lightning", "softmax"])
    add("--steps", type=int, default=5, help=f"at each length, the first {WARMUP} of which are dropped (%(default)s)")
    add("--tokens-per-step", type=int, default=262144)
    add("--tokens-per-microbatch", type=int, default=32768)
    add(
        "--recompute",
        nargs="?",
        const="full",
        metavar="MODULES",
        help="all layers; or Megatron's --recompute-modules joined by commas, with qkv for --lightning-recompute-qkv",
    )
    add("--tensor-parallel", type=int, default=1, metavar="N", help="GPUs, with sequence parallelism")
    add(
        "--context-parallel",
        type=int,
        default=1,
        metavar="N",
        help="GPUs that share a sequence; lengths are of the whole one",
    )
    add("--data-parallel", type=int, default=1, metavar="N", help="times as many GPUs, for sequences of their own")
    add("--loss-chunk", type=parse_length, default=0, metavar="N", help="tokens of a GPU whose logits exist at a time")
    add(
        "--cuda-graph",
        nargs="?",
        const=True,
        default=False,
        metavar="IMPL[:MODULES]",
        help="a step as one graph, so that the host does not count; or local or transformer_engine, a graph for each "
        "layer, or for its modules, as in local:attn,mlp; a process a length",
    )
    add("--data", metavar="PREFIX", help="of Megatron's indexed dataset, with --tokenizer (default: mock data)")
    add("--mock-data", action="store_true", help="the default without --data")
    add("--tokenizer", metavar="FILE", help="SentencePiece model")
    add(
        "--layers",
        dest="all_layers",
        nargs="+",
        choices=LAYERS,
        default=["local"],
        help="Megatron's, or TransformerEngine's: in bf16, or in fp8 by a recipe (default: local)",
    )
    add(
        "--extra",
        dest="all_extra",
        action="append",
        metavar="FLAGS",
        help="more flags for Megatron, in one argument: --extra='--x 1 --y'; given again, another run with other flags",
    )
    add("--in-process", action=argparse.BooleanOptionalAction, default=True, help="all lengths in one process")
    add("--profile", action="store_true", help="two more steps: launches and idle share; of one cell, kernels by time")
    add("--out", type=Path, default=RESULTS, help="folder of training.json")
    add("--append", action="store_true", help="keep the other rows of training.json; same machine only")
    add("--cpu", action="store_true", help="under examples/cpu_shim.py: proves the wiring")
    add("--dry-run", action="store_true", help="print the commands")
    options = parser.parse_args(argv)
    options.all_extra = options.all_extra or [""]
    options.layers, options.extra = options.all_layers[0], options.all_extra[0]  # of a run
    if options.steps <= WARMUP:
        parser.error(f"--steps {options.steps} leaves none after {WARMUP} of warm-up: give {WARMUP + 1} or more")
    if options.profile and not options.in_process:
        parser.error("--profile looks into a process of ours: give it without --no-in-process")
    if bool(options.data) != bool(options.tokenizer) or (options.data and options.mock_data):
        parser.error("give --data PREFIX with --tokenizer FILE, or --mock-data")
    options.data, options.tokenizer = (x and str(Path(x).resolve()) for x in (options.data, options.tokenizer))
    return options


def runs(options: argparse.Namespace) -> list[tuple[str, str, argparse.Namespace]]:
    """Model, attention, and options with the layers and further flags of each run."""
    each = itertools.product(options.models, options.attentions, options.all_layers, options.all_extra)
    return [
        (model, attention, argparse.Namespace(**vars(options) | dict(layers=layers, extra=extra)))
        for model, attention, layers, extra in each
    ]


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.dry_run:
        for model, attention, chosen in runs(options):
            lengths = sorted(options.lengths)
            for group in [lengths] if in_one_process(chosen) else [[length] for length in lengths]:
                print(shlex.join(command(model, attention, group, chosen)))
        return 0
    path, about, old = options.out / "training.json", machine(options.cpu), []
    commands = [shlex.join(["python", "-m", "tests.benchmarks.training", *(sys.argv[1:] if argv is None else argv)])]
    if options.append and path.exists():
        before = json.loads(path.read_text())
        if any(before["environment"].get(key) != value for key, value in about.items()):
            raise SystemExit(f"--append: {path} is of {before['environment']}, this is {about}: use another --out")
        old, commands = before["rows"], before["environment"]["commands"] + commands
    about |= when() | {"commands": commands}
    rows: list[dict] = []
    chosen_runs = runs(options)
    for model, attention, chosen in chosen_runs:
        for row in sweep(model, attention, chosen):
            print(describe(row, profile=len(chosen_runs) * len(options.lengths) == 1), flush=True)
            rows.append(row)
            new = set(map(key_of, rows))
            write(path, about, "training", [row for row in old if key_of(row) not in new] + rows)
    print("\n" + table([row for row in old if key_of(row) not in set(map(key_of, rows))] + rows))
    return any(row.get("error", NO_MEMORY) != NO_MEMORY for row in rows)


if __name__ == "__main__":
    sys.exit(main())
