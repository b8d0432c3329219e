"""Triton's interpreter, a third faster."""

from __future__ import annotations

import inspect

from triton.runtime import interpreter


def patch_once() -> None:
    """Let a kernel make Triton's language interpreted once, and not anew for every function that it calls.

    The interpreter (Triton 3.6) looks through hundreds of names of ``triton.language`` at each call of such a function.
    What it would patch is patched since the kernel began, and stays so until the kernel ends.
    """
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
