"""States that ranks write into each other's memory: here into memory of one process, in which all ranks send, then
receive.
"""

import time

import pytest
import torch

from lightning_megatron.ops.backend import Destination
from lightning_megatron.ops.torch_backend import combine
from lightning_megatron.ops.triton import attention as triton_backend
from lightning_megatron.ops.triton import symmetric

from ..tolerances import EXCHANGED
from .cases import Impl, randn
from .conftest import parameters

LIMIT = 20 * 10**9
SHAPES = [(1, 1, 2, 16, 16), (2, 1, 1, 64, 48), (2, 2, 1, 16, 32), (1, 1, 1, 128, 128)]  # chunks, R, H, K, V


@pytest.fixture(params=parameters([Impl("triton", torch.float32), Impl("triton", torch.float32, "cuda")]))
def device(request, monkeypatch) -> str:
    if request.param.device == "cpu":
        monkeypatch.setattr(symmetric, "globaltimer", time.monotonic_ns)
    return request.param.device


class Ranks:
    """Symmetric buffers of ``count`` ranks, and tokens [R, chunks * T, H, *] of each."""

    def __init__(self, rng: torch.Generator, count: int, shape: tuple[int, ...], device: str, T: int = 5) -> None:
        words = symmetric.buffer_words(count, shape)
        self.memory = [torch.zeros(words, device=device) for _ in range(count)]
        addresses = torch.tensor([x.data_ptr() for x in self.memory], device=device)
        self.destinations = [Destination(addresses, rank, LIMIT, shape) for rank in range(count)]
        self.rng, self.shape, self.device, self.T, self.chunks = rng, shape, device, T, shape[0]
        self.log_decay = torch.full((shape[2],), -0.1, device=device)
        self.tokens = [self.draw() for _ in range(count)]

    def draw(self) -> tuple[torch.Tensor, torch.Tensor]:
        _, R, H, K, V = self.shape
        return tuple(randn(self.rng, R, self.chunks * self.T, H, d).float().to(self.device) for d in (K, V))

    def states(self, reverse: bool = False) -> torch.Tensor:
        """Of all chunks of all ranks ``[ranks * chunks, R, H, K, V]``."""
        how = dict(pieces=self.chunks, reverse=reverse)
        found = [triton_backend.local_states(k, v, self.log_decay, None, None, **how)[0] for k, v in self.tokens]
        return torch.cat([x.unflatten(0, (self.shape[1], self.chunks)).transpose(0, 1) for x in found])

    def send(self, rank: int, reverse: bool = False) -> None:
        out, _ = triton_backend.local_states(
            *self.tokens[rank],
            self.log_decay,
            None,
            None,
            pieces=self.chunks,
            destination=self.destinations[rank],
            reverse=reverse,
        )
        assert out is None

    def weights(self, places: int, rows: int = 1) -> torch.Tensor:
        count = len(self.destinations) * self.shape[0]
        return torch.rand(places, count, rows, self.shape[2], generator=self.rng).to(self.device)


def assert_received(got: torch.Tensor, states: torch.Tensor, weights: torch.Tensor) -> None:
    want = combine(states.double(), weights.double())
    assert got.shape == want.shape
    assert (got - want).norm() <= EXCHANGED * want.norm()


@pytest.mark.parametrize(
    "shape, count",
    [(SHAPES[0], 2), (SHAPES[0], 4), (SHAPES[1], 3), (SHAPES[2], 2), (SHAPES[2], 3), (SHAPES[3], 2)],
    ids=str,
)
def test_equals_a_gather(rng, device, shape, count):
    """Many times with the same mailboxes, other values, and ranks that come in another order."""
    ranks = Ranks(rng, count, shape, device)
    for repeat in range(3):
        ranks.tokens = [ranks.draw() for _ in range(count)]
        states = ranks.states()
        for rank in torch.randperm(count, generator=rng).tolist():
            ranks.send(rank)
        for rank in torch.randperm(count, generator=rng).tolist():
            weights = ranks.weights(1 + repeat % 3, shape[1] if repeat % 2 else 1)
            assert_received(symmetric.receive(ranks.destinations[rank], weights), states, weights)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 2, 16, 16), (1, 2, 1, 64, 48), (1, 3, 1, 128, 16)], ids=str)
