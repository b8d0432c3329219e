"""A/B of the two kernels that are off by default, on one H200: tiling.FUSED (dk and dv in one walk) and
tiling.PACKED_OVERLAP (Gluon walks of packed sequences).

    cd <repository> && python ab11.py                 # all: correctness, then times; the table comes last
    python ab11.py --only fused --skip-times          # parts of it
    python ab11.py --out ab11.json

Correctness first: every flagged kernel against the unflagged ones (outputs, states, all gradients), the same tolerances
as the tests. A case that takes longer than --timeout seconds (compiling included) says so and ends the process: what
hangs cannot be stopped otherwise. A flag with a failed case is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
import traceback

sys.path.insert(0, os.getcwd())

import torch

try:
    from lightning_megatron import decay
    from lightning_megatron.ops import lightning_attn
    from lightning_megatron.ops.triton import attention as triton_backend
    from lightning_megatron.ops.triton import tiling
    from tests.ops.cases import Impl, evaluate, make_case
    from tests.ops.isolation import check_isolated, packed, without_states
    from tests.ops.launches import forget_plans
    from tests.ops.parts import check_parts, draw
    from tests.tolerances import SMALLEST, TOLERANCES, error
except ImportError as missing:
    sys.exit(f"{missing}: run from the repository's root, with its virtual environment")

BF16 = Impl("triton", torch.bfloat16, "cuda")
FLAGS = {"fused": "FUSED", "packed": "PACKED_OVERLAP"}
STARTED = time.monotonic()


def say(*words: object) -> None:
    print(f"[{time.monotonic() - STARTED:7.1f}s]", *words, flush=True)


def turn(fused: bool = False, packed: bool = False) -> None:
    """Plans remember what the flags were."""
    tiling.FUSED, tiling.PACKED_OVERLAP = fused, packed
    forget_plans()


class Watch:
    """Ends the process if a case takes too long."""

    def __init__(self, what: str, seconds: float, results: dict, out: str) -> None:
        self.what, self.seconds, self.results, self.out = what, seconds, results, out

    def __enter__(self) -> Watch:
        self.timer = threading.Timer(self.seconds, self.end)
        self.timer.daemon = True
        self.timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()

    def end(self) -> None:
        say(f"TIMEOUT: {self.what}: no result in {self.seconds:.0f} s, the kernel hangs or compiling is slow. Ending.")
        self.results["timeout"] = self.what
        report(self.results, self.out)
        os._exit(3)


def kernels_used() -> list[str]:
    """Names of the kernels of all plans: which ones ran."""
    launches = [x._launch for x in triton_backend._forwards.values() if x._launch is not None]
    for plan in triton_backend._backwards.values():
        launches += plan._gradients.values()
    return sorted({x._kernel.fn.__name__ for x in launches})


# ---- correctness -----------------------------------------------------------------------------------------------------
DENSE = {  # B, T, H, Hkv, K, V, states
    "short": (1, 40, 2, 2, 128, 128, True),
    "one chunk and a token": (2, 65, 2, 1, 128, 128, True),
    "one segment": (2, 1000, 4, 4, 128, 128, True),
    "segments": (1, 4096, 4, 4, 128, 128, True),
    "segments, no states": (1, 4100, 4, 4, 128, 128, False),
    "grouped": (1, 8192, 8, 2, 128, 128, True),
    "ragged": (3, 2500, 3, 1, 128, 128, False),
    "padded": (2, 1500, 4, 2, 96, 80, True),
    "padded, no states": (1, 3000, 2, 2, 80, 112, False),
    "many heads": (8, 2048, 32, 32, 128, 128, False),
}
MIXED = (1, 0, 700, 64, 64, 1, 1, 3, 2000, 128, 5, 0, 1200, 37, 900)
PACKED = {  # lengths, H, Hkv, K, V
    "one document": ((3000,), 4, 4, 128, 128),
    "mixed": (MIXED, 4, 2, 128, 128),
    "on borders": ((64, 1024, 0, 0, 1024, 2048, 32, 32), 2, 2, 128, 128),
    "600 documents": (tuple(1 + 7 * i % 60 for i in range(600)), 4, 4, 128, 128),
    "64 columns": (MIXED, 2, 1, 64, 64),
    "128 by 64": (MIXED, 2, 2, 128, 64),
    "padded": (MIXED, 2, 2, 96, 80),
    "wide": (MIXED, 2, 2, 256, 256),
}


def differences(got: dict, want: dict) -> tuple[dict[str, float], list[str]]:
    table, errors = TOLERANCES["triton", torch.bfloat16], {}
    for name, x in want.items():
        kind = name if name in table else "final_state"
        errors[name] = error(kind, got[name], x, SMALLEST[torch.bfloat16])
    return errors, [name for name, e in errors.items() if e > table[name if name in table else "final_state"]]


def compare(flag: str, case, run, wanted: str) -> str:
    """The flagged kernels against the others; twice, which must give the same bits."""
    turn()
    want = run(case)
    without = kernels_used()
    turn(**{flag: True})
    got = run(case)
    again = run(case)
    used = kernels_used()
    torch.cuda.synchronize()
    errors, wrong = differences(got, want)
    text = " ".join(f"{name}={e:.1e}" for name, e in errors.items())
    assert any(wanted in name for name in used), f"{wanted} did not run: {used}, without the flag {without}"
    assert not wrong, f"{wrong} differ: {text}"
    unsteady = [name for name in got if not torch.equal(got[name], again[name])]
    assert not unsteady, f"not the same bits in a second run: {unsteady}"
    return text


def everything(case) -> dict:
    return evaluate(BF16.attn, case)


def check_fused(rng):
    for name, (B, T, H, Hkv, K, V, initial) in DENSE.items():

        def one(B=B, T=T, H=H, Hkv=Hkv, K=K, V=V, initial=initial):
            case = make_case(
                rng, BF16, B=B, T=T, H=H, Hkv=Hkv, K=K, V=V, initial=initial, log_decay=(-0.003, -0.1, 0.0)
            )
            run = everything if initial else lambda x: evaluate(BF16.attn, x, ["o"])
            return compare("fused", case, run, "hopper_fused")

        yield f"fused: {name}", one


def check_packed(rng):
    for name, (lengths, H, Hkv, K, V) in PACKED.items():

        def one(lengths=lengths, H=H, Hkv=Hkv, K=K, V=V):
            case = make_case(
                rng, BF16, documents=lengths, H=H, Hkv=Hkv, K=K, V=V, initial=False, log_decay=(-0.003, -0.1, 0.0)
            )
            return compare("packed", case, without_states(BF16), "hopper_gradients")

        yield f"packed: {name}", one

        def states(lengths=lengths, H=H, Hkv=Hkv, K=K, V=V):
            """States of documents: Triton's walks take them, which must not change."""
            case = make_case(rng, BF16, documents=lengths, H=H, Hkv=Hkv, K=K, V=V, log_decay=(-0.003, -0.1, 0.0))
            return compare("packed", case, everything, "gradients_kernel")

        if name == "mixed":
            yield f"packed: {name}, states of documents", states
    for rows, T, K, V in ((1, 2100, 128, 128), (3, 300, 128, 128), (2, 1200, 64, 64), (2, 1100, 128, 64)):
        for apart in (False, True):

            def of_rows(rows=rows, T=T, K=K, V=V, apart=apart):
                """Initial and final states, as with context parallelism, against the recurrence in fp64."""
                turn(packed=True)
                case, bounds = draw(rng, BF16, rows, T, K, V)
                check_parts(BF16, case, bounds, apart)
                used = kernels_used()
                assert "hopper_gradients_kernel" in used, used
                return f"{bounds.shape[1] - 1} documents"

            yield f"packed: states of {rows} rows of {T}, {K}x{V}{', states apart' if apart else ''}", of_rows

    for lengths in ((5, 300, 1, 1200, 65, 700), (2048, 64, 64, 3, 1000)):

        def isolated(lengths=lengths):
            """What is not finite stays in its document: the second pass, token by token."""
            turn(packed=True)
            case = make_case(rng, BF16, documents=lengths, H=2, K=128, V=128, log_decay=(-0.02, 0.0))
            alone = [x._replace(enters=None, leaves=None) for x in packed(lengths)]
            check_isolated(BF16, without_states(BF16), case, alone, rng)
            return str(kernels_used())

        yield f"packed: NaN and infinity, documents {lengths}", isolated


