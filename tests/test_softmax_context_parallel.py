"""The softmax layers' core attention over ranks: output and gradients on every rank, against a formula that has all
tokens.
"""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.utils import get_batch_on_this_cp_rank

from lightning_megatron.parallel import consistency
from lightning_megatron.softmax import SDPACoreAttention
from lightning_megatron.softmax.parallel import Gather
from tests import layers
from tests.helpers.context_parallel import draw_documents, tokens_of
from tests.helpers.softmax import causal, softmax_attention
from tests.launch import spawn
from tests.layers import transformer_config
from tests.ops.cases import pick, randn
from tests.tolerances import LAYERS, SOFTMAX, WEIGHTS

LAYOUTS = ("plain", "packed", "documents-cut")


def core(group, scale=None, dropout=None, per_document=False) -> SDPACoreAttention:
    config = transformer_config(context_parallel_size=1 if group is None else group.size())
    groups = None if group is None else ProcessGroupCollection(cp=group)
    return SDPACoreAttention(
        config, 1, AttnMaskType.causal, "self", attention_dropout=dropout, softmax_scale=scale, cp_comm_type="p2p",
        pg_collection=groups, per_document=per_document,
    )  # fmt: skip


def zigzag(tokens: int, group) -> torch.Tensor:
    """Which tokens of the whole sequence Megatron gives this rank, where it cuts the sequence as a whole."""
    batch = {"tokens": torch.arange(tokens)[None], "cu_seqlens": None}
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)["tokens"][0]


def mask_of(documents: torch.Tensor | None, tokens: int) -> torch.Tensor:
    if documents is None:
        return causal(tokens)
    document = torch.repeat_interleave(torch.arange(documents.numel() - 1), documents.diff())
    return causal(tokens) & (document[:, None] == document)


def packed_params(rng: torch.Generator, bounds: torch.Tensor, **dynamic) -> PackedSeqParams:
    """As Megatron fills it, with int32 bounds; in one of two cases documents lie at the padded bounds."""
    bounds = bounds.to(torch.int32)
    longest = int(bounds.diff().max())
    fields = dict(max_seqlen_q=longest, max_seqlen_kv=longest, **dynamic)
    if pick(rng, [True, False]):
        return PackedSeqParams("thd", bounds, bounds, **fields)
    shorter = (bounds - 1).clamp(min=0)
    return PackedSeqParams("thd", shorter, shorter, bounds, bounds, **fields)


class stub:
    """A group that cannot communicate; see ``unasked``."""

    def __init__(self, size: int, rank: int = 0) -> None:
        self.size, self.rank = (lambda: size), (lambda: rank)


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks do not ask each other whether they agree."""
    monkeypatch.setattr(consistency, "_compare", lambda *where: None)


def thd(*ends: int, device="cpu", **fields) -> PackedSeqParams:
    bounds = torch.tensor(ends, dtype=torch.int32, device=device)
    return PackedSeqParams("thd", bounds, bounds, **fields)


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference, relative to the largest value or 1."""
    assert got.shape == want.shape, f"shape {list(got.shape)}, not {list(want.shape)}"
    got, want = got.detach().double(), want.detach()
    error = float((got - want).abs().max() / want.abs().max().clamp(min=1))
    return error if error == error else float("inf")


def compare(attend, documents, mine, rng, batch: int, scale, dtype=torch.float64) -> dict[str, float]:
    """Errors of output and gradients of this rank's tokens ``mine``, for a random gradient of the output."""
    T = int(mine.numel()) * attend.ranks
    heads, groups = pick(rng, [(4, 4), (4, 2), (3, 1)])
    D = pick(rng, [8, 16])
    q, k, v, weight = (randn(rng, T, batch, h, D).to(dtype).double() for h in (heads, groups, groups, heads))
    whole = [x.requires_grad_() for x in (q, k, v)]
    weight = weight.flatten(2)
    output = softmax_attention(*whole, mask_of(documents, T), scale)
    want = [output, *torch.autograd.grad(output, whole, weight)]
    local = [x.detach()[mine].to(dtype) for x in whole]
    leaves = [(x if documents is None else x[:, 0]).clone().requires_grad_() for x in local]
    got = attend(*leaves)
    weight = weight[mine] if documents is None else weight[mine, 0]
    grads = torch.autograd.grad(got, leaves, weight.to(dtype))
    assert all(x.dtype == dtype for x in (got, *grads))
    got = [x if documents is None else x[:, None] for x in (got, *grads)]
    return {name: difference(x, y[mine]) for name, x, y in zip(("output", "dq", "dk", "dv"), got, want, strict=True)}


