"""Softmax attention to keys and values in blocks, as in the dynamic engine, against its formula.

The reference attends in fp64 to keys and values that it lays into blocks itself.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.varlen

from lightning_megatron.ops.triton import paged as kernels
from lightning_megatron.softmax import paged
from lightning_megatron.softmax.paged import attend, decode, refuse_unserved
from tests.layers import transformer_config
from tests.tolerances import TOLERANCES

# ---- attention -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    H: int = 4
    Hkv: int = 2
    K: int = 32
    V: int = 32
    block: int = 64
    max_blocks: int = 3
    prefix: bool = False  # values are the first V channels of the keys
    programs: int = kernels.PROGRAMS


CASES = {
    "grouped": Case(),
    "one part": Case(programs=1),
    "other dims": Case(H=3, Hkv=3, K=48, V=24, block=96),
    "many heads": Case(H=70, Hkv=1, K=16, V=16, max_blocks=2),
    "long": Case(H=2, Hkv=1, K=16, V=16, block=256, max_blocks=5),
    "latent": Case(H=20, Hkv=1, K=40, V=32, max_blocks=9, prefix=True),
}


class Blocks:
    """Requests of given lengths in shuffled blocks; what no request holds is NaN."""

    def __init__(self, case: Case, lengths: list[int], rng: torch.Generator, dtype=torch.float32, device="cpu"):
        self.case, self.lengths = case, lengths
        used = [-(-n // case.block) for n in lengths]
        blocks = sum(used) + 2
        order = torch.randperm(blocks, generator=rng).tolist()
        unused = order.pop()
        cache = torch.full((blocks, case.block, case.Hkv, case.K + case.V), torch.nan, dtype=torch.float64)
        table = torch.full((len(lengths), case.max_blocks), unused)
        self.keys, self.values = [], []
        for i, n in enumerate(lengths):
            new = torch.randn(n, case.Hkv, case.K + case.V, generator=rng, dtype=torch.float64).to(dtype).double()
            for j in range(used[i]):
                table[i, j] = order.pop()
                part = new[j * case.block : (j + 1) * case.block]
                cache[table[i, j], : len(part)] = part
            if n == 0:
                table[i] = -1  # as Megatron marks padding
            k, v = new.split([case.K, case.V], -1)
            self.keys.append(k)
            self.values.append(k[..., : case.V] if case.prefix else v)
        k, v = (x.contiguous().to(device, dtype) for x in cache.split([case.K, case.V], -1))
        self.caches = k, case.V if case.prefix else v
        self.table = table.to(device, torch.int32)
        self.seqused = torch.tensor(lengths, dtype=torch.int32, device=device)

    def expected(self, q: torch.Tensor, tokens: list[int], scale: float) -> torch.Tensor:
        """o of the last ``tokens[i]`` tokens of request i, from its formula; zeros for rows of q that are no tokens."""
        o, at = torch.zeros(*q.shape[:2], self.case.V, dtype=torch.float64), 0
        for n, length, k, v in zip(tokens, self.lengths, self.keys, self.values, strict=True):
            for i in range(n):
                seen = length - n + i + 1
                for h in range(self.case.H):
                    g = h // (self.case.H // self.case.Hkv)
                    weights = torch.softmax(scale * (k[:seen, g] @ q[at].cpu().double()[h]), 0)
                    o[at, h] = weights @ v[:seen, g]
                at += 1
        return o


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative RMS of the worst row that is no padding, whose rows are zeros."""
    got, norms = got.cpu().double(), want.flatten(1).norm(dim=1)
    assert not got[norms == 0].any()
    return float(((got - want).flatten(1).norm(dim=1)[norms > 0] / norms[norms > 0]).max())


def draw_lengths(case: Case, rng: torch.Generator) -> list[int]:
    """One, around a block's bounds, all that fits, anything, and padding last."""
    most = case.block * case.max_blocks
    some = torch.randint(1, most + 1, (2,), generator=rng).tolist()
    return [1, case.block, case.block + 1, most, *some, 0, 0]


