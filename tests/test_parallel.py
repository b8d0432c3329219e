"""Real training runs: every parallel layout gives the losses of one process, and checkpoints move between layouts.

All runs start from one checkpoint that one process wrote, since layouts draw other initial values. Compared are losses
as printed (6 decimals) and gradient norms (3 decimals), which no error in a gradient leaves alone.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from lightning_megatron.spec import make_spec
from tests import layers
from tests.helpers.documents import DOCUMENT, write_equal_documents
from tests.helpers.models import gpt
from tests.helpers.training import LAYOUTS, assert_same_training, gradient_norms, train
from tests.launch import ROOT, Run, spawn
from tests.layers import assert_close
from tests.tolerances import LAYERS as TOLERANCE
from tests.tolerances import TRAINED_LOSSES, TRAINED_LOSSES_BF16, TRAINED_NORMS_BF16

EXPERTS = {  # over two ranks; flags beside the layout's
    "dp2": "",
    "tp2-dp2": "--expert-tensor-parallel-size 2",
    "tp2-cp2-sp": "--expert-tensor-parallel-size 1",
    "pp2-dp2": "",
    "pp2-cp2": "",
}
CASES = [("freq4", layout) for layout in LAYOUTS if layout != "one"] + [
    *(("freq2", layout) for layout in ("tp2", "tp2-sp", "pp2-vp2")),
    *(("all", layout) for layout in ("tp2-sp", "pp2-vp2", "cp2")),
    *(("moe", layout) for layout in ("tp2-sp", "pp2", "cp2")),
    *(("mtp", layout) for layout in ("tp2-sp", "pp2", "recompute-full")),
    *(("latent", layout) for layout in ("tp2-sp", "pp2", "tp2-cp2-sp", "cp2-recompute")),
]


@pytest.fixture(scope="module")
def alone(initial):
    """alone(model): the run of one process."""

    @functools.cache
    def run(model: str) -> Run:
        result = train(model, "one", load=initial(model))
        assert result.losses[-1] < result.losses[0] - 0.3
        return result

    return run


@pytest.mark.parametrize("model, layout", CASES, ids=map("-".join, CASES))
def test_layout_gives_the_same_losses(model, layout, initial, alone):
    assert_same_training(train(model, layout, load=initial(model)), alone(model))


@pytest.mark.parametrize("layout", EXPERTS)
def test_experts_over_ranks(layout, initial, alone):
    """Tensor-parallel ranks have a part of each, and gather different numbers of tokens, or experts of their own."""
    experts = f"--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall {EXPERTS[layout]}"
    assert_same_training(train("moe", layout, experts, load=initial("moe")), alone("moe"))


def test_states_are_exchanged_once_for_recomputed_layers(initial):
    """Losses and gradients of a second exchange, bit by bit."""
    patched = "patched megatron.core.tensor_parallel.checkpoint"
    once, twice = (
        train("freq4", "cp2-recompute", flags, load=initial("freq4")) for flags in ("", "--no-lightning-cp-keep-states")
    )
    assert patched in once.log and patched not in twice.log
    assert_same_training(once, twice, losses=0, norms=0)


@pytest.mark.parametrize("layout", ["one", "tp2-sp", "pp2-vp2", "dp2", "recompute-full"])
def test_bf16(layout, initial, alone):
    """bf16 keeps 8 bits: it follows fp32 to three digits, and is no copy of it."""
    run = train("freq4", layout, "--bf16", load=initial("freq4"))
    assert_same_training(run, alone("freq4"), losses=TRAINED_LOSSES_BF16, norms=TRAINED_NORMS_BF16)
    assert run.losses != alone("freq4").losses


# Options that change no loss: model, layout, flags.
FREE = {
    "gradients": (
        "freq4", "dp2",
        "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 5000 "
        "--ddp-pad-buckets-for-high-nccl-busbw --no-align-grad-reduce --no-align-param-gather "
        "--ddp-average-in-collective --check-weight-hash-across-dp-replicas-interval 2",
    ),
    "stages": (
        "freq4", "pp2",
        "--num-virtual-stages-per-pipeline-rank 2 --overlap-p2p-communication-warmup-flush "
        "--microbatch-group-size-per-virtual-pipeline-stage 2",
    ),
    "uneven-stages": ("freq4", "pp2", "--decoder-first-pipeline-num-layers 1 --decoder-last-pipeline-num-layers 3"),
    "order-of-ranks": ("all", "pp2-dp2", "--use-tp-pp-dp-mapping"),
    "recompute": ("freq4", "one", "--recompute-activations"),
    "recompute-experts": ("moe", "one", "--moe-layer-recompute"),
    "kernels": (
        "freq4", "one",
        "--no-bias-swiglu-fusion --no-bias-dropout-fusion --disable-jit-fuser --no-masked-softmax-fusion "
        "--attention-softmax-in-fp32 --no-clone-scatter-output-in-embedding --mlp-chunks-for-training 2 "
        "--deterministic-mode",
    ),
    "kernels-of-biases": ("freq2", "one", "--no-bias-gelu-fusion --no-bias-dropout-fusion"),
}  # fmt: skip


@pytest.mark.parametrize("name", FREE)
def test_free_options_change_no_loss(name, initial, alone):
    model, layout, flags = FREE[name]
    assert_same_training(train(model, layout, flags, load=initial(model)), alone(model))


# ---- checkpoints -----------------------------------------------------------------------------------------------------

MOVES = [
    ("freq4", "tp2-sp", "one"),
    ("freq4", "one", "tp2-sp"),
    ("freq4", "pp2", "one"),
    ("freq4", "pp2-vp2", "tp2"),
    ("freq2", "tp2-sp", "pp2-layout"),
    ("all", "tp2-sp", "one"),
    ("all", "one", "tp2-sp"),
    ("all", "pp2", "one"),
    ("moe", "tp2-sp", "one"),
    ("latent", "tp2-cp2-sp", "one"),
    ("mtp", "tp2-sp", "pp2"),
    ("freq4", "cp2", "tp2-sp"),
    ("all", "one", "cp2"),
]
MOVES_OF_SHARDED_OPTIMIZER = [("dp2", "one"), ("dp2", "tp2-sp"), ("tp2-sp", "dp2"), ("pp2", "dp2")]


def check_move(model: str, before: str, after: str, flags: str, initial, alone, folder: Path) -> None:
    """Two iterations, then three with the optimizer's state in another layout: as five in one process."""
    first = train(model, before, f"{flags} --save {folder} --save-interval 2 --exit-interval 2", load=initial(model))
    assert first.losses == pytest.approx(alone(model).losses[:2], abs=TRAINED_LOSSES)
    assert_same_training(train(model, after, flags, load=folder, fresh=False), alone(model), skip=2)


