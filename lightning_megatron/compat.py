"""Which megatron-core this package is written for, and which optional kernels are installed."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata

MEGATRON_RANGE = ">=0.19,<0.21"
TESTED = "0.19.2, and Megatron-LM's main of 0.20 at d98e8a64"  # CONTRIBUTING.md, Other versions of Megatron
_FIRST, _END = (0, 19), (0, 21)


def check_megatron() -> None:
    """Refuse a megatron-core that this package was not written for.

    Raises:
        RuntimeError: no megatron-core, one outside ``MEGATRON_RANGE``, or one that another package keeps from being
            imported. Never ImportError: Megatron logs and then ignores an ImportError of a ``--spec`` module, and
            trains plain softmax attention.
    """
    remedy = f"pip install 'megatron-core[training]{MEGATRON_RANGE}'"
    try:
        from megatron.core.package_info import VERSION, __shortversion__
    except ImportError as error:
        raise RuntimeError(
            f"lightning_megatron needs megatron-core {MEGATRON_RANGE}, but importing megatron.core failed "
            f"({error}); {remedy}"
        ) from error
    except (AttributeError, AssertionError) as error:  # Megatron asks packages for their versions while it is imported
        raise RuntimeError(
            f"importing megatron.core failed ({type(error).__name__}: {error}): update the package that this names, or "
            "uninstall it, if it is optional; nvidia-resiliency-ext must be 0.6.0 or newer"
        ) from error
    if not _FIRST <= tuple(VERSION[:2]) < _END:
        raise RuntimeError(
            f"lightning_megatron needs megatron-core {MEGATRON_RANGE}, but found {__shortversion__}; {remedy}, and "
            "look for an older or newer Megatron-LM checkout on PYTHONPATH"
        )


@functools.cache
def importable(module: str) -> bool:
    """Whether ``module`` imports: Megatron's own test for an optional package, so both always agree."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def version(distribution: str) -> str:
    """Installed version of a distribution, or "not installed"; of megatron-core, that of what is imported."""
    try:
        if distribution == "megatron-core":  # a checkout on PYTHONPATH has no metadata, or comes before what has
            from megatron.core.package_info import __shortversion__

            return str(__shortversion__)
        return importlib.metadata.version(distribution)
    except (importlib.metadata.PackageNotFoundError, ImportError):
        return "not installed"
