"""MiniMax-Text-01 and M1: lightning and softmax layers, experts, and the normalised input as the residual.

Block (arXiv 2501.08313; transformers, models/minimax): n = RMSNorm(x); y = alpha n + beta attention(n); n = RMSNorm(y);
z = alpha n + beta experts(n). Lightning attention: SiLU of q, k and v -> linear attention, scale 1 -> RMSNorm over all
heads, epsilon 1e-6 -> * sigmoid(gate) -> projection; no rotary embedding.
"""

from __future__ import annotations

from argparse import Namespace

import torch

from ..config import RESIDUAL_FACTORS, lightning_pattern
from .family import (
    COMMON,
    Config,
    Fields,
    Flags,
    check_chosen,
    check_lightning,
    check_rotated,
    groups_of,
    pattern,
    rotary,
)
from .units import Keys, Named, Part, Unit, grouped, joined, layer_norms, same, vocabulary

NAME = "minimax"
_NORM_EPS = 1e-6  # of the output norm, whatever the config's
_FREE = ("block_size", "router_jitter_noise", "attn_type_list", "layer_types")
# factor -> its fields in transformers and in the original checkpoints
_FACTORS = {
    "attn_alpha": ("linear_attn_alpha_factor", "layernorm_linear_attention_alpha"),
    "attn_beta": ("linear_attn_beta_factor", "layernorm_linear_attention_beta"),
    "softmax_alpha": ("full_attn_alpha_factor", "layernorm_full_attention_alpha"),
    "softmax_beta": ("full_attn_beta_factor", "layernorm_full_attention_beta"),
    "mlp_alpha": ("mlp_alpha_factor", "layernorm_mlp_alpha"),
    "mlp_beta": ("mlp_beta_factor", "layernorm_mlp_beta"),
}
assert tuple(_FACTORS) == RESIDUAL_FACTORS


def claims(config: Config) -> bool:
    """See ``family.Family``."""
    kind = str(config.get("model_type")).lower()
    if kind == "minimax_m2":
        raise ValueError("config.json: model_type 'minimax_m2': MiniMax-M2 has softmax attention in every layer")
    return kind in ("minimax", "minimax_text_01", "minimax_m1", "minimaxtext01", "minimaxm1")


