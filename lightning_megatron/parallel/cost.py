"""What an exchange costs, by its steps and bytes: of exchanges over any ranks "auto" takes the cheapest.

Microseconds that one exchange in one direction takes, with P ranks, n chunks a rank, N = n P, states of S bytes and B
the bandwidth of the slowest link a message takes:

    direct        a + (P - 1) S / B                         one state for each pair of ranks, in a node
    all-gather    g((P - 1) n S) + hops                     g measured, a ring of P - 1 hops
    scan          rounds (r + n S (1 / B + c))              rounds = 1 + ceil(log2(N - 1)) where N > 2
    ring          N (u + S w) + messages S / B
    pipelined     steps (u + S / K (w + 1 / B))             K blocks; P - 1 + K steps for each way through the ranks

and for direct and all-gather what reading the states of more than two ranks takes. An all-gather's ring enters every
node over the adapters of all its GPUs. Of the messages of ring and pipelined, only those that cross nodes take that
network; a scan has some in every round. Which kernels make the local states is the same for every exchange and not
counted.

The constants of a ``Machine`` are fitted to tests/benchmarks/results/context_parallel.json, by tests/benchmarks/
simulate_fit.py; a test holds them equal. With more than two ranks nothing was measured, and constants of the network
between nodes are assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import ring

MIB = 2**20
ANYWHERE = ("all-gather", "scan", "ring", "pipelined")  # "direct" is for the GPUs of a node


@dataclass(frozen=True)
class Machine:
    """Constants of a machine; times in us, bandwidths in GB/s of one GPU and direction."""

    # Measured, H100 with NVLink: rows "states alone" of context_parallel.json
    gather: tuple[tuple[float, float], ...] = ((0.5, 14.656), (1.0, 20.384), (2.0, 29.872), (4.0, 40.0))  # MiB, us
    node_gb_per_s: float = 207.06  # from the last two of them
    # Fitted to its rows "..., zigzag" with 2048 and 32768 tokens
    direct: float = 5.09
    scan_round: float = 24.45
    scan_per_mib: float = 1.45  # of all states of a rank
    ring_step: float = 21.67
    ring_per_mib: float = 4.01
    memory_gb_per_s: float = 3004.9  # copy_gb_per_s of speed.json
    # Assumed: one 400 Gb/s adapter a GPU
    network_gb_per_s: float = 50.0
    # Assumed, from the table of latencies in NCCL (src/graph/tuning.cc, hwLat): a message that is Simple, 9.6 against
    # 3.4 us, and hops of an all-gather that is LL128
    network: float = 6.2  # what a message between nodes takes longer
    hop: float = 1.9
    network_hop: float = 4.0


H100 = Machine()


def exchange_us(
    exchange: str, ranks: int, per_node: int, chunks: int, state_bytes: float, machine: Machine = H100
) -> float:
    """Of one exchange in one direction.

    Args:
        per_node: ranks of a node.
        chunks: of a rank, 2 under zigzag.
        state_bytes: of one chunk: ``R H K V`` fp32.
    """
    if ranks == 1:
        return 0.0
    m, nodes = machine, -(-ranks // per_node)
    far = nodes > 1
    per_us = 1e3 * (m.network_gb_per_s if far else m.node_gb_per_s)  # bytes
    state_us, own = state_bytes / per_us, chunks * state_bytes
    if exchange == "direct":
        return m.direct + (ranks - 1) * state_us + _read(m, (ranks - 2) * state_bytes)
    if exchange == "all-gather":
        hops = (ranks - 1 - (nodes - 1)) * m.hop + (nodes - 1) * m.network_hop - m.hop  # the measured one has one hop
        # a ring enters every node once for each of its GPUs' adapters
        slower = m.node_gb_per_s / min(m.node_gb_per_s, per_node * m.network_gb_per_s) if far else 1.0
        return _gather(m, (ranks - 1) * own, slower) + hops + _read(m, (ranks - 2) * own)
    latency = m.network if far else 0.0
    if exchange == "scan":
        rounds = 1 + len(ring.distances(chunks * ranks))
        sent = state_bytes if ranks == 2 else own  # the other chunk's goes to a chunk of the same rank
        return rounds * (m.scan_round + latency + sent / per_us + own / MIB * m.scan_per_mib)
    # Along the chain of chunks most messages stay in a node
    crossing = latency + state_us - state_bytes / (1e3 * m.node_gb_per_s)
    near_us, mib = state_bytes / (1e3 * m.node_gb_per_s), state_bytes / MIB
    if exchange == "ring":
        messages = chunks * (ranks - 1)
        steps = chunks * ranks * (m.ring_step + mib * m.ring_per_mib) + messages * near_us
        return steps + chunks * (nodes - 1) * crossing
    assert exchange == "pipelined"
    steps = chunks * (ranks - 1 + ring.BLOCKS)
    crossings = chunks * (nodes - 1) * (latency + (crossing - latency) / ring.BLOCKS)
    return steps * (m.ring_step + (mib * m.ring_per_mib + near_us) / ring.BLOCKS) + crossings


def _gather(machine: Machine, received: float, slower: float) -> float:
    """All-gather of so many bytes received: between what was measured, and beyond by the bandwidth of a node.

    ``slower``: how many times as long a byte takes on the slowest link.
    """
    points = machine.gather
    mib = received / MIB
    (x, y), (x2, y2) = next(
        (pair for pair in zip(points, points[1:], strict=False) if mib <= pair[1][0]), (points[-2], points[-1])
    )
    found = y + (y2 - y) / (x2 - x) * (mib - x) if mib > points[0][0] else points[0][1]
    return found + (slower - 1) * received / (1e3 * machine.node_gb_per_s)


def _read(machine: Machine, size: float) -> float:
    return max(size, 0.0) / (1e3 * machine.memory_gb_per_s)


def cheapest(ranks: int, per_node: int, chunks: int, state_bytes: float, machine: Machine = H100) -> str:
    """What "auto" is where ``direct`` is impossible."""
    return min(ANYWHERE, key=lambda x: exchange_us(x, ranks, per_node, chunks, state_bytes, machine))
