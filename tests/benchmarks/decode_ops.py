"""Decoding on one GPU: lightning_step, the fused lightning_decode, the same without fusion, and peers.

    python -m tests.benchmarks.decode_ops                          # all; about half a minute
    python -m tests.benchmarks.decode_ops --requests 64 --heads 16 --only step decode
    python -m tests.benchmarks.decode_ops --sweep                  # other tiles than step_tiles chooses
    python -m tests.benchmarks.decode_ops --seg-la seg_la.py       # SGLang's file, which needs torch and triton only

Times are of one call in a CUDA graph that holds many, which take turns with states that together are twice the L2
cache. ``% copy`` is the bandwidth of the least traffic (states read and written, inputs and outputs, for layers also
weights), over that of a copy measured in the same run. ``error`` is the norm of the difference to fp64 over the norm,
of few requests only.
bf16, states in fp32, K = V = 128. What fails says so, and the others go on.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

from examples.provenance import when
from lightning_megatron import decay, ops

from . import measure

HEADS, REQUESTS, DIM = (16, 32), (1, 16, 64, 256), 128
RESULT = Path(__file__).parent / "results" / "decode_ops.json"
MAX_ERROR, CHECKED = 2e-2, 16  # of rows; requests up to which they are checked
CALLS = 32  # in a graph at least: to launch it takes as long as a few of them
EPS = 1e-6
TILES = {  # of --sweep: BK, BV, warps
    "step": [(128, BV, warps) for BV in (16, 32, 64, 128) for warps in (2, 4, 8) if 16 <= 4 * BV // warps <= 64],
    "decode": [(BK, 128, warps) for BK in (32, 64, 128) for warps in (2, 4, 8, 16) if 16 <= 4 * BK // warps <= 128],
}


@dataclass
class Case:
    """Inputs of one call: q, k, v, mixed and hidden of the same requests, their rows of ``states``, and weights."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    hidden: torch.Tensor
    mixed: torch.Tensor
    states: torch.Tensor  # [N, H, K, V], of all calls
    dense: torch.Tensor  # as many rows of states, side by side
    slots: torch.Tensor
    log_decay: torch.Tensor
    head_norm: torch.Tensor
    out_norm: torch.Tensor
    angles: torch.Tensor  # [P, n]
    positions: torch.Tensor
    w_in: torch.Tensor
    w_out: torch.Tensor

    @property
    def dims(self) -> tuple[int, int, int, int]:
        return DIM, DIM, DIM, DIM