class Attend:
    """The layer on one rank, with all but the tokens given."""

    def __init__(self, attention, ranks: int, packed: PackedSeqParams | None) -> None:
        self.attention, self.ranks, self.packed = attention, ranks, packed

    def __call__(self, q, k, v) -> torch.Tensor:
        nothing = torch.ones(1, 1, 1, 1, dtype=torch.bool)  # the mask is not read: it allows nothing
        return self.attention(q, k, v, nothing, packed_seq_params=self.packed)


def check(rank: int, world: int, layout: str, seed: int, dtype) -> dict[str, float]:
    rng = torch.Generator().manual_seed(seed)
    integer = lambda low, high: int(torch.randint(low, high + 1, (), generator=rng))
    n, scale = integer(1, 12), pick(rng, [None, 0.3])
    documents = None
    if layout == "packed":
        documents = draw_documents(rng, 2 * world * n)
    if layout == "documents-cut":
        lengths = [2 * world * integer(0, 4) for _ in range(integer(1, 6))] + [2 * world * n]
        documents = torch.tensor([0, *lengths]).cumsum(0)
    packed = None if documents is None else packed_params(rng, documents)
    T = 2 * world * n if documents is None else int(documents[-1])
    if layout == "documents-cut":
        mine = tokens_of(rank, world, "zigzag-documents", [T], documents)
    else:
        mine = zigzag(T, dist.group.WORLD)
    attend = Attend(core(dist.group.WORLD, scale, per_document=layout == "documents-cut"), world, packed)
    batch = 1 if packed is not None else integer(1, 3)
    return compare(attend, documents, mine, rng, batch, scale, dtype)


def check_many(rank: int, world: int, layout: str, seeds: list[int], dtype) -> list[dict[str, float]]:
    return [check(rank, world, layout, seed, dtype) for seed in seeds]


def assert_small(ranks: list[list[dict[str, float]]], seeds: list[int], limit: float) -> None:
    for rank, cases in enumerate(ranks):
        for seed, errors in zip(seeds, cases, strict=True):
            assert errors.keys() == {"output", "dq", "dk", "dv"}
            assert all(error <= limit for error in errors.values()), f"{rank=} {seed=} {errors}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_equals_one_rank(rng, world, layout):
    seeds = torch.randint(2**31, (20,), generator=rng).tolist()
    ranks = spawn(check_many, world, layout, seeds, torch.float64)
    assert len(ranks) == world
    assert_small(ranks, seeds, SOFTMAX)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_in_and_out(rng, layout):
    seeds = torch.randint(2**31, (5,), generator=rng).tolist()
    assert_small(spawn(check_many, 2, layout, seeds, torch.bfloat16), seeds, LAYERS[torch.bfloat16])


# ---- named cases -----------------------------------------------------------------------------------------------------


DOCUMENTS = {  # of 24 tokens, which 3 ranks cut every 4
    "one": (24,),
    "empty first and last": (0, 0, 24, 0),
    "one token each": (1,) * 24,
    "at the cuts": (4, 8, 12),
    "across all cuts": (1, 22, 1),
    "empty and of one token at a cut": (3, 0, 1, 0, 1, 0, 19),
}


def check_documents(rank: int, world: int, seed: int) -> dict[str, dict[str, float]]:
    found = {}
    for name, lengths in DOCUMENTS.items():
        rng = torch.Generator().manual_seed(seed)
        documents = torch.tensor([0, *lengths]).cumsum(0)
        attend = Attend(core(dist.group.WORLD), world, packed_params(rng, documents))
        found[name] = compare(attend, documents, zigzag(24, dist.group.WORLD), rng, 1, None)
    return found


def test_documents_at_and_across_cuts(rng):
    for rank, found in enumerate(spawn(check_documents, 3, int(torch.randint(2**31, (), generator=rng)))):
        assert found.keys() == DOCUMENTS.keys()
        for name, errors in found.items():
            assert all(error <= SOFTMAX for error in errors.values()), f"{rank=} {name}: {errors}"


