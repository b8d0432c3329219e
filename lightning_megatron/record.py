"""What function a model computes, as plain values: saved with every checkpoint, and compared when one is loaded.

Weights do not tell decay, scale, activation or epsilon, and with equal projection shapes not even which layers are
lightning. ``runtime.prepare`` puts ``function_record`` into Megatron's args, which Megatron saves; ``resume`` compares
it on loading. A program of your own, which has no such args, saves the record with its checkpoint and calls
``differences`` itself::

    record = function_record(config, options, args)  # plain values: torch.save and json take them
    for flag, saved, now in differences(saved_record, record):
        ...

``ROWS`` is the table of what is compared. What changes no function is not in it: parallel sizes, backends, fusions,
precision, recomputation, dropout and other noise, batch, loss terms and learning rate. What checkpoints without a
record tell is in saved.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

from . import __version__
from .config import (
    RESIDUAL_FACTORS,
    LightningOptions,
    expert_pattern,
    flag_of,
    lightning_depths,
    lightning_pattern,
    mtp_pattern,
    resolve_shape,
)
from .decay import log_decay

FORMAT = 1
ATTRIBUTE = "lightning_function"  # of Megatron's args
FREE_OPTIONS = (  # other ways to the same numbers
    "backend", "cp_exchange", "cp_keep_states", "recompute_qkv", "recompute_chunk", "offload_activations", "log_norms",
    "peak_tflops", "checksums",
)  # fmt: skip
ROWS_OF_VOCABULARY = (
    "--padded-vocab-size (default: by vocabulary, --make-vocab-size-divisible-by and tensor-parallel size)"
)
ROPE = ("rope", "mrope", "yarn")


class _Unknown(Exception):
    """A value that neither config nor args hold."""


class Model:
    """Where the values of one model are read from: the config, then Megatron's args; either may be None."""

    options: Any  # LightningOptions and LightningShape, which rows of lightning layers read; None if there are none
    shape: Any

    def __init__(self, config: Any, options: LightningOptions | None, args: Any):
        self.sources = [source for source in (config, args) if source is not None]
        self.options = options
        freq, layers = self.get("linear_attention_freq"), self.get("num_layers")
        self.pattern = lightning_pattern(freq, layers) if options else [False] * layers
        count = self.known("mtp_num_layers", None)
        self.ahead = mtp_pattern(count, options) if options else [False] * (count or 0)
        self.shape = resolve_shape(config, options, tp=1) if options else None

    def get(self, name: str) -> Any:
        for source in self.sources:
            if hasattr(source, name):
                return getattr(source, name)
        raise _Unknown(name)

    def known(self, name: str, otherwise: Any) -> Any:
        try:
            return self.get(name)
        except _Unknown:
            return otherwise

    # Which rows apply.

    def always(self) -> bool:
        return True

    def softmax(self) -> bool:
        return not all(self.pattern + self.ahead)

    def mtp(self) -> bool:
        return bool(self.ahead)

    def rope(self) -> bool:
        if self.latent():  # whatever GPTModel passes to its layers
            return True
        used = self.softmax() or bool(self.options and self.options.rope)
        return used and self.known("position_embedding_type", "rope") in ROPE

    def heads_of_softmax(self) -> bool:
        return self.softmax() and not self.latent()

    def latent(self) -> bool:
        return self.softmax() and bool(self.known("multi_latent_attention", False))

    def own_rope(self) -> bool:
        return bool(self.options and self.options.rope and self.known("multi_latent_attention", False))

    def experts(self) -> bool:
        return bool(self.known("num_moe_experts", None))

    def hybrid_model(self) -> bool:
        return bool(self.known("hybrid_layer_pattern", None))

    def lightning(self) -> bool:
        return self.options is not None

    def output_norm(self) -> bool:
        return self.shape is not None and self.shape.norm_groups > 0

    def any_lightning_norm(self) -> bool:
        return self.output_norm() or bool(self.options and self.options.qk_norm)


class Row(NamedTuple):
    """One compared value: its key in the record, the flag that sets it, where it matters, and how it is read.

    ``applies`` names a method of ``Model``. ``read`` None: the attribute ``key`` of the config or of the args.
    ``before``: what a record of lightning layers without this row stands for, because its version knew nothing else.
    """

    key: str
    flag: str
    applies: str = "always"
    read: Callable[[Model], Any] | None = None
    before: Any = None


def _decay(model: Model) -> list:
    """Preset, offset, and a digest of the values, which are what counts."""
    options, heads, layers = model.options, model.shape.num_heads, len(model.pattern)
    every = (
        log_decay(options.decay, heads, layer, layers, offset=options.decay_offset).tolist()
        for layer in lightning_depths(model.pattern, model.ahead[:1])
    )
    values = " ".join(f"{value:.5e}" for layer in every for value in layer)
    return [options.decay, options.decay_offset, hashlib.sha256(values.encode()).hexdigest()[:12]]


