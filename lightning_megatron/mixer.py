"""The attention module that Megatron's TransformerLayer accepts as ``self_attention``."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import log_single_rank, nvtx_range_pop, nvtx_range_push

from .caches.dynamic import RequestStates
from .caches.static import StaticStates
from .config import LightningOptions, mark_parts, prepared_with, recomputes, resolve_shape
from .decay import log_decay
from .layer_log import StateSums
from .norm import HeadNorm, OutputNorm
from .ops import norm_gate, packed_part, split_heads, unfusable
from .packed import layout_of, packed_bounds, sharing_group
from .parallel import exchange_once, lightning_attn
from .rope import LRPE, angle_table, chunk_angles, own_angles, own_rotary_embedding, rotate
from .selective import parameters_of, recomputed

logger = logging.getLogger("lightning_megatron")


@dataclass
class LightningAttentionSubmodules:
    """Every submodule of a lightning layer.

    The projections are Megatron's local layers or TransformerEngine's, where linear_qkv may hold the input layer norm.
    The norms and angles are built and called as ``HeadNorm``, ``OutputNorm`` and ``LRPE``; options decide which of them
    there are.
    """

    linear_qkv: ModuleSpec | type
    linear_proj: ModuleSpec | type
    q_norm: ModuleSpec | type = HeadNorm
    k_norm: ModuleSpec | type = HeadNorm
    out_norm: ModuleSpec | type = OutputNorm
    lrpe: ModuleSpec | type = LRPE


@dataclass
class Passed:
    """Where a chunk of a sequence begins, and how many tokens the sequence has. The state between two chunks: fp32
    ``[b, H, K, V]``, or None before the first.
    """

    state: torch.Tensor | None
    start: int
    tokens: int


class LightningAttention(MegatronModule):
    """Lightning attention with everything around it, on one tensor-parallel rank's heads.

    out = linear_proj( gate * norm( lightning_attn( f(q), f(k), f(v) ) ) )

    One projection gives q, gate, k and v, interleaved per key/value head (``[q..., gate..., k, v]`` of head 0, of head
    1, ...), so that a tensor-parallel slice is whole heads. Shapes follow Megatron: hidden ``[s, b, h]``, with sequence
    parallelism ``[s/tp, b, h]`` outside the projections.

    Args:
        config: Megatron's TransformerConfig.
        submodules: projections and norms.
        layer_number: 1-based, over all pipeline stages.
        options: what Megatron's config does not say (``lightning_megatron.config``).
        layout: which tokens a context-parallel rank holds, as the data loader cuts them (``parallel.lightning_attn``).
        pg_collection: process groups; tp and cp are used.
        depth: its index from 0 and their number, for the decay, where layer_number counts other layers: MLPs, too
            (HybridModel), or those of multi-token prediction alone.
        attn_mask_type: causal. Megatron asks specs of multi-token prediction layers for it.

    Raises:
        ValueError: sizes that do not divide, or arguments that a lightning layer cannot honour.
    """

    def __init__(
        self,
        config,
        submodules: LightningAttentionSubmodules,
        layer_number: int,
        options: LightningOptions | None = None,
        layout: str = "zigzag",
        pg_collection: ProcessGroupCollection | None = None,
        *,
        name: str | None = None,
        cp_comm_type: str | None = None,
        pp_layer_offset: int | None = None,
        depth: tuple[int, int] | None = None,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        **unknown: Any,
    ):
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal:
            unknown["attn_mask_type"] = attn_mask_type
        _refuse_unknown("LightningAttention.__init__", unknown)
        del cp_comm_type  # a scheme of softmax attention
        self.options = options = options or LightningOptions()
        self.layout = layout
        if prepared_with(config) is None:
            log_single_rank(
                logger,
                logging.WARNING,
                "a lightning layer is built without lightning_megatron.runtime.prepare(config, options): flags are not "
                "checked, and Megatron is not patched (README, From Python)",
            )
        self.layer_number, self.pp_layer_offset = layer_number, pp_layer_offset
        index, layers = depth or (layer_number - 1, config.num_layers)
        self.pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.tp_group = self.pg_collection.tp
        tp = self.tp_group.size()
        self.shape = shape = resolve_shape(config, options, tp)
        self.scale = shape.key_dim**-0.5 if options.scale is None else options.scale
        eps = config.layernorm_epsilon if options.norm_eps is None else options.norm_eps

        self.linear_qkv = build_module(
            submodules.linear_qkv,
            config.hidden_size,
            shape.projection_dim,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=config.add_bias_linear or config.add_qkv_bias,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=self.tp_group,
            name=None if name is None else name + ".linear_qkv",
        )
        mark_parts(getattr(self.linear_qkv, "weight", None), shape)
        self.q_norm = self.k_norm = self.out_norm = self.lrpe = None
        if options.qk_norm:
            self.q_norm, self.k_norm = (
                build_module(norm, shape.key_dim, tp_group=self.tp_group, eps=eps, dtype=config.params_dtype)
                for norm in (submodules.q_norm, submodules.k_norm)
            )
        if index < options.lrpe_layers:
            self.lrpe = build_module(
                submodules.lrpe,
                shape.num_heads // tp,
                shape.key_dim,
                tp_group=self.tp_group,
                dtype=config.params_dtype,
            )
        if shape.norm_groups:
            self.out_norm = build_module(
                submodules.out_norm,
                shape.output_dim // tp,
                shape.norm_groups,
                tp_group=self.tp_group,
                eps=eps,
                affine=options.norm_affine,
                dtype=config.params_dtype,
            )
        self.linear_proj = build_module(
            submodules.linear_proj,
            shape.output_dim,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=config.add_bias_linear,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="proj",
            tp_group=self.tp_group,
            name=None if name is None else name + ".linear_proj",
        )
        known = {type(x) for x in (self.q_norm, self.k_norm, self.out_norm)} <= {HeadNorm, OutputNorm, type(None)}
        self._unfusable = "a norm of the caller's own" if not known else unfusable(
            shape.group_dims, norm_width=shape.output_dim // shape.norm_groups if shape.norm_groups else None,
            lrpe=self.lrpe is not None,
        )  # fmt: skip
        self.rotary_pos_emb = own_rotary_embedding(config, options, shape.key_dim, self.pg_collection.cp)
        # Not a buffer: Megatron casts those to bf16 (Float16Module), and a decay in bf16 is another decay.
        self.log_decay = log_decay(
            options.decay,
            shape.num_heads,
            index,
            layers,
            offset=options.decay_offset,
            tp_rank=self.tp_group.rank(),
            tp_size=tp,
        )
        self._place_decay(self.linear_proj.weight.device)
        self._passed: Passed | None = None
        self._recomputes = recomputes(config, "core_attn")
        self.state_sums = StateSums() if options.log_norms else None

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """``(H, K, V)`` of this rank's state of one sequence, which generation keeps."""
        heads = self.shape.num_heads // self.tp_group.size()
        return heads, self.shape.key_dim * (1 if self.lrpe is None else 2), self.shape.value_dim

    @contextlib.contextmanager
    def passing(self, state: torch.Tensor | None, start: int, tokens: int) -> Iterator[Passed]:
        """While it is open, ``forward`` takes a chunk of a sequence, as ``Passed`` says, with the angles and bounds of
        documents of the whole one, and leaves the final state in what this yields.
        """
        self._passed = passed = Passed(state, start, tokens)
        try:
            yield passed
        finally:
            self._passed = None

    def _apply(self, fn, recurse=True):
        result = super()._apply(fn, recurse)
        self._place_decay(self.linear_proj.weight.device)
        return result

    def _place_decay(self, device: torch.device) -> None:
        """Move the decay with the weights, but to no other dtype, and not to the meta device, which holds no values."""
        if device.type == "meta" or device == self.log_decay.device:
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"log_decay of lightning layer {self.layer_number} is on {self.log_decay.device} and cannot move to "
                f"{device} while a CUDA graph is captured; run the model once before the capture"
            )
        self.log_decay = self.log_decay.to(device)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        inference_context=None,
        rotary_pos_emb: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        sequence_len_offset: torch.Tensor | None = None,
        *,
        inference_params=None,
        **unknown: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden ``[s, b, h]`` -> ``(output [s, b, h], bias or None)``.

        Attention is causal, whatever attention_mask says: right padding and the causal mask change nothing. With an
        inference context, a mask that changes more is refused.

        Raises:
            ValueError: padding before later tokens, or arguments that a lightning layer cannot honour.
        """
        del sequence_len_offset
        _refuse_unknown("LightningAttention.forward", {"key_value_states": key_value_states, **unknown})
        self._place_decay(hidden_states.device)  # FSDP brings weights without telling the module
        options, inference_context = self.options, inference_context or inference_params
        cu_seqlens, layout = packed_bounds(packed_seq_params), layout_of(packed_seq_params, self.layout)
        group = sharing_group(packed_seq_params, self.pg_collection.cp, contiguous=layout == "contiguous")
        cached = self._cached_states(inference_context, packed_seq_params, hidden_states, attention_mask)

        nvtx_range_push(suffix="qkv")
        mixed, _ = self.linear_qkv(hidden_states)  # [s, b, local kv heads * sum(group_dims)]
        nvtx_range_pop(suffix="qkv")
        if isinstance(cached, RequestStates) and cached.only_decodes and self._unfusable is None:
            return self.linear_proj(self._decode(cached, mixed, rotary_pos_emb, hidden_states))
        if options.rope and self.rotary_pos_emb is not None:
            rotary_pos_emb = own_angles(
                self.rotary_pos_emb, hidden_states, self.config, packed_seq_params, inference_context, group,
                tokens=None if self._passed is None else self._passed.tokens,
            )  # fmt: skip
        where = dict(cu_seqlens=cu_seqlens, group=group, layout=layout)
        heads = partial(self._heads, rotary_pos_emb=rotary_pos_emb, inference_context=inference_context, **where)
        attend = partial(self._attend, cached=cached, **where)
        if not self._recomputes or not self.training or cached is not None:
            return self._project(attend(*heads(mixed)))
        parameters, inputs = parameters_of(self.out_norm), (mixed,)
        if options.recompute_qkv:
            parameters += parameters_of(self.q_norm, self.k_norm, self.lrpe)
            function = lambda mixed: attend(*heads(mixed))
        else:
            function, inputs = attend, heads(mixed)
        function = exchange_once(function) if options.cp_keep_states else function
        return recomputed(function, parameters, self._project, *inputs)

    def _heads(
        self, mixed: torch.Tensor, *, rotary_pos_emb, inference_context, cu_seqlens, group, layout: str
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """From the fused projection to the operator: feature map, norms and angles.

        q [s, b, H, K], gate [s, b, Hkv, H / Hkv * V], k [s, b, Hkv, K], v [s, b, Hkv, V]
        """
        options, bounds, start = self.options, cu_seqlens, 0
        if self._passed is not None:  # every token of a chunk gets an angle of its own
            start, bounds = self._passed.start, None
            rotary_pos_emb = chunk_angles(rotary_pos_emb, start, mixed.shape[0], cu_seqlens)
        nvtx_range_push(suffix="split_heads")
        q, gate, k, v = split_heads(
            mixed, self.shape.group_dims, feature_map=options.feature_map, backend=options.backend
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        nvtx_range_pop(suffix="split_heads")
        if options.rope:
            nvtx_range_push(suffix="rotary_pos_emb")
            q, k = rotate(
                q, k, rotary_pos_emb, config=self.config, layer_number=self.layer_number, cu_seqlens=bounds,
                inference_context=inference_context, cp_group=self.pg_collection.cp, group=group, layout=layout,
                backend=options.backend,
            )  # fmt: skip
            nvtx_range_pop(suffix="rotary_pos_emb")
        if self.lrpe is not None:
            nvtx_range_push(suffix="lrpe")
            q, k = self.lrpe(
                q, k, cu_seqlens=cu_seqlens, inference_context=inference_context, group=group, layout=layout,
                start=start,
            )  # fmt: skip
            nvtx_range_pop(suffix="lrpe")
        return q, gate, k, v

    def _attend(self, q, gate, k, v, *, cached, cu_seqlens, group, layout: str) -> torch.Tensor:
        """Operator, output norm and gate: what ``_heads`` returns -> ``[s, b, H * V]``."""
        options, passed = self.options, self._passed
        sums = self.state_sums if self.training and cached is None else None
        nvtx_range_push(suffix="lightning_attention")
        if isinstance(cached, RequestStates):
            o = cached.attend(q, k, v, self.log_decay, scale=self.scale, backend=options.backend)
        else:
            tokens = [x.transpose(0, 1) for x in (q, k, v)]
            state = None if cached is None else cached.initial
            how = dict(
                cu_seqlens=cu_seqlens, initial_state=state if passed is None else passed.state, scale=self.scale,
                backend=options.backend,
            )  # fmt: skip
            if passed is not None and cu_seqlens is not None:
                o, state = packed_part(*tokens, self.log_decay, start=passed.start, total=passed.tokens, **how)
            else:
                o, state = lightning_attn(
                    *tokens, self.log_decay, group=group, layout=layout, exchange=options.cp_exchange,
                    output_final_state=any(x is not None for x in (cached, passed, sums)), **how,
                )  # fmt: skip
            o = o.transpose(0, 1)
            if cached is not None:
                cached.store(state)
            if passed is not None:
                passed.state = state
            if sums is not None:
                sums.add(state)
        nvtx_range_pop(suffix="lightning_attention")

        nvtx_range_push(suffix="output_norm_gate")
        finish = norm_gate if self.out_norm is None else self.out_norm
        o = finish(o, gate, kind=options.gate, backend=options.backend)
        nvtx_range_pop(suffix="output_norm_gate")
        return o

    def _project(self, o: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        nvtx_range_push(suffix="linear_proj")
        output = self.linear_proj(o)
        nvtx_range_pop(suffix="linear_proj")
        return output

    def _decode(self, cached: RequestStates, mixed: torch.Tensor, rotary_pos_emb, hidden_states) -> torch.Tensor:
        """``[requests, 1, ...]`` between the projections: one token of each request, in one launch."""
        options, norms, table = self.options, (self.q_norm, self.k_norm, self.out_norm), None
        q_norm, k_norm, out_norm = (None if norm is None else (norm.weight, norm.eps) for norm in norms)
        if options.rope:
            if self.rotary_pos_emb is not None:
                rotary_pos_emb = own_angles(
                    self.rotary_pos_emb, hidden_states, self.config, None, cached.context, self.pg_collection.cp
                )
            table = angle_table(rotary_pos_emb, self.shape.key_dim, config=self.config, layer_number=self.layer_number)
        angles, turn_scale = table or (None, 1.0)
        return cached.decode(
            mixed, self.log_decay, group_dims=self.shape.group_dims, feature_map=options.feature_map, scale=self.scale,
            q_norm=q_norm, k_norm=k_norm, angles=angles, turn_scale=turn_scale,
            interleaved=self.config.rotary_interleaved, gate=options.gate, out_norm=out_norm, backend=options.backend,
        )  # fmt: skip

    def _stage_offset(self) -> int:
        """How many layers the pipeline stages before this one have."""
        if self.pp_layer_offset is None:
            pp = getattr(self.pg_collection, "pp", None)  # None: a layer by itself
            rank = 0 if pp is None else pp.rank()
            self.pp_layer_offset = get_transformer_layer_offset(self.config, vp_stage=None, pp_rank=rank)
        return self.pp_layer_offset

    def _cached_states(
        self, context, packed: PackedSeqParams | None, hidden_states, mask
    ) -> StaticStates | RequestStates | None:
        """The states that a context of Megatron's inference keeps for these tokens; None without a context."""
        if context is None:
            return None
        if self.pg_collection.cp.size() > 1:
            raise ValueError(
                f"lightning layers do not generate with context-parallel size {self.pg_collection.cp.size()}; load the "
                "checkpoint with --context-parallel-size 1"
            )
        if self.config.fp8 or self.config.fp4:
            raise ValueError(
                "lightning layers generate in bf16, as a token is fewer rows than a product in fp8 takes; load the "
                "checkpoint without --fp8-format and --fp4-format"
            )
        if packed is not None:
            raise ValueError(
                "lightning layers generate from prompts of their own, not from packed sequences: leave "
                "packed_seq_params out, or give no inference context"
            )
        if not context.is_static_batching():
            return RequestStates(context, self.layer_number - self._stage_offset(), self.state_shape)
        tokens, rows, _ = hidden_states.shape
        return StaticStates(context, self.layer_number, self.config, tokens=tokens, rows=rows, mask=mask)

    def backward_dw(self) -> None:
        """Weight gradients of the projections, where Megatron delays them."""
        self.linear_qkv.backward_dw()
        self.linear_proj.backward_dw()

    def set_for_recompute_input_layernorm(self) -> None:
        """Called where fp8 recomputes the input norm: keep linear_qkv's unquantised input."""
        from megatron.core.extensions.transformer_engine import set_save_original_input

        set_save_original_input(self.linear_qkv)


def _refuse_unknown(where: str, arguments: dict[str, Any]) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ValueError(
            f"{where} got {', '.join(given)}, which a lightning layer does not know and must not ignore; leave it out"
        )
