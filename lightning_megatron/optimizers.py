"""Which optimizer reads which of Megatron's flags, and which of their values checkpoints hold."""

from __future__ import annotations

from typing import Any, NamedTuple

MUON_LION = "muon's lion"  # Megatron 0.19 reads --lion-beta1 and 2 as Muon's scalar optimizer alone


class Flag(NamedTuple):
    """A flag that only some optimizers read."""

    default: Any  # the value that nobody gave
    readers: tuple[str, ...]  # names of ``optimizers_of``
    where: str  # the readers, for messages
    kept: bool = False  # in groups of parameters: Megatron goes on with the checkpoint's value, whatever the flag says


FLAGS = {
    "adam_beta1": Flag(0.9, ("adam", "soap", "lion"), "--optimizer adam, soap or lion", kept=True),
    "adam_beta2": Flag(0.999, ("adam", "soap", "lion"), "--optimizer adam, soap or lion", kept=True),
    "adam_eps": Flag(1e-8, ("adam", "soap"), "--optimizer adam", kept=True),
    "sgd_momentum": Flag(0.9, ("sgd",), "--optimizer sgd", kept=True),
    "muon_momentum": Flag(0.9, ("muon",), "--optimizer muon", kept=True),
    "muon_nesterov": Flag(False, ("muon",), "--optimizer muon"),
    "muon_scale_mode": Flag("spectral", ("muon",), "--optimizer muon"),
    "muon_num_ns_steps": Flag(5, ("muon",), "--optimizer muon"),
    "muon_extra_scale_factor": Flag(1.0, ("muon",), "--optimizer muon"),
    "muon_scalar_optimizer": Flag("adam", ("muon",), "--optimizer muon"),
    "lion_beta1": Flag(0.95, (MUON_LION,), "--muon-scalar-optimizer lion", kept=True),
    "lion_beta2": Flag(0.98, (MUON_LION,), "--muon-scalar-optimizer lion", kept=True),
}


def optimizers_of(optimizer: str | None, scalar: str | None) -> tuple[str, ...]:
    """That of matrices, and with Muon that of all other parameters, as ``Flag.readers`` names them.

    Args:
        optimizer: ``--optimizer``.
        scalar: ``--muon-scalar-optimizer``.
    """
    kind = optimizer or "adam"
    if "muon" not in kind:
        return (kind,)
    return "muon", MUON_LION if scalar == "lion" else scalar or "adam"
