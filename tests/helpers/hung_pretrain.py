"""lightning_megatron.pretrain whose last rank stops after two iterations, as a machine does that hangs."""

import os
import signal
import sys
import threading
import time

from lightning_megatron.pretrain import main


def _stop() -> None:
    while True:
        held = getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)
        if (getattr(held, "curr_iteration", None) or 0) >= 2:
            break
        time.sleep(0.001)
    print(f"rank {os.environ['RANK']} stops", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        threading.Thread(target=_stop, daemon=True).start()
    main()
