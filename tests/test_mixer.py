"""LightningAttention on real megatron-core against the fp64 composition of tests/layers.py: every option, every layout.

Each test runs in fresh processes (tests.launch.spawn) and compares output, input gradient and the gradient of every
parameter on every rank.
"""

from __future__ import annotations

import functools

import pytest
import torch

from tests import layers
from tests.launch import spawn
from tests.layers import TOLERANCE, Variant, assert_close, reference

BATCH, LENGTH = 2, 40

VARIANTS = {
    "defaults": Variant(),
    "norm-head-plain": Variant(dict(norm_affine=False, norm_eps=0.1)),
    "norm-group": Variant(dict(norm="group", norm_groups=2)),
    "norm-group-plain": Variant(dict(norm="group", norm_groups=2, norm_affine=False)),
    "norm-all": Variant(dict(norm="all", norm_eps=0.1)),
    "norm-all-plain": Variant(dict(norm="all", norm_affine=False)),
    "norm-none": Variant(dict(norm="none")),
    "gate-linear": Variant(dict(gate="linear")),
    "gate-none": Variant(dict(gate="none")),
    "silu-qkv": Variant(dict(feature_map="silu-qkv")),
    "no-feature-map": Variant(dict(feature_map="none", decay="alibi")),
    "qk-norm": Variant(dict(qk_norm=True, norm_eps=0.1), dict(qk_layernorm=True)),
    "rope": Variant(dict(rope=True)),
    "rope-half": Variant(dict(rope=True), dict(kv_channels=32), rotary_percent=0.5),
    "rope-interleaved": Variant(dict(rope=True), dict(rotary_interleaved=True)),
    "rope-not-here": Variant(dict(rope=False), dict(no_rope_freq=[0, 1, 0, 0])),
    "scale-1": Variant(dict(scale=1.0, decay="none")),
    "grouped-heads": Variant(dict(num_kv_heads=2)),
    "K<V": Variant(dict(key_head_dim=16, value_head_dim=32)),
    "K>V": Variant(dict(key_head_dim=32, value_head_dim=16, num_kv_heads=2)),
    "bias": Variant(config=dict(add_bias_linear=True)),
    "qkv-bias": Variant(dict(gate="none"), dict(add_qkv_bias=True)),
    "minimax": Variant(
        dict(decay="minimax", scale=1.0, feature_map="silu-qkv", norm="all", norm_eps=1e-6), dict(kv_channels=32), layer=1
    ),
    "bailing": Variant(
        dict(decay="bailing", decay_offset=1, feature_map="none", qk_norm=True, rope=True, norm="group", norm_groups=2),
        dict(kv_channels=32), layer=4, rotary_percent=0.5,
    ),
    "paper": Variant(dict(decay="paper", gate="linear", norm_affine=False), layer=3),
    "everything": Variant(
        dict(
            decay="bailing", feature_map="silu-qkv", num_kv_heads=2, value_head_dim=48, scale=0.7, rope=True, qk_norm=True,
            norm="all", norm_eps=0.01, gate="linear",
        ),
        dict(add_bias_linear=True), layer=3, rotary_percent=0.5,
    ),
    "bf16": Variant(dict(num_kv_heads=2, qk_norm=True, norm="all"), dict(params_dtype=torch.bfloat16, bf16=True)),
}  # fmt: skip
LAYOUTS = {"tp1": (1, False), "tp2": (2, False), "tp2-sp": (2, True)}


def check_values(rank: int, world: int, variant: Variant, sp: bool, seed: int) -> float:
    """Every number of one layer on this rank, against the reference of the whole layer."""
    layers.start(tp=world)
    rng = torch.Generator().manual_seed(seed)
    mixer = layers.build_mixer(variant, **layers.layout(world, sp))
    dtype = mixer.config.params_dtype
    whole = layers.draw_parameters(mixer, world, rng)
    layers.set_parameters(mixer, whole, rank, world)
    x, weight = (torch.randn(LENGTH, BATCH, 64, generator=rng).to(dtype) for _ in range(2))

    def judge(p, x):
        output, _ = reference(variant, p, x)
        return output + p["linear_proj.bias"] if "linear_proj.bias" in p else output

    want = layers.with_gradients(judge, whole, x, weight.double())
    want = {name: layers.slice_of(name, y, rank, world) for name, y in want.items()}

    here = functools.partial(layers.tokens_here, rank=rank, world=world) if sp else lambda x: x
    want |= {name: here(want[name]) for name in ("output", "d input")}
    model = layers.trainable(mixer, mixer.config)
    x = here(x).clone().requires_grad_()
    output, bias = model(x, None, rotary_pos_emb=layers.rotary(variant, LENGTH))
    output = output if bias is None else output + bias
    assert output.dtype == dtype
    output.backward(here(weight))
    before = layers.gradients(model)
    got = {"output": output, "d input": x.grad}
    got |= {f"d {name}": g for name, g in layers.reduce_gradients(model).items()}
    tolerance = TOLERANCE[dtype]
    largest = assert_close(got, want, tolerance)

    # Only what saw a part of the sequence may need more than its own backward; twice is as wrong as never.
    complete = {name for name in before if name != "linear_proj.bias" or not sp}
    assert_close({f"d {n}": before[n] for n in complete}, {f"d {n}": want[f"d {n}"] for n in complete}, tolerance)
    return largest


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("tp, sp", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layer_equals_formulas(variant, tp, sp, rng):
    print("largest relative errors of the ranks:", spawn(check_values, tp, variant, sp, rng.initial_seed()))
