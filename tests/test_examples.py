"""Every example in a public docstring and in README.md runs on a CPU as it stands."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import fastseg

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(fastseg.__path__, "fastseg.")
    if not module.name.endswith(("_C", "__main__", "triton", "triton_common"))
)


def public_objects():
    for package in (fastseg, fastseg.ops, fastseg.nn):
        for name in package.__all__:
            value = getattr(package, name)
            if callable(value) and not (isinstance(value, type) and issubclass(value, Exception)):
                yield pytest.param(value, id=f"{package.__name__}.{name}")


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


@pytest.mark.parametrize("value", list(public_objects()))
def test_public_names_have_a_docstring_with_an_example(value):
    assert value.__doc__ is not None
    assert ">>>" in value.__doc__, "add a four-line example that runs on a CPU"


def readme_blocks():
    text = (ROOT / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_readme_has_examples():
    assert len(readme_blocks()) >= 2


@pytest.mark.parametrize("number", range(len(readme_blocks())))
def test_readme_example(number):
    """The blocks are one story: each sees the names of those before it."""
    names: dict = {}
    for block in readme_blocks()[: number + 1]:
        exec(compile(block, f"README.md block {number}", "exec"), names)
