"""Which rank keeps the others waiting? Names it in the log, at half of the time after which all of them end.

A rank that dies ends the others at once (torchrun), or when their connections break. One that hangs does not: the
others wait in a collective until ``--distributed-timeout-minutes`` has passed, and what they say then names nobody.
A thread beside the training of every rank leaves a sign in the store of the process group; rank 0 looks after all
others, and rank 1 after rank 0.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable

import torch.distributed as dist

logger = logging.getLogger("lightning_megatron")
_KEY = "lightning/alive/{}"


class Watch(threading.Thread):
    """Signs of life of one rank, and a look at those of others.

    Args:
        rank, world: of this process.
        limit: seconds after which a collective ends, and all ranks with it.
        progress: a number that grows while the training goes on, such as the microbatches that were computed.
        connect: makes a client of the store that all ranks share; called in the thread.
    """

    def __init__(
        self, rank: int, world: int, limit: float, progress: Callable[[], int], connect: Callable[[], dist.Store]
    ) -> None:
        super().__init__(name="lightning-watch", daemon=True)
        self.rank, self.world, self.limit, self.progress, self.connect = rank, world, limit, progress, connect
        self.main, self.halt = threading.main_thread().ident, threading.Event()
        self.watched = [r for r in range(world) if r != rank] if rank == 0 else [0] if rank == 1 else []

    def run(self) -> None:
        try:
            store = self.connect()
            store.set(_KEY.format(self.rank), self._sign(0))
            names = {r: store.get(_KEY.format(r)).decode().split(" ", 1)[1] for r in self.watched}
            self._look(store, names)
        except Exception as error:  # the store is rank 0's, or torchrun's: it ended
            if not self.halt.is_set():
                logger.warning("rank %d: no more signs of other ranks (%s)", self.rank, str(error).splitlines()[0])

    def _look(self, store: dist.Store, names: dict[int, str]) -> None:
        now = time.monotonic()
        last = dict.fromkeys(self.watched, ("", now))  # the sign of each, and when it came
        mine, told, count = (self.progress(), now), set(), 0
        while not self.halt.wait(min(10.0, self.limit / 8)):
            count, now = count + 1, time.monotonic()
            store.set(_KEY.format(self.rank), self._sign(count))
            if self.watched:
                signs = [sign.decode() for sign in store.multi_get([_KEY.format(r) for r in self.watched])]
                for r, sign in zip(self.watched, signs, strict=True):
                    if sign != last[r][0]:
                        last[r] = sign, now
                        told.discard(r)
                    elif r not in told and now - last[r][1] > self.limit / 2:
                        told.add(r)
                        logger.warning(
                            "rank %d (%s) has given no sign for %.0f s: it is dead, stopped or cut off. All ranks wait "
                            "for it, and end %.0f s after they began to (--distributed-timeout-minutes)",
                            r, names[r], now - last[r][1], self.limit,
                        )  # fmt: skip
            if self.progress() != mine[0]:
                mine = self.progress(), now
                told.discard(self.rank)
            elif self.rank not in told and now - mine[1] > self.limit / 2:
                told.add(self.rank)
                logger.warning(
                    "rank %d (%s) has computed nothing for %.0f s; it is at %s. The rank that is not in a collective "
                    "keeps the others waiting",
                    self.rank, _name(), now - mine[1], self._place(),
                )  # fmt: skip

    def _sign(self, count: int) -> str:
        return f"{count} {_name()}"

    def _place(self) -> str:
        frames = traceback.extract_stack(sys._current_frames()[self.main]) if self.main in sys._current_frames() else []
        return " < ".join(f"{os.path.basename(f.filename)}:{f.lineno} {f.name}" for f in reversed(frames[-3:]))

    def stop(self) -> None:
        self.halt.set()


def _name() -> str:
    return f"host {socket.gethostname()}, process {os.getpid()}"


def shared_store() -> dist.Store:
    """A client of its own, as a blocking call of another thread holds the process group's one."""
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
