"""Core attention of the softmax layers of a hybrid on torch's scaled_dot_product_attention.

Megatron's own (core/transformer/dot_product_attention.py) materialises the T x T scores and refuses packed documents.

Over context-parallel ranks every rank gathers the keys and values of all, in their own heads only, and attends with its
queries to the tokens before them: what is computed is the same numbers as on one rank, whatever --cp-comm-type says.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from ..packed import document_bounds, sharing_group
from ..parallel.consistency import Values, check_consistency
from .parallel import Gather, OverRanks, check_packed_bounds, joined, merging_kernel, pieces_of_documents, sequence

KERNELS = {  # of --attention-backend, as TransformerEngine understands it; with auto and local torch chooses
    AttnBackend.flash: SDPBackend.FLASH_ATTENTION,
    AttnBackend.fused: SDPBackend.CUDNN_ATTENTION,
    AttnBackend.unfused: SDPBackend.MATH,
}


# (key, value) of P ranks, one rank after the other, and P -> keys [P * s, b, heads, d], values [P * s, b, heads, e]
Expand = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def refuse_unsupported(config, layer_number: int) -> None:
    """Refuse what softmax layer ``layer_number`` (1-based) of a config cannot do here.

    Raises:
        ValueError: naming the flag and the remedy.
    """
    for value, flag, remedy in (
        (
            is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number),
            f"--window-size {config.window_size}",
            "leave it out",
        ),
        (config.softmax_type != "vanilla", f"--softmax-type {config.softmax_type}", "use vanilla"),
        (
            config.qk_clip or config.log_max_attention_logit,
            "--qk-clip (or --log-max-attention-logit)",
            "leave it out",
        ),
        (config.use_kitchen and config.use_kitchen_attention, "--use-kitchen-attention", "leave it out"),
    ):
        if value:
            raise ValueError(
                f"{flag} is not supported by the softmax layers on torch's SDPA; {remedy}, or install "
                "TransformerEngine and pass --transformer-impl transformer_engine"
            )


class SDPACoreAttention(MegatronModule):
    """Drop-in ``core_attention`` of Megatron's SelfAttention; flash kernels on a GPU, exact on a CPU.

    Causal layers ignore ``attention_mask``, as TransformerEngine does, so that no T x T mask need exist. After a
    prompt, where Megatron says no_mask, each of several new tokens sees the keys up to its own.

    ``config.attention_backend`` chooses the kernel: flash is FlashAttention, fused is cuDNN, unfused is plain torch;
    auto leaves it to torch, which takes cuDNN's on an H100. Packed documents take FlashAttention unless another one is
    named.

    Args:
        pg_collection: process groups; cp is used, and where a batch brings packed_seq_params.cp_group, that instead. Of
            P ranks, rank r holds chunks r and 2P-1-r of the 2P equal chunks of the sequence, packed or not.
        per_document: per-document zigzag: packed documents are cut into such chunks one by one (their lengths are
            multiples of 2P), as Megatron does with --sft through TransformerEngine, and not the packed sequence as a
            whole, as it does with --dataloader-inter-document-masking. PackedSeqParams does not say which; the
            attribute may be set later. Batches with packed_seq_params.local_cp_size are cut as a whole, as Megatron
            always does.

    Over ranks all of them must be given the same shapes and bounds; where these differ, every rank raises the same
    ValueError (see ``parallel.lightning_attn`` for when they are compared).
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
        per_document: bool = False,
        k_channels: int | None = None,
        v_channels: int | None = None,
    ):
        super().__init__(config=config)
        del attention_type, cp_comm_type  # self-attention on the ranks' own heads; there is one way to communicate
        del k_channels, v_channels  # as many as keys and values have
        refuse_unsupported(config, layer_number)
        self.backend = config.attention_backend
        self.cp_group = getattr(pg_collection, "cp", None)
        if config.context_parallel_size > 1 and self.cp_group is None:
            raise ValueError(
                f"context_parallel_size is {config.context_parallel_size}, but pg_collection has no cp; give the "
                "process groups of this rank, as ProcessGroupCollection.use_mpu_process_groups() returns them"
            )
        self.per_document = per_document
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
        *,
        expand: Expand | None = None,
    ) -> torch.Tensor:
        """query ``[sq, b, heads, d]``, key ``[sk, b, groups, d]``, value ``[sk, b, groups, e]`` -> ``[sq, b, heads *
        e]``.

        Packed (thd): ``[t, heads, d]`` -> ``[t, heads * e]``. ``attention_mask`` is True where attention is forbidden.
        Tokens are this rank's; cu_seqlens_q in packed_seq_params are bounds in the whole packed sequence.

        With ``expand``, key and value are two tensors of another meaning, whose first dimension is this rank's tokens
        (key's may be a tensor-parallel rank's part of them). Ranks exchange these, and ``expand`` makes keys and values
        of those of all ranks.
        """
        if attention_bias is not None:
            raise ValueError(
                "attention_bias is not supported by the softmax layers on torch's SDPA; use TransformerEngine"
            )
        mask_type = attn_mask_type or self.attn_mask_type
        causal = mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal)
        dropout = self.dropout if self.training else 0.0
        # with sequence parallelism the tensor-parallel region already has its own generator (as in Megatron's
        # attention)
        own_rng = dropout > 0 and not self.config.sequence_parallel
        group = sharing_group(packed_seq_params, self.cp_group)
        with self._kernels(query), get_cuda_rng_tracker().fork() if own_rng else contextlib.nullcontext():
            if group is not None and group.size() > 1:
                if query.dim() == 4 and not causal:
                    raise ValueError(
                        f"attention with mask type {mask_type.name} is not supported over {group.size()} "
                        "context-parallel ranks, only causal; use --context-parallel-size 1, which generation needs too"
                    )
                return self._context_parallel(query, key, value, packed_seq_params, group, dropout, expand).flatten(-2)
            if expand is not None:
                key, value = expand(key, value, 1)
            if packed_seq_params is not None:
                bounds = document_bounds(packed_seq_params)
                return self._packed(query, key, value, bounds, bounds, packed_seq_params.max_seqlen_q, dropout).flatten(
                    1
                )
            if mask_type == AttnMaskType.no_mask and 1 < query.shape[0] < key.shape[0]:
                # several tokens after a prompt: Megatron turns the mask off, but they must not see each other's future
                every = [(slice(0, query.shape[0]), slice(0, key.shape[0]))]
                return self._one_by_one(query, key, value, every, dropout).flatten(2)
            mask = None
            if not causal and mask_type != AttnMaskType.no_mask and attention_mask is not None:
                mask = ~attention_mask
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [b, heads, s, d]
            if causal and q.shape[2] != k.shape[2]:
                raise ValueError(f"causal attention needs as many queries as keys, got {q.shape[2]} and {k.shape[2]}")
            o = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal,
                scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip
        return o.permute(2, 0, 1, 3).flatten(2)

    def _kernels(self, q: torch.Tensor) -> contextlib.AbstractContextManager:
        """Allows what ``--attention-backend`` names."""
        if self.backend not in KERNELS:
            return contextlib.nullcontext()
        name = self.backend.name
        if self.backend == AttnBackend.fused and not q.is_cuda:
            raise ValueError(
                f"--attention-backend {name} is cuDNN, which needs a GPU: use auto, or move model and batch to a GPU"
            )
        if self.backend != AttnBackend.unfused and q.is_cuda and q.dtype == torch.float32:
            raise ValueError(
                f"--attention-backend {name} has no kernels for fp32: use auto or unfused, or --bf16 or --fp16"
            )
        return sdpa_kernel(KERNELS[self.backend])

    def _packed(self, q, k, v, bounds_q, bounds_k, longest: int | None, dropout: float) -> torch.Tensor:
        """The last query of each document stands at its last key: ``[t, heads, d]``, and keys of other bounds if
        chunks.
        """
        flash = self.backend not in (AttnBackend.fused, AttnBackend.unfused)
        if flash and q.is_cuda and dropout == 0 and q.dtype in (torch.bfloat16, torch.float16):
            from torch.nn.attention.varlen import varlen_attn

            group = q.shape[1] // k.shape[1]
            if group > 1:  # varlen_attn documents equal head counts only
                k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
            longest_q, longest_k = (x.shape[0] if longest is None else min(int(longest), x.shape[0]) for x in (q, k))
            dim = v.shape[-1]
            v = F.pad(v, (0, q.shape[-1] - dim))  # FlashAttention has one head dim
            return varlen_attn(
                q.contiguous(), k.contiguous(), v.contiguous(), bounds_q.to(torch.int32), bounds_k.to(torch.int32),
                longest_q, longest_k, scale=self.softmax_scale, window_size=(-1, 0),
            )[..., :dim]  # fmt: skip
        q, k, v = (x[:, None] for x in (q, k, v))
        pieces = [
            (slice(a, b), slice(c, d))
            for (a, b), (c, d) in zip(pairwise(bounds_q.tolist()), pairwise(bounds_k.tolist()), strict=True)
        ]
        return self._one_by_one(q, k, v, pieces, dropout)[:, 0]

    def _one_by_one(self, q, k, v, pieces: list[tuple[slice, slice]], dropout: float) -> torch.Tensor:
        """As ``_packed``, of ``[t, b, heads, d]``: the queries of each piece to its keys."""
        outputs = []
        for queries, keys in pieces:
            a, b = queries.stop - queries.start, keys.stop - keys.start
            if a == 0 < b:  # a document that ended before this chunk
                continue
            if a != b and self.backend == AttnBackend.fused:
                raise ValueError(
                    f"--attention-backend fused (cuDNN) does not attend from {a} tokens to the {b} up to their end, as "
                    "several tokens after a prompt need it, and packed documents and dropout over context-parallel "
                    "ranks: use flash or auto"
                )
            o = F.scaled_dot_product_attention(
                *(x.permute(1, 2, 0, 3) for x in (q[queries], k[keys], v[keys])), attn_mask=causal_lower_right(a, b),
                dropout_p=dropout, scale=self.softmax_scale, enable_gqa=q.shape[2] != k.shape[2],
            )  # fmt: skip
            outputs.append(o.permute(2, 0, 1, 3))
        return torch.cat(outputs)

    def _context_parallel(
        self, q, k, v, packed: PackedSeqParams | None, group, dropout: float, expand: Expand | None
    ) -> torch.Tensor:
        tokens, P, r = q.shape[0], group.size(), group.rank()
        if tokens % 2 or v.shape[0] != tokens:
            raise ValueError(
                f"each of {P} context-parallel ranks has the queries and keys of two chunks of equal length, but this "
                f"one has {tokens} queries and {v.shape[0]} keys; make the sequence length a multiple of {2 * P}"
            )
        n = tokens // 2
        bounds = None if packed is None else document_bounds(packed)
        cut = packed is not None and self.per_document and packed.local_cp_size is None
        self._check_consistency(q, k, v, bounds, cut, group)
        if expand is not None:
            k, v = expand(Gather.apply(k, None, group), Gather.apply(v, None, group), P)

        def gathered(rows: torch.Tensor) -> Iterator[torch.Tensor]:
            """``rows`` of the keys, and of the values, of all ranks: in their place, so that these are not kept."""
            return (Gather.apply(x, rows, group) if expand is None else x.index_select(0, rows) for x in (k, v))

        if bounds is None:
            if dropout == 0 and (kernel := merging_kernel(q, k, v, self.softmax_scale)) is not None:
                return OverRanks.apply(q, k, v, group, self.softmax_scale, kernel, expand is None)
            k, v = gathered(sequence(tokens, P, q.device))
            pieces = [(slice(i * n, (i + 1) * n), slice(0, (c + 1) * n)) for i, c in enumerate((r, 2 * P - 1 - r))]
            return self._one_by_one(q, k, v, pieces, dropout)
        chunks = torch.full((1,), n, device=q.device)
        bounds = bounds.long()
        if cut:
            chunks = bounds.diff() // (2 * P)
        rows, bounds_q, bounds_k = pieces_of_documents(chunks, tokens, P, r)
        k, v = gathered(rows)
        if not cut:  # of both chunks all documents, most of them empty
            a, b = r * n, (2 * P - 1 - r) * n
            bounds_q = joined(bounds.clamp(a, a + n) - a, bounds.clamp(b, b + n) - b)
            bounds_k = joined(bounds.clamp(max=a + n), bounds.clamp(max=b + n))
        return self._packed(q, k, v, bounds_q, bounds_k, packed.max_seqlen_q, dropout)

    def _check_consistency(self, q, k, v, bounds: torch.Tensor | None, cut: bool, group) -> None:
        """Ranks that differ in what is sent would wait for each other, or read what another rank has not meant."""
        total, chunks = group.size() * q.shape[0], 2 * group.size() if cut else 1
        check = functools.partial(check_packed_bounds, total, chunks)
        values = [Values("cu_seqlens", bounds, check, (total, chunks))]
        # of each: keys that need none on one rank alone would leave the others waiting for it in their backward
        learn = [name for name, x in (("q", q), ("k", k), ("v", v)) if x.requires_grad and torch.is_grad_enabled()]
        check_consistency(
            group, q.device, values, operator="softmax attention", tokens=q.shape[0],
            batch=q.shape[1] if q.dim() == 4 else 1, heads=q.shape[-2], dim=q.shape[-1],
            groups=k.shape[-2] if k.dim() == q.dim() else 0, value_dim=v.shape[-1], dtype=q.dtype, per_document=cut,
            scale=self.softmax_scale,
            documents=0 if bounds is None else bounds.numel() - 1,
            gradients=" ".join(learn) or "none",
        )  # fmt: skip
