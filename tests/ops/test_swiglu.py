"""swiglu: values and gradients against the formula in fp64, strides, what is kept, and the kernels launched."""

import pytest
import torch

from lightning_megatron.ops import swiglu
from lightning_megatron.ops.triton import pointwise as pointwise_kernels

from ..tolerances import POINTWISE, SMALLEST, error
from .cases import assert_same_bits, pick, randn, with_gradient
from .launches import GLU, record_swiglu

COLUMNS = (16, 48, 80, 336)
TOKENS = [(1,), (37,), (1, 3), (7, 3), (33, 1), (5, 2, 3)]


@pytest.fixture
def small_tiles(monkeypatch):
    """Several programs along rows and columns, the last ones not full."""
    monkeypatch.setattr(pointwise_kernels, "TILE", 128)
    monkeypatch.setattr(pointwise_kernels, "GLU_COLUMNS", 32)


def case(rng, impl, columns, tokens):
    """x and the gradient of y."""
    print(f"{impl} {columns=} {tokens=}")
    low = dict(dtype=impl.dtype, device=impl.device)
    return (3 * randn(rng, *tokens, 2 * columns)).to(**low), randn(rng, *tokens, columns).to(**low)


def formula(x):
    columns = x.shape[-1] // 2
    return x[..., :columns] / (1 + torch.exp(-x[..., :columns])) * x[..., columns:]


def assert_close(impl, got, x, dy) -> None:
    """Relative RMS of every 16 columns, so that halves are not mixed."""
    want = with_gradient(formula, x.double().cpu(), dy.double().cpu())
    errors = {}
    for name, found in got.items():
        assert found.dtype == impl.dtype and found.shape == want[name].shape, name
        pair = [t.reshape(1, -1, t.shape[-1] // 16, 16) for t in (found, want[name])]
        errors[name] = error("o", *pair, SMALLEST[impl.dtype])
    print(errors)
    assert max(errors.values()) <= POINTWISE[impl.dtype], errors


@pytest.mark.parametrize("columns", COLUMNS)
def test_swiglu(every_impl, rng, small_tiles, columns):
    x, dy = case(rng, every_impl, columns, pick(rng, TOKENS))
    assert_close(every_impl, with_gradient(lambda x: swiglu(x, backend=every_impl.backend), x, dy), x, dy)


@pytest.mark.parametrize("columns", [80, 1040, 2816])
def test_tiles_in_use(impl, rng, columns):
    x, dy = case(rng, impl, columns, (9, 1))
    assert_close(impl, with_gradient(lambda x: swiglu(x, backend=impl.backend), x, dy), x, dy)


@pytest.mark.parametrize("size", [60.0, 1e4])
def test_large_values(impl, size):
    """Where exp of a value overflows, silu is 0 or the value itself."""
    x = torch.tensor([[-size, size, 0.0, -size] * 4 + [2.0] * 16], dtype=impl.dtype, device=impl.device)
    got = with_gradient(lambda x: swiglu(x, backend=impl.backend), x, torch.ones_like(x[..., :16]))
    assert all(found.isfinite().all() for found in got.values())
    assert got["y"][0, :4].tolist() == pytest.approx([0.0, 2 * x[0, 1].item(), 0.0, 0.0], rel=1e-6, abs=1e-20)


def test_strides(triton_impl, rng, small_tiles):
    x, dy = case(rng, triton_impl, 48, (7, 3))
    function = lambda x: swiglu(x, backend=triton_impl.backend)
    want = with_gradient(function, x, dy)
    for change in (
        lambda t: torch.cat((t, t), -1)[..., : t.shape[-1]],
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.transpose(1, -1).contiguous().transpose(1, -1),
    ):
        assert_same_bits(with_gradient(function, change(x), dy), want)
        assert_same_bits(with_gradient(function, x, change(dy)), want)
    ones = torch.ones_like(dy)
    assert_same_bits(*(with_gradient(function, x, y) for y in (ones, ones[:1, :1, :1].expand_as(ones))))


@pytest.mark.parametrize("tokens", [(0, 2), (3, 0)])
def test_no_tokens(impl, rng, tokens):
    x, dy = case(rng, impl, 16, tokens)
    got = with_gradient(lambda x: swiglu(x, backend=impl.backend), x, dy)
    assert got["y"].shape == dy.shape and got["dx"].shape == x.shape


def test_only_the_input_is_kept(impl, rng):
    x, _ = case(rng, impl, 48, (7, 3))
    x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        swiglu(x, backend=impl.backend)
    assert kept == [x.data_ptr()]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(impl, rng, context):
    x, _ = case(rng, impl, 48, (1, 3))
    want = swiglu(x.clone().requires_grad_(), backend=impl.backend)
    with context():
        got = swiglu(x.clone(), backend=impl.backend)
    assert torch.equal(got, want) and want.requires_grad and not got.requires_grad


def test_gradcheck(rng):
    assert torch.autograd.gradcheck(swiglu, randn(rng, 3, 2, 8).requires_grad_())


def test_second_derivatives_are_refused(impl, rng):
    x, _ = case(rng, impl, 16, (2, 1))
    x.requires_grad_()
    (grad,) = torch.autograd.grad(swiglu(x, backend=impl.backend).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", [(3, 2, 7), (8,), ()])
def test_refused_shapes(shape):
    with pytest.raises(ValueError, match="must hold two halves"):
        swiglu(torch.zeros(shape))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(rng):
    """The last tokens of a tensor that int32 cannot count get the bits they get alone."""
    columns, tail = 2816, 5
    rows = 2**31 // (2 * columns) + 100
    x = torch.zeros(rows, 2 * columns, dtype=torch.bfloat16, device="cuda")
    x[-tail:] = randn(rng, tail, 2 * columns).to(x)
    dy = torch.ones(rows, columns, dtype=torch.bfloat16, device="cuda")
    whole, alone = with_gradient(swiglu, x, dy), with_gradient(swiglu, x[-tail:].clone(), dy[-tail:])
    assert_same_bits({name: t[-tail:] for name, t in whole.items()}, alone)


def test_launches():
    """One each way; constants do not depend on the number of tokens, and grids are within CUDA's limits."""
    constants = set()
    for rows in (1, 300, 70001, 2**27):
        launches = record_swiglu(dtype=torch.bfloat16, rows=rows, columns=5504)
        assert [launch.what for launch in launches] == list(GLU)
        assert all(len(launch.grid) == 1 and 0 < launch.grid[0] < 2**31 for launch in launches)
        constants |= {tuple(launch.arguments[name] for name in ("WIDTH", "BC", "BR")) for launch in launches}
    assert len(constants) == 1