def make_cases(R: int, H: int, dtype: torch.dtype = torch.bfloat16) -> list[Case]:
    """As many as do not fit the cache; weights take turns among fewer."""
    device = measure.DEVICE
    randn = functools.partial(torch.randn, device=device, dtype=dtype)
    count = measure.copies_beyond_cache(R * H * DIM * DIM * 4)
    states = torch.randn(count * R, H, DIM, DIM, device=device)
    rows = torch.randperm(count * R, device=device).view(count, R)
    width, hidden = 4 * H * DIM, H * DIM
    weights = [
        (randn(width, hidden) * hidden**-0.5, randn(hidden, hidden) * hidden**-0.5)
        for _ in range(min(count, measure.copies_beyond_cache(2 * (width + hidden) * hidden)))
    ]
    angles = 10 * torch.randn(4 * R, DIM // 4, device=device).repeat(1, 2)
    shared = dict(
        states=states, log_decay=decay.log_decay("alibi", H, 0, 1).to(device), head_norm=1 + 0.1 * randn(DIM),
        out_norm=1 + 0.1 * randn(hidden), angles=angles, positions=torch.randperm(4 * R, device=device)[:R],
    )  # fmt: skip
    return [
        Case(
            *(randn(R, 1, H, DIM) for _ in range(3)), hidden=randn(R, hidden), mixed=randn(R, width), slots=rows[i],
            dense=states[i * R : (i + 1) * R],
            w_in=weights[i % len(weights)][0], w_out=weights[i % len(weights)][1], **shared,
        )
        for i in range(count)
    ]  # fmt: skip


# ---- rows ------------------------------------------------------------------------------------------------------------


def step(c: Case, backend: str | None = None) -> torch.Tensor:
    return ops.lightning_step(c.q, c.k, c.v, c.log_decay, c.states, c.slots, backend=backend)


def gathered(c: Case) -> torch.Tensor:
    """Without a step in place: states are gathered and written back around the operator."""
    o, final = ops.lightning_attn(
        c.q, c.k, c.v, c.log_decay, initial_state=c.states[c.slots], output_final_state=True
    )  # fmt: skip
    c.states[c.slots] = final
    return o


def fused(c: Case, mixed: torch.Tensor | None = None, backend: str | None = None) -> torch.Tensor:
    head = c.head_norm, EPS
    return ops.lightning_decode(
        c.mixed if mixed is None else mixed, c.log_decay, c.states, c.slots, group_dims=c.dims, q_norm=head,
        k_norm=head, angles=c.angles, positions=c.positions, gate="sigmoid", out_norm=(c.out_norm, EPS),
        backend=backend,
    )  # fmt: skip


def unfused(c: Case, mixed: torch.Tensor | None = None) -> torch.Tensor:
    """As the layer does it while it trains."""
    q, gate, k, v = ops.split_heads((c.mixed if mixed is None else mixed)[None], c.dims)
    q, k = (_turned(F.rms_norm(x, (DIM,), c.head_norm, EPS), c.angles[c.positions]) for x in (q, k))
    o = ops.lightning_step(*(x.transpose(0, 1) for x in (q, k, v)), c.log_decay, c.states, c.slots)
    return ops.norm_gate(o.transpose(0, 1), gate, c.out_norm, kind="sigmoid", width=DIM, eps=EPS)[0]


def _turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    n = angles.shape[-1]
    turned, rest = x[..., :n], x[..., n:]
    a, b = turned.chunk(2, -1)
    cos, sin = (f(angles)[:, None].to(x.dtype) for f in (torch.cos, torch.sin))
    return torch.cat((turned * cos + torch.cat((-b, a), -1) * sin, rest), -1)


def layer(c: Case, inner: Callable) -> torch.Tensor:
    """Both projections around ``inner``."""
    return F.linear(inner(c, F.linear(c.hidden, c.w_in)), c.w_out)


def fla_recurrent() -> Callable:
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    def call(c: Case) -> torch.Tensor:
        return fused_recurrent_simple_gla(  # neither slots nor in place: gather and write back are not charged
            c.q, c.k, c.v, g_gamma=c.log_decay, scale=DIM**-0.5, initial_state=c.dense, output_final_state=True
        )[0]

    return call


def vllm_decode() -> Callable:
    from vllm.model_executor.layers.lightning_attn import linear_decode_forward_triton

    def call(c: Case) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (c.q * DIM**-0.5, c.k, c.v))  # it has no scale
        return linear_decode_forward_triton(q, k, v, c.states, -c.log_decay, c.slots).view(c.v.shape)

    return call


def sglang_decode(path: Path | None) -> Callable:
    if path is None:
        from sglang.srt.layers.attention.linear import seg_la
    else:
        spec = importlib.util.spec_from_file_location("seg_la", path)
        assert spec is not None and spec.loader is not None
        seg_la = importlib.util.module_from_spec(spec)
        sys.modules["seg_la"] = seg_la
        spec.loader.exec_module(seg_la)

    def call(c: Case) -> torch.Tensor:
        R = len(c.slots)
        ones = torch.ones(R, device=c.slots.device, dtype=torch.int32)
        meta = seg_la.SegLaMeta(
            batch_size=R, max_q_length=1, q_offsets=ones, s_offsets=c.slots, q_lengths=ones, s_scales=ones
        )  # the last two are not read in decoding
        q, k, v = (x.flatten(0, 1) for x in (c.q, c.k, c.v))
        return seg_la.seg_la_fwd(q, k, v, c.states.flatten(1), -c.log_decay, meta, softmax_scale=DIM**-0.5)[:, None]

    return call


LAYERS = ("decode", "unfused")  # without projections
ROWS: dict[str, Callable[[argparse.Namespace], Callable]] = {
    "step": lambda args: step,
    "gather, lightning_attn, scatter": lambda args: gathered,
    "fla recurrent": lambda args: fla_recurrent(),
    "vLLM": lambda args: vllm_decode(),
    "SGLang seg_la": lambda args: sglang_decode(args.seg_la),
    "decode": lambda args: fused,
    "unfused": lambda args: unfused,
    "layer, decode": lambda args: functools.partial(layer, inner=fused),
    "layer, unfused": lambda args: functools.partial(layer, inner=unfused),
}
WITHOUT_SLOTS = ("fla recurrent",)  # its states are others than the judge's


