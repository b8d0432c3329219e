"""Megatron's dynamic inference engine: every request gets the tokens and logits that it would get alone."""

from __future__ import annotations

import pytest

from tests.conftest import SEED
from tests.helpers import dynamic
from tests.launch import spawn

LOGITS = 1e-5  # fp32, relative to the largest of a position: what users are promised
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
    assert found["worst"] < LOGITS and found["repeated"] < LOGITS and not found["wrong"], found


@pytest.mark.parametrize("case", dynamic.CASES)
def test_logits_and_tokens(case):
    """Prompts of other lengths in one batch, more of them than states; read in chunks; 64 greedy tokens each."""
    ((found, tokens),) = spawn(generate_small, 1, case, SEED)
    assert_right(found)
    assert max(len(set(x)) for x in tokens.values()) > 5, "tokens hardly vary, so the comparison means little"


def generate_small(rank, world, case, seed):
    return generate(rank, world, case, ONE_BATCH, 64, seed, max_sequence_length=640, max_requests=4, max_tokens=128)
