"""fastseg: fast kernels for segmentation networks, drop-in for PyTorch."""

from fastseg import models, nn, ops
from fastseg.accelerate import accelerate, accelerated, restore
from fastseg.counters import counters
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
    "counters",
    "explain",
    "info",
    "models",
    "nn",
    "ops",
    "restore",
    "tune",
]
