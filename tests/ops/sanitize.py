"""Every kernel on small inputs, for NVIDIA's compute-sanitizer:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1    # each tensor its own allocation, so that memcheck sees where it ends
    compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.ops.sanitize
    compute-sanitizer --tool racecheck --error-exitcode 1 python -m tests.ops.sanitize

Names of dtypes after it choose among them. Run it once without the sanitizer first, for instance a process for each
dtype: compiling its kernels takes minutes.
"""

from __future__ import annotations

import sys

import torch

from lightning_megatron.ops import lightning_attn
from lightning_megatron.ops.backend import Destination
from lightning_megatron.ops.linear_loss import linear_cross_entropy
from lightning_megatron.ops.loss import vocab_parallel_cross_entropy
from lightning_megatron.ops.merge import merge_parts
from lightning_megatron.ops.pointwise import norm_gate, split_heads, swiglu
from lightning_megatron.ops.triton import attention as triton_backend

DTYPES = ("bfloat16", "float16", "float32")


def operator(T: int, K: int, V: int, dtype: torch.dtype, bounds: list[int] | None = None) -> None:
    """Forward and backward with states, then the pieces that context parallelism uses."""
    draw = lambda *shape, dtype=dtype: torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)
    q, k, v = draw(1, T, 4, K), draw(1, T, 2, K), draw(1, T, 2, V)
    log_decay = torch.tensor([0.0, -0.003, -0.1, -2.0], device="cuda")
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device="cuda", dtype=torch.int32)
    state = draw(1 if bounds is None else len(bounds) - 1, 4, K, V, dtype=torch.float32)
    o, final = lightning_attn(q, k, v, log_decay, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)
    torch.autograd.grad([o, final], [q, k, v, state], [torch.randn_like(o), torch.randn_like(final)])
    if T > 1:
        q, k, v, state = (x.detach() for x in (q, k, v, state[:1].expand(2, -1, -1, -1)))
        rows, documents = None, None  # two parts of a sequence, packed or not
        if bounds is not None:
            rows = triton_backend.find_documents(cu_seqlens, T // 2, T, starts=(0, T // 2))
            documents = triton_backend.find_documents(cu_seqlens, T, T)
        pairs = torch.tensor([(0, 1), (1, 1), (2, 1), (0, 2)], device="cuda", dtype=torch.int32)
        triton_backend.decay_factors(log_decay, pairs, length=T // 2, cu_seqlens=cu_seqlens)
        own, parts = triton_backend.local_states(k, v, log_decay, None, rows, pieces=2)
        o, _, saved, plan = triton_backend.forward(q, k, v, log_decay, 1.0, state, rows, False, parts, 2)
        triton_backend.backward(q, k, v, log_decay, 1.0, state, rows, saved, plan, torch.randn_like(o), state, pieces=2)
        weights = torch.rand(2, 2, 1, 4, device="cuda")
        triton_backend.combine(own[:, None], weights)
        for chunks, between in ((2, None), (1, torch.rand(1, 4, device="cuda"))):  # apart, and as one state
            shape = (chunks, 1, 4, K, V)
            buffer = torch.zeros(triton_backend.buffer_words(1, shape), device="cuda")
            destination = Destination(torch.tensor([buffer.data_ptr()], device="cuda"), 0, 10**10, shape, between)
            triton_backend.local_states(k, v, log_decay, None, rows, pieces=2, destination=destination)
            triton_backend.receive(destination, weights[:, :chunks])
        triton_backend.final_states(k, v, log_decay, None, documents)
    if bounds is not None:  # two ranks that cut documents one by one
        triton_backend.find_documents(4 * cu_seqlens, 2 * T, 4 * T, per_document=4)
        pairs = torch.tensor([(0, 1), (3, 1)], device="cuda", dtype=torch.int32)
        triton_backend.decay_factors(log_decay, pairs, cu_seqlens=4 * cu_seqlens, per_document=4)


def around(dtype: torch.dtype) -> None:
    """What surrounds the operator in a model."""
    draw = lambda *shape: torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)
    mixed, weight = draw(70, 2, 2 * (128 + 128 + 64 + 64)), draw(256)
    q, gate, k, v = split_heads(mixed, (128, 128, 64, 64), feature_map="silu-qkv")
    y = norm_gate(v.repeat_interleave(2, 2), gate, weight, kind="sigmoid", width=64)
    torch.autograd.grad([q, k, y], [mixed, weight], [torch.randn_like(x) for x in (q, k, y)])
    x = draw(70, 2, 2 * 200)
    torch.autograd.grad(swiglu(x), x, torch.randn(70, 2, 200, device="cuda", dtype=dtype))
    with torch.no_grad():
        merge_parts([(draw(1, 2, t, 96), torch.randn(1, 2, t, device="cuda"), 70 - t) for t in (70, 70, 30)])
    targets = torch.randint(1000, (70, 2), device="cuda")
    logits = draw(70, 2, 1000)
    torch.autograd.grad(vocab_parallel_cross_entropy(logits, targets).sum(), logits)
    hidden, table = draw(70, 2, 64), draw(1000, 64)
    torch.autograd.grad(linear_cross_entropy(hidden, table, targets, chunk=32).sum(), [hidden, table])


def main(dtypes: list[str]) -> None:
    torch.manual_seed(0)
    for dtype in (getattr(torch, name) for name in dtypes or DTYPES):
        for K, V in ((64, 64), (128, 128), (48, 96)):
            operator(1, K, V, dtype)
            operator(1100, K, V, dtype)
            operator(1100, K, V, dtype, [0, 1, 1, 500, 1037, 1100])
        around(dtype)
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main(sys.argv[1:])