def _sublayers(model: Model) -> str:
    """Of HybridModel, without the bounds of pipeline stages."""
    return model.get("hybrid_layer_pattern").replace("|", "")


def _activation(model: Model) -> str:
    function = model.get("activation_func")
    name = function if isinstance(function, str) else getattr(function, "__name__", repr(function))
    return f"gated {name}" if model.get("gated_linear_unit") else name


def _position_embedding(model: Model) -> str:
    """Rotary embeddings count only where a layer applies those of GPTModel, which multi-latent attention does not."""
    kind = model.get("position_embedding_type")
    applied = model.rope() and not model.known("multi_latent_attention", False)
    return "none" if kind in ROPE and not applied else kind


def _mup(model: Model) -> list | None:
    used = model.get("use_mup")
    return [model.get("mup_embedding_mult"), model.get("mup_output_mult")] if used else None


def _window_layers(model: Model) -> Any:
    return model.get("window_attn_skip_freq") if model.get("window_size") else None


def _no_rope(model: Model) -> list | None:
    """1 for every layer without rotary embedding, as TransformerConfig expands a number."""
    freq, layers = model.get("no_rope_freq"), len(model.pattern)
    return [int((layer + 1) % freq == 0) for layer in range(layers)] if isinstance(freq, int) and freq else freq or None


def _yarn(model: Model) -> list | None:
    names = (
        "rotary_scaling_factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "correction_range_round_to_int",
    )  # fmt: skip
    yarn = model.get("position_embedding_type") == "yarn"
    return [model.get(f"yarn_{name}") for name in names] if yarn else None


def _latent_yarn(model: Model) -> list | None:
    names = (
        "rotary_scaling_factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim",
    )  # fmt: skip
    return [model.get(name) for name in names] if model.get("rope_type") == "yarn" else None


def _expert_layers(model: Model) -> list[int]:
    experts = expert_pattern(model.get("moe_layer_freq"), len(model.pattern), model.get("num_moe_experts"))
    return [int(x) for x in experts]


def _chosen_by(name: str) -> Callable[[Model], bool]:
    """Whether this kind of balancing chooses the experts; most kinds are terms of the loss."""
    return lambda model: model.get("moe_router_load_balancing_type") == name


def _dropped(model: Model) -> str | None:
    return model.get("moe_token_drop_policy") if model.get("moe_expert_capacity_factor") else None


def _option(name: str, before: Any) -> Row:
    return Row(name, flag_of("lightning_" + name), "lightning", lambda m: getattr(m.options, name), before)


