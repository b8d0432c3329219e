"""What a collective writes raises no version: layers must not remember anything of bounds and decays from call to
call.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from lightning_megatron import parallel
from lightning_megatron.softmax import SDPACoreAttention
from tests.launch import spawn
from tests.layers import transformer_config
from tests.ops.cases import randn

BOUNDS = ([0, 8, 24, 48], [0, 24, 24, 48], [0, 40, 44, 48])  # multiples of 4, as zigzag-documents on 2 ranks needs


def broadcast(x: torch.Tensor, values: list) -> None:
    """Values from rank 0, as a pipeline stage or a data loader sends bounds into a buffer that it keeps."""
    version = x._version
    dist.broadcast(torch.tensor(values, dtype=x.dtype) if dist.get_rank() == 0 else x, 0)
    if dist.get_rank() == 0:
        torch.from_dlpack(x).copy_(torch.tensor(values, dtype=x.dtype))
    assert x._version == version, "the change would be seen"


def attend(tokens, log_decay, cu_seqlens, layout, exchange, backend, states=False, between=lambda: None):
    q, k, v = (x.clone().requires_grad_() for x in tokens)
    o, final = parallel.lightning_attn(
        q, k, v, log_decay, group=dist.group.WORLD, layout=layout, exchange=exchange, cu_seqlens=cu_seqlens,
        output_final_state=states, backend=backend,
    )  # fmt: skip
    between()
    loss = o.square().sum() + (final.square().sum() if states else 0.0)
    return [o.detach(), *torch.autograd.grad(loss, [q, k, v])]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def change_bounds(rank: int, world: int, layout: str, exchange: str, backend: str) -> list[bool]:
    rng = torch.Generator().manual_seed(rank)
    quick = backend == "triton"  # in the interpreter
    log_decay, kept, found = torch.tensor([-0.1, -0.01][quick:]), torch.tensor(BOUNDS[0], dtype=torch.int32), []
    tokens = [randn(rng, 1, 48 // world, len(log_decay), 16).float() for _ in range(3)]
    for states in (False, True) if layout != "zigzag-documents" and not quick else (False,):
        for values in BOUNDS[:2] if quick else BOUNDS:
            broadcast(kept, values)
            fresh = torch.tensor(values, dtype=torch.int32)
            how = log_decay, fresh, layout, exchange, backend, states
            want = attend(tokens, *how)
            found.append(same(attend(tokens, log_decay, kept, *how[2:]), want))
            later = lambda: broadcast(kept, BOUNDS[1])  # forward and backward of one call have the same documents
            found.append(same(attend(tokens, log_decay, kept, *how[2:], between=later), want))
    return found


LAYOUTS = [("zigzag", "all-gather"), ("contiguous", "ring"), ("zigzag", "scan"), ("zigzag-documents", "all-gather")]


def change_bounds_of_all(rank: int, world: int, backend: str) -> dict[tuple[str, str], list[bool]]:
    cases = LAYOUTS[::3] if backend == "triton" else LAYOUTS
    return {case: change_bounds(rank, world, *case, backend) for case in cases}


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bounds_that_a_broadcast_changes(backend):
    for found in spawn(change_bounds_of_all, 2, backend):
        assert len(found) == (2 if backend == "triton" else 4)
        for case, same_bits in found.items():
            assert same_bits and all(same_bits), case


def change_decays(rank: int, world: int) -> list[bool]:
    rng = torch.Generator().manual_seed(rank)
    tokens = [randn(rng, 1, 24, 2, 16).float() for _ in range(3)]
    kept, found = torch.tensor([-0.1, -0.01]), []
    for exchange in ("all-gather", "pipelined"):
        for _ in range(2):
            version = kept._version
            dist.all_reduce(kept)
            assert kept._version == version
            how = "zigzag", exchange, "torch"
            found.append(same(attend(tokens, kept, None, *how), attend(tokens, kept.clone(), None, *how)))
    return found


def test_decays_that_an_all_reduce_changes():
    for found in spawn(change_decays, 2):
        assert found and all(found), found


def change_before_the_backward(rank: int, world: int) -> list[str]:
    found = []
    for exchange in ("all-gather", "ring"):
        kept = torch.tensor([-0.1, -0.01])
        q = torch.ones(1, 8, 2, 16, requires_grad=True)
        o = parallel.lightning_attn(q, q, q, kept, group=dist.group.WORLD, exchange=exchange)[0]
        kept.mul_(5)
        try:
            o.sum().backward()
            found.append("gradients of other decays than the output's")
        except RuntimeError as error:
            found.append(str(error))
    return found


def test_decays_that_change_before_the_backward_end_in_autograds_error():
    """As of the operator on one rank: the backward computes decays anew, and would take those of now."""
    for found in spawn(change_before_the_backward, 2):
        assert len(found) == 2 and all("modified by an inplace operation" in text for text in found), found


def change_softmax(rank: int, world: int, per_document: bool) -> list[bool]:
    group = dist.group.WORLD
    core = SDPACoreAttention(
        transformer_config(context_parallel_size=world), 1, AttnMaskType.causal, "self",
        pg_collection=type("Groups", (), {"cp": group}), per_document=per_document,
    )  # fmt: skip
    rng = torch.Generator().manual_seed(rank)
    q, k, v = (randn(rng, 48 // world, 4, 8).float() for _ in range(3))
    kept, found = torch.tensor(BOUNDS[0], dtype=torch.int32), []
    packed = PackedSeqParams("thd", kept, kept)
    for values in BOUNDS:
        broadcast(kept, values)
        fresh = torch.tensor(values, dtype=torch.int32)
        want = core(q, k, v, None, packed_seq_params=PackedSeqParams("thd", fresh, fresh))
        found.append(torch.equal(core(q, k, v, None, packed_seq_params=packed), want))
    broadcast(kept, [0, 6, 24, 48] if per_document else [0, 8, 24, 50])
    try:
        core(q, k, v, None, packed_seq_params=packed)
        found.append(False)
    except ValueError:  # checked again, though nobody has seen the change
        found.append(True)
    return found


@pytest.mark.parametrize("per_document", [False, True])
def test_the_softmax_core_reads_bounds_at_every_call(per_document):
    for found in spawn(change_softmax, 2, per_document):
        assert found and all(found), found