def flags(config: Config) -> Flags:
    """See ``family.Family``."""
    fields = Fields(config, _FREE)
    layers, heads, hidden = (fields.need(name) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    dim = fields.get("head_dim", hidden // heads)
    fields.only("hidden_act", "silu")
    fields.only("sliding_window", None, why="and every softmax layer here sees all tokens")
    fields.only("attention_bias", False)
    fields.only("postnorm", True, why="and the residual of this family is the norm's output")
    shared = fields.get("shared_intermediate_size", 0)
    if shared not in (0, [0]):
        raise ValueError(f"config.json: shared_intermediate_size is {shared!r}: shared experts are not supported here")
    fields.get("shared_moe_mode")
    base, part = rotary(fields)
    rotated = fields.get("rotary_dim", dim)
    check_rotated(f"rotary_dim {rotated}", rotated, dim)
    percent = rotated / dim  # transformers' own port turns all channels
    if part not in (None, percent):
        raise ValueError(
            f"config.json: partial_rotary_factor is {part!r}, and rotary_dim {fields.get('rotary_dim')!r} says "
            f"{percent:g} of head_dim {dim}; say it with rotary_dim alone"
        )
    factors = {name: _factor(fields, *names) for name, names in _FACTORS.items()}
    found: Flags = dict(
        num_layers=layers, hidden_size=hidden, num_attention_heads=heads, kv_channels=dim,
        ffn_hidden_size=fields.need("intermediate_size"), vocab_size=fields.need("vocab_size"),
        max_position_embeddings=fields.get("max_position_embeddings", 131072), norm_epsilon=fields.need("rms_norm_eps"),
        linear_attention_freq=pattern(int(lightning) for lightning in _lightning_layers(config, layers)), **COMMON,
        untie_embeddings_and_output_weights=not fields.get("tie_word_embeddings", False),
        group_query_attention=True, num_query_groups=groups_of(fields, heads),
        position_embedding_type="rope", rotary_base=base,
        rotary_percent=percent, apply_residual_connection_post_layernorm=True,
        lightning_decay="minimax", lightning_feature_map="silu-qkv", lightning_scale=1.0, lightning_norm="all",
        lightning_norm_eps=_NORM_EPS, **{f"lightning_{name}": value for name, value in factors.items() if value != 1},
    )  # fmt: skip
    chosen = fields.need("num_experts_per_tok")
    check_chosen(chosen, fields.need("num_local_experts"), "num_local_experts")
    if chosen == 1:
        raise ValueError(
            "config.json: num_experts_per_tok is 1: the weights of a token's experts add up to 1 in this family, and "
            "Megatron refuses a router whose only weight is 1; it must be 2 or more"
        )
    found |= dict(
        num_experts=fields.need("num_local_experts"), moe_router_topk=chosen,
        moe_ffn_hidden_size=found["ffn_hidden_size"], moe_router_score_function="softmax", moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=config.get("router_aux_loss_coef", 0.001),
    )  # fmt: skip
    fields.warn_of_others()
    return found


def _factor(fields: Fields, ours: str, original: str) -> float:
    return float(fields.get(ours, fields.get(original, 1)))


def _lightning_layers(config: Config, layers: int) -> list[bool]:
    types = config.get("layer_types")
    if config.get("attn_type_list") is not None:
        first = ["full_attention" if kind else "linear_attention" for kind in config["attn_type_list"]]
        if types not in (None, first):
            raise ValueError("config.json: layer_types and attn_type_list contradict each other; give one of them")
        types = first
    if types is None:
        raise ValueError(
            "config.json: neither layer_types nor attn_type_list is given, and the default of transformers, every "
            "second layer, is that of no released model; add layer_types"
        )
    unknown = set(types) - {"full_attention", "linear_attention"}
    if unknown or len(types) != layers:
        raise ValueError(
            f"config.json: layer_types has {len(types)} entries for num_hidden_layers {layers}"
            + (f", and {', '.join(sorted(unknown))}" if unknown else "")
            + "; each must be full_attention or linear_attention"
        )
    lightning = [kind == "linear_attention" for kind in types]
    check_lightning(lightning, "layer_types (or attn_type_list)")
    return lightning


def config(args: Namespace) -> Config:
    """See ``family.Family``."""
    pattern = lightning_pattern(args.linear_attention_freq, args.num_layers)
    found: Config = dict(
        architectures=["MiniMaxForCausalLM"], model_type="minimax", hidden_act="silu",
        vocab_size=args.vocab_size or args.padded_vocab_size, hidden_size=args.hidden_size,
        intermediate_size=args.moe_ffn_hidden_size or args.ffn_hidden_size, num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_attention_heads, head_dim=args.kv_channels, rms_norm_eps=args.layernorm_epsilon,
        num_key_value_heads=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        max_position_embeddings=args.max_position_embeddings,
        rope_parameters=dict(rope_type="default", rope_theta=float(args.rotary_base)),
        tie_word_embeddings=not args.untie_embeddings_and_output_weights, sliding_window=None,
        layer_types=["linear_attention" if lightning else "full_attention" for lightning in pattern],
        num_local_experts=args.num_experts, num_experts_per_tok=args.moe_router_topk,
        **{names[0]: getattr(args, f"lightning_{name}") for name, names in _FACTORS.items()},
    )  # fmt: skip
    if args.rotary_percent != 1.0:
        found["rotary_dim"] = int(args.kv_channels * args.rotary_percent)
    return found


def units(args: Namespace, config: Config) -> list[Unit]:
    """See ``family.Family``. Names are those that transformers saves and reads."""
    keys, hidden = Keys(args.num_layers), args.hidden_size
    found = vocabulary(args, "model.embed_tokens.weight", config["vocab_size"])
    for layer, lightning in enumerate(lightning_pattern(args.linear_attention_freq, args.num_layers)):
        names = f"model.layers.{layer}."
        found += (_lightning if lightning else _softmax)(args, keys, layer, names + "self_attn.")
        found += [_decays(args, config, layer, names + "self_attn.")] * lightning
        found += layer_norms(keys, layer, names, hidden, before_qkv=True, dense=False)
        found += _experts(args, keys, layer, names + "block_sparse_moe.")
    return found


def _lightning(args: Namespace, keys: Keys, layer: int, names: str) -> list[Unit]:
    heads, d, hidden = args.num_attention_heads, args.kv_channels, args.hidden_size
    parts = [Part(f"{names}qkv_proj.weight", (d, d, d), by_group=True), Part(f"{names}output_gate.weight", (d,))]
    qkv = keys.layer(layer, "self_attention.linear_qkv.weight", heads * 4 * d, hidden)
    return [
        grouped(parts, qkv, heads, (0, 3, 1, 2)),
        same(f"{names}out_proj.weight", keys.layer(layer, "self_attention.linear_proj.weight", hidden, heads * d)),
        same(f"{names}norm.weight", keys.layer(layer, "self_attention.out_norm.weight", heads * d)),
    ]


def _decays(args: Namespace, config: Config, layer: int, names: str) -> Unit:
    """Buffers that transformers saves with a lightning layer, and would not make anew: dropped, and made again.

    They hold powers of the decay within a block, in the order of operations by which transformers rounds.
    """
    heads, block = args.num_attention_heads, config.get("block_size", 256)
    dtype = _dtype(config)
    shapes = {
        "slope_rate": (heads, 1, 1),
        "query_decay": (heads, block, 1),
        "key_decay": (heads, block, 1),
        "diagonal_decay": (1, heads, block, block),
    }

    def make(_) -> list[torch.Tensor]:
        depth = 1 - layer / (args.num_layers - 1 + 1e-5) + 1e-5
        rate = ((1 / 2 ** (8 / heads)) ** (torch.arange(heads) + 1) * depth)[:, None, None]
        place = torch.arange(block) + 1
        distance = rate * (place[:, None] - place)[None, None]
        diagonal = torch.where(distance >= 0, -distance, float("-inf")).exp()
        found = rate, (-rate * place[:, None]).exp(), (-rate * (block - place[:, None])).exp(), diagonal
        return [x.to(dtype) for x in found]

    hf = tuple(Named(names + name, shape, optional=True) for name, shape in shapes.items())
    return Unit(hf, (), lambda x: [], make)


def _dtype(config: Config) -> torch.dtype:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"config.json: dtype is {name!r}; it must be bfloat16, float16 or float32")
    return dtype


def _softmax(args: Namespace, keys: Keys, layer: int, names: str) -> list[Unit]:
    heads, d, hidden = args.num_attention_heads, args.kv_channels, args.hidden_size
    groups = args.num_query_groups if args.group_query_attention else heads
    parts = [Part(f"{names}{x}_proj.weight", (n,)) for x, n in (("q", heads // groups * d), ("k", d), ("v", d))]
    qkv = keys.layer(layer, "self_attention.linear_qkv.weight", (heads + 2 * groups) * d, hidden)
    return [
        grouped(parts, qkv, groups, (0, 1, 2)),
        same(f"{names}o_proj.weight", keys.layer(layer, "self_attention.linear_proj.weight", hidden, heads * d)),
    ]


def _experts(args: Namespace, keys: Keys, layer: int, names: str) -> list[Unit]:
    experts, hidden, inner = args.num_experts, args.hidden_size, args.moe_ffn_hidden_size
    found = [same(f"{names}gate.weight", keys.layer(layer, "mlp.router.weight", experts, hidden))]
    for expert in range(experts):
        theirs, ours = f"{names}experts.{expert}.", "mlp.experts.experts.linear_fc{}.weight"
        fc1 = keys.expert(layer, ours.format(1), expert, experts, 2 * inner, hidden)
        fc2 = keys.expert(layer, ours.format(2), expert, experts, hidden, inner)
        found.append(joined([f"{theirs}w1.weight", f"{theirs}w3.weight"], fc1, [inner, inner]))
        found.append(same(f"{theirs}w2.weight", fc2))
    return found


def tiny(config: Config) -> Config:
    """See ``family.Family``: one group of layers, 4 experts, heads of 16."""
    lightning = _lightning_layers(config, config["num_hidden_layers"])
    first = lightning.index(False) + 1
    types = ["linear_attention" if kind else "full_attention" for kind in lightning[:first]]
    small: Config = dict(
        num_hidden_layers=first, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=48, vocab_size=256, max_position_embeddings=2048, num_local_experts=4, layer_types=types,
    )  # fmt: skip
    if config.get("rotary_dim"):
        small["rotary_dim"] = 16 * config["rotary_dim"] // config["head_dim"]
    return {name: value for name, value in config.items() if name != "attn_type_list"} | small
