"""Consistency check: every rank learns what the others were given, and all raise the same error where it differs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from .group import state_of

SHOWN, DIGEST = 64, 16  # characters of an argument in the header: its beginning, and what tells all of it apart
FIELDS = 24  # arguments that a header has room for: those of another operator must be of the same length
FIRST = 16  # values of a tensor that are shown


class Values(NamedTuple):
    """A tensor whose values must be the same on all ranks; or None, which all ranks must have then."""

    name: str
    tensor: torch.Tensor | None
    check: Callable[[torch.Tensor], None]  # of the values on the host, once the ranks have agreed
    key: Hashable = None  # what the check depends on besides


def tokens_of_ranks(mine: int, group: dist.ProcessGroup, layout: str, tokens: Sequence[int] | None) -> tuple[int, ...]:
    if tokens is None:
        tokens = [mine] * group.size()
    if len(tokens) != group.size() or tokens[group.rank()] != mine or min(tokens) < 0:
        raise ValueError(
            f"tokens={list(tokens)} must say how many tokens each of the {group.size()} ranks has, and rank "
            f"{group.rank()} has {mine}"
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


def check_consistency(
    group: dist.ProcessGroup, device: torch.device, values: Sequence[Values] = (), **arguments: Hashable
) -> None:
    """Raise on every rank, with the same message, if arguments or values of tensors differ between the ranks of a
    group.

    The ranks ask each other, in one collective, whenever arguments of this rank are new or a tensor is: another object,
    or changed in a way that raises its version (on a CPU in any way). These change on all ranks together; should they
    change on one rank alone, it waits here and the others in their next collective, until the group's timeout. Tensors
    are read on the host when they are new, and then checked. Nothing is read or asked while a CUDA graph is captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return
    state = state_of(group)
    texts = {x.name: _field("None") for x in values}  # other ranks may have a tensor
    given, new = [(x, x.tensor) for x in values if x.tensor is not None], False
    read = {x.name: tensor.detach().cpu() for x, tensor in given if state.seen.is_new(tensor, (x.name, x.key))}
    for x, tensor in given:
        known = state.values.get(tensor)
        texts[x.name] = _text_of(read[x.name]) if x.name in read else known
        new |= texts[x.name] != known
    key = device, *arguments.items()
    if new or key not in state.agreed:
        _compare(group, device, {name: _field(str(value)) for name, value in arguments.items()} | texts)
        state.remember_agreed(key)
        for x, tensor in given:
            state.values[tensor] = texts[x.name]
    for x, tensor in given:
        if x.name in read:
            x.check(read[x.name])
            state.seen.remember(tensor, (x.name, x.key))


def _field(text: str, all_of_it: bytes | None = None) -> str:
    """What the header holds of an argument: as much as it has room for, and a digest of all of it."""
    short = text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
    digest = hashlib.sha256(text.encode() if all_of_it is None else all_of_it).hexdigest()[:DIGEST]
    return f"{short.encode('ascii', 'replace').decode():{SHOWN}}{digest}"


def _text_of(values: torch.Tensor) -> str:
    begin = ", ".join(f"{x:.6g}" for x in values[:FIRST].tolist())
    text = f"[{begin}{', ...' if values.numel() > FIRST else ''}] {str(values.dtype).removeprefix('torch.')}"
    return _field(text, text.encode() + values.contiguous().numpy().tobytes())


def _compare(group: dist.ProcessGroup, device: torch.device, fields: dict[str, str]) -> None:
    assert len(fields) <= FIELDS
    text = "".join(fields.values()).ljust(FIELDS * (SHOWN + DIGEST))
    header = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)
    headers = header.new_empty(group.size(), header.numel())
    dist.all_gather(list(headers.unbind()), header, group=group)
    ranks = [bytes(x).decode() for x in headers.tolist()]  # one wait for the GPU
    wrong = []
    for i, name in enumerate(fields):
        found = [text[i * (SHOWN + DIGEST) : (i + 1) * (SHOWN + DIGEST)] for text in ranks]
        if len(set(found)) > 1:
            shown = [x[:SHOWN].strip() for x in found]
            if len(set(shown)) < len(set(found)):  # they differ behind what is shown
                shown = [f"{x} (digest {y[SHOWN:]})" for x, y in zip(shown, found, strict=True)]
            wrong.append(f"{name} {', '.join(shown)}")
            if name == "operator":  # ranks that call in another order: the other fields are of other arguments
                break
    if wrong:
        raise ValueError(
            f"ranks of the context-parallel group were called with different arguments: {'; '.join(wrong)}"
        )


def check_divisible(cu_seqlens: torch.Tensor, chunks: int) -> None:
    for n, length in enumerate(cu_seqlens.diff().tolist()):
        if length % chunks:
            raise ValueError(
                f"layout='zigzag-documents' cuts every document into {chunks} equal chunks, but document {n} has "
                f"{length} tokens; pad documents to a multiple of {chunks}"
            )
