"""Decoding speed, first tokens and memory of requests against context, through Megatron's dynamic inference engine.

    python -m tests.benchmarks.decode --out tests/benchmarks/results
    python -m tests.benchmarks.decode --out /tmp/out --dry

Serves models of about 1 billion parameters with random bf16 weights: lightning attention in all layers; the same with
softmax layers, with 8 key/value heads; and Megatron's Mamba-2 hybrid (its HybridModel: 13 Mamba-2 layers, one softmax
layer, 14 MLPs; its dynamic engine serves none without softmax layers). Only the softmax model has rotary embeddings.
Prints tables and writes decode_models.json
after every cell, and at the end decode_models.png.

Every cell is measured at two levels: steps of the engine (``async_step``), host and sampling included, eager and with
Megatron's CUDA graphs; and the GPU's time of the model's forward as the engine calls it, in graphs where it has them.
The share of the bound compares the second with

    bound = (weights + 2 * batch * state + batch * context * kv) / bandwidth of a copy, measured in the same run

where weights are the bytes of all parameters but the embedding's, state those of a request's recurrent states (read and
written), and kv those of a token's keys and values (read).

Contexts: "read" requests read a prompt of that many tokens. "aged" ones read two tokens; the engine is then told that
they have so many (positions, lengths, blocks of random keys and values), and lightning requests get the state of the
one that read them all. A row of one request each way shows that this changes nothing. "does not fit" gives the bytes
that all requests would need.

One process per model, for softmax one per context and for Mamba-2 one per two, so that a table of blocks for much
longer requests slows none down; one that fails does not stop the others. --minutes ends the run in order.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from examples.provenance import when

from .decode_models import ATTENTIONS
from .report import write
from .training import machine
from .training_models import parse_length, show_length

NAME = "decode_models"
CONTEXTS, BATCHES = ["1K", "32K", "256K", "1M"], [1, 16, 64, 256]
GRACE = 25  # seconds that a process may take beyond its deadline
FEWEST_SECONDS = 75  # that a process gets while they are there
LEAST = 20  # seconds below which no process is started


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path(__file__).parent / "results")
    add("--model", choices=("1B", "3B", "8B"), default="1B", help="the Mamba-2 hybrid has 1B only (default: 1B)")
    add("--attentions", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    add("--contexts", nargs="+", type=parse_length, default=list(map(parse_length, CONTEXTS)), help=" ".join(CONTEXTS))
    add("--batches", nargs="+", type=int, default=BATCHES)
    add("--prompt", type=parse_length, default=parse_length("128K"), help="of the first token (default: 128K)")
    add("--max-tokens", type=parse_length, default=parse_length("16K"), help="of a step of prompts (default: 16K)")
    add("--steps", type=int, default=160, help="measured of every cell (default: %(default)s)")
    add("--minutes", type=float, default=9.0, help="after which the run ends in order (default: %(default)s)")
    add("--dry", action="store_true", help="toy models on the CPU: shows that everything runs, measures nothing")
    add("--append", action="store_true", help="keep rows that are there and are not measured again")
    options = parser.parse_args(argv)
    if options.dry:
        options.contexts, options.batches, options.prompt, options.max_tokens = [256, 1024], [1, 4], 600, 128
    return options


def plans(options: argparse.Namespace) -> Iterator[dict]:
    """One process each, the most important first."""
    common = dict(
        model="toy" if options.dry else options.model, batches=options.batches, max_tokens=options.max_tokens,
        steps=4 if options.dry else options.steps, gpu=not options.dry, cuda_graph=not options.dry, prompt=0,
        prefill=False, memory=[],
    )  # fmt: skip
    contexts = options.contexts
    if "lightning" in options.attentions:
        yield common | dict(
            attention="lightning", contexts=contexts, prompt=options.prompt, prefill=True, memory=contexts
        )
    if "softmax" in options.attentions:
        fits = [n for n in contexts if n >= options.prompt] or [max(contexts)]
        first = min(fits)  # the engine that takes the prompt without being made for much longer ones
        for n in [first, *(n for n in contexts if n != first)]:
            memory = contexts if n == min(contexts) else []
            yield common | dict(
                attention="softmax", contexts=[n], prompt=options.prompt if n == first else 0, memory=memory
            )
    if "mamba" in options.attentions:
        for part in (contexts[:2], contexts[2:]):
            if part:
                yield common | dict(attention="mamba", contexts=part, memory=contexts if part == contexts[:2] else [])


def run(plan: dict, deadline: float, rows: Path, on_rows: Callable[[], None]) -> str | None:
    """Run a plan in a process of its own, and call ``on_rows`` whenever its file has grown.

    Returns:
        What went wrong, or None.
    """
    rows.touch()
    plan = plan | dict(deadline=deadline, rows=str(rows))
    environment = dict(os.environ)
    if plan["attention"] == "mamba":
        # One launch of each kernel that reads prompts instead of a search for the best: decoding has kernels of its own
        environment |= dict(MAMBA_DETERMINISTIC="1")
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.decode_worker", json.dumps(plan)]
    process, size = subprocess.Popen(command, env=environment), 0
    try:
        while True:
            ended = process.poll()
            if rows.stat().st_size > size:
                size = rows.stat().st_size
                on_rows()
            if ended is not None:
                return f"ended with {ended}" if ended else None
            if time.time() > deadline + GRACE:
                return "did not end in time"
            time.sleep(0.5)
    finally:
        process.kill()
        process.wait()


def bandwidth(dry: bool) -> float:
    """GB/s of a copy, in a process that leaves no memory behind."""
    if dry:
        return 10.0
    code = "from tests.benchmarks.measure import copy_bandwidth; print(copy_bandwidth())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


KEY = ("kind", "model", "attention", "batch", "context", "requests")


def key(row: dict) -> tuple:
    return tuple(row.get(name) for name in KEY)


def finish(row: dict, gb_per_s: float) -> dict:
    """With the bound and the share of it that was reached."""
    if "forward_ms" in row:
        row["bound_ms"] = row["bytes"] / gb_per_s * 1e-6
        row["share_of_bound"] = row["bound_ms"] / row["forward_ms"]
    return row


def collect(path: Path, gb_per_s: float, rows: dict[tuple, dict]) -> None:
    """Bring the rows of a process's file in."""
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            return  # still being written
        row = finish(json.loads(line), gb_per_s)
        rows[key(row)] = row


def gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.2f} MiB"


def cell(row: dict | None, name: str, form: str) -> str:
    if row is None:
        return "-"
    if "error" in row:
        return f"no: {gib(row['needs_bytes'])}" if "needs_bytes" in row else "failed"
    return form.format(row[name]) if name in row else "-"


COLUMNS = {
    "graph_tokens_per_second": ("tokens/s of the engine's steps, CUDA graphs", "{:,.0f}"),
    "eager_tokens_per_second": ("tokens/s of the engine's steps, eager", "{:,.0f}"),
    "forward_ms": ("ms of the forward on the GPU", "{:.3f}"),
    "share_of_bound": ("share of the bandwidth bound", "{:.0%}"),
}


def table(rows: list[dict], name: str) -> Iterator[str]:
    """Lines of one column for every model, batch and context."""
    title, form = COLUMNS[name]
    aged = {(x["attention"], x["batch"], x["context"]): x for x in rows if x.get("requests") == "aged"}
    contexts = sorted({n for *_, n in aged})
    yield f"{title}\n  {'':11}{'batch':>6}" + "".join(f"{show_length(n):>16}" for n in contexts) + f"{'spread':>9}"
    for attention in ATTENTIONS:
        for batch in sorted({b for a, b, _ in aged if a == attention}):
            found = [aged.get((attention, batch, n)) for n in contexts]
            values = [x[name] for x in found if x and name in x]
            spread = f"{max(values) / min(values) - 1:.1%}" if len(values) > 1 else "-"
            yield f"  {attention:11}{batch:6}" + "".join(f"{cell(x, name, form):>16}" for x in found) + f"{spread:>9}"


