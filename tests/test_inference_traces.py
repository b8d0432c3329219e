"""Random traces of requests through Megatron's dynamic engine: each gets the tokens that it would get alone.

Requests come and are cancelled at random steps, wait for a state, are read in chunks, paused, evicted and read again;
the engine is suspended and resumed. LIGHTNING_TEST_TRACES=200 runs as many instead of a few.
"""

from __future__ import annotations

import math
import os
import random
from collections import Counter

import pytest

from tests.conftest import SEED
from tests.helpers import dynamic
from tests.launch import spawn

TRACES = int(os.environ.get("LIGHTNING_TEST_TRACES") or 6)
LONGEST = 3000
HYBRIDS = ("gqa", "moe-gqa", "mla")
COUNTED = ("tokens", "ties", "positions", "left", "skipped", "noisy", "swapped")
AT_ONCE = 25  # traces of one process


def draw(rng: random.Random, case: str) -> dict:
    """One trace: how the engine is made, and what happens at which step."""
    requests = []
    tight = case in HYBRIDS and rng.random() < 0.5  # many requests that need more and more blocks
    for number in range(rng.randint(8 if tight else 1, 16)):
        length = round(math.exp(rng.uniform(0, math.log(100 if tight else LONGEST))))
        count = rng.randint(1, 120 if tight else 40)
        how = dict(
            number=number, prompt=[rng.randrange(dynamic.VOCAB) for _ in range(length)], count=count,
            at=rng.choice((0, rng.randint(0, 60))), cancel=rng.randint(1, count) if rng.random() < 0.25 else None,
            stop=rng.randrange(dynamic.VOCAB) if rng.random() < 0.2 else -1,
        )  # fmt: skip
        requests.append(how)
    longest = max(len(r["prompt"]) + r["count"] for r in requests)
    chunked = rng.random() < 0.8
    inference = dict(
        enable_chunked_prefill=chunked,
        max_tokens=64 * rng.choice((1, 2, 3, 5, 8)) if chunked else 64 * math.ceil(LONGEST / 64 + 1),
        max_requests=8 if tight else rng.choice((1, 2, 3, 4, 8)),
        max_sequence_length=longest + rng.randint(0, 64),
        kv_cache_management_mode=rng.choice(("persist", "offload", "recompute")),
        async_sched_mode=rng.choice(("legacy", "legacy", "async")),
    )
    if rng.random() < 0.3:
        inference |= dict(enable_prefix_caching=True, prefix_caching_mamba_gb=0.02, block_size_tokens=32)
        inference["prefix_caching_eviction_policy"] = rng.choice(("lru", "ref_zero"))
        for later, request in enumerate(requests[1:], start=1):
            if rng.random() < 0.7:
                earlier = requests[rng.randrange(later)]["prompt"]
                request["prompt"] = (earlier[: rng.randint(1, len(earlier))] + request["prompt"])[:LONGEST]
        inference["max_sequence_length"] = max(len(r["prompt"]) + r["count"] for r in requests)
    if case in HYBRIDS:
        inference["block_size_tokens"] = size = 64 if case == "mla" else rng.choice((16, 32, 64))
        needed = math.ceil(inference["max_sequence_length"] / size)
        inference["paused"] = paused = rng.choice((0, 0, 2, needed))
        more = 0 if tight else rng.choice((0, 1, 3, needed, 2 * needed))
        # room for one request at least, or Megatron may pause all; and one more block, which it keeps for padding
        inference["blocks"] = needed + paused + 1 + more
    suspend = [rng.randint(0, 40) for _ in range(rng.choice((0, 0, 1, 3)))]
    if inference["async_sched_mode"] == "async" and inference["kv_cache_management_mode"] == "recompute":
        suspend = []  # Megatron forgets the requests whose logits it has not sampled from yet
    return dict(case=case, requests=requests, inference=inference, suspend=suspend)


