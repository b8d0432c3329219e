"""Output layer and loss in chunks: values and gradients against the formula in fp64, on one rank and on several;
memory.
"""

import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_megatron.ops import linear_cross_entropy, vocab_parallel_cross_entropy
from lightning_megatron.ops.triton import loss as loss_kernels

from ..launch import spawn
from ..tolerances import LINEAR_LOSS, LOGITS_IN_CHUNKS, POINTWISE
from .cases import assert_same_bits, randn
from .formulas import cross_entropy

CHUNKS = [1, 4, 5, 12, 1000]


def draw(rng, s, b, h, columns, dtype, device="cpu") -> tuple[torch.Tensor, ...]:
    """Logits up to 20 or so, labels of which some lie outside the vocabulary, and the gradient of the loss."""
    hidden = randn(rng, s, b, h).to(dtype).to(device)
    weight = (randn(rng, columns, h) * 5 * h**-0.5).to(dtype).to(device)
    labels = torch.randint(-2, columns + 2, (s, b), generator=rng).to(device)
    return hidden, weight, labels, randn(rng, s, b).to(torch.promote_types(dtype, torch.float32)).to(device)


def at_once(loss: Callable, hidden, weight, labels) -> torch.Tensor:
    return loss(hidden @ weight.t(), labels)


def with_gradients(function: Callable, hidden, weight, labels, dloss) -> dict[str, torch.Tensor]:
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(*leaves, labels)
    gradients = torch.autograd.grad(loss, leaves, dloss)
    return {"loss": loss.detach()} | dict(zip(("dhidden", "dweight"), gradients, strict=True))


def errors(got: dict, case) -> dict[str, float]:
    """Relative RMS of every result. Of a single token loss and gradients may be almost 0, a difference of numbers of
    order 1: then relative to 1, and to the gradient of the loss.
    """
    hidden, weight, labels, dloss = (x.cpu() for x in case)
    want = with_gradients(
        functools.partial(at_once, cross_entropy), hidden.double(), weight.double(), labels, dloss.double()
    )
    found, smallest = (
        {},
        {"loss": max(1, dloss.numel()) ** 0.5} | dict.fromkeys(("dhidden", "dweight"), float(dloss.norm()) or 1.0),
    )
    for name, y in want.items():
        x = got[name]
        assert x.shape == y.shape, name
        assert x.dtype == (torch.promote_types(hidden.dtype, torch.float32) if name == "loss" else hidden.dtype), name
        found[name] = float((x.double().cpu() - y).norm() / y.norm().clamp(min=smallest[name])) if y.numel() else 0.0
    print(found)
    return found


def judge(got: dict, case, backend: str | None = None) -> None:
    """fp32 and fp64 by their tolerances; where logits are rounded to fewer bits, not far above all tokens at once."""
    dtype, found = case[0].dtype, errors(got, case)
    if dtype in LINEAR_LOSS:
        allowed = dict.fromkeys(("dhidden", "dweight"), POINTWISE[dtype]) | {"loss": LINEAR_LOSS[dtype]}
    else:
        plain = functools.partial(at_once, functools.partial(vocab_parallel_cross_entropy, backend=backend))
        allowed = {name: 1.5 * error for name, error in errors(with_gradients(plain, *case), case).items()}
    assert all(found[name] <= allowed[name] for name in allowed), f"{found}, allowed {allowed}"


@pytest.mark.parametrize("chunk", CHUNKS)
def test_against_the_formula(every_impl, rng, monkeypatch, chunk):
    """Chunks that divide the 12 tokens, that do not, and more than there are; several blocks of columns."""
    monkeypatch.setattr(loss_kernels, "BLOCK", 32)
    case = draw(rng, 6, 2, 24, 70, every_impl.dtype, every_impl.device)
    judge(
        with_gradients(functools.partial(linear_cross_entropy, chunk=chunk, backend=every_impl.backend), *case),
        case,
        every_impl.backend,
    )


@pytest.mark.parametrize("shape", [(0, 2), (3, 0), (1, 1)])
def test_few_tokens(impl, rng, shape):
    case = draw(rng, *shape, 16, 3, impl.dtype, impl.device)
    judge(
        with_gradients(functools.partial(linear_cross_entropy, chunk=4, backend=impl.backend), *case),
        case,
        impl.backend,
    )


