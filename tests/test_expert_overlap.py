"""``--overlap-moe-expert-parallel-comm``: Megatron's schedule calls the parts of layers itself, and trains as without.

On CPUs, whose streams do nothing: it is what the parts compute, and in which order. GPUs: test_two_gpus.py.
"""

from __future__ import annotations

import pytest

from tests.helpers.training import MODELS, SIZE, TRAIN, gradient_norms
from tests.launch import Run, run_pretrain
from tests.tolerances import TRAINED_LOSSES_BF16, TRAINED_NORMS_BF16

EXPERTS = (
    f"{MODELS['moe']} --moe-layer-freq [0,1]*2 --bf16 --mock-data --global-batch-size 8 --expert-model-parallel-size 2 "
    "--moe-token-dispatcher-type alltoall"
)
STAGES = (
    "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --untie-embeddings-and-output-weights"
)
CASES = {  # ranks, flags
    "residuals": (
        2,
        "--lightning-attn-alpha 3.5 --lightning-mlp-alpha 3.5 --lightning-embedding-scale 4 --fp32-residual-connection "
        "--moe-shared-expert-intermediate-size 64",
    ),
    "packed": (
        2,
        "--dataloader-inter-document-masking --recompute-granularity selective --recompute-modules core_attn",
    ),
    "predictions": (2, "--mtp-num-layers 1"),
    "stages": (4, f"{STAGES} --mtp-num-layers 1 --lightning-mtp-attention lightning"),
}


def train(nproc: int, *flags: str) -> Run:
    return run_pretrain([*SIZE, *TRAIN, *EXPERTS.split(), *" ".join(flags).split()], nproc)


@pytest.mark.parametrize("name", CASES)
def test_trains_as_without(name):
    nproc, flags = CASES[name]
    want, run = train(nproc, flags), train(nproc, flags, "--overlap-moe-expert-parallel-comm")
    assert want.losses[-1] < want.losses[0] - 0.3
    assert run.losses == pytest.approx(want.losses, abs=TRAINED_LOSSES_BF16)
    assert gradient_norms(run) == pytest.approx(gradient_norms(want), abs=TRAINED_NORMS_BF16)
