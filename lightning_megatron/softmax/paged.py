"""Softmax attention to keys and values in the blocks of Megatron's dynamic inference context.

``cache[block, position]`` holds a token; ``block_table[i]`` lists the blocks of request i in order. A step that only
decodes runs one kernel, which reads lengths and blocks on the device, so that a captured CUDA graph serves later steps.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

MAX_HEAD_DIM, MAX_LATENT = 256, 512  # of keys and values; of latents, without the rotated part

REPEATED = 2**29  # numbers: of keys, repeated for the heads that share them, 1 GiB in bf16


class Requests(NamedTuple):
    """A step of several requests, on the host: ``decoding`` ones with one new token each, then those with more."""

    decoding: int
    tokens: list[int]  # new ones of each request, padding left out
    lengths: list[int]  # of all its tokens, new ones too

    @classmethod
    def read(cls, cu_seqlens_q: torch.Tensor, seqused_k: torch.Tensor) -> Requests:
        """One copy from the device, for which the host waits."""
        numbers = torch.cat([cu_seqlens_q.diff(), seqused_k]).tolist()
        count = len(seqused_k)
        tokens, lengths = numbers[:count], numbers[count:]
        while tokens and tokens[-1] == 0:
            tokens.pop()
        decoding = next((i for i, n in enumerate(tokens) if n != 1), len(tokens))
        return cls(decoding, tokens, lengths[: len(tokens)])


def attend(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor, seqused_k: torch.Tensor, *, scale: float, decode_only: bool,
) -> torch.Tensor:  # fmt: skip
    """Causal attention of every request's new tokens, which are its last: o = softmax(scale q k^T) v.

    Args:
        q: ``[tokens, H, K]``, requests one after another, padding last.
        k_cache, v_cache: ``[blocks, block_size, Hkv, K or V]``, which hold the new tokens already.
        block_table: integers ``[requests, max_blocks]``; entries behind a request's last block are not read.
        cu_seqlens_q: ``[requests + 1]``, where each request's new tokens start; those of padding are none.
        seqused_k: ``[requests]``, how many tokens each has; 0 for padding.
        decode_only: row i of q is the only new token of request i; nothing is read on the host then.

    Returns:
        ``[tokens, H, V]`` in q's dtype; zeros for padding.
    """
    if decode_only and q.shape[0] == seqused_k.shape[0]:
        return decode(q, k_cache, v_cache, block_table, seqused_k, scale=scale)
    requests = Requests.read(cu_seqlens_q, seqused_k)
    n = requests.decoding
    o = q.new_zeros(*q.shape[:2], v_cache.shape[3])
    if n:
        o[:n] = decode(q[:n], k_cache, v_cache, block_table[:n], seqused_k[:n], scale=scale)
    read(o, q, (k_cache, v_cache), lambda k, v: (k, v), block_table, requests, scale)
    return o


def decode(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor | int, block_table: torch.Tensor,
    seqused_k: torch.Tensor, *, scale: float, kernel: bool | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention of one new token of each request, row i of q.

    Args:
        v_cache: as of ``attend``; or a number: values are that many first channels of the keys.
        kernel: Triton, or torch, which waits for the device; None: Triton on a GPU.
    """
    if q.is_cuda if kernel is None else kernel:
        from ..ops.triton.paged import decode as launch

        return launch(q, k_cache, v_cache, block_table, seqused_k, scale)
    values = v_cache if isinstance(v_cache, int) else v_cache.shape[3]
    o = q.new_zeros(*q.shape[:2], values)
    lengths = seqused_k.tolist()
    requests = Requests(0, [int(n > 0) for n in lengths], lengths)
    if isinstance(v_cache, int):
        read(o, q, (k_cache,), lambda k: (k, k[..., :values]), block_table, requests, scale)
    else:
        read(o, q, (k_cache, v_cache), lambda k, v: (k, v), block_table, requests, scale)
    return o


