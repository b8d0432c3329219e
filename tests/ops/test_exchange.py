"""States exchanged by GPUs that write into each other's memory: here of one GPU, on which every rank has a stream."""

import pytest
import torch

from lightning_megatron.ops import exchange_kernels
from lightning_megatron.ops.torch_backend import combine

pytestmark = pytest.mark.gpu
LIMIT = 20 * 10**9
SHAPES = [(1, 1, 2, 16, 16), (2, 1, 3, 64, 64), (2, 3, 2, 48, 96), (1, 2, 4, 128, 128)]  # chunks, R, H, K, V


def ranks_of(count: int, own: torch.Tensor) -> tuple[torch.Tensor, list[torch.cuda.Stream], list[torch.Tensor]]:
    words = exchange_kernels.mailbox_words(count, own)
    memory = [torch.zeros(words, device="cuda") for _ in range(count)]
    return torch.tensor([x.data_ptr() for x in memory], device="cuda"), [torch.cuda.Stream() for _ in range(count)], memory


def run(own, weights, addresses: torch.Tensor, streams, order) -> list[torch.Tensor]:
    """Of every rank's ``own`` and ``weights``, launched in this order. Few programs, so that all ranks' run at once.

    First alone: CUDA loads a kernel when it is first launched, and where that waits for the GPU, one that waits for another
    rank's would never end. Ranks on GPUs of their own do not wait for each other so.
    """
    own, weights = ([x.clone() for x in xs] for xs in (own, weights))  # by their alignment, too, kernels differ
    for rank, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            alone = weights[rank][:, : own[rank].shape[0]].clone(), addresses[rank : rank + 1].clone()
            exchange_kernels.exchange(own[rank], *alone, 0, LIMIT, programs=16)
    torch.cuda.synchronize()
    results = [None] * len(streams)
    for rank in order:
        with torch.cuda.stream(streams[rank]):
            results[rank] = exchange_kernels.exchange(own[rank], weights[rank], addresses, rank, LIMIT, programs=16)
    torch.cuda.synchronize()
    return results


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_a_gather(rng, ranks, shape):
    """Many times with the same mailboxes, other values, and ranks that come in another order."""
    chunks, R, H, K, V = shape
    first = torch.empty(shape, device="cuda")
    addresses, streams, memory = ranks_of(ranks, first)
    for repeat in range(10):
        places = 1 + repeat % 3
        own = torch.randn(ranks, *shape, generator=rng).cuda()
        weights = torch.rand(ranks, places, ranks * chunks, R if repeat % 2 else 1, H, generator=rng).cuda()
        order = torch.randperm(ranks, generator=rng).tolist()
        for rank, got in enumerate(run(own, weights, addresses, streams, order)):
            want = combine(own.flatten(0, 1).double(), weights[rank].double())
            assert got.shape == (places, R, H, K, V)
            assert (got - want).norm() <= 1e-6 * want.norm(), f"{rank=} {repeat=} {order=}"
    sent = [x[ranks * first.numel() :] for x in memory]
    assert all((x == 0).all() for x in sent), "flags are left as they were at first"


def test_all_ranks_get_the_same_bits(rng):
    own, weights = torch.randn(3, 2, 1, 2, 64, 64, generator=rng).cuda(), torch.rand(1, 1, 6, 1, 2, generator=rng).cuda()
    addresses, streams, memory = ranks_of(3, own[0])
    a, b, c = run(own, weights.expand(3, -1, -1, -1, -1), addresses, streams, range(3))
    assert torch.equal(a, b) and torch.equal(a, c)


def test_in_a_cuda_graph(rng):
    """Two ranks in one graph; every replay exchanges what is there then."""
    own, weights = torch.zeros(2, 1, 1, 2, 64, 64, device="cuda"), torch.rand(2, 1, 2, 1, 2, generator=rng).cuda()
    weights = [x.clone() for x in weights]
    addresses, streams, memory = ranks_of(2, own[0])
    run(own, weights, addresses, streams, range(2))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        here, results = torch.cuda.current_stream(), []
        for rank in range(2):
            streams[rank].wait_stream(here)
            with torch.cuda.stream(streams[rank]):
                results.append(exchange_kernels.exchange(own[rank], weights[rank], addresses, rank, LIMIT, programs=16))
        for stream in streams:
            here.wait_stream(stream)
    for _ in range(3):
        own.copy_(torch.randn(own.shape, generator=rng))
        graph.replay()
        for rank in range(2):
            want = combine(own.flatten(0, 1).double(), weights[rank].double())
            assert (results[rank] - want).norm() <= 1e-6 * want.norm()
