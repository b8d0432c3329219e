"""Multi-token prediction layers: of the model's own parts and options, and which tokens they are given over ranks.

tests/models/test_parity.py compares those of Ling and Ring with a reference, on ranks; test_parallel.py trains.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import multi_token_prediction
from megatron.core.transformer.transformer_layer import TransformerLayer

from lightning_megatron.config import LightningOptions
from lightning_megatron.convert.reference import rms, rotate, softmax_attention
from lightning_megatron.norm import TorchNorm
from lightning_megatron.patches import packed_roll
from lightning_megatron.runtime import prepare
from lightning_megatron.softmax import LatentAttention, SDPACoreAttention
from lightning_megatron.spec import get_hybrid_block_spec, get_mtp_block_spec, lightning_layer_spec, make_spec
from tests import layers
from tests.helpers.context_parallel import draw_documents, tokens_of
from tests.helpers.models import gpt
from tests.launch import spawn
from tests.layers import transformer_config

CONFIG = dict(
    mtp_num_layers=1, normalization="RMSNorm", gated_linear_unit=True, activation_func=torch.nn.functional.silu,
    add_bias_linear=False,
)  # fmt: skip
FACTORS = dict(softmax_alpha=0.7, softmax_beta=1.5, mlp_alpha=1.3, mlp_beta=0.6)


def formula(model, options: LightningOptions, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The states of a layer in fp64: hidden ``[b, s, h]``, of the model's other layers."""
    config, act = model.config, (lambda x: x) if options.bilinear_glu else torch.nn.functional.silu
    p = {name: x.detach().double() for name, x in model.mtp.layers[0].named_parameters()}
    norm = lambda name, x: rms(x, p.get(f"{name}.weight"), config.layernorm_epsilon)
    linear = lambda name, x: x @ p[f"{name}.weight"].T
    after = model.embedding.word_embeddings.weight.detach().double()[torch.nn.functional.pad(tokens[:, 1:], (0, 1))]
    x = torch.cat((norm("enorm", options.embedding_scale * after), norm("hnorm", hidden)), -1)
    x, inner = linear("eh_proj", x), "mtp_model_layer"
    n = norm(f"{inner}.input_layernorm", x)
    qkv = linear(f"{inner}.self_attention.linear_qkv", n).unflatten(-1, (config.num_attention_heads, 3, -1))
    q, k, v = qkv.unbind(-2)
    q, k = (rotate(y, y.shape[-1], 10000) for y in (q, k))
    y = linear(f"{inner}.self_attention.linear_proj", softmax_attention(q, k, v, q.shape[-1] ** -0.5).flatten(2))
    residual = n if config.apply_residual_connection_post_layernorm else x
    x = options.softmax_alpha * residual + options.softmax_beta * y
    n = norm(f"{inner}.pre_mlp_layernorm", x)
    gate, up = linear(f"{inner}.mlp.linear_fc1", n).chunk(2, -1)
    residual = n if config.apply_residual_connection_post_layernorm else x
    x = options.mlp_alpha * residual + options.mlp_beta * linear(f"{inner}.mlp.linear_fc2", act(gate) * up)
    return norm("final_layernorm", x)


