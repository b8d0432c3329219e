"""Megatron's dynamic inference engine: every request gets the tokens and logits that it would get alone."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.inference.config import KVCacheManagementMode, MambaInferenceStateConfig, PrefixCachingEvictionPolicy
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.utils import InferenceMode
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from tests import layers
from tests.conftest import SEED
from tests.helpers import dynamic
from tests.helpers.dynamic_ranks import EXPERTS, RANKS, on_ranks
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


def assert_right(found: dict, tokens: int) -> None:
    """Every position was compared, and of ``tokens`` that were generated all but one in a hundred are no tie."""
    print(found)
    assert found["worst"] < dynamic.NOISE and found["repeated"] < dynamic.NOISE and not found["wrong"], found
    assert not found["left"] and found["tokens"] + found["ties"] == tokens and found["ties"] <= tokens // 100, found


@pytest.mark.parametrize("case", dynamic.CASES)
def test_logits_and_tokens(case):
    """Prompts of other lengths in one batch, more of them than states; read in chunks; 64 greedy tokens each."""
    ((found, tokens),) = spawn(generate_small, 1, case, SEED)
    assert_right(found, 64 * len(ONE_BATCH))
    assert max(len(set(x)) for x in tokens.values()) > 5, "tokens hardly vary, so the comparison means little"


def generate_small(rank, world, case, seed):
    return generate(rank, world, case, ONE_BATCH, 64, seed, max_sequence_length=640, max_requests=4, max_tokens=128)


def generate_long(rank: int, world: int, case: str, seed: int):
    """On one rank, or on tensor-parallel ones; logits of the generated tokens: request -> [tokens, vocabulary]."""
    dynamic.start(tp=world)
    changes = dict(expert_tensor_parallel_size=world) if "moe" in case else {}
    model = dynamic.build(case, tp=world, **changes)
    run = dynamic.Run(model, max_sequence_length=max(LONG) + MANY, max_requests=4, max_tokens=4096)
    for number, prompt in enumerate(dynamic.prompts_of(LONG, seed)):
        run.add(number, prompt, MANY)
    run.finish()
    rows = {n: torch.stack([run.logits[n][len(p) - 1 + i] for i in range(MANY)]) for n, p in run.prompts.items()}
    return run.judge() if world == 1 else None, run.tokens, rows


LONG, MANY = [1, 7, 500, 20_000], 66


@pytest.mark.parametrize("case", ["lightning", "gqa", "mla", "moe", "moe-gqa", "hybrid"])
def test_long_prompt(case):
    """64 greedy tokens after prompts of up to 20,000 tokens, read in chunks; and the same on two ranks."""
    ((found, want, logits),) = spawn(generate_long, 1, case, SEED, timeout=400)
    assert_right(found, MANY * len(LONG))
    assert all(len(tokens) == MANY for tokens in want.values())
    assert max(len(set(tokens)) for tokens in want.values()) > 5, "tokens hardly vary, so the comparison means little"
    for _, tokens, rows in spawn(generate_long, 2, case, SEED, timeout=400):
        # each up to a tie, after which the two go on from other tokens; of 40 runs one may have one
        same = [dynamic.agree(mine, want[number], rows[number], logits[number]) for number, mine in tokens.items()]
        assert sum(count >= 64 for count in same) >= len(LONG) - 1, same


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


@pytest.mark.parametrize("case", ["lightning", "gqa", "hybrid"])
def test_reset(case):
    """In the middle of requests; others, of the same numbers, find nothing of them."""
    assert_right(spawn(reset_and_go_on, 1, case, SEED)[0], 8 * 20)


def share_prefixes(rank: int, world: int, case: str, seed: int, policy: str, chunk: int):
    """Prompts that begin as earlier ones, one after another and at once."""
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
    ("mla", "lru", 128), ("hybrid", "lru", 64), ("hybrid-lightning", "ref_zero", 128),
])  # fmt: skip
def test_prefix_caching(case, policy, chunk):
    """Tokens of a prompt that begins as another one are not computed again."""
    ((found, skipped),) = spawn(share_prefixes, 1, case, SEED, policy, chunk)
    assert_right(found, 30 + 7 * 10 + 10 * (policy == "lru"))
    assert skipped >= 64 * 4 and found["skipped"] >= skipped


# ---- ranks -----------------------------------------------------------------------------------------------------------


def on_ranks_small(rank, world, case, layout, config, seed):
    return on_ranks(rank, world, case, layout, config, seed)


@pytest.mark.parametrize("name", RANKS)
def test_ranks_change_no_token(name):
    """Padding, waiting, chunks and one batch of all as on one rank."""
    world, case, layout, config = RANKS[name]
    ((want, logits),) = spawn(on_ranks_small, 1, case, {}, {}, SEED)
    found = spawn(on_ranks_small, world, case, layout, config, SEED)
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


def build_on_expert_ranks(rank: int, world: int) -> list[int]:
    from lightning_megatron.inference.engine import build_engine

    dynamic.start(ep=world)
    model = dynamic.build("moe", ep=world, moe_token_dispatcher_type="alltoall")
    engine = build_engine(model, dynamic.Tokens(), max_requests=2, max_sequence_length=64)
    assert model.config.inference_moe_token_dispatcher_type == "nvls", "Megatron's default, which is left as it is"
    params = SamplingParams(num_tokens_to_generate=5, top_k=1, termination_id=-1)
    (record,) = engine.generate(["1 2 3"], params)
    return list(record.merge().generated_tokens)


def test_build_engine_on_expert_ranks():
    """Without memory that ranks share over NVLink, which Megatron's own inference layers need."""
    (want,) = spawn(build_on_expert_ranks, 1)
    assert spawn(build_on_expert_ranks, 2) == [want, want] and len(want) == 5


