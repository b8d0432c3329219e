"""What the tests of mixer, norms, softmax layers and specs share: real layers on one or more ranks, and a fp64 judge.

`reference` is the mixer written from its formulas around the token-by-token operator; it takes all heads, whatever the
parallelism. Random parameters are drawn whole, and every rank takes its slice, so that one set of expected values
serves every layout. Functions named `run_...` or taking `rank, world` run inside `tests.launch.spawn`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from lightning_megatron.config import LightningOptions
from lightning_megatron.mixer import LightningAttention, LightningAttentionSubmodules
from lightning_megatron.ops.reference import recurrent_lightning_attn

ROTARY_BASE = 10000
SIZES = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "kv_channels": 16}


@dataclass(frozen=True)
class Variant:
    """One choice of options, and what belongs to it in Megatron's config; ``layer`` is the 1-based layer number."""

    options: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    layer: int = 2
    rotary_percent: float = 1.0

    @property
    def values(self) -> LightningOptions:
        return LightningOptions(**self.options)

    def replace(self, **changes) -> Variant:
        return dataclasses.replace(self, **changes)


# ---- Megatron ----------------------------------------------------------------------------------------------------


PLAIN = dict(
    normalization="RMSNorm", layernorm_epsilon=1e-3, add_bias_linear=False, hidden_dropout=0.0,
    attention_dropout=0.0, transformer_impl="local", gradient_accumulation_fusion=False,
    masked_softmax_fusion=False, apply_rope_fusion=False, persist_layer_norm=False, use_cpu_initialization=False,
)  # fmt: skip
LATENT = dict(
    q_lora_rank=24, kv_lora_rank=20, qk_head_dim=16, qk_pos_emb_head_dim=8, v_head_dim=12, rope_type="rope",
    rotary_base=ROTARY_BASE, qk_layernorm=True, linear_attention_freq=2,
)  # fmt: skip


def transformer_config(**changes) -> TransformerConfig:
    """A small model in fp32 without dropout, as far as ``changes`` do not say otherwise."""
    return TransformerConfig(**SIZES | PLAIN | changes)


def latent_config(**changes) -> MLATransformerConfig:
    """The same with multi-latent attention in its softmax layers, which are every second one."""
    return MLATransformerConfig(**SIZES | PLAIN | LATENT | changes)


def start(
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    cp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    inference: bool = False,
) -> None:
    """Megatron's process groups and random generators, of ``inference`` or of training, in a process of `spawn`."""
    parallel_state.initialize_model_parallel(
        tp, pp, virtual_pipeline_model_parallel_size=vpp, context_parallel_size=cp, expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )  # fmt: skip
    model_parallel_cuda_manual_seed(1234, inference_rng_tracker=inference)


def layout(tp: int, sp: bool) -> dict:
    """Fields of TransformerConfig."""
    return {"tensor_model_parallel_size": tp, "sequence_parallel": sp}


def build_mixer(variant: Variant, *, layout: str = "zigzag", **config) -> LightningAttention:
    """LightningAttention on Megatron's own parallel projections."""
    return LightningAttention(
        transformer_config(**config | variant.config),
        LightningAttentionSubmodules(ColumnParallelLinear, RowParallelLinear),
        layer_number=variant.layer,
        options=variant.values,
        layout=layout,
    )


def rotary(variant: Variant, length: int, cp_group=None) -> torch.Tensor | None:
    """The embedding that GPTModel passes to its layers, [length, 1, 1, dim], or the part of a context-parallel rank."""
    if not variant.values.rope:
        return None
    interleaved = variant.config.get("rotary_interleaved", False)
    kv_channels = variant.config.get("kv_channels", SIZES["kv_channels"])
    return RotaryEmbedding(
        kv_channels, variant.rotary_percent, interleaved, rotary_base=ROTARY_BASE, cp_group=cp_group
    )(length)


def trainable(module: torch.nn.Module, config: TransformerConfig) -> DistributedDataParallel:
    """Wrapped as Megatron's training does; gradients then arrive in ``parameter.main_grad``."""
    return DistributedDataParallel(config, DistributedDataParallelConfig(), module)