def tables(rows: list[dict], gb_per_s: float) -> Iterator[str]:
    """Everything that was measured, for a reader."""
    yield f"copy {gb_per_s:,.0f} GB/s; bound = (weights + 2 batch state + batch context kv) / copy"
    for attention in ATTENTIONS:
        row = next((x for x in rows if x["attention"] == attention and "weight_bytes" in x), None)
        if row:
            yield (
                f"  {attention}: {row['parameters'] / 1e6:,.0f} M parameters, weights {gib(row['weight_bytes'])}, "
                f"state {gib(row['state_bytes'])} of a request, kv {row['kv_bytes'] / 1024:.0f} KiB of a token"
            )
    if any(x.get("requests") == "aged" for x in rows):
        for name in (name for name in COLUMNS if any(name in x for x in rows)):
            yield from ("", *table(rows, name))
    read = [x for x in rows if x.get("requests") == "read" and "error" not in x]
    if read:
        yield "\none request that read its whole prompt: context, s, peak beyond the model, then its step and forward"
    for x in read:
        yield (
            f"  {x['attention']:11}{show_length(x['context']):>6}{x['prefill_seconds']:9.2f} s"
            f"{gib(x['prefill_peak_bytes']):>12}  graphs {cell(x, 'graph_step_ms', '{:.3f}')} ms, eager "
            f"{x['eager_step_ms']:.3f} ms, forward {x['forward_ms']:.3f} ms"
        )
    first = [x for x in rows if x["kind"] == "first token"]
    if first:
        yield "\ntime to the first token, one request"
    for x in first:
        yield f"  {x['attention']:11}{show_length(x['context']):>6}  {cell(x, 'seconds', '{:.3f} s')}"
    memory = [x for x in rows if x["kind"] == "memory"]
    if memory:
        yield "\nmemory of a request: formula, allocated by the context for each of four or one"
    for x in memory:
        size = x.get("allocated_bytes", x.get("bytes"))
        shown = "does not fit" if size is None else gib(size)
        yield f"  {x['attention']:11}{show_length(x['context']):>6}  {gib(x['formula_bytes']):>12}  {shown}"
    for x in rows:
        if "error" in x and "needs_bytes" not in x and x["error"] != "does not fit":
            yield f"FAILED {' '.join(str(part) for part in key(x) if part)}: {x['error']}"


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    end = time.time() + 60 * options.minutes - GRACE
    words = sys.argv[1:] if argv is None else argv
    gb_per_s = bandwidth(options.dry)
    about = machine(cpu=options.dry) | when()
    about |= dict(
        commands=[shlex.join(["python", "-m", "tests.benchmarks.decode", *words])], copy_gb_per_s=round(gb_per_s, 1)
    )
    target, rows = options.out / f"{NAME}.json", {}
    if options.append and target.exists():
        rows = {key(x): x for x in json.loads(target.read_text())["rows"]}
    with tempfile.TemporaryDirectory() as folder:
        for number, plan in enumerate(plans(options)):
            what = f"{plan['attention']} at {', '.join(map(show_length, plan['contexts']))}"
            if end - time.time() < LEAST:
                print(f"-- {what}: no time left", flush=True)
                continue
            for attempt in (plan, plan | dict(cuda_graph=False)):
                begin, file = time.time(), Path(folder) / f"{number}-{attempt['cuda_graph']}.jsonl"

                def keep(file=file) -> None:
                    collect(file, gb_per_s, rows)
                    write(target, about, NAME, list(rows.values()))

                # a process that takes long leaves half of what is left to those that come
                deadline = min(end, begin + max(FEWEST_SECONDS, (end - begin) / 2))
                problem = run(attempt, deadline, file, keep)
                print(f"-- {what}: {problem or 'done'}, {time.time() - begin:.0f} s", flush=True)
                if problem:
                    row = {name: plan[name] for name in ("model", "attention", "contexts")}
                    row |= dict(kind="process", context=plan["contexts"][0], error=problem)
                    rows[key(row)] = row
                    write(target, about, NAME, list(rows.values()))
                if problem is None or not attempt["cuda_graph"] or file.stat().st_size or end - time.time() < LEAST:
                    break
                print(f"-- {what}: again without CUDA graphs", flush=True)
    found = list(rows.values())
    print("\n".join(tables(found, gb_per_s)), flush=True)
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: draw with python -m tests.benchmarks.plot", flush=True)
    elif any(x.get("requests") == "aged" for x in found):
        from .plot import draw_all

        print("\n".join(map(str, draw_all(options.out, [NAME]))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
