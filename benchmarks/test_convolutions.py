"""`pytest benchmarks --benchmark-only`: the cases through pytest-benchmark, one group a case and direction.

Each candidate is checked before it is timed. Here candidates run one after the other; for ratios measured in turns use
`python -m benchmarks`.
"""

import pytest
import torch

from benchmarks.cases import QUICK_DIRECTIONS, select
from benchmarks.operators import check, direction_call
from benchmarks.workload import ConvWorkload

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16
CANDIDATES = ("native NCHW", "native channels_last", "fastseg")


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("direction", QUICK_DIRECTIONS)
@pytest.mark.parametrize("case", select("*", DEVICE), ids=lambda case: case.id)
def test_convolution(benchmark, case, direction, name):
    workload = ConvWorkload(case, DTYPE, DEVICE)
    candidate = next(c for c in workload.candidates() if c.name == name)
    call = direction_call(candidate, workload, direction, workload.tensors(seed=0))
    gate = check(call(), workload, direction, candidate.role)
    assert gate["green"], gate["message"]

    def synchronised():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.id} {direction}"
    benchmark.extra_info.update(workload.describe(), backend=candidate.backend, error=gate["error"])
    benchmark(synchronised)
