"""add_heads: sums of the gradients of heads that share k and v, against fp64, and the kernel launched."""

import pytest
import torch

from lightning_megatron.ops.triton import pointwise as pointwise_kernels

from ..tolerances import POINTWISE, SMALLEST, error
from .cases import pick, randn
from .launches import record_add_heads


@pytest.fixture
def small_tiles(monkeypatch):
    """Several programs, the last one not full."""
    monkeypatch.setattr(pointwise_kernels, "TILE", 128)


@pytest.mark.parametrize("group", [1, 2, 3, 7, 16])
def test_add_heads(triton_impl, rng, small_tiles, group):
    low = dict(dtype=triton_impl.dtype, device=triton_impl.device)
    for K, V in ((16, 48), (80, 16), (128, 128)):
        B, T, heads = pick(rng, [(1, 1, 1), (2, 5, 3), (1, 33, 2)])
        given = [randn(rng, B, T, heads * group, dim).to(**low) for dim in (K, V)]
        sums = [torch.empty(B, T, heads, dim, **low) for dim in (K, V)]
        pointwise_kernels.add_heads(*given, *sums)
        for x, y in zip(given, sums, strict=True):
            want = x.double().cpu().unflatten(2, (heads, group)).sum(3)
            assert error("o", y, want, SMALLEST[triton_impl.dtype]) <= POINTWISE[triton_impl.dtype]


@pytest.mark.gpu
def test_heads_are_added_in_fp32():
    x = torch.tensor([256.0, 1.0, 1.0, 1.0], dtype=torch.bfloat16, device="cuda")
    x = x.view(1, 1, 4, 1).expand(-1, -1, -1, 16)
    dk, dv = (torch.empty(1, 1, 1, 16, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    pointwise_kernels.add_heads(x.contiguous(), x.contiguous(), dk, dv)
    assert (dk == 260).all() and (dv == 260).all()  # 259, rounded once; bf16 would stay at 256


def test_launch_of_added_heads():
    (launch,) = record_add_heads(dtype=torch.bfloat16, T=2**20, heads=8, group=4, K=128, V=128)
    assert 0 < launch.grid[0] < 2**31 and launch.arguments["GROUP"] == 4
