"""Megatron's dynamic inference engine: every request gets the tokens and logits that it would get alone."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from megatron.core.inference.config import MambaInferenceStateConfig

from tests.conftest import SEED
from tests.helpers import dynamic
from tests.launch import spawn

STATES = {field.name for field in dataclasses.fields(MambaInferenceStateConfig)}
ONE_BATCH = [1, 7, 500, 3, 64, 65, 129, 2]


def generate(rank: int, world: int, case: str, lengths: list[int], count: int, seed: int, **inference):
    """Together in one engine."""
    dynamic.start()
    run = dynamic.Run(dynamic.build(case), **inference)
    for number, prompt in enumerate(dynamic.prompts_of(lengths, seed)):
        run.add(number, prompt, count)
    run.finish()
    assert all(len(tokens) == count for tokens in run.tokens.values()) and len(run.tokens) == len(lengths)
    return run.judge(), run.tokens


def assert_right(found: dict) -> None:
    print(found)
    assert found["worst"] < dynamic.NOISE and found["repeated"] < dynamic.NOISE and not found["wrong"], found


@pytest.mark.parametrize("case", dynamic.CASES)
def test_logits_and_tokens(case):
    """Prompts of other lengths in one batch, more of them than states; read in chunks; 64 greedy tokens each."""
    ((found, tokens),) = spawn(generate_small, 1, case, SEED)
    assert_right(found)
    assert max(len(set(x)) for x in tokens.values()) > 5, "tokens hardly vary, so the comparison means little"


def generate_small(rank, world, case, seed):
    return generate(rank, world, case, ONE_BATCH, 64, seed, max_sequence_length=640, max_requests=4, max_tokens=128)


def generate_long(rank, world, case, seed):
    length = 20_000
    return generate(rank, world, case, [length, 5], 64, seed, max_sequence_length=length + 64, max_tokens=4096)


@pytest.mark.parametrize("case", ["lightning", "moe-gqa"])
def test_long_prompt(case):
    """Of 20,000 tokens, in chunks."""
    ((found, _),) = spawn(generate_long, 1, case, SEED, timeout=300)
    assert_right(found)


def reset_and_go_on(rank: int, world: int, case: str, seed: int):
    dynamic.start()
    run = dynamic.Run(dynamic.build(case), max_requests=4)
    many = dynamic.prompts_of([200, 30, 7, 100, 1, 150, 64, 33], seed)
    for number, prompt in enumerate(many):
        run.add(number, prompt, 20)
    for _ in range(7):
        run.step()
    assert run.engine.has_unfinished_requests() and run.context.total_request_count
    run.reset()
    left = dynamic.slots(run)
    assert left.free == [0, 1, 2, 3] and set(left.of_requests) == {-1}
    for number, prompt in enumerate(reversed(many)):
        run.add(number, prompt, 20)
    run.finish()
    assert len(run.tokens) == len(many)
    return run.judge()


@pytest.mark.parametrize("case", ["lightning", "gqa"])
def test_reset(case):
    """In the middle of requests; others, of the same numbers, find nothing of them."""
    assert_right(spawn(reset_and_go_on, 1, case, SEED)[0])


def share_prefixes(rank: int, world: int, case: str, seed: int, policy: str, chunk: int):
    """Prompts that begin as earlier ones, one after another and at once."""
    from megatron.core.inference.config import PrefixCachingEvictionPolicy

    dynamic.start()
    run = dynamic.Run(
        dynamic.build(case), enable_prefix_caching=True, prefix_caching_mamba_gb=0.02, max_tokens=chunk,
        prefix_caching_eviction_policy=PrefixCachingEvictionPolicy(policy), max_sequence_length=384,
        block_size_tokens=64 if case == "mla" else 16,
    )  # fmt: skip
    a, b, c = dynamic.prompts_of([200, 70, 64], seed)
    run.add(0, a, 30)
    for _ in range(200 // chunk + 5):  # its prompt is read, and it still runs
        run.step()
    for number, prompt in enumerate((a, a[:150] + b, a[:64], a[:128], a[:65] + b, a + c, b + a), start=1):
        run.add(number, prompt, 10)
    run.finish()
    skipped = run.engine._prefill_tokens_skipped
    if policy == "lru":  # what nobody uses any more is kept
        run.add(9, a + b, 10)
        run.finish()
        assert run.engine._prefill_tokens_skipped >= skipped + 128
    return run.judge(), skipped


@pytest.mark.parametrize("case, policy, chunk", [
    ("lightning", "lru", 64), ("lrpe", "ref_zero", 256), ("gqa", "lru", 128), ("gqa", "ref_zero", 64),
    ("mla", "lru", 128),
])  # fmt: skip
def test_prefix_caching(case, policy, chunk):
    """Tokens of a prompt that begins as another one are not computed again."""
    ((found, skipped),) = spawn(share_prefixes, 1, case, SEED, policy, chunk)
    assert_right(found)
    assert skipped >= 64 * 4 and found["skipped"] >= skipped


# ---- ranks -----------------------------------------------------------------------------------------------------------

LENGTHS = [1, 7, 90, 3, 64, 150]


def on_ranks(rank: int, world: int, case: str, layout: dict, config: dict, seed: int, **inference):
    """Tokens, and logits of the last stage: request -> [positions, vocabulary]."""
    dynamic.start(**layout)
    run = dynamic.Run(dynamic.build(case, **layout, **config), max_requests=4, **inference)
    for number, prompt in enumerate(dynamic.prompts_of(LENGTHS, seed)):
        run.add(number, prompt, 20)
    run.finish()
    return run.tokens, {number: torch.stack([x[i] for i in sorted(x)]) for number, x in run.logits.items()}


def on_ranks_small(rank, world, case, layout, config, seed):
    return on_ranks(rank, world, case, layout, config, seed)


EXPERTS = dict(moe_token_dispatcher_type="alltoall", inference_moe_token_dispatcher_type="nccl")
RANKS = {
    "tp2": ("everything", dict(tp=2), dict()),
    "tp2-sp": ("everything", dict(tp=2), dict(sequence_parallel=True)),
    "tp2-gqa": ("gqa", dict(tp=2), dict()),
    "tp2-gqa-sp": ("gqa", dict(tp=2), dict(sequence_parallel=True)),
    "tp2-mla": ("mla", dict(tp=2), dict()),
    "tp2-lrpe": ("lrpe", dict(tp=2), dict()),
    "pp2": ("everything", dict(pp=2), dict()),
    "pp2-lrpe": ("lrpe", dict(pp=2), dict()),  # states of another shape on each stage
    "pp2-gqa": ("gqa", dict(pp=2), dict()),
    "pp2-one-softmax": ("moe-gqa", dict(pp=2), dict()),  # all of its softmax layers are on the second stage
    "pp2-apart": ("apart", dict(pp=2), dict()),  # a stage has no softmax layer, the other no lightning layer
    "ep2": ("moe", dict(ep=2), EXPERTS),
    "ep2-gqa": ("moe-gqa", dict(ep=2), EXPERTS),
}


@pytest.mark.parametrize("name", RANKS)
def test_ranks_change_no_token(name):
    """Padding, waiting, chunks and one batch of all as on one rank."""
    case, layout, config = RANKS[name]
    ((want, logits),) = spawn(on_ranks_small, 1, case, {}, {}, SEED)
    found = spawn(on_ranks_small, 2, case, layout, config, SEED)
    for tokens, rows in found:
        assert tokens == want
        for number, x in rows.items():
            assert dynamic.difference(x, logits[number]) < 2 * dynamic.NOISE  # both have some
    assert found[-1][1].keys() == logits.keys()


def one_rank_idles(rank: int, world: int, seed: int):
    """Expert ranks whose requests end at different times: Megatron runs empty steps to keep them together."""
    dynamic.start(ep=2)
    run = dynamic.Run(dynamic.build("moe", ep=2, **EXPERTS))
    for number, prompt in enumerate(dynamic.prompts_of([5, 90] if rank else [70, 3, 150, 20], seed + rank)):
        run.add(number, prompt, 5 if rank else 20)
    while True:
        busy = torch.tensor([run.engine.has_unfinished_requests()], dtype=torch.int)
        torch.distributed.all_reduce(busy)
        if not busy:
            return run.prompts, run.tokens
        if run.engine.has_unfinished_requests():
            run.step()
        else:
            run.controller.dummy_forward()


def judge_tokens(rank: int, world: int, case: str, prompts: dict, tokens: dict):
    dynamic.start()
    run = dynamic.Run(dynamic.build(case))
    for number, prompt in prompts.items():
        run.add(number, prompt, len(tokens[number]))
    run.finish()
    return run.tokens


def test_expert_ranks_with_other_requests():
    for prompts, tokens in spawn(one_rank_idles, 2, SEED):
        assert spawn(judge_tokens, 1, "moe", prompts, tokens) == [tokens]


# ---- what is not served ----------------------------------------------------------------------------------------------


def refused(rank: int, world: int, layout: dict, config: dict, inference: dict) -> str:
    dynamic.start(**layout)
    model = dynamic.build("lightning", **config)
    if config.get("context_parallel_size", 1) == 1:
        model.config.virtual_pipeline_model_parallel_size = inference.pop("virtual", None)
        model.config.batch_invariant_mode = inference.pop("batch_invariant", False)
    with pytest.raises(ValueError) as error:
        dynamic.Run(model, **inference)
    return str(error.value)


def refused_experts(rank: int, world: int) -> str:
    dynamic.start(ep=2)
    with pytest.raises(ValueError) as error:
        dynamic.Run(dynamic.build("moe", ep=2))
    return str(error.value)


def test_refuses_expert_ranks_that_need_equal_numbers_of_tokens():
    message = "--moe-token-dispatcher-type allgather needs as many tokens on every expert rank"
    assert all(message in found for found in spawn(refused_experts, 2))


@pytest.mark.parametrize("cp, inference, message", [
    (2, {}, "do not generate with context-parallel size 2; load the checkpoint with --context-parallel-size 1"),
    (1, dict(virtual=2), "virtual pipeline size 2 makes several; load the checkpoint without"),
    (1, dict(num_speculative_tokens=1), "num_speculative_tokens=1: a lightning state cannot be taken back"),
    pytest.param(
        1, dict(batch_invariant=True), "--batch-invariant-mode: since 0.20 Megatron's dynamic engine",
        marks=pytest.mark.skipif("ssm_chunk_alignment" not in STATES, reason="of megatron-core 0.20"),
    ),
])  # fmt: skip
def test_refused_before_anything_runs(cp, inference, message):
    for found in spawn(refused, cp, dict(cp=cp), dict(context_parallel_size=cp), inference):
        assert message in found


def mtp_lines(rank: int, world: int) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("lightning_megatron").addHandler(handler)
    dynamic.start()
    dynamic.Run(dynamic.build("mtp"))
    return [line for line in lines if "left out" in line]


def test_mtp_layers_are_left_out():
    wanted = "lightning: 1 multi-token prediction layers are left out: they only help training"
    assert spawn(mtp_lines, 1) == [[wanted]]


def graphs_of_experts(rank: int, world: int):
    from lightning_megatron.inference.engine import build_engine

    dynamic.start()
    model = dynamic.build("moe")
    model.config.cuda_graph_impl = "local"
    with pytest.raises(ValueError, match="--moe-pad-experts-for-cuda-graph-inference"):
        build_engine(model, dynamic.Tokens(), cuda_graphs=2)


def test_graphs_of_experts_need_equal_numbers_of_tokens():
    spawn(graphs_of_experts, 1)
