"""What `pytest benchmarks --benchmark-only` runs: a small selection in minutes, and with -k or -m whatever they name.

`-m "operator or head"`, `-m block`, `-m network` name kinds of rows; `-k "sep-aspp and forward"` cases and directions.
"""

from __future__ import annotations

import pytest

from benchmarks import memory

MARKS = {
    "operator": "a convolution by itself",
    "block": "a block of DeepLab or U-Net",
    "head": "what comes behind the logits",
    "network": "a whole network",
    "small": "what runs where nothing else is asked for",
    "benchmark_row": "any of these",
}


def pytest_configure(config):
    for name, text in MARKS.items():
        config.addinivalue_line("markers", f"{name}: {text}")
    memory.keep_freed_memory()


@pytest.hookimpl(tryfirst=True)  # before -m looks at marks
def pytest_collection_modifyitems(config, items):
    rows = [item for item in items if "step" in getattr(item, "fixturenames", ()) and hasattr(item, "callspec")]
    for item in rows:
        step = item.callspec.params["step"]
        item.add_marker(step.family)
        item.add_marker("benchmark_row")
        if item.module.is_small(step):
            item.add_marker("small")
    asked = config.option.keyword or config.option.markexpr or any("::" in argument for argument in config.args)
    left_out = [] if asked else [item for item in rows if not item.get_closest_marker("small")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
