"""Ways to hold and step parameters: FSDP of Megatron and torch, muon, an optimizer on the host. Training as without.

Megatron-FSDP and instances of the distributed optimizer need the package einops, muon emerging-optimizers, the others a
GPU: without them they are skipped.
"""

from __future__ import annotations

import pytest
import torch

from lightning_megatron.compat import importable
from tests.helpers.training import MODELS, SIZE, TRAIN, assert_same_training, gradient_norms, train
from tests.launch import run_pretrain

UNTIED = "--untie-embeddings-and-output-weights"
FSDP = (
    f"{UNTIED} --use-megatron-fsdp --use-distributed-optimizer --data-parallel-sharding-strategy optim_grads_params "
    "--ckpt-format fsdp_dtensor --no-gradient-reduce-div-fusion"  # gloo has no such sum
)
CONNECTIONS = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}  # Megatron-FSDP refuses 1
fsdp = pytest.mark.skipif(not importable("einops"), reason="needs einops")
muon = pytest.mark.skipif(not importable("emerging_optimizers"), reason="needs emerging-optimizers")


@fsdp
@pytest.mark.parametrize("model", ["all", "freq4"])
def test_megatron_fsdp(model):
    """Parameters, gradients and optimizer cut over two ranks."""
    run = train(model, "dp2", FSDP, env=CONNECTIONS)
    assert_same_training(run, train(model, "dp2", UNTIED))


@fsdp
def test_instances_of_the_distributed_optimizer():
    """Each of two holds the whole optimizer."""
    flags = "--num-distributed-optimizer-instances 2"
    assert_same_training(train("all", "dp2", flags), train("all", "dp2"))


@fsdp
def test_megatron_fsdp_saves_weights(tmp_path):
    """Without states of torch's Adam, which make a save hang; and not --swiglu in fp32."""
    flags = f"{FSDP} --no-save-optim --save {tmp_path} --save-interval 2 --exit-interval 2"
    first = train("freq2", "dp2", flags, env=CONNECTIONS)
    again = train("freq2", "dp2", f"{FSDP} --no-load-optim", load=tmp_path, fresh=False, env=CONNECTIONS)
    assert len(first.losses) == 2 and len(again.losses) == 3, "it goes on behind the two iterations that were saved"
    assert again.losses[0] < first.losses[1]


@muon
@pytest.mark.parametrize("layout", ["dp2", "cp2"])
def test_muon(layout):
    flags = "--optimizer muon --muon-no-split-qkv"
    want = train("all", "one", flags)
    assert want.losses[-1] < want.losses[0] - 0.1
    assert_same_training(train("all", layout, flags), want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("model", ["all", "freq4"])
def test_torch_fsdp2(model):
    """torch's fully_shard takes CUDA devices only."""
    flags = [*SIZE, *TRAIN, *MODELS[model].split(), "--mock-data", UNTIED]
    sharded = "--use-torch-fsdp2 --no-gradient-accumulation-fusion".split()
    want = run_pretrain(flags, 2, gpus=True)
    run = run_pretrain([*flags, *sharded], 2, gpus=True, env=CONNECTIONS)
    assert want.losses[-1] < want.losses[0] - 0.1
    assert run.losses == pytest.approx(want.losses, abs=1e-4)
    assert gradient_norms(run) == pytest.approx(gradient_norms(want), rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_optimizer_on_the_host():
    """AdamW on the CPU takes the steps of the GPU's."""
    flags = [*SIZE, *TRAIN, *MODELS["all"].split(), *"--mock-data --bf16 --use-distributed-optimizer".split()]
    offload = "--use-precision-aware-optimizer --optimizer-cpu-offload --optimizer-offload-fraction 1.0".split()
    want, run = (run_pretrain([*flags, *more], gpus=True) for more in ([], offload))
    assert want.losses[-1] < want.losses[0] - 0.1
    # weights are rounded to bf16 after every step: an update that differs in its last bit can be another weight
    assert run.losses == pytest.approx(want.losses, abs=2e-3)
    assert gradient_norms(run) == pytest.approx(gradient_norms(want), abs=2e-2)