@pytest.mark.parametrize("kernel", [True, False], ids=["triton", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_decode(name, kernel, rng, monkeypatch):
    case = CASES[name]
    monkeypatch.setattr(kernels, "PROGRAMS", case.programs)
    lengths = draw_lengths(case, rng)
    blocks = Blocks(case, lengths, rng)
    q = torch.randn(len(lengths), 2 * case.H, case.K, generator=rng)[:, : case.H]
    got = decode(q, *blocks.caches, blocks.table, blocks.seqused, scale=0.3, kernel=kernel)
    want = blocks.expected(q, [min(n, 1) for n in lengths], 0.3)
    assert error(got, want) < TOLERANCES["triton", torch.float32]["o"]


@pytest.mark.parametrize("tokens", [[1, 1, 5, 130, 1, 64, 0], [70, 1, 0], [1, 1, 0, 0], [3]], ids=str)
def test_steps_of_any_kind(tokens, rng):
    """Decoding first, then prompts in whole or in part, even of one token; padding behind them."""
    case = CASES["grouped"]
    most = case.block * case.max_blocks
    lengths = [n and n + int(torch.randint(0, most - n + 1, (), generator=rng)) for n in tokens]
    blocks = Blocks(case, lengths, rng)
    q = torch.randn(sum(tokens) + 3, case.H, case.K, generator=rng)
    bounds = torch.tensor([0, *tokens]).cumsum(0).int()
    got = attend(q, *blocks.caches, blocks.table, bounds, blocks.seqused, scale=0.3, decode_only=False)
    assert error(got, blocks.expected(q, tokens, 0.3)) < TOLERANCES["torch", torch.float32]["o"]


@pytest.mark.parametrize("repeated", [1, 2**29])
def test_prompts_by_varlen_attn(repeated, rng, monkeypatch):
    """What torch's FlashAttention is called with on a GPU, by a function that computes what its documentation says."""

    def varlen_attn(q, k, v, bounds_q, bounds_k, max_q, max_k, *, scale, window_size):
        assert window_size == (-1, 0) and q.shape[1:] == k.shape[1:] and k.shape == v.shape
        assert max_q == bounds_q.diff().max() and max_k == bounds_k.diff().max()
        assert len(q) == bounds_q[-1] and len(k) == bounds_k[-1] and bounds_q.dtype == bounds_k.dtype == torch.int32
        o = torch.empty_like(q)
        for a, b, c, d in zip(bounds_q[:-1], bounds_q[1:], bounds_k[:-1], bounds_k[1:], strict=True):
            hidden = torch.ones(b - a, d - c, dtype=torch.bool).triu(d - c - (b - a) + 1)
            scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * scale
            o[a:b] = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v[c:d])
        return o

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(paged, "REPEATED", repeated)
    case = Case(H=6, Hkv=3, K=32, V=24)
    tokens, lengths = [5, 130, 64], [20, 192, 64]
    blocks = Blocks(case, lengths, rng)
    q = torch.randn(sum(tokens), case.H, case.K, generator=rng)
    rows = [torch.cat(x).float() for x in (blocks.keys, blocks.values)]
    got = paged._varlen(q, *rows, tokens, lengths, 0.3)
    assert error(got, blocks.expected(q, tokens, 0.3)) < TOLERANCES["torch", torch.float32]["o"]


def test_parts_do_not_depend_on_lengths(rng, monkeypatch):
    """Other lengths are other numbers on the device, not another launch: a captured CUDA graph stays right."""
    launches = []
    launch = kernels.launch
    monkeypatch.setattr(
        kernels, "launch", lambda *args, **how: (launches.append((args[1], args[3:], how)), launch(*args, **how))
    )
    case = CASES["latent"]
    for lengths in ([1, 1], [case.block * case.max_blocks, 70]):
        blocks = Blocks(case, lengths, rng)
        q = torch.randn(2, case.H, case.K, generator=rng)
        decode(q, *blocks.caches, blocks.table, blocks.seqused, scale=0.3, kernel=True)
    assert len(launches) == 4 and launches[:2] == launches[2:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(H=32, Hkv=4, K=128, V=128, max_blocks=40),
        Case(H=8, Hkv=8, K=256, V=256, block=256, max_blocks=9),
        Case(H=6, Hkv=2, K=96, V=64, block=96, max_blocks=7),
        Case(H=64, Hkv=1, K=576, V=512, max_blocks=40, prefix=True),
        Case(H=16, Hkv=1, K=576, V=512, max_blocks=9, prefix=True),
    ],
    ids=str,
)
@pytest.mark.gpu
def test_decode_on_gpu(case, dtype, rng):
    lengths = draw_lengths(case, rng)
    blocks = Blocks(case, lengths, rng, dtype, "cuda")
    q = torch.randn(len(lengths), case.H, case.K, generator=rng).to("cuda", dtype)
    scale = case.K**-0.5
    got = decode(q, *blocks.caches, blocks.table, blocks.seqused, scale=scale)
    want = blocks.expected(q, [min(n, 1) for n in lengths], scale)
    assert got.dtype == dtype and error(got, want) < TOLERANCES["triton", dtype]["o"]


