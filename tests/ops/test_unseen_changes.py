"""Bounds of documents may change without a trace in ``tensor._version``: nothing derived from them outlives its
call.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_megatron.ops import lightning_attn

from .cases import randn


def unseen(x: torch.Tensor, values: list) -> None:
    """Write into x as a collective, a graph replay or a kernel of one's own does: no version is raised."""
    version = x._version
    torch.from_dlpack(x).copy_(torch.tensor(values, dtype=x.dtype))
    assert x._version == version, "the change would be seen"


def call(
    cu_seqlens: torch.Tensor, tokens: list[torch.Tensor], backend: str, between=lambda: None
) -> list[torch.Tensor]:
    """Output, final states and gradients; ``between`` runs after the forward."""
    q, k, v = (x.clone().requires_grad_() for x in tokens[:3])
    log_decay = tokens[3]
    o, final = lightning_attn(q, k, v, log_decay, cu_seqlens=cu_seqlens, output_final_state=True, backend=backend)
    between()
    grads = torch.autograd.grad(o.square().sum() + final.square().sum(), [q, k, v])
    return [o.detach(), final.detach(), *grads]


def draw(rng: torch.Generator, device: str = "cpu", T: int = 48) -> list[torch.Tensor]:
    """q, k, v and log_decay."""
    tokens = [randn(rng, 1, T, 2, 16).float().to(device) for _ in range(3)]
    return [*tokens, torch.tensor([-0.1, -0.01], device=device)]


def assert_same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_bounds_that_change_between_calls(rng, backend, dtype):
    if torch.cuda.is_available() and backend == "triton":
        pytest.skip("interpreter only; on a GPU see below")
    tokens, bounds = draw(rng), [torch.tensor([0, *x, 48], dtype=dtype) for x in ([7, 20], [20, 20], [1, 47])]
    kept = bounds[0].clone()
    for new in bounds:
        unseen(kept, new.tolist())
        assert_same(call(kept, tokens, backend), call(new, tokens, backend))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_bounds_that_change_before_the_backward(rng, backend):
    """Forward and backward of one call have the same documents."""
    if torch.cuda.is_available() and backend == "triton":
        pytest.skip("interpreter only; on a GPU see below")
    tokens, kept = draw(rng), torch.tensor([0, 7, 20, 48], dtype=torch.int32)
    want = call(kept.clone(), tokens, backend)
    assert_same(call(kept, tokens, backend, lambda: unseen(kept, [0, 30, 31, 48])), want)


def test_wrong_values_are_refused_on_a_cpu_however_they_came():
    q, log_decay, bounds = torch.zeros(1, 8, 2, 16), torch.tensor([-0.1, -0.2]), torch.tensor([0, 3, 8])
    lightning_attn(q, q, q, log_decay, cu_seqlens=bounds)
    unseen(bounds, [0, 9, 8])
    with pytest.raises(ValueError, match="followed by 8"):
        lightning_attn(q, q, q, log_decay, cu_seqlens=bounds)
    unseen(log_decay, [-0.1, 0.2])
    with pytest.raises(ValueError, match=r"log_decay\[1\] = 0.2"):
        lightning_attn(q, q, q, log_decay)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_bounds_that_change_on_a_gpu(rng):
    tokens, kept = draw(rng, "cuda", 3000), torch.tensor([0, 7, 20, 3000], dtype=torch.int32, device="cuda")
    for values in ([0, 7, 20, 3000], [0, 1500, 1500, 3000], [0, 1, 2999, 3000]):
        unseen(kept, values)
        fresh = torch.tensor(values, device="cuda", dtype=torch.int32)
        assert_same(call(kept, tokens, "triton"), call(fresh, tokens, "triton"))
    want = call(kept.clone(), tokens, "triton")
    assert_same(call(kept, tokens, "triton", lambda: unseen(kept, [0, 30, 31, 3000])), want)


@pytest.mark.gpu
def test_a_graph_reads_the_bounds_of_each_replay(rng):
    tokens, kept = draw(rng, "cuda", 3000), torch.tensor([0, 7, 20, 3000], dtype=torch.int32, device="cuda")
    call(kept, tokens, "triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(kept, tokens, "triton")
    for values in ([0, 1500, 1500, 3000], [0, 1, 2999, 3000]):
        unseen(kept, values)
        graph.replay()
        assert_same(found, call(torch.tensor(values, device="cuda", dtype=torch.int32), tokens, "triton"))


BROKEN = """
import torch
from lightning_megatron.ops import lightning_attn
q = torch.zeros(1, 3000, 2, 16, device="cuda")
bounds = torch.tensor([0, 7, 20, 3000], device="cuda")
attend = lambda: lightning_attn(q, q, q, torch.tensor([-0.1, -0.2]).cuda(), cu_seqlens=bounds)
attend()
torch.cuda.synchronize()
torch.from_dlpack(bounds).copy_(torch.tensor({values}))
attend()
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.parametrize("values", [[0, 7, 20, 9000], [0, 20, 7, 3000], [5, 7, 20, 3000], [0, 7, 20, 2999]], ids=str)
def test_the_gpu_refuses_wrong_bounds_however_they_came(values):
    """In a process of its own, whose GPU context an assertion ends."""
    run = subprocess.run(
        [sys.executable, "-c", BROKEN.format(values=values)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode != 0 and "cu_seqlens" in run.stderr, run.stderr
