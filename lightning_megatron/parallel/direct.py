"""Memory of every rank that the other ranks' GPUs can write into: takes NVLink or PCIe peer access in one node."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from .group import has_new_name, state_of

logger = logging.getLogger(__name__)
BOOT = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a node


class SymmetricBuffers(NamedTuple):
    """Addresses of the buffers of all ranks, ``[P]`` int64, and how long to wait for them in ns."""

    addresses: torch.Tensor
    limit: int
    memory: object  # what keeps them alive


def why_not(group: dist.ProcessGroup, device: torch.device) -> str:
    """Why GPUs of the group cannot write into each other's memory, "" if they can.

    The same on all ranks, which ask together.
    """
    state = state_of(group)
    if state.why_not_direct is None:
        state.why_not_direct = _why_not_any(group, device)
        logger.info("context-parallel group %s: %s", group.group_name, state.why_not_direct or "GPUs write directly")
    return state.why_not_direct


def _why_not_any(group: dist.ProcessGroup, device: torch.device) -> str:
    if device.type != "cuda" or torch.version.hip is not None:
        return "ranks have no NVIDIA GPUs"
    if "" in nodes(group) or len(set(nodes(group))) > 1:
        return "ranks are not on one node"
    uuids = _all(group, str(torch.cuda.get_device_properties(device).uuid))
    if len(set(uuids)) < len(uuids):
        return "ranks share a GPU"
    here = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    others = [uuid for rank, uuid in enumerate(uuids) if rank != group.rank()]
    if any(uuid not in here for uuid in others):
        mine = (
            "a rank does not see the GPUs of the others (CUDA_VISIBLE_DEVICES), so that it cannot ask whether it "
            "reaches them"
        )
    elif not all(torch.cuda.can_device_access_peer(device.index, here.index(uuid)) for uuid in others):
        mine = "a GPU has no peer access to another"
    elif not has_new_name(group):
        mine = (
            f"an earlier process group had the name {group.group_name}, and torch keeps its symmetric memory as long "
            "as the process lives"
        )
    else:
        mine = ""
    reasons = _all(group, mine)
    if not any(reasons):  # asked of all ranks at once, for one that fails would leave the others waiting
        try:
            buffers(group, device, (), 1024)
        except (RuntimeError, AttributeError, ImportError) as error:  # of torch's private interface too
            mine = f"memory cannot be shared ({error})"
            logger.warning("context-parallel group %s has peer access, but %s", group.group_name, mine)
        reasons = _all(group, mine)
    return next(filter(None, reasons), "")


def nodes(group: dist.ProcessGroup) -> tuple[str, ...]:
    """The node of each rank, "" where nothing tells it; ranks ask together, once."""
    state = state_of(group)
    if state.nodes is None:
        state.nodes = tuple(_all(group, BOOT.read_text().strip() if BOOT.exists() else ""))
    return state.nodes


def ranks_of_a_node(group: dist.ProcessGroup) -> int:
    """On average, rounded down; ranks that cannot tell their nodes count as one node."""
    return len(nodes(group)) // len(set(nodes(group)))


def _all(group: dist.ProcessGroup, mine) -> list:
    found = [None] * group.size()
    dist.all_gather_object(found, mine, group=group)
    return found


def buffers(group: dist.ProcessGroup, device: torch.device, shape: tuple[int, ...], words: int) -> SymmetricBuffers:
    """For messages of this shape, ``words`` words of 4 bytes, zero at first; made by all ranks together when they
    first ask.
    """
    state = state_of(group)
    if shape not in state.buffers:
        import torch.distributed._symmetric_memory as symmetric_memory

        memory = symmetric_memory.empty(words, dtype=torch.float32, device=device).zero_()
        torch.cuda.synchronize(device)
        handle = symmetric_memory.rendezvous(memory, group)
        dist.barrier(group=group, device_ids=[device.index])  # nobody writes into what is not yet zero
        inside = memory.data_ptr() - handle.buffer_ptrs[group.rank()]  # of a larger allocation
        addresses = torch.tensor([base + inside for base in handle.buffer_ptrs], dtype=torch.int64, device=device)
        timeout = group._get_backend(device).options._timeout
        state.buffers[shape] = SymmetricBuffers(addresses, int(timeout.total_seconds() * 1e9), (memory, handle))
    return state.buffers[shape]