# ---- rollouts between training steps ---------------------------------------------------------------------------------


def train(ddp, optimizer, seed: int) -> float:
    """A step of Megatron's optimizer, which changes weights in place; returns the loss."""
    ddp.train()
    ddp.zero_grad_buffer()
    tokens = torch.tensor(dynamic.prompts_of([60, 60], seed))
    places = torch.arange(60)[None].expand_as(tokens)
    loss = ddp(tokens, places, None, labels=tokens.roll(-1, 1)).mean()
    loss.backward()
    finalize_model_grads([ddp])
    optimizer.step()
    ddp.eval()
    return float(loss.detach())


def training(case: str, tp: int = 1):
    """A model as Megatron trains it, with DDP, and its optimizer."""
    dynamic.start(tp=tp)
    model = dynamic.build(case, tp=tp)
    ddp = layers.trainable(model, model.config)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-2, weight_decay=0.0, clip_grad=1.0), [ddp]
    )
    return ddp, optimizer


def rollouts(rank: int, world: int, case: str, seed: int):
    """Three times a rollout and a step, with one engine; tokens of engines made anew; and losses without rollouts."""
    ddp, optimizer = training(case, world)
    model, rounds, losses = ddp.module, [], []
    run = dynamic.Run(model, max_requests=4)
    asked = dynamic.prompts_of([1, 70, 7, 150, 64], seed)
    for step in range(3):
        for number, prompt in enumerate(asked, start=10 * step):
            run.add(number, prompt, 20)
        run.finish()
        mine = {n % 10: tokens for n, tokens in run.tokens.items()}
        found = run.judge() if world == 1 else None
        fresh, params = dynamic.Run(model, max_requests=4), SamplingParams(num_tokens_to_generate=20, top_k=1)
        params.termination_id = -1
        records = fresh.engine.generate([" ".join(map(str, prompt)) for prompt in asked], params)
        rounds.append((mine, {n: list(record.merge().generated_tokens) for n, record in enumerate(records)}, found))
        fresh.close()
        for kept in (run.prompts, run.tokens, run.logits, run.experts):
            kept.clear()
        losses.append(train(ddp, optimizer, seed + step))
        InferenceMode.set_active()
    run.close()
    parallel_state.destroy_model_parallel()
    ddp, optimizer = training(case, world)
    return rounds, losses, [train(ddp, optimizer, seed + step) for step in range(3)]


