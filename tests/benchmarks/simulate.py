"""Steps over many GPUs that share sequences, by formula from measurements of one and two GPUs:

    python -m tests.benchmarks.simulate
    python -m tests.benchmarks.simulate --models 8B --tokens-per-gpu 16K --gpus 1 64 4096 --per-node 8 --json FILE
    python -m tests.benchmarks.simulate --network-gb-per-s 25 --exchange all-gather

All layers are lightning, zigzag, heads of 128, a microbatch is ``--batch`` sequences of GPUs x tokens a GPU. A step is

    microbatches (tokens x token_us  +  layers (forward + backward) (1 - hidden))  +  gradients  +  share x one GPU

token_us: of one GPU (simulate_fit.py). forward, backward: what an exchange takes longer than one GPU's operator, the
message (lightning_megatron/parallel/cost.py, which ``auto`` takes its choice from) and the states that a rank makes;
twice forward where states are not kept for the recomputation. gradients: reduce-scatter in fp32 and all-gather of
parameters in bf16, as far as they take longer than the last microbatch's backward. share: what two GPUs take longer for
reasons that no measurement explains, held for any number. "best" is the cheapest exchange the package has; "wait" is
what it and the gradients add. ``hierarchical`` is not in the package: direct in a node, scan between nodes of the part
that each of a node's GPUs has.

Not simulated: launches by a slow host (few tokens a microbatch), memory, softmax layers, tensor and pipeline
parallelism, congestion of the network.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from lightning_megatron.parallel import cost
from lightning_megatron.parallel.cost import Machine

from . import simulate_fit as fit
from .training_models import MODELS, parse_length, show_length

CHUNKS = 2  # of a rank, zigzag
GPUS = (1, 2, 4, 8, 64, 512, 4096)
LONGEST = 64 * 2**20
GRADIENT_BYTES, PARAMETER_BYTES = 4, 2


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained, and where."""

    model: str
    tokens: int  # of a GPU and sequence
    ranks: int
    batch: int = 1
    microbatches: int = 1
    full: bool = True  # recompute
    keep: bool = True  # states for the recomputation
    hidden: float = 0.0  # part of the exchanges that other work hides
    per_node: int = 8


