"""Does the arithmetic change what is learnt, and do states stay bounded?

    python -m examples.quality.fidelity train --data data/quality/data --runs runs --steps 2000 [-- OPTION OF evaluate]
    python -m examples.quality.fidelity states --data data/quality/data --runs runs --states-tokens 1048576

``train`` trains one small all-lightning model on the same data in the same order by several paths of arithmetic, and
with a second seed, whose distance is the noise that the others are compared with. Megatron has no fp64: the operator
alone computes in it, the rest of that model in fp32. Paths run side by side, since so small a model does not fill a
GPU. Then ``evaluate`` computes the held-out loss of all of them, with the options behind --. The same command goes on.

Another seed is also another data order, and batches alone move the loss of a step by 0.1 nats. The mean absolute
difference of two seeds' curves is about that, whatever the arithmetic does: a path that is worse by 0.03 nats would
pass as a quarter of the noise. Two other measures tell it:

    blocks      signed differences of the mean losses of ten blocks of steps, in which batches average out. The largest
                counts, but for the first block, where the loss falls by nats from values that the seeds differ in
    held out    difference of the final losses on the same text, which no data order enters

Both stand beside the same of two seeds of the same arithmetic: one pair, whose held-out losses may be close by chance.

``states`` reads held-out text with the first path's model, or with that of --run, and records the largest absolute
value of its states, also of the head that decays least. Both write RUNS/fidelity.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from examples.provenance import when

from . import session, train
from .results import FIDELITY
from .variants import SIZES

PATHS = {  # name -> (fp32, backend, seed); fp64 is torch's operator in it, by examples.quality.exact
    "triton-bf16": (False, "triton", 1),
    "triton-bf16-seed2": (False, "triton", 2),
    "torch-bf16": (False, "torch", 1),
    "torch-fp32": (True, "torch", 1),
    "torch-fp32-seed2": (True, "torch", 2),
    "torch-fp64": (True, "fp64", 1),
}
ON_CPU = ("torch-fp32", "torch-fp32-seed2", "torch-fp64")  # Triton has no CPU, and the CPU trains in fp32
VARIANT = "lightning"
SECOND = "-seed2"
BLOCKS = 10


def options_of(path: str, options: Namespace) -> Namespace:
    """The training of one path, as options of ``train``."""
    fp32, backend, seed = PATHS[path]
    size = SIZES[options.size]
    words = ["--variant", VARIANT, "--data", str(options.data), "--runs", str(options.runs), "--size", options.size]
    words += ["--tokens", str(options.steps * size.batch * size.seq_length), "--lr", str(options.lr)]
    words += ["--seed", str(seed), "--seconds", str(options.seconds), "--tag", path, "--eval-iters", "1"]
    words += ["--fp32"] if fp32 else []
    words += ["--shared"] if options.together > 1 else []
    exact = backend == "fp64"
    made = train.parser().parse_args([*words, "--", "--lightning-backend", "torch" if exact else backend])
    made.module = "examples.quality.exact" if exact else None
    return made


def seeds_of(path: str, paths: Iterable[str], reference: str) -> str:
    """The path with the second seed whose distance to its first seed is the noise for ``path``.

    Of the same arithmetic; where that has one seed only, of the reference's.
    """
    first = path.removesuffix(SECOND)
    return f"{first if {first, first + SECOND} <= set(paths) else reference}{SECOND}"


def blocks(curve: list[float], other: list[float]) -> list[float]:
    """Differences of the mean losses of BLOCKS parts, in order; of each step where there are fewer."""
    gaps = [x - y for x, y in zip(curve, other, strict=True)]
    ends = [len(gaps) * i // BLOCKS for i in range(BLOCKS + 1)]
    return [statistics.fmean(gaps[i:j]) for i, j in pairwise(ends) if i < j]


def distances(
    curves: dict[str, list[float]], reference: str, held_out: Mapping[str, float] = MappingProxyType({})
) -> dict[str, dict[str, Any]]:
    """Of every path to the reference, and of a second seed to the first of its arithmetic.

    Args:
        curves: losses of every step, by path; of as many steps as the shortest.
        held_out: losses of the checkpoints, by path; without those that are not there.

    Returns:
        For every path but the reference: ``to``, the path it is compared with; ``seeds``, the path whose distance is
        its noise; ``mean`` absolute difference of steps; differences of ``blocks``, and the ``largest`` absolute one
        behind the first; the ``held_out`` loss and the ``difference`` of it (None where a loss is missing);
        ``largest_of_seeds`` and ``distance_of_seeds``, absolute, the same of ``seeds``; ``within``, whether both are
        at most those of the seeds (None where that is not known yet, and for the seeds themselves).
    """
    count = min(map(len, curves.values()))
    found: dict[str, dict[str, Any]] = {}
    for name in curves:
        if name == reference:
            continue
        seeds = seeds_of(name, curves, reference)
        to = name.removesuffix(SECOND) if name == seeds else reference
        curve, other = curves[name][:count], curves[to][:count]
        of_blocks, loss, beside = blocks(curve, other), held_out.get(name), held_out.get(to)
        found[name] = {
            "to": to, "seeds": seeds, "steps": count,
            "mean": statistics.fmean(abs(x - y) for x, y in zip(curve, other, strict=True)),
            "blocks": of_blocks, "largest": max(map(abs, of_blocks[1:] or of_blocks)),
            "held_out": loss, "difference": None if loss is None or beside is None else loss - beside,
        }  # fmt: skip
    for name, row in found.items():
        largest, gap = (found[row["seeds"]][key] for key in ("largest", "difference"))
        row |= {"largest_of_seeds": largest, "distance_of_seeds": None if gap is None else abs(gap)}
        known = None not in (gap, row["difference"])
        tests = [row["largest"] <= largest, abs(row["difference"]) <= abs(gap) if known else None]
        row["within"] = None if name == row["seeds"] else False if False in tests else None if None in tests else True
    return found


def held_out_loss(folder: Path) -> float | None:
    """Of a complete training that was evaluated."""
    path = folder / "evaluate.json"
    if train.state(folder) != "complete" or not path.is_file():
        return None
    return json.loads(path.read_text("utf-8"))["tasks"].get("loss", {}).get("nll")


def compare(folders: dict[str, Path], size: str) -> dict:
    """Compare what there is.

    Args:
        folders: of the runs, by path; the first one is the reference. Those that diverged are told, not compared.

    Raises:
        RuntimeError: a training has no step, or the reference diverged in one of its seeds.
    """
    reference = next(iter(folders))
    states = {path: train.state(folder) for path, folder in folders.items()}
    rows = {path: train.read_lines(folder / "losses.jsonl") for path, folder in folders.items()}
    for path, folder in folders.items():
        if not rows[path]:
            raise RuntimeError(f"{folder} has no step: give more --seconds")
        if states[path].startswith("diverged") and path in (reference, reference + SECOND):
            raise RuntimeError(f"{folder} {states[path]}, so nothing can be compared with it: give a lower --lr")
    curves = {
        path: [row["loss"] for row in found] for path, found in rows.items() if not states[path].startswith("diverged")
    }
    losses = {path: loss for path in curves if (loss := held_out_loss(folders[path])) is not None}
    return {
        "variant": VARIANT, "size": size, "reference": reference, "steps": {path: len(x) for path, x in rows.items()},
        "states": states, "held_out": losses, "distances": distances(curves, reference, losses),
        "card": train.card(torch.cuda.is_available()), **when(),
    }  # fmt: skip


@torch.inference_mode()
def states(folder: Path, data: Path, tokens: int, chunk: int) -> dict:
    """Largest absolute values of the states of all lightning layers, and of the head that decays least, by position.

    Args:
        folder: of the run.
        tokens: read behind each other; held-out text begins again where it ends.
        chunk: tokens between two looks at the states.
    """
    from lightning_megatron.inference.loading import loaded_model, read_checkpoint
    from lightning_megatron.inference.reader import Reader

    from .evaluate import held_out

    text, rows = [int(token) for document in held_out(data) for token in document], []
    saved = read_checkpoint(folder / "checkpoint")
    with loaded_model(
        saved, vocab_size=SIZES[json.loads((folder / "run.json").read_text())["size"]].vocabulary
    ) as model:
        reader = Reader(model, max_length=tokens)
        layers = {layer.layer_number: layer.self_attention for layer in model.decoder.layers}
        decays = {number: layers[number].log_decay.detach().float().cpu() for number in reader.lightning_layers()}
        weakest = max((float(x.max()), number, int(x.argmax())) for number, x in decays.items())
        for start in range(0, tokens, chunk):
            reader.read([text[i % len(text)] for i in range(start, min(start + chunk, tokens))])
            memory = {number: reader.context.key_value_memory_dict[number][0] for number in decays}
            largest = max(float(state.abs().max()) for state in memory.values())
            head = memory[weakest[1]][0, 0, weakest[2]]
            rows.append({"tokens": min(start + chunk, tokens), "all": largest, "weakest": float(head.abs().max())})
    return {
        "run": folder.name, "log_decay": weakest[0], "layer": weakest[1], "head": weakest[2], "rows": rows,
        "card": train.card(torch.cuda.is_available()), **when(),
    }  # fmt: skip


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("what", choices=("train", "states"))
    add("--data", type=Path, required=True, help="folder with tokenizer and datasets")
    add("--runs", type=Path, required=True, help="folder of all runs")
    add("--size", default="fidelity", choices=SIZES, help="of the model (%(default)s)")
    add("--steps", type=int, default=2000, help="of each training (%(default)s)")
    add("--lr", type=float, default=1e-3, help="largest learning rate (%(default)g)")
    add("--seconds", type=float, default=540, help="after which all has ended, and is saved (%(default)g)")
    add("--together", type=int, default=len(PATHS), help="paths side by side (%(default)s)")
    add("--paths", nargs="+", choices=PATHS, help="the first one is the reference (all that this machine has)")
    add("--run", help="whose states are read: a name in --runs (the first path's)")
    add("--states-tokens", type=int, default=1 << 20, help="read for the states (%(default)s)")
    add("--chunk", type=int, default=8192, help="tokens between two looks at states (%(default)s)")
    made.set_defaults(questions=[])
    return made


def train_paths(
    options: Namespace, paths: tuple[str, ...], run: train.Run = train.launch, begin: session.Start = session.start
) -> None:
    """Step ``train``: trains as far as --seconds go, evaluates once all are complete, writes RUNS/fidelity.json.

    Args:
        run: starts a training, as ``train.launch``.
        begin: runs a module with a command line, as ``session.start``.

    Raises:
        RuntimeError: a training or the evaluation failed; the curves are written before the latter.
    """
    end = time.time() + options.seconds
    with ThreadPoolExecutor(options.together) as pool:
        trained = pool.map(lambda path: train.train(options_of(path, options), run), paths)
        folders = dict(zip(paths, trained, strict=True))
    _put(options.runs, "curves", compare(folders, options.size))
    whole = [folder for folder in folders.values() if not train.state(folder).startswith("diverged")]
    left = end - time.time()
    if left > 0 and all(train.state(folder) == "complete" for folder in whole):
        words = [*map(str, whole), "--data", str(options.data), "--tasks", "loss", *options.questions]
        begin("examples.quality.evaluate", words, left)
        _put(options.runs, "curves", compare(folders, options.size))


def _put(runs: Path, key: str, value: dict) -> None:
    path = runs / FIDELITY
    path.write_text(json.dumps(held(runs) | {key: value}, indent=1) + "\n")
    print(f"{path}: {key}", flush=True)


def held(runs: Path) -> dict:
    """What RUNS/fidelity.json holds; nothing where it is missing."""
    path = runs / FIDELITY
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    cut = words.index("--") if "--" in words else len(words)
    options = parser().parse_args(words[:cut])
    options.questions = words[cut + 1 :]
    paths = tuple(options.paths or (PATHS if torch.cuda.is_available() else ON_CPU))
    if f"{paths[0]}{SECOND}" not in paths:
        raise SystemExit(f"fidelity: --paths {' '.join(paths)} lacks {paths[0]}{SECOND}, the noise; add it")
    options.data, options.runs = options.data.resolve(), options.runs.resolve()
    if options.what == "train":
        train_paths(options, paths)
        return
    from lightning_megatron.inference.command import start

    start("fidelity")
    folder = options.runs / (options.run or train.folder_of(options_of(paths[0], options)).name)
    found = states(folder, options.data, options.states_tokens, options.chunk)
    _put(options.runs, "states", held(options.runs).get("states", {}) | {folder.name: found})


if __name__ == "__main__":
    main()
