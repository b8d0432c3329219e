"""Tables and JSON files of results."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from examples.provenance import output, when

from .peers import Row

RESULT_NAMES = ("o", "final_state", "dq", "dk", "dv", "dinitial_state")

HEADERS = {
    "impl": ("implementation", "{:24s}"), "shape": ("B,T,H", "{:>12s}"),
    "kv": ("K,V", "{:>8s}"), "Hkv": ("Hkv", "{:4d}"),
    "decay": ("decay", "{:>6s}"), "documents": ("documents", "{:9d}"), "longest": ("longest", "{:7d}"),
    "forward_ms": ("fwd ms", "{:9.4f}"), "forward_floor": ("% floor", "{:7.0f}"),
    "forward_speedup": ("speedup", "{:7.2f}"),
    "backward_ms": ("bwd ms", "{:9.4f}"), "backward_floor": ("% floor", "{:7.0f}"),
    "backward_speedup": ("speedup", "{:7.2f}"),
    "both_ms": ("fwd+bwd ms", "{:10.4f}"), "both_speedup": ("speedup", "{:7.2f}"),
    "eager_ms": ("eager ms", "{:9.4f}"), "graph_ms": ("graph ms", "{:9.4f}"),
    "forward_vs_dense": ("fwd/dense", "{:9.2f}"), "backward_vs_dense": ("bwd/dense", "{:9.2f}"),
    "extra_mib": ("extra MiB", "{:9.0f}"), "extra_percent": ("% of q+k+v", "{:10.1f}"),
    **{name: (name, f"{{:{max(9, len(name))}.1e}}") for name in RESULT_NAMES},
    "largest": ("largest error in", "{:36s}"), "note": ("", "{}"),
}  # fmt: skip
FORWARD, BACKWARD = (f"{part}_ms {part}_floor {part}_speedup" for part in ("forward", "backward"))
COLUMNS = {
    "speed": f"shape {FORWARD} {BACKWARD} both_ms both_speedup eager_ms graph_ms",
    "length": f"shape {FORWARD} both_ms both_speedup",
    "dims": f"shape kv {FORWARD} {BACKWARD}",
    "heads": f"shape {FORWARD} {BACKWARD}",
    "packed": "shape documents longest forward_ms forward_vs_dense backward_ms backward_vs_dense",
    "grouped": "shape Hkv forward_ms forward_floor backward_ms backward_floor",
    "decode": f"shape {FORWARD} eager_ms",
    "memory": "shape extra_mib extra_percent",
    "error": f"shape decay {' '.join(RESULT_NAMES)} largest",
}


def line(suite: str, x: dict | None = None) -> str:
    """A line of a suite's table; without a row its header."""
    cells = []
    if x is not None:
        shown = {"shape": f"{x['B']},{x['T']},{x['H']}", "kv": f"{x['K']},{x['V']}", **x}
        shown["note"] = f"FAILED: {x['failed']}" if "failed" in x else x.get("note", "")
    for key in ("impl", *COLUMNS[suite].split(), "note"):
        header, form = HEADERS[key]
        sample = form.format("" if "s}" in form or form == "{}" else 0)
        width = max(len(header), len(sample))
        text = header if x is None else form.format(shown[key]) if key in shown else "-"
        cells.append(text.ljust(width) if key in ("impl", "largest", "note") else text.rjust(width))
    return "  ".join(cells).rstrip()


def environment(rows: Iterable[Row], gb_per_s: float, **options) -> dict:
    """What a reader must know to measure the same again: machine, versions, command, options."""
    import triton

    return {
        "card": torch.cuda.get_device_name(),
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "packages": {row.module: row.version() for row in rows if row.module != "torch"},
        **when(),
        "command": shlex.join(["python", "-m", "tests.benchmarks.attention", *sys.argv[1:]]),
        "copy_gb_per_s": round(gb_per_s, 1),
        **options,
    }


def write(path: Path, about: dict, suite: str, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"suite": suite, "environment": about, "rows": rows}, indent=1) + "\n")
