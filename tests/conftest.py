"""The ladder's rungs: the same tests run on each, with other backends and devices.

FASTSEG_RUNG selects the rung: cpu (default), interpreter (Triton's interpreter), host (CUDA C++ executed on the CPU),
gpu.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from pathlib import Path

# Threads that spin while they wait for others make a test last a hundred times longer on a busy machine. OpenMP reads
# this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# What somebody has tuned on this machine is not for tests to read, let alone to write.
CACHE = tempfile.TemporaryDirectory(prefix="fastseg-tests-")
os.environ["FASTSEG_CACHE"] = CACHE.name
os.environ["FASTSEG_TUNE"] = "0"  # what "auto" takes on a GPU does not depend on the clock either

# A shell without job control starts background jobs with interrupts ignored, and tests send some to their children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from fastseg import winners  # noqa: E402

RUNG = os.environ.get("FASTSEG_RUNG", "cpu")
# (backend, device) pairs of each rung.
RUNGS = {
    "cpu": [("reference", "cpu"), ("cpu", "cpu")],
    "interpreter": [("triton", "cpu")],
    "host": [("cuda", "cpu")],
    "gpu": [("triton", "cuda"), ("cuda", "cuda")],
}
if RUNG not in RUNGS:
    raise pytest.UsageError(f"expected FASTSEG_RUNG to be one of {', '.join(RUNGS)}, but got {RUNG!r}")

SLOW_RUNG = RUNG == "interpreter"
# Where every new case costs seconds, of a thousandfold slower kernel or of Triton's compiler; and with narrower vectors
# than the machine has, whose kernels are the same sources.
FEW_CASES = RUNG in ("interpreter", "gpu") or "FASTSEG_CPU_CAPABILITY" in os.environ

# Examples a property test draws: interpreted kernels take a thousand times longer, and Triton compiles for new shapes.
_EXAMPLES = {"cpu": 150, "interpreter": 3, "host": 40, "gpu": 8}

settings.register_profile(
    "fastseg",
    max_examples=_EXAMPLES[RUNG],
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("fastseg")


class Target:
    """A backend on a device, and what its arithmetic is known to do differently."""

    def __init__(self, backend: str, device: str):
        self.backend = backend
        self.device = device

    def __str__(self) -> str:
        return self.backend if self.device == "cpu" else f"{self.backend}-{self.device}"

    def takes(self, dtype: torch.dtype) -> bool:
        return not (self.backend == "triton" and dtype == torch.float64)

    def roundoff(self, dtype: torch.dtype) -> float | None:
        """The unit roundoff of stores where it is not the dtype's own: Triton's interpreter truncates to bfloat16."""
        return 2.0**-7 if RUNG == "interpreter" and dtype == torch.bfloat16 else None


TARGETS = [Target(backend, device) for backend, device in RUNGS[RUNG]]


@contextlib.contextmanager
def on_threads(count: int):
    """PyTorch's threads for operators, as they were afterwards."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def pytest_generate_tests(metafunc):
    if "target" in metafunc.fixturenames:
        metafunc.parametrize("target", TARGETS, ids=str, scope="session")


def pytest_configure(config):
    # Nor do they depend on the winners that come with fastseg for some devices.
    winners.SHIPPED = Path(CACHE.name) / "shipped_winners"
    # Convolutions of float32 tensors are IEEE float32 unless a test asks for TF32.
    torch.backends.cudnn.allow_tf32 = False
    if RUNG == "interpreter" and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("the interpreter rung needs TRITON_INTERPRET=1")
    if RUNG == "interpreter":
        from tests.interpreter import hasten

        hasten()
    if RUNG == "host":
        from tests.host.library import load_kernels

        load_kernels(sanitize=os.environ.get("FASTSEG_SANITIZE") == "1")


def pytest_runtest_setup(item):
    """After an illegal access every later call of the process fails: end it, and let pytest-xdist start another."""
    if RUNG == "gpu" and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(1)
            pytest.exit(f"the GPU is lost to this process: {error}", returncode=1)


@pytest.fixture
def tf32():
    """Let convolutions of float32 tensors multiply as TF32 while a test runs."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        yield


@pytest.fixture
def poison():
    """Fill every uninitialised tensor with NaN while a test runs, so that an unwritten element shows."""
    previous = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(previous[0])
    torch.utils.deterministic.fill_uninitialized_memory = previous[1]
