"""lightning_megatron.pretrain that kills itself: python -m tests.helpers.killed_pretrain --its --flags.

LIGHTNING_TESTS_KILL is a JSON list of ranks, the iteration from which on to watch, what to wait for (``step``: the
next one; ``save``: the folder of a checkpoint) and the seconds to wait then. SIGKILL comes from a thread beside the
training, wherever that is; nothing of the program sees it coming.
"""

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

from lightning_megatron.pretrain import main


def _watch(iteration: int, event: str, delay: float) -> None:
    save = Path(sys.argv[sys.argv.index("--save") + 1])

    def reached() -> bool:
        if event == "save":
            folders = [int(path.name[5:]) for path in save.glob("iter_*") if re.fullmatch(r"iter_\d+", path.name)]
            return max(folders, default=0) > iteration
        held = getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)
        return getattr(held, "curr_iteration", None) is not None and held.curr_iteration >= iteration

    while not reached():
        time.sleep(0.0005)
    time.sleep(delay)
    print(f"rank {os.environ['RANK']} dies {delay:.4f} s after {event} {iteration}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    ranks, *moment = json.loads(os.environ["LIGHTNING_TESTS_KILL"])
    if int(os.environ["RANK"]) in ranks:
        threading.Thread(target=_watch, args=moment, daemon=True).start()
    main()