def gradients(model: DistributedDataParallel) -> dict[str, torch.Tensor]:
    return {name: parameter.main_grad.clone() for name, parameter in model.module.named_parameters()}


def reduce_gradients(model: DistributedDataParallel) -> dict[str, torch.Tensor]:
    """The gradients after all that Megatron sums between backward and optimizer."""
    finalize_model_grads([model])
    return gradients(model)


# ---- whole parameters and their slices -------------------------------------------------------------------------------


def sliced_dim(name: str) -> int | None:
    """Along which dimension tensor-parallel ranks hold slices of a parameter; None where each holds all of it."""
    if name.endswith(
        ("linear_qkv.weight", "linear_qkv.bias", "out_norm.weight", "linear_fc1.weight", "linear_fc1.bias")
        + tuple(f"linear_{name}proj.weight" for name in ("q_", "q_down_", "q_up_", "kv_down_", "kv_up_"))
    ):
        return 0
    return 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else None


def slice_of(name: str, whole: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
    """A rank's slice of a parameter or its gradient ("d name")."""
    dim = sliced_dim(name)
    return whole if dim is None else whole.chunk(tp, dim)[rank]


def draw_parameters(module: torch.nn.Module, tp: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
    """Whole parameters in fp64 (rounded to the dtype of the module's): norm weights around 1, all others around 0."""
    whole = {}
    for name, parameter in sorted(module.named_parameters()):
        shape, dim = list(parameter.shape), sliced_dim(name)
        if dim is not None:
            shape[dim] *= tp
        x = torch.randn(*shape, generator=rng, dtype=torch.float64)
        x = 1 + 0.3 * x if "norm.weight" in name else x * (shape[1] ** -0.5 if len(shape) == 2 else 0.3)
        whole[name] = x.to(parameter.dtype).double()
    return whole


def set_parameters(module: torch.nn.Module, whole: dict[str, torch.Tensor], rank: int, tp: int) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(slice_of(name, whole[name], rank, tp))


def tokens_here(x: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """The part of a sequence [s, ...] that a rank holds under sequence parallelism."""
    return x.chunk(world)[rank]


# ---- the judge -------------------------------------------------------------------------------------------------------


def decay_of(options: LightningOptions, heads: int, layer: int, layers: int) -> torch.Tensor:
    """log_decay [heads] in fp64 of a 1-based layer, from the formulas; heads must be a power of two."""
    a = torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)], dtype=torch.float64)
    head = torch.arange(heads, dtype=torch.float64)
    position = layer - 1 + options.decay_offset
    return -{
        "tnl": a * (1 - position / (layers - 1) + 1e-5),
        "minimax": a * (1 - position / (layers - 1 + 1e-5) + 1e-5),
        "bailing": a * (1 - (position - 1) / (layers - 1) + 1e-5),
        "paper": 8 * head / heads * (1 - position / layers),
        "alibi": a,
        "none": 0 * a,
    }[options.decay]


