"""Ling and Ring with linear attention (inclusionAI's Bailing): 2.0 with GQA, 2.5 and 2.6 with multi-latent attention.

Block (technical report, arXiv 2510.19338; Hugging Face's remote code modeling_bailing_moe_linear): RMSNorm, attention,
residual, RMSNorm, MLP or experts, residual. Lightning attention: [silu] -> RMSNorm of q and k per head -> half rotary
embedding -> linear attention, scale d^-1/2 -> RMSNorm in groups * sigmoid(g) -> projection. Every
``layer_group_size``-th layer is softmax, and what is left behind the last whole group.

Multi-token prediction (remote code of Ling 2.0 and 2.6; SGLang, models/bailing_moe_nextn; vLLM, models/bailing_mtp), as
in Megatron: eh_proj [enorm(embedding of the next token), hnorm(state behind the model's final norm)], a softmax layer
with experts, final_layernorm, and the output layer of the model. Its tensors follow those of the last layer, as layers
of their own, in any file (Ling 2.6 flash: model-mtp-layer.safetensors).
"""

from __future__ import annotations

from argparse import Namespace

from ..config import expert_pattern, lightning_pattern
from .family import (
    COMMON,
    Config,
    Fields,
    Flags,
    check_chosen,
    check_divides,
    check_lightning,
    check_rotated,
    groups_of,
    pattern,
    rotary,
)
from .units import Keys, Part, Piece, Unit, grouped, joined, layer_norms, same, vocabulary, whole

NAME = "bailing"
LATENT = "BailingMoeV2_5ForCausalLM"
GROUPED = "BailingMoeLinearV2ForCausalLM"
_KDA = ("linear_attention", "short_conv_kernel_size", "no_kda_lora", "kda_safe_gate", "kda_lower_bound")
_FREE = (
    "max_window_layers", "use_rmsnorm", "rotary_dim", "qk_head_dim", "router_dtype",
    "moe_router_topk_scaling_factor", "rotary_type", "seq_aux",
)  # fmt: skip


def claims(config: Config) -> bool:
    """See ``family.Family``. Ling 3.0 has the model type of Ling 2.5, and other layers."""
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    if kind not in ("bailing_moe_linear", "bailing_hybrid", "bailing_moe_v2_5") and not {LATENT, GROUPED} & set(
        architectures
    ):
        return False
    other = [name for name in _KDA if config.get(name) not in (None, False)]
    if other or any("V3" in name for name in architectures):
        field = f"{other[0]} {config[other[0]]!r}" if other else f"architectures {architectures[0]}"
        raise ValueError(
            f"config.json: {field}: Ling 3.0 (bailing_hybrid) has Kimi Delta Attention, whose decay depends on the "
            "data, and no lightning attention; it is not supported"
        )
    return True


