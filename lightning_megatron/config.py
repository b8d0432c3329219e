"""The options of a lightning layer and all validation of them. Imports nothing but the standard library."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

DECAY_PRESETS = ("tnl", "minimax", "bailing", "paper", "alibi", "none")
FEATURE_MAPS = ("silu", "silu-qkv", "none")
NORMS = ("head", "group", "all", "none")
GATES = ("none", "sigmoid", "linear")
KINDS = ("softmax", "lightning")
BACKENDS = ("auto", "triton", "torch")
RESIDUAL_FACTORS = ("attn_alpha", "attn_beta", "softmax_alpha", "softmax_beta", "mlp_alpha", "mlp_beta")
CP_EXCHANGES = ("auto", "direct", "all-gather", "ring", "pipelined", "scan")

# Megatron gives these a default even when nobody asked for them, so a plain config cannot tell "unset".
_MEGATRON_LINEAR_DEFAULTS = {
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
LINEAR_HEADS = (
    "it is Megatron's flag for gated delta net, whose value heads outnumber its key heads. A lightning layer has "
    "--num-attention-heads query heads; set the number of key/value heads with --lightning-num-kv-heads, or "
    "make_spec(num_kv_heads=...)"
)


def flag_of(attribute: str) -> str:
    """The flag that sets an attribute of Megatron's args."""
    return "--" + attribute.replace("_", "-")


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class LightningOptions:
    """What a lightning layer does beyond what Megatron's own TransformerConfig says.

    Field ``x`` is the flag ``--lightning-x`` of ``lightning_megatron.pretrain`` (underscores become dashes) and a
    keyword of ``lightning_megatron.spec.make_spec``. ``None`` means "follow Megatron's config".
    """

    decay: str = _option("tnl", "decay preset: the slope of every head in every layer", DECAY_PRESETS)
    decay_offset: int = _option(
        0, "added to the layer index in the decay formula (bailing follows Hugging Face; +1 gives vLLM's bailing)"
    )
    feature_map: str = _option(
        "silu", "activation before the operator: silu on q and k, silu-qkv on v as well, or none", FEATURE_MAPS
    )
    num_kv_heads: int | None = _option(
        None, "heads of k and v; must divide the query heads (default: as many as query heads)"
    )
    key_head_dim: int | None = _option(None, "K, the head dim of q and k (default: --kv-channels)")
    value_head_dim: int | None = _option(None, "V, the head dim of v and of the output (default: K)")
    scale: float | None = _option(None, "factor on q k^T (default: K^-0.5; TransNormerLLM and MiniMax use 1)")
    rope: bool = _option(False, "apply Megatron's rotary embedding to q and k of the lightning layers")
    rotary_percent: float | None = _option(
        None, "with --multi-latent-attention: the part of K that --lightning-rope turns (default: --rotary-percent)"
    )
    qk_norm: bool = _option(False, "RMSNorm per head on q and k, after the feature map")
    norm: str = _option("head", "RMS norm of the output: per head, per group, over all heads, or none", NORMS)
    norm_groups: int | None = _option(
        None, "with --lightning-norm group: the NUMBER of groups (Bailing's group_norm_size)"
    )
    norm_affine: bool = _option(True, "give the output norm a weight (TransNormerLLM's SRMS has none)")
    norm_eps: float | None = _option(None, "epsilon of q, k and output norms (default: --norm-epsilon)")
    gate: str = _option("sigmoid", "output gate: sigmoid(g) * o, g * o (linear), or none", GATES)
    lrpe_layers: int = _option(
        0, "the first N layers turn q and k by learnt angles (TransNormerLLM's LRPE), which doubles K in the operator"
    )
    attn_alpha: float = _option(1.0, "factor on the residual beside the attention of lightning layers (MiniMax)")
    attn_beta: float = _option(1.0, "factor on the output of the attention of lightning layers (MiniMax)")
    softmax_alpha: float = _option(1.0, "factor on the residual beside the attention of softmax layers (MiniMax)")
    softmax_beta: float = _option(1.0, "factor on the output of the attention of softmax layers (MiniMax)")
    mlp_alpha: float = _option(1.0, "factor on the residual beside the MLP of every layer (MiniMax)")
    mlp_beta: float = _option(1.0, "factor on the output of the MLP of every layer (MiniMax)")
    layernorm_affine: bool = _option(True, "give layer norms and the final norm a weight (TransNormerLLM's have none)")
    bilinear_glu: bool = _option(False, "with --swiglu: no activation, W3 (W1 x * W2 x) (TransNormerLLM)")
    embedding_scale: float = _option(1.0, "factor on the embeddings where they enter the first layer (TransNormerLLM)")
    mtp_attention: str = _option(
        "softmax",
        "attention of multi-token prediction layers (--mtp-num-layers); lightning ones decay as the last layer does",
        KINDS,
    )
    backend: str = _option(
        "auto", "implementation of the operator and around it; auto is triton on a GPU, torch elsewhere", BACKENDS
    )
    cp_exchange: str = _option(
        "auto",
        "how context-parallel ranks pass states: auto takes direct within a node, else the cheapest for so many ranks, "
        "ranks of a node and bytes",
        CP_EXCHANGES,
    )
    cp_keep_states: bool = _option(
        True,
        "with recompute, keep the incoming states of the first forward, so that context-parallel ranks exchange states "
        "once instead of twice",
    )
    recompute_qkv: bool = _option(
        False,
        "with selective recompute of core_attn, which in lightning layers is the operator with output norm and gate, "
        "also compute q and k of the lightning layers again, from the fused projection on",
    )
    recompute_chunk: int | None = _option(
        None,
        "with full recompute, compute a layer again in chunks of so many tokens, so that no tensor inside of it is "
        "longer: lightning layers whole; softmax layers, and all layers with context parallelism, their MLPs (default: "
        "one chunk)",
    )
    offload_activations: bool = _option(
        False,
        "with full recompute, keep the inputs of layers in pinned host memory between forward and backward: 2 bytes x "
        "hidden size x tokens x layers of a GPU",
    )
    log_norms: bool = _option(
        False,
        "write norms of states and of gradients of every lightning layer to TensorBoard, each "
        "--tensorboard-log-interval steps; with context parallelism it needs the final states, which take longer",
    )
    peak_tflops: float | None = _option(
        None, "dense peak of a GPU, of which --log-throughput shows the share (MFU; default: bf16, by the card's name)"
    )
    checksums: bool = _option(
        True,
        "compare the checksums of a checkpoint before it is loaded, which reads every file once more; without, only "
        "that files are there and long enough is checked, and altered bytes load without a word",
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            choices, value = field.metadata["choices"], getattr(self, field.name)
            if choices is not None and value not in choices:
                raise ValueError(f"lightning {field.name}={value!r} is unknown; choose one of {', '.join(choices)}")
        for name in ("num_kv_heads", "key_head_dim", "value_head_dim", "norm_groups", "recompute_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"lightning {name}={value} must be at least 1, or left out")
        if self.scale is not None and not math.isfinite(self.scale):
            raise ValueError(f"lightning scale={self.scale} must be a finite number, or left out for K^-0.5")
        for name in (*RESIDUAL_FACTORS, "embedding_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"lightning {name}={getattr(self, name)} must be a finite number, or left out for 1")
        if self.lrpe_layers < 0:
            raise ValueError(f"lightning lrpe_layers={self.lrpe_layers} must be at least 0, a number of layers")
        if self.lrpe_layers and self.num_kv_heads is not None:
            raise ValueError(
                f"lightning lrpe_layers={self.lrpe_layers} has angles for every head, and num_kv_heads="
                f"{self.num_kv_heads} shares keys between heads; leave one of them out"
            )
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise ValueError(f"lightning peak_tflops={self.peak_tflops} must be above 0, in TFLOP/s")
        if self.norm_eps is not None and not 0 <= self.norm_eps < math.inf:
            raise ValueError(f"lightning norm_eps={self.norm_eps} must be at least 0, or left out for --norm-epsilon")
        if self.rotary_percent is not None and not 0 < self.rotary_percent <= 1:
            raise ValueError(f"lightning rotary_percent={self.rotary_percent} must be above 0 and at most 1")
        if self.rotary_percent is not None and not self.rope:
            raise ValueError(
                f"lightning rotary_percent={self.rotary_percent} has no meaning without rope; use rope=True, or leave "
                "rotary_percent out"
            )
        if self.norm == "group" and self.norm_groups is None:
            raise ValueError(
                "lightning norm='group' needs norm_groups, the number of groups the heads are divided into"
            )
        if self.norm != "group" and self.norm_groups is not None:
            raise ValueError(
                f"lightning norm_groups={self.norm_groups} has no meaning with norm={self.norm!r}; "
                "use norm='group' or leave norm_groups out"
            )


@dataclass(frozen=True)
class LightningShape:
    """Sizes of one lightning layer, whole and on one tensor-parallel rank, after all checks."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    norm_groups: int  # 0 where there is no norm
    gated: bool
    tp: int

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one k and v."""
        return self.num_heads // self.num_kv_heads

    @property
    def group_dims(self) -> tuple[int, int, int, int]:
        """Columns of one key/value head in the fused projection: q, gate, k, v. A TP slice is whole such groups."""
        g = self.heads_per_group
        return g * self.key_dim, g * self.value_dim if self.gated else 0, self.key_dim, self.value_dim

    @property
    def projection_dim(self) -> int:
        return self.num_kv_heads * sum(self.group_dims)

    @property
    def output_dim(self) -> int:
        return self.num_heads * self.value_dim


def resolve_shape(config: Any, options: LightningOptions, tp: int) -> LightningShape:
    """Sizes of a lightning layer from Megatron's ``TransformerConfig`` and our options.

    Raises:
        ValueError: heads, groups or head dims that cannot be divided as asked, or Megatron flags of other linear
            layers (``--linear-num-key-heads`` ...) that a lightning layer would otherwise ignore.
    """
    for name in ("linear_num_key_heads", "linear_num_value_heads"):
        value = getattr(config, name, None)
        if value not in (None, _MEGATRON_LINEAR_DEFAULTS[name]):
            raise ValueError(f"--{name.replace('_', '-')} {value} is refused: {LINEAR_HEADS}")

    def dim(option: int | None, megatron_name: str, fallback: int) -> int:
        if option is not None:  # flags/warned.py says so in the log where the flag has another value
            return option
        value = getattr(config, megatron_name, None)
        return fallback if value in (None, _MEGATRON_LINEAR_DEFAULTS[megatron_name]) else value

    heads = config.num_attention_heads
    kv_heads = options.num_kv_heads or heads
    key_dim = dim(options.key_head_dim, "linear_key_head_dim", config.kv_channels)
    value_dim = dim(options.value_head_dim, "linear_value_head_dim", key_dim)
    if heads % kv_heads:
        raise ValueError(
            f"{heads} query heads cannot share {kv_heads} key/value heads: the second must divide the first; give "
            "--lightning-num-kv-heads, or make_spec(num_kv_heads=...), another number"
        )
    if kv_heads % tp:
        raise ValueError(
            f"{kv_heads} key/value heads cannot be split over tensor-parallel size {tp}; use a "
            "--tensor-model-parallel-size that divides them, or more key/value heads"
        )
    if options.lrpe_layers and key_dim > 128:
        raise ValueError(
            f"lrpe_layers={options.lrpe_layers} doubles the head dim of q and k, and {key_dim} would be more than the "
            "256 that the operator takes; use --lightning-key-head-dim 128 or less"
        )
    if options.lrpe_layers and options.lrpe_layers > config.num_layers:
        raise ValueError(
            f"lrpe_layers={options.lrpe_layers} is above the {config.num_layers} layers of the model: give fewer"
        )
    groups = {"head": heads, "group": options.norm_groups, "all": 1, "none": 0}[options.norm]
    assert groups is not None
    if groups and heads % groups:
        raise ValueError(f"norm_groups={groups} must divide the {heads} heads; give another number")
    if groups > 1 and groups % tp:
        raise ValueError(
            f"norm_groups={groups} must be divisible by tensor-parallel size {tp}, so that every group lives on one "
            "rank; use norm='all' for one group over all ranks"
        )
    return LightningShape(heads, kv_heads, key_dim, value_dim, groups, options.gate != "none", tp)


def check_latent_sizes(config: Any) -> None:
    """Refuse sizes of multi-latent attention that cannot be built or split.

    Raises:
        ValueError: naming flag, value and what is allowed.
    """
    if not hasattr(config, "kv_lora_rank"):
        raise ValueError(
            f"multi_latent_attention=True needs the fields of Megatron's MLATransformerConfig, got "
            f"{type(config).__name__}; build the config as MLATransformerConfig"
        )
    if config.rope_type not in ("rope", "yarn"):
        raise ValueError(f"--rope-type {config.rope_type} is unknown; choose rope or yarn")
    for name in ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"):
        value, flag = getattr(config, name), flag_of(name)
        if value is None and name == "q_lora_rank":
            continue
        if value is None or value < 1:
            raise ValueError(f"{flag} {value} must be at least 1")
    if config.qk_pos_emb_head_dim % 2:
        raise ValueError(f"--qk-pos-emb-head-dim {config.qk_pos_emb_head_dim} must be even: channels turn in pairs")
    tp = config.tensor_model_parallel_size
    if config.transformer_impl == "local":
        both = config.kv_lora_rank + config.qk_pos_emb_head_dim
        for flag, value in (
            ("--q-lora-rank", config.q_lora_rank or 0), ("--kv-lora-rank plus --qk-pos-emb-head-dim", both),
        ):  # fmt: skip
            if value % tp:
                raise ValueError(
                    f"{flag} is {value}, which tensor-parallel size {tp} does not divide; use a "
                    "--tensor-model-parallel-size that does, or other sizes"
                )


def mark_parts(weight: Any, shape: LightningShape) -> None:
    """Say on a fused projection's weight which rows are q, gate, k and v, where Megatron's Muon looks for it.

    Muon then takes each of them as a matrix of its own, unless ``--muon-no-split-qkv`` is given.

    Args:
        weight: ``[rows, hidden_size]`` of this rank; None of a layer of the caller's own, which is left alone.
    """
    if weight is not None:
        weight.is_qkv, weight.qkv_split_shapes = True, [rows for rows in shape.group_dims if rows]


def cut_as_softmax(config: Any, options: LightningOptions) -> bool:
    """Whether Megatron's Muon would cut the projections of lightning layers in wrong places.

    It cuts every ``linear_qkv`` as softmax layers have theirs, wherever the number of rows allows that, and forgets
    what ``mark_parts`` wrote. That is right where lightning layers have the same parts.
    """
    queries = config.num_attention_heads // config.num_query_groups * config.kv_channels
    cut = [queries] * (1 + bool(config.attention_output_gate)) + [config.kv_channels] * 2
    shape = resolve_shape(config, options, tp=1)
    same = [rows for rows in shape.group_dims if rows] == cut
    return not same and shape.projection_dim // config.tensor_model_parallel_size % sum(cut) == 0


def lightning_pattern(freq: int | list[int] | None, num_layers: int) -> list[bool]:
    """Which layers are lightning, from Megatron's ``--linear-attention-freq``.

    Args:
        freq: None for every layer; N for one softmax layer after N-1 lightning layers; or one 0 or 1 per layer.
        num_layers: layers of the whole model, over all pipeline stages.

    Raises:
        ValueError: N below 2 or above num_layers, a list of another length, or values other than 0 and 1.
    """
    if freq is None:
        return [True] * num_layers
    if isinstance(freq, bool) or not isinstance(freq, (int, list, tuple)):
        raise ValueError(f"--linear-attention-freq {freq!r} must be a whole number or a list such as ([1]*7+[0])*4")
    if isinstance(freq, int):
        if freq < 2:
            raise ValueError(
                f"--linear-attention-freq {freq} would leave no lightning layer; leave the flag out for all-lightning, "
                "or give N >= 2 for one softmax layer in every N"
            )
        if freq > num_layers:
            raise ValueError(
                f"--linear-attention-freq {freq} would leave no softmax layer, because --num-layers is {num_layers}; "
                f"leave the flag out for all-lightning, or give at most {num_layers}"
            )
        return [(layer + 1) % freq != 0 for layer in range(num_layers)]
    if len(freq) != num_layers:
        raise ValueError(
            f"--linear-attention-freq lists {len(freq)} layers, but --num-layers is {num_layers}: give one entry "
            "a layer"
        )
    if any(entry not in (0, 1) for entry in freq):
        raise ValueError(f"--linear-attention-freq {list(freq)} may hold only 1 (lightning) and 0 (softmax)")
    return [bool(entry) for entry in freq]


def mtp_pattern(count: int | None, options: LightningOptions) -> list[bool]:
    """Which layers of multi-token prediction (``--mtp-num-layers``) are lightning: all or none of them."""
    return [options.mtp_attention == "lightning"] * (count or 0)


def lightning_depths(pattern: list[bool], ahead: list[bool]) -> list[int]:
    """Of every lightning layer the index, from 0, that its decay follows from.

    ``pattern`` of the model, ``ahead`` of its layers of multi-token prediction, which decay as the last layer does.
    """
    return [layer for layer, lightning in enumerate(pattern) if lightning] + [len(pattern) - 1] * sum(ahead)


def expert_pattern(freq: int | list[int], num_layers: int, experts: int | None) -> list[bool]:
    """Which layers have experts in place of a dense MLP, from Megatron's ``--moe-layer-freq``."""
    if not experts:
        return [False] * num_layers
    return [layer % freq == 0 for layer in range(num_layers)] if isinstance(freq, int) else [bool(x) for x in freq]


_PREPARED = "_lightning_prepared"  # an attribute of the config itself, so that it lives as long as that


def recomputes(config: Any, module: str) -> bool:
    """Whether selective recompute leaves out what ``module``, a name of ``--recompute-modules``, keeps."""
    return config.recompute_granularity == "selective" and module in (config.recompute_modules or ())


def facts(config: Any) -> dict[str, Any]:
    """The numbers, names and lists of a config, to see whether another has the same."""
    plain = (bool, int, float, str, list, type(None))
    return {name: copy.copy(value) for name, value in vars(config).items() if isinstance(value, plain)}


def mark_prepared(config: Any, what: tuple) -> None:
    """``runtime.prepare`` has been called with ``what`` for this config."""
    setattr(config, _PREPARED, what)


def prepared_with(config: Any) -> tuple | None:
    """What ``runtime.prepare`` was last called with for this config."""
    return getattr(config, _PREPARED, None)


def has_softmax_layers(config: Any) -> bool:
    """Whether some layer of the model, on any pipeline stage, keeps keys and values when it generates.

    Of HybridModel, whose config does not say it, what it was prepared with does.
    """
    prepared = prepared_with(config)
    held = vars(config) if prepared is None else prepared[2]
    return not all(lightning_pattern(held["linear_attention_freq"], held["num_layers"]))