def predict(rank: int, world: int, options: LightningOptions, config: dict, seed: int) -> float:
    """Relative error of a layer's states; all other layers are lightning."""
    layers.start()
    rng = torch.Generator().manual_seed(seed)
    model = gpt(transformer_config(**CONFIG | config), make_spec(options))
    layer = model.mtp.layers[0].mtp_model_layer
    assert type(layer) is TransformerLayer and type(layer.self_attention.core_attention) is SDPACoreAttention
    for name, parameter in model.named_parameters():
        x = torch.randn(parameter.shape, generator=rng)
        parameter.data = 1 + 0.3 * x if "norm" in name else x * parameter.shape[-1] ** -0.5
    tokens, found = torch.randint(0, 64, (2, 16), generator=rng), {}

    def keep(module, args, kwargs, outputs):
        found.update(
            hidden=kwargs["hidden_states"].detach().transpose(0, 1), states=outputs[0].detach().transpose(0, 1)
        )

    model.mtp.layers[0].register_forward_hook(keep, with_kwargs=True)
    model(tokens, torch.arange(16)[None], None)
    wanted = formula(model, options, tokens, found["hidden"].double())
    return float((found["states"] - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    "options, config",
    [
        (dict(embedding_scale=3.0, recompute_chunk=4, **FACTORS), dict(recompute_granularity="full")),
        (
            dict(embedding_scale=0.5, bilinear_glu=True, layernorm_affine=False, **FACTORS),
            dict(apply_residual_connection_post_layernorm=True),
        ),
    ],
    ids=["factors", "bare"],
)
def test_has_the_options_of_the_other_layers(options, config, rng):
    """What Megatron's stock layer has not. A layer in chunks would have no values for the norm behind it."""
    if "recompute_granularity" in config:
        config |= dict(recompute_method="uniform", recompute_num_layers=1)
    (error,) = spawn(predict, 1, LightningOptions(**options), config, rng.initial_seed())
    assert error < 1e-6


def check_parts(rank: int, world: int) -> None:
    layers.start()
    config = layers.latent_config(mtp_num_layers=2, normalization="RMSNorm")
    prepare(config, layout="zigzag-documents")
    block = get_mtp_block_spec(config, layout="zigzag-documents")
    assert len(block.layer_specs) == 2
    for spec in block.layer_specs:
        parts = spec.submodules
        assert all(norm.func is TorchNorm for norm in (parts.enorm, parts.hnorm, parts.layer_norm))
        attention = parts.mtp_model_layer.submodules.self_attention
        assert attention.module is LatentAttention and attention.params["layout"] == "zigzag-documents"
        assert attention.submodules.core_attention.params["per_document"]
    config.mtp_use_repeated_layer = True
    assert len(get_hybrid_block_spec(config).mtp_block_spec(vp_stage=None).layer_specs) == 1
    with pytest.raises(ValueError, match="--mtp-num-layers 2: lightning_layer_spec cannot say .*use lightning_spec"):
        gpt(config, lightning_layer_spec)
    with pytest.raises(ValueError, match="layout='contiguous' has no softmax attention"):
        prepare(transformer_config(**CONFIG, context_parallel_size=2), layout="contiguous")


def test_parts():
    spawn(check_parts, 1)


# ---- tokens ahead ----------------------------------------------------------------------------------------------------


def roll(rank: int, world: int, layout: str, bounds: torch.Tensor, seed: int) -> None:
    layers.start(cp=world)
    group = parallel_state.get_context_parallel_group()
    packed_roll.apply(layout if world > 1 else None)
    if world == 1:  # not one document after the other
        multi_token_prediction._roll_tensor_packed_seq = None
    packed = PackedSeqParams("thd", bounds, bounds)
    length = int(bounds[-1])
    x = torch.randint(1, 99, (1, length), generator=torch.Generator().manual_seed(seed))
    wanted = [
        torch.nn.functional.pad(x[:, a + 1 : b], (0, 1)) for a, b in zip(bounds, bounds[1:], strict=False) if a < b
    ]
    mine = tokens_of(rank, world, layout, [length // world] * world, bounds)
    wanted = torch.cat(wanted, 1)[:, mine]
    if layout != "zigzag-documents":  # without documents
        found, total = multi_token_prediction.roll_tensor(x[:, mine], cp_group=group)
        assert found.tolist() == torch.nn.functional.pad(x[:, 1:], (0, 1))[:, mine].tolist()
        assert int(total) == int(found.sum())
    found, total = multi_token_prediction.roll_tensor(x[:, mine], cp_group=group, packed_seq_params=packed)
    assert found.tolist() == wanted.tolist() and int(total) == int(wanted.sum())
    if "return_sum" in inspect.signature(multi_token_prediction.roll_tensor).parameters:  # in megatron-core 0.20
        found, total = multi_token_prediction.roll_tensor(
            x[:, mine], cp_group=group, packed_seq_params=packed, return_sum=False
        )
        assert found.tolist() == wanted.tolist() and total is None
    if world == 1:
        return
    other = "zigzag-documents" if layout == "zigzag" else "zigzag"
    with pytest.raises(ValueError, match=f"cut as '{other}', and those of another model"):
        packed_roll.apply(other)


@pytest.mark.parametrize("world, layout", [(1, "zigzag"), (3, "zigzag"), (3, "contiguous"), (2, "zigzag-documents")])
def test_tokens_ahead_in_packed_documents(world, layout, rng):
    """Within documents that cross chunks anywhere, in two chunks a rank or one, and (Megatron's own) cut one by one."""
    bounds = draw_documents(rng, 12 * world) if layout != "zigzag-documents" else torch.tensor([0, 8, 8, 12, 32])
    print(bounds.tolist())
    spawn(roll, world, layout, bounds.to(torch.int32), rng.initial_seed())
