"""Does the arithmetic change what is learnt, and do states stay bounded?

    python -m examples.quality.fidelity train --data data/quality/data --runs runs --steps 2000
    python -m examples.quality.fidelity states --data data/quality/data --runs runs --states-tokens 1048576

``train`` trains one small all-lightning model on the same data in the same order by several paths of arithmetic, and
one path with another seed, whose distance is the noise that the others are compared with. Megatron has no fp64; fp32
with torch's operator stands for it. Paths run side by side, since so small a model does not fill a GPU. The same
command goes on. ``states`` reads held-out text with the first path's model, or with that of --run, and records the
largest absolute value of its states, also of the head that decays least. Both write RUNS/fidelity.json.
"""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from examples.provenance import when

from . import train
from .results import FIDELITY
from .variants import SIZES

PATHS = {  # name -> (fp32, backend, seed)
    "triton-bf16": (False, "triton", 1),
    "triton-bf16-seed2": (False, "triton", 2),
    "torch-bf16": (False, "torch", 1),
    "torch-fp32": (True, "torch", 1),
    "torch-fp32-seed2": (True, "torch", 2),
}
ON_CPU = ("torch-fp32", "torch-fp32-seed2")  # Triton has no CPU, and the CPU trains in fp32
VARIANT = "lightning"


def options_of(path: str, options: Namespace) -> Namespace:
    """The training of one path, as options of ``train``."""
    fp32, backend, seed = PATHS[path]
    size = SIZES[options.size]
    words = ["--variant", VARIANT, "--data", str(options.data), "--runs", str(options.runs), "--size", options.size]
    words += ["--tokens", str(options.steps * size.batch * size.seq_length), "--lr", str(options.lr)]
    words += ["--seed", str(seed), "--seconds", str(options.seconds), "--tag", path, "--eval-iters", "1"]
    words += ["--fp32"] if fp32 else []
    return train.parser().parse_args([*words, "--", "--lightning-backend", backend])


def distances(curves: dict[str, list[float]], reference: str, noise: str) -> dict[str, dict[str, float]]:
    """Of every curve to the reference: mean absolute difference of losses, over all steps and over the last tenth.

    Args:
        curves: losses of every step, by path.
        noise: the path that differs from the reference in its seed alone; ``of_noise`` is the share of its distance.
    """
    count = min(map(len, curves.values()))
    last = max(1, count // 10)
    found = {}
    for name, curve in curves.items():
        if name != reference:
            gaps = [abs(x - y) for x, y in zip(curve[:count], curves[reference][:count], strict=True)]
            found[name] = {"mean": sum(gaps) / count, "end": sum(gaps[-last:]) / last, "steps": count}
    for row in found.values():
        row["of_noise"] = row["mean"] / found[noise]["mean"]
    return found


def compare(options: Namespace, paths: tuple[str, ...], run: train.Run = train.launch) -> dict:
    """Train all paths as far as their stretches go, and compare what there is.

    Raises:
        RuntimeError: a training failed.
    """
    curves, steps = {}, {}
    with ThreadPoolExecutor(options.together) as pool:
        folders = list(pool.map(lambda path: train.train(options_of(path, options), run), paths))
    for path, folder in zip(paths, folders, strict=True):
        rows = train.read_lines(folder / "losses.jsonl")
        curves[path], steps[path] = [row["loss"] for row in rows], len(rows)
        if not rows:
            raise RuntimeError(f"{folder} has no step: give more --seconds")
    reference = paths[0]
    return {
        "variant": VARIANT, "size": options.size, "reference": reference, "steps": steps,
        "distances": distances(curves, reference, f"{reference}-seed2"),
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

    from .evaluate import held_out_tokens

    text, rows = held_out_tokens(data), []
    saved = read_checkpoint(folder / "checkpoint")
    with loaded_model(
        saved, vocab_size=SIZES[json.loads((folder / "run.json").read_text())["size"]].vocabulary
    ) as model:
        reader = Reader(model, max_length=tokens)
        layers = {layer.layer_number: layer.self_attention for layer in model.decoder.layers}
        decays = {number: layers[number].log_decay.detach().float().cpu() for number in reader.lightning_layers()}
        weakest = max((float(x.max()), number, int(x.argmax())) for number, x in decays.items())
        for start in range(0, tokens, chunk):
            reader.read([int(text[i % len(text)]) for i in range(start, min(start + chunk, tokens))])
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
    add("--seconds", type=float, default=540, help="after which all have saved and ended (%(default)g)")
    add("--together", type=int, default=len(PATHS), help="paths side by side (%(default)s)")
    add("--paths", nargs="+", choices=PATHS, help="the first one is the reference (all that this machine has)")
    add("--run", help="whose states are read: a name in --runs (the first path's)")
    add("--states-tokens", type=int, default=1 << 20, help="read for the states (%(default)s)")
    add("--chunk", type=int, default=8192, help="tokens between two looks at states (%(default)s)")
    return made


def train_paths(options: Namespace, paths: tuple[str, ...], run: train.Run = train.launch) -> None:
    """Step ``train``: puts what ``compare`` returns into RUNS/fidelity.json."""
    _put(options.runs, "curves", compare(options, paths, run))


def _put(runs: Path, key: str, value: dict) -> None:
    path = runs / FIDELITY
    path.write_text(json.dumps(held(runs) | {key: value}, indent=1) + "\n")
    print(f"{path}: {key}", flush=True)


def held(runs: Path) -> dict:
    """What RUNS/fidelity.json holds; nothing where it is missing."""
    path = runs / FIDELITY
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    paths = tuple(options.paths or (PATHS if torch.cuda.is_available() else ON_CPU))
    if f"{paths[0]}-seed2" not in paths:
        raise SystemExit(f"fidelity: --paths {' '.join(paths)} lacks {paths[0]}-seed2, the noise; add it")
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