@pytest.mark.parametrize("model, before, after", MOVES, ids=map("-".join, MOVES))
def test_training_goes_on_in_another_layout(model, before, after, initial, alone, tmp_path):
    check_move(model, before, after, "", initial, alone, tmp_path)


@pytest.mark.parametrize("before, after", MOVES_OF_SHARDED_OPTIMIZER, ids=map("-".join, MOVES_OF_SHARDED_OPTIMIZER))
def test_training_goes_on_with_sharded_optimizer(before, after, initial, alone, tmp_path):
    check_move("freq4", before, after, "--use-distributed-optimizer", initial, alone, tmp_path)


@pytest.mark.parametrize(
    "flags",
    [
        "--ckpt-fully-parallel-load --ckpt-assume-constant-structure --dist-ckpt-workers 2",
        "--no-ckpt-fully-parallel-save --no-ckpt-load-validate-sharding-integrity --auto-detect-ckpt-format",
    ],
    ids=["parallel", "plain"],
)
def test_training_goes_on_however_it_is_written(flags, initial, alone, tmp_path):
    check_move("freq4", "dp2", "dp2", flags, initial, alone, tmp_path)


# ---- packed documents ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_documents(tmp_path_factory, initial):
    """Train on equal documents, from the initial checkpoint."""
    data = write_equal_documents(tmp_path_factory.mktemp("data"))
    return functools.cache(lambda model, layout, flags: train(model, layout, f"{data} {flags}", load=initial(model)))


