"""What mixer, options, norms and operator sizes refuse, and that each message names the value and the remedy."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from megatron.core.inference.contexts import DynamicInferenceContext, StaticInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams

from lightning_megatron.config import LightningOptions, resolve_shape
from lightning_megatron.mixer import LightningAttention, LightningAttentionSubmodules
from lightning_megatron.norm import TorchNorm
from tests import layers
from tests.launch import spawn
from tests.layers import Variant, transformer_config

# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(decay="slow"), "decay='slow' is unknown; choose one of tnl, minimax, bailing, paper, alibi, none"),
        (dict(feature_map="relu"), "feature_map='relu' is unknown; choose one of silu, silu-qkv, none"),
        (dict(norm="layer"), "norm='layer' is unknown; choose one of head, group, all, none"),
        (dict(gate="tanh"), "gate='tanh' is unknown; choose one of none, sigmoid, linear"),
        (dict(backend="cuda"), "backend='cuda' is unknown; choose one of auto, triton, torch"),
        (dict(num_kv_heads=0), "num_kv_heads=0 must be at least 1, or left out"),
        (dict(scale=float("nan")), "scale=nan must be a finite number, or left out"),
        (dict(norm_eps=-1.0), "norm_eps=-1.0 must be at least 0, or left out"),
        (dict(key_head_dim=-1), "key_head_dim=-1 must be at least 1, or left out"),
        (dict(value_head_dim=0), "value_head_dim=0 must be at least 1, or left out"),
        (dict(norm="group", norm_groups=0), "norm_groups=0 must be at least 1, or left out"),
        (dict(norm="group"), "norm='group' needs norm_groups, the number of groups"),
        (
            dict(norm_groups=2),
            "norm_groups=2 has no meaning with norm='head'; use norm='group' or leave norm_groups out",
        ),
    ],
)
def test_options_refuse(options, message):
    with pytest.raises(ValueError, match=f"^lightning {message}"):
        LightningOptions(**options)


@pytest.mark.parametrize(
    "config, options, tp, message",
    [
        (
            dict(linear_num_key_heads=4),
            {},
            1,
            "--linear-num-key-heads 4 .*set the number .* with --lightning-num-kv-heads",
        ),
        (
            dict(linear_num_value_heads=8),
            {},
            1,
            "--linear-num-value-heads 8 .*set the number .* with --lightning-num-kv-heads",
        ),
        ({}, dict(num_kv_heads=3), 1, "4 query heads cannot share 3 key/value heads: the second must divide the first"),
        ({}, dict(num_kv_heads=8), 1, "4 query heads cannot share 8 key/value heads"),
        (
            {},
            dict(num_kv_heads=1),
            2,
            "1 key/value heads cannot be split over tensor-parallel size 2; use a --tensor-model-",
        ),
        ({}, dict(norm="group", norm_groups=3), 1, "norm_groups=3 must divide the 4 heads"),
        (
            {},
            dict(norm="group", norm_groups=2),
            4,
            "norm_groups=2 must be divisible by tensor-parallel size 4, .*norm='all'",
        ),
    ],
)
def test_sizes_refuse(config, options, tp, message):
    with pytest.raises(ValueError, match=message):
        resolve_shape(transformer_config(**config), LightningOptions(**options), tp)


def test_sizes_follow_options_before_megatron_flags():
    """--linear-key-head-dim and --linear-value-head-dim count unless an option says more."""
    config = transformer_config(linear_key_head_dim=32, linear_value_head_dim=48)
    assert resolve_shape(config, LightningOptions(), 1).group_dims == (32, 48, 32, 48)
    assert resolve_shape(config, LightningOptions(key_head_dim=16, gate="none"), 1).group_dims == (16, 0, 16, 48)
    shape = resolve_shape(transformer_config(), LightningOptions(value_head_dim=64, num_kv_heads=2), 2)
    assert shape.group_dims == (32, 128, 16, 64)
    assert (shape.projection_dim, shape.output_dim, shape.norm_groups) == (2 * 240, 256, 4)
    assert resolve_shape(transformer_config(), LightningOptions(norm="group", norm_groups=2), 2).norm_groups == 2
    assert resolve_shape(transformer_config(), LightningOptions(norm="all"), 4).norm_groups == 1


def test_norm_refuses_unknown_normalization():
    config = dataclasses.replace(transformer_config(), normalization="Identity")
    with pytest.raises(ValueError, match="--normalization Identity is not supported .*use RMSNorm or LayerNorm"):
        TorchNorm(config, 64)


# ---- the layer -------------------------------------------------------------------------------------------------------


def check_layer_refusals(rank: int, world: int) -> None:
    layers.start()
    variant = Variant(dict(rope=True))
    mixer = layers.build_mixer(variant)
    x = torch.randn(32, 1, 64)
    bounds = torch.tensor([0, 32], dtype=torch.int32)
    thd = PackedSeqParams("thd", bounds, bounds)
    moved = StaticInferenceContext(2, 32)
    moved.batch_size_offset = 2
    dynamic = DynamicInferenceContext.__new__(DynamicInferenceContext)  # its __init__ allocates the cache
    dynamic.is_hybrid_model = False
    freqs = layers.rotary(variant, 32)

    for arguments, message in (
        (dict(), "rope needs a rotary embedding from the model; pass --position-embedding-type rope"),
        (
            dict(rotary_pos_emb=freqs.repeat(1, 1, 1, 2)),
            "turns 32 channels, but .* have 16; use a smaller --rotary-percent",
        ),
        (dict(key_value_states=x), "forward got key_value_states, which .*leave it out"),
        (dict(rotary_pos_cos=freqs, attention_bias=x), "forward got rotary_pos_cos, attention_bias, which"),
        (
            dict(packed_seq_params=PackedSeqParams("bshd", bounds, bounds)),
            "qkv_format='bshd' .*lightning layers take 'thd'",
        ),
        (dict(inference_context=dynamic), "DynamicInferenceContext keeps no states of lightning layers: call .*apply"),
        (dict(inference_params=dynamic), "DynamicInferenceContext keeps no states"),
        (dict(inference_context=StaticInferenceContext(1, 32), packed_seq_params=thd), "not from packed sequences"),
        (dict(inference_context=moved), "rows 2 to 2 of a batch are more than .*max_batch_size=2; give it a larger"),
    ):
        if arguments:
            arguments = dict(rotary_pos_emb=freqs) | arguments
        with pytest.raises(ValueError, match=message):
            mixer(x, None, **arguments)
    mixer.config.fp8 = "hybrid"
    with pytest.raises(ValueError, match="generate in bf16, .*load the checkpoint without --fp8-format"):
        mixer(x, None, rotary_pos_emb=freqs, inference_context=StaticInferenceContext(1, 32))
    mixer.config.fp8 = None
    output, _ = mixer(x, None, rotary_pos_emb=freqs, attention_bias=None, rotary_pos_cos=None, sequence_len_offset=None)
    assert torch.equal(output, mixer(x, None, rotary_pos_emb=(freqs, freqs))[0])  # one for q, one for k
    assert not torch.equal(output, mixer(x, None, rotary_pos_emb=(freqs, 2 * freqs))[0])

    for arguments, message in (
        (dict(pg_size=3), "__init__ got pg_size, which .*leave it out"),
        (dict(options=LightningOptions(num_kv_heads=3)), "4 query heads cannot share 3"),
        (dict(options=LightningOptions(decay_offset=5)), "decay='tnl' with decay_offset=5 .*use a smaller offset"),
    ):
        with pytest.raises(ValueError, match=message):
            build(arguments)
    build(dict(cp_comm_type="p2p", pp_layer_offset=0, name="decoder.layers.1.self_attention"))


def build(arguments: dict) -> LightningAttention:
    projections = LightningAttentionSubmodules(layers.ColumnParallelLinear, layers.RowParallelLinear)
    return LightningAttention(transformer_config(), projections, 2, **arguments)


def test_layer_refuses():
    spawn(check_layer_refusals, 1)


def check_too_few_heads(rank: int, world: int) -> None:
    layers.start(tp=world)
    with pytest.raises(ValueError, match="1 key/value heads cannot be split over tensor-parallel size 2"):
        build(dict(options=LightningOptions(num_kv_heads=1)))


def test_heads_must_fit_the_ranks():
    spawn(check_too_few_heads, 2)