def read(
    o: torch.Tensor, q: torch.Tensor, caches: tuple[torch.Tensor, ...], expand: Callable, block_table: torch.Tensor,
    requests: Requests, scale: float,
) -> None:  # fmt: skip
    """Attention of the requests behind those that decode, to their gathered keys and values, into their rows of o.

    Args:
        caches: each ``[blocks, block_size, ...]``.
        expand: rows of the caches, ``[keys, ...]`` each -> keys ``[keys, groups, K]``, values ``[keys, groups, V]``.
    """
    first = requests.decoding
    tokens, lengths = requests.tokens[first:], requests.lengths[first:]
    if not any(tokens):
        return
    rows = _rows(block_table[first : first + len(tokens)], lengths, caches[0].shape[1])
    k, v = expand(*(cache.flatten(0, 1)[rows] for cache in caches))
    queries = slice(first, first + sum(tokens))
    dim = q.shape[-1]
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and dim % 8 == 0 and v.shape[-1] <= dim <= MAX_HEAD_DIM:
        o[queries] = _varlen(q[queries], k, v, tokens, lengths, scale)
        return
    at, start = first, 0
    for n, length in zip(tokens, lengths, strict=True):
        if n:
            pieces = q[at : at + n], k[start : start + length], v[start : start + length]
            new = F.scaled_dot_product_attention(
                *(x.transpose(0, 1)[None] for x in pieces), attn_mask=causal_lower_right(n, length),
                scale=scale, enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip
            o[at : at + n] = new[0].transpose(0, 1)
        at, start = at + n, start + length


def _rows(block_table: torch.Tensor, lengths: list[int], block_size: int) -> torch.Tensor:
    """Rows of the flat cache that hold the tokens of these requests, one request after another."""
    device = block_table.device
    counts = torch.tensor(lengths).to(device)
    request = torch.repeat_interleave(counts, output_size=sum(lengths))
    position = torch.arange(sum(lengths), device=device) - (counts.cumsum(0) - counts)[request]
    return block_table[request, position // block_size].long() * block_size + position % block_size


def _varlen(q, k, v, tokens: list[int], lengths: list[int], scale: float) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    group, dim = q.shape[1] // k.shape[1], v.shape[-1]
    bounds = [
        F.pad(torch.tensor(x, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)).to(q.device)
        for x in (tokens, lengths)
    ]
    outputs = []
    heads = max(1, REPEATED // (len(k) * group * q.shape[-1]))  # of k and v at a time
    for some_q, *some in zip(q.split(heads * group, 1), k.split(heads, 1), v.split(heads, 1), strict=True):
        some[1] = F.pad(some[1], (0, q.shape[-1] - dim))  # FlashAttention has one head dim
        if group > 1:  # varlen_attn documents equal head counts only
            some = [x.repeat_interleave(group, dim=1) for x in some]
        o = varlen_attn(
            some_q.contiguous(), *(x.contiguous() for x in some), *bounds, max(tokens), max(lengths), scale=scale,
            window_size=(-1, 0),
        )  # fmt: skip
        outputs.append(o[..., :dim])
    return torch.cat(outputs, 1)


def refuse_unserved(config, layer_number: int) -> None:
    """Refuse what softmax layer ``layer_number`` (from 1) cannot do here; where flash-attn is, ask of latents only.

    Raises:
        ValueError: naming the flag and the remedy.
    """
    from megatron.core.transformer.utils import is_layer_window_attention

    window = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
    latent = config.multi_latent_attention
    rank = config.kv_lora_rank if latent else 0
    for value, flag in (
        (window, f"--window-size {config.window_size}"),
        (config.softmax_type != "vanilla", f"--softmax-type {config.softmax_type}"),
        (not latent and config.kv_channels > MAX_HEAD_DIM, f"--kv-channels {config.kv_channels} (> {MAX_HEAD_DIM})"),
        (rank > MAX_LATENT, f"--kv-lora-rank {rank} (> {MAX_LATENT})"),
    ):
        if value:
            raise ValueError(
                f"{flag}: softmax layer {layer_number} cannot be served by the dynamic engine"
                + (", nor with flash-attn" if latent else " without flash-attn; install flash-attn >= 2.7.3, 3 or 4")
                + "; use Megatron's static engine (examples/generate.py)"
            )
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        raise ValueError("softmax layers of the dynamic engine need triton on a GPU; pip install triton")
