"""What is made of a tensor is made once for all layers, and anew when the tensor has changed."""

import gc

import pytest
import torch

from lightning_megatron.ops.memo import MOST, _kept, keep
from lightning_megatron.ops.triton import attention as triton_backend


class Counted:
    """Makes a copy; ``calls`` says how often."""

    calls = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x.clone()


def test_made_once_for_each_key_and_version(rng):
    tensor, make = torch.rand(3, generator=rng), Counted()
    first = keep(tensor, "a", make)
    assert keep(tensor, "a", make) is first and make.calls == 1
    assert keep(tensor, "b", make) is not first and keep(tensor, "a", make) is first and make.calls == 2
    assert keep(tensor.clone(), "a", make) is not first and make.calls == 3
    tensor.mul_(2)
    assert torch.equal(keep(tensor, "a", make), tensor) and make.calls == 4


def test_dies_with_its_tensor(rng):
    gc.collect()
    before, tensor = len(_kept), torch.rand(3, generator=rng)
    keep(tensor, "a", lambda x: x)  # an alias, as of bounds that are int32 already
    assert len(_kept) == before + 1
    del tensor
    gc.collect()
    assert len(_kept) == before


def test_keys_that_never_return_do_not_fill_the_memory(rng):
    tensor = torch.rand(3, generator=rng)
    for n in range(10 * MOST):
        keep(tensor, n, torch.clone)
        assert len(_kept[tensor][1]) <= MOST


def test_tensors_without_versions_are_looked_at_every_time():
    make = Counted()
    with torch.inference_mode():
        tensor = torch.ones(3)
    first = keep(tensor, "a", make)
    assert keep(tensor, "a", make) is not first and make.calls == 2


@pytest.mark.gpu
def test_streams_and_graphs_have_their_own(rng):
    """Memory of another stream may be given away before it is read; a replay finds other values in the same place. Not
    so of what is constant, whose memory must not be that of a graph."""
    tensor, make = torch.rand(3, generator=rng).cuda(), Counted()
    first, constant = keep(tensor, "a", make), keep(tensor, "b", make, constant=True)
    assert make.calls == 2
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        assert keep(tensor, "a", make) is not first and make.calls == 3
        assert keep(tensor, "b", make, constant=True) is constant and make.calls == 3
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            captured = keep(tensor, "a", make)
            assert make.calls == 4
            assert keep(tensor, "b", make, constant=True) is constant and make.calls == 4
    assert keep(tensor, "a", make) is first
    tensor.copy_(torch.rand(3, generator=rng))
    graph.replay()
    assert torch.equal(captured, tensor)


def test_documents_are_found_once_for_all_layers(rng, monkeypatch):
    make = Counted()
    find = triton_backend._find_documents
    monkeypatch.setattr(triton_backend, "_find_documents", lambda x, T: (make(x), find(x, T))[1])
    cu_seqlens = torch.tensor([0, 2, 2, 7], dtype=torch.int32)
    doc, bounds = triton_backend._documents(cu_seqlens, 7)
    assert doc.tolist() == [0, 0, 2, 2, 2, 2, 2] and torch.equal(bounds, cu_seqlens)
    assert triton_backend._documents(cu_seqlens, 7)[0] is doc and make.calls == 1
    cu_seqlens.copy_(torch.tensor([0, 1, 4, 7]))
    assert triton_backend._documents(cu_seqlens, 7)[0].tolist() == [0, 1, 1, 1, 2, 2, 2] and make.calls == 2
