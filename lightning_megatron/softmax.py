"""Core attention of the softmax layers of a hybrid on torch's scaled_dot_product_attention.

Megatron's own (core/transformer/dot_product_attention.py) materialises the T x T scores and refuses packed documents.

Over context-parallel ranks every rank gathers the keys and values of all, in their own heads only, and attends with its queries
to the tokens before them: what is computed is the same numbers as on one rank, whatever --cp-comm-type says.
"""

from __future__ import annotations

import contextlib
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from .ops.api import check_once

KERNELS = {  # of --attention-backend, as TransformerEngine understands it; with auto and local torch chooses
    AttnBackend.flash: SDPBackend.FLASH_ATTENTION,
    AttnBackend.fused: SDPBackend.CUDNN_ATTENTION,
    AttnBackend.unfused: SDPBackend.MATH,
}

class SDPACoreAttention(MegatronModule):
    """Drop-in ``core_attention`` of Megatron's SelfAttention; flash kernels on a GPU, exact on a CPU.

    Causal layers ignore ``attention_mask``, as TransformerEngine does, so that no T x T mask need exist.

    ``config.attention_backend`` chooses the kernel: flash is FlashAttention, fused is cuDNN (not over context-parallel ranks),
    unfused is plain torch; auto leaves it to torch, which takes cuDNN's on an H100 where all queries have all keys.

    Args:
        pg_collection: process groups; cp is used, and where a batch brings packed_seq_params.cp_group, that instead. Of P ranks,
            rank r holds chunks r and 2P-1-r of the 2P equal chunks of the sequence, packed or not.
        documents_cut: packed documents are cut into such chunks one by one (their lengths are multiples of 2P), as Megatron does
            with --sft through TransformerEngine, and not the packed sequence as a whole, as it does with
            --dataloader-inter-document-masking. PackedSeqParams does not say which; the attribute may be set later. Batches
            with packed_seq_params.local_cp_size are cut as a whole, as Megatron always does.
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
        documents_cut: bool = False,
    ):
        super().__init__(config=config)
        del attention_type, cp_comm_type  # self-attention on the ranks' own heads; there is one way to communicate
        for value, flag, remedy in (
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
        self.backend = config.attention_backend
        self.cp_group = getattr(pg_collection, "cp", None)
        if config.context_parallel_size > 1 and self.cp_group is None:
            raise ValueError(
                f"context_parallel_size is {config.context_parallel_size}, but pg_collection has no cp; give the process groups "
                "of this rank, as ProcessGroupCollection.use_mpu_process_groups() returns them"
            )
        self.documents_cut = documents_cut
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
        Tokens are this rank's; cu_seqlens_q in packed_seq_params are bounds in the whole packed sequence.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias is not supported by the softmax layers on torch's SDPA; use TransformerEngine")
        mask_type = attn_mask_type or self.attn_mask_type
        causal = mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        dropout = self.dropout if self.training else 0.0
        # with sequence parallelism the tensor-parallel region already has its own generator (as in Megatron's attention)
        own_rng = dropout > 0 and not self.config.sequence_parallel
        group = self._group(packed_seq_params)
        with self._kernels(query, group), get_cuda_rng_tracker().fork() if own_rng else contextlib.nullcontext():
            if group is not None and group.size() > 1:
                if query.dim() == 4 and not causal:
                    raise ValueError(
                        f"attention with mask type {mask_type.name} is not supported over {group.size()} context-parallel ranks, "
                        "only causal; use --context-parallel-size 1, which generation needs too"
                    )
                return self._context_parallel(query, key, value, packed_seq_params, group, dropout).flatten(-2)
            if packed_seq_params is not None:
                bounds = _bounds(packed_seq_params)
                return self._packed(query, key, value, bounds, bounds, packed_seq_params.max_seqlen_q, dropout).flatten(1)
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

    def _kernels(self, q: torch.Tensor, group: dist.ProcessGroup | None) -> contextlib.AbstractContextManager:
        """Allows what ``--attention-backend`` names."""
        if self.backend not in KERNELS:
            return contextlib.nullcontext()
        if self.backend == AttnBackend.fused:
            shared = group is not None and group.size() > 1
            given = f"{group.size()} context-parallel ranks" if shared else "" if q.is_cuda else "a CPU"
            if given:
                raise ValueError(
                    f"--attention-backend fused (cuDNN) does not serve the softmax layers on {given}: use flash or auto, or "
                    "TransformerEngine with --transformer-impl transformer_engine"
                )
        if q.is_cuda and q.dtype == torch.float32 and self.backend != AttnBackend.unfused:
            raise ValueError(
                f"--attention-backend {self.backend.name} has no kernels for fp32: use auto or unfused, or --bf16 or --fp16"
            )
        return sdpa_kernel(KERNELS[self.backend])

    def _group(self, packed: PackedSeqParams | None) -> dist.ProcessGroup | None:
        """The ranks that share the sequence; batches of dynamic size bring their own."""
        if packed is None or packed.cp_group is None and packed.local_cp_size is None:
            return self.cp_group
        size = 1 if packed.cp_group is None else packed.cp_group.size()
        if packed.local_cp_size not in (None, size):
            raise ValueError(
                f"packed_seq_params.local_cp_size is {packed.local_cp_size}, but cp_group there is "
                f"{'None' if packed.cp_group is None else f'of size {size}'}; give the group of the ranks that share this batch"
            )
        return packed.cp_group

    def _packed(self, q, k, v, bounds_q, bounds_k, longest: int | None, dropout: float) -> torch.Tensor:
        """The last query of each document stands at its last key: ``[t, heads, d]``, and keys of other bounds if chunks."""
        flash = self.backend not in (AttnBackend.fused, AttnBackend.unfused)
        if flash and q.is_cuda and dropout == 0 and q.dtype in (torch.bfloat16, torch.float16):
            from torch.nn.attention.varlen import varlen_attn

            group = q.shape[1] // k.shape[1]
            if group > 1:  # varlen_attn documents equal head counts only
                k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
            longest_q, longest_k = (x.shape[0] if longest is None else min(int(longest), x.shape[0]) for x in (q, k))
            return varlen_attn(
                q.contiguous(), k.contiguous(), v.contiguous(), bounds_q.to(torch.int32), bounds_k.to(torch.int32),
                longest_q, longest_k, scale=self.softmax_scale, window_size=(-1, 0),
            )  # fmt: skip
        q, k, v = (x[:, None] for x in (q, k, v))
        return self._one_by_one(q, k, v, bounds_q.tolist(), bounds_k.tolist(), dropout)[:, 0]

    def _one_by_one(self, q, k, v, ends_q: list[int], ends_k: list[int], dropout: float) -> torch.Tensor:
        """As ``_packed``, of ``[t, b, heads, d]``."""
        outputs = []
        for (a, b), (c, d) in zip(pairwise(ends_q), pairwise(ends_k), strict=True):
            if a == b and c < d:  # a document that ended before this chunk
                continue
            o = F.scaled_dot_product_attention(
                *(x.permute(1, 2, 0, 3) for x in (q[a:b], k[c:d], v[c:d])), attn_mask=causal_lower_right(b - a, d - c),
                dropout_p=dropout, scale=self.softmax_scale, enable_gqa=q.shape[2] != k.shape[2],
            )  # fmt: skip
            outputs.append(o.permute(2, 0, 1, 3))
        return torch.cat(outputs)

    def _context_parallel(self, q, k, v, packed: PackedSeqParams | None, group, dropout: float) -> torch.Tensor:
        tokens, P, r = q.shape[0], group.size(), group.rank()
        if tokens % 2 or k.shape[0] != tokens:
            raise ValueError(
                f"each of {P} context-parallel ranks has the queries and keys of two chunks of equal length, but this one has "
                f"{tokens} queries and {k.shape[0]} keys; make the sequence length a multiple of {2 * P}"
            )
        n = tokens // 2
        chunks = torch.full((1,), n, device=q.device)
        if q.dim() == 3:
            bounds = _bounds(packed)
            cut = self.documents_cut and packed.local_cp_size is None
            check_once(bounds, _check_documents, P * tokens, 2 * P if cut else 1)
            bounds = bounds.long()
            if cut:
                chunks = bounds.diff() // (2 * P)
        rows, bounds_q, bounds_k = _pieces(chunks, tokens, P, r)
        k, v = (_Gather.apply(x, rows, group) for x in (k, v))
        if q.dim() == 4:
            return self._one_by_one(q, k, v, [0, n, 2 * n], [0, (r + 1) * n, (2 * P + 1) * n], dropout)
        if not cut:  # of both chunks all documents, most of them empty
            a, b = r * n, (2 * P - 1 - r) * n
            bounds_q = _joined(bounds.clamp(a, a + n) - a, bounds.clamp(b, b + n) - b)
            bounds_k = _joined(bounds.clamp(max=a + n), bounds.clamp(max=b + n))
        return self._packed(q, k, v, bounds_q, bounds_k, packed.max_seqlen_q, dropout)


# ---- context parallelism ---------------------------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    """``rows`` of the tokens ``[P * s, ...]`` of all ranks, of each rank's ``[s, ...]``; no row more than twice."""

    @staticmethod
    def forward(ctx, x, rows, group):
        ctx.save_for_backward(rows)
        ctx.group, ctx.tokens = group, x.shape[0]
        everything = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        dist.all_gather_into_tensor(everything, x.contiguous(), group=group)
        return everything.index_select(0, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        # In fp32, which sends twice the bytes of bf16: up to 2P pieces add to a token, and bf16 would round after each of them
        wide = torch.promote_types(grad.dtype, torch.float32)
        everything = grad.new_zeros(ctx.group.size() * ctx.tokens, *grad.shape[1:], dtype=wide)
        everything.index_add_(0, rows, grad.to(wide))  # 0 + a + b: in either order the same
        mine = everything.new_empty(ctx.tokens, *grad.shape[1:])
        dist.reduce_scatter_tensor(mine, everything, group=ctx.group)
        return mine.to(grad.dtype), None, None


def _pieces(chunks: torch.Tensor, tokens: int, P: int, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What rank r's pieces attend to: of every document chunks r and 2P-1-r, to its tokens up to their end.

    Args:
        chunks: ``[N]``, tokens of a chunk of each document.
        tokens: of a rank.

    Returns:
        Rows of the pieces' keys among the tokens of all ranks, ``[(2P + 1) tokens / 2]``; bounds of the pieces and of their keys,
        ``[2N + 1]``.
    """
    keys = torch.stack(((r + 1) * chunks, (2 * P - r) * chunks), 1).flatten()
    bounds_q, bounds_k = (F.pad(x.cumsum(0), (1, 0)) for x in (chunks.repeat_interleave(2), keys))
    piece = torch.repeat_interleave(keys, output_size=(2 * P + 1) * tokens // 2)
    document, place = piece // 2, torch.arange(piece.numel(), device=keys.device) - bounds_k[piece]
    n = chunks[document]
    chunk, offset = place // n, place % n
    second = chunk >= P
    rank = torch.where(second, 2 * P - 1 - chunk, chunk)
    return rank * tokens + bounds_q[2 * document] + second * n + offset, bounds_q, bounds_k


def _joined(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Bounds of what lies one after the other."""
    return torch.cat((first, first[-1] + second[1:]))


def _bounds(packed: PackedSeqParams) -> torch.Tensor:
    """Where documents lie, padded or not."""
    return packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded


def _check_documents(bounds: torch.Tensor, tokens: int, chunks: int) -> None:
    ends = bounds.tolist()
    if ends[-1] != tokens:
        raise ValueError(
            f"packed_seq_params.cu_seqlens_q ends at {ends[-1]}, but all context-parallel ranks together have {tokens} tokens; "
            "give bounds in the whole packed sequence"
        )
    for document, (a, b) in enumerate(pairwise(ends)):
        if (b - a) % chunks:
            raise ValueError(
                f"with documents_cut=True every document is cut into {chunks} equal chunks, but document {document} has {b - a} "
                f"tokens; pad documents to a multiple of {chunks}, or set documents_cut=False for a sequence cut as a whole"
            )
