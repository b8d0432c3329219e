"""Selective recompute of lightning layers: the bits of no recompute, one exchange of states, and less memory."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch

from lightning_megatron.selective import recomputed
from tests import layers
from tests.helpers.sent import Sent
from tests.helpers.training import assert_same_training, train
from tests.launch import spawn
from tests.layers import Variant

SELECTIVE = dict(recompute_granularity="selective", recompute_modules=["core_attn"])
WAYS = {
    "none": ({}, {}),
    "core": (SELECTIVE, {}),
    "qkv": (SELECTIVE, dict(recompute_qkv=True)),
}
VARIANTS = {
    "plain": Variant(),
    "everything": Variant(dict(rope=True, qk_norm=True, norm="all", num_kv_heads=2, feature_map="silu-qkv")),
    "lrpe": Variant(dict(lrpe_layers=4, norm="group", norm_groups=2, gate="linear")),
    "bare": Variant(dict(norm="none", gate="none", feature_map="none")),
}
TOKENS = 24


def grads_of(variant: Variant, way: str, seed: int, rank: int, tp: int, cp: int, sp: bool) -> dict[str, torch.Tensor]:
    """Output and gradients of a layer on this rank, as Megatron's training has them."""
    fields, options = WAYS[way]
    variant = variant.replace(options=variant.options | options)
    mixer = layers.build_mixer(variant, context_parallel_size=cp, **layers.layout(tp, sp), **fields)
    model = layers.trainable(mixer, mixer.config)
    rng = torch.Generator().manual_seed(seed)
    layers.set_parameters(mixer, layers.draw_parameters(mixer, tp, rng), rank % tp, tp)
    x, dy = (torch.randn(TOKENS * cp, 2, 64, generator=rng).chunk(cp)[rank // tp] for _ in range(2))
    if sp:
        x, dy = (layers.tokens_here(y, rank % tp, tp) for y in (x, dy))
    x = x.clone().requires_grad_()
    angles = layers.rotary(variant, TOKENS * cp, mixer.pg_collection.cp)
    found = {}
    for step in range(2):  # the second one accumulates
        output, bias = model(x.sin() if step else x, rotary_pos_emb=angles)
        assert bias is None
        output.backward(dy)
        found[f"output {step}"] = output.detach()
    return found | {"input": x.grad} | layers.gradients(model)


def check(rank: int, world: int, names: tuple[str, ...], seed: int, tp: int, cp: int, sp: bool) -> list[dict[str, int]]:
    layers.start(tp=tp, cp=cp)
    every = []
    for name in names:
        sent, results = {}, {}
        for way in WAYS:
            if cp > 1:
                with pytest.MonkeyPatch.context() as patched:
                    counted = Sent(patched, cp)
                    results[way] = grads_of(VARIANTS[name], way, seed, rank, tp, cp, sp)
                sent[way] = counted.elements
            else:
                results[way] = grads_of(VARIANTS[name], way, seed, rank, tp, cp, sp)
        for way in ("core", "qkv"):
            assert results[way].keys() == results["none"].keys()
            wrong = [n for n, x in results["none"].items() if not torch.equal(x, results[way][n])]
            assert not wrong, f"{name} {way} {seed=}: {wrong}"
        assert all(x.abs().max() > 0 for x in results["none"].values())
        every.append(sent)
    return every


@pytest.fixture
def seed(rng) -> int:
    return int(torch.randint(2**31, (), generator=rng))


@pytest.mark.parametrize("world, tp, cp, sp", [(1, 1, 1, False), (2, 2, 1, True)], ids=["one", "tp2-sp"])
def test_same_bits(world, tp, cp, sp, seed):
    spawn(check, world, tuple(VARIANTS), seed, tp, cp, sp)


def test_states_are_exchanged_once(seed):
    """Over two context-parallel ranks: as many elements are sent as without recompute."""
    for rank in spawn(check, 2, ("plain", "everything"), seed, 1, 2, False):
        for sent in rank:
            assert sent["none"] == sent["core"] == sent["qkv"] > 0


# ---- what is kept ----------------------------------------------------------------------------------------------------


def note(own: set[int], storages: dict[int, torch.UntypedStorage], x: torch.Tensor) -> torch.Tensor:
    storage = x.untyped_storage()
    if storage.data_ptr() not in own:
        storages[storage._cdata] = storage
    return x


def kept(rank: int, world: int, seed: int) -> dict[str, int]:
    """Bytes that autograd keeps of one layer between forward and backward, by storage."""
    layers.start()
    found = {}
    for way, (fields, options) in WAYS.items():
        mixer = layers.build_mixer(Variant(dict(qk_norm=True, **options)), **fields)
        own = {p.untyped_storage().data_ptr() for p in mixer.parameters()}
        x = torch.randn(256, 1, 64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        storages: dict[int, torch.UntypedStorage] = {}
        pack = functools.partial(note, own, storages)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
            output, _ = mixer(x)
        found[way] = sum(storage.nbytes() for storage in storages.values())
    return found


def test_less_is_kept(seed):
    """Of 256 tokens in fp32, in units of the hidden size; what is left is input and fused projection (5 units)."""
    (found,) = spawn(kept, 1, seed)
    unit = 256 * 64 * 4
    assert found["none"] > found["core"] + 2 * unit and found["core"] > found["qkv"] + 3 * unit, found
    assert 5 * unit <= found["qkv"] < 5.5 * unit, found


class Net:
    """function and consumer with parameters, which keep what products need."""

    def __init__(self, rng: torch.Generator) -> None:
        draw = lambda *shape: torch.nn.Parameter(torch.randn(*shape, generator=rng))
        self.inner, self.outer, self.x = draw(8, 8), draw(8, 8), draw(5, 8)
        self.runs, self.results = 0, []

    def function(self, a, b, nothing):
        assert nothing is None
        self.runs += 1
        y = (a @ self.inner).tanh() * b
        self.results.append(weakref.ref(y.untyped_storage()))
        return y

    def consumer(self, y):
        return y.view(5, 8) @ self.outer, None

    def run(self, recompute: bool) -> torch.Tensor:
        a, b = self.x.sin(), self.x.cos()
        if recompute:
            return recomputed(self.function, [self.inner], self.consumer, a, b, None)[0]
        return self.consumer(self.function(a, b, None))[0]

    def grads(self, y, **how) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y.square().sum(), [self.x, self.inner, self.outer], **how)


def test_memory_goes_and_comes_back(rng):
    net = Net(rng)
    want = net.grads(net.run(False))
    y = net.run(True)
    assert net.runs == 2 and net.results[1]() is not None and net.results[1]().nbytes() == 0
    first = net.grads(y, retain_graph=True)  # .grad() and not .backward(), as when a CUDA graph is captured
    second = net.grads(y, retain_graph=True)
    for got in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert net.runs == 4 and net.results[1]().nbytes() == 0
    del y
    gc.collect()
    assert all(storage() is None for storage in net.results), "nothing outlives its graph"


def test_no_cycle_keeps_the_graph(rng):
    """Without a garbage collection the memory of a forward that no backward follows is free."""
    net = Net(rng)
    gc.collect()
    gc.disable()
    try:
        y = net.run(True)
        assert net.results[0]() is not None
        del y
        assert all(storage() is None for storage in net.results)
    finally:
        gc.enable()


def test_without_gradients_nothing_is_recomputed(rng):
    net = Net(rng)
    with torch.no_grad():
        y = net.run(True)
    net.x.requires_grad_(False)
    z = net.run(True)  # only weights learn: their gradients need the result
    assert net.runs == 2 and torch.equal(y, z) and z.requires_grad
    assert torch.equal(*(torch.autograd.grad(x.sum(), net.outer)[0] for x in (z, net.run(False))))


# ---- Megatron's training ---------------------------------------------------------------------------------------------


def test_training_has_the_same_losses():
    flags = "--recompute-granularity selective --recompute-modules core_attn mlp --lightning-recompute-qkv"
    run, want = (train("freq4", "tp2-sp", flags) for flags in (flags, ""))
    assert_same_training(run, want, losses=0, norms=0)
    assert "--recompute-modules core_attn" not in run.log, "no warning"