def test_one_state_for_each_pair_of_ranks(rng, device, shape, reverse):
    """Of two chunks a rank sends the first to ranks behind it, and to those before it the sum at the end of the
    second.
    """
    count, R, H = 3, *shape[1:3]
    ranks = Ranks(rng, count, shape, device)
    ranks.chunks = 2
    for rows in (1, R):
        between = [torch.rand(rows, H, generator=rng).to(device) for _ in range(count)]
        ranks.destinations = [
            destination._replace(between=x) for destination, x in zip(ranks.destinations, between, strict=True)
        ]
        ranks.tokens = [ranks.draw() for _ in range(count)]
        states = ranks.states(reverse).double().unflatten(0, (count, 2))
        first, second = states.flip(1).unbind(1) if reverse else states.unbind(1)
        both = second + torch.stack(between).double().expand(-1, R, -1)[..., None, None] * first
        for rank in torch.randperm(count, generator=rng).tolist():
            ranks.send(rank, reverse)
        for rank, destination in enumerate(ranks.destinations):
            weights = ranks.weights(2, rows)
            sent = torch.cat((first[: rank + 1], both[rank + 1 :]))
            assert_received(symmetric.receive(destination, weights), sent, weights)


def test_a_rank_may_be_one_exchange_ahead(rng, device):
    """Rank 0 receives exchange n and sends exchange n+1 before rank 1 has received exchange n."""
    ranks = Ranks(rng, 2, (2, 1, 2, 32, 32), device)
    states = ranks.states()
    ranks.send(0), ranks.send(1)
    for _ in range(3):
        weights = ranks.weights(2)
        assert_received(symmetric.receive(ranks.destinations[0], weights), states, weights)
        ranks.tokens[0] = ranks.draw()
        ranks.send(0)
        assert_received(symmetric.receive(ranks.destinations[1], weights), states, weights)
        ranks.tokens[1] = ranks.draw()
        states = ranks.states()
        ranks.send(1)


def test_numbers_of_exchanges_begin_anew(rng, device):
    ranks = Ranks(rng, 2, (1, 1, 1, 16, 16), device)
    for memory in ranks.memory:  # data [2, 2, 1, 256], full [2, 1], count [1]
        memory[2 * 2 * 256 :].view(torch.int32).fill_(2**31 - 2)
    for _ in range(4):
        ranks.tokens = [ranks.draw() for _ in range(2)]
        ranks.send(0), ranks.send(1)
        for destination in ranks.destinations:
            weights = ranks.weights(1)
            assert_received(symmetric.receive(destination, weights), ranks.states(), weights)


def test_all_ranks_get_the_same_bits(rng, device):
    ranks = Ranks(rng, 3, (2, 1, 2, 32, 32), device)
    weights = ranks.weights(1)
    for rank in range(3):
        ranks.send(rank)
    a, b, c = (symmetric.receive(destination, weights) for destination in ranks.destinations)
    assert torch.equal(a, b) and torch.equal(a, c)


def test_a_chunk_without_tokens(rng, device):
    """Its rank sends zeros, for the others wait."""
    ranks = Ranks(rng, 2, (1, 1, 2, 16, 16), device)
    states, weights = ranks.states(), ranks.weights(1)
    states[1] = 0
    ranks.tokens[1] = tuple(x[:, :0] for x in ranks.tokens[1])
    ranks.send(0), ranks.send(1)
    for destination in ranks.destinations:
        assert_received(symmetric.receive(destination, weights), states, weights)


@pytest.mark.gpu
def test_in_a_cuda_graph(rng, device):
    """Two ranks in one graph; every replay exchanges what is there then."""
    ranks = Ranks(rng, 2, (1, 1, 2, 64, 64), "cuda")
    weights, results = [ranks.weights(1), ranks.weights(1)], []

    def exchange() -> list[torch.Tensor]:
        ranks.send(0), ranks.send(1)
        return [symmetric.receive(destination, w) for destination, w in zip(ranks.destinations, weights, strict=True)]

    exchange()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = exchange()
    for _ in range(3):
        for tokens in ranks.tokens:
            for x in tokens:
                x.copy_(randn(rng, *x.shape))
        graph.replay()
        for got, w in zip(results, weights, strict=True):
            assert_received(got, ranks.states(), w)
