"""Ways to hold, step and save parameters: FSDP of Megatron and torch, muon, an optimizer on the host, saves beside the
training. It trains as without.

Megatron-FSDP and instances of the distributed optimizer need the package einops, muon emerging-optimizers, the others a
GPU: without them they are skipped.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from lightning_megatron.compat import importable
from lightning_megatron.config import LightningOptions
from lightning_megatron.integrity import verify
from lightning_megatron.runtime import prepare
from lightning_megatron.spec import get_hybrid_block_spec
from tests import layers
from tests.helpers.models import gpt
from tests.helpers.training import MODELS, SIZE, TRAIN, assert_same_training, gradient_norms, train
from tests.launch import Run, run_pretrain, spawn
from tests.tolerances import NOISE, TRAINED_LOSSES, TRAINED_LOSSES_BF16, TRAINED_NORMS_BF16

UNTIED = "--untie-embeddings-and-output-weights"
FSDP = (
    f"{UNTIED} --use-megatron-fsdp --use-distributed-optimizer --data-parallel-sharding-strategy optim_grads_params "
    "--ckpt-format fsdp_dtensor --no-gradient-reduce-div-fusion"  # gloo has no such sum
)
CONNECTIONS = {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}  # Megatron-FSDP refuses 1
TE, NVRX = "transformer_engine.pytorch", "nvidia_resiliency_ext"
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


def test_weights_are_gathered_in_the_step():
    """Those of the first of two chunks of a stage, while the optimizer goes on with the others."""
    stages = "--global-batch-size 8 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
    flags = [*SIZE, *TRAIN, *f"{MODELS['freq4']} --mock-data {UNTIED} --use-distributed-optimizer {stages}".split()]
    gathered = "--ckpt-format torch --overlap-grad-reduce --overlap-param-gather"  # Megatron refuses other formats
    gathered += " --overlap-param-gather-with-optimizer-step"
    assert_same_training(run_pretrain([*flags, *gathered.split()], 4), run_pretrain(flags, 4))


@fsdp
def test_megatron_fsdp_saves_weights(tmp_path):
    """Without states of torch's Adam, which make a save hang; and not --swiglu in fp32."""
    flags = f"{FSDP} --no-save-optim --save {tmp_path} --save-interval 2 --exit-interval 2"
    first = train("freq2", "dp2", flags, env=CONNECTIONS)
    again = train("freq2", "dp2", f"{FSDP} --no-load-optim", load=tmp_path, fresh=False, env=CONNECTIONS)
    assert len(first.losses) == 2 and len(again.losses) == 3, "it goes on behind the two iterations that were saved"
    assert again.losses[0] < first.losses[1]
    for flags in ("--no-load-optim", "--finetune", "--ckpt-format torch", "--auto-detect-ckpt-format"):
        other = train("freq2", "dp2", flags, load=tmp_path, fresh=False, check=False)
        assert "was saved with --ckpt-format fsdp_dtensor, which a run with --ckpt-format torch" in other.log
        assert "does not load: give --use-megatron-fsdp --ckpt-format fsdp_dtensor" in other.log
        assert "Traceback" not in other.log


@fsdp
@pytest.mark.parametrize("saved", ["torch_dist", "torch"])
def test_megatron_fsdp_loads_no_other_format(saved, tmp_path):
    train("freq2", "dp2", f"{UNTIED} --ckpt-format {saved} --save {tmp_path} --save-interval 5")
    for flags in (FSDP, f"{FSDP} --auto-detect-ckpt-format"):
        run = train("freq2", "dp2", flags, load=tmp_path, check=False, env=CONNECTIONS)
        assert f"was saved with --ckpt-format {saved}, which a run with --ckpt-format fsdp_dtensor does not" in run.log
        assert "leave the flag and --use-megatron-fsdp out" in run.log and "Traceback" not in run.log


# ---- muon --------------------------------------------------------------------------------------------------------

# Megatron's default orthogonalizes in bf16, which makes 1e-4 of a loss out of the last bit of a gradient.
MUON = "--optimizer muon --muon-fp32-matmul-prec high"
WHOLE = "--muon-tp-mode duplicated"  # else Megatron takes the slice of each tensor-parallel rank as a matrix
# Megatron would cut 2 heads of k and v as it does those of softmax layers, which is refused.
FREQ4 = "--muon-no-split-qkv"


