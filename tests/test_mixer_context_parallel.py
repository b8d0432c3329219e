"""The lightning layer on context-parallel ranks against the same layer on one rank with all tokens: outputs and
gradients.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType

from lightning_megatron.packed import sharing_group
from lightning_megatron.softmax import SDPACoreAttention
from tests import layers
from tests.helpers.context_parallel import tokens_of
from tests.launch import spawn
from tests.layers import Variant, assert_close
from tests.tolerances import LAYERS as TOLERANCE

EVERYTHING = dict(rope=True, qk_norm=True, num_kv_heads=2, norm="all", decay="alibi")
DOCUMENTS = {
    "plain": (None, "zigzag"),
    "one batch of two": (None, "zigzag"),
    "packed": ([0, 5, 5, 6, 31, 48], "zigzag"),  # documents cross chunks, one is empty, one has one token
    "documents cut": ([0, 12, 24, 24, 48], "zigzag-documents"),
    "dynamic group": ([0, 11, 48], "zigzag"),
}


def with_group(mixer, cp) -> None:
    groups = mixer.pg_collection
    mixer.pg_collection = ProcessGroupCollection(tp=groups.tp, cp=cp)


def run(mixer, x, weight, freqs, packed) -> dict[str, torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    mixer.zero_grad()
    output, _ = mixer(x, rotary_pos_emb=freqs, packed_seq_params=packed)
    output.backward(weight)
    return {"output": output, "d input": x.grad} | {f"d {n}": p.grad.clone() for n, p in mixer.named_parameters()}


def check(rank: int, world: int, kind: str, exchange: str, seed: int) -> float:
    rng = torch.Generator().manual_seed(seed)
    documents, layout = DOCUMENTS[kind]
    dynamic = kind == "dynamic group"
    layers.start(cp=1 if dynamic else world)
    alone = [dist.new_group([r]) for r in range(world)][rank]
    mixer = layers.build_mixer(Variant(EVERYTHING | dict(cp_exchange=exchange)), layout=layout)
    whole_weights = layers.draw_parameters(mixer, 1, rng)
    layers.set_parameters(mixer, whole_weights, 0, 1)
    T, batch = 48, 1 if kind != "one batch of two" else 2
    x, weight = (torch.randn(T, batch, 64, generator=rng) for _ in range(2))
    freqs = layers.rotary(Variant(EVERYTHING), T if documents is None else 40, cp_group=alone)
    bounds = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    packed = None if bounds is None else PackedSeqParams("thd", bounds, bounds)
    group = dist.group.WORLD if dynamic else mixer.pg_collection.cp
    with_group(mixer, alone)
    want = run(mixer, x, weight, freqs, packed)

    mine = tokens_of(
        rank, world, "zigzag-documents" if kind == "documents cut" else "zigzag", [T // world] * world, bounds
    )
    if dynamic:
        packed = PackedSeqParams("thd", bounds, bounds, local_cp_size=world, cp_group=group)
    else:
        with_group(mixer, group)
    got = run(mixer, x[mine], weight[mine], freqs if documents else freqs[mine], packed)
    for name in got:
        if name in ("output", "d input"):
            want[name] = want[name][mine]
        else:  # Megatron sums them over the context-parallel ranks
            dist.all_reduce(got[name])
    return assert_close(got, want, TOLERANCE[torch.float32])


@pytest.mark.parametrize("kind", DOCUMENTS)
@pytest.mark.parametrize("world, exchange", [(2, "all-gather"), (2, "ring"), (3, "pipelined"), (3, "scan")])
def test_equals_one_rank(kind, world, exchange, rng):
    if kind == "documents cut" and world == 3:
        world = 2  # whose lengths 2 * 3 does not divide
    print("largest relative errors of the ranks:", spawn(check, world, kind, exchange, rng.initial_seed()))


def check_refusals(rank: int, world: int) -> None:
    layers.start(cp=world)
    mixer = layers.build_mixer(Variant({}))
    x = torch.zeros(16, 1, 64)
    with pytest.raises(
        ValueError, match="do not generate with context-parallel size 2; load .* --context-parallel-size 1"
    ):
        mixer(x, None, inference_context=StaticInferenceContext(1, 32))
    bounds = torch.tensor([0, 32], dtype=torch.int32)
    for group, size in ((None, "None"), (dist.group.WORLD, "of size 2")):
        packed = PackedSeqParams("thd", bounds, bounds, local_cp_size=4, cp_group=group)
        with pytest.raises(ValueError, match=f"local_cp_size is 4, but cp_group there is {size}"):
            mixer(x, None, packed_seq_params=packed)
    with pytest.raises(ValueError, match="end at T = 32, but goes from 0 to 16"):
        mixer(x, None, packed_seq_params=PackedSeqParams("thd", bounds // 2, bounds // 2))
    packed = PackedSeqParams("thd", bounds, bounds)
    packed.cp_partition_mode = "contiguous"  # a field in Megatron's branch dev
    core = SDPACoreAttention(mixer.config, 1, AttnMaskType.causal, "self", pg_collection=mixer.pg_collection)
    q = torch.zeros(16, 4, 16)
    for call in (
        lambda: mixer(x, None, packed_seq_params=packed),
        lambda: core(q, q, q, None, packed_seq_params=packed),
    ):
        with pytest.raises(ValueError, match="cp_partition_mode is 'contiguous', and this layer .* to zigzag"):
            call()
    assert sharing_group(packed, mixer.pg_collection.cp, contiguous=True) is mixer.pg_collection.cp
    rope = Variant(dict(rope=True))
    with pytest.raises(ValueError, match="the angles of layout='zigzag'; use that layout, or rope=False"):
        layers.build_mixer(rope, layout="contiguous")(x, None, rotary_pos_emb=layers.rotary(rope, 16))


def test_refusals():
    spawn(check_refusals, 2)


def check_group_of_one(rank: int, world: int) -> None:
    """Of a dynamic batch that one rank has alone."""
    layers.start(cp=world)
    mixer = layers.build_mixer(Variant({}))
    bounds = torch.tensor([0, 7, 16], dtype=torch.int32)
    x = torch.randn(16, 1, 64)
    got, _ = mixer(x, None, packed_seq_params=PackedSeqParams("thd", bounds, bounds, local_cp_size=1))
    with_group(mixer, [dist.new_group([r]) for r in range(world)][rank])
    want, _ = mixer(x, None, packed_seq_params=PackedSeqParams("thd", bounds, bounds))
    assert torch.equal(got, want)


def test_a_dynamic_group_of_one_rank():
    spawn(check_group_of_one, 2)
