"""What the log says of lightning layers: norms of their states and gradients, MFU, and ranges for profilers."""

import math
import re
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core import utils as megatron_utils

from lightning_megatron import flags
from lightning_megatron.config import LightningOptions
from lightning_megatron.layer_log import norms, squares
from lightning_megatron.parallel import lightning_attn, mark_by, ranges
from lightning_megatron.patches import mfu
from lightning_megatron.peak import peak_tflops
from lightning_megatron.runtime import prepare
from tests.helpers import scalars
from tests.helpers.variants import Variant
from tests.launch import run_pretrain, spawn
from tests.layers import build_mixer, decay_of, start, trainable, transformer_config

FLAGS = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--micro-batch-size 1 --global-batch-size 4 --lr 1e-2 --adam-eps 1e-3 --lr-decay-style constant --mock-data "
    "--vocab-size 128 --make-vocab-size-divisible-by 8 --position-embedding-type none --normalization RMSNorm --swiglu "
    "--disable-bias-linear --hidden-dropout 0 --attention-dropout 0 --linear-attention-freq 4 --lightning-qk-norm "
    "--log-interval 1 --eval-iters 0 --num-workers 0 --no-save-rng --no-load-rng --train-iters 3 --clip-grad 0.1"
).split()
KINDS = ("state", "grad")


def log(folder, *more, nproc=1):
    """Scalars of a run that goes on from the checkpoint in ``folder``, and the run."""
    here = folder / "-".join(["log", *(x.strip("-") for x in more)])[:100]
    here.mkdir()
    run = run_pretrain(
        [*FLAGS, "--load", folder, *more, "--lightning-log-norms", "--tensorboard-dir", here],
        nproc,
        module="tests.helpers.scalars",
    )
    return scalars.read(here), run


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    run_pretrain([*FLAGS, "--save", folder, "--save-interval", 1, "--exit-interval", 1])
    return folder, *log(folder)


def test_norms_are_written_for_lightning_layers_alone(alone):
    folder, found, run = alone
    names = [name for name in found if name.startswith("lightning-")]
    assert names == [f"lightning-{kind}-norm/layer-{layer:03d}" for kind in KINDS for layer in range(3)]
    assert all(list(found[name]) == [2, 3] for name in names)
    for step in (2, 3):  # before they are clipped
        total = math.hypot(*(found[f"lightning-grad-norm/layer-{layer:03d}"][step] for layer in range(3)))
        assert 0.1 < total < found["grad-norm"][step]
    without = run_pretrain([*FLAGS, "--load", folder])
    assert without.losses == run.losses
    assert "finalize_model_grads" not in without.log and "training.finalize_model_grads" in run.log


@pytest.mark.parametrize(
    "nproc, more",
    [
        (4, "--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2 --use-distributed-optimizer"),
        (4, "--pipeline-model-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce"),
        (2, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"),
    ],
    ids=["tp2-cp2-distopt", "pp2-dp2-distopt", "recompute-dp2"],
)
def test_norms_are_those_of_one_rank(alone, nproc, more):
    folder, expected, _ = alone
    more = [*more.split(), "--no-load-optim"] if "distributed" in more else more.split()
    found, _ = log(folder, *more, nproc=nproc)
    for name, values in expected.items():
        if name.startswith("lightning-"):
            assert found[name][2] == pytest.approx(values[2], rel=2e-4), name
            assert "--no-load-optim" in more or found[name][3] == pytest.approx(values[3], rel=2e-3), name


def check_values(rank: int, world: int) -> None:
    start()
    torch.manual_seed(5)
    variant = Variant(dict(log_norms=True, value_head_dim=32), layer=2)
    mixer = build_mixer(variant)
    model = trainable(mixer, mixer.config)
    mixed = []
    mixer.linear_qkv.register_forward_hook(lambda module, inputs, output: mixed.append(output[0].detach().double()))
    mixer.train()
    for tokens in (40, 24):
        model(torch.randn(tokens, 2, mixer.config.hidden_size))[0].square().sum().backward()
    mixer.eval()
    model(torch.randn(8, 2, mixer.config.hidden_size))
    shape, expected = mixer.shape, 0.0
    decay = decay_of(mixer.options, shape.num_heads, 2, mixer.config.num_layers)
    for x in mixed[:2]:
        x = x.unflatten(-1, (shape.num_heads, sum(shape.group_dims)))
        k, v = F.silu(x[..., -shape.key_dim - shape.value_dim : -shape.value_dim]), x[..., -shape.value_dim :]
        factors = torch.exp(decay * torch.arange(len(x) - 1, -1, -1).double()[:, None])
        expected += torch.einsum("sh,sbhk,sbhv->bhkv", factors, k, v).square().sum().item() / 4
    gradients = sum(p.main_grad.double().square().sum() for p in mixer.parameters()).item()
    state, gradient = norms(squares([model], mixer.config.num_layers, 0, loss_scale=8.0))
    assert state[1] == pytest.approx(math.sqrt(expected), rel=1e-5)
    assert gradient[1] == pytest.approx(math.sqrt(gradients) / 8, rel=1e-6) and gradients > 0
    assert all(math.isnan(x) for values in (state, gradient) for i, x in enumerate(values) if i != 1)
    state, _ = norms(squares([model], mixer.config.num_layers, 0, 1.0))
    assert math.isnan(state[1]), "sums begin at 0 again"


def test_values_are_those_of_the_formula():
    spawn(check_values, 1)


@pytest.mark.parametrize(
    "options, args, message",
    [
        (dict(log_norms=True), dict(tensorboard_dir=None), "--lightning-log-norms .* add --tensorboard-dir"),
        (dict(peak_tflops=1.0), dict(log_throughput=False), "is for --log-throughput; add that"),
        (dict(log_norms=True), dict(tensorboard_dir="x", use_megatron_fsdp=True), "does not go with FSDP"),
        (dict(log_norms=True), dict(tensorboard_dir="x", cuda_graph_impl="local"), "does not go with CUDA graphs"),
    ],
)
def test_what_cannot_be_logged_is_refused(options, args, message):
    config = transformer_config()
    config.cuda_graph_impl = args.get("cuda_graph_impl", "none")
    found = flags.messages_of_refusal(config, LightningOptions(**options), "zigzag", Namespace(**args))
    assert any(re.search(message, text) for text in found), found


@pytest.mark.parametrize(
    "options", [dict(log_norms=True), dict(peak_tflops=1.0), dict(checksums=False)], ids=["norms", "peak", "checksums"]
)
def test_what_nothing_writes_is_refused(options):
    with pytest.raises(ValueError, match="=.* is for Megatron's training loop, and none is running; leave it out"):
        prepare(transformer_config(), LightningOptions(**options))


# ---- MFU -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "card, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989), ("NVIDIA H20", 148), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500), ("NVIDIA A10", None), ("NVIDIA GeForce RTX 4090", None), ("", None),
    ],
)  # fmt: skip
def test_peaks_by_name(card, peak):
    assert peak_tflops(card) == peak


