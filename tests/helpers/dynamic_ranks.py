"""Layouts over ranks in which the dynamic engine must give the tokens of one, on CPUs and GPUs."""

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
RANKS = {  # number of ranks, case, layout, changes of the config
    "tp2": (2, "everything", dict(tp=2), dict()),
    "tp2-sp": (2, "everything", dict(tp=2), dict(sequence_parallel=True)),
    "tp2-gqa": (2, "gqa", dict(tp=2), dict()),
    "tp2-gqa-sp": (2, "gqa", dict(tp=2), dict(sequence_parallel=True)),
    "tp2-mla": (2, "mla", dict(tp=2), dict()),
    "tp2-lrpe": (2, "lrpe", dict(tp=2), dict()),
    "pp2": (2, "everything", dict(pp=2), dict()),
    "pp2-lrpe": (2, "lrpe", dict(pp=2), dict()),  # states of another shape on each stage
    "pp2-gqa": (2, "gqa", dict(pp=2), dict()),
    "pp2-one-softmax": (2, "moe-gqa", dict(pp=2), dict()),  # all of its softmax layers are on the second stage
    "pp2-apart": (2, "apart", dict(pp=2), dict()),  # a stage has no softmax layer, the other no lightning layer
    "ep2": (2, "moe", dict(ep=2), EXPERTS),
    "ep2-gqa": (2, "moe-gqa", dict(ep=2), EXPERTS),
    "tp2-hybrid-sp": (2, "hybrid", dict(tp=2), dict(sequence_parallel=True)),
    "pp2-hybrid": (2, "hybrid", dict(pp=2), dict()),
    "pp2-hybrid-apart": (2, "hybrid-apart", dict(pp=2), dict()),
    "ep2-hybrid": (2, "hybrid-moe", dict(ep=2), EXPERTS),
    "pp2-hybrid-lightning": (2, "hybrid-lightning", dict(pp=2), dict()),
    "tp2-pp2": (4, "everything", dict(tp=2, pp=2), dict()),
    "tp2-pp2-gqa-sp": (4, "gqa", dict(tp=2, pp=2), dict(sequence_parallel=True)),
    "tp2-pp2-apart": (4, "apart", dict(tp=2, pp=2), dict()),
    "tp2-ep2": (4, "moe", dict(tp=2, ep=2), EXPERTS),  # halves of experts
    "tp2-ep4-gqa-sp": (4, "moe-gqa", dict(tp=2, ep=4, etp=1), EXPERTS | dict(sequence_parallel=True)),  # whole experts
    "pp2-ep2-gqa": (4, "moe-gqa", dict(pp=2, ep=2), EXPERTS),
}
