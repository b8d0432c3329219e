"""Decay presets against numbers worked out by hand, and against transformers' own MiniMax."""

import pytest
import torch

from lightning_megatron.config import DECAY_PRESETS
from lightning_megatron.decay import log_decay
from tests.tolerances import DECAYS, DECAYS_OF_FP32, LAYERS

# Each row: preset, heads, layer, layers, offset, slopes of the heads. a_h is 2^(-8(h+1)/H).
BY_HAND = [
    # H = 8: a = 1/2, 1/4, ..., 1/256
    ("alibi", 8, 2, 5, 0, [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625]),
    # H = 4: a = 2^-2, 2^-4, 2^-6, 2^-8
    ("alibi", 4, 0, 1, 0, [0.25, 0.0625, 0.015625, 0.00390625]),
    # H = 16: a = 2^-0.5 = 0.70710678, 2^-1, 2^-1.5 = 0.35355339, ...
    ("alibi", 16, 0, 1, 0, [0.70710678, 0.5, 0.35355339, 0.25, 0.17677670, 0.125, 0.08838835, 0.0625,
                            0.04419417, 0.03125, 0.02209709, 0.015625, 0.01104854, 0.0078125, 0.00552427, 0.00390625]),
    ("alibi", 1, 0, 1, 0, [0.00390625]),  # 2^-8
    # H = 12: the 8 slopes of H = 8, then every other one of H = 16: 2^-0.5, 2^-1.5, 2^-2.5, 2^-3.5
    ("alibi", 12, 0, 3, 0, [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.00390625,
                            0.70710678, 0.35355339, 0.17677670, 0.08838835]),
    # H = 6: the 4 slopes of H = 4, then 2^-1 and 2^-3
    ("alibi", 6, 0, 3, 0, [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]),
    # H = 3: 2^-4, 2^-8, then 2^-2
    ("alibi", 3, 0, 3, 0, [0.0625, 0.00390625, 0.25]),
    # tnl, H = 2, L = 4: a = 2^-4, 2^-8 times 1.00001 | 2/3 + 0.00001 = 0.66667667 | 0.00001
    ("tnl", 2, 0, 4, 0, [0.062500625, 0.0039062890625]),
    ("tnl", 2, 1, 4, 0, [0.041667292, 0.0026042057]),
    ("tnl", 2, 3, 4, 0, [6.25e-7, 3.90625e-8]),
    ("tnl", 2, 0, 4, 1, [0.041667292, 0.0026042057]),  # offset 1: what layer 1 has
    ("tnl", 2, 0, 1, 0, [0.062500625, 0.0039062890625]),  # one layer: the first
    ("tnl", 3, 1, 2, 0, [6.25e-7, 3.90625e-8, 2.5e-6]),  # interpolated, last layer
    # minimax, L = 4: 1 - 0 + 0.00001 | 1 - 1/3.00001 + 0.00001 = 0.66667778 | 1 - 3/3.00001 + 0.00001 = 0.0000133333
    ("minimax", 2, 0, 4, 0, [0.062500625, 0.0039062890625]),
    ("minimax", 2, 1, 4, 0, [0.041667361, 0.0026042101]),
    ("minimax", 2, 3, 4, 0, [8.333322e-7, 5.208326e-8]),
    ("minimax", 2, 0, 1, 0, [0.062500625, 0.0039062890625]),
    # minimax, H = 12, never interpolated: 2^(-2/3) = 0.62996052, 2^(-4/3) = 0.39685026, 2^-2, ..., times 1.00001
    ("minimax", 12, 0, 2, 0, [0.62996682, 0.39685423, 0.2500025, 0.15749171, 0.09921356, 0.062500625,
                              0.03937293, 0.02480339, 0.01562516, 0.00984323, 0.00620085, 0.00390629]),
    # bailing, H = 2, L = 4: 1 + 1/3 + 0.00001 = 1.33334333 | 1.00001 | 1 - 2/3 + 0.00001 = 0.33334333
    ("bailing", 2, 0, 4, 0, [0.083333958, 0.0052083724]),
    ("bailing", 2, 1, 4, 0, [0.062500625, 0.0039062890625]),
    ("bailing", 2, 3, 4, 0, [0.020833958, 0.0013021224]),
    ("bailing", 2, 3, 4, 1, [6.25e-7, 3.90625e-8]),  # vLLM's, at its last layer: as tnl
    # paper, H = 4: 0, 2, 4, 6, times 1 - l/L = 1, 3/4, 1/4 with L = 4
    ("paper", 4, 0, 4, 0, [0, 2, 4, 6]),
    ("paper", 4, 1, 4, 0, [0, 1.5, 3, 4.5]),
    ("paper", 4, 3, 4, 0, [0, 0.5, 1, 1.5]),
    ("paper", 4, 3, 4, 1, [0, 0, 0, 0]),
    ("none", 3, 1, 4, 0, [0, 0, 0]),
]  # fmt: skip


