"""Benchmarks of fastseg against native PyTorch: `python -m benchmarks --help`."""

import os

# PyTorch's profiler counts memory here. It calls a missing GPU an error unless it is told, before the import, not to.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")
