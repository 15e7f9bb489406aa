"""Loads the compiled extension `fastseg._C` and keeps the reason when there is none.

Without it the package works through Triton and native operators; `fastseg.info()` shows the reason kept here.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch

_BUILD_RECORD = Path(__file__).with_name("_build.json")


def _read_build_record() -> dict:
    """What setup.py wrote about the build: torch and CUDA versions, architectures, what was left out and why."""
    if not _BUILD_RECORD.exists():
        return {}
    return json.loads(_BUILD_RECORD.read_text())


def _load():
    built_for = BUILD.get("torch")
    if BUILD.get("extension_left_out"):
        return None, BUILD["extension_left_out"]
    if built_for is not None and built_for.split("+")[0] != torch.__version__.split("+")[0]:
        return None, (
            f"the extension was built for torch {built_for} and this is torch {torch.__version__}: "
            "run `pip install --no-build-isolation --force-reinstall --no-deps .` again"
        )
    try:
        import fastseg._C as extension
    except ModuleNotFoundError as error:
        if error.name != "fastseg._C":
            raise
        return None, "the extension is not built: run `pip install --no-build-isolation .` in the source folder"
    except ImportError as error:
        return (
            None,
            f"the extension, built for torch {built_for}, does not load under {torch.__version__}: {error}",
        )
    return extension, None


BUILD = _read_build_record()
EXTENSION, MISSING = _load()
if MISSING is not None and BUILD.get("torch") is not None and not BUILD.get("extension_left_out"):
    # Somebody built it, so somebody expects it: a slow fallback must not be silent.
    warnings.warn(f"fastseg: {MISSING}", stacklevel=2)


def cuda_missing() -> str | None:
    """Why the CUDA C++ kernels are not there, or None when they are."""
    if EXTENSION is None:
        return MISSING
    if not EXTENSION.has_cuda:
        return BUILD.get("cuda_left_out", "the extension was built without CUDA")
    return None
