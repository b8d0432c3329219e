"""What only a GPU shows: real lengths, all head dims, very large tensors and batches, CUDA graphs, no waiting.

Long sequences are compared with the torch backend in fp64, which other tests compare with the recurrence.
"""

import pytest
import torch

from ..tolerances import assert_close
from .cases import EVERYTHING, Impl, assert_same_bits, evaluate, make_case, random_documents
from .conftest import MAIN, MORE

pytestmark = pytest.mark.gpu

TRITON = [impl for impl in MAIN + MORE if impl.backend == "triton" and impl.device == "cuda"]
FP64 = Impl("torch", torch.float64, "cuda")
BF16 = Impl("triton", torch.bfloat16, "cuda")
HEAD_DIMS = (16, 32, 48, 64, 96, 128, 192, 256)


@pytest.fixture(params=TRITON, ids=str)
def impl(request):
    return request.param


def check_long(impl, case, uses=EVERYTHING):
    print(impl, case)
    want = evaluate(FP64.attn, case.to(dtype=torch.float64), uses)
    assert_close(evaluate(impl.attn, case, uses), want, impl.backend, impl.dtype)


@pytest.mark.parametrize("T", [1024, 1025, 4096, 5000])
@pytest.mark.parametrize("D", [64, 128])
def test_long(impl, rng, T, D):
    check_long(impl, make_case(rng, impl, T=T, H=4, K=D, V=D, log_decay=(-0.0005, -0.02, -0.5, 0.0)))


@pytest.mark.parametrize("K", HEAD_DIMS)
@pytest.mark.parametrize("V", HEAD_DIMS)
def test_head_dims(impl, rng, K, V):
    check_long(impl, make_case(rng, impl, B=1, T=1100, K=K, V=V))


@pytest.mark.parametrize("T", [1, 16, 17])
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_short(impl, rng, T, D):
    check_long(impl, make_case(rng, impl, B=8, T=T, K=D, V=D))


@pytest.mark.parametrize("repeat", range(4))
@pytest.mark.parametrize("D", [64, 128, 256])
def test_long_packed(impl, rng, D, repeat):
    documents = random_documents(rng, 5000) if repeat else (1024, 0, 1024, 1, 2951)
    check_long(impl, make_case(rng, impl, documents=documents, Hkv=1, K=D, V=D, initial=repeat != 1))


def test_same_bits_in_any_batch(impl, rng, deterministic):
    """With real segments: alone as among others, and twice the same."""
    case = make_case(rng, impl, B=3, T=2500, H=4, Hkv=2, K=128, V=128)
    together = evaluate(impl.attn, case)
    assert_same_bits(together, evaluate(impl.attn, case))
    names = ("q", "k", "v", "do", "initial_state", "dfinal")
    alone = evaluate(impl.attn, case.replace(**{name: getattr(case, name)[1:2] for name in names}))
    assert_same_bits(alone, {name: x[1:2] for name, x in together.items()})


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("T", [1, 20])
def test_more_than_65535_heads_in_a_batch(rng, cut, T):
    """The second and third axis of a CUDA grid end there; T = 20 has two segments here."""
    cut(16)
    check_long(BF16, make_case(rng, BF16, B=66, T=T, H=1024))


def test_beyond_31_bits(rng):
    """Offsets of more than 2^31 elements: 4096 tokens with 2^20 elements from one to the next, 9 GB."""
    case = make_case(rng, BF16, B=1, T=4096)
    memory = torch.empty(4096 * 2**20, dtype=BF16.dtype, device="cuda")
    spread = {}
    for i, name in enumerate(("q", "k", "v", "do")):
        x = getattr(case, name)
        spread[name] = memory[1024 * i :].as_strided(x.shape, (1, 2**20, 16, 1)).copy_(x)
    check_long(BF16, case.replace(**spread))


@pytest.mark.parametrize("documents", [None, (700, 0, 1400)])
def test_cuda_graph(rng, documents):
    """Forward and backward in a graph, replayed on other values."""
    options = dict(B=1, T=2100, K=64, V=64, documents=documents)
    case, other = (make_case(rng, BF16, **options) for _ in range(2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        evaluate(BF16.attn, case)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluate(BF16.attn, case)
    for name in ("q", "k", "v", "do", "initial_state", "dfinal"):
        getattr(case, name).copy_(getattr(other, name))
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(captured, evaluate(BF16.attn, other))


@pytest.mark.parametrize("documents", [None, (700, 0, 1400)])
def test_does_not_wait_for_the_gpu(rng, documents):
    """Only the first call reads log_decay and cu_seqlens."""
    case = make_case(rng, BF16, B=1, T=2100, documents=documents)
    want = evaluate(BF16.attn, case)
    try:
        torch.cuda.set_sync_debug_mode("error")
        got = evaluate(BF16.attn, case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(got, want)


def test_memory(rng):
    """Beyond inputs and results: the states of 32 parts, forward and backward, and nothing of the size of q."""
    case = make_case(rng, BF16, B=1, T=32768, H=8, K=128, V=128)
    evaluate(BF16.attn, case)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = evaluate(BF16.attn, case)
    peak = torch.cuda.max_memory_allocated() - before
    results = sum(x.numel() * x.element_size() for x in results.values())
    states = 2 * 32 * 8 * 128 * 128 * 4
    assert peak <= results + states + 2**22, f"{(peak - results) / 2**20:.1f} MiB beyond the results"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one(rng):
    case = make_case(rng, BF16, T=1100)
    there = case.to(device="cuda:1")
    assert torch.cuda.current_device() == 0
    got = {name: x.to("cuda:0") for name, x in evaluate(BF16.attn, there).items()}
    assert_same_bits(got, evaluate(BF16.attn, case))
