"""Norms that need neither TransformerEngine nor apex: a layer norm for Megatron's specs, and those inside the mixer.

Megatron's own torch norm (core/transformer/torch_norm.py) refuses sequence parallelism; ``TorchNorm`` supports it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

from .compat import importable
from .config import LightningOptions, recomputes
from .ops import norm_gate, norm_residual


class TorchNorm(torch.nn.Module):
    """RMSNorm or LayerNorm over the last dimension, as ``config.normalization`` says, built as Megatron builds norms.

    Its parameters carry ``sequence_parallel``, by which Megatron sums their gradients over the tensor-parallel ranks
    that each saw a part of the sequence (core/distributed/finalize_model_grads.py). ``--apply-layernorm-1p`` is
    supported. ``backend`` is that of ``lightning_attn``; ``affine`` False leaves out weight and bias (TransNormerLLM,
    section 3.4: SimpleRMSNorm).

    Raises:
        ValueError: a normalization other than these two.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, *, backend: str | None = None, affine: bool = True):
        super().__init__()
        self.backend = backend
        if config.normalization not in ("RMSNorm", "LayerNorm"):
            raise ValueError(
                f"--normalization {config.normalization} is not supported without TransformerEngine; use RMSNorm or "
                "LayerNorm"
            )
        self.rms = config.normalization == "RMSNorm"
        self.zero_centered = affine and config.layernorm_zero_centered_gamma
        self.eps = eps
        # Named, as Megatron's linear layers do it: under torch.device("meta") (--init-model-with-meta-device) the first
        # values would be lost, and training would start from whatever the memory holds.
        on_gpu = torch.cuda.is_available() and not config.use_cpu_initialization
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        first = torch.zeros if self.zero_centered else torch.ones
        self.weight = torch.nn.Parameter(first(hidden_size, device=device)) if affine else None
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, device=device)) if affine and not self.rms else None
        self.dtype = config.params_dtype  # of the output, without parameters that say it
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x ``[..., hidden]`` -> the same shape in the dtype of the parameters."""
        if self._in_one_launch(x):  # where torch's backward reads everything twice
            return norm_gate(x.unsqueeze(2), weight=self.weight, width=x.shape[-1], eps=self.eps, backend=self.backend)
        if self.zero_centered:  # a small weight would be rounded away from 1 + weight in bf16
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        # x is fp32 in a fp32 residual stream, too
        weight = None if self.weight is None else self.weight.to(x.dtype) + self.zero_centered
        if self.rms:
            y = F.rms_norm(x, x.shape[-1:], weight, self.eps)
        else:
            y = F.layer_norm(x, x.shape[-1:], weight, None if self.bias is None else self.bias.to(x.dtype), self.eps)
        return y.to(self._output_dtype)

    @property
    def _output_dtype(self) -> torch.dtype:
        return self.dtype if self.weight is None else self.weight.dtype

    def _in_one_launch(self, x: torch.Tensor) -> bool:
        return self.rms and not self.zero_centered and x.dim() == 3 and x.dtype == self._output_dtype


class ResidualNorm(TorchNorm):
    """A layer's norm that says what the layer adds its output to, too: Megatron's layers take ``(norm, residual)``.

    With x the input of the layer, times ``scale``: the residual is x, or norm(x) with ``normalized``, as in MiniMax
    (transformers, models/minimax) and with ``--apply-residual-connection-post-layernorm``. Where it is x, gradients of
    norm and residual are added in one launch.
    """

    returns_residual = True  # by which layers of Megatron 0.20 know it; those of 0.19 look at what it returns

    def __init__(self, *args, scale: float = 1.0, normalized: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale, self.normalized = scale, normalized

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x ``[..., hidden]`` -> (norm, residual), of the same shape."""
        if self.scale != 1.0:
            x = x * self.scale
        if not self.normalized and self._in_one_launch(x):
            return norm_residual(x, self.weight, eps=self.eps, backend=self.backend)
        y = super().forward(x)
        return y, y if self.normalized else x


