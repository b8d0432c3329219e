"""FusedMLP: the values and gradients of Megatron's MLP, what it keeps, and where it takes Megatron's place."""

import pytest
import torch
from megatron.core.package_info import VERSION
from megatron.core.transformer.mlp import MLP

from lightning_megatron.config import LightningOptions
from lightning_megatron.mlp import BilinearMLP, FusedMLP
from lightning_megatron.spec import make_spec
from tests import layers
from tests.helpers.models import gpt
from tests.launch import spawn

SWIGLU = dict(
    num_layers=2, hidden_size=32, ffn_hidden_size=48, num_attention_heads=2, gated_linear_unit=True,
    activation_func=torch.nn.functional.silu, bias_activation_fusion=True, linear_attention_freq=2,
)  # fmt: skip

# Megatron 0.20 clamps in its fused activation, too, and SwiGLU beside experts alone
CLAMPED = {
    "activation_func_clamp_value": 7.0, "bias_activation_fusion": tuple(VERSION[:2]) >= (0, 20),
    "num_moe_experts": 2, "moe_layer_freq": [0, 0],
}  # fmt: skip


def built(changes: dict, options: LightningOptions | None = None):
    config = layers.transformer_config(**(SWIGLU | changes))
    model = gpt(config, make_spec(options))
    assert not config.use_te_activation_func  # which is that of other parts, too
    return model


def kinds(rank: int, world: int, changes: dict, options: dict) -> list[str]:
    layers.start()
    return [type(layer.mlp).__name__ for layer in built(changes, LightningOptions(**options)).decoder.layers]


@pytest.mark.parametrize(
    "changes, options, wanted",
    [
        ({}, {}, FusedMLP),
        ({"num_moe_experts": 2, "moe_layer_freq": [0, 0]}, {}, FusedMLP),
        ({"bias_activation_fusion": False}, {}, MLP),
        ({"add_bias_linear": True}, {}, MLP),
        ({"activation_func_fp8_input_store": True}, {}, MLP),
        ({"gated_linear_unit": False, "activation_func": torch.nn.functional.gelu, "add_bias_linear": True}, {}, MLP),
        (CLAMPED, {}, MLP),
        ({}, {"bilinear_glu": True}, BilinearMLP),
    ],
    ids=["swiglu", "experts-nowhere", "unfused", "bias", "fp8-store", "gelu", "clamped", "bilinear"],
)
def test_where_it_stands(changes, options, wanted):
    ((found,),) = [spawn(kinds, 1, changes, options)]
    assert found == [wanted.__name__] * 2


def both(rank: int, world: int) -> dict:
    """Results, and bytes kept, of a fused MLP and of Megatron's with the same weights."""
    layers.start()
    results = {}
    for name, change in (("fused", {}), ("megatron", {"bias_activation_fusion": False})):
        mlp = built(change).decoder.layers[0].mlp
        generator = torch.Generator().manual_seed(5)
        for parameter in mlp.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 6
        x = torch.randn(7, 3, 32, generator=generator).requires_grad_()
        given, kept = torch.randn(7, 3, 32, generator=generator), {}

        def keep(t, kept=kept):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y, bias = mlp(x)
        grads = torch.autograd.grad(y, [x, *mlp.parameters()], given)
        names = ["dx", *(f"d{n}" for n, _ in mlp.named_parameters())]
        assert bias is None
        weights = sum(4 * p.numel() for p in mlp.parameters())
        results[name] = {"y": y.detach()} | dict(zip(names, grads, strict=True)), sum(kept.values()) - weights
    return results


def test_is_megatrons():
    """Its values and names of parameters; it keeps its input, what enters the activation and what leaves it."""
    (results,) = spawn(both, 1)
    (fused, kept), (megatron, more) = results["fused"], results["megatron"]
    assert fused.keys() == megatron.keys()
    for name, x in megatron.items():
        assert float((fused[name] - x).norm() / x.norm()) < 1e-6, name
    assert kept == 4 * 7 * 3 * (32 + 2 * 48 + 48) < more