def check(flag: str, timeout: float, results: dict, out: str) -> bool:
    rng = torch.Generator().manual_seed(11)
    good = True
    for name, one in {"fused": check_fused, "packed": check_packed}[flag](rng):
        start = time.monotonic()
        say(f"{name} (timeout {timeout:.0f} s) ...")
        with Watch(name, timeout, results, out):
            try:
                text, passed = one(), True
            except Exception as wrong:
                text, passed = f"{type(wrong).__name__}: {str(wrong)[:1500]}", False
                traceback.print_exc()
                if "CUDA" in str(wrong) or "illegal" in str(wrong):
                    results["checks"].append((name, False, text))
                    say(f"FAILED {name}: {text}. The CUDA context is lost; ending.")
                    report(results, out)
                    os._exit(4)
        good &= passed
        results["checks"].append((name, passed, text))
        say(f"{'ok    ' if passed else 'FAILED'} {name} in {time.monotonic() - start:.1f} s: {text}")
    turn()
    return good


# ---- times -----------------------------------------------------------------------------------------------------------
def mixed_lengths(T: int, count: int) -> list[int]:
    """From long to short, in a fixed random order, none on a border of a chunk."""
    weights = torch.rand(count, generator=torch.Generator().manual_seed(5)).exp2().pow(4)
    ends = (weights.cumsum(0) / weights.sum() * T).long()
    ends[-1] = T
    return torch.diff(ends, prepend=torch.zeros(1, dtype=torch.long)).tolist()


