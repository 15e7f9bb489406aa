"""fastseg: fast kernels for segmentation networks, drop-in for PyTorch."""

from fastseg import nn, ops
from fastseg.dispatch import BackendError, backend

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "__version__",
    "backend",
    "nn",
    "ops",
]
