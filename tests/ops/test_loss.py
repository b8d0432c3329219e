"""Cross entropy over the vocabulary: values and gradients against the formula in fp64, on one rank and on several."""

import functools

import pytest
import torch
import torch.distributed as dist

from lightning_megatron.ops import vocab_parallel_cross_entropy
from lightning_megatron.ops.triton import loss as loss_kernels

from ..launch import spawn
from ..tolerances import LOSS, POINTWISE
from .cases import assert_same_bits, randn
from .formulas import cross_entropy
from .launches import record_loss

COLUMNS = [1, 3, 16, 40, 100]
SHAPES = [(1,), (5,), (3, 2), (0,), (2, 0)]


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks for few columns."""
    monkeypatch.setattr(loss_kernels, "BLOCK", 32)


def with_gradient(function, logits, targets, dloss) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.detach().requires_grad_()
    loss = function(logits, targets)
    return loss.detach(), torch.autograd.grad(loss, logits, dloss)[0]


def draw(rng, shape, columns, dtype, device="cpu") -> tuple[torch.Tensor, ...]:
    """Logits up to 20 or so, targets of which some lie outside the vocabulary, and the gradient of the loss."""
    logits = (randn(rng, *shape, columns) * 5).to(dtype).to(device)
    targets = torch.randint(-2, columns + 2, shape, generator=rng).to(device)
    dloss = randn(rng, *shape).to(torch.promote_types(dtype, torch.float32)).to(device)
    return logits, targets, dloss


def judge(got, logits, targets, dloss) -> None:
    """Where softmax is almost 1 at the target, loss and gradient are small differences: compared with logits and dloss
    then.
    """
    want = with_gradient(cross_entropy, logits.double().cpu(), targets.cpu(), dloss.double().cpu())
    wide = torch.promote_types(logits.dtype, torch.float32)
    assert got[0].dtype == wide and got[1].dtype == logits.dtype
    # the log of the sum is rounded once, and so is all that is taken from it: half of this is a bound
    rounding = torch.finfo(wide).eps * float(logits.masked_fill(logits.isinf(), 0).abs().max()) if logits.numel() else 0
    tolerances = LOSS[wide] + rounding, POINTWISE[logits.dtype] + rounding
    scales = got[0].numel() ** 0.5, float(dloss.norm())
    for name, x, y, allowed, scale in zip(("loss", "dlogits"), got, want, tolerances, scales, strict=True):
        assert x.shape == y.shape, name
        if y.numel():
            error = float((x.double().cpu() - y).norm() / y.norm().clamp(min=scale))
            print(f"{name}: {error:.2g}")
            assert error <= allowed, f"{name} differs by {error}"


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_formula(every_impl, rng, small_blocks, shape, columns):
    case = draw(rng, shape, columns, every_impl.dtype, every_impl.device)
    function = functools.partial(vocab_parallel_cross_entropy, backend=every_impl.backend)
    judge(with_gradient(function, *case), *case)


def test_a_real_vocabulary(impl, rng):
    """Several blocks of the usual size, of a width that is no multiple of anything."""
    case = draw(rng, (4,), 2 * loss_kernels.BLOCK + 123, impl.dtype, impl.device)
    function = functools.partial(vocab_parallel_cross_entropy, backend=impl.backend)
    judge(with_gradient(function, *case), *case)


def test_large_logits_and_minus_infinity(impl, rng, small_blocks):
    """exp of the logits themselves overflows; a vocabulary's forbidden entries and whole blocks of them are -inf."""
    logits, targets, dloss = draw(rng, (6,), 100, impl.dtype, impl.device)
    logits, targets = logits * 1000, targets.clamp(60, 99)
    logits[:, :50] = float("-inf")
    function = functools.partial(vocab_parallel_cross_entropy, backend=impl.backend)
    got = with_gradient(function, logits, targets, dloss)
    judge(got, logits, targets, dloss)
    assert torch.equal(got[1][:, :50], torch.zeros_like(got[1][:, :50]))


def test_not_a_number_stays_that(impl, rng, small_blocks):
    logits, targets, dloss = draw(rng, (3,), 70, impl.dtype, impl.device)
    logits[1, 35] = float("nan")
    loss, grad = with_gradient(
        functools.partial(vocab_parallel_cross_entropy, backend=impl.backend), logits, targets, dloss
    )
    assert loss.isnan().tolist() == [False, True, False] and grad[1].isnan().all() and grad[[0, 2]].isfinite().all()


