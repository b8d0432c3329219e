"""Every option of the lightning layer, alone and together with others."""

import torch

from tests.layers import Variant

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
    "rope-wide": Variant(dict(rope=True, key_head_dim=48)),  # as in Megatron, --kv-channels say how many channels turn
    "rope-not-here": Variant(dict(rope=True), dict(no_rope_freq=[0, 1, 0, 0])),
    "scale-1": Variant(dict(scale=1.0, decay="none")),
    "grouped-heads": Variant(dict(num_kv_heads=2)),
    "K<V": Variant(dict(key_head_dim=16, value_head_dim=32)),
    "K>V": Variant(dict(key_head_dim=32, value_head_dim=16, num_kv_heads=2)),
    "bias": Variant(config=dict(add_bias_linear=True)),
    "qkv-bias": Variant(dict(gate="none"), dict(add_qkv_bias=True)),
    "minimax": Variant(
        dict(decay="minimax", scale=1.0, feature_map="silu-qkv", norm="all", norm_eps=1e-6),
        dict(kv_channels=32), layer=1,
    ),
    "bailing": Variant(
        dict(decay="bailing", decay_offset=1, feature_map="none", qk_norm=True, rope=True, norm="group", norm_groups=2),
        dict(kv_channels=32), layer=4, rotary_percent=0.5,
    ),
    "paper": Variant(dict(decay="paper", gate="linear", norm_affine=False), layer=3),
    "everything": Variant(
        dict(
            decay="bailing", feature_map="silu-qkv", num_kv_heads=2, value_head_dim=48, scale=0.7, rope=True,
            qk_norm=True, norm="all", norm_eps=0.01, gate="linear",
        ),
        dict(add_bias_linear=True), layer=3, rotary_percent=0.5,
    ),
    "bf16": Variant(dict(num_kv_heads=2, qk_norm=True, norm="all"), dict(params_dtype=torch.bfloat16, bf16=True)),
}  # fmt: skip