@pytest.fixture(scope="module")
def alone(initial):
    """alone(model): the run of one process with muon."""

    @functools.cache
    def run(model: str):
        result = train(model, "one", f"{MUON} {FREQ4 if model == 'freq4' else ''}", load=initial(model))
        assert result.losses[-1] < result.losses[0] - 0.1
        return result

    return run


@muon
@pytest.mark.parametrize(
    "model, layout, flags",
    [("all", "cp2", ""), ("all", "tp2-sp", WHOLE), ("freq4", "pp2", FREQ4)],
    ids=["cp2", "tp2-sp", "pp2"],
)
def test_muon(model, layout, flags, initial, alone):
    assert_same_training(train(model, layout, f"{MUON} {flags}", load=initial(model)), alone(model))


@muon
def test_muon_in_bf16_matrices_is_as_noisy_as_one_process(initial):
    """By Megatron's default: context-parallel ranks change losses by what noise in the last bits does, not by more."""
    run = functools.partial(train, "all", flags="--optimizer muon", load=initial("all"))
    want, ranks = run("one"), run("cp2")
    noisy = run("one", script="tests/helpers/perturbed_pretrain.py", env={"PERTURB_NOISE": str(NOISE)})
    change, noise = (max(abs(a - b) for a, b in zip(x.losses, want.losses, strict=True)) for x in (ranks, noisy))
    print("ranks change losses by", change, "noise by", noise)
    # one draw each of a largest value; tokens in wrong places change losses by 1e-2
    assert change < 5 * noise < 5e-3


@muon
def test_muon_distributed():
    """In bf16. Without norms of layers and with an output layer both ranks hold as much, which gloo needs."""
    flags = "--optimizer muon --bf16 --untie-embeddings-and-output-weights --no-lightning-layernorm-affine"
    run, want = train("all", "dp2", flags), train("all", "one", flags)
    assert want.losses[-1] < want.losses[0] - 0.1
    assert_same_training(run, want, losses=TRAINED_LOSSES_BF16, norms=TRAINED_NORMS_BF16)


@muon
def test_muon_goes_on(tmp_path, initial, alone):
    first = train("all", "one", f"{MUON} --save {tmp_path} --save-interval 2 --exit-interval 2", load=initial("all"))
    assert len(first.losses) == 2
    assert_same_training(train("all", "cp2", MUON, load=tmp_path, fresh=False), alone("all"), skip=2)


