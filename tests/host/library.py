"""Builds the CUDA kernels and their torch glue for csrc/host and registers them for CPU tensors."""

from __future__ import annotations

import os
from pathlib import Path

import torch

import fastseg  # noqa: F401  defines the operators that the library implements
from csrc.host.build import ROOT, build_torch_library


def sources(suffix: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in Path(ROOT, "csrc").glob(f"*/*{suffix}"))


def load_kernels(sanitize: bool = False) -> None:
    """Make backend "cuda" run on CPU tensors, in this process.

    FASTSEG_HOST_OVERLAY names a folder with changed copies of kernel headers, laid out as the project is: the mutation
    tests plant their bugs there.
    """
    overlay = os.environ.get("FASTSEG_HOST_OVERLAY")
    library = build_torch_library(sources(".cu"), sources("_cuda.cpp"), "kernels_on_cpu", sanitize, overlay=overlay)
    torch.ops.load_library(library)
