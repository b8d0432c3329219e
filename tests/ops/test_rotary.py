"""rotary: values and gradients against complex numbers in fp64, strides, what is kept, and the kernel launched."""

import pytest
import torch

from lightning_megatron.ops import rotary
from lightning_megatron.ops.triton import rotary as rotary_kernels

from ..tolerances import POINTWISE, SMALLEST, error
from .cases import assert_same_bits, pick, randn, with_gradient
from .launches import record_rotary

# s, b, heads, D, pairs
SIZES = [
    (1, 1, 1, 16, 8),
    (37, 1, 6, 128, 64),
    (7, 3, 9, 64, 16),
    (5, 2, 8, 48, 24),
    (33, 2, 3, 40, 1),
    (3, 1, 17, 32, 11),
]
PAIRS = [(False, None), (True, None), (True, False), (False, True)]


@pytest.fixture
def small_tiles(monkeypatch):
    """Several programs along tokens and heads, the last ones not full."""
    monkeypatch.setattr(rotary_kernels, "TILE", 64)
    monkeypatch.setattr(rotary_kernels, "HEADS", 4)


def case(rng, impl, sizes):
    """x, the gradient of y, and angles: up to 1000 radians."""
    print(f"{impl} {sizes=}")
    *shape, pairs = sizes
    low = dict(dtype=impl.dtype, device=impl.device)
    return randn(rng, *shape).to(**low), randn(rng, *shape).to(**low), angles_of(rng, shape[0], pairs).to(impl.device)


def angles_of(rng, s, pairs):
    return (1000 * randn(rng, s, pairs)).float()


def formula(x, angles, scale, interleaved, interleaved_out):
    """x as complex numbers times scale e^(i t)."""
    n = angles.shape[1]
    a, b = (x[..., : 2 * n : 2], x[..., 1 : 2 * n : 2]) if interleaved else (x[..., :n], x[..., n : 2 * n])
    turned = torch.complex(a, b) * torch.polar(torch.full_like(angles, scale), angles)[:, None, None]
    parts = torch.view_as_real(turned)
    if not (interleaved if interleaved_out is None else interleaved_out):
        parts = parts.transpose(-1, -2)
    return torch.cat((parts.flatten(-2), x[..., 2 * n :]), -1)


def assert_close(impl, got, x, dy, angles, *how) -> None:
    """Relative RMS of every head."""
    want = with_gradient(lambda x: formula(x, angles.double().cpu(), *how), x.double().cpu(), dy.double().cpu())
    errors = {}
    for name, found in got.items():
        assert found.dtype == impl.dtype and found.shape == want[name].shape, name
        errors[name] = error("o", found, want[name], SMALLEST[impl.dtype])
    print(errors)
    assert max(errors.values()) <= POINTWISE[impl.dtype], errors


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_rotary(every_impl, rng, small_tiles, pairs, scale):
    x, dy, angles = case(rng, every_impl, pick(rng, SIZES))
    how = dict(scale=scale, interleaved=pairs[0], interleaved_out=pairs[1], backend=every_impl.backend)
    got = with_gradient(lambda x: rotary(x, angles, **how), x, dy)
    assert_close(every_impl, got, x, dy, angles, scale, *pairs)


@pytest.mark.parametrize("sizes", SIZES)
def test_tiles_in_use(impl, rng, sizes):
    x, dy, angles = case(rng, impl, sizes)
    got = with_gradient(lambda x: rotary(x, angles, backend=impl.backend), x, dy)
    assert_close(impl, got, x, dy, angles, 1.0, False, None)


def test_strides(triton_impl, rng, small_tiles):
    x, dy, angles = case(rng, triton_impl, (7, 3, 6, 32, 8))
    function = lambda x, angles=angles: rotary(x, angles, backend=triton_impl.backend)
    want = with_gradient(function, x, dy)
    for change in (
        lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],
        lambda t: torch.cat((t, t), 2)[:, :, : t.shape[2]],
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.transpose(1, -1).contiguous().transpose(1, -1),
    ):
        assert_same_bits(with_gradient(function, change(x), dy), want)
        assert_same_bits(with_gradient(function, x, change(dy)), want)
    for other in (
        torch.stack((angles, angles), -1)[..., 0],
        torch.cat((angles, angles), -1)[:, :8],
        angles.T.clone().T,
    ):
        assert_same_bits(with_gradient(lambda x, other=other: function(x, other), x, dy), want)
    ones = torch.ones_like(dy)
    assert_same_bits(*(with_gradient(function, x, y) for y in (ones, ones[:1, :1, :1].expand_as(ones))))