@pytest.mark.parametrize("preset, heads, layer, layers, offset, slopes", BY_HAND)
def test_by_hand(preset, heads, layer, layers, offset, slopes):
    got = log_decay(preset, heads, layer, layers, offset=offset)
    assert got.dtype == torch.float32 and got.device.type == "cpu" and got.shape == (heads,)
    assert (-got).tolist() == pytest.approx(slopes, rel=DECAYS, abs=0)


def test_every_preset_is_worked_out():
    assert {row[0] for row in BY_HAND} == set(DECAY_PRESETS)


@pytest.mark.parametrize("preset", DECAY_PRESETS)
@pytest.mark.parametrize("heads, tp", [(12, 1), (12, 2), (12, 3), (12, 12), (64, 8)])
def test_slices_are_the_whole(preset, heads, tp):
    whole = log_decay(preset, heads, 3, 10)
    slices = [log_decay(preset, heads, 3, 10, tp_rank=rank, tp_size=tp) for rank in range(tp)]
    assert all(len(x) == heads // tp for x in slices) and torch.equal(torch.cat(slices), whole)


@pytest.mark.parametrize("preset", DECAY_PRESETS)
def test_decays_never_grow(preset):
    """Of every layer of models of many sizes; and the deeper, the longer the memory."""
    for heads in (1, 5, 8, 40, 64):
        for layers in (1, 2, 80):
            slopes = [-log_decay(preset, heads, layer, layers) for layer in range(layers)]
            assert all(x.isfinite().all() and (x >= 0).all() for x in slopes)
            assert all((deep <= shallow).all() for shallow, deep in zip(slopes[:-1], slopes[1:], strict=True))


@pytest.mark.parametrize(
    "call, words",
    [
        (dict(preset="tln"), ["'tln'", "tnl, minimax, bailing, paper, alibi, none"]),
        (dict(layer=4), ["layer=4", "within 0..num_layers-1"]),
        (dict(layer=-1), ["layer=-1", "within 0..num_layers-1"]),
        (dict(num_heads=0), ["num_heads=0", "positive"]),
        (dict(layer=0, num_layers=0), ["num_layers=0", "positive"]),
        (dict(tp_size=3), ["8 heads", "rank 0 of 3", "tp_size that divides"]),
        (dict(tp_rank=2, tp_size=2), ["rank 2 of 2"]),
        (dict(tp_rank=-1, tp_size=2), ["rank -1 of 2"]),
        (dict(layer=3, offset=1), ["'tnl'", "offset=1", "layer 3 of 4", "smaller offset"]),
        (dict(preset="paper", layer=3, offset=2), ["'paper'", "offset=2", "grow"]),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError) as error:
        log_decay(**dict(preset="tnl", num_heads=8, layer=1, num_layers=4) | call)
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"


# ---- transformers' MiniMax ----


@pytest.fixture
def lightning_layer():
    """A lightning layer of transformers with random weights and blocks of 32 tokens."""
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    from transformers import MiniMaxConfig

    def build(heads: int, layer: int, layers: int) -> torch.nn.Module:
        config = MiniMaxConfig(
            hidden_size=48, num_attention_heads=heads, head_dim=16, num_hidden_layers=layers, block_size=32,
            layer_types=["linear_attention"] * layers, intermediate_size=8, num_local_experts=2, vocab_size=8,
        )  # fmt: skip
        return minimax.MiniMaxLightningAttention(config, layer)

    return build


@pytest.mark.parametrize("heads", [1, 4, 12])
@pytest.mark.parametrize("layers", [1, 2, 9])
def test_transformers_slopes(lightning_layer, heads, layers):
    for layer in sorted({0, 1 % layers, layers // 2, layers - 1}):
        want = lightning_layer(heads, layer, layers).slope_rate.flatten()
        assert (-log_decay("minimax", heads, layer, layers)).tolist() == pytest.approx(
            want.tolist(), rel=DECAYS_OF_FP32, abs=0
        )


@pytest.mark.parametrize("heads, layer", [(4, 0), (12, 5), (3, 8)])
def test_transformers_attention(lightning_layer, rng, heads, layer):
    """The operator between transformers' own projections gives transformers' output, state and gradients."""
    from lightning_megatron.ops import lightning_attn

    module = lightning_layer(heads, layer, 9)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=rng) / weight.shape[-1] ** 0.5)
    x = torch.randn(2, 75, 48, generator=rng).requires_grad_()

    def ours():
        qkv = torch.nn.functional.silu(module.qkv_proj(x)).unflatten(-1, (heads, 3 * 16))
        q, k, v = qkv.split(16, dim=-1)
        o, state = lightning_attn(q, k, v, log_decay("minimax", heads, layer, 9), scale=1, output_final_state=True)
        return module.out_proj(module.output_gate(x).sigmoid() * module.norm(o.flatten(2))), state

    want, want_state = module(x, position_embeddings=None, attention_mask=None)
    got, state = ours()
    gradient = torch.randn(want.shape, generator=rng)
    for a, b in (
        (got, want),
        (state, want_state),
        *zip(*(torch.autograd.grad(y, [x, *module.parameters()], gradient) for y in (got, want)), strict=True),
    ):
        assert (a - b).norm() < LAYERS[torch.float32] * b.norm()
