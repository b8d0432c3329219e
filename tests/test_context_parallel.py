"""Lightning attention over ranks: outputs, states and every gradient on every rank, against one rank that has all
tokens.
"""

from __future__ import annotations

import datetime
import functools
import re
import time

import pytest
import torch
import torch.distributed as dist

from lightning_megatron import ops, parallel
from lightning_megatron.ops.reference import recurrent_lightning_attn
from lightning_megatron.ops.triton import symmetric
from lightning_megatron.parallel import direct
from tests.helpers.context_parallel import EXCHANGES, draw_documents, results, tokens_of
from tests.launch import spawn
from tests.ops.cases import pick, randn
from tests.tolerances import RANKS as TOLERANCE

DECAYS = (0.0, -0.003, -0.1, -0.7, -3.0)
RANKS = {"contiguous": (2, 3, 4), "zigzag": (2, 3, 4, 8), "zigzag-documents": (2, 4)}
CASES = [
    (world, layout, packed)
    for layout, worlds in RANKS.items()
    for world in worlds
    for packed in ([True] if layout == "zigzag-documents" else [False, True])
]


def check(
    rank: int, world: int, layout: str, exchange: str, seed: int, packed: bool, backend: str, dtype
) -> dict[str, float]:
    """One random case; the largest error of each quantity on this rank."""
    rng = torch.Generator().manual_seed(seed)
    integer = lambda low, high: int(torch.randint(low, high + 1, (), generator=rng))
    H, Hkv = pick(rng, [(3, 3), (4, 2), (5, 1)] if backend == "torch" else [(1, 1), (2, 1)])  # the interpreter is slow
    K, V, B = pick(rng, [16, 32]), pick(rng, [16, 32]), 1 if packed else integer(1, 2)
    cu_seqlens = None
    if layout == "contiguous":
        lengths = [integer(1, 60) for _ in range(world)]
    elif layout == "zigzag":
        lengths = [2 * integer(1, 40)] * world
    else:
        cu_seqlens = torch.tensor([0] + [2 * world * integer(0, 8) for _ in range(integer(1, 6))]).cumsum(0)
        lengths = [int(cu_seqlens[-1]) // world] * world
    T = sum(lengths)
    if packed and cu_seqlens is None:
        cu_seqlens = draw_documents(rng, T)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(pick(rng, [torch.int32, torch.int64]))
    N = B if cu_seqlens is None else cu_seqlens.numel() - 1
    log_decay = torch.tensor([pick(rng, DECAYS) for _ in range(H)], dtype=torch.float64)
    q, k, v, do = (randn(rng, B, T, h, d) for h, d in ((H, K), (Hkv, K), (Hkv, V), (H, V)))
    state, dfinal = randn(rng, N, H, K, V), randn(rng, N, H, K, V)
    states = [(given, used) for given in (True, False) for used in ((True, True), (True, False), (False, True))]
    with_state, used = pick(rng, states + 4 * [(False, (True, False))])  # as in training
    state = state if with_state else None
    common = dict(scale=pick(rng, [None, 1.0]), cu_seqlens=cu_seqlens, output_final_state=used[1])
    said = f"{seed=} {layout=} {exchange=} {lengths=} {B=} {H=} {Hkv=} {K=} {V=} {cu_seqlens=} {log_decay=} {used=}"

    whole = functools.partial(ops.lightning_attn, log_decay=log_decay, backend="torch", **common)
    want = results(whole, q, k, v, state, do, dfinal, used)
    mine = tokens_of(rank, world, layout, lengths, cu_seqlens)
    want |= {name: want[name][:, mine] for name in ("o", "dq", "dk", "dv")}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    local = functools.partial(
        parallel.lightning_attn, log_decay=log_decay.to(wide), group=dist.group.WORLD, layout=layout, exchange=exchange,
        backend=backend, tokens=lengths if layout == "contiguous" else None, **common,
    )  # fmt: skip
    tokens = [x[:, mine].to(dtype) for x in (q, k, v, do)]
    if pick(rng, [True, False]):  # [T, B, ...] in memory, as Megatron has it
        tokens = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tokens]
    got = results(local, *tokens[:3], state if state is None else state.to(wide), tokens[3], dfinal.to(wide), used)
    assert got.keys() == want.keys(), said
    errors, limit = {}, TOLERANCE[dtype]
    for name, x in want.items():
        assert got[name].shape == x.shape, f"{name}: {said}"
        scale = float(x.norm()) or 1.0
        if wide == torch.float32:  # which does not know what decays to e^-88: less than its smallest number is no error
            scale = max(scale, torch.finfo(wide).tiny / limit)
        errors[name] = float((got[name].double() - x).norm()) / scale
    assert all(e <= limit for e in errors.values()), f"{errors} {said}"
    return errors


