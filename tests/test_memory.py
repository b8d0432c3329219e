"""Options that save memory of full recompute: layers in chunks, and their inputs on the host. The same training."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from lightning_megatron.layer import in_chunks
from lightning_megatron.offload import SLAB, HostMemory, Offloader
from lightning_megatron.parallel import exchange_once
from lightning_megatron.parallel.interleave import interleave
from tests.helpers.documents import write_equal_documents
from tests.helpers.training import LAYOUTS, RECOMPUTE, assert_same_training, train
from tests.launch import spawn

# ---- Megatron's training ---------------------------------------------------------------------------------------------

CHUNK = 48  # of 128 tokens
COUNTED = """
from megatron.core.transformer.mlp import MLP
from lightning_megatron import mixer, pretrain
from lightning_megatron.patches import recompute
longest = {MLP: 0, mixer.LightningAttention: 0}
def watch(kind):
    forward = kind.forward
    def counted(self, hidden, *args, **kwargs):
        if not (kind is MLP and self.linear_fc1.is_expert):
            longest[kind] = max(longest[kind], len(hidden))
        return forward(self, hidden, *args, **kwargs)
    kind.forward = counted
for kind in longest:
    watch(kind)
pretrain.main()
offloader = recompute._offloader
sent = (offloader.sent, offloader.memory.bytes) if offloader else (0, 0)
# one write, or ranks mix theirs
print(f"<longest {' '.join(map(str, longest.values()))}, sent {sent[0]}, {sent[1]} bytes>\\n", end="")
"""
BOTH = f"--lightning-recompute-chunk {CHUNK} --lightning-offload-activations"
MORE = {  # of "all"
    "lrpe": "--lightning-lrpe-layers 2",
    "hybrid": "--hybrid-layer-pattern L-L-*-L-",
    "experts": "--hybrid-layer-pattern LEL-LE*- --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 "
    "--moe-router-load-balancing-type none",
}
INPUT = 4 * 64  # bytes of a token's hidden states


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "counted.py"
    path.write_text(COUNTED)
    return path


@pytest.mark.parametrize(
    "model, layout, longest, sent, tokens",
    [
        # 4 layers, 2 microbatches, 5 steps: 3 inputs leave of each, and one is on the host at a time as another comes
        ("moe", "one", (48, 128), 30, 3 * 128),  # two layers with experts, and one softmax layer
        ("freq4", "tp2-sp", (24, 24), 30, 3 * 64),  # with rotary angles and a norm over all ranks
        ("freq4", "pp2-vp2", (48, 48), 0, 0),  # one layer a stage: its input is needed first
        ("all", "cp2", (48, 64), 30, 3 * 64),
        # documents begin inside of chunks, and one where a chunk does
        ("freq4-packed", "one", (48, 48), 30, 3 * 128),
        ("all-packed", "tp2-sp", (24, 24), 30, 3 * 64),
        # angles of layers' own, and learnt ones
        ("latent", "tp2-sp", (24, 24), 30, 3 * 64),
        ("latent-packed", "one", (48, 48), 30, 3 * 128),
        ("lrpe-packed", "one", (48, 48), 30, 3 * 128),
        ("lrpe", "tp2-sp", (24, 24), 30, 3 * 64),
        # attentions and MLPs are layers by themselves; the softmax layer's attention stays whole
        ("hybrid-packed", "one", (48, 48), 70, 7 * 128),
        ("hybrid", "tp2-sp", (24, 24), 70, 7 * 64),
        ("experts-packed", "one", (48, 48), 70, 7 * 128),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_same_training(model, layout, longest, sent, tokens, script, tmp_path):
    """Losses and gradients with both options; and nothing longer than a chunk goes through what they cut."""
    nproc, _ = LAYOUTS[layout]
    model, _, packed = model.partition("-")
    data = f"{write_equal_documents(tmp_path)} --dataloader-inter-document-masking" if packed else ""
    if model in MORE:
        model, data = "all", f"{data} {MORE[model]}"
    run = train(model, layout, f"{RECOMPUTE} {BOTH} {data}", script=script)
    assert run.log.count(f"<longest {longest[0]} {longest[1]}, sent {sent}, ") == nproc, run.log[-3000:]
    assert run.log.count(f", {tokens * INPUT} bytes>") == nproc
    want = train(model, layout, f"{RECOMPUTE} {data}")
    assert_same_training(run, want)
    assert want.losses[-1] < want.losses[0] - 0.3


def test_each_alone_and_in_a_step_that_is_not_recomputed(script):
    """Without one of them the other does its part; evaluation goes through chunks as well."""
    want = train("all", "recompute-full")
    chunks = train("all", "recompute-full", f"--lightning-recompute-chunk {CHUNK} --eval-iters 1", script=script)
    host = train("all", "recompute-full", "--lightning-offload-activations", script=script)
    assert "<longest 48 48, sent 0, " in chunks.log and "<longest 128 128, sent 30, " in host.log
    assert_same_training(chunks, want)
    assert_same_training(host, want, losses=0, norms=0)


# ---- in_chunks -------------------------------------------------------------------------------------------------------


def recurrence(weight, seen, x, state, rows):
    """A layer whose chunks pass on a state, in fp64: a decaying sum over all tokens before."""
    seen.append((rows.start, rows.stop))
    outputs, state = [], torch.zeros_like(x[0]) if state is None else state
    for token in x:
        state = 0.7 * state + (token @ weight).sin()
        outputs.append(token + state * token)
    return torch.stack(outputs), state


@pytest.mark.parametrize("rows", [1, 5, 13])
def test_in_chunks_is_the_layer(rng, rows):
    x, weight = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((13, 2, 4), (4, 4)))
    dy, seen, results = torch.randn(13, 2, 4, generator=rng, dtype=torch.float64), [], []
    for chunked in (False, True):
        inputs = x.clone().requires_grad_(), torch.nn.Parameter(weight)
        step = partial(recurrence, inputs[1], seen if chunked else [])
        if chunked:
            layer = exchange_once(lambda x, step=step, w=inputs[1]: in_chunks(step, x, rows, [w]))
            y = checkpoint(layer, inputs[0].sin(), use_reentrant=True)
        else:
            y, _ = step(inputs[0].sin(), None, slice(0, 13))
        y.backward(dy)
        results.append((y.detach(), *(x.grad for x in inputs)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    parts = [(start, min(start + rows, 13)) for start in range(0, 13, rows)]
    assert seen == parts + parts[::-1], "forward once, and once more for the backward"


def test_weights_are_summed_in_fp32(rng):
    """Over 64 chunks of bf16, the gradient is that of one chunk to one rounding."""
    x, weight = (torch.randn(*shape, generator=rng).bfloat16() for shape in ((64, 1, 32), (32, 32)))
    grads = []
    for rows in (1, 64):
        w = torch.nn.Parameter(weight)
        layer = exchange_once(lambda x, w=w, rows=rows: in_chunks(lambda x, *_: (x @ w, None), x, rows, [w]))
        checkpoint(layer, x.clone().requires_grad_(), use_reentrant=True).sum().backward()
        grads.append(w.grad.double())
    exact = x[:, 0].double().sum(0)[:, None].expand(32, 32)
    for grad in grads:
        assert (grad - exact).norm() < 3e-3 * exact.norm()  # rounding once costs 1.7e-3


def check_interleave(rank: int, world: int) -> None:
    for length, rows in ((7, 7), (7, 3), (12, 4), (13, 5), (5, 1)):
        order = interleave(dist.group.WORLD, length, rows)
        x = torch.arange(world * length).view(-1, 1)  # the sequence
        mine = x.chunk(world)[rank]
        parts = [part.chunk(world)[rank] for part in x.split(world * rows)]
        got = order.enter(mine)
        assert torch.equal(got, torch.cat(parts)), (length, rows, got.flatten().tolist())
        assert torch.equal(order.leave(got), mine)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_get_their_rows_of_every_chunk(world):
    spawn(check_interleave, world)


# ---- the host --------------------------------------------------------------------------------------------------------


def layers_on(device: str, offload: bool, size: int, rng: torch.Generator):
    """Four recomputed layers, two microbatches in flight: gradients, whose inputs are still here, the offloader."""
    offloader, alive, grads = Offloader(), [], []
    weight = torch.nn.Parameter(torch.randn(64, 64, generator=rng).to(device) / 8)
    inputs = [torch.randn(size, 1, 64, generator=rng).to(device).requires_grad_() for _ in range(2)]

    def block(x):
        here = []
        for _ in range(4):
            here.append(weakref.ref(x.untyped_storage()))
            run = partial(checkpoint, lambda x: ((x @ weight).tanh() + x, None), use_reentrant=True)
            x, _ = offloader.checkpoint(run, x) if offload else run(x)
        return x, here

    outputs = [block(x.sin()) for x in inputs]
    gc.collect()
    for _, here in outputs:
        alive.append([x() is not None for x in here])
    for y, _ in outputs:
        y.square().sum().backward()
    grads = [weight.grad, *(x.grad for x in inputs)]
    return grads, alive, offloader


@pytest.mark.parametrize("device, size", [("cpu", 7), pytest.param("cuda", 2**19, marks=pytest.mark.gpu)])
def test_inputs_wait_on_the_host(device, size, rng):
    seed = int(torch.randint(2**31, (), generator=rng))
    want, all_here, _ = layers_on(device, False, size, torch.Generator().manual_seed(seed))
    grads, alive, offloader = layers_on(device, True, size, torch.Generator().manual_seed(seed))
    assert all(torch.equal(x, y) for x, y in zip(grads, want, strict=True))
    assert all_here == [[True] * 4] * 2, "without it checkpoints hold their inputs: this test can fail"
    assert alive == [[False, False, False, True]] * 2
    assert offloader.sent == 6 and sum(map(len, offloader.memory.free.values())) > 0
    free = sum(size * len(buffers) for size, buffers in offloader.memory.free.items())
    assert free == offloader.memory.bytes >= 6 * 4 * 64 * size, "every buffer is given back"


def test_backward_twice_is_refused(rng):
    offloader, x = Offloader(), torch.randn(3, 4, generator=rng).requires_grad_()
    run = partial(checkpoint, torch.sin, use_reentrant=True)
    y = offloader.checkpoint(run, offloader.checkpoint(run, x.cos()))
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a backward went twice .*--lightning-offload-activations out"):
        y.sum().backward()


def test_host_memory():
    memory = HostMemory()
    assert [x.numel() for x in memory.take(1, False)] == [1]
    assert [x.numel() for x in memory.take(1000, False)] == [1024]
    buffers = memory.take(2 * SLAB + 5, False)
    assert [x.numel() for x in buffers] == [SLAB, SLAB, 8]
    memory.give(buffers)
    before = memory.bytes
    assert {x.data_ptr() for x in memory.take(SLAB, False)} <= {x.data_ptr() for x in buffers}
    assert memory.bytes == before


def test_no_host_memory_left(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("CUDA error: out of memory")

    memory = HostMemory()
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(RuntimeError, match="0.0 GiB of pinned host memory and cannot get more .*leave it out"):
        memory.take(5, False)