def test_one_chunk_is_all_tokens_at_once(impl, rng):
    """The same loss, on a CPU to the bit, and almost the same in many chunks."""
    hidden, weight, labels, _ = draw(rng, 40, 1, 32, 100, impl.dtype, impl.device)
    plain = at_once(functools.partial(vocab_parallel_cross_entropy, backend=impl.backend), hidden, weight, labels)
    chunked = functools.partial(linear_cross_entropy, hidden, weight, labels, backend=impl.backend)
    assert impl.device == "cuda" or torch.equal(chunked(chunk=40), plain)
    # another product sums in another order, and may round a logit to its neighbour
    tolerance = LOGITS_IN_CHUNKS[impl.dtype]
    for chunk in (40, 7):
        torch.testing.assert_close(chunked(chunk=chunk), plain, rtol=tolerance, atol=tolerance)


def test_strides_and_bits(impl, rng):
    """[b, s, h] in memory, a slice of a larger weight, a gradient that is broadcast, and twice the same bits."""
    hidden, weight, labels, _ = draw(rng, 3, 5, 40, 50, impl.dtype, impl.device)
    strided = (
        hidden.transpose(0, 1).contiguous().transpose(0, 1)[..., 4:36],
        weight[7:44, 4:36],
        labels.t().contiguous().t(),
    )
    dloss = torch.tensor(0.5, dtype=impl.wide, device=impl.device).expand(3, 5)
    chunked = functools.partial(linear_cross_entropy, chunk=4, backend=impl.backend)
    got = with_gradients(chunked, *strided, dloss)
    assert_same_bits(got, with_gradients(chunked, *strided, dloss))
    judge(got, (*strided, dloss), impl.backend)


def test_only_the_gradients_that_are_asked_for(rng):
    hidden, weight, labels, dloss = draw(rng, 6, 2, 8, 20, torch.float64)
    chunked = functools.partial(linear_cross_entropy, labels=labels, chunk=5)
    want = with_gradients(functools.partial(linear_cross_entropy, chunk=5), hidden, weight, labels, dloss)
    for name, leaf, loss in (
        ("dhidden", (h := hidden.clone().requires_grad_()), chunked(h, weight)),
        ("dweight", (w := weight.clone().requires_grad_()), chunked(hidden, w)),
    ):
        assert torch.equal(torch.autograd.grad(loss, leaf, dloss)[0], want[name]), name
    assert not chunked(hidden, weight).requires_grad


def test_gradcheck(rng):
    hidden, weight, labels, _ = draw(rng, 3, 2, 3, 5, torch.float64)
    function = functools.partial(linear_cross_entropy, labels=labels, chunk=4)
    assert torch.autograd.gradcheck(function, (hidden.requires_grad_(), weight.requires_grad_()))


def on_rank(
    rank: int, size: int, sequence_parallel: bool, chunks: list[int], backend, hidden, weight, labels, dloss
) -> list:
    """Loss and gradients of this rank, for every size of a chunk."""
    mine = hidden.chunk(size)[rank] if sequence_parallel else hidden
    case = mine, weight.chunk(size)[rank], labels, dloss
    options = dict(tp_group=dist.group.WORLD, sequence_parallel=sequence_parallel, backend=backend)
    return [with_gradients(functools.partial(linear_cross_entropy, chunk=chunk, **options), *case) for chunk in chunks]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_tensor_parallel(rng, size, sequence_parallel):
    """Every rank has the loss of all tokens, the gradient of its slice of weight, and that of all, or its, hidden
    states.
    """
    case = draw(rng, 6, 2, 8, 10 * size, torch.float64)
    results = spawn(on_rank, size, sequence_parallel, CHUNKS, "torch", *case)
    for chunk, ranks in zip(CHUNKS, zip(*results, strict=True), strict=True):
        print(f"chunk {chunk}")
        dhidden = [rank["dhidden"] for rank in ranks]
        for rank, loss in enumerate(rank["loss"] for rank in ranks):
            assert torch.equal(loss, ranks[0]["loss"]), f"rank {rank}"
            assert sequence_parallel or torch.equal(dhidden[rank], dhidden[0]), f"rank {rank}"
        whole = torch.cat(dhidden) if sequence_parallel else dhidden[0]
        judge(
            {"loss": ranks[0]["loss"], "dhidden": whole, "dweight": torch.cat([rank["dweight"] for rank in ranks])},
            case,
        )


