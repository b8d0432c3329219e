"""Triton's interpreter, in half the time; and a fault of it that newer releases do not forgive."""

from __future__ import annotations

import dataclasses
import inspect

import numpy as np
from triton.runtime import interpreter


def set_up() -> None:
    _speed_up()
    _keep_masks()


def _speed_up() -> None:
    """Leave out what Triton 3.6 does without effect: checks of integers for overflow, whose results it drops, and to
    patch ``triton.language`` anew for every function that a kernel calls.

    It looks through hundreds of names each time. What it would patch is patched since the kernel began, and stays so
    until the kernel ends.
    """
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
    patch, languages = interpreter._patch_lang, (interpreter.tl, interpreter.tl.core)
    running = [interpreter._LangPatchScope()]  # of the kernel that runs; it has no changes once they are taken back
    patched = set()

    def once(fn):
        own = {x.__name__ for x in fn.__globals__.values() if inspect.ismodule(x) and x in languages}
        if not running[0]._changes:
            patched.clear()
            running[0] = patch(fn)
        elif own <= patched:
            return interpreter._LangPatchScope()
        else:
            patch(fn)  # what a called function patches is never taken back
        patched.update(own)
        return running[0]

    if patch.__name__ != once.__name__:
        interpreter._patch_lang = once


def _keep_masks() -> None:
    """A scalar's comparison is a bool of the compared numbers' type, and in a tensor, as ``mask & (i < n)``, it becomes
    one of that type. Triton 3.6 takes it as a mask, 3.9 refuses it.
    """
    builder = type(interpreter.interpreter_builder)
    plain = builder.create_splat

    def splat(self, kind, value):
        found = plain(self, kind, value)
        if value.data.dtype == np.bool_:
            found.data = found.data.astype(np.bool_)
        return found

    if plain.__name__ != splat.__name__:
        builder.create_splat = splat