@pytest.mark.parametrize("sizes", [(0, 2, 3, 16, 4), (3, 0, 3, 16, 4), (3, 2, 3, 16, 0)])
def test_nothing_to_turn(impl, rng, sizes):
    x, dy, angles = case(rng, impl, sizes)
    got = with_gradient(lambda x: rotary(x, angles, backend=impl.backend), x, dy)
    assert torch.equal(got["y"], x) and torch.equal(got["dx"], dy)


def test_only_angles_are_kept(impl, rng):
    x, _, angles = case(rng, impl, (7, 3, 2, 32, 16))
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        rotary(x, angles, backend=impl.backend)
    assert x.data_ptr() not in kept and (impl.backend == "torch" or kept == [angles.data_ptr()])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(impl, rng, context):
    x, _, angles = case(rng, impl, (1, 3, 2, 32, 16))
    want = rotary(x.clone().requires_grad_(), angles, backend=impl.backend)
    with context():
        got = rotary(x.clone(), angles, backend=impl.backend)
    assert torch.equal(got, want) and want.requires_grad and not got.requires_grad


def test_angles_made_in_inference_mode(impl, rng):
    """As Megatron memoizes them where a model first reads, and then trains on as many tokens."""
    x, dy, angles = case(rng, impl, (7, 3, 2, 32, 8))
    with torch.inference_mode():
        same = angles.clone()
    function = lambda angles: lambda x: rotary(x, angles, backend=impl.backend)
    assert_same_bits(with_gradient(function(same), x, dy), with_gradient(function(angles), x, dy))


def test_far_positions_in_fp64(impl, rng):
    """Angles that fp32 could not tell from their neighbours."""
    positions = torch.tensor([1, 2**22 - 1, 4_000_003, 10**9], dtype=torch.float64)
    inverse = 10000.0 ** (-torch.arange(16, dtype=torch.float64) / 16)
    x, dy, _ = case(rng, impl, (4, 2, 3, 32, 16))
    angles = torch.outer(positions, inverse).to(impl.device)
    got = with_gradient(lambda x: rotary(x, angles, backend=impl.backend), x, dy)
    assert_close(impl, got, x, dy, angles, 1.0, False, None)


def test_gradcheck(rng):
    x, angles = randn(rng, 3, 2, 2, 10).requires_grad_(), angles_of(rng, 3, 4)
    assert torch.autograd.gradcheck(lambda x: rotary(x, angles, scale=0.7), x)


@pytest.mark.parametrize(
    "shape, angles", [((3, 2, 8), (3, 4)), ((3, 2, 1, 8), (2, 4)), ((3, 2, 1, 8), (3, 5)), ((3, 2, 1, 8), (3, 1, 4))]
)
def test_refused_shapes(shape, angles):
    with pytest.raises(ValueError, match=r"must be \[s, n\] and \[s, b, heads, D\]"):
        rotary(torch.zeros(shape), torch.zeros(angles))


def test_angles_that_learn_are_refused():
    with pytest.raises(ValueError, match="has no gradient for them"):
        rotary(torch.zeros(3, 2, 1, 8), torch.zeros(3, 4, requires_grad=True))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(rng):
    """The last tokens of a tensor that int32 cannot count get the bits they get alone."""
    heads, D, tail = 32, 128, 5
    s = 2**31 // (heads * D) + 100
    angles = angles_of(rng, s, 64).cuda()
    x = torch.zeros(s, 1, heads, D, dtype=torch.bfloat16, device="cuda")
    x[-tail:] = randn(rng, tail, 1, heads, D).to(x)
    whole = with_gradient(lambda x: rotary(x, angles), x, x)
    alone = with_gradient(lambda x: rotary(x, angles[-tail:]), x[-tail:].clone(), x[-tail:].clone())
    assert_same_bits({name: t[-tail:] for name, t in whole.items()}, alone)


def test_launches():
    """One each way; constants do not depend on the number of tokens, and grids are within CUDA's limits."""
    constants = set()
    for s, b in ((1, 1), (300, 2), (70001, 1), (2**26, 1)):
        launches = record_rotary(dtype=torch.bfloat16, s=s, b=b, heads=40, D=128, pairs=32)
        assert [launch.what for launch in launches] == ["rotary_kernel"] * 2
        assert all(len(launch.grid) == 1 and 0 < launch.grid[0] < 2**31 for launch in launches)
        constants |= {tuple(launch.arguments[name] for name in ("D", "N", "BN", "BP", "BR")) for launch in launches}
    assert len(constants) == 1