def check_dynamic(rank: int, world: int, seed: int) -> dict[str, dict[str, float]]:
    """Four ranks in pairs, each pair with its own tokens, and alone."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    alone = [dist.new_group([r]) for r in range(world)][rank]
    pair = pairs[rank // 2]
    found = {}
    for name, ranks, built_for, dynamic in (
        ("pair", 2, dist.group.WORLD, dict(cp_group=pair, local_cp_size=2)),
        ("pair, size not said", 2, dist.group.WORLD, dict(cp_group=pair)),
        ("pair, built without", 2, None, dict(cp_group=pair, local_cp_size=2)),
        ("alone by size", 1, dist.group.WORLD, dict(local_cp_size=1)),
        ("alone by group", 1, dist.group.WORLD, dict(cp_group=alone)),
        ("alone by both", 1, dist.group.WORLD, dict(cp_group=alone, local_cp_size=1)),
    ):
        rng = torch.Generator().manual_seed(seed + (rank // 2 if ranks == 2 else rank))
        documents = torch.tensor([0, 3, 10, 12])
        mine = zigzag(12, pair) if ranks == 2 else torch.arange(12)
        # Megatron cuts batches with a local size as a whole, whatever it does with others
        attention = core(built_for, per_document="local_cp_size" in dynamic)
        attend = Attend(attention, ranks, packed_params(rng, documents, **dynamic))
        found[name] = compare(attend, documents, mine, rng, 1, None)
    return found


def test_dynamic_groups(rng):
    for rank, found in enumerate(spawn(check_dynamic, 4, int(torch.randint(2**31, (), generator=rng)))):
        assert len(found) == 6
        for name, errors in found.items():
            assert all(error <= SOFTMAX for error in errors.values()), f"{rank=} {name}: {errors}"


def weights(rank: int, world: int, layout: str) -> tuple[torch.Tensor, ...]:
    """Attention weights of 64 equal keys, which v = 1 lays bare, with the rows of this rank: evaluated, and trained
    twice.
    """
    layers.start(cp=world)
    group = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"]).cp
    attention = core(group, dropout=0.25, per_document=layout == "documents-cut")
    mine, packed = zigzag(64, group), None
    q = torch.zeros(32, 1, 2, 64)
    v = torch.eye(64)[mine][:, None, None].repeat(1, 1, 2, 1)
    if layout != "plain":
        q, v = q[:, 0], v[:, 0]
        packed = PackedSeqParams("thd", *[torch.tensor([0, 64], dtype=torch.int32)] * 2)
    run = lambda training: attention.train(training)(q, q, v, None, packed_seq_params=packed).reshape(32, 2, 64)
    return mine, run(False), run(True), run(True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_in_training_only(layout):
    want = torch.ones(64, 64).tril() / torch.arange(1, 65)[:, None]
    for mine, evaluated, first, second in spawn(weights, 2, layout):
        expected = want[mine][:, None].expand(32, 2, 64)
        assert torch.allclose(evaluated, expected, rtol=WEIGHTS)
        for trained in (first, second):
            kept = trained[expected > 0] / expected[expected > 0] * 0.75
            assert (trained[expected == 0] == 0).all()
            assert ((kept.abs() < WEIGHTS) | ((kept - 1).abs() < WEIGHTS)).all()
            assert abs(float((kept < 0.5).float().mean()) - 0.25) < 0.06  # 2080 or more draws: 6 standard deviations
        assert not torch.equal(first, second)


def sums(rank: int, world: int) -> float:
    x = torch.zeros(1, dtype=torch.bfloat16, requires_grad=True)
    gathered = Gather.apply(x, torch.tensor([0, 0, 1, 1]), dist.group.WORLD)
    gathered.backward(torch.tensor([256, 1, 256, 1] if rank == 0 else [1, 1, 1, 1], dtype=torch.bfloat16))
    return x.grad.item()


def test_gradients_are_added_in_fp32():
    assert spawn(sums, 2) == [260, 260]  # 259, rounded once; in bf16 256 + 1 is 256, and the sum 258


# ---- in one process, by the kernels that torch has for a CPU and for a GPU
# --------------------------------------------

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_one_after_the_other_in_bf16(rng, monkeypatch, unasked, layout, device):
    world = 3
    lengths = {"plain": (96,), "packed": (1, 0, 40, 13, 0, 1, 41), "documents-cut": (12, 0, 48, 6, 30)}[layout]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    documents = None if layout == "plain" else bounds
    packed = None if documents is None else thd(*bounds.tolist(), device=device, max_seqlen_q=max(lengths))
    doubles = [randn(rng, 96, 1, h, 64).bfloat16().double().requires_grad_() for h in (4, 2, 2)]
    weight = randn(rng, 96, 1, 4 * 64).bfloat16()
    output = softmax_attention(*doubles, mask_of(documents, 96), None)
    want = [output, *torch.autograd.grad(output, doubles, weight.double())]

    q, k, v = leaves = [x.detach().to(device, torch.bfloat16).requires_grad_() for x in doubles]
    cut = "zigzag-documents" if layout == "documents-cut" else "zigzag"
    places = [tokens_of(r, world, cut, [96], documents).to(device) for r in range(world)]
    outputs = []
    for rank, mine in enumerate(places):
        tokens = [x if packed is None else x[:, 0] for x in (q, k, v)]
        gathered = iter([x[torch.cat(places)] for x in tokens[1:]])

        def take(x, rows, group, gathered=gathered):
            return next(gathered) if rows is None else next(gathered)[rows]

        monkeypatch.setattr("lightning_megatron.softmax.core.Gather", SimpleNamespace(apply=take))
        attention = core(stub(world, rank), per_document=layout == "documents-cut")
        expand = (
            (lambda k, v, P: (k, v)) if layout == "plain" else None
        )  # else the exchange is in the kernel's function
        inputs = (x[mine] for x in tokens)
        outputs.append(attention(*inputs, None, packed_seq_params=packed, expand=expand).view(-1, 1, 256))
    output = torch.cat(outputs)[torch.cat(places).argsort()]
    got = [output, *torch.autograd.grad(output, leaves, weight.to(device))]
    errors = {n: difference(x.cpu(), y) for n, x, y in zip(("output", "dq", "dk", "dv"), got, want, strict=True)}
    assert all(error <= LAYERS[torch.bfloat16] for error in errors.values()), errors


def over_gpus(rank: int, world: int, seed: int) -> list[dict[str, tuple[float, float, bool]]]:
    """Of every quantity the error against fp64 over ranks, that of one GPU rounded once more, and whether two calls
    give equal bits.
    """
    rng, found = torch.Generator().manual_seed(seed), []
    for heads, groups, d, T in ((4, 4, 64, 1024), (8, 2, 128, 2048), (3, 3, 128, 1028)):
        tensors = [randn(rng, T, 1, h, d).cuda().bfloat16() for h in (heads, groups, groups)]
        weight = randn(rng, T, 1, heads * d).cuda().bfloat16()

        def run(attend, tokens, dtype=torch.bfloat16, tensors=tensors, weight=weight):
            leaves = [x[tokens].to(dtype).requires_grad_() for x in tensors]
            output = attend(*leaves)
            return [output.detach(), *torch.autograd.grad(output, leaves, weight[tokens].to(dtype))]

        mine = zigzag(T, dist.group.WORLD).cuda()
        mask = causal(T).cuda()
        want = run(lambda q, k, v, mask=mask: softmax_attention(q, k, v, mask, None), slice(None), torch.float64)
        alone = run(lambda q, k, v: core(None)(q, k, v, None), slice(None))
        ours, again = (run(lambda q, k, v: core(dist.group.WORLD)(q, k, v, None), mine) for _ in range(2))
        errors = {}
        for name, x, one, y, z in zip(("output", "dq", "dk", "dv"), want, alone, ours, again, strict=True):
            x = x[mine]
            error, of_one, rounding = (float((a.double() - x).norm() / x.norm()) for a in (y, one[mine], x.bfloat16()))
            errors[name] = (error, math.hypot(of_one, rounding), torch.equal(y, z))
        found.append(errors)
    return found


@pytest.mark.gpu
def test_over_gpus_as_exact_as_one(rng):
    """Over ranks every value is a sum of parts in bf16 (of near and far keys, of ranks) and is rounded once more: on an
    H200 outputs and gradients have up to 1.27 times the error of one GPU. cuDNN sums gradients of queries in any order.
    """
    for rank, cases in enumerate(spawn(over_gpus, 2, int(torch.randint(2**31, (), generator=rng)), gpus=True)):
        for errors in cases:
            print(rank, errors)
            for name, (error, limit, same) in errors.items():
                assert 0 < error <= 1.1 * limit, f"{rank=} {name} {errors}"
                assert same or name == "dq", f"{rank=} {name} {errors}"


# ---- ranks that differ -----------------------------------------------------------------------------------------------


def disagree(rank: int, world: int) -> list[str]:
    last, found = rank == world - 1, []
    attention = core(dist.group.WORLD)
    draw = lambda tokens, heads=4: [torch.zeros(tokens, heads, 8)] * 3
    for inputs, packed in (
        (draw(6 if last else 4), thd(0, 12 if last else 8)),
        (draw(4, 2 if last else 4), thd(0, 8)),
        (draw(4), thd(0, 6 if last else 4, 8)),
    ):
        with pytest.raises(ValueError) as error:
            attention(*inputs, None, packed_seq_params=packed)
        found.append(str(error.value))
    for learns in (1, 2):  # k or v, where the last rank has q: it would take no part in the exchange of their gradients
        inputs = [torch.zeros(4, 1, 4, 8, requires_grad=i == (0 if last else learns)) for i in range(3)]
        with pytest.raises(ValueError) as error:
            attention(*inputs, None)
        found.append(str(error.value))
    return found


def test_ranks_that_disagree_all_say_so():
    ranks = spawn(disagree, 2)
    assert ranks[0] == ranks[1]
    for message, want in zip(
        ranks[0],
        (
            r"arguments: tokens 4, 6; cu_seqlens \[0, 8\] int32, \[0, 12\] int32$",
            "arguments: heads 4, 2; groups 4, 2$",
            r"arguments: cu_seqlens \[0, 4, 8\] int32, \[0, 6, 8\] int32$",
            "arguments: gradients k, q$",
            "arguments: gradients v, q$",
        ),
        strict=True,
    ):
        assert re.search(want, message), message


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_refusals(unasked):
    plain, packed = (lambda s: [torch.zeros(s, 1, 4, 8)] * 3), (lambda t: [torch.zeros(t, 4, 8)] * 3)
    for inputs, options, message in (
        (plain(5), {}, "two chunks of equal length, but this one has 5 queries and 5 keys; .*a multiple of 6"),
        ([*plain(4)[:1], *plain(8)[:2]], {}, "this one has 4 queries and 8 keys"),
        (
            plain(4),
            dict(attn_mask_type=AttnMaskType.no_mask),
            "mask type no_mask is not supported over 3 context-parallel ranks, only causal; "
            "use --context-parallel-size 1",
        ),
        (
            packed(4),
            dict(packed_seq_params=thd(0, 5, 11)),
            "ends at 11, but all .* ranks together have 12 tokens; give bounds",
        ),
        (
            packed(4),
            dict(packed_seq_params=thd(0, 12, local_cp_size=2)),
            "local_cp_size is 2, but cp_group there is None; give the group of the ranks that share this batch",
        ),
        (
            packed(4),
            dict(packed_seq_params=thd(0, 12, local_cp_size=2, cp_group=stub(4))),
            "local_cp_size is 2, but cp_group there is of size 4",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            core(stub(3))(*inputs, None, **options)
    fused = core(stub(3))
    fused.backend = AttnBackend.fused
    with pytest.raises(
        ValueError, match=r"fused \(cuDNN\) does not attend from 2 tokens to the 6 up to their end.*use flash or"
    ):
        fused._one_by_one(*plain(6), [(slice(0, 2), slice(0, 6))], 0.0)
    bounds = thd(0, 6, 6, 10, 12)
    message = "cut into 6 equal chunks, but document 2 has 4 tokens; pad documents to a multiple of 6, or set "
    message += "per_document=False"
    for _ in range(2):  # what was refused once is not taken for checked
        with pytest.raises(ValueError, match=message):
            core(stub(3), per_document=True)(*packed(4), None, packed_seq_params=bounds)
