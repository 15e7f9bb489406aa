"""Bugs planted into the real CUDA kernels must turn the contract tests red: a suite that stays green checks nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
# Every kernel in one dtype: walks of both strides, the generic kernels, both layouts, all gradients.
SUBSET = "within_bound and float32 and (3x3 or 5x5 or 4x2 or one-pixel or multiplier)"


class Mutation(NamedTuple):
    file: str
    right: str
    wrong: str


MUTATIONS = {
    "mask of rows above the image dropped": Mutation(
        "csrc/depthwise/depthwise.cuh",
        "return static_cast<unsigned>(i) < static_cast<unsigned>(end);",
        "return i < end;",
    ),
    "barrier after loading weights removed": Mutation(
        "csrc/depthwise/depthwise.cuh",
        "  __syncthreads();\n#pragma unroll\n  for (int tap",
        "#pragma unroll\n  for (int tap",
    ),
    "P and Q swapped": Mutation(
        "csrc/depthwise/depthwise_backward.cuh",
        "inside(q0 + g * params.dilation_w, params.Q)",
        "inside(q0 + g * params.dilation_w, params.P)",
    ),
    "dilation of rows ignored": Mutation(
        "csrc/depthwise/depthwise_forward.cuh",
        "const int p0 = walk.row_phase + walk.row_first * params.dilation_h;",
        "const int p0 = walk.row_phase + walk.row_first;",
    ),
    "tap of another row": Mutation(
        "csrc/depthwise/depthwise_backward.cuh",
        "const int r = e + STRIDE * i;",
        "const int r = e + STRIDE * (kReach - 1 - i);",
    ),
    "one column of a tile unguarded": Mutation(
        "csrc/depthwise/depthwise_forward.cuh",
        "if (GUARDED && o >= columns) continue;",
        "if (GUARDED && o > columns) continue;",
    ),
}


def contract(overlay: Path | None) -> subprocess.CompletedProcess:
    environment = os.environ | {"FASTSEG_RUNG": "host", "FASTSEG_HOST_ORDER": "reverse"}
    environment.pop("FASTSEG_HOST_OVERLAY", None)
    if overlay is not None:
        environment["FASTSEG_HOST_OVERLAY"] = str(overlay)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/test_contract.py",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        SUBSET,
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_kernels_as_they_are_pass():
    result = contract(None)
    assert result.returncode == 0, result.stdout[-2000:]


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_found(name, tmp_path):
    mutation = MUTATIONS[name]
    source = (ROOT / mutation.file).read_text()
    assert source.count(mutation.right) == 1, f"the mutation {name!r} no longer fits {mutation.file}"
    changed = tmp_path / mutation.file
    changed.parent.mkdir(parents=True)
    changed.write_text(source.replace(mutation.right, mutation.wrong))
    result = contract(tmp_path)
    assert result.returncode == 1, f"{name}: the contract tests stayed green"
    assert "1 failed" in result.stdout, result.stdout[-2000:]
