"""Checks that every rank makes of what it was given, and of what the others were."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

WORDS = 64  # of a name or number in the header
_agreed: set[tuple] = set()


def tokens_of_ranks(mine: int, group: dist.ProcessGroup, layout: str, tokens: Sequence[int] | None) -> tuple[int, ...]:
    if tokens is None:
        tokens = [mine] * group.size()
    if len(tokens) != group.size() or tokens[group.rank()] != mine or min(tokens) < 0:
        raise ValueError(
            f"tokens={list(tokens)} must say how many tokens each of the {group.size()} ranks has, and rank {group.rank()} has {mine}"
        )
    if layout != "contiguous" and len(set(tokens)) > 1:
        raise ValueError(
            f"layout={layout!r} gives all ranks as many tokens, but tokens={list(tokens)}; leave tokens out"
        )
    if layout != "contiguous" and mine % 2:
        raise ValueError(
            f"layout={layout!r} gives every rank two chunks of equal length, but this one has {mine} tokens"
        )
    return tuple(tokens)


def agree(group: dist.ProcessGroup, device: torch.device, **arguments) -> None:
    """Raise on every rank if arguments differ, asked whenever this rank's change: they change on all ranks together.

    Should they change on one rank alone, it waits here and the others in the exchange, until the group's timeout.
    """
    key = (group.group_name, device, *arguments.values())
    if key in _agreed:
        return
    mine = "".join(f"{value!s:{WORDS}.{WORDS}}" for value in arguments.values()).encode("ascii", "replace")
    header = torch.tensor(list(mine), dtype=torch.uint8, device=device)
    headers = [torch.empty_like(header) for _ in range(group.size())]
    dist.all_gather(headers, header, group=group)
    ranks = [bytes(x.tolist()).decode() for x in headers]
    wrong = []
    for i, name in enumerate(arguments):
        values = [text[i * WORDS : (i + 1) * WORDS].strip() for text in ranks]
        if len(set(values)) > 1:
            wrong.append(f"{name} {', '.join(values)}")
    if wrong:
        raise ValueError(
            f"ranks of the context-parallel group were called with different arguments: {'; '.join(wrong)}"
        )
    _agreed.add(key)


def check_documents(cu_seqlens: torch.Tensor, chunks: int) -> None:
    for n, length in enumerate(cu_seqlens.diff().tolist()):
        if length % chunks:
            raise ValueError(
                f"layout='zigzag-documents' cuts every document into {chunks} equal chunks, but document {n} has {length} tokens; "
                f"pad documents to a multiple of {chunks}"
            )
