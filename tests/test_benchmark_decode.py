"""The benchmark of decoding: requests that are told to have a context, bytes of a step, tables of cells that fail."""

import time

import pytest

from .benchmarks import decode, decode_models
from .launch import spawn

PLAN = dict(
    model="toy", attention="lightning", contexts=[256], batches=[3], prompt=0, prefill=True, memory=[], max_tokens=128,
    steps=4, gpu=False, cuda_graph=False,
)  # fmt: skip


def _read_and_aged(rank, nproc, tokens: int):
    """Inputs and positions of five steps of a request that read a prompt, and of three that are told so."""
    from .benchmarks import decode_worker

    decode_worker.initialize(gpu=False)
    engine = decode_worker.Engine(PLAN | dict(deadline=time.time() + 100))
    context = engine.context

    def run(count: int):
        seen = []
        for _ in range(5):
            seen.append([context.token_to_input_ids[:count].tolist(), context.token_to_pos_ids[:count].tolist()])
            engine.step()
        return seen

    engine.read(1, tokens)
    states, new = engine.state(), context.token_to_input_ids[:1].clone()
    read = run(1)
    engine.read(3, 2)
    decode_worker.age(context, tokens, states)
    context.token_to_input_ids[:3] = new
    return read, run(3), (engine.traffic.weights, engine.traffic.state, engine.traffic.kv)


def test_aged_requests_go_on_as_those_that_read_their_prompts():
    [(read, aged, traffic)] = spawn(_read_and_aged, 1, 200)
    assert [position for _, (position,) in read] == list(range(200, 205))
    assert aged == [[3 * ids, 3 * positions] for ids, positions in read]
    # 2 layers of 64: q, k, v, gate, output; three matrices of the MLP; three norms; final norm and output layer. fp32
    weights = 2 * (5 * 64 * 64 + 3 * 64 * 256 + 3 * 64) + 64 + 512 * 64
    assert traffic == (4 * weights, 2 * 2 * 32 * 32 * 4, 0)


def test_bytes_of_steps_and_requests():
    traffic = decode_models.Traffic(weights=1000, state=10, kv=3)
    assert traffic.step(batch=4, context=100) == 1000 + 2 * 4 * 10 + 4 * 100 * 3
    assert traffic.request(256) == 10 + 3 * 256 * 3  # 256 tokens and 512 more are three blocks
    row = decode.finish(dict(bytes=4_000_000_000, forward_ms=2.0), gb_per_s=4000)
    assert row["share_of_bound"] == pytest.approx(0.5)


def test_tables_show_what_does_not_fit_and_what_failed():
    cell = dict(kind="decode", model="1B", attention="softmax", batch=16, requests="aged")
    rows = [
        cell | dict(context=1024, graph_tokens_per_second=1000.0),
        cell | dict(context=2048, graph_tokens_per_second=1100.0),
        cell | dict(context=4096, error="does not fit", needs_bytes=2**38),
        cell | dict(context=8192, error="ValueError: x"),
    ]
    text = "\n".join(decode.tables(rows, 4000.0))
    line = next(line for line in text.splitlines() if line.split()[:2] == ["softmax", "16"])
    assert line.split() == ["softmax", "16", "1,000", "1,100", "no:", "256.00", "GiB", "failed", "10.0%"]
    assert "FAILED decode 1B softmax 16 8192 aged: ValueError: x" in text
