"""Rotary positions of layers in one launch: as Megatron's operations turn in fp64, one document at a time."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import attention

from lightning_megatron.config import LightningOptions, mark_prepared
from lightning_megatron.ops.triton import rotary as rotary_kernels
from lightning_megatron.packed import DynamicBatch, dynamic_batch
from lightning_megatron.patches import packed_rope
from lightning_megatron.rope import LRPE, turn
from lightning_megatron.runtime import prepare
from tests import layers
from tests.helpers.context_parallel import tokens_of
from tests.launch import spawn
from tests.layers import Variant
from tests.ops.cases import randn

BOUNDS = [0, 8, 24, 32]
HOW = {  # changes of the config, channels, and how Megatron is told
    "halves": ({}, 16, {}),
    "pairs": (dict(rotary_interleaved=True), 16, {}),
    "part": ({}, 6, {}),
    "yarn": ({}, 16, dict(mscale=1.3)),
    "latent": ({}, 16, dict(mla_rotary_interleaved=True)),
}


def table(config, positions: int, channels: int) -> torch.Tensor:
    """Angles as Megatron's RotaryEmbedding has them: of each pair twice, [positions, 1, 1, channels]."""
    angles = torch.arange(float(positions))[:, None] * torch.logspace(0, -2, channels // 2)
    doubled = angles.repeat_interleave(2, 1) if config.rotary_interleaved else torch.cat((angles, angles), 1)
    return doubled[:, None, None]


def with_gradient(function, x, dy) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def expected(x, dy, angles, starts, config, how) -> tuple[torch.Tensor, torch.Tensor]:
    """Megatron's operations in fp64 on whole tokens [t, b, heads, d] of documents that begin at ``starts``."""
    positions = torch.arange(len(x)) - starts
    f = angles.double()[positions]
    megatron = lambda x: rope_utils._apply_rotary_pos_emb_bshd(x, f, config.rotary_interleaved, **how)
    return with_gradient(megatron, x.double(), dy.double())


def turn_by(rank: int, world: int, seed: int, kind: str, layout: str, packed: bool, longer: bool) -> tuple[int, float]:
    """Launches, and the largest error of both ways to them: Megatron's function for softmax layers, and ``turn``."""
    layers.start(cp=world)
    changes, channels, how = HOW[kind]
    config = layers.transformer_config(context_parallel_size=world, linear_attention_freq=2, **changes)
    prepare(config, LightningOptions(backend="triton"), layout=layout)
    rng = torch.Generator().manual_seed(seed)
    tokens, batch = BOUNDS[-1], 1 if packed else 2
    x, dy = (randn(rng, tokens, batch, 3, 16).float() for _ in range(2))
    bounds = torch.tensor(BOUNDS, dtype=torch.int32) if packed else None
    starts = torch.zeros(tokens, dtype=torch.long)
    if packed and longer:  # else the angles of the whole sequence are used, as Megatron does where it gets as many
        starts = torch.tensor(BOUNDS)[torch.searchsorted(torch.tensor(BOUNDS), torch.arange(tokens), right=True) - 1]
    angles = table(config, 64 if packed and longer else tokens, channels)
    want = expected(x, dy, angles, starts, config, how)
    mine = tokens_of(rank, world, layout, [tokens // world] * world, torch.tensor(BOUNDS) if packed else None)
    here = angles if packed else angles[mine]  # of plain sequences GPTModel cuts the angles
    group, launched = dist.group.WORLD, []
    kernel = rotary_kernels.launch

    def counted(*args, **kwargs):
        launched.append(args[0])
        return kernel(*args, **kwargs)

    rotary_kernels.launch = counted
    rows = (lambda t: t[:, 0]) if packed else (lambda t: t)

    def softmax(t):
        return attention.apply_rotary_pos_emb(rows(t), here, config=config, cu_seqlens=bounds, cp_group=group, **how)

    def lightning(t):
        common = dict(config=config, mscale=1.0, cu_seqlens=bounds, inference_context=None, cp_group=group) | how
        q, k = turn(t, t[:, :, :1], (here, here), **common, group=group, layout=layout, backend="triton")
        assert torch.equal(k, q[:, :, :1])
        return rows(q)

    error = 0.0
    for function in (softmax, lightning):
        for got, wanted in zip(with_gradient(function, x[mine], rows(dy[mine])), want, strict=True):
            got = got.unsqueeze(1) if got.dim() == 3 else got
            error = max(error, float((got - wanted[mine]).norm() / wanted[mine].norm()))
    rotary_kernels.launch = kernel
    return len(launched), error


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter needs a machine without CUDA")
@pytest.mark.parametrize("kind", HOW)
@pytest.mark.parametrize(
    "world, layout, packed, longer",
    [
        (1, "zigzag", False, False), (1, "zigzag", True, False), (1, "zigzag", True, True), (2, "zigzag", False, False),
        (2, "zigzag", True, False), (2, "zigzag", True, True), (2, "zigzag-documents", True, True),
    ],
)  # fmt: skip
def test_one_launch_turns_as_megatron_does(rng, kind, world, layout, packed, longer):
    for launched, error in spawn(turn_by, world, rng.initial_seed(), kind, layout, packed, longer):
        print(error)
        assert launched == 2 + 3  # both ways of softmax layers; of q, and k, whose gradient nobody asks for
        assert error < 1e-6


def test_fused_and_unknown_angles_are_left_to_megatron(rng):
    """TransformerEngine's kernel where it is on; and angles that differ along the batch."""
    config = layers.transformer_config(linear_attention_freq=2)
    mark_prepared(config, (LightningOptions(backend="triton"), "zigzag", {}))
    calls = []
    turned = packed_rope._wrap(lambda t, freqs, **how: calls.append(how) or t)
    x, angles = randn(rng, 8, 2, 1, 16).float(), table(config, 8, 16)
    assert turned(x, angles.expand(-1, 2, -1, -1), config) is x
    config.apply_rope_fusion = True
    assert turned(x, angles, config) is x and len(calls) == 2


def one_rank_of_its_own(rank: int, world: int) -> dict[str, float]:
    """Errors where packed_seq_params.local_cp_size is 1 and brings no group (``packed.sharing_group``)."""
    layers.start(cp=world)
    rng, found = torch.Generator().manual_seed(5), {}
    x, dy = (randn(rng, 32, 1, 3, 16).float() for _ in range(2))
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    starts = torch.tensor(BOUNDS)[torch.searchsorted(torch.tensor(BOUNDS), torch.arange(32), right=True) - 1]
    for backend in ("torch", "triton"):
        config = layers.transformer_config(context_parallel_size=world, linear_attention_freq=2)
        prepare(config, LightningOptions(backend=backend))
        packed_rope.apply()
        angles, common = table(config, 64, 16), dict(config=config, cu_seqlens=bounds, cp_group=dist.group.WORLD)
        want = expected(x, dy, angles, starts, config, {})

        def softmax(t, angles=angles, common=common):
            token = dynamic_batch.set(DynamicBatch(None))
            try:
                return attention.apply_rotary_pos_emb(t[:, 0], angles, **common).unsqueeze(1)
            finally:
                dynamic_batch.reset(token)

        def lightning(t, angles=angles, common=common, backend=backend):
            how = dict(mscale=1.0, inference_context=None, group=None, layout="zigzag", backend=backend)
            return turn(t, t, (angles, angles), **common, **how)[0]

        for name, function in (("softmax", softmax), ("lightning", lightning)):
            got = with_gradient(function, x, dy)
            found[f"{name} {backend}"] = max(float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True))
    learnt = LRPE(3, 16, tp_group=dist.new_group([rank], use_local_synchronization=True), dtype=torch.float32)
    (y,) = learnt(x, cu_seqlens=bounds, inference_context=None, group=None, layout="zigzag")
    turned = (torch.arange(32) - starts)[:, None, None, None] * learnt.theta.double()
    want = torch.cat([x.double() * f(turned) for f in (torch.cos, torch.sin)], -1)
    return found | {"learnt": float((y - want).norm() / want.norm())}


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter needs a machine without CUDA")
@pytest.mark.parametrize("world", [1, 2])
def test_a_batch_for_one_rank_without_a_group(world):
    for errors in spawn(one_rank_of_its_own, world):
        assert len(errors) == 5 and all(error < 1e-6 for error in errors.values()), errors


def beside_another_model(rank: int, world: int, layout: str, dynamic: bool, left_out: bool) -> float:
    """The largest difference that a prepared model makes to Megatron's angles of one that nobody prepared, or to those
    of its own where cp_group is left out, which then is that of the usual ranks.
    """
    layers.start(cp=world)
    fields = dict(context_parallel_size=world)
    config = layers.transformer_config(**fields, linear_attention_freq=2)
    prepare(config, LightningOptions(backend="triton"), layout=layout)
    if dynamic:
        packed_rope.apply()
    if not left_out:
        config = layers.transformer_config(**fields)
    x = randn(torch.Generator().manual_seed(5), 16, 3, 16).float()
    angles, bounds = table(config, 64, 16), torch.tensor(BOUNDS, dtype=torch.int32)
    group = {} if left_out else dict(cp_group=dist.group.WORLD)
    got, want = (
        f(x, angles, config=config, cu_seqlens=bounds, **group)
        for f in (attention.apply_rotary_pos_emb, rope_utils.apply_rotary_pos_emb)
    )
    return float((got - want).abs().max())


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter needs a machine without CUDA")
@pytest.mark.parametrize("dynamic, left_out", [(False, False), (True, False), (False, True)])
def test_documents_of_other_models_are_cut_as_megatron_does(dynamic, left_out):
    for difference in spawn(beside_another_model, 2, "zigzag-documents", dynamic, left_out):
        assert difference < 1e-6


def learnt_angles_alone(rank: int, world: int) -> torch.Tensor:
    """A layer's output where each of the context-parallel ranks has a batch of its own, and the batch no group."""
    layers.start(cp=world)
    mixer = layers.build_mixer(Variant(dict(lrpe_layers=1), layer=1), context_parallel_size=world)
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    packed = PackedSeqParams("thd", bounds, bounds, local_cp_size=1)
    x = randn(torch.Generator().manual_seed(6), 32, 1, mixer.config.hidden_size).float()
    with torch.no_grad():
        assert mixer.lrpe is not None
        return mixer(x, None, packed_seq_params=packed)[0]


def test_learnt_angles_of_a_batch_for_one_rank():
    (want,) = spawn(learnt_angles_alone, 1)
    for got in spawn(learnt_angles_alone, 2):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