SHAPES = {  # flag; B, T, H, Hkv, lengths of documents
    "8x2048x32": ("fused", 8, 2048, 32, 32, None),
    "4x8192x32": ("fused", 4, 8192, 32, 32, None),
    "1x8192x32": ("fused", 1, 8192, 32, 32, None),
    "1x32768x32": ("fused", 1, 32768, 32, 32, None),
    "1x131072x16": ("fused", 1, 131072, 16, 16, None),
    "1x32768, 8 of 32 heads": ("fused", 1, 32768, 32, 8, None),
    "1x32768x32, 16 documents of 2048": ("packed", 1, 32768, 32, 32, [2048] * 16),
    "1x32768x32, 64 mixed documents": ("packed", 1, 32768, 32, 32, mixed_lengths(32768, 64)),
}
COPIES, ROUNDS, CALLS = 3, 8, 4  # inputs, each much larger than the L2 cache of 50 MB; rounds of A and B; calls in one


def measure(name: str) -> dict:
    """Medians in ms of forward and backward, off and on, in turns."""
    flag, B, T, H, Hkv, lengths = SHAPES[name]
    generator = torch.Generator("cuda").manual_seed(3)
    new = lambda heads: torch.randn(B, T, heads, 128, device="cuda", dtype=torch.bfloat16, generator=generator)
    inputs = [[x.requires_grad_() for x in (new(H), new(Hkv), new(Hkv))] for _ in range(COPIES)]
    dos = [new(H) for _ in range(COPIES)]
    log_decay = torch.tensor(decay._slopes("alibi", H, 0, 1), device="cuda").neg().float()
    bounds = None
    if lengths is not None:
        bounds = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    forward = lambda i: lightning_attn(*inputs[i], log_decay, cu_seqlens=bounds)[0]
    backward = lambda i, o: torch.autograd.grad(o, inputs[i], dos[i])
    found = {(on, way): [] for on in (False, True) for way in ("forward", "backward")}
    used = {}
    for round_ in range(ROUNDS):
        for on in (False, True) if round_ % 2 == 0 else (True, False):
            turn(**{flag: on})
            for i in range(COPIES if round_ == 0 else 1):  # compile, plan, warm up
                backward(i, forward(i))
            used[on] = kernels_used()
            torch.cuda.synchronize()
            torch.cuda._sleep(40_000_000)  # so that all is queued before it starts
            events = []
            for call in range(CALLS):
                i = call % COPIES
                marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
                marks[0].record()
                o = forward(i)
                marks[1].record()
                backward(i, o)
                marks[2].record()
                del o
                events.append(marks)
            torch.cuda.synchronize()
            for a, b, c in events:
                found[on, "forward"].append(a.elapsed_time(b))
                found[on, "backward"].append(b.elapsed_time(c))
    turn()
    row = {"shape": name, "flag": flag, "kernels off": used[False], "kernels on": used[True]}
    for way in ("forward", "backward"):
        for on in (False, True):
            times = found[on, way]
            row[f"{way} {'on' if on else 'off'}"] = statistics.median(times)
            row[f"{way} {'on' if on else 'off'} spread"] = [min(times), max(times)]
    return row


