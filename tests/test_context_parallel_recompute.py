"""Recomputed layers over context-parallel ranks: one exchange of states, with the bits that a second would give."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.utils.checkpoint import checkpoint

from lightning_megatron import parallel
from lightning_megatron.compat import importable
from lightning_megatron.parallel import recompute
from lightning_megatron.patches import recompute as patch
from tests import layers
from tests.helpers.context_parallel import EXCHANGES, tokens_of
from tests.helpers.sent import Sent
from tests.launch import spawn

H, K = 2, 16


class Net:
    """Two layers in one checkpoint, for packed documents or the rows of a batch."""

    def __init__(
        self, rng: torch.Generator, rank: int, world: int, layout: str, exchange: str, packed: bool, backend: str
    ) -> None:
        T = 12 * world
        cu_seqlens = torch.tensor([0, 4 * world, 4 * world, 10 * world, T]) if packed else None
        mine = tokens_of(rank, world, layout, [12] * world, cu_seqlens)
        dtype, heads = (torch.float32, 1) if backend == "triton" else (torch.float64, H)  # the interpreter is slow
        draw = lambda: torch.randn(1 if packed else 2, T, heads, K, generator=rng, dtype=torch.float64)[:, mine].to(
            dtype
        )
        self.x, self.weight = draw(), draw()
        self.attn = functools.partial(
            parallel.lightning_attn, group=dist.group.WORLD, layout=layout, exchange=exchange, cu_seqlens=cu_seqlens,
            backend=backend,
        )  # fmt: skip
        self.log_decays = [torch.tensor(x[:heads], dtype=dtype) for x in ([-0.3, -0.01], [-0.05, -1.0])]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for log_decay in self.log_decays:
            x = x + self.attn(x.sin(), x.cos(), x, log_decay)[0]
        return x

    def run(self, how) -> list[torch.Tensor]:
        """Output and gradient through ``how``, a checkpoint."""
        x = self.x.clone().requires_grad_()
        o = how(self.forward, x)
        o.backward(self.weight)
        return [o.detach(), x.grad]


@pytest.fixture
def seed(rng) -> int:
    return int(torch.randint(2**31, (), generator=rng))


def plain(forward, x):
    return checkpoint(forward, x, use_reentrant=True)


def once(forward, x, use_reentrant=True):
    return checkpoint(parallel.exchange_once(forward), x, use_reentrant=use_reentrant)


once_without_reentry = functools.partial(once, use_reentrant=False)


def check(rank: int, world: int, layout: str, exchange: str, seed: int) -> list[list[int]]:
    """Elements sent in forward, recomputation and backward, without and with ``exchange_once``, for dense and packed
    tokens.
    """
    sent_by_both = []
    for packed in (False, True) if layout == "zigzag" else (layout == "zigzag-documents",):
        rng = torch.Generator().manual_seed(seed)
        net = Net(rng, rank, world, layout, exchange, packed, "torch")
        alone = net.run(lambda forward, x: forward(x))
        found = []
        for how in (plain, once, once_without_reentry):
            with pytest.MonkeyPatch.context() as patched:
                sent = Sent(patched, world)
                got = net.run(how)
            assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True)), f"{how} {layout} {exchange} {seed=}"
            found.append(sent.elements)
        assert found[0] == found[2]
        sent_by_both.append(found[:2])
        for mode in (
            torch.no_grad(),
            torch.inference_mode(),
        ):  # a forward that no backward follows leaves nothing behind
            with mode:
                assert torch.equal(once(net.forward, net.x), alone[0])
        assert all(torch.equal(a, b) for a, b in zip(net.run(once), alone, strict=True))
    return sent_by_both


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "zigzag-documents"])
def test_same_bits_and_one_exchange_less(layout, exchange, seed):
    for rank in spawn(check, 2, layout, exchange, seed):
        for twice, less in rank:  # forward, recomputation, backward: of the three exchanges two are left
            if layout == "contiguous" and exchange in (
                "ring",
                "pipelined",
                "scan",
            ):  # one rank sends forward, the other backward
                assert (less, twice) in ((twice, less), (twice // 2, twice))
            else:
                assert 3 * less == 2 * twice > 0


def check_with_kernels(rank: int, world: int, seed: int) -> None:
    for packed in (False, True):
        net = Net(torch.Generator().manual_seed(seed), rank, world, "zigzag", "all-gather", packed, "triton")
        alone, got = net.run(lambda forward, x: forward(x)), net.run(once)
        assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True)), f"{packed=} {seed=}"


def test_same_bits_with_kernels(seed):
    """Triton: the parts' own states, which the first run computed for the exchange, are computed as for one rank."""
    spawn(check_with_kernels, 2, seed)


