"""``--sft`` with experts: what pads conversations, and the pack, counts for nothing in their routing.

One process pads the pack alone, context-parallel ranks each conversation, too: losses are the same only if neither
moves biases of experts, and the losses that balance them are of the conversations' tokens.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from torch.distributed.checkpoint import FileSystemReader

from lightning_megatron.patches import mtp_padding
from tests import layers
from tests.helpers.context_parallel import tokens_of
from tests.helpers.conversations import write_conversations
from tests.helpers.training import LAYOUTS, MODELS, RECOMPUTE, gradient_norms, train_conversations
from tests.launch import spawn

# Rates and coefficients are large, so that one token more or less shows in the next loss: without the mask by 4e-3.
BIAS = (
    "--num-experts 16 --moe-router-score-function sigmoid --moe-router-enable-expert-bias "
    "--moe-router-bias-update-rate 0.05"
)
BALANCE = (
    "--moe-router-load-balancing-type aux_loss seq_aux_loss global_aux_loss --moe-aux-loss-coeff 0.1 0.1 0.1 "
    "--moe-z-loss-coeff 0.1"
)
# the loss of each sample, where ranks cut a batch of several: sequence-parallel ranks do it anywhere (docs/parity.md)
BATCH = "--micro-batch-size 5 --global-batch-size 5 --moe-router-load-balancing-type"
ROUTERS = {
    "bias": BIAS,
    "losses": BALANCE,
    "batch-seq": f"{BATCH} seq_aux_loss --moe-aux-loss-coeff 0.1",
    "batch": f"{BATCH} aux_loss --moe-aux-loss-coeff 0.1",
}
STAGES = "--pipeline-model-parallel-size 3 --pipeline-model-parallel-layout Ett|t|tL"  # the third layer has experts
CASES = {
    "longer": (1, "--seq-length 192 --max-position-embeddings 192"),
    "cp2": LAYOUTS["cp2"],
    "tp2-sp": LAYOUTS["tp2-sp"],
    "tp2-cp2-sp": LAYOUTS["tp2-cp2-sp"],
    "pp3": (3, STAGES),
    "pp2-cp2": (4, "--pipeline-model-parallel-size 2 --context-parallel-size 2"),
    "tp2-sp-pp2": LAYOUTS["tp2-pp2"],
    "cp2-recompute": (2, f"--context-parallel-size 2 {RECOMPUTE}"),
}
LAYERS = (
    "--num-layers 8 --hybrid-layer-pattern LELE*ELE --num-experts 4 --disable-bias-linear --moe-ffn-hidden-size 64 "
    "--lightning-norm all --lightning-qk-norm --lightning-rope --lightning-num-kv-heads 2"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_conversations(tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """alone(model, flags): flags that load the same initial values into every layout, and the run of one process."""

    @functools.cache
    def run(model: str, flags: str):
        folder = tmp_path_factory.mktemp("initial")
        train_conversations(
            model, "one", data, f"{flags} --lr 0 --train-iters 1 --save {folder} --save-interval 1 --no-save-optim"
        )
        flags += f" --load {folder} --finetune --no-load-optim --no-load-rng"
        return flags, train_conversations(model, "one", data, flags)

    return run


def assert_same(run, one) -> None:
    print("losses", run.losses, "alone", one.losses, "norms", gradient_norms(run), "alone", gradient_norms(one))
    assert len(one.losses) == len(run.losses) == 5
    assert run.losses == pytest.approx(one.losses, abs=5e-6)
    assert gradient_norms(run) == pytest.approx(gradient_norms(one), abs=1e-3)


@pytest.mark.parametrize("router", ["bias", "losses"])
@pytest.mark.parametrize("layout", CASES.values(), ids=CASES)
def test_ranks_train_as_one(layout, router, data, alone):
    flags, one = alone("moe", ROUTERS[router])
    assert one.losses[-1] < one.losses[0] - 0.05
    assert_same(train_conversations("moe", layout, data, flags), one)


@pytest.mark.parametrize("router, layout", [("batch-seq", "cp2"), ("batch", "cp2"), ("batch", "tp2-sp")])
def test_batches_of_several_samples(router, layout, data, alone):
    """Megatron took 2.5 samples of a rank for two."""
    flags, one = alone("moe", ROUTERS[router])
    assert_same(train_conversations("moe", layout, data, flags), one)


@pytest.mark.parametrize("layout", ["cp2", "tp2-sp", "tp2-sp-pp2"])
def test_hybrid_model(layout, data, alone, monkeypatch):
    """It leaves the mask to its caller, on the first stage, too."""
    monkeypatch.setitem(MODELS, "pattern", LAYERS)
    flags, one = alone("pattern", BIAS)
    assert_same(train_conversations("pattern", CASES[layout], data, flags), one)


# ---- multi-token prediction --------------------------------------------------------------------------------------

EVERYWHERE = "--moe-layer-freq 1"  # experts in these layers, too


@pytest.mark.parametrize("layout", ["tp2-sp", "tp2-sp-pp2"])
@pytest.mark.parametrize("router", ["bias", "losses"])
def test_multi_token_prediction(router, layout, data, alone):
    flags, one = alone("mtp", f"{ROUTERS[router]} {EVERYWHERE}")
    assert_same(train_conversations("mtp", CASES[layout], data, flags), one)


@pytest.mark.parametrize("layout", ["cp2", "tp2-cp2-sp"])
def test_multi_token_prediction_over_context_parallel_ranks(layout, data, alone, tmp_path):
    """Its loss is not that of one process there, but biases of experts are, which move without learning, too."""
    flags, _ = alone("mtp", f"{BIAS} {EVERYWHERE} --lr 0 --moe-router-bias-update-rate 0.002")
    found = []
    for name in ("one", layout):
        saving = f"--save {tmp_path / name} --save-interval 5 --no-save-optim"
        train_conversations("mtp", LAYOUTS[name], data, f"{flags} {saving}")
        found.append(biases(tmp_path / name / "iter_0000005"))
    one, ranks = found
    assert one.keys() == ranks.keys() and any("mtp" in name for name in one)
    for name, values in one.items():
        assert values.abs().max() > 0.001 and torch.equal(values, ranks[name]), name


def biases(folder: Path) -> dict[str, torch.Tensor]:
    """Of all layers in a checkpoint."""
    metadata = FileSystemReader(folder).read_metadata().state_dict_metadata
    found = {name: torch.empty(entry.size) for name, entry in metadata.items() if name.endswith("expert_bias")}
    dcp.load(found, storage_reader=FileSystemReader(folder), no_dist=True)
    return found


def ahead(rank: int, world: int, cp: int, bounds: list[int], mask: list[bool], wanted: list[bool]) -> None:
    layers.start(tp=world // cp, cp=cp)
    cp_group, tp_group = parallel_state.get_context_parallel_group(), parallel_state.get_tensor_model_parallel_group()
    sp = tp_group.size()
    mine = tokens_of(dist.get_rank(cp_group), cp, "zigzag-documents", [len(mask) // cp] * cp, torch.tensor(bounds))
    mine = mine.chunk(sp)[dist.get_rank(tp_group)]
    packed = PackedSeqParams("thd", torch.tensor(bounds), torch.tensor(bounds))
    found = mtp_padding.ahead(torch.tensor(mask)[None, mine], packed, cp_group, tp_group if sp > 1 else None)
    assert found.dtype == torch.bool and found.tolist() == [torch.tensor(wanted)[mine].tolist()]
    # twice, as for the second layer
    twice = mtp_padding.ahead(found, packed, cp_group, tp_group if sp > 1 else None)
    second = [x or y for x, y in zip(wanted, [*wanted[1:], True], strict=True)]
    for end in bounds[1:]:
        second[end - 1] = True
    assert twice.tolist() == [torch.tensor(second)[mine].tolist()]


@pytest.mark.parametrize("world, cp", [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_mask_one_token_ahead(world, cp):
    """Documents of 5 and 8 tokens, of which the first is padded to 8."""
    mask = [*[False] * 5, *[True] * 3, *[False] * 8]
    wanted = [*[False] * 4, *[True] * 4, *[False] * 7, True]
    spawn(ahead, world, cp, [0, 8, 16], mask, wanted)