def steps_of_muon(rank: int, world: int, split: bool, parts: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the first step subtracts from weights of the first layer. ``parts``: gradients of q, gate, k and v."""
    layers.start()
    config, options = layers.transformer_config(), LightningOptions(lrpe_layers=1, gate="sigmoid")
    prepare(config, options, layout="zigzag")
    model = gpt(config, lambda config, vp_stage=None: get_hybrid_block_spec(config.transformer, options))
    model.ddp_config = DistributedDataParallelConfig()
    mixer = model.decoder.layers[0].self_attention
    weights = {"qkv": mixer.linear_qkv.weight, "angles": mixer.lrpe.theta}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    for parameter in model.parameters():
        parameter.main_grad = torch.randn(parameter.shape)
    weights["qkv"].main_grad = parts.unflatten(1, (4, 16)).transpose(0, 1).reshape(256, 64)  # head by head
    kwargs = dict(lr=1.0, weight_decay=0.0, clip_grad=0.0, adam_eps=1e-30, muon_momentum=0.0)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="muon", muon_split_qkv=split, muon_fp32_matmul_prec="high", **kwargs), [model]
    )
    optimizer.step()
    return {name: before[name] - weight.detach() for name, weight in weights.items()}


@muon
@pytest.mark.parametrize("split", [True, False])
def test_muon_takes_q_gate_k_and_v_as_matrices(split):
    """Multiples of orthogonal matrices are gradients: Muon drops the factor of each matrix that it takes by itself, and
    keeps the ratios of what is in one matrix. The angles of LRPE are none: Adam's first step is the learning rate.
    """
    rng, factors = torch.Generator().manual_seed(4), torch.tensor([1.0, 0.1, 10.0, 3.0])
    orthogonal = torch.linalg.qr(torch.randn(4, 64, 64, generator=rng))[0]
    steps = spawn(steps_of_muon, 1, split, orthogonal * factors[:, None, None])[0]
    got = steps["qkv"].view(4, 4, 16, 64).transpose(0, 1).reshape(4, 64, 64)
    want = orthogonal if split else orthogonal * (factors / factors.norm())[:, None, None]
    scale = float((got * want).sum() / want.square().sum())
    assert 0.7 < scale / (8 if split else 16) < 1.3  # Megatron's factor: the root of the longer side
    assert torch.allclose(got, scale * want, atol=1e-3)
    assert torch.allclose(steps["angles"].abs(), torch.ones(4, 16))


# ---- on a GPU ----------------------------------------------------------------------------------------------------


def stopped(model: str, flags: str, folder: Path, loading: str = "", **arguments) -> tuple[Run, Run]:
    """A run of five iterations, and what goes on from the checkpoint of one that was stopped behind the second."""
    words = [*SIZE, *TRAIN, *MODELS[model].split(), "--mock-data", *flags.split()]
    run = functools.partial(run_pretrain, nproc=2, gpus=True, **arguments)
    want, first = run(words), run([*words, "--save", folder, *"--save-interval 2 --exit-interval 2".split()])
    assert want.losses[-1] < want.losses[0] - 0.1 and len(first.losses) == 2
    return want, run([*words, "--load", folder, *loading.split()])


def assert_goes_on(model: str, flags: str, folder: Path, **arguments) -> None:
    want, again = stopped(model, flags, folder, **arguments)
    assert again.losses == pytest.approx(want.losses[2:], abs=TRAINED_LOSSES)
    assert gradient_norms(again) == pytest.approx(gradient_norms(want)[2:], rel=1e-3)


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
def test_weights_of_torch_fsdp2_go_on(tmp_path):
    """Adam begins anew: to go on with its states is refused, flags/test_refused.py."""
    flags = f"{UNTIED} --use-torch-fsdp2 --no-gradient-accumulation-fusion"
    want, again = stopped("freq4", flags, tmp_path, "--no-load-optim", env=CONNECTIONS)
    assert len(again.losses) == 3 and again.losses[0] == pytest.approx(want.losses[2], abs=TRAINED_LOSSES)


@pytest.mark.gpu
@fsdp
@pytest.mark.skipif(not (importable(TE) or importable("apex.optimizers")), reason="needs a fused Adam: TE's or apex's")
@pytest.mark.parametrize("model", ["all", "freq4"])
def test_megatron_fsdp_goes_on(model, tmp_path):
    """With the states of the optimizer, which a checkpoint of torch's Adam cannot hold; --swiglu needs --bf16."""
    assert_goes_on(model, f"--bf16 {FSDP}", tmp_path, env=CONNECTIONS)


@pytest.mark.gpu
@pytest.mark.skipif(not (importable(TE) or importable("apex.optimizers")), reason="needs a fused Adam: TE's or apex's")
@pytest.mark.parametrize("flags", ["", "--bf16", "--bf16 --use-distributed-optimizer"])
def test_fused_adam_goes_on(flags, tmp_path):
    """It counts its steps in its groups of parameters, where torch's Adam has a number for each parameter."""
    assert_goes_on("freq4", flags, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "strategy",
    [
        "mcore",
        pytest.param("nvrx", marks=pytest.mark.skipif(not importable(NVRX), reason="needs nvidia_resiliency_ext")),
    ],
)
def test_saves_beside_the_training(strategy, tmp_path):
    """A process of its own writes while ranks train on: every checkpoint is whole, and goes on as nothing had been."""
    flags = [*SIZE, *TRAIN, *MODELS["freq4"].split(), "--mock-data", "--use-distributed-optimizer"]
    beside = ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", strategy]
    saving = [*beside, "--save", tmp_path, *"--save-interval 2 --exit-interval 4".split()]
    want, first = (run_pretrain([*flags, *more], 2, gpus=True) for more in ([], saving))
    assert "an async checkpoint save at iteration" in first.log
    assert first.losses == pytest.approx(want.losses[:4], abs=TRAINED_LOSSES)
    for iteration in (2, 4):
        verify(tmp_path / f"iter_{iteration:07d}")
    for step in (2, 4):
        again = run_pretrain([*flags, *beside, "--load", tmp_path, "--ckpt-step", str(step)], 2, gpus=True)
        assert again.losses == pytest.approx(want.losses[step:], abs=TRAINED_LOSSES)


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