class EmbeddingNorm(TorchNorm):
    """norm(scale * x), of embeddings that ``LightningOptions.embedding_scale`` multiplies."""

    def __init__(self, *args, scale: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x ``[..., hidden]`` -> the same shape in the dtype of the parameters."""
        return super().forward(x * self.scale)


def layer_norm(config) -> type:
    """The norm of layers and of the block's end: TransformerEngine's, apex's (LayerNorm only), or torch's.

    apex without its kernels still has the module that calls them: they tell whether it can.
    """
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    if config.normalization == "LayerNorm" and importable("fused_layer_norm_cuda"):
        from megatron.core.fusions.fused_layer_norm import FusedLayerNorm

        return FusedLayerNorm
    return TorchNorm


def layer_norm_spec(config, options: LightningOptions, *, first: bool = False, final: bool = False):
    """The norm of ``layer_norm`` as Megatron's specs take it, computed by ``options.backend`` where it is ours.

    Args:
        first: the one that the embeddings enter, which ``options.embedding_scale`` multiplies.
        final: the one behind all layers, which no residual goes around.
    """
    norm, params = layer_norm(config), {"backend": options.backend}
    scale = options.embedding_scale if first else 1.0
    normalized = config.apply_residual_connection_post_layernorm and not final
    if not options.layernorm_affine:
        norm, params = TorchNorm, {**params, "affine": False}
    # recomputing norms frees all that they return
    recomputed = recomputes(config, "layernorm")
    if normalized or scale != 1.0 or (norm is TorchNorm and not final and not recomputed):
        norm, params = ResidualNorm, {**params, "scale": scale, "normalized": normalized}
    return ModuleSpec(module=norm, params=params) if issubclass(norm, TorchNorm) else norm


def norm_name(config, options: LightningOptions) -> str:
    """For the log: whose layer norms a model has."""
    norm = layer_norm_spec(config, options)
    return TorchNorm.__name__ if isinstance(norm, ModuleSpec) else norm.__name__


def prediction_norms(config, options: LightningOptions) -> dict[str, Callable]:
    """The norms of a multi-token prediction layer beside those of its transformer layer, as Megatron's spec takes them:
    of embeddings, of states, and behind the layer.
    """
    spec = layer_norm_spec(config, options, final=True)
    norm = functools.partial(spec.module, **spec.params) if isinstance(spec, ModuleSpec) else spec
    embedding = norm
    if options.embedding_scale != 1.0:
        affine = options.layernorm_affine
        embedding = functools.partial(
            EmbeddingNorm, scale=options.embedding_scale, backend=options.backend, affine=affine
        )
    return dict(enorm=embedding, hnorm=norm, layer_norm=norm)


def head_norm_spec(config, options: LightningOptions):
    """The norm of q and k, or of latents, in softmax layers: it has a weight, and nothing goes around it."""
    return layer_norm_spec(config, dataclasses.replace(options, layernorm_affine=True), final=True)


class OutputNorm(torch.nn.Module):
    """RMS norm of a mixer's output in groups of heads, on one tensor-parallel rank's heads.

    y = x * rsqrt(mean over the group of x^2 + eps) * weight. One group per head is the usual per-head norm, one group
    over all heads MiniMax's; in between is Bailing's GroupRMSNorm. The weight has one entry per channel and is sharded
    with the heads, so it needs no gradient reduction whatever the parallelism. Only the single group over several ranks
    needs communication: one number per token.
    """

    def __init__(self, size: int, groups: int, *, tp_group, eps: float, affine: bool, dtype: torch.dtype):
        """``size`` channels on this rank; ``groups`` over all ranks (1, or divisible by the number of ranks)."""
        super().__init__()
        self.eps, self.tp_group, self.tp = eps, tp_group, tp_group.size()
        self.over_ranks = groups == 1 and self.tp > 1
        self.width = size if groups == 1 else size * self.tp // groups  # channels of a group that are on this rank
        self.weight = None
        if affine:
            self.weight = torch.nn.Parameter(torch.ones(size, dtype=dtype, device=torch.cuda.current_device()))
            set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, o: torch.Tensor, gate: torch.Tensor | None = None, **options) -> torch.Tensor:
        """o ``[s, b, heads, V]`` -> ``[s, b, heads * V]``, gated at once; gate, kind and backend as of norm_gate."""
        if not self.over_ranks:
            return norm_gate(o, gate, self.weight, width=self.width, eps=self.eps, **options)
        o32 = o.float()
        squares = reduce_from_tensor_model_parallel_region(o32.square().sum((-2, -1), keepdim=True), self.tp_group)
        inverse = torch.rsqrt(squares / (self.width * self.tp) + self.eps)
        # every rank scales its own heads by `inverse`, so its gradient is the sum over the ranks
        y = (o32 * copy_to_tensor_model_parallel_region(inverse, self.tp_group)).to(o.dtype)
        return norm_gate(y, gate, self.weight, **options)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Shards for distributed checkpoints, valid at any other tensor-parallel size: slices are whole heads."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )


class HeadNorm(torch.nn.Module):
    """RMSNorm of q or k per head, with one weight that all heads share.

    The weight is replicated over tensor-parallel ranks, each of which sees other heads: its gradient is summed here, in
    the backward of the copy, with and without sequence parallelism (Megatron only sums parameters marked for the
    latter).
    """

    def __init__(self, head_dim: int, *, tp_group, eps: float, dtype: torch.dtype):
        super().__init__()
        self.eps, self.tp_group = eps, tp_group
        self.weight = torch.nn.Parameter(torch.ones(head_dim, dtype=dtype, device=torch.cuda.current_device()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x ``[..., head_dim]`` -> the same shape and dtype."""
        weight = copy_to_tensor_model_parallel_region(self.weight, self.tp_group)
        return F.rms_norm(x, weight.shape, weight, self.eps)