@pytest.mark.parametrize(
    "case, world", [("lightning", 1), ("lrpe", 1), ("gqa", 1), ("mla", 1), ("moe", 1), ("gqa", 2), ("hybrid", 1)]
)
def test_rollouts_between_training_steps(case, world):
    """An engine reads the weights as they are, and leaves nothing that a training step would meet."""
    for rounds, losses, without in spawn(rollouts, world, case, SEED):
        for mine, fresh, found in rounds:
            assert mine == fresh and len(mine) == 5
            if found is not None:
                assert_right(found, 5 * 20)
        first, second, third = (mine for mine, *_ in rounds)
        assert first != second != third, "the steps changed no token"
        assert losses == without


def other_weights(rank: int, world: int, case: str, seed: int, how: str) -> tuple[dict, dict]:
    """Weights change while requests are at work, whose prompts another one repeats later."""
    dynamic.start()
    model = dynamic.build(case)
    modes = dict(suspend=dict(kv_cache_management_mode=KVCacheManagementMode.RECOMPUTE))
    caching = dict(enable_prefix_caching=True, prefix_caching_mamba_gb=0.02, block_size_tokens=16)
    caching["prefix_caching_eviction_policy"] = PrefixCachingEvictionPolicy.LRU
    run = dynamic.Run(model, max_requests=4, **modes.get(how, caching))
    asked = dynamic.prompts_of([130, 3, 66], seed)

    def ask():
        for number, prompt in enumerate(asked):
            run.add(number, prompt, 40)

    ask()
    for _ in range(12):
        run.step()
    assert any(run.logits) and run.engine.has_unfinished_requests()
    if how == "suspend":
        run.engine.suspend()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.1
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    if how == "suspend":
        run.engine.resume()
    elif how == "reset":
        run.reset()
        ask()
    else:  # they end, and are asked again
        run.finish()
        for kept in (run.prompts, run.tokens, run.logits):
            kept.clear()
        ask()
    run.finish()
    assert len(run.tokens) == 3
    return run.judge()


@pytest.mark.parametrize("case", ["lightning", "gqa", "hybrid"])
def test_weights_that_change_under_requests(case):
    """States of the old weights are lost by reset(), and computed again after suspend() and resume(); those that the
    prefix cache keeps are found again without.
    """
    assert_right(spawn(other_weights, 1, case, SEED, "reset")[0], 3 * 40)
    (found,) = spawn(other_weights, 1, case, SEED, "suspend")
    assert found["worst"] < dynamic.NOISE and not found["left"] and found["positions"] == 130 + 3 + 66 + 3 * 39
    (found,) = spawn(other_weights, 1, case, SEED, "kept")
    assert found["skipped"] and found["worst"] > 100 * dynamic.NOISE


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


# ---- the judge -------------------------------------------------------------------------------------------------------


def equal_experts(rank: int, world: int, seed: int):
    """Two experts are equally good for every token; the engine prefers the one, the judge the other. Then the same
    where it is not known what the engine chose, and where one is clearly better to the judge.
    """
    dynamic.start()
    model = dynamic.build("moe")
    run, found = dynamic.Run(model, max_sequence_length=256), []

    def prefer(expert: int, other: int, by: float) -> None:
        for router in run.routers:
            router.weight[expert] = router.weight[other]
            router.weight[expert] += by * router.weight[other].sign()

    with torch.no_grad():
        prefer(2, 3, 1e-8)
    for number, prompt in enumerate(dynamic.prompts_of([30, 40, 200], seed)):
        run.add(number, prompt, 40)
    run.finish()
    experts = dict(run.experts)
    for by, known in ((1e-8, True), (1e-8, False), (1e-2, True)):
        with torch.no_grad():
            prefer(3, 2, by)
        run.experts.clear()
        run.experts.update(experts if known else {})
        found.append(run.judge())
    return found


def test_the_judge_takes_the_experts_of_ties():
    """Else it would find errors, or, where it does not know them, leave tokens out, which a test has to notice."""
    ((found, without, wrong),) = spawn(equal_experts, 1, SEED)
    print(found, without, wrong)
    assert found["swapped"] > 20
    assert_right(found, 3 * 40)
    assert without["left"] and not without["swapped"] and without["tokens"] + without["ties"] < 3 * 40
    with pytest.raises(AssertionError):
        assert_right(without, 3 * 40)
    assert wrong["worst"] > 100 * dynamic.NOISE