def flags(config: Config) -> Flags:
    """See ``family.Family``."""
    fields = Fields(config, _FREE)
    layers, heads, hidden = (
        fields.need(f"{name}") for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    for name in ("use_bias", "use_qkv_bias", "attention_bias", "norm_head", "use_sliding_window", "linear_attn_bias"):
        fields.only(name, False)
    fields.only("hidden_act", "silu")
    fields.only("sliding_window", None, why="and every softmax layer here sees all tokens")
    fields.only("rope_traditional", False)
    dim = fields.get("head_dim", hidden // heads)
    latent = fields.get("kv_lora_rank") is not None
    if dim != hidden // heads and not latent:
        raise ValueError(
            f"config.json: head_dim is {dim}, but lightning layers have hidden_size / num_attention_heads = "
            f"{hidden // heads}, and this package has one --kv-channels for both"
        )
    group = fields.need("layer_group_size")
    whole_groups = layers // group * group
    softmax = [(layer + 1) % group == 0 or layer >= whole_groups for layer in range(layers)]
    check_lightning([not full for full in softmax], f"layer_group_size {group} and num_hidden_layers {layers}")
    _refuse_other_layers(fields, heads, hidden // heads, softmax)
    norm_groups = fields.get("group_norm_size", 1)
    check_divides("group_norm_size", norm_groups, "num_attention_heads", heads)
    base, part = rotary(fields)
    normed, silu = fields.get("use_qk_norm", True), fields.get("linear_silu", fields.get("use_linear_silu", False))
    found: Flags = dict(
        num_layers=layers, hidden_size=hidden, num_attention_heads=heads, kv_channels=hidden // heads,
        ffn_hidden_size=fields.need("intermediate_size"), vocab_size=fields.need("vocab_size"),
        max_position_embeddings=fields.get("max_position_embeddings", 131072), norm_epsilon=fields.need("rms_norm_eps"),
        linear_attention_freq=pattern(0 if full else 1 for full in softmax), **COMMON,
        untie_embeddings_and_output_weights=not fields.get("tie_word_embeddings", False),
        position_embedding_type="rope", rotary_base=base, lightning_rope=True,
        lightning_decay="bailing", lightning_feature_map="silu-qkv" if silu else "none",
        lightning_qk_norm=bool(normed), lightning_norm="group", lightning_norm_groups=norm_groups,
    )  # fmt: skip
    if part is None and fields.get("rotary_dim", dim) != dim:
        raise ValueError(
            f"config.json: rotary_dim is {fields.get('rotary_dim')}, which Hugging Face's code of this family does not "
            f"read, and vLLM does; write partial_rotary_factor, the part of head_dim {dim} that is rotated"
        )
    half = 1.0 if part is None else part
    check_rotated(f"partial_rotary_factor {half}", int(hidden // heads * half), hidden // heads)
    found |= _latent(fields, half) if latent else _grouped(fields, half, normed)
    if fields.get("num_experts", 0):
        found |= _experts(fields, layers)
    found |= _prediction(fields)
    fields.warn_of_others()
    return found


def _refuse_other_layers(fields: Fields, heads: int, dim: int, softmax: list[bool]) -> None:
    """``linear_attn_config`` (of Kimi Linear, whose files number layers from 1) may say what the model is anyway."""
    name, said = "linear_attn_config", fields.get("linear_attn_config", {})
    lightning = [number for number, full in enumerate(softmax, start=1) if not full]
    full = [number for number, full in enumerate(softmax, start=1) if full]
    same = dict(num_heads=heads, head_dim=dim, full_attn_layers=full, linear_attn_layers=lightning, kda_layers=[])
    if not isinstance(said, dict):
        raise ValueError(f"config.json: {name} is {said!r}, which is not understood; leave it out")
    for key, value in said.items():
        if value is not None and (key not in same or value != same[key]):
            expected = f"it may be {same[key]!r} here" if key in same else f"known are {', '.join(same)}"
            raise ValueError(
                f"config.json: {name} has {key} {value!r}, and layers with another linear attention than lightning "
                f"attention are not supported: {expected}; or leave {name} out"
            )


def _latent(fields: Fields, half: float) -> Flags:
    fields.only("rope_interleave", True, why="and the rotated channels of multi-latent attention are neighbours here")
    fields.get("num_key_value_heads"), fields.get("use_qk_norm")
    rotated = fields.need("qk_rope_head_dim")
    if rotated % 2:
        raise ValueError(f"config.json: qk_rope_head_dim is {rotated}, and pairs of channels turn; it must be even")
    return dict(
        multi_latent_attention=True, rope_type="rope", qk_layernorm=True, q_lora_rank=fields.get("q_lora_rank"),
        kv_lora_rank=fields.need("kv_lora_rank"), qk_head_dim=fields.need("qk_nope_head_dim"),
        qk_pos_emb_head_dim=rotated, v_head_dim=fields.need("v_head_dim"),
        lightning_rotary_percent=half,
    )  # fmt: skip


def _grouped(fields: Fields, half: float, normed: bool) -> Flags:
    groups = groups_of(fields, fields.need("num_attention_heads"))
    return dict(group_query_attention=True, num_query_groups=groups, qk_layernorm=bool(normed), rotary_percent=half)


def _prediction(fields: Fields) -> Flags:
    """A factor of 0 is that of a model that is not trained; Megatron's default then."""
    count, factor = fields.get("num_nextn_predict_layers", 0), fields.get("mtp_loss_scaling_factor", 0)
    return dict(mtp_num_layers=count or None, mtp_loss_scaling_factor=(factor or None) if count else None)


def _experts(fields: Fields, layers: int) -> Flags:
    dense, inner = fields.get("first_k_dense_replace", 0), fields.need("moe_intermediate_size")
    shared = fields.get("num_shared_experts", 0) * fields.get("moe_shared_expert_intermediate_size", inner)
    sigmoid = fields.get("score_function", "softmax") == "sigmoid"
    chosen, groups, of_groups = (
        fields.need("num_experts_per_tok"),
        fields.get("n_group", 1),
        fields.get("topk_group", 1),
    )
    experts, biased = fields.need("num_experts"), bool(fields.get("moe_router_enable_expert_bias", False))
    check_chosen(chosen, experts, "num_experts")
    check_divides("n_group", groups, "num_experts", experts)
    if groups > 1 and not (of_groups <= groups <= experts // 2):
        raise ValueError(
            f"config.json: n_group {groups} and topk_group {of_groups} of num_experts {experts}: topk_group may be at "
            "most n_group, and a group, which is chosen by its best two experts, needs two; correct them"
        )
    if groups > 1 and chosen > of_groups * (size := experts // groups):
        raise ValueError(
            f"config.json: num_experts_per_tok is {chosen} of the {of_groups * size} experts in {of_groups} groups of "
            f"{size}; correct it, topk_group or n_group"
        )
    if biased and not sigmoid:
        raise ValueError(
            "config.json: moe_router_enable_expert_bias is true and score_function softmax: Megatron adds a bias to "
            "scores by sigmoid alone; correct one of them"
        )
    if groups > 1 and chosen // of_groups != 2:
        raise ValueError(
            f"config.json: num_experts_per_tok {chosen} of topk_group {of_groups} groups: Bailing takes the groups "
            "with the best two experts, Megatron those with the best num_experts_per_tok / topk_group, which must be 2"
        )
    fields.only("score_function", "softmax", "sigmoid")
    fields.only("norm_topk_prob", True)
    fields.only("moe_router_enable_routed_scaling", True)
    fields.only("moe_router_enable_shared_expert", True)
    return dict(
        num_experts=experts, moe_layer_freq=pattern(int(layer >= dense) for layer in range(layers)),
        moe_ffn_hidden_size=inner, moe_shared_expert_intermediate_size=shared or None,
        moe_router_topk=chosen, moe_router_dtype="fp32",
        moe_router_score_function="sigmoid" if sigmoid else "softmax", moe_router_load_balancing_type="none",
        moe_router_enable_expert_bias=biased,
        moe_router_num_groups=groups if groups > 1 else None, moe_router_group_topk=of_groups if groups > 1 else None,
        moe_router_topk_scaling_factor=fields.get("routed_scaling_factor", 1.0),
    )  # fmt: skip


def config(args: Namespace) -> Config:
    """See ``family.Family``."""
    layers = lightning_pattern(args.linear_attention_freq, args.num_layers)
    latent = args.multi_latent_attention
    group = layers.index(False) + 1 if False in layers else args.num_layers
    found: Config = dict(
        architectures=[LATENT if latent else GROUPED],
        model_type="bailing_hybrid" if latent else "bailing_moe_linear",
        vocab_size=args.vocab_size or args.padded_vocab_size, hidden_size=args.hidden_size,
        intermediate_size=args.ffn_hidden_size, num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_attention_heads if latent else args.num_query_groups or args.num_attention_heads,
        head_dim=args.hidden_size // args.num_attention_heads, hidden_act="silu", rms_norm_eps=args.layernorm_epsilon,
        max_position_embeddings=args.max_position_embeddings, rope_theta=args.rotary_base, rope_scaling=None,
        tie_word_embeddings=not args.untie_embeddings_and_output_weights, use_bias=False, use_qkv_bias=False,
        use_qk_norm=args.lightning_qk_norm, linear_silu=args.lightning_feature_map == "silu-qkv",
        layer_group_size=group, group_norm_size=args.lightning_norm_groups or 1,
        num_nextn_predict_layers=args.mtp_num_layers or 0,
    )  # fmt: skip
    if args.mtp_num_layers and args.mtp_loss_scaling_factor != 0.1:  # Megatron's default
        found["mtp_loss_scaling_factor"] = args.mtp_loss_scaling_factor
    if latent:
        found |= dict(
            q_lora_rank=args.q_lora_rank, kv_lora_rank=args.kv_lora_rank, qk_nope_head_dim=args.qk_head_dim,
            qk_rope_head_dim=args.qk_pos_emb_head_dim, v_head_dim=args.v_head_dim, rope_interleave=True,
            partial_rotary_factor=args.lightning_rotary_percent or args.rotary_percent,
        )  # fmt: skip
    else:
        found["partial_rotary_factor"] = args.rotary_percent
    if args.num_experts:
        dense = expert_pattern(args.moe_layer_freq, args.num_layers, args.num_experts).index(True)
        shared = args.moe_shared_expert_intermediate_size
        found |= dict(
            num_experts=args.num_experts, num_experts_per_tok=args.moe_router_topk,
            moe_intermediate_size=args.moe_ffn_hidden_size, num_shared_experts=int(bool(shared)),
            moe_shared_expert_intermediate_size=shared, first_k_dense_replace=dense, norm_topk_prob=True,
            score_function=args.moe_router_score_function, n_group=args.moe_router_num_groups or 1,
            topk_group=args.moe_router_group_topk or 1,
            routed_scaling_factor=args.moe_router_topk_scaling_factor or 1.0,
            moe_router_enable_expert_bias=args.moe_router_enable_expert_bias, router_dtype="fp32",
        )  # fmt: skip
    return found


def units(args: Namespace, config: Config) -> list[Unit]:
    """See ``family.Family``."""
    keys, hidden = Keys(args.num_layers), args.hidden_size
    found = vocabulary(args, "model.word_embeddings.weight", config["vocab_size"])
    experts = expert_pattern(args.moe_layer_freq, args.num_layers, args.num_experts)
    for layer, lightning in enumerate(lightning_pattern(args.linear_attention_freq, args.num_layers)):
        found += _layer(args, keys, layer, f"model.layers.{layer}.", lightning, experts[layer])
    ahead = args.mtp_num_layers or 0
    keys = Keys(ahead, block="mtp.layers.", inner="transformer_layer.")
    for layer in range(ahead):
        names, ours = f"model.layers.{args.num_layers + layer}.", f"{keys.block}{layer}."
        found += _layer(args, keys, layer, names, lightning=False, experts=experts[-1])
        norms = [(f"{norm}.weight", (hidden,)) for norm in ("enorm", "hnorm", "final_layernorm")]
        for name, shape in (*norms, ("eh_proj.weight", (hidden, 2 * hidden))):
            found.append(same(names + name, whole(ours + name, *shape)))
    return found


def _layer(args: Namespace, keys: Keys, layer: int, names: str, lightning: bool, experts: bool) -> list[Unit]:
    hidden = args.hidden_size
    attention = _lightning if lightning else _multi_latent if args.multi_latent_attention else _softmax
    found = attention(args, keys, layer, names + "attention.")
    before_qkv = lightning or not args.multi_latent_attention
    found += layer_norms(keys, layer, names, hidden, before_qkv=before_qkv, dense=not experts)
    if experts:
        return found + _expert_units(args, keys, layer, names + "mlp.")
    pair = [keys.layer(layer, f"mlp.linear_fc{n}.weight", *shape) for n, shape in _mlp(args.ffn_hidden_size, hidden)]
    return found + gated(names + "mlp.", pair[0], pair[1])


def _mlp(inner: int, hidden: int) -> tuple[tuple[int, tuple[int, int]], ...]:
    return (1, (2 * inner, hidden)), (2, (hidden, inner))


def gated(names: str, fc1: Piece, fc2: Piece) -> list[Unit]:
    """A gated MLP: ``gate_proj``, ``up_proj`` and ``down_proj`` in Hugging Face's names."""
    inner = fc1.inner[0] // 2
    return [
        joined([f"{names}gate_proj.weight", f"{names}up_proj.weight"], fc1, [inner, inner]),
        same(f"{names}down_proj.weight", fc2),
    ]


def _lightning(args: Namespace, keys: Keys, layer: int, names: str) -> list[Unit]:
    heads, d, hidden = args.num_attention_heads, args.kv_channels, args.hidden_size
    parts = [Part(f"{names}query_key_value.weight", (d, d, d)), Part(f"{names}g_proj.weight", (d,))]
    qkv = keys.layer(layer, "self_attention.linear_qkv.weight", heads * 4 * d, hidden)
    found = [
        grouped(parts, qkv, heads, (0, 3, 1, 2)),
        same(f"{names}dense.weight", keys.layer(layer, "self_attention.linear_proj.weight", hidden, heads * d)),
        same(f"{names}g_norm.weight", keys.layer(layer, "self_attention.out_norm.weight", heads * d)),
    ]
    if args.lightning_qk_norm:
        found += _head_norms(keys, layer, names, ("q_norm", "k_norm"), d)
    return found


def _head_norms(keys: Keys, layer: int, names: str, ours: tuple[str, str], d: int) -> list[Unit]:
    return [
        same(f"{names}{theirs}.weight", keys.layer(layer, f"self_attention.{name}.weight", d))
        for theirs, name in zip(("query_layernorm", "key_layernorm"), ours, strict=True)
    ]


def _softmax(args: Namespace, keys: Keys, layer: int, names: str) -> list[Unit]:
    heads, d, hidden = args.num_attention_heads, args.kv_channels, args.hidden_size
    groups = args.num_query_groups if args.group_query_attention else heads
    qkv = keys.layer(layer, "self_attention.linear_qkv.weight", (heads + 2 * groups) * d, hidden)
    found = [
        grouped([Part(f"{names}query_key_value.weight", (heads // groups * d, d, d))], qkv, groups, (0, 1, 2)),
        same(f"{names}dense.weight", keys.layer(layer, "self_attention.linear_proj.weight", hidden, heads * d)),
    ]
    if args.qk_layernorm:
        found += _head_norms(keys, layer, names, ("q_layernorm", "k_layernorm"), d)
    return found


def _multi_latent(args: Namespace, keys: Keys, layer: int, names: str) -> list[Unit]:
    heads, hidden, q_rank, kv_rank = args.num_attention_heads, args.hidden_size, args.q_lora_rank, args.kv_lora_rank
    query, rotated = heads * (args.qk_head_dim + args.qk_pos_emb_head_dim), args.qk_pos_emb_head_dim
    sizes = {
        "kv_a_proj_with_mqa": ("linear_kv_down_proj", (kv_rank + rotated, hidden)),
        "kv_a_layernorm": ("kv_layernorm", (kv_rank,)),
        "kv_b_proj": ("linear_kv_up_proj", (heads * (args.qk_head_dim + args.v_head_dim), kv_rank)),
        "dense": ("linear_proj", (hidden, heads * args.v_head_dim)),
    }
    if q_rank is None:
        sizes["q_proj"] = "linear_q_proj", (query, hidden)
    else:
        sizes["q_a_proj"] = "linear_q_down_proj", (q_rank, hidden)
        sizes["q_a_layernorm"] = "q_layernorm", (q_rank,)
        sizes["q_b_proj"] = "linear_q_up_proj", (query, q_rank)
    return [
        same(f"{names}{theirs}.weight", keys.layer(layer, f"self_attention.{ours}.weight", *shape))
        for theirs, (ours, shape) in sizes.items()
    ]


def _expert_units(args: Namespace, keys: Keys, layer: int, names: str) -> list[Unit]:
    experts, hidden, shared = args.num_experts, args.hidden_size, args.moe_shared_expert_intermediate_size
    found = [same(f"{names}gate.weight", keys.layer(layer, "mlp.router.weight", experts, hidden))]
    if args.moe_router_enable_expert_bias:
        found.append(same(f"{names}gate.expert_bias", keys.layer(layer, "mlp.router.expert_bias", experts)))
    for expert in range(experts):
        pair = [
            keys.expert(layer, f"mlp.experts.experts.linear_fc{n}.weight", expert, experts, *shape)
            for n, shape in _mlp(args.moe_ffn_hidden_size, hidden)
        ]
        found += gated(f"{names}experts.{expert}.", pair[0], pair[1])
    if shared:
        pair = [
            keys.layer(layer, f"mlp.shared_experts.linear_fc{n}.weight", *shape) for n, shape in _mlp(shared, hidden)
        ]
        found += gated(f"{names}shared_experts.", pair[0], pair[1])
    return found


def tiny(config: Config) -> Config:
    """See ``family.Family``: one group of layers, 16 experts in 4 groups, heads of 16."""
    small = dict(
        num_hidden_layers=config["layer_group_size"], hidden_size=64, num_attention_heads=4, head_dim=16,
        intermediate_size=96, vocab_size=256, max_position_embeddings=2048, group_norm_size=2,
    )  # fmt: skip
    if config.get("kv_lora_rank"):
        small |= dict(num_key_value_heads=4, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
        small |= dict(q_lora_rank=24) if config.get("q_lora_rank") else {}
    else:
        small |= dict(num_key_value_heads=2)
    if config.get("num_experts"):
        small |= dict(
            num_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, moe_intermediate_size=32,
            moe_shared_expert_intermediate_size=32, first_k_dense_replace=1,
        )  # fmt: skip
    return config | small