def least_bytes(name: str, c: Case) -> int:
    """What must be read and written at least."""
    R, H = len(c.slots), c.states.shape[1]
    traffic = 2 * R * H * DIM * DIM * 4
    if name.startswith("layer"):
        return traffic + sum(x.nbytes for x in (c.w_in, c.w_out)) + 2 * c.hidden.nbytes
    return traffic + (c.mixed.nbytes * 5 // 4 if name in LAYERS else 4 * c.q.nbytes)


def judge(name: str, c: Case) -> torch.Tensor:
    """The result of a row in fp64, of states that stay as they are."""
    wide = {key: x.double() if x.is_floating_point() else x for key, x in vars(c).items()}
    wide |= {"states": c.states[c.slots].double(), "slots": torch.arange(len(c.slots), device=c.slots.device)}
    inner = functools.partial(fused, backend="torch")
    exact = Case(**wide)
    if name in LAYERS:
        return inner(exact)
    return layer(exact, inner) if name.startswith("layer") else step(exact, backend="torch")


def attempt(name: str, load: Callable, cases: list[Case], gb_per_s: float, repeats: int) -> dict:
    """One row of the table; a failure is a row, too."""
    c = cases[0]
    about = {"impl": name, "R": len(c.slots), "H": c.states.shape[1], "K": DIM, "V": DIM}
    try:
        call = load()
        if len(c.slots) <= CHECKED and name not in WITHOUT_SLOTS:
            want = judge(name, c)
            got = call(c).double()
            about["error"] = float((got - want).norm() / want.norm())
            if not about["error"] <= MAX_ERROR:
                raise ValueError(f"computes something else: error {about['error']:.1e}")
        calls = [functools.partial(call, x) for x in cases]
        ms = measure.graph_ms(calls * -(-CALLS // len(calls)), repeats)
        rate = least_bytes(name, c) / ms * 1e-6
        about |= {"us": 1e3 * ms, "gb_per_s": rate, "percent_of_copy": 100 * rate / gb_per_s}
    except ImportError as error:
        about["skipped"] = f"{error}"
    except Exception as error:  # whatever a peer raises with this torch and triton, the others can be measured
        about["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return about


def sweep(case_of: Callable[[int, int], list[Case]], args: argparse.Namespace, gb_per_s: float) -> Iterator[dict]:
    """Our two operators with other tiles."""
    from lightning_megatron.ops.triton import step as kernels

    for R in args.requests:
        for H in args.heads:
            cases = case_of(R, H)
            for name, tiles in TILES.items():
                for BK, BV, warps in tiles:
                    chosen = kernels.StepTiles(BK, BV, DIM // BK, warps)
                    with patch.object(kernels, "step_tiles", lambda K, V, whole, chosen=chosen: chosen):
                        row = attempt(name, lambda name=name: ROWS[name](args), cases, gb_per_s, args.repeats)
                    yield row | {"impl": f"{name} {BK}x{BV}, {warps} warps"}


def measured(args: argparse.Namespace, gb_per_s: float) -> Iterator[dict]:
    for H in args.heads:
        for R in args.requests:
            cases = make_cases(R, H)
            for name, load in ROWS.items():
                if args.only is None or name in args.only:
                    yield attempt(name, functools.partial(load, args), cases, gb_per_s, args.repeats)


def line(x: dict | None = None) -> str:
    if x is None:
        return f"{'implementation':34s}{'H':>4s}{'R':>5s}{'us':>10s}{'GB/s':>8s}{'% copy':>8s}{'error':>10s}"
    start = f"{x['impl']:34s}{x['H']:4d}{x['R']:5d}"
    for word in ("skipped", "failed"):
        if word in x:
            return f"{start}  {word.upper()}: {x[word]}"
    error = f"{x['error']:.1e}" if "error" in x else "-"
    return f"{start}{x['us']:10.2f}{x['gb_per_s']:8.0f}{x['percent_of_copy']:8.1f}{error:>10s}"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs="+", default=HEADS)
    parser.add_argument("--requests", type=int, nargs="+", default=REQUESTS)
    parser.add_argument("--only", nargs="+", choices=ROWS)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seg-la", type=Path, help="SGLang's seg_la.py, where sglang is not installed")
    parser.add_argument("--sweep", action="store_true", help="measure step and decode with other tiles, nothing else")
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args, start = parse_args(arguments), time.perf_counter()
    torch.manual_seed(0)
    gb_per_s = measure.copy_bandwidth()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{card}, copy {gb_per_s:.0f} GB/s, torch {torch.__version__}\n{line()}", flush=True)
    rows = []
    with torch.no_grad():
        for row in sweep(make_cases, args, gb_per_s) if args.sweep else measured(args, gb_per_s):
            rows.append(row)
            print(line(row), flush=True)
    about = {"card": card, "torch": torch.__version__, "copy_gb_per_s": gb_per_s, **when()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"suite": "decode_ops", "environment": about, "rows": rows}, indent=1) + "\n")
    print(f"{time.perf_counter() - start:.0f} s; written to {args.out}")


if __name__ == "__main__":
    main()
