"""merge_parts: attention to groups of keys is attention to all of them; strides, what is outside, and the kernel."""

import pytest
import torch

from lightning_megatron.ops.merge import merge_parts
from lightning_megatron.ops.triton import merge as merge_kernels

from ..tolerances import POINTWISE, SMALLEST, error
from .cases import assert_same_bits, pick, randn
from .launches import record_merge

STARTS = [(0, 0), (0, 17), (0, 0, 17), (0, 17, 20), (0, 36), (0, 37)]  # of 37 queries; the last part is empty


def attend(q, k, v) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [b, h, t, d] and log-sum-exps [b, h, t], without a mask."""
    scores = q @ k.transpose(-1, -2)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def case(rng, impl, starts, size=4.0):
    """Parts in the dtype of impl, and o and lse of all keys in fp64."""
    b, h, d, t = pick(rng, [(1, 1, 16, 37), (2, 3, 8, 37), (1, 2, 80, 37)])
    print(f"{impl} {starts=} {b=} {h=} {d=}")
    q, groups, want, log = size * randn(rng, b, h, t, d), [], [], []
    for _ in starts:
        groups.append((randn(rng, b, h, 5, d), randn(rng, b, h, 5, d)))
    for at in range(t):  # each query by itself
        keys, values = zip(*(group for group, start in zip(groups, starts, strict=True) if at >= start), strict=True)
        x, lse = attend(q[:, :, at : at + 1], torch.cat(keys, 2), torch.cat(values, 2))
        want.append(x)
        log.append(lse)
    parts = []
    for (k, v), start in zip(groups, starts, strict=True):
        x, lse = attend(q[:, :, start:], k, v)
        parts.append((x.to(impl.device, impl.dtype), lse.to(impl.device, impl.wide), start))
    return parts, torch.cat(want, 2).permute(2, 0, 1, 3), torch.cat(log, 2)


@pytest.mark.parametrize("starts", STARTS)
def test_merge(every_impl, rng, monkeypatch, starts):
    monkeypatch.setattr(merge_kernels, "TILE", 256)
    parts, want, log = case(rng, every_impl, starts)
    o, lse = merge_parts(parts, backend=every_impl.backend)
    assert o.dtype == every_impl.dtype and o.is_contiguous() and o.shape == want.shape
    assert lse.dtype == every_impl.wide and lse.is_contiguous()
    assert error("o", o, want, SMALLEST[every_impl.dtype]) <= 2 * POINTWISE[every_impl.dtype]  # parts are rounded, too
    torch.testing.assert_close(lse.cpu().double(), log, rtol=1e-5, atol=1e-5)


def test_weights_that_fp32_cannot_hold(impl, rng):
    """Log-sum-exps of hundreds either way."""
    parts, want, _ = case(rng, impl, (0, 0, 17), size=300.0)
    o, lse = merge_parts(parts, backend=impl.backend)
    assert o.isfinite().all() and lse.isfinite().all()
    assert error("o", o, want, SMALLEST[impl.dtype]) <= max(2 * POINTWISE[impl.dtype], 1e-3)  # of weights near 1/2


def test_one_part_alone_keeps_its_bits(impl, rng):
    parts, *_ = case(rng, impl, (0, 17))
    o, lse = merge_parts(parts, backend=impl.backend)
    x, log, _ = parts[0]
    assert torch.equal(o[:17], x.permute(2, 0, 1, 3)[:17]) and torch.equal(lse[..., :17], log[..., :17].to(lse.dtype))


def test_strides(triton_impl, rng):
    parts, *_ = case(rng, triton_impl, (0, 0, 17))
    want = dict(enumerate(merge_parts(parts, backend=triton_impl.backend)))
    tokens_first = lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    last_apart = lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2)
    for change in (tokens_first, last_apart):
        others = [(change(x), last_apart(lse), start) for x, lse, start in parts]
        assert_same_bits(dict(enumerate(merge_parts(others, backend=triton_impl.backend))), want)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(rng):
    t, tail = 2**31 // (8 * 128) + 70, 5
    x = torch.zeros(1, 8, t, 128, dtype=torch.bfloat16, device="cuda")
    x[:, :, -tail:] = randn(rng, 1, 8, tail, 128).to(x)
    lse = torch.zeros(1, 8, t, device="cuda")
    half = x[:, :, -tail:] / 2
    whole, _ = merge_parts([(x, lse, 0), (half, lse[..., -tail:], t - tail)])
    alone, _ = merge_parts([(x[:, :, -tail:], lse[..., -tail:], 0), (half, lse[..., -tail:], 0)])
    assert torch.equal(whole[-tail:], alone)


def test_launches():
    """One, whose constants do not depend on the numbers of queries and keys."""
    constants = set()
    for queries in (2, 300, 2**20):
        (launch,) = record_merge(dtype=torch.bfloat16, queries=queries, heads=8, D=128)
        assert 0 < launch.grid[0] < 2**31
        constants.add(tuple(launch.arguments[name] for name in ("D", "BD", "BT")))
    assert len(constants) == 1
