"""What this process knows of a process group.

It lives as long as the group object: a new group of the same name has its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.weak import WeakTensorKeyDictionary

from ..ops.checks import Seen

MOST_AGREED = 4096  # lengths that never return must not fill the memory; all ranks forget at the same time


class GroupState:
    """Of one group: what its ranks have agreed on, memory they share, constants on the device.

    Never holds the group itself, which could not die then.
    """

    def __init__(self) -> None:
        self.agreed: set[Hashable] = set()  # arguments that were the same on all ranks
        self.values = WeakTensorKeyDictionary()  # tensor -> text and digest of its values when all ranks had the same
        self.seen = Seen()
        self.why_not_direct: str | None = None  # None: not asked yet
        self.nodes: tuple[str, ...] | None = None  # of the ranks; None: not asked yet
        self.buffers: dict[tuple[int, ...], Any] = {}  # symmetric buffers by the shape of messages
        self._constants: dict[Hashable, Any] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def remember_agreed(self, key: Hashable) -> None:
        if len(self.agreed) >= MOST_AGREED:
            self.agreed.clear()
        self.agreed.add(key)

    def constant[T](self, key: Hashable, make: Callable[[bool], T]) -> T:
        """``make(captured)``, or what it made before. A captured graph may go on reading it: it is never given up.

        While a graph is captured, memory belongs to the graph: what is made then is used and not kept.
        """
        found = self._constants.get(key)
        if found is not None:
            return found
        captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        found = make(captured)
        if not captured:
            self._constants[key] = found
        return found

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """Where states are passed on from rank to rank, beside the operator."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device, priority=-1)
        return self._streams[device]


_states: weakref.WeakKeyDictionary[dist.ProcessGroup, GroupState] = weakref.WeakKeyDictionary()


def state_of(group: dist.ProcessGroup) -> GroupState:
    if group not in _states:
        _states[group] = GroupState()
    return _states[group]


_first: dict[str, weakref.ref] = {}  # the group that had a name first; torch keeps its symmetric memory for ever


def has_new_name(group: dist.ProcessGroup) -> bool:
    """Whether no earlier group, destroyed since, had the name of this one: torch registers symmetric memory by name."""
    return _first.setdefault(group.group_name, weakref.ref(group))() is group


def integers(values: list | int, device: torch.device, captured: bool, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of nested ``values``. Where nothing can be copied from the host (``captured``) each is filled in."""
    if not captured:
        return torch.tensor(values, device=device, dtype=dtype)
    if not isinstance(values, (list, tuple)):
        return torch.full((), values, device=device, dtype=dtype)
    return torch.stack([integers(x, device, captured, dtype) for x in values])
