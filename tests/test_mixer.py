"""LightningAttention on real megatron-core against the fp64 composition of tests/layers.py: every option, every layout.

Each test runs in fresh processes (tests.launch.spawn) and compares output, input gradient and the gradient of every
parameter on every rank.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from lightning_megatron.rope import rotate
from lightning_megatron.spec import get_lightning_layer_spec
from tests import layers
from tests.helpers.variants import VARIANTS
from tests.launch import spawn
from tests.layers import Variant, assert_close, reference, rms
from tests.tolerances import LAYERS as TOLERANCE

BATCH, LENGTH = 2, 40

LAYOUTS = {"tp1": (1, False), "tp2": (2, False), "tp2-sp": (2, True)}


def check_values(rank: int, world: int, variant: Variant, sp: bool, seed: int) -> float:
    """Every number of one layer on this rank, against the reference of the whole layer."""
    layers.start(tp=world)
    rng = torch.Generator().manual_seed(seed)
    mixer = layers.build_mixer(variant, **layers.layout(world, sp))
    dtype = mixer.config.params_dtype
    whole = layers.draw_parameters(mixer, world, rng)
    assert whole.keys() == layers.parameter_names(variant)
    layers.set_parameters(mixer, whole, rank, world)
    x, weight = (torch.randn(LENGTH, BATCH, 64, generator=rng).to(dtype) for _ in range(2))

    def judge(p, x):
        output, _ = reference(variant, p, x)
        return output + p["linear_proj.bias"] if "linear_proj.bias" in p else output

    want = layers.with_gradients(judge, whole, x, weight.double())
    want = {name: layers.slice_of(name, y, rank, world) for name, y in want.items()}

    if sp:
        want |= {name: layers.tokens_here(want[name], rank, world) for name in ("output", "d input")}
        x, weight = (layers.tokens_here(y, rank, world) for y in (x, weight))
    model = layers.trainable(mixer, mixer.config)
    x = x.clone().requires_grad_()
    output, bias = model(x, None, rotary_pos_emb=layers.rotary(variant, LENGTH))
    output = output if bias is None else output + bias
    assert output.dtype == dtype
    output.backward(weight)
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


# ---- inside Megatron's TransformerLayer ------------------------------------------------------------------------------

BLOCKS = {
    "rmsnorm": Variant(VARIANTS["everything"].options, layer=3, rotary_percent=0.5),
    "rmsnorm-1p-swiglu": Variant(
        dict(qk_norm=True, norm="all"),
        dict(layernorm_zero_centered_gamma=True, gated_linear_unit=True, activation_func=F.silu),
    ),
    "layernorm-bias": Variant(dict(norm="group", norm_groups=2), dict(normalization="LayerNorm", add_bias_linear=True)),
    "fp32-residual": Variant(
        dict(qk_norm=True, norm="all"), dict(params_dtype=torch.bfloat16, bf16=True, fp32_residual_connection=True)
    ),
}  # fmt: skip


def layer_reference(variant: Variant, tp: int, p: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """x + attention(norm(x)), then the same with the MLP."""
    config = layers.transformer_config(**variant.config)

    def part(prefix):
        return {name.removeprefix(prefix): y for name, y in p.items() if name.startswith(prefix)}

    def norm(x, weight, bias=0):
        centered = x if config.normalization == "RMSNorm" else x - x.mean(-1, keepdim=True)
        return rms(centered, config.layernorm_epsilon) * (weight + config.layernorm_zero_centered_gamma) + bias

    def mlp(x, p):
        h = x @ p["linear_fc1.weight"].T + p.get("linear_fc1.bias", 0)
        if config.gated_linear_unit:
            gate, h = h.unflatten(-1, (tp, 2, -1)).unbind(-2)  # each rank holds its part of both
            h = (F.silu(gate) * h).flatten(-2)
        else:
            h = F.gelu(h)
        return h @ p["linear_fc2.weight"].T + p.get("linear_fc2.bias", 0)

    attention = part("self_attention.")
    output, _ = reference(variant, attention, norm(x, **part("input_layernorm.")))
    x = x + output + attention.get("linear_proj.bias", 0)
    return x + mlp(norm(x, **part("pre_mlp_layernorm.")), part("mlp."))


def check_transformer_layer(rank: int, world: int, variant: Variant, sp: bool, seed: int) -> float:
    layers.start(tp=world)
    rng = torch.Generator().manual_seed(seed)
    config = layers.transformer_config(**layers.layout(world, sp), **variant.config)
    layer = get_lightning_layer_spec(config, variant.values)(config=config, layer_number=variant.layer)
    layer.to(config.params_dtype)  # norms are in fp32 until Float16Module converts the model
    whole = layers.draw_parameters(layer, world, rng)
    layers.set_parameters(layer, whole, rank, world)
    x, weight = (torch.randn(LENGTH, BATCH, 64, generator=rng) for _ in range(2))
    if not config.fp32_residual_connection:
        x, weight = x.to(config.params_dtype), weight.to(config.params_dtype)

    want = layers.with_gradients(functools.partial(layer_reference, variant, world), whole, x, weight.double())
    want = {name: layers.slice_of(name, y, rank, world) for name, y in want.items()}
    if sp:
        want |= {name: layers.tokens_here(want[name], rank, world) for name in ("output", "d input")}
        x, weight = (layers.tokens_here(y, rank, world) for y in (x, weight))
    model = layers.trainable(layer, config)
    x = x.clone().requires_grad_()
    output, _ = model(x, rotary_pos_emb=layers.rotary(variant, LENGTH))
    assert output.dtype == x.dtype
    output.backward(weight)
    got = {"output": output, "d input": x.grad}
    got |= {f"d {name}": g for name, g in layers.reduce_gradients(model).items()}
    return assert_close(got, want, TOLERANCE[config.params_dtype])


@pytest.mark.parametrize("variant", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("tp, sp", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_transformer_layer_equals_formulas(variant, tp, sp, rng):
    print("largest relative errors of the ranks:", spawn(check_transformer_layer, tp, variant, sp, rng.initial_seed()))


def check_yarn(rank: int, world: int) -> None:
    layers.start()
    variant = Variant(dict(rope=True))
    mixer = layers.build_mixer(variant)
    x = torch.randn(LENGTH, BATCH, 4, 16)
    freqs = layers.rotary(variant, LENGTH)
    where = dict(config=mixer.config, layer_number=1, cu_seqlens=None, inference_context=None)
    where |= dict(cp_group=mixer.pg_collection.cp, group=None, layout="contiguous")
    plain, _ = rotate(x, x, freqs, **where)
    mixer.config.yarn_rotary_scaling_factor = 4.0  # as GPTModel's configuration says where YaRN is on
    scaled, again = rotate(x, x, freqs, **where)
    factor = 0.1 * math.log(4) + 1  # YaRN (Peng et al. 2023), section 3.4
    torch.testing.assert_close(scaled, factor * plain)
    assert torch.equal(scaled, again)


def test_yarn_scales_the_rotation():
    """Megatron's YaRN embedding holds frequencies; whoever applies it multiplies by the attention factor."""
    spawn(check_yarn, 1)