@pytest.mark.gpu
def test_prompts_on_gpu(rng):
    case = Case(H=8, Hkv=2, K=64, V=64)
    tokens, lengths = [1, 5, 130, 64, 0], [100, 20, 192, 64, 0]
    blocks = Blocks(case, lengths, rng, torch.bfloat16, "cuda")
    q = torch.randn(sum(tokens) + 3, case.H, case.K, generator=rng).to("cuda", torch.bfloat16)
    bounds = torch.tensor([0, *tokens], device="cuda").cumsum(0).int()
    got = attend(q, *blocks.caches, blocks.table, bounds, blocks.seqused, scale=0.125, decode_only=False)
    assert error(got, blocks.expected(q, tokens, 0.125)) < TOLERANCES["triton", torch.bfloat16]["o"]


@pytest.mark.parametrize("prefix", [False, True], ids=["keys and values", "latents"])
@pytest.mark.gpu
def test_cuda_graph_serves_other_lengths(prefix, rng):
    case = Case(H=8, Hkv=1, K=96 if prefix else 64, V=64, max_blocks=20, prefix=prefix)
    lengths = draw_lengths(case, rng)
    q = torch.randn(len(lengths), case.H, case.K, generator=rng).to("cuda", torch.bfloat16)
    first = Blocks(case, lengths, rng, torch.bfloat16, "cuda")
    sizes = [x.shape for x in first.caches if not isinstance(x, int)]
    room = [torch.zeros(2 * size[0], *size[1:], dtype=torch.bfloat16, device="cuda") for size in sizes]
    caches = (room[0], case.V if prefix else room[1])

    def fill(blocks: Blocks) -> None:
        for cache, new in zip(room, blocks.caches, strict=False):
            cache[: len(new)] = new
        table.copy_(blocks.table)
        seqused.copy_(blocks.seqused)

    table, seqused = torch.empty_like(first.table), torch.empty_like(first.seqused)
    fill(first)
    decode(q, *caches, table, seqused, scale=0.1)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = decode(q, *caches, table, seqused, scale=0.1)
    for _ in range(3):
        other = Blocks(case, lengths := [*draw_lengths(case, rng)[::-1][2:], 7, 0], rng, torch.bfloat16, "cuda")
        fill(other)
        graph.replay()
        want = other.expected(q, [min(n, 1) for n in lengths], 0.1)
        assert error(got, want) < TOLERANCES["triton", torch.bfloat16]["o"]


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(window_size=(8, 0)), "--window-size .8, 0.: softmax layer 2 cannot be served .* without flash-attn"),
        (dict(multi_latent_attention=True, kv_lora_rank=640), "--kv-lora-rank 640 .* nor with flash-attn"),
        (dict(softmax_type="off-by-one"), "--softmax-type off-by-one: .* install flash-attn"),
        (dict(kv_channels=320), "--kv-channels 320"),
    ],
    ids=str,
)
def test_refused(changes, message):
    config = SimpleNamespace(**vars(transformer_config()) | changes)
    with pytest.raises(ValueError, match=message):
        refuse_unserved(config, 2)


def test_windows_elsewhere_are_not_refused():
    refuse_unserved(
        SimpleNamespace(**vars(transformer_config()) | dict(window_size=(8, 0), window_attn_skip_freq=2)), 2
    )
