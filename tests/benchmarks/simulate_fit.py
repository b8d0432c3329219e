"""What tests.benchmarks.simulate takes from measurements: constants fitted to rows of results/*.json.

Rows for fitting and for validation are apart; tests/test_simulate.py holds predictions against the latter.

- operator: fitted to context_parallel.json "one GPU" with 2048 and 32768 tokens; validated against 8192, and speed.json
- exchanges: fitted to context_parallel.json "states alone", and "..., zigzag" with 2048 and 32768 tokens; validated
  against contiguous and against 8192
- steps of one GPU: fitted to seven rows of 0.4B and 3B of training.json (FITTED_STEPS); validated against the others,
  with all of 1B, and long.json
- what two GPUs add: fitted to 0.4B of training.json without flags (FITTED_PAIRS); validated against 0.4B over two GPUs
  with flags, and against 1M tokens
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path

import torch

from lightning_megatron.parallel import cost, ring
from lightning_megatron.parallel.cost import MIB, Machine

from .training_models import MODELS, Model

RESULTS = Path(__file__).parent / "results"
HEAD_DIM = 128
FITTED_TOKENS = (2048, 32768)  # of context_parallel.json
FLAGS = "--no-check-for-nan-in-loss-and-grad --manual-gc"
FITTED_STEPS = [  # model, recompute, length, loss chunk
    ("0.4B", "full", 8192, 0),
    ("0.4B", "full", 32768, 0),
    ("0.4B", "none", 8192, 0),
    ("0.4B", "none", 32768, 0),
    ("3B", "full", 2048, 8192),
    ("3B", "full", 32768, 8192),
    ("3B", "none", 2048, 0),
]
FITTED_PAIRS = (8192, 32768, 131072)  # tokens a GPU: 0.4B without flags, over one GPU and over two


def rows(name: str) -> list[dict]:
    return json.loads((RESULTS / f"{name}.json").read_text())["rows"]


def least_squares(features: list[list[float]], values: list[float], scale: list[float] | None = None) -> list[float]:
    """With errors relative to ``scale``, by default to the values."""
    scales = torch.tensor(scale or values, dtype=torch.float64)[:, None]
    a, y = torch.tensor(features, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)[:, None]
    return torch.linalg.lstsq(a / scales, y / scales).solution[:, 0].tolist()


# ---- the operator ----------------------------------------------------------------------------------------------------

DIRECTIONS = ("forward", "backward")


def _operator_features(tokens: float, heads: float) -> list[float]:
    return [1.0, tokens / 1e3, tokens * heads / 1e6]  # launches, the walk along the sequence, memory traffic


@functools.cache
def operator() -> dict[str, list[float]]:
    found = [x for x in rows("context_parallel") if x["scheme"] == "one GPU" and x["tokens"] in FITTED_TOKENS]
    features = [_operator_features(x["tokens"], x["heads"]) for x in found]
    return {d: least_squares(features, [x[f"{d}_ms"] * 1e3 for x in found]) for d in DIRECTIONS}


def operator_us(direction: str, tokens: float, heads: float) -> float:
    """Of one layer on one GPU, heads of 128."""
    return sum(a * b for a, b in zip(operator()[direction], _operator_features(tokens, heads), strict=True))


# ---- exchanges -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Local:
    """What a rank pays beside the message, whatever the exchange: ``[1, MiB of a chunk's states, doublings]``.

    It makes the states of all its parts, where one GPU needs not those of the last, and adds up what arrives.
    """

    forward: tuple[float, float, float]
    backward: tuple[float, float, float]

    def us(self, direction: str, state_bytes: float, tokens: float) -> float:
        constants = getattr(self, direction)
        return sum(a * b for a, b in zip(constants, (1.0, state_bytes / MIB, _doublings(tokens)), strict=True))


def _doublings(tokens: float) -> float:
    """Beyond the shortest length measured, up to the longest: there the parts fill the GPU."""
    return math.log2(min(max(tokens, FITTED_TOKENS[0]), FITTED_TOKENS[1]) / FITTED_TOKENS[0])


def state_bytes(heads: int, batch: int = 1) -> int:
    return 4 * batch * heads * HEAD_DIM**2


def exchange_rows() -> list[dict]:
    """Those of context_parallel.json that exchange states, with ``exchange``, ``chunks`` and ``fitted``."""
    found = []
    for x in rows("context_parallel"):
        exchange, _, layout = x["scheme"].partition(", ")
        if exchange in ("direct", *cost.ANYWHERE):
            chunks = 1 if layout == "contiguous" else 2
            found.append(
                x | dict(exchange=exchange, chunks=chunks, fitted=chunks == 2 and x["tokens"] in FITTED_TOKENS)
            )
    return found


@functools.cache
def exchanges() -> tuple[Machine, Local]:
    alone = [x for x in rows("context_parallel") if x["scheme"].startswith("states alone")]
    chunks = {"contiguous": 1, "zigzag": 2}
    points = sorted(
        (chunks[x["scheme"].partition(", ")[2]] * state_bytes(x["heads"]) / MIB, x["forward_ms"] * 1e3) for x in alone
    )
    (x1, y1), (x2, y2) = points[-2:]
    copy = json.loads((RESULTS / "speed.json").read_text())["environment"]["copy_gb_per_s"]
    machine = Machine(
        gather=tuple((x, round(y, 3)) for x, y in points),
        node_gb_per_s=round((x2 - x1) * MIB / (y2 - y1) / 1e3, 2),
        memory_gb_per_s=copy,
    )
    features, values, scale = [], [], []
    per_node, P = 8, 2
    for x in (x for x in exchange_rows() if x["fitted"]):
        size = state_bytes(x["heads"])
        mib, name, n = size / MIB, x["exchange"], x["chunks"]
        free = dataclasses.replace(machine, direct=0, scan_round=0, scan_per_mib=0, ring_step=0, ring_per_mib=0)
        known = cost.exchange_us(name, P, per_node, n, size, free)
        rounds, steps = 1 + len(ring.distances(n * P)), n * (P - 1 + ring.BLOCKS)
        fixed = {
            "direct": [1, 0, 0, 0, 0],
            "all-gather": [0, 0, 0, 0, 0],
            "scan": [0, rounds, rounds * n * mib, 0, 0],
            "ring": [0, 0, 0, n * P, n * P * mib],
            "pipelined": [0, 0, 0, steps, steps * mib / ring.BLOCKS],
        }[name]
        for d in DIRECTIONS:
            local = [1.0, mib, _doublings(x["tokens"])]
            zeros = [0.0] * 3
            features.append((local + zeros if d == "forward" else zeros + local) + fixed)
            values.append(x[f"{d}_exposed_us"] - known)
            scale.append(x[f"{d}_ms"])
    c = least_squares(features, values, scale)
    names = ("direct", "scan_round", "scan_per_mib", "ring_step", "ring_per_mib")
    fitted = {name: round(value, 2) for name, value in zip(names, c[6:], strict=True)}
    return dataclasses.replace(machine, **fitted), Local(tuple(c[:3]), tuple(c[3:6]))


# ---- steps -----------------------------------------------------------------------------------------------------------


def parameters(model: Model) -> int:
    return model.matrices("lightning") + model.hidden * model.vocabulary


def _step_features(model: Model, tokens: int, full: bool) -> tuple[list[float], float]:
    """Of a token in a microbatch of so many tokens of a GPU: operations, traffic beside products, gradients that are
    added up; and us of the operator.
    """
    matrices = model.matrices("lightning")
    again = 2 * (matrices - model.hidden * model.vocabulary) if full else 0
    layers = model.layers * (operator_us("forward", tokens, model.heads) * (1 + full))
    layers += model.layers * operator_us("backward", tokens, model.heads)
    features = [(6 * matrices + again) / 1e9, model.layers * model.hidden * (3 + full) / 1e5]
    return [*features, parameters(model) / tokens / 1e3], layers / tokens


def one_gpu(name: str = "training") -> list[dict]:
    """Rows of lightning steps of one GPU, with ``fitted``."""
    found = []
    for x in rows(name):
        if (
            x.get("attention") == "lightning"
            and "error" not in x
            and all(x[f"{y}_parallel"] == 1 for y in ("tensor", "context", "data"))
        ):
            key = x["model"], x["recompute"], x["length"], x["loss_chunk"]
            found.append(x | dict(fitted=name == "training" and not x["extra"] and key in FITTED_STEPS))
    return found


@functools.cache
def steps() -> list[float]:
    features, values, scale = [], [], []
    for x in (x for x in one_gpu() if x["fitted"] and not is_a_pair(x)):
        found, us = _step_features(MODELS[x["model"]], x["micro_batch"] * x["length"], x["recompute"] == "full")
        token = x["ms_per_step"] * 1e3 / x["tokens_per_step"]
        features.append(found)
        values.append(token - us)
        scale.append(token)
    return least_squares(features, values, scale)


def token_us(model: Model, tokens: int, full: bool) -> float:
    """Of a token of a step on one GPU, with so many tokens in a microbatch."""
    features, us = _step_features(model, tokens, full)
    return us + sum(a * b for a, b in zip(steps(), features, strict=True))


def is_a_pair(x: dict) -> bool:
    """Whether a step of 0.4B is one of those, over one GPU or two, from which ``two_gpus`` is fitted."""
    key = (x["model"], x["recompute"], x["loss_chunk"], x["extra"]) == ("0.4B", "full", 8192, "")
    return key and x["attention"] == "lightning" and x["length"] // x["context_parallel"] in FITTED_PAIRS


@functools.cache
def two_gpus() -> float:
    """What two GPUs that share sequences take longer, beside the exchange, as a part of the step of one."""
    found = {(x["length"] // x["context_parallel"], x["context_parallel"]): x for x in rows("training") if is_a_pair(x)}
    machine, local = exchanges()
    more = []
    for tokens in FITTED_PAIRS:
        one, two = found[tokens, 1], found[tokens, 2]
        model, batch = MODELS["0.4B"], two["micro_batch"]
        size = state_bytes(model.heads, batch)
        message = cost.exchange_us("direct", 2, 8, 2, size, machine)
        f, b = (message + local.us(d, size, batch * tokens) for d in DIRECTIONS)
        microbatches = one["tokens_per_step"] / (batch * tokens)
        again = 2  # these were measured before states were kept for the recomputation
        exchange = microbatches * model.layers * (again * f + b) / 1e3
        more.append((two["ms_per_step"] - one["ms_per_step"] - exchange) / one["ms_per_step"])
    return sum(more) / len(more)
