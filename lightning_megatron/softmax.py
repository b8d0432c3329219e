"""Core attention of the softmax layers of a hybrid on torch's scaled_dot_product_attention.

Megatron's own (core/transformer/dot_product_attention.py) materialises the T x T scores and refuses packed documents.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention


class SDPACoreAttention(MegatronModule):
    """Drop-in ``core_attention`` of Megatron's SelfAttention; flash kernels on a GPU, exact on a CPU.

    Causal layers ignore ``attention_mask``, as TransformerEngine does, so that no T x T mask need exist.
    """

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
    ):
        super().__init__(config=config)
        del attention_type, cp_comm_type, pg_collection  # self-attention on the ranks' own heads; CP is refused below
        for value, flag, remedy in (
            (config.context_parallel_size > 1, f"--context-parallel-size {config.context_parallel_size}", "use 1"),
            (
                is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number),
                f"--window-size {config.window_size}",
                "leave it out",
            ),
            (config.softmax_type != "vanilla", f"--softmax-type {config.softmax_type}", "use vanilla"),
            (config.qk_clip or config.log_max_attention_logit, "--qk-clip (or --log-max-attention-logit)", "leave it out"),
        ):
            if value:
                raise ValueError(
                    f"{flag} is not supported by the softmax layers on torch's SDPA; {remedy}, or install "
                    "TransformerEngine and pass --transformer-impl transformer_engine"
                )
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """query ``[sq, b, heads, d]``, key and value ``[sk, b, groups, d]`` -> ``[sq, b, heads * d]``.

        Packed (thd): ``[t, heads, d]`` -> ``[t, heads * d]``. ``attention_mask`` is True where attention is forbidden.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias is not supported by the softmax layers on torch's SDPA; use TransformerEngine")
        mask_type = attn_mask_type or self.attn_mask_type
        causal = mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        dropout = self.dropout if self.training else 0.0
        # with sequence parallelism the tensor-parallel region already has its own generator (as in Megatron's attention)
        own_rng = dropout > 0 and not self.config.sequence_parallel
        with get_cuda_rng_tracker().fork() if own_rng else contextlib.nullcontext():
            if packed_seq_params is not None:
                return self._packed(query, key, value, packed_seq_params, dropout).flatten(1)
            mask = None
            if not causal and mask_type != AttnMaskType.no_mask and attention_mask is not None:
                mask = ~attention_mask
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
            if causal and q.shape[2] != k.shape[2]:
                raise ValueError(f"causal attention needs as many queries as keys, got {q.shape[2]} and {k.shape[2]}")
            if mask_type == AttnMaskType.no_mask and 1 < q.shape[2] < k.shape[2]:  # what Megatron says while it generates
                raise ValueError(
                    f"{q.shape[2]} new tokens after {k.shape[2] - q.shape[2]} cached ones would see each other's future; "
                    "generate one token at a time, or use TransformerEngine"
                )
            o = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal,
                scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip
        return o.permute(2, 0, 1, 3).flatten(2)

    def _packed(self, q, k, v, packed: PackedSeqParams, dropout: float) -> torch.Tensor:
        bounds = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
        if q.is_cuda and dropout == 0 and q.dtype in (torch.bfloat16, torch.float16):
            from torch.nn.attention.varlen import varlen_attn

            group = q.shape[1] // k.shape[1]
            if group > 1:  # varlen_attn documents equal head counts only
                k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
            bounds = bounds.to(torch.int32)
            longest = int(packed.max_seqlen_q) if packed.max_seqlen_q is not None else q.shape[0]
            return varlen_attn(
                q.contiguous(), k.contiguous(), v.contiguous(), bounds, bounds, longest, longest,
                scale=self.softmax_scale, window_size=(-1, 0),
            )  # fmt: skip
        outputs = []
        ends = bounds.tolist()
        for start, end in zip(ends[:-1], ends[1:], strict=True):
            document = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))  # [1, heads, n, d]
            o = F.scaled_dot_product_attention(
                *document, dropout_p=dropout, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            outputs.append(o[0].transpose(0, 1))
        return torch.cat(outputs)