def play(model, trace: dict) -> tuple[dict, Counter]:
    """Through an engine of its own; the judge's findings, and what happened how often."""
    from megatron.core.inference.config import KVCacheManagementMode, PrefixCachingEvictionPolicy

    how = dict(trace["inference"])
    how["kv_cache_management_mode"] = KVCacheManagementMode(how["kv_cache_management_mode"])
    if caching := how.get("enable_prefix_caching", False):
        how["prefix_caching_eviction_policy"] = PrefixCachingEvictionPolicy(how["prefix_caching_eviction_policy"])
    run, seen, step = dynamic.Run(model, **how), Counter(), 0
    engine, context = run.engine, run.context
    waiting, cancel = list(trace["requests"]), {r["number"]: r["cancel"] for r in trace["requests"] if r["cancel"]}
    while waiting or engine.has_unfinished_requests():
        for request in [r for r in waiting if r["at"] <= step]:
            waiting.remove(request)
            run.add(request["number"], request["prompt"], request["count"], termination_id=request["stop"])
        if step in trace["suspend"]:
            seen[f"suspended-{how['kv_cache_management_mode'].value}"] += bool(context.total_request_count)
            engine.suspend()
            engine.resume()
        active = context.request_ids[context.paused_request_count : context.total_request_count].tolist()
        for number in set(active) & set(cancel):
            request = engine.get_request(number)
            so_far = sum(len(r.generated_tokens) for r in engine.requests[number].record.requests)
            if request.generated_tokens and so_far >= cancel[number]:
                # as where a stop word ends a request: the engine has no other way to end one
                engine.stop_word_finished_request_ids.add(number)
                del cancel[number]
                seen["cancelled"] += 1
        run.step()
        step += 1
        assert step < 20_000, "the engine does not come to an end"
    seen["requests"] += len(run.tokens)
    seen["generated"] += sum(map(len, run.tokens.values()))
    seen["paused"] += run.most_paused > 0
    seen["evicted"] += engine.evicted_request_count
    seen["reused"] += len(run.tokens) > context.max_requests
    seen["steps"] += step
    seen["prefix-caching"] += caching
    left = dynamic.slots(run)
    assert left.free == list(range(context.max_requests)) and set(left.of_requests) == {-1}, left
    assert caching or left.blocks == left.all_blocks - 1, left
    for request in trace["requests"]:
        tokens = run.tokens[request["number"]]
        assert len(tokens) == request["count"] or request["cancel"] or tokens[-1] == request["stop"], request["number"]
    found = run.judge()
    run.close()
    return found, seen


def play_some(rank: int, world: int, case: str, seeds: list[int], **changes):
    dynamic.start()
    model, total, seen = dynamic.build(case), Counter(), Counter()
    for seed in seeds:
        trace = draw(random.Random(seed), case)
        try:
            found, happened = play(model, trace)
        except Exception as error:
            raise AssertionError(
                f"{case}, seed {seed}: {trace['inference']}, suspended at {trace['suspend']}"
            ) from error
        right = found["worst"] < dynamic.NOISE and found["repeated"] < dynamic.NOISE and not found["wrong"]
        generated = found["tokens"] + found["ties"]  # of each request, or one was not compared
        right = right and not found["left"] and generated == happened["generated"] and found["ties"] <= generated // 50
        assert right, (case, seed, found, trace["inference"])
        total["worst"] = max(total["worst"], found["worst"])
        total.update({name: found[name] for name in COUNTED})
        seen.update(happened)
    return dict(total), dict(seen)


def batches() -> list[tuple[str, list[int]]]:
    """Cases by turns, each with as many seeds as one process plays."""
    cases = [x for x in dynamic.CASES if x not in ("mtp", "K<V")]
    seeds = {case: [SEED + i for i in range(TRACES) if cases[i % len(cases)] == case] for case in cases}
    return [(case, every[i : i + AT_ONCE]) for case, every in seeds.items() for i in range(0, len(every), AT_ONCE)]


@pytest.mark.parametrize("case, seeds", batches(), ids=lambda x: x if isinstance(x, str) else f"{len(x)}")
def test_requests_get_the_tokens_that_they_get_alone(case, seeds):
    print(spawn(play_some, 1, case, seeds, timeout=3600)[0])