def rotate(x: torch.Tensor, dim: int, interleaved: bool, positions: torch.Tensor) -> torch.Tensor:
    """RoPE of the first ``dim`` channels of x [s, b, h, d]: pairs are halves apart, or neighbours if interleaved."""
    theta = ROTARY_BASE ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = (positions.double()[:, None] * theta)[:, None, None]  # [s, 1, 1, dim / 2]
    y = x[..., :dim]
    first, second = (y[..., 0::2], y[..., 1::2]) if interleaved else (y[..., : dim // 2], y[..., dim // 2 :])
    pair = (first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos())
    y = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((y, x[..., dim:]), -1)


def parameter_names(variant: Variant) -> set[str]:
    """What a mixer of this variant has to learn."""
    options, config = variant.values, transformer_config(**variant.config)
    names = {"linear_qkv.weight", "linear_proj.weight"}
    names |= {"linear_qkv.bias"} if config.add_bias_linear or config.add_qkv_bias else set()
    names |= {"linear_proj.bias"} if config.add_bias_linear else set()
    names |= {"q_norm.weight", "k_norm.weight"} if options.qk_norm else set()
    return names | ({"out_norm.weight"} if options.norm != "none" and options.norm_affine else set())


def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def reference(variant: Variant, p: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mixer of all heads in fp64: x [s, b, hidden] -> output [s, b, hidden] without projection bias, state."""
    options, config = variant.values, transformer_config(**variant.config)
    heads, kv_heads = config.num_attention_heads, options.num_kv_heads or config.num_attention_heads
    K = options.key_head_dim or config.kv_channels
    V = options.value_head_dim or K
    per = heads // kv_heads
    gated = options.gate != "none"
    eps = config.layernorm_epsilon if options.norm_eps is None else options.norm_eps

    mixed = x @ p["linear_qkv.weight"].T + p.get("linear_qkv.bias", 0)
    columns = mixed.unflatten(-1, (kv_heads, per * K + gated * per * V + K + V))  # of one k and v: q.., gate.., k, v
    q, gate, k, v = columns.split((per * K, gated * per * V, K, V), -1)
    q = q.unflatten(-1, (per, K)).flatten(2, 3)
    if options.feature_map != "none":
        q, k = q * q.sigmoid(), k * k.sigmoid()
    if options.feature_map == "silu-qkv":
        v = v * v.sigmoid()
    if options.qk_norm:
        q, k = rms(q, eps) * p["q_norm.weight"], rms(k, eps) * p["k_norm.weight"]
    if options.rope and not (config.no_rope_freq and config.no_rope_freq[variant.layer - 1]):
        turn = functools.partial(
            rotate, dim=int(config.kv_channels * variant.rotary_percent), interleaved=config.rotary_interleaved
        )
        positions = torch.arange(x.shape[0])
        q, k = turn(q, positions=positions), turn(k, positions=positions)
    decay = decay_of(options, heads, variant.layer, config.num_layers)
    o, state = recurrent_lightning_attn(*(y.transpose(0, 1) for y in (q, k, v)), decay, scale=options.scale)
    o = o.transpose(0, 1)  # [s, b, heads, V]
    groups = {"head": heads, "group": options.norm_groups, "all": 1, "none": None}[options.norm]
    if groups is not None:
        o = rms(o.flatten(2).unflatten(-1, (groups, -1)), eps)
    o = o.flatten(2) * p.get("out_norm.weight", 1)
    gate = gate.flatten(2)
    o = {"sigmoid": lambda: o * gate.sigmoid(), "linear": lambda: o * gate, "none": lambda: o}[options.gate]()
    return o @ p["linear_proj.weight"].T, state


def with_gradients(
    function: Callable, p: dict[str, torch.Tensor], x: torch.Tensor, weight: torch.Tensor
) -> dict[str, torch.Tensor]:
    """``output = function(p, x)``, and the gradients of <output, weight> by x and every parameter, in one dict."""
    leaves = {"input": x} | p
    leaves = {name: y.detach().double().requires_grad_() for name, y in leaves.items()}
    output = function({name: y for name, y in leaves.items() if name != "input"}, leaves["input"])
    grads = torch.autograd.grad(output, list(leaves.values()), weight)
    return {"output": output} | {f"d {name}": g for name, g in zip(leaves, grads, strict=True)}


# ---- comparison ------------------------------------------------------------------------------------------------------


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative RMS of the worst block of 16 rows: no block mixes q, k, v and gate, or more than 16 tokens."""
    assert got.shape == want.shape, f"shape {list(got.shape)}, not {list(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    assert want.isfinite().all() and got.isfinite().all()
    pairs = zip(got.split(16), want.split(16), strict=True)
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)


def assert_close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float) -> float:
    """Compare every tensor of ``want``; returns the largest error."""
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    errors = {name: error(got[name], want[name]) for name in want}
    wrong = {name: f"{value:.2e}" for name, value in errors.items() if not value <= tolerance}
    assert not wrong, f"above {tolerance}: {wrong}, all errors {errors}"
    return max(errors.values())