def message_us(exchange: str, ranks: int, per_node: int, state_bytes: float, machine: Machine) -> float:
    if exchange != "hierarchical":
        return cost.exchange_us(exchange, ranks, per_node, CHUNKS, state_bytes, machine)
    here = min(ranks, per_node)
    nodes = -(-ranks // here)
    within = cost.exchange_us("direct", here, here, CHUNKS, state_bytes, machine)
    if nodes == 1:
        return within
    # gathered in a node before and after, each GPU passing on its part
    return 2 * within + cost.exchange_us("scan", nodes, 1, CHUNKS, state_bytes / here, machine)


def possible(run: Run) -> tuple[str, ...]:
    return (*(("direct",) if run.ranks <= run.per_node else ()), *cost.ANYWHERE)


def best(run: Run, machine: Machine) -> str:
    """Of those the package has; tests/test_simulate.py holds ``auto`` against it."""
    size = fit.state_bytes(MODELS[run.model].heads, run.batch)
    return min(possible(run), key=lambda x: message_us(x, run.ranks, run.per_node, size, machine))


def exchange_ms(run: Run, exchange: str, machine: Machine) -> float:
    """What all exchanges of a step add."""
    if run.ranks == 1:
        return 0.0
    model, local = MODELS[run.model], fit.exchanges()[1]
    size = fit.state_bytes(model.heads, run.batch)
    message = message_us(exchange, run.ranks, run.per_node, size, machine)
    forward, backward = (message + local.us(d, size, run.batch * run.tokens) for d in fit.DIRECTIONS)
    forwards = 2 if run.full and not run.keep else 1
    return run.microbatches * model.layers * (forwards * forward + backward) * (1 - run.hidden) / 1e3


def gradients_ms(run: Run, machine: Machine) -> float:
    """Of gradients and parameters between the ranks, without the part that the last backward hides."""
    if run.ranks == 1:
        return 0.0
    m, nodes = machine, -(-run.ranks // run.per_node)
    bandwidth = m.node_gb_per_s if nodes == 1 else min(m.node_gb_per_s, run.per_node * m.network_gb_per_s)
    moved = fit.parameters(MODELS[run.model]) * (GRADIENT_BYTES + PARAMETER_BYTES) * (run.ranks - 1) / run.ranks
    hops = 2 * ((run.ranks - nodes) * m.hop + (nodes - 1) * m.network_hop)
    total = moved / (bandwidth * 1e6) + hops / 1e3
    microbatch = step_of_one_ms(run) / run.microbatches
    return max(0.0, total - microbatch * (3 / 4 if run.full else 2 / 3))


def step_of_one_ms(run: Run) -> float:
    tokens = run.batch * run.tokens
    return run.microbatches * tokens * fit.token_us(MODELS[run.model], tokens, run.full) / 1e3


def predict(run: Run, exchange: str | None = None, machine: Machine = cost.H100) -> dict:
    """A row of the table; ``exchange``: None for the best."""
    exchange = exchange or best(run, machine)
    one = step_of_one_ms(run)
    waits, gradients = exchange_ms(run, exchange, machine), gradients_ms(run, machine)
    other = one * fit.two_gpus() if run.ranks > 1 else 0.0
    step = one + waits + gradients + other
    return dataclasses.asdict(run) | dict(
        sequence=run.tokens * run.ranks,
        exchange=exchange if run.ranks > 1 else "",
        step_ms=step,
        tokens_per_second_and_gpu=run.microbatches * run.batch * run.tokens / step * 1e3,
        exchange_ms=waits,
        gradients_ms=gradients,
        other_ms=other,
        wait_percent=100 * (waits + gradients) / step,
        of_one_gpu=step / one,
    )


def show(rows: list[dict]) -> str:
    head = (
        "sequence",
        "GPUs",
        "exchange",
        "step ms",
        "tokens/s a GPU",
        "exchange ms",
        "gradients ms",
        "wait",
        "of one GPU",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for x in rows:
        length = x["sequence"]
        cells = (
            f"{length // 2**20}M" if length % 2**20 == 0 else show_length(length),
            x["ranks"],
            x["exchange"],
            f"{x['step_ms']:,.1f}",
            f"{float(f'{x["tokens_per_second_and_gpu"]:.4g}'):,.0f}",
            f"{x['exchange_ms']:.1f}",
            f"{x['gradients_ms']:.1f}",
            f"{x['wait_percent']:.1f}%",
            f"{x['of_one_gpu']:.3f}",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tests.benchmarks.simulate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["0.4B", "8B"])
    parser.add_argument("--tokens-per-gpu", nargs="+", type=parse_length, default=[16 * 1024, 128 * 1024])
    parser.add_argument("--gpus", nargs="+", type=int, default=list(GPUS))
    parser.add_argument("--per-node", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--exchange", choices=("direct", *cost.ANYWHERE, "hierarchical"), help="default: the best")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a microbatch")
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--no-recompute", action="store_true")
    parser.add_argument("--no-keep-states", action="store_true", help="as --no-lightning-cp-keep-states")
    parser.add_argument("--hidden", type=float, default=0.0, help="part of the exchanges that other work hides")
    parser.add_argument("--longest", type=parse_length, default=LONGEST, help="leave longer sequences out")
    for field in ("network_gb_per_s", "network", "hop", "network_hop"):
        help = f"assumed: {getattr(cost.H100, field)}"
        parser.add_argument(f"--{field.replace('_', '-')}", type=float, default=getattr(cost.H100, field), help=help)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.exchange == "direct" and max(args.gpus) > args.per_node:
        parser.error(f"--exchange direct is for the GPUs of one node: pass --gpus up to --per-node {args.per_node}")
    assumed = {x: getattr(args, x) for x in ("network_gb_per_s", "network", "hop", "network_hop")}
    machine, rows = dataclasses.replace(cost.H100, **assumed), []
    for model in args.models:
        for tokens in args.tokens_per_gpu:
            found = []
            for ranks in args.gpus:
                if ranks * tokens <= args.longest:
                    run = Run(model, tokens, ranks, args.batch, args.microbatches, not args.no_recompute,
                              not args.no_keep_states, args.hidden, args.per_node)  # fmt: skip
                    found.append(predict(run, args.exchange, machine))
            recompute = "no recomputation" if args.no_recompute else "full recompute"
            print(f"\n{model}, {show_length(tokens)} tokens a GPU, {args.per_node} GPUs a node, {recompute}\n")
            print(show(found), flush=True)
            rows += found
    if args.json:
        about = dict(machine=dataclasses.asdict(machine), two_gpus=round(fit.two_gpus(), 6), assumed=list(assumed))
        rows = [{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in x.items()} for x in rows]
        args.json.write_text(json.dumps(dict(about, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
