"""``python -m lightning_megatron.convert``, which is also the console script lightning-convert."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
