"""Speed, memory and error of lightning_attn and its peers on one GPU.

    python -m tests.benchmarks.attention                        # speed: forward, backward, both; eager and CUDA graph
    python -m tests.benchmarks.attention --suite all            # everything; plots: python -m tests.benchmarks.plot
    python -m tests.benchmarks.attention --suite dims packed --only lightning "fla chunk"
    python -m tests.benchmarks.attention --precompile 16        # compile in 16 processes first: minutes less with fla

Prints tables and writes <out>/<suite>.json. Peers that are not installed are skipped. ``speedup`` is the time of the
faster fla row over the time of this row; ``% floor`` is the time of the least traffic, at the bandwidth of a copy
measured in the same run, over the time. bf16; decays are ALiBi slopes, or with --decay zero none (our worst case: no
head forgets).
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_megatron import decay

from . import measure, peers
from .measure import Shape, floor_ms
from .report import RESULT_NAMES, environment, line, write

RESULTS = Path(__file__).parent / "results"
REPEATS, QUICK_REPEATS = 20, 5
SEED = 0
PRESETS = {"alibi": "alibi", "zero": "none"}

SPEED = [Shape(*sizes) for sizes in (
    (1, 2048, 32), (1, 8192, 8), (1, 8192, 32), (8, 2048, 32), (4, 8192, 32), (1, 32768, 32), (1, 131072, 16),
)]  # fmt: skip
SMALL = SPEED[:2]  # where launches cost as much as the work: eager and as a CUDA graph too
LENGTHS = [Shape(1, 1 << n, 16) for n in range(10, 21)]
SOFTMAX_T = 32768  # longer sequences take softmax seconds a call
TUNED_T = 32768  # autotuners do not choose again only because a sequence is longer than this
SLOW_MS = 400.0  # no longer sequences for an implementation this slow
DIMS = [Shape(1, 16384, 16, K, V) for K, V in (
    (64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (128, 64), (64, 128), (128, 256),
)]  # fmt: skip
HEADS = [Shape(1, 32768, heads) for heads in (8, 16, 20, 24, 28, 32, 40, 48, 80)]  # some fill no GPU evenly
PACKED = Shape(1, 65536, 16)
LONGEST = 32768  # document
GROUPED = [*(Shape(1, 16384, 32, Hkv=heads) for heads in (32, 8, 4, 1)), Shape(1, 32768, 32, Hkv=8)]
DECODE = [Shape(B, 1, 16) for B in (1, 4, 16, 64, 128, 256)]
MEMORY = [Shape(1, 8192, 32), Shape(1, 32768, 32), Shape(8, 2048, 32)]
ERROR = [Shape(1, 4096, 8), Shape(1, 131072, 8)]

Group = list[dict]  # rows that are compared with one another


@dataclass(frozen=True)
class Bench:
    """Options of one run."""

    preset: str
    repeats: int
    quick: bool
    only: list[str] | None
    gb_per_s: float

    def rows(self, suite: str) -> list[peers.Row]:
        return [row for row in peers.choose(suite, self.only, autotune=not self.quick) if _installed(row)]

    def log_decay(self, heads: int) -> torch.Tensor:
        return decay.log_decay(self.preset, heads, 0, 1).to(measure.DEVICE)

    def floor(self, traffic: int, ms: float) -> float:
        """The floor in percent of a time."""
        return 100 * floor_ms(traffic, self.gb_per_s) / ms


@functools.cache
def _installed(row: peers.Row) -> bool:
    reason = row.why_missing()
    if reason:
        print(reason)
    return reason is None


def attempt(measure: Callable[..., dict], bench: Bench, row: peers.Row, shape: Shape, **kwargs) -> dict:
    """A row of results; with ``failed`` and the reason where an implementation does not get through."""
    result = {"impl": row.name, **shape.columns(), "note": row.note}
    torch.manual_seed(SEED)
    try:
        if row.autotunes:
            documents = kwargs["cu_seqlens"].numel() - 1 if "cu_seqlens" in kwargs else None
            peers.tune_for(shape.B, min(shape.T, TUNED_T), shape.H, shape.K, shape.V, documents)
        result |= measure(bench, row, shape, **kwargs)
    except torch.OutOfMemoryError:
        result["failed"] = "out of memory"
    except Exception as error:  # a peer that fails must not end the run; it is reported in its row
        result["failed"] = f"{type(error).__name__}: {str(error).strip().partition('\n')[0][:80]}"
    torch.cuda.synchronize()  # raises if the failure has cost us the device
    torch.cuda.empty_cache()
    return result


def times(
    bench: Bench, row: peers.Row, shape: Shape, *, what=("forward", "backward", "both"), launches=False, **features
) -> dict:
    """GPU times and percent of the floor; with ``launches`` also eager and CUDA graph times of forward + backward."""
    attn, log_decay = row.load(), bench.log_decay(shape.H)
    copies = measure.copies_beyond_cache(shape.input_bytes())
    inputs = [measure.random_inputs(shape, row.layout, row.backward) for _ in range(copies)]

    def forward(q, k, v, do):
        return attn(q, k, v, log_decay, **features)[0]

    def both(q, k, v, do):
        return torch.autograd.grad(forward(q, k, v, do), (q, k, v), do)

    def calls(part: str) -> list[Callable]:
        if part == "backward":
            # the forward's graph is kept, so that only the backward is between the events
            grad = functools.partial(torch.autograd.grad, retain_graph=True)
            return [functools.partial(grad, forward(*x), x[:3], x[3]) for x in inputs]
        return [functools.partial(forward if part == "forward" else both, *x) for x in inputs]

    traffic = {"forward": shape.forward_bytes(), "backward": shape.backward_bytes()}
    traffic["both"] = sum(traffic.values())
    result, late = {}, []
    for part in what if row.backward else ("forward",):
        timing = measure.gpu_time(calls(part), bench.repeats)
        result |= {f"{part}_ms": timing.ms, f"{part}_calls": timing.calls}
        if not row.softmax:  # whose floor is arithmetic
            result[f"{part}_floor"] = bench.floor(traffic[part], timing.ms)
        if timing.host_bound:
            late.append(part)
    if late:
        result["note"] = "; ".join(filter(None, [row.note, f"waits for the host in {' and '.join(late)}"]))
    if launches and row.backward:
        result["eager_ms"] = measure.eager_ms(calls("both"), bench.repeats)
        try:
            result["graph_ms"] = measure.graph_ms(calls("both"), bench.repeats)
        except RuntimeError as error:
            result["note"] = "; ".join(filter(None, [row.note, f"no CUDA graph ({type(error).__name__})"]))
    return result


def add_speedups(group: Group) -> Group:
    """How many times faster than the faster fla row, in each time."""
    fla = {row.name for row in peers.ROWS if row.is_fla}
    for part in ("forward", "backward", "both", "eager", "graph"):
        best = min((x[f"{part}_ms"] for x in group if x["impl"] in fla and f"{part}_ms" in x), default=None)
        for x in group:
            if best is not None and f"{part}_ms" in x:
                x[f"{part}_speedup"] = best / x[f"{part}_ms"]
    return group


def speed(bench: Bench) -> Iterator[Group]:
    for shape in SPEED:
        rows = [row for row in bench.rows("speed") if not (row.softmax and shape.T > SOFTMAX_T)]
        yield add_speedups([attempt(times, bench, row, shape, launches=shape in SMALL) for row in rows])


def length(bench: Bench) -> Iterator[Group]:
    rows = bench.rows("length")
    for shape in LENGTHS[: 7 if bench.quick else None]:
        group = [attempt(times, bench, row, shape, what=("forward", "both")) for row in rows]
        done = {x["impl"] for x in group if "failed" in x or x.get("both_ms", x.get("forward_ms")) > SLOW_MS}
        rows = [row for row in rows if row.name not in done]
        yield add_speedups(group)


def each_way(bench: Bench, suite: str, shapes: list[Shape]) -> Iterator[Group]:
    for shape in shapes:
        rows = bench.rows(suite)
        yield add_speedups([attempt(times, bench, row, shape, what=("forward", "backward")) for row in rows])


def dims(bench: Bench) -> Iterator[Group]:
    return each_way(bench, "dims", DIMS)


def heads(bench: Bench) -> Iterator[Group]:
    return each_way(bench, "heads", HEADS)


def grouped(bench: Bench) -> Iterator[Group]:
    return each_way(bench, "grouped", GROUPED)


def documents(total: int, spread: str) -> list[int]:
    """Random lengths from 1 to ``LONGEST`` that add up to ``total``: evenly spread, or their logarithms."""
    rng, lengths = random.Random(SEED), []
    while sum(lengths) < total:
        drawn = rng.uniform(1, LONGEST) if spread == "uniform" else LONGEST ** rng.random()
        lengths.append(min(round(drawn), total - sum(lengths)))
    return lengths


def packed(bench: Bench) -> Iterator[Group]:
    what = ("forward", "backward")
    group = [attempt(times, bench, row, PACKED, what=what) for row in bench.rows("packed") if not row.is_fla]
    dense = group[0] if group else {}
    for x in group:
        x |= {"documents": 1, "longest": PACKED.T}
    for spread in ("uniform", "logarithmic"):
        lengths = documents(PACKED.T, spread)
        bounds = measure.bounds(lengths)
        for row in bench.rows("packed"):
            x = attempt(times, bench, row, PACKED, what=what, cu_seqlens=bounds)
            group.append(x | {"documents": len(lengths), "longest": max(lengths)})
    for x in group:
        for part in what:
            if f"{part}_ms" in dense and f"{part}_ms" in x:
                x[f"{part}_vs_dense"] = x[f"{part}_ms"] / dense[f"{part}_ms"]
    yield group


def decode_times(bench: Bench, row: peers.Row, shape: Shape) -> dict:
    """One token with a state that enters and one that leaves; the floor is reading and writing that."""
    attn, log_decay = row.load(), bench.log_decay(shape.H)
    calls = []
    for _ in range(measure.copies_beyond_cache(shape.state_bytes())):
        q, k, v, _ = measure.random_inputs(shape, row.layout, grad=False)
        state = torch.randn(shape.B, shape.H, shape.K, shape.V, device=measure.DEVICE)
        calls.append(functools.partial(attn, q, k, v, log_decay, initial_state=state, output_final_state=True))
    with torch.no_grad():
        timing = measure.gpu_time(calls, bench.repeats)
        return {
            "forward_ms": timing.ms,
            "forward_floor": bench.floor(2 * shape.state_bytes(), timing.ms),
            "eager_ms": measure.eager_ms(calls, bench.repeats),
        }


def decode(bench: Bench) -> Iterator[Group]:
    for shape in DECODE:
        yield add_speedups([attempt(decode_times, bench, row, shape) for row in bench.rows("decode")])


def extra_memory(bench: Bench, row: peers.Row, shape: Shape) -> dict:
    attn, log_decay = row.load(), bench.log_decay(shape.H)
    inputs = measure.random_inputs(shape, row.layout, grad=True)
    extra = measure.extra_bytes(lambda q, k, v: attn(q, k, v, log_decay)[0], *inputs)
    return {"extra_mib": extra / 2**20, "extra_percent": 100 * extra / shape.input_bytes()}


def memory(bench: Bench) -> Iterator[Group]:
    for shape in MEMORY:
        yield [attempt(extra_memory, bench, row, shape) for row in bench.rows("memory")]


def results_of(attn: Callable, q, k, v, log_decay, state, do, dfinal) -> dict[str, torch.Tensor]:
    """Outputs, and gradients of <o, do> + <final_state, dfinal>."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, state)]
    outputs = attn(*leaves[:3], log_decay, initial_state=leaves[3], output_final_state=True)
    given = [x.to(y.dtype) for x, y in zip((do, dfinal), outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, leaves, given)
    return {name: x.detach() for name, x in zip(RESULT_NAMES, (*outputs, *gradients), strict=True)}


def exact_results(*inputs) -> dict[str, torch.Tensor]:
    """In fp64."""
    from lightning_megatron.ops import lightning_attn

    return results_of(functools.partial(lightning_attn, backend="torch"), *(x.double() for x in inputs))


def errors(bench: Bench, row: peers.Row, shape: Shape, *, inputs, expected: dict[str, torch.Tensor]) -> dict:
    """Norm of the difference over norm."""
    got = results_of(row.load(), *inputs)
    return {name: float((got[name].double() - x).norm() / x.norm()) for name, x in expected.items()}


def mark_largest(group: Group) -> Group:
    """In each row the names of the results whose error is the largest of the group."""
    passed = [x for x in group if "failed" not in x]
    for x in passed if len(passed) > 1 else []:
        x["largest"] = " ".join(name for name in RESULT_NAMES if x[name] == max(y[name] for y in passed)) or "none"
    return group


def error(bench: Bench) -> Iterator[Group]:
    for shape in ERROR:
        torch.manual_seed(SEED)
        q, k, v, do = measure.random_inputs(shape, peers.BTHD, grad=False)
        state, dfinal = (torch.randn(shape.B, shape.H, shape.K, shape.V, device=measure.DEVICE) for _ in range(2))
        zero = torch.zeros(shape.H, device=measure.DEVICE)
        alibi = decay.log_decay("alibi", shape.H, 0, 1).to(measure.DEVICE)
        for name, log_decay in {"zero": zero, "alibi": alibi, "strong": zero - 1}.items():
            inputs = (q, k, v, log_decay, state, do, dfinal)
            expected = exact_results(*inputs)
            rows = bench.rows("error")
            group = [attempt(errors, bench, row, shape, inputs=inputs, expected=expected) for row in rows]
            yield mark_largest([x | {"decay": name} for x in group])


# length is last: its longest sequences are the likeliest to run into a limit of a peer
SUITES = {f.__name__: f for f in (speed, dims, heads, packed, grouped, decode, memory, error, length)}


def result_path(out: Path, suite: str, args: argparse.Namespace) -> Path:
    """Short runs and those without decay do not replace the results that are shown."""
    marks = (["zero"] if args.decay == "zero" else []) + (["quick"] if args.quick else [])
    return out / ("-".join([suite, *marks]) + ".json")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tests.benchmarks.attention", description=__doc__, formatter_class=raw)
    parser.add_argument("--suite", nargs="+", default=["speed"], choices=[*SUITES, "all"], help="default: speed")
    parser.add_argument("--only", nargs="+", choices=[row.name for row in peers.ROWS], help="these implementations")
    parser.add_argument("--decay", default="alibi", choices=PRESETS, help="of all suites but error, which has its own")
    parser.add_argument("--quick", action="store_true", help="few repetitions, no peers that autotune")
    parser.add_argument("--precompile", type=int, default=0, metavar="N", help="first compile in N processes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files (default: %(default)s)")
    args = parser.parse_args(argv)
    args.suite = list(SUITES) if "all" in args.suite else list(dict.fromkeys(args.suite))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device, and torch finds none")
    missing = {}
    if args.precompile:
        from . import precompile

        precompile.fill(args.precompile, args.suite, args.only, args.quick)
        missing = precompile.watch()
    repeats = QUICK_REPEATS if args.quick else REPEATS
    bench = Bench(PRESETS[args.decay], repeats, args.quick, args.only, measure.copy_bandwidth())
    used = {row.name: row for suite in args.suite for row in bench.rows(suite)}
    about = environment(used.values(), bench.gb_per_s, decay=args.decay, repeats=repeats)
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    for suite in args.suite:
        rows = []
        print(f"\n{suite}\n{line(suite)}", flush=True)
        try:
            for group in SUITES[suite](bench):
                rows += group
                print("\n".join(line(suite, x) for x in group), flush=True)
        finally:  # what was measured before a failure is kept
            write(result_path(args.out, suite, args), about, suite, rows)
        print(f"written: {result_path(args.out, suite, args)}")
    if missing:
        print(f"not precompiled: {dict(missing)}")


if __name__ == "__main__":
    main()
