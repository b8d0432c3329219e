"""Layouts over two ranks in which the dynamic engine must give the tokens of one, on CPUs and GPUs."""

from __future__ import annotations

import torch

from tests.helpers import dynamic

LENGTHS = [1, 7, 90, 3, 64, 150]


def on_ranks(rank: int, world: int, case: str, layout: dict, config: dict, seed: int, **inference):
    """Tokens, and logits of the last stage: request -> [positions, vocabulary]."""
    dynamic.start(**layout)
    run = dynamic.Run(dynamic.build(case, **layout, **config), max_requests=4, **inference)
    for number, prompt in enumerate(dynamic.prompts_of(LENGTHS, seed)):
        run.add(number, prompt, 20)
    run.finish()
    return run.tokens, {number: torch.stack([x[i] for i in sorted(x)]) for number, x in run.logits.items()}


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
