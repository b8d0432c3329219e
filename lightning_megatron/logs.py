"""Megatron's settings of the log, where a package has made others first."""

from __future__ import annotations

import logging
import os
import sys


def restore_settings(level: int | None = None) -> None:
    """Give the root logger the settings that Megatron's training makes, if absl has made python's default ones before.

    Megatron calls ``logging.basicConfig`` while it is imported, which does nothing once there is a handler. With
    emerging-optimizers (``--optimizer muon``) absl has called it by then: lines of level INFO, Megatron's and this
    package's map of layers among them, would be lost without a word. Settings of anybody else are left alone.

    Args:
        level: of ``--logging-level``; INFO, or that of the environment's MEGATRON_LOGGING_LEVEL, if None.
    """
    root = logging.getLogger()
    if "absl.logging" not in sys.modules or "megatron.training" not in sys.modules:
        return
    if [type(handler) for handler in root.handlers] != [logging.StreamHandler] or root.level != logging.WARNING:
        return
    from megatron.training.log_handler import CustomHandler

    if level is None:
        level = int(os.environ.get("MEGATRON_LOGGING_LEVEL", logging.INFO))
    logging.basicConfig(handlers=[CustomHandler()], level=level, force=True)
