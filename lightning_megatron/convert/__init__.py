"""Converts models between Hugging Face folders and Megatron's torch_dist checkpoints, on CPUs, in little memory.

    import_checkpoint(Path("Ring-mini-linear-2.0"), Path("ring-mini"))    # lightning-convert import
    export_checkpoint(Path("ring-mini"), Path("exported"))                # lightning-convert export
    roundtrip(Path("Ring-mini-linear-2.0"))                               # lightning-convert roundtrip
    verify(Path("Ring-mini-linear-2.0"), Path("ring-mini"))               # lightning-convert verify

``models.family`` says which tensors a model has. ``plan`` compares them with those that are there, before anything is
written; ``work`` runs parts in threads; ``partial`` makes runs resumable and results atomic.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparing import roundtrip as roundtrip
    from .errors import ConvertError as ConvertError
    from .exporting import export_checkpoint as export_checkpoint
    from .importing import import_checkpoint as import_checkpoint
    from .verifying import verify as verify

_MODULES = {
    "ConvertError": "errors",
    "export_checkpoint": "exporting",
    "import_checkpoint": "importing",
    "roundtrip": "comparing",
    "verify": "verifying",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