def test_tensor_parallel_in_low_precision(rng):
    """bf16 on several ranks: collectives have the dtype of hidden states, sums that of the loss."""
    case = draw(rng, 8, 1, 32, 40, torch.bfloat16)
    (first,), (second,) = spawn(on_rank, 2, True, [6], "torch", *case)
    assert torch.equal(first["loss"], second["loss"])
    judge(
        {"loss": first["loss"]} | {n: torch.cat((first[n], second[n])) for n in ("dhidden", "dweight")}, case, "torch"
    )


class LargestStorage(TorchDispatchMode):
    """Bytes of the largest tensor that an operation returns."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = (x.untyped_storage().nbytes() for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        self.bytes = max(self.bytes, *sizes, 0)
        return result


def largest(function: Callable, case) -> int:
    with LargestStorage() as found:
        with_gradients(function, *case)
    return found.bytes


def test_no_tensor_grows_with_tokens_times_vocabulary(rng):
    h, columns, chunk = 4, 512, 8
    for tokens in (16, 160, 400):
        case = draw(rng, tokens, 1, h, columns, torch.float32)
        assert largest(functools.partial(linear_cross_entropy, chunk=chunk), case) == 4 * columns * chunk
        assert largest(functools.partial(at_once, vocab_parallel_cross_entropy), case) == 4 * columns * tokens


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(chunk=0), "chunk=0 must be 1 token or more"),
        (dict(hidden=torch.zeros(6, 8)), r"\[s, b, h\].*got \[6, 8\] and \[5, 8\]"),
        (dict(weight=torch.zeros(5, 7)), r"got \[3, 2, 8\] and \[5, 7\]"),
        (dict(weight=torch.zeros(0, 8)), r"got \[3, 2, 8\] and \[0, 8\]"),
        (dict(labels=torch.zeros(2, 3, dtype=torch.int64)), r"labels must be \[3, 2\].*got \[2, 3\]"),
        (dict(labels=torch.zeros(3, 2)), "labels integers: got .*torch.float32$"),
        (dict(weight=torch.zeros(5, 8, dtype=torch.float64)), "same dtype.*torch.float32, torch.float64"),
        (dict(hidden=torch.zeros(3, 2, 8, device="meta")), "on one device: got meta, cpu and cpu"),
        (dict(backend="cuda"), "backend='cuda' is unknown"),
    ],
)
def test_wrong_inputs(change, message):
    inputs = dict(
        hidden=torch.zeros(3, 2, 8), weight=torch.zeros(5, 8), labels=torch.zeros(3, 2, dtype=torch.int64), chunk=4
    )
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**inputs | change)


@pytest.mark.gpu
def test_real_sizes(rng):
    """Gradients of the weight are sums over many chunks: no worse than one product over all tokens."""
    case = draw(rng, 1500, 1, 256, 5000, torch.bfloat16, "cuda")
    found = errors(with_gradients(functools.partial(linear_cross_entropy, chunk=100), *case), case)
    plain = errors(with_gradients(functools.partial(at_once, vocab_parallel_cross_entropy), *case), case)
    assert all(found[name] <= 1.1 * plain[name] for name in plain), f"{found}, at once {plain}"


@pytest.mark.gpu
def test_memory(rng):
    """For any number of tokens: logits of one chunk, gradients of hidden states, those of weight in fp32 and bf16."""
    h, columns, chunk = 512, 32000, 1024
    weight = torch.randn(columns, h, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for tokens in (chunk, 4096, 32768):  # the first for the workspaces of cuBLAS
        hidden = torch.randn(tokens, 1, h, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        labels = torch.randint(columns, (tokens, 1), device="cuda")
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = linear_cross_entropy(hidden, weight, labels, chunk=chunk)
        forward = torch.cuda.max_memory_allocated() - before
        torch.autograd.grad(loss.sum(), (hidden, weight))
        both = torch.cuda.max_memory_allocated() - before
        if tokens > chunk:
            logits = 2 * chunk * columns
            assert forward < 1.1 * logits
            assert both < 1.1 * (logits + 2 * hidden.numel() + 6 * weight.numel())
