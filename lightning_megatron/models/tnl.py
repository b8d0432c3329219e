"""TransNormerLLM, the model of the Lightning Attention papers.

Block (arXiv 2307.14995; OpenNLPLab's modeling_transnormer): x += out_proj(u * SRMS(LA(silu(q), silu(k), v)));
x += l3(l1(n) * l2(n)), n = SRMS(x), where SRMS is RMSNorm without a weight, over all heads in the attention. The first
layers turn q and k by learnt angles (LRPE). Embeddings are multiplied by sqrt(hidden size).
"""

from __future__ import annotations

import math
from argparse import Namespace

from .family import COMMON, Config, Fields, Flags, pattern
from .units import Keys, Part, Unit, grouped, joined, same, vocabulary

NAME = "tnl"
_NORM_EPS = 1e-6  # of OpenNLPLab's SimpleRMSNorm
_FREE = ("add_bos_token", "init_std", "linear_use_lrpe")


def claims(config: Config) -> bool:
    """See ``family.Family``."""
    return str(config.get("model_type")).lower() in ("transnormer", "transnormerllm")


def flags(config: Config) -> Flags:
    """See ``family.Family``."""
    fields = Fields(config, _FREE)
    layers, heads, hidden = (
        fields.need(name) for name in ("decoder_layers", "decoder_attention_heads", "decoder_embed_dim")
    )
    fields.only("norm_type", "simplermsnorm")
    fields.only("bias", False)
    fields.only("linear_act_fun", "silu", "swish")
    inner = fields.get("hidden_dim", hidden)
    if inner % heads:
        raise ValueError(f"config.json: hidden_dim {inner} is no multiple of decoder_attention_heads {heads}")
    glu = fields.get("glu_dim", hidden)
    lrpe = [bool(used) for used in fields.get("linear_use_lrpe_list") or [False] * layers]
    first = lrpe.index(False) if False in lrpe else len(lrpe)
    if len(lrpe) != layers or any(lrpe[first:]):
        raise ValueError(
            f"config.json: linear_use_lrpe_list {fields.get('linear_use_lrpe_list')!r} must have an entry for each of "
            f"{layers} layers, of which the first ones are 1 and all others 0"
        )
    if first and inner != hidden:
        raise ValueError(f"config.json: hidden_dim {inner} must be decoder_embed_dim {hidden} beside LRPE")
    found: Flags = dict(
        num_layers=layers, hidden_size=hidden, num_attention_heads=heads, kv_channels=inner // heads,
        ffn_hidden_size=hidden if glu == -1 else glu, vocab_size=fields.need("vocab_size"),
        max_position_embeddings=fields.get("max_position_embeddings", 8192), norm_epsilon=_NORM_EPS,
        linear_attention_freq=pattern([1] * layers), **COMMON, position_embedding_type="none",
        untie_embeddings_and_output_weights=not fields.get("tie_word_embeddings", True),  # transformers' default
        lightning_decay="tnl", lightning_feature_map="silu", lightning_scale=1.0, lightning_norm="all",
        lightning_norm_affine=False, lightning_gate="linear", lightning_layernorm_affine=False,
        lightning_bilinear_glu=True, lightning_lrpe_layers=first or None,
        lightning_embedding_scale=None if fields.get("no_scale_embedding", False) else math.sqrt(hidden),
    )  # fmt: skip
    fields.warn_of_others()
    return found


def config(args: Namespace) -> Config:
    """See ``family.Family``."""
    return dict(
        architectures=["TransnormerForCausalLM"], model_type="transnormer",
        vocab_size=args.vocab_size or args.padded_vocab_size, decoder_embed_dim=args.hidden_size,
        decoder_layers=args.num_layers, decoder_attention_heads=args.num_attention_heads,
        hidden_dim=args.num_attention_heads * args.kv_channels, glu_dim=args.ffn_hidden_size, bias=False,
        linear_act_fun="silu", norm_type="simplermsnorm", max_position_embeddings=args.max_position_embeddings,
        linear_use_lrpe_list=[int(layer < args.lightning_lrpe_layers) for layer in range(args.num_layers)],
        no_scale_embedding=args.lightning_embedding_scale == 1.0,
        tie_word_embeddings=not args.untie_embeddings_and_output_weights,
    )  # fmt: skip


def units(args: Namespace, config: Config) -> list[Unit]:
    """See ``family.Family``."""
    stacked = args.linear_attention_freq is None and not args.lightning_lrpe_layers
    keys, hidden, inner = Keys(args.num_layers, stacked), args.hidden_size, args.ffn_hidden_size
    heads, d = args.num_attention_heads, args.kv_channels
    found = vocabulary(args, "model.embed_tokens.weight", config["vocab_size"], final_norm=None)
    for layer in range(args.num_layers):
        mixer, mlp = f"model.layers.{layer}.token_mixer.", f"model.layers.{layer}.channel_mixer."
        qkv = keys.layer(layer, "self_attention.linear_qkv.weight", heads * 4 * d, hidden)
        proj = keys.layer(layer, "self_attention.linear_proj.weight", hidden, heads * d)
        fc1 = keys.layer(layer, "mlp.linear_fc1.weight", 2 * inner, hidden)
        found += [
            grouped([Part(f"{mixer}qkvu_proj.weight", (d, d, d, d))], qkv, heads, (0, 3, 1, 2)),
            same(f"{mixer}out_proj.weight", proj),
            joined([f"{mlp}l1.weight", f"{mlp}l2.weight"], fc1, [inner, inner]),
            same(f"{mlp}l3.weight", keys.layer(layer, "mlp.linear_fc2.weight", hidden, inner)),
        ]
        if layer < args.lightning_lrpe_layers:
            theta = keys.layer(layer, "self_attention.lrpe.theta", heads, d)
            found.append(same(f"{mixer}lrpe.theta", theta, (heads, 1, d)))
    return found


def tiny(config: Config) -> Config:
    """See ``family.Family``: 3 layers, heads of 16."""
    used = (config.get("linear_use_lrpe_list") or [0])[:1]
    return config | dict(
        decoder_layers=3, decoder_embed_dim=64, decoder_attention_heads=4, hidden_dim=64, glu_dim=96, vocab_size=256,
        max_position_embeddings=2048, linear_use_lrpe_list=[*used, 0, 0],
    )  # fmt: skip