def test_mfu_stands_beside_tflops():
    line = " [2026] iteration       20/     100 | throughput per GPU (TFLOP/s/GPU): 494.5 | learning rate: 1 |"
    text, value = mfu.with_mfu(line, 989.0)
    assert text == line.replace("494.5 |", "494.5 | MFU: 50.0% |") and value == 0.5
    assert mfu.with_mfu("lm loss | 3", 989.0) == ("lm loss | 3", None)


def test_mfu_in_the_log(tmp_path):
    short = [*FLAGS, "--exit-interval", "1", "--log-throughput"]
    run = run_pretrain(
        [*short, "--lightning-peak-tflops", "1e-3", "--tensorboard-dir", tmp_path, "--log-timers-to-tensorboard"],
        module="tests.helpers.scalars",
    )
    assert "lightning: MFU is the share of 0.001 TFLOP/s (--lightning-peak-tflops)" in run.log
    ((tflops, share),) = re.findall(r"\(TFLOP/s/GPU\): (\S+) \| MFU: (\S+)% \| learning rate", run.log)
    assert float(share) == pytest.approx(float(tflops) / 1e-3 * 100)
    run = run_pretrain(short)
    assert run.log.count("shows no MFU: only the peaks of GPUs in bf16 and fp16 are known; give --lightning-peak") == 1
    assert "| MFU: " not in run.log


# ---- ranges for profilers --------------------------------------------------------------------------------------------


def check_ranges(rank: int, world: int) -> None:
    group, seen = torch.distributed.group.WORLD, []
    mark_by(lambda name: seen.append(name), lambda name: seen.append("end"))
    q, k, v = (torch.randn(1, 16, 2, 16, requires_grad=True) for _ in range(3))
    log_decay = -torch.ones(2)
    o, _ = lightning_attn(q, k, v, log_decay, group=group)
    o.sum().backward()
    exchange = "lightning_megatron.exchange."
    assert seen == [x for part in ("forward", "backward", "arrived") for x in (exchange + part, "end")], seen
    ranges._marks = None
    plain, _ = lightning_attn(q, k, v, log_decay, group=group)
    assert torch.equal(o, plain) and len(seen) == 6


def test_exchanges_are_ranges():
    spawn(check_ranges, 2)


def check_nvtx(rank: int, world: int) -> None:
    """Under Megatron's own switch, around projections, operator and what is between."""
    seen = []
    torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop = seen.append, lambda: None
    start()
    mixer = build_mixer(Variant())
    x = torch.randn(8, 1, mixer.config.hidden_size)
    mixer(x)
    assert not seen
    megatron_utils.configure_nvtx_profiling(True)
    mixer(x)
    parts = ("qkv", "split_heads", "lightning_attention", "output_norm_gate", "linear_proj")
    assert [name.rpartition(".")[2] for name in seen] == list(parts)


def test_parts_of_a_layer_are_ranges():
    spawn(check_nvtx, 1)
