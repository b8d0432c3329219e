"""lightning_megatron.pretrain beside a TensorBoard that is not installed: scalars go to the folder as lines of JSON.

python -m tests.helpers.scalars FLAGS --tensorboard-dir FOLDER
"""

import json
import sys
import types
from pathlib import Path

NAME = "scalars.jsonl"


class SummaryWriter:
    def __init__(self, log_dir, **options):
        self.file = open(Path(log_dir, NAME), "w", buffering=1)  # noqa: SIM115

    def add_scalar(self, name, value, step):
        self.file.write(json.dumps([name, float(value), step]) + "\n")

    def add_text(self, *text, **more):
        pass

    def flush(self):
        self.file.flush()

    def close(self):
        self.file.close()


def read(folder) -> dict[str, dict[int, float]]:
    """Scalars by name, and then by step."""
    found = {}
    for line in Path(folder, NAME).read_text("utf-8").splitlines():
        name, value, step = json.loads(line)
        found.setdefault(name, {})[step] = value
    return found


def main() -> None:
    sys.modules["torch.utils.tensorboard"] = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    from lightning_megatron import pretrain

    pretrain.main()


if __name__ == "__main__":
    main()