def check_many(
    rank: int, world: int, layout: str, exchange: str, seeds: list[int], packed, backend="torch", dtype=torch.float64
):
    return [check(rank, world, layout, exchange, seed, packed, backend, dtype) for seed in seeds]


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("world, layout, packed", CASES)
def test_equals_one_rank(rng, world, layout, packed, exchange):
    seeds = torch.randint(2**31, (2 if world == 8 else 4,), generator=rng).tolist()
    ranks = spawn(check_many, world, layout, exchange, seeds, packed)
    assert len(ranks) == world and all(len(errors) == len(seeds) for errors in ranks)


@pytest.mark.parametrize("world, layout, packed", [case for case in CASES if case[0] == 2])
def test_triton_equals_one_rank(rng, world, layout, packed):
    """The kernels in Triton's interpreter, fp32."""
    seeds = torch.randint(2**31, (1,), generator=rng).tolist()
    spawn(check_many, world, layout, pick(rng, EXCHANGES), seeds, packed, "triton", torch.float32)


def without_tokens(rank: int, world: int, backend: str) -> list[float]:
    """Largest errors where ranks, or all of them, hold no token; documents have states of their own."""
    errors = []
    for lengths, bounds in (([8, 0, 5], [0, 3, 3, 10, 13]), ([0, 7, 0], [0, 7]), ([0, 0, 0], [0, 0, 0])):
        rng, cu_seqlens = torch.Generator().manual_seed(sum(lengths)), torch.tensor(bounds)
        T, log_decay = sum(lengths), torch.tensor([-0.3])
        tokens = [randn(rng, 1, T, 1, 16).float() for _ in range(4)]
        state, dfinal = (randn(rng, len(bounds) - 1, 1, 16, 16).float() for _ in range(2))
        common = dict(log_decay=log_decay, cu_seqlens=cu_seqlens, output_final_state=True, backend=backend)
        attn = functools.partial(recurrent_lightning_attn, log_decay=log_decay, cu_seqlens=cu_seqlens)
        want = results(attn, *tokens[:3], state, tokens[3], dfinal, (True, True))
        mine = tokens_of(rank, world, "contiguous", lengths, None)
        for exchange in EXCHANGES[: 1 if backend == "triton" else None]:
            local = functools.partial(
                parallel.lightning_attn, group=dist.group.WORLD, layout="contiguous", tokens=lengths, exchange=exchange,
                **common,
            )  # fmt: skip
            got = results(local, *(x[:, mine] for x in tokens[:3]), state, tokens[3][:, mine], dfinal, (True, True))
            for name, x in got.items():
                y = want[name][:, mine] if name in ("o", "dq", "dk", "dv") else want[name]
                assert x.shape == y.shape, name
                errors.append(float((x - y).norm() / (y.norm() + 1e-6)))
    return errors


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_ranks_without_tokens(backend):
    for errors in spawn(without_tokens, 3, backend):
        assert errors and max(errors) < 1e-5, errors


def write_into_each_other(
    rank: int, world: int, folder: str, layout: str, seeds: list[int], packed: bool
) -> list[dict]:
    """ "direct" with the memory of processes in place of GPUs': what all ranks have mapped."""
    kept = {}

    def buffers(group, device, shape, words):
        if shape not in kept:
            files = [f"{folder}/{'x'.join(map(str, shape))}-of-{r}" for r in range(world)]
            with open(files[rank], "wb") as file:
                file.truncate(4 * words)
            dist.barrier()
            memory = [torch.from_file(file, shared=True, size=words) for file in files]
            kept[shape] = direct.SymmetricBuffers(torch.tensor([x.data_ptr() for x in memory]), 10**9, memory)
        return kept[shape]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "why_not", lambda *where: "")
        patch.setattr(direct, "buffers", buffers)
        patch.setattr(symmetric, "globaltimer", time.monotonic_ns)
        found = check_many(rank, world, layout, "direct", seeds, packed, "triton", torch.float32)
    assert kept, "nothing was sent"
    return found


@pytest.mark.parametrize(
    "world, layout, packed", [case for case in CASES if case[0] < 4 and case[1] != "zigzag-documents"]
)
def test_writing_into_each_other_equals_one_rank(rng, tmp_path, world, layout, packed):
    seeds = torch.randint(2**31, (2 if world == 2 else 1,), generator=rng).tolist()
    spawn(write_into_each_other, world, str(tmp_path), layout, seeds, packed)


# ---- errors ----------------------------------------------------------------------------------------------------------


