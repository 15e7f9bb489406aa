"""Mistakes of a command line, as sentences."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the command line; the message is one sentence."""


def package(module: str, distribution: str):
    """The module of an optional dependency."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{distribution} does not import ({error}): pip install {distribution}") from error


def unknown(name: str, what: str, names: Iterable[str]) -> str:
    """The sentence for a name that is none of `names`."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"no {what} is called {name!r}" + (f"; near it are {', '.join(near)}" if near else "")


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
