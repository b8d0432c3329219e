"""How every patch replaces its symbol: once, after checking version and signature, with one line in the log."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable
from typing import Any

from ..compat import MEGATRON_RANGE, TESTED, check_megatron

MARKER = "__lightning_patch__"

logger = logging.getLogger("lightning_megatron.patches")


def replace(
    symbol: str,
    parameters: tuple[str, ...],
    wrap: Callable[[Callable], Callable],
    effect: str,
    *,
    later: tuple[str, ...] = (),
) -> bool:
    """Put ``wrap(original)`` in the place of a function of Megatron.

    Args:
        symbol: dotted path of a function or method, e.g. ``megatron.core.datasets.utils.compile_helpers``.
        parameters: names of the original's parameters, in order; the patch is written for exactly these.
        wrap: gets the original, returns its replacement. The replacement gets ``__wrapped__`` and the marker.
        effect: end of the log line: what is different now.
        later: all of them in a later version, for which the patch is written, too: ``wrap`` hands on what is new.

    Returns:
        False if the symbol is patched already, and nothing was done.

    Raises:
        RuntimeError: megatron-core is outside the range of this package, or the parameters are others.
        ImportError: no such symbol.
    """
    check_megatron()
    owner_name, _, name = symbol.rpartition(".")
    known = f"lightning_megatron patches {symbol} of megatron-core {MEGATRON_RANGE}"
    try:
        owner = _owner(owner_name)
        original: Any = getattr(owner, name)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"{known}, but it does not exist here ({error})") from error
    if getattr(original, MARKER, None) == symbol:
        return False
    found = tuple(inspect.signature(original).parameters)
    if found not in (parameters, later or parameters):
        raise RuntimeError(
            f"{known} with the parameters {parameters}{f' or {later}' if later else ''}, but here it takes "
            f"{found}; use a version of Megatron that lightning_megatron is tested with: megatron-core {TESTED}"
        )

    replacement = functools.update_wrapper(wrap(original), original)  # sets __wrapped__
    setattr(replacement, MARKER, symbol)
    setattr(owner, name, replacement)

    from megatron.core.utils import log_single_rank

    log_single_rank(logger, logging.INFO, f"lightning: patched {symbol}: {effect}")
    return True


def _owner(path: str) -> Any:
    """The module, or the class in a module, that a dotted path names."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        module_name, _, name = path.rpartition(".")
        if not module_name:
            raise
        return getattr(importlib.import_module(module_name), name)