def raised(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing"


def disagree(rank: int, world: int) -> list[str]:
    def attend(T=8, H=2, K=16, layout="zigzag", exchange="all-gather", dtype=torch.float32, **options):
        q = torch.zeros(1, T, H, K, dtype=dtype)
        parallel.lightning_attn(
            q, q, q, torch.zeros(H), group=dist.group.WORLD, layout=layout, exchange=exchange, **options
        )

    last = rank == world - 1
    bounds = torch.tensor([0, 8, 12] if last else [0, 12], dtype=torch.int32)
    calls = [
        lambda: attend(T=10 if last else 8),
        lambda: attend(H=4 if last else 2),
        lambda: attend(layout="contiguous" if last else "zigzag"),
        lambda: attend(exchange="ring" if last else "all-gather"),
        lambda: attend(dtype=torch.bfloat16 if last else torch.float32),
        lambda: attend(output_final_state=last),
        lambda: attend(T=4, cu_seqlens=bounds),
        lambda: attend(layout="contiguous", tokens=[8, 8, 8] if last else [8, 9, 8] if rank == 0 else [8, 8, 9]),
    ]
    return [raised(call) for call in calls]


def test_ranks_that_disagree_all_say_so():
    ranks = spawn(disagree, 3)
    assert ranks[0] == ranks[1] == ranks[2]
    wanted = (
        "different arguments: tokens 8, 8, 10$",
        "different arguments: H 2, 2, 4; Hkv 2, 2, 4; log_decay ",
        "different arguments: layout zigzag, zigzag, contiguous$",
        "different arguments: exchange all-gather, all-gather, ring$",
        "different arguments: dtype torch.float32, torch.float32, torch.bfloat16$",
        "different arguments: output_final_state False, False, True$",
        r"different arguments: documents 1, 1, 2; cu_seqlens \[0, 12\] int32, \[0, 12\] int32, \[0, 8, 12\] int32$",
        r"different arguments: tokens \(8, 9, 8\), \(8, 8, 9\), 8$",
    )
    for message, want in zip(ranks[0], wanted, strict=True):
        assert re.search(want, message), message


def wrong_arguments(rank: int, world: int) -> list[str]:
    q, ld = torch.zeros(1, 8, 2, 16), torch.zeros(2)
    group = dist.group.WORLD
    attend = functools.partial(parallel.lightning_attn, q, q, q, ld, group=group)
    return [
        raised(lambda: attend(layout="striped")),
        raised(lambda: attend(exchange="broadcast")),
        raised(lambda: attend(exchange="direct")),
        raised(lambda: attend(exchange="direct", backend="triton")),
        raised(lambda: attend(exchange="direct", layout="zigzag-documents", cu_seqlens=torch.tensor([0, 16]))),
        raised(lambda: attend(layout="zigzag-documents")),
        raised(lambda: attend(layout="zigzag-documents", cu_seqlens=torch.tensor([0, 6, 16]))),
        raised(lambda: attend(cu_seqlens=torch.tensor([0, 8]))),
        raised(lambda: attend(initial_state=torch.zeros(2, 2, 16, 16))),
        raised(lambda: attend(tokens=[8, 9])),
        raised(lambda: attend(layout="contiguous", tokens=[9, 9])),
        raised(lambda: parallel.lightning_attn(q[:, :7], q[:, :7], q[:, :7], ld, group=group)),
        raised(lambda: parallel.lightning_attn(q, q, q, ld, group=dist.GroupMember.NON_GROUP_MEMBER)),
    ]


def test_wrong_arguments():
    ranks = spawn(wrong_arguments, 2)
    wanted = (
        "layout='striped' is unknown; choose one of contiguous, zigzag, zigzag-documents",
        "exchange='broadcast' is unknown; choose one of auto, direct, all-gather, ring, pipelined, scan",
        "write into each other's memory, but it takes the triton backend; use exchange='auto' or 'all-gather'",
        "write into each other's memory, but ranks have no NVIDIA GPUs; use",
        "write into each other's memory, but documents that are cut one by one differ in number",
        "needs cu_seqlens",
        "document 0 has 6 tokens; pad documents to a multiple of 4",
        "end at T = 16",
        r"initial_state must be \[N,H,K,V\]",
        r"layout='zigzag' gives all ranks as many tokens, but tokens=\[8, 9\]|tokens=\[8, 9\] must say .* rank 1 has 8",
        r"tokens=\[9, 9\] must say how many tokens each of the 2 ranks has, and rank . has 8",
        "two chunks of equal length, but this one has 7 tokens",
        "group=-100 is what dist.new_group returns on ranks outside of the group; call on its ranks alone",
    )
    for messages in ranks:
        for message, want in zip(messages, wanted, strict=True):
            assert re.search(want, message), message


def absent(rank: int, world: int) -> str:
    """The last rank never comes."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=3))
    if rank == world - 1:
        time.sleep(6)
        return "absent"
    q = torch.zeros(1, 8, 2, 16)
    try:
        parallel.lightning_attn(q, q, q, torch.zeros(2), group=group)
    except (RuntimeError, ValueError) as error:  # gloo: the wait is over
        return str(error)
    return "nothing"


def test_a_missing_rank_ends_in_an_error():
    ranks = spawn(absent, 3, timeout=60)
    assert all("nothing" not in message for message in ranks) and ranks[2] == "absent", ranks


def places(rank: int, world: int, layout: str, tokens: int, cu_seqlens) -> torch.Tensor:
    return parallel.token_positions(tokens, group=dist.group.WORLD, layout=layout, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("layout", RANKS)
def test_token_positions(layout):
    cu_seqlens = torch.tensor([0, 12, 12, 36, 48], dtype=torch.int32) if layout == "zigzag-documents" else None
    for rank, found in enumerate(spawn(places, 3, layout, 16, cu_seqlens)):
        assert torch.equal(found, tokens_of(rank, 3, layout, [16] * 3, cu_seqlens))