# fmt: off
ROWS = (
    Row("layers", "--linear-attention-freq", read=lambda m: "".join("L" if x else "s" for x in m.pattern)),
    Row("hybrid_layer_pattern", "--hybrid-layer-pattern", "hybrid_model", _sublayers),
    Row("decay", "--lightning-decay, --lightning-decay-offset", "lightning", _decay),
    Row("feature_map", "--lightning-feature-map", "lightning", lambda m: m.options.feature_map),
    Row("kv_heads", "--lightning-num-kv-heads", "lightning", lambda m: m.shape.num_kv_heads),
    Row("key_dim", "--lightning-key-head-dim", "lightning", lambda m: m.shape.key_dim),
    Row("value_dim", "--lightning-value-head-dim", "lightning", lambda m: m.shape.value_dim),
    Row("scale", "--lightning-scale", "lightning",
        lambda m: m.shape.key_dim**-0.5 if m.options.scale is None else m.options.scale),
    Row("rope", "--lightning-rope", "lightning", lambda m: m.options.rope),
    Row("qk_norm", "--lightning-qk-norm", "lightning", lambda m: m.options.qk_norm),
    Row("norm_groups", "--lightning-norm, --lightning-norm-groups", "lightning", lambda m: m.shape.norm_groups),
    Row("norm_affine", "--lightning-norm-affine", "output_norm", lambda m: m.options.norm_affine),
    Row("norm_eps", "--lightning-norm-eps (default --norm-epsilon)", "any_lightning_norm",
        lambda m: m.get("layernorm_epsilon") if m.options.norm_eps is None else m.options.norm_eps),
    Row("gate", "--lightning-gate", "lightning", lambda m: m.options.gate),
    _option("lrpe_layers", before=0),
    *(_option(name, before=1.0) for name in RESIDUAL_FACTORS),
    _option("layernorm_affine", before=True),
    _option("bilinear_glu", before=False),
    _option("embedding_scale", before=1.0),
    Row("num_attention_heads", "--num-attention-heads"),
    Row("padded_vocab_size", ROWS_OF_VOCABULARY,
        read=lambda m: m.get("padded_vocab_size") or m.get("vocab_size")),
    Row("normalization", "--normalization"),
    Row("layernorm_epsilon", "--norm-epsilon"),
    Row("layernorm_zero_centered_gamma", "--apply-layernorm-1p"),
    Row("activation", "--swiglu, --squared-relu, --quick-geglu", read=_activation),
    Row("activation_func_clamp_value", "--activation-func-clamp-value"),
    Row("glu_linear_offset", "--glu-linear-offset"),
    Row("add_bias_linear", "--disable-bias-linear"),
    Row("add_qkv_bias", "--add-qkv-bias"),
    Row("apply_residual_connection_post_layernorm", "--apply-residual-connection-post-layernorm"),
    Row("untie_embeddings_and_output_weights", "--untie-embeddings-and-output-weights"),
    Row("mup", "--use-mup, --mup-embedding-mult, --mup-output-mult, --mup-base-hidden-size", read=_mup),
    Row("mtp_num_layers", "--mtp-num-layers", read=lambda m: m.get("mtp_num_layers") or None),
    Row("mtp_attention", "--lightning-mtp-attention", "mtp",
        lambda m: "lightning" if any(m.ahead) else "softmax", before="softmax"),
    Row("mtp_use_repeated_layer", "--mtp-use-repeated-layer",
        read=lambda m: bool(m.get("mtp_num_layers") and m.get("mtp_use_repeated_layer"))),
    Row("position_embedding_type", "--position-embedding-type", read=_position_embedding),
    Row("rotary_base", "--rotary-base", "rope"),
    Row("rotary_percent", "--rotary-percent", "rope"),
    Row("rotary_interleaved", "--rotary-interleaved", "rope"),
    Row("use_rope_scaling", "--use-rope-scaling", "rope"),
    Row("rotary_seq_len_interpolation_factor", "--rotary-seq-len-interpolation-factor", "rope"),
    Row("no_rope_freq", "--no-rope-freq", "rope", _no_rope),
    Row("mrope_section", "--mrope-section", "rope"),
    Row("yarn", "--rotary-scaling-factor, --yarn-..., --mscale, --mscale-all-dim", "rope", _yarn),
    Row("lightning_rotary_percent", "--lightning-rotary-percent (default: --rotary-percent)", "own_rope",
        lambda m: m.get("rotary_percent") if m.options.rotary_percent is None else m.options.rotary_percent),
    Row("multi_latent_attention", "--multi-latent-attention", "softmax"),
    Row("q_lora_rank", "--q-lora-rank", "latent"),
    Row("kv_lora_rank", "--kv-lora-rank", "latent"),
    Row("qk_head_dim", "--qk-head-dim", "latent"),
    Row("qk_pos_emb_head_dim", "--qk-pos-emb-head-dim", "latent"),
    Row("v_head_dim", "--v-head-dim", "latent"),
    Row("rope_type", "--rope-type", "latent"),
    Row("latent_yarn", "--rotary-scaling-factor, --mscale, --mscale-all-dim, ...", "latent", _latent_yarn),
    Row("num_query_groups", "--num-query-groups", "heads_of_softmax"),
    Row("kv_channels", "--kv-channels", "heads_of_softmax"),
    Row("attention_output_gate", "--attention-output-gate", "softmax"),
    Row("qk_layernorm", "--qk-layernorm", "softmax"),
    Row("qk_l2_norm", "--qk-l2-norm", "softmax"),
    Row("softmax_scale", "--mup-base-head-dim, --mup-attn-scale-power", "heads_of_softmax"),
    Row("softmax_type", "--softmax-type", "softmax"),
    Row("window_size", "--window-size", "softmax"),
    Row("window_attn_skip_freq", "--window-attn-skip-freq", "softmax", _window_layers),
    Row("num_moe_experts", "--num-experts", read=lambda m: m.get("num_moe_experts") or None),
    Row("moe_layer_freq", "--moe-layer-freq", "experts", _expert_layers),
    Row("moe_router_topk", "--moe-router-topk", "experts"),
    Row("moe_router_score_function", "--moe-router-score-function", "experts"),
    Row("moe_router_pre_softmax", "--moe-router-pre-softmax", "experts"),
    Row("moe_router_num_groups", "--moe-router-num-groups", "experts"),
    Row("moe_router_group_topk", "--moe-router-group-topk", "experts"),
    Row("moe_router_topk_scaling_factor", "--moe-router-topk-scaling-factor", "experts"),
    Row("moe_router_enable_expert_bias", "--moe-router-enable-expert-bias", "experts"),
    Row("moe_router_force_load_balancing", "--moe-router-force-load-balancing", "experts"),
    Row("moe_router_force_biased", "--moe-router-force-biased", "experts"),
    Row("moe_sinkhorn", "--moe-router-load-balancing-type sinkhorn", "experts", _chosen_by("sinkhorn")),
    Row(
        "moe_quantile_balancing", "--moe-router-load-balancing-type quantile_balancing", "experts",
        _chosen_by("quantile_balancing"),
    ),
    Row("moe_expert_capacity_factor", "--moe-expert-capacity-factor", "experts"),
    Row("moe_expert_rank_capacity_factor", "--moe-expert-rank-capacity-factor", "experts"),
    Row("moe_token_drop_policy", "--moe-token-drop-policy", "experts", _dropped),
    Row("moe_apply_probs_on_input", "--moe-apply-probs-on-input", "experts"),
    Row("moe_latent_size", "--moe-latent-size", "experts"),
    Row("moe_shared_expert_intermediate_size", "--moe-shared-expert-intermediate-size", "experts"),
    Row("moe_shared_expert_gate", "--moe-shared-expert-gate", "experts"),
    Row("moe_mlp_glu_interleave_size", "--moe-mlp-glu-interleave-size", "experts"),
    Row("moe_shared_expert_glu_interleave_size", "--moe-shared-expert-glu-interleave-size", "experts"),
)
# fmt: on