def report(results: dict, out: str) -> None:
    """The table, last; and everything as JSON."""
    with open(out, "w") as file:
        json.dump(results, file, indent=1)
    failed = [x for x in results["checks"] if not x[1]]
    print(f"\nwritten: {out}")
    print(f"checks: {len(results['checks']) - len(failed)} passed, {len(failed)} failed", flush=True)
    for name, _, text in failed:
        print(f"  FAILED {name}: {text[:300]}")
    if "timeout" in results:
        print(f"  TIMEOUT {results['timeout']}")
    print(f"\n{results['device']}, torch {results['torch']}, ms, medians; off -> on\n")
    of_one = f"{'on':>8} {'ratio':>6}"
    print(f"{'shape':<36} {'flag':<7} {'forward off':>11} {of_one}   {'backward off':>12} {of_one}")
    for row in results["times"]:
        cells = [row[f"{way} {on}"] for way in ("forward", "backward") for on in ("off", "on")]
        print(
            f"{row['shape']:<36} {row['flag']:<7} {cells[0]:11.3f} {cells[1]:8.3f} {cells[1] / cells[0]:6.3f}   "
            f"{cells[2]:12.3f} {cells[3]:8.3f} {cells[3] / cells[2]:6.3f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=FLAGS, help="one of the two flags")
    parser.add_argument("--skip-checks", action="store_true", help="times alone")
    parser.add_argument("--skip-times", action="store_true", help="checks alone")
    parser.add_argument("--timeout", type=float, default=90.0, help="seconds for a case, compiling included")
    parser.add_argument("--out", default=os.path.join(os.environ.get("OUT", "."), "ab11.json"))
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("ab11 needs a Hopper GPU (sm_90); this machine has no CUDA device. The imports are fine.")
    if torch.cuda.get_device_capability() != (9, 0):
        sys.exit(f"ab11 needs a Hopper GPU (sm_90), not {torch.cuda.get_device_name()}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("unset TRITON_INTERPRET: it replaces the compiler")
    flags = [given.only] if given.only else list(FLAGS)
    results = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "checks": [], "times": []}
    good = {flag: given.skip_checks or check(flag, given.timeout, results, given.out) for flag in flags}
    if not given.skip_times:
        for name, (flag, *_) in SHAPES.items():
            if flag not in flags:
                continue
            if not good[flag]:
                say(f"not timed, as a check of {flag} failed: {name}")
                continue
            say(f"time: {name} ...")
            with Watch(name, 2 * given.timeout, results, given.out):
                try:
                    results["times"].append(measure(name))
                    say({k: v for k, v in results["times"][-1].items() if "spread" not in k})
                except Exception as wrong:
                    traceback.print_exc()
                    say(f"FAILED to time {name}: {wrong}")
            torch.cuda.empty_cache()
    report(results, given.out)
    sys.exit(0 if all(good.values()) else 1)


if __name__ == "__main__":
    main()
