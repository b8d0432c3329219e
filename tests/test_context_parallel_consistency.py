"""Ranks that were given different arguments or values all say so, also in a new group of an old name."""

from __future__ import annotations

import gc
import re

import pytest
import torch
import torch.distributed as dist

from lightning_megatron import parallel
from lightning_megatron.parallel import group as groups
from tests.launch import spawn

DECAYS = [-0.1, -0.01]


def attend(group, T=8, H=2, decays=DECAYS, backend=None, learns=False, **options) -> torch.Tensor:
    q = torch.ones(1, T, H, 16, requires_grad=learns)
    log_decay = decays if isinstance(decays, torch.Tensor) else torch.tensor(decays)
    how = dict(exchange="all-gather") | options
    return parallel.lightning_attn(q, q, q, log_decay, group=group, backend=backend, **how)[0]


def raised(call) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing"


def disagree(rank: int, world: int) -> list[str]:
    last, group = rank == world - 1, dist.group.WORLD
    many = [8] * 40  # ranks of which the text has room for 21
    other = many[:-1] + [16]
    kept, bounds = torch.tensor(DECAYS), torch.tensor([0, 8, 24])
    attend(group, decays=kept), attend(group, cu_seqlens=bounds)
    found = []

    def note(**arguments) -> None:
        found.append(raised(lambda: attend(group, **arguments)))

    note(scale=0.5 if last else 0.25)
    note(decays=[-0.1, -0.02] if last else DECAYS)
    note(cu_seqlens=torch.tensor([0, 16, 24] if last else [0, 8, 24]))
    note(cu_seqlens=torch.tensor([0, 8, 24], dtype=torch.int32 if last else torch.int64))
    note(backend="triton" if last else "torch")
    note(initial_state=torch.zeros(1, 2, 16, 16) if last else None)
    note(cu_seqlens=None if last else torch.tensor([0, 8, 24]))
    note(learns=last)
    # ranks that call in another order: another operator has other arguments, and more or fewer of them
    other_order = dict(operator="softmax attention", tokens=8)
    check = parallel.consistency.check_consistency
    found.append(raised(lambda: check(group, torch.device("cpu"), **other_order) if last else attend(group, scale=3.0)))
    # values that change under the same tensor objects
    torch.from_dlpack(kept).copy_(torch.tensor([-0.1, -0.03 if last else -0.02]))
    note(decays=kept)
    torch.from_dlpack(bounds).copy_(torch.tensor([0, 9 if last else 10, 24]))
    note(cu_seqlens=bounds)
    # what is wrong on all ranks is said on all ranks, each time
    for _ in range(2):
        note(decays=[-0.1, 0.1])
        note(cu_seqlens=torch.tensor([0, 8, 23]))
    # tuples that differ behind what is shown
    fields = parallel.consistency._field(str(tuple(many))), parallel.consistency._field(str(tuple(other)))
    assert fields[0][:64] == fields[1][:64]
    with pytest.raises(ValueError) as error:
        parallel.consistency.check_consistency(group, torch.device("cpu"), tokens=tuple(other if last else many))
    return [*found, str(error.value)]


def test_ranks_that_disagree_all_say_so():
    ranks = spawn(disagree, 3)
    assert ranks[0] == ranks[1] == ranks[2]
    digest = r"\(digest [0-9a-f]{16}\)"
    tokens = rf"\((8, )+.*\.\.\. {digest}"
    wanted = (
        "different arguments: scale 0.25, 0.25, 0.5$",
        r"different arguments: log_decay \[-0.1, -0.01\] float32, \[-0.1, -0.01\] float32, \[-0.1, -0.02\] float32$",
        r"different arguments: cu_seqlens \[0, 8, 24\] int64, \[0, 8, 24\] int64, \[0, 16, 24\] int64$",
        r"different arguments: cu_seqlens \[0, 8, 24\] int64, \[0, 8, 24\] int64, \[0, 8, 24\] int32$",
        "different arguments: backend torch, torch, triton$",
        "different arguments: initial_state False, False, True$",
        r"different arguments: documents 2, 2, 0; cu_seqlens \[0, 8, 24\] int64, \[0, 8, 24\] int64, None$",
        "different arguments: gradients False, False, True$",
        "different arguments: operator lightning_attn, lightning_attn, softmax attention$",
        r"different arguments: log_decay .*-0.02\] float32, .*-0.02\] float32, .*-0.03\] float32$",
        r"different arguments: cu_seqlens \[0, 10, 24\] int64, \[0, 10, 24\] int64, \[0, 9, 24\] int64$",
        *(r"log_decay\[1\] = 0.1", "end at T = 24, but goes from 0 to 23") * 2,
        rf"different arguments: tokens {tokens}, {tokens}, {tokens}$",
    )
    for message, want in zip(ranks[0], wanted, strict=True):
        assert re.search(want, message), message


def count_questions(rank: int, world: int) -> list[int]:
    """Collectives that compare arguments, in calls one after the other."""
    counts, compare = [0], parallel.consistency._compare
    decays, bounds, group = [torch.tensor(DECAYS) for _ in range(2)], torch.tensor([0, 8, 16]), dist.group.WORLD

    def counted(*where):
        counts[-1] += 1
        return compare(*where)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel.consistency, "_compare", counted)
        for log_decay, cu_seqlens in (
            (decays[0], bounds),
            (decays[0], bounds),  # the same tensors, as in the next step
            (decays[1], bounds),  # another layer
            (decays[0], bounds.clone()),  # another batch
            (decays[1], bounds),
        ):
            attend(group, decays=log_decay, cu_seqlens=cu_seqlens)
            counts.append(0)
    return counts[:-1]


def test_one_question_for_each_change():
    assert spawn(count_questions, 2) == [[1, 0, 1, 1, 0]] * 2


# ---- groups ----------------------------------------------------------------------------------------------------------


def restart(rank: int, world: int, folder: str) -> list[str]:
    """Names of a group in two lives of rank 1, and what it is told in the second, where the ranks disagree."""
    first = dist.new_group([0, 1])
    if rank < 2:
        attend(first, H=2), attend(first, H=4, decays=2 * DECAYS)  # both are known now
        assert first in groups._states
    said = [getattr(first, "group_name", "")]
    del first
    dist.barrier()
    dist.destroy_process_group()
    gc.collect()
    assert not len(groups._states), "what was known of a group outlives it"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    second = dist.new_group([1, 2])  # other ranks
    if rank > 0:
        said.append(second.group_name)
        said.append(raised(lambda: attend(second, H=2 * rank, decays=rank * DECAYS)))
        assert torch.isfinite(attend(second)).all()
    dist.barrier()
    return said


def test_a_new_group_of_an_old_name_is_asked_again(tmp_path):
    _, (first, second, told), (_, _, told_too) = spawn(restart, 3, str(tmp_path))
    assert first == second, "the test needs groups of one name"
    assert told == told_too and "different arguments: H 2, 4; Hkv 2, 4; log_decay " in told