def test_strides_and_bits(impl, rng, small_blocks):
    """A slice of a larger tensor, gradients that are broadcast, and twice the same bits."""
    whole, targets, _ = draw(rng, (5, 2), 200, impl.dtype, impl.device)
    logits, targets = whole[..., 8:168], targets.clamp(max=150)
    function = functools.partial(vocab_parallel_cross_entropy, backend=impl.backend)
    dloss = torch.tensor(0.5, dtype=impl.wide, device=impl.device)
    results = [with_gradient(function, x, targets, dloss.expand(5, 2)) for x in (logits, logits.contiguous(), logits)]
    for name, *xs in zip(("loss", "dlogits"), *results, strict=True):
        assert torch.equal(xs[0], xs[1]), name
    assert_same_bits(*({"loss": x[0], "dlogits": x[1]} for x in results[::2]))


def on_rank(rank: int, size: int, backend: str, logits, targets, dloss):
    """Loss and gradient of this rank's slice of the vocabulary."""
    mine = logits.tensor_split(size, -1)[rank]
    function = functools.partial(vocab_parallel_cross_entropy, tp_group=dist.group.WORLD, backend=backend)
    return with_gradient(function, mine, targets, dloss)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_tensor_parallel(rng, size, dtype):
    """Slices together give what the whole vocabulary gives, one of them all -inf for a token."""
    logits, targets, dloss = draw(rng, (4, 3), 24 * size, dtype)
    if size > 1:
        logits[1, 2, :24] = float("-inf")
        targets[1, 2] = 24 * size - 1
    ranks = spawn(on_rank, size, "torch", logits, targets, dloss)
    for loss, _ in ranks[1:]:
        assert torch.equal(loss, ranks[0][0])
    judge((ranks[0][0], torch.cat([grad for _, grad in ranks], -1)), logits, targets, dloss)


def test_gradcheck(rng):
    logits = randn(rng, 3, 7).requires_grad_()
    targets = torch.tensor([0, 6, -1])
    assert torch.autograd.gradcheck(lambda x: vocab_parallel_cross_entropy(x, targets), (logits,))


@pytest.mark.parametrize(
    "logits, targets, message",
    [
        (torch.zeros(2, 3, 8), torch.zeros(3, 2, dtype=torch.int64), r"\[3, 2\] for logits \[2, 3, 8\]"),
        (torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64), "vocabulary of 1 or more"),
        (torch.zeros(2, 8), torch.zeros(2), "targets integers.*float32"),
        (torch.zeros(2, 8, dtype=torch.int32), torch.zeros(2, dtype=torch.int64), "floating point.*int32"),
    ],
)
def test_wrong_inputs(logits, targets, message):
    with pytest.raises(ValueError, match=message):
        vocab_parallel_cross_entropy(logits, targets)


def test_launches():
    """One each way, of any number of rows the same kernel, and within CUDA's limits for 2^22 tokens of 2^18 words."""
    assert [launch.what for launch in record_loss(dtype=torch.bfloat16, rows=100, columns=32000)] == [
        "sums_kernel", "loss_grad_kernel",
    ]  # fmt: skip
    for launch in record_loss(dtype=torch.bfloat16, rows=2**22, columns=2**18):
        assert 0 < launch.grid[0] < 2**31


@pytest.mark.gpu
def test_more_than_2_to_the_31_logits(rng):
    """The last tokens of logits that int32 cannot count get the bits they get alone."""
    columns, tail = 128000, 3
    rows = 2**31 // columns + 10
    logits = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    logits[-tail:] = randn(rng, tail, columns).to(logits)
    targets = torch.randint(columns, (rows,), generator=rng).cuda()
    ones = torch.ones(rows, device="cuda")
    whole = with_gradient(vocab_parallel_cross_entropy, logits, targets, ones)
    alone = with_gradient(vocab_parallel_cross_entropy, logits[-tail:], targets[-tail:], ones[-tail:])
    assert all(torch.equal(a[-tail:], b) for a, b in zip(whole, alone, strict=True))


@pytest.mark.gpu
def test_memory(rng):
    """Forward: two numbers a token besides the logits; backward: the gradient."""
    rows, columns = 4096, 32000
    logits = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(columns, (rows,), device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = vocab_parallel_cross_entropy(logits, targets)
    assert torch.cuda.max_memory_allocated() - before < 0.01 * logits.numel() * 2
    loss.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 1.01 * logits.numel() * 2