def function_record(config: Any, options: LightningOptions, args: Any = None) -> dict[str, Any]:
    """The function of a model, as plain values.

    Args:
        config: Megatron's TransformerConfig.
        options: what the config does not say.
        args: what the config does not hold, as attributes: ``position_embedding_type``, ``rotary_base``,
            ``rotary_percent``, ``use_rope_scaling``, ``rotary_seq_len_interpolation_factor``, ``padded_vocab_size``
            and ``untie_embeddings_and_output_weights``. Megatron's args have them. What is missing is not recorded.

    Returns:
        ``format``; ``package``, our version; ``options``, all fields of LightningOptions as given; and ``values``, the
        rows of ``ROWS`` that matter to this model, defaults resolved: ``values["layers"]`` is ``"LLLs..."``, L for
        lightning.

    Raises:
        ValueError: options that do not fit the config.
    """
    model = Model(config, options, args)
    return {
        "format": FORMAT,
        "package": __version__,
        "options": dataclasses.asdict(options),
        "values": values_of(model),
    }


def values_of(model: Model) -> dict[str, Any]:
    """The rows that matter to a model, as plain values."""
    values = {}
    for row in ROWS:
        if getattr(model, row.applies)():
            try:
                values[row.key] = _plain(row.read(model) if row.read else model.get(row.key))
            except _Unknown:
                continue
    return values


def _plain(value: Any) -> Any:
    return [_plain(x) for x in value] if isinstance(value, (list, tuple)) else value


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What differs between two records: ``[(flag, saved value, present value), ...]``, in the order of ``ROWS``.

    A value that only one of the two holds is not compared, unless its row says what older records stand for.
    """
    older = {row.key: row.before for row in ROWS if row.before is not None}
    saved, now = ((older if record["options"] else {}) | record["values"] for record in (saved, now))
    return [
        (row.flag, saved[row.key], now[row.key])
        for row in ROWS
        if row.key in saved and row.key in now and not _equal(row.key, saved, now)
    ]


def _equal(key: str, saved: dict[str, Any], now: dict[str, Any]) -> bool:
    if key == "mtp_attention" and None in (saved.get("mtp_num_layers"), now.get("mtp_num_layers")):
        return True  # without any layer on one side
    if key == "decay":  # the digest is over lightning layers: where those differ, the difference is named already
        same_layers = all(saved.get(name) == now.get(name) for name in ("layers", "mtp_num_layers", "mtp_attention"))
        return saved[key][-1] == now[key][-1] if same_layers else saved[key][:-1] == now[key][:-1]
    return saved[key] == now[key]


def options_from_record(record: dict[str, Any]) -> LightningOptions:
    """The options of a record, maybe of another version: fields that this one does not know are left out."""
    names = {field.name for field in dataclasses.fields(LightningOptions)}
    return LightningOptions(**{name: value for name, value in record["options"].items() if name in names})


def options_from_args(args: Namespace) -> LightningOptions:
    """The options among parsed or saved args, ``lightning_x`` for field x.

    Args saved by an older version lack the newer fields, and those have their defaults.

    Raises:
        ValueError: values that do not go together.
    """
    names = [field.name for field in dataclasses.fields(LightningOptions)]
    held = vars(args)
    return LightningOptions(**{name: held["lightning_" + name] for name in names if "lightning_" + name in held})
