"""Triton's interpreter without work whose result nobody looks at: kernels take less than half the time."""

from __future__ import annotations

import dataclasses

from triton.runtime import interpreter


def hasten() -> None:
    """Leave out what the interpreter does for nothing; from then on, in this process."""
    # It looks for integers that overflow, and then asserts that they do not in debug mode only.
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang = _patched_once(interpreter._patch_lang)


def _patched_once(patch_lang):
    """`patch_lang`, which gives triton.language its interpreted functions, once a launch for each module.

    The interpreter does so whenever a kernel calls a function, and finds nothing left to replace.
    """
    patched = set()  # modules whose functions the kernel that runs has called, by their globals

    def patch(fn):
        module = id(fn.__globals__)
        if module in patched:
            return None  # a kernel's calls do not look at it
        patched.add(module)
        scope = patch_lang(fn)
        restore = scope.restore

        def restore_at_the_end():
            patched.clear()
            restore()

        scope.restore = restore_at_the_end
        return scope

    return patch
