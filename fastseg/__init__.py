"""fastseg: fast kernels for segmentation networks, drop-in for PyTorch."""

from fastseg import nn, ops
from fastseg.accelerate import accelerate, accelerated, restore
from fastseg.dispatch import BackendError, backend
from fastseg.explain import explain
from fastseg.info import info
from fastseg.tune import tune

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "__version__",
    "accelerate",
    "accelerated",
    "backend",
    "explain",
    "info",
    "nn",
    "ops",
    "restore",
    "tune",
]
