"""Values of a checkpoint beside those of a run, for messages."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from ..config import flag_of

_NAMES = {  # of what is no flag, or has one that says the opposite
    "data_parallel_size": "data-parallel ranks",
    "data_sharding": "data in shares of ranks (off: --no-data-sharding)",
    "muon_split_qkv": "q, k and v as matrices of their own (off: --muon-no-split-qkv)",
}


def others(names: tuple[str, ...], saved: Any, args: Namespace) -> list[str]:
    return [
        f"{named(name)}: {show(getattr(saved, name), name)} in the checkpoint, {show(getattr(args, name), name)} "
        "in this run"
        for name in names
        if hasattr(saved, name) and hasattr(args, name) and getattr(saved, name) != getattr(args, name)
        if _acts(name, args)
    ]


def named(name: str) -> str:
    """The flag of an attribute of args, or what it is."""
    return _NAMES.get(name) or flag_of(name)


def show(value: Any, name: str) -> str:
    if "decay" in name:
        preset, offset, digest = value
        return f"{preset} with offset {offset} (values {digest})"
    if value is None:
        return "none"
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _acts(name: str, args: Any) -> bool:
    """Whether a flag of some part acts on anything: whether the part is there."""
    parts = {"muon_": "muon" in getattr(args, "optimizer", ""), "mtp_": getattr(args, "mtp_num_layers", None)}
    parts |= {"moe_": getattr(args, "num_experts", None), "sft_": getattr(args, "sft", False)}
    return all(there for part, there in parts.items() if name.removeprefix("lightning_").startswith(part))