def check_life(rank: int, world: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    net = Net(rng, rank, world, "zigzag", "all-gather", False, "torch")
    entered = []
    patched = pytest.MonkeyPatch()
    put = recompute.put
    patched.setattr(recompute, "put", lambda plan, value: (entered.append(weakref.ref(value[0])), put(plan, value)))
    want = net.run(once)
    gc.collect()
    assert len(entered) == 2 and not any(x() is not None for x in entered), "states outlive their recomputation"

    # two microbatches in flight, last first, as no pipeline has it; each checkpoint has states of its own
    x = [net.x.clone().requires_grad_(), 2 * net.x]
    x[1].requires_grad_()
    o = [once(net.forward, y) for y in x]
    o[1].backward(net.weight), o[0].backward(net.weight)
    assert torch.equal(o[0], want[0]) and torch.equal(x[0].grad, want[1])

    # backward twice: the second recomputation exchanges again
    x = net.x.clone().requires_grad_()
    o = once(net.forward, x)
    o.backward(net.weight, retain_graph=True)
    o.backward(net.weight)
    assert torch.equal(x.grad, 2 * want[1])

    # a checkpoint inside of a recomputed function has states of its own
    inner = lambda y: once(net.forward, y)
    x = net.x.clone().requires_grad_()
    o = once(inner, x)
    o.backward(net.weight)
    assert torch.equal(o, want[0]) and torch.equal(x.grad, want[1])
    patched.undo()


def test_states_live_until_their_recomputation(seed):
    spawn(check_life, 2, seed)


def check_other_calls(rank: int, world: int, seed: int) -> str:
    net = Net(torch.Generator().manual_seed(seed), rank, world, "zigzag", "all-gather", False, "torch")
    runs = []

    def other(x):
        runs.append(1)
        return net.forward(x if len(runs) == 1 else x[:, :8])

    o = once(other, net.x.clone().requires_grad_())
    with pytest.raises(RuntimeError) as error:
        o.backward(net.weight)
    return str(error.value)


def test_a_recomputation_of_something_else_is_refused(seed):
    for message in spawn(check_other_calls, 2, seed):
        assert "must make the same calls each time" in message and "--no-lightning-cp-keep-states" in message


def check_used_twice(rank: int, world: int, seed: int) -> str:
    net = Net(torch.Generator().manual_seed(seed), rank, world, "zigzag", "all-gather", False, "torch")
    function, x = parallel.exchange_once(net.forward), net.x.clone().requires_grad_()
    for _ in range(2):  # one after the other they do not meet
        checkpoint(function, x, use_reentrant=True).backward(net.weight)
    checkpoint(function, x, use_reentrant=True)
    with pytest.raises(RuntimeError) as error:
        checkpoint(function, x, use_reentrant=True)
    return str(error.value)


def test_one_function_for_two_checkpoints_is_refused(seed):
    assert all("call exchange_once for every checkpoint" in message for message in spawn(check_used_twice, 2, seed))


def check_patch(rank: int, world: int) -> None:
    layers.start()
    original = tensor_parallel.checkpoint
    patch.apply()
    applied = tensor_parallel.checkpoint
    patch.apply()
    assert tensor_parallel.checkpoint is applied is not original and applied.__wrapped__ is original
    runs = []

    def function(x, y):
        runs.append((recompute._run.kept is not None, recompute._run.first))
        return x * y

    x = torch.tensor([2.0], requires_grad=True)
    tensor_parallel.checkpoint(function, False, x, torch.tensor([3.0])).backward()
    assert x.grad == 3 and runs == [(True, True), (True, False)] and recompute._run.kept is None


def test_patch():
    """Megatron's checkpoint runs what exchange_once returns, with its other arguments as they are."""
    spawn(check_patch, 1)


def check_te_patch(rank: int, world: int) -> None:
    """With a function of TransformerEngine's signature in its place, which computes by torch's checkpoint."""
    from megatron.core import recompute as megatron
    from megatron.core.extensions import transformer_engine

    def te_checkpoint(forward_func, distribute_saved_activations, get_rng_state_tracker, tp_group, *args, **kwargs):
        assert (distribute_saved_activations, get_rng_state_tracker, tp_group) == (False, len, "tp")
        return checkpoint(forward_func, *args, use_reentrant=True, **kwargs)

    layers.start()
    megatron.te_checkpoint = transformer_engine.te_checkpoint = te_checkpoint
    patch.apply(keep_states=False, quantized=True)
    assert megatron.te_checkpoint is te_checkpoint, "patched though nothing was asked for"
    patch.apply(offload=True, quantized=True)
    patch.apply(offload=True, quantized=True)
    runs = []

    def function(x, y):
        runs.append((recompute._run.kept is not None, recompute._run.first))
        return x * y, None

    for module in (megatron, transformer_engine):
        assert module.te_checkpoint.__wrapped__ is te_checkpoint
        x = torch.tensor([2.0], requires_grad=True)
        hidden = x
        for _ in range(3):
            hidden, _ = module.te_checkpoint(function, False, len, "tp", hidden, torch.tensor([3.0]))
        hidden.backward()
        assert x.grad == 27 and recompute._run.kept is None
    assert runs == 2 * (3 * [(True, True)] + 3 * [(True, False)])
    assert patch._offloader.sent == 2 * 2, "all inputs but the last go to the host"


def test_patch_of_quantized_layers():
    """TransformerEngine's checkpoint, too, exchanges states once, and its inputs go to the host."""
    spawn(check_te_patch, 1)


def check_te_checkpoint(rank: int, world: int, seed: int) -> list[int]:
    """Elements sent by TransformerEngine's own checkpoint, as it is and patched; results have the same bits."""
    from megatron.core.extensions import transformer_engine

    layers.start(cp=world)
    net = Net(torch.Generator().manual_seed(seed), rank, world, "zigzag", "all-gather", False, "triton")
    net.x, net.weight, net.log_decays = net.x.cuda(), net.weight.cuda(), [x.cuda() for x in net.log_decays]
    alone, found = net.run(lambda forward, x: forward(x)), []
    others = False, tensor_parallel.get_cuda_rng_tracker, parallel_state.get_tensor_model_parallel_group()
    for apply in (lambda: None, lambda: patch.apply(quantized=True)):
        apply()
        with pytest.MonkeyPatch.context() as patched:
            sent = Sent(patched, world)
            got = net.run(lambda forward, x: transformer_engine.te_checkpoint(forward, *others, x))
        assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True))
        found.append(sent.elements)
    return found


@pytest.mark.gpu
@pytest.mark.skipif(not importable("transformer_engine.pytorch"), reason="TransformerEngine does not import")
def test_checkpoint_of_quantized_layers_exchanges_once(seed):
    for twice, less in spawn(check_te_checkpoint, 2, seed, gpus=True, timeout=300):
        assert 3 * less == 2 * twice > 0