@pytest.mark.parametrize(
    "model, layout",
    [*(("freq4", layout) for layout in ("one", "tp2-sp", "pp2", "cp4-ring", "tp2-cp2-sp")), ("latent", "tp2-cp2-sp")],
)
def test_packed_documents_are_as_good_as_alone(model, layout, on_documents):
    """Four documents packed into a sequence train as four sequences of one document do, and not as one text."""
    alone = on_documents(model, "one", f"--seq-length {DOCUMENT} --global-batch-size 8")
    # sequences that are packed once more, into one; with 4 context-parallel ranks documents of one cross its 8 chunks
    micro = 1 if layout in ("pp2", "cp4-ring") else 2
    assert_same_training(
        on_documents(model, layout, f"--dataloader-inter-document-masking --micro-batch-size {micro}"), alone
    )
    as_one_text = on_documents(model, "one", "").losses
    assert max(abs(x - y) for x, y in zip(as_one_text, alone.losses, strict=True)) > 0.01


LENGTHS = (33, 1, 0, 50, 2, 42)


def losses_and_gradients(rank: int, world: int, options: dict, config: dict, packed: bool) -> dict:
    """Of a whole model: the loss of every token of the documents, packed or one by one, and gradients of their sum."""
    layers.start()
    config = layers.transformer_config(linear_attention_freq=2, **config)
    model = gpt(config, make_spec(**options))
    trained = layers.trainable(model, config)
    tokens, labels = torch.randint(64, (2, 1, sum(LENGTHS)), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    if packed:
        bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
        parameters = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=max(LENGTHS), max_seqlen_kv=max(LENGTHS))
        losses = trained(tokens, positions, None, labels=labels, packed_seq_params=parameters)
    else:
        documents = zip(*(x.split(LENGTHS, 1) for x in (tokens, positions, labels)), strict=True)
        losses = torch.cat([trained(t, p, None, labels=y) for t, p, y in documents if t.numel()], 1)
    losses.sum().backward()
    return {"losses": losses.detach().T} | layers.reduce_gradients(trained)


@pytest.mark.parametrize(
    "options, config",
    [
        (dict(norm="all", qk_norm=True, rope=True, num_kv_heads=2), dict()),
        (dict(decay="none"), dict(normalization="LayerNorm", add_bias_linear=True, num_query_groups=2)),
    ],
    ids=["everything", "bias"],
)
def test_model_treats_packed_documents_as_alone(options, config):
    """Documents of all lengths, also none and one token, in a hybrid."""
    (alone,) = spawn(losses_and_gradients, 1, options, config, False)
    (packed,) = spawn(losses_and_gradients, 1, options, config, True)
    assert_close(packed, alone, TOLERANCE[torch.float32])


# ---- pretrain_gpt.py --spec ------------------------------------------------------------------------------------------

BY_HAND = (  # what the own entry point chooses by itself; the last because Megatron divides by it
    "--transformer-impl local --no-gradient-accumulation-fusion --no-persist-layer-norm --no-rope-fusion "
    "--eval-interval 100"
)


@pytest.mark.parametrize(
    "layout, name",
    [
        ("one", "lightning_spec"),
        ("tp2", "lightning_layer_spec"),
        ("tp2-sp", "lightning_spec"),
        ("pp2", "lightning_layer_spec"),
        ("pp2-vp2", "lightning_spec"),
        ("cp2", "lightning_spec"),
    ],
)
def test_spec_gives_what_the_own_entry_point_gives(layout, name):
    """From equal random initial values, by Megatron's own construction of the model."""
    flags = "--linear-attention-freq 4" + " --mtp-num-layers 1" * (layout == "cp2")
    no_mask = "--no-create-attention-mask-in-dataloader"
    upstream = f"{flags} {BY_HAND} {'' if layout == 'one' else no_mask} --spec lightning_megatron.spec {name}"
    own, run = train("all", layout, flags), train("all", layout, upstream, script=ROOT / "tests" / "pretrain_gpt.py")
    assert len(own.losses) == 5 and run.losses == own.losses
    assert gradient_norms(run) == gradient_norms(own)
    mtp = [re.findall(r"mtp_1 loss: (\S+)", x.log) for x in (run, own)]
    assert mtp[0] == mtp[1] and len(mtp[0]) == (5 if layout == "cp2" else 0)
    for line in (
        "3 lightning layers (L), 1 softmax layers (s)",
        "patched megatron.training.training.num_floating_point",
    ):
        assert run.log.count(line) == 1, line
    assert run.log.count("attention mask that no layer here reads") == (layout == "one")
