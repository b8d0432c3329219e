"""Model FLOPs utilization beside the TFLOP/s of ``--log-throughput``.

Symbol:   megatron.training.training.print_rank_last
Why:      TFLOP/s of a card say little without its peak, and Megatron's line of an iteration is made inside of a
          function of 400 lines that gives no way to add to it.
Versions: megatron-core 0.19, 0.20
Can go:   when Megatron logs it, or a line of its log can be added to.

MFU = TFLOP/s of the model's products / peak of the card (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
Recomputation does not count, as in the TFLOP/s.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ._replace import replace

SYMBOLS = ("megatron.training.training.print_rank_last",)
PARAMETERS = ("message",)
_THROUGHPUT = re.compile(r" throughput per GPU \(TFLOP/s/GPU\): ([\d.]+) \|")
_ITERATION = re.compile(r" iteration +(\d+)/")

_peak: float | None = None


def with_mfu(message: str, peak: float) -> tuple[str, float | None]:
    """A line of the log with MFU behind its TFLOP/s, and its value; a line without these stays as it is."""
    found = _THROUGHPUT.search(message)
    if found is None:
        return message, None
    mfu = float(found[1]) / peak
    return f"{message[: found.end()]} MFU: {100 * mfu:.1f}% |{message[found.end() :]}", mfu


def _wrap(original: Callable[[str], None]) -> Callable[[str], None]:
    def print_rank_last(message: str) -> None:
        assert _peak is not None
        message, mfu = with_mfu(message, _peak)
        if mfu is not None:
            _write(mfu, int(_ITERATION.search(message)[1]))  # type: ignore[index]
        original(message)

    return print_rank_last


def _write(mfu: float, iteration: int) -> None:
    """Where Megatron writes its throughput."""
    from megatron.training.global_vars import get_args, get_tensorboard_writer, get_wandb_writer

    if get_args().log_timers_to_tensorboard:
        if writer := get_tensorboard_writer():
            writer.add_scalar("mfu", mfu, iteration)
        if wandb := get_wandb_writer():
            wandb.log({"mfu": mfu}, iteration)


def apply(peak: float) -> None:
    """Apply the patch; a second call only changes the peak, in TFLOP/s."""
    global _peak
    _peak = peak
    replace(SYMBOLS[0], PARAMETERS, _wrap, f"MFU stands beside TFLOP/s, of {peak:g} TFLOP/s")
