"""Caches of what is worked out once, such as plans of launches."""

from __future__ import annotations

from collections.abc import Hashable

KEPT = 2048  # entries of a cache at most: lengths that never return must not fill the memory


def keep[T](cache: dict[Hashable, T], key: Hashable, value: T) -> T:
    """Put ``value`` into a cache of at most ``KEPT`` entries."""
    if len(cache) >= KEPT:
        cache.clear()
    cache[key] = value
    return value
