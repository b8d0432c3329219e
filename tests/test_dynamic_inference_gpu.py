"""Megatron's dynamic inference engine on a GPU: CUDA graphs change no token, bf16 costs what it costs alone, and ranks
on two GPUs, or on one that both share, see launch.py, have the tokens of one.
"""

from __future__ import annotations

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_utils

from tests.conftest import SEED
from tests.helpers import dynamic
from tests.helpers.dynamic_ranks import RANKS, on_ranks
from tests.launch import spawn

pytestmark = pytest.mark.gpu
LENGTHS = [1, 7, 500, 3, 64, 65, 129, 2]
GRAPHS = dict(num_cuda_graphs=4)
INFERENCE = dict(max_sequence_length=640, max_requests=4, max_tokens=128)
BF16 = dict(params_dtype=torch.bfloat16, bf16=True)


def serve(model, seed: int, **inference) -> tuple[dynamic.Run, int]:
    """All prompts in one engine, and the number of steps that were graphs."""
    run, graphs = dynamic.Run(model, **INFERENCE | inference), 0
    for number, prompt in enumerate(dynamic.prompts_of(LENGTHS, seed)):
        run.add(number, prompt, 64)
    while run.engine.has_unfinished_requests():
        run.step()
        graphs += run.context.using_cuda_graph_this_step()
    return run, graphs


def in_full_fp32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    moe_utils.te_general_gemm = None  # routes experts in tf32: 1e-4 of a logit, in the engine as without it


def in_fp32(rank: int, world: int, case: str, seed: int):
    dynamic.start()
    in_full_fp32()
    run, graphs = serve(dynamic.build(case, cuda_graph_impl="local"), seed, **GRAPHS)
    tokens, found = run.tokens, run.judge()
    run.close()
    plain, none = serve(dynamic.build(case), seed)
    assert graphs > 60 and not none, (graphs, none)
    return found, plain.judge(), tokens == plain.tokens


@pytest.mark.parametrize("case", [
    "lightning", "everything", "lrpe", "moe-padded", "gqa", "mla", "hybrid", "hybrid-lightning",
])  # fmt: skip
def test_graphs_change_no_token(case):
    """States of live requests too: the slots that the capture used are others' afterwards."""
    ((graphs, plain, same),) = spawn(in_fp32, 1, case, SEED, gpus=True, timeout=600)
    print(f"LIGHTNING_TEST_SEED={SEED}", graphs, plain)
    for found in (graphs, plain):
        assert found["worst"] < dynamic.NOISE and not found["wrong"], found
        assert found["tokens"] > 64 * len(LENGTHS) * 0.75, found  # graphs do not say which experts were a tie
    assert same or graphs["ties"] or plain["ties"] or graphs["left"]


@torch.inference_mode()  # or Megatron would make graphs of the passes without caches too
def rounding(rank: int, world: int, case: str, seed: int) -> tuple[float, float]:
    """Relative errors of logits to fp32: of bf16 engines with graphs, and of a bf16 pass without caches."""
    dynamic.start()
    exact, rough = dynamic.build(case), dynamic.build(case, cuda_graph_impl="local", **BF16)
    for want, have in zip(exact.parameters(), rough.parameters(), strict=True):
        want.copy_(have)  # bf16 holds them
    run, graphs = serve(rough, seed, **GRAPHS)
    assert graphs > 60, graphs
    run.close()
    engine, alone = [], []
    for number, prompt in run.prompts.items():
        whole = torch.tensor([prompt + run.tokens[number]], device="cuda")
        places = torch.arange(whole.shape[1], device="cuda")[None]
        want, other = (model(whole, places, None)[0, :-1].float().cpu() for model in (exact, rough))
        got = torch.stack([run.logits[number][i] for i in range(len(want))])
        engine.append((got - want).norm() / want.norm())
        alone.append((other - want).norm() / want.norm())
    return float(torch.stack(engine).max()), float(torch.stack(alone).max())


@pytest.mark.parametrize("case", ["lightning", "everything", "gqa", "mla"])
def test_bf16_is_as_exact_as_without_caches(case):
    ((engine, alone),) = spawn(rounding, 1, case, SEED, gpus=True, timeout=600)
    print(f"LIGHTNING_TEST_SEED={SEED}", engine, alone)
    assert engine < 1.5 * alone + 1e-4


# ---- two ranks -------------------------------------------------------------------------------------------------------

LAYOUTS = ["tp2", "tp2-gqa-sp", "tp2-mla", "tp2-lrpe", "pp2-gqa", "ep2"]


def all_on_ranks(rank: int, world: int, seed: int) -> dict[str, tuple[dict, dict]]:
    """Tokens and logits of every layout, or of its model on one rank; in one process, which takes long to start."""
    in_full_fp32()
    found = {}
    for name in LAYOUTS:
        _, case, layout, config = RANKS[name]
        layout, config = (layout, config) if world > 1 else ({}, {})
        found[name] = on_ranks(rank, world, case, layout, config, seed)
        parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    """What one rank has; then what each of two has."""
    return [found for world in (1, 2) for found in spawn(all_on_ranks, world, SEED, gpus=True, timeout=300)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_change_no_token(name, ranks):
    print(f"LIGHTNING_TEST_SEED={SEED}")
    (want, logits), *others = (found[name] for found in ranks)
    assert len(others) == 2 and others[-1][1].keys() == logits.keys()
    for tokens, rows in others:
        if name != "ep2":
            assert tokens == others[0][0]  # on every rank
        for number, mine in rows.items():  # of the last stage
            begin = len(mine) - len(want[number])
            same = dynamic.agree(tokens[number], want[number], mine[begin:], logits[number][begin:])
            assert same >= len(want[number]) // 2, (number, same)
