"""The peak of a card by its name, for model FLOPs utilization (MFU)."""

from __future__ import annotations

import re

# TFLOP/s of dense bf16 products, as NVIDIA's data sheets have them (without sparsity). The first that fits counts.
PEAKS = (
    (r"GB[23]00", 2500.0),
    (r"B[23]00", 2250.0),
    (r"B100", 1750.0),
    (r"H200 NVL|H100 NVL", 835.0),
    (r"H100 PCIe", 756.0),
    (r"H100|H200|H800|GH200", 989.0),
    (r"H20", 148.0),
    (r"A100|A800", 312.0),
    (r"L40S", 362.0),
)  # fmt: skip


def peak_tflops(name: str) -> float | None:
    """Dense bf16 TFLOP/s of the card that ``torch.cuda.get_device_name()`` calls so; None where it is not known."""
    return next((peak for card, peak in PEAKS if re.search(rf"\b({card})\b", name)), None)
