"""Bugs planted into the real CUDA kernels must turn the contract tests red: a suite that stays green checks nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
# Of each family, every kernel: walks of both strides and the generic kernels in one dtype; products on tensor cores and
# on ordinary multipliers, with channels that fill chunks and that do not. Both layouts, all gradients.
SUBSETS = {
    "depthwise": "depthwise and within_bound and float32 and (3x3 or 5x5 or 4x2 or one-pixel or multiplier)",
    "dilated": "dilated and within_bound and (float32 or float16) and (3x3-d6 or 3x3-s2-d2 or 3x5-s2x1-d1x2 or thin)",
    "head": "within_bound and float32",
}
# Where a family's contract is tested, if not with the convolutions.
FILES = {"head": ["tests/ops/test_head.py", "tests/ops/test_head_cuda.py"]}


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
    "taps of a short phase mirrored": Mutation(
        "csrc/depthwise/depthwise_phases.cuh",
        "return t - u + 1;",
        "return u - t + 1;",
    ),
    "one column of a tile unguarded": Mutation(
        "csrc/depthwise/depthwise_forward.cuh",
        "if (GUARDED && o >= columns) continue;",
        "if (GUARDED && o > columns) continue;",
    ),
    "dilation between taps ignored": Mutation(
        "csrc/dilated/dilated_gather.cuh",
        "source_row = rows.source_spacing * params",
        "source_row = params",
    ),
    "taps of grad_input not turned around": Mutation(
        "csrc/dilated/dilated_gather.cuh",
        "weight_column = columns.weight_spacing * params",
        "weight_column = params",
    ),
    "slice multiplied before it has landed": Mutation(
        "csrc/dilated/dilated.cuh",
        "cp_async_wait<kStages - 2>();",
        "cp_async_wait<kStages - 1>();",
    ),
    "lines read untwisted": Mutation(
        "csrc/dilated/dilated.cuh",
        "^ extent : depth) ^ Slice::twist(line);",
        "^ extent : depth);",
    ),
    "no zeros behind the last pixel": Mutation(
        "csrc/dilated/dilated_grad_weight.cuh",
        "    left -= kDepth;\n",
        "",
    ),
    "shares swapped": Mutation(
        "csrc/head/head.cuh",
        "multiply_add(second, share, first * (Acc(1) - share))",
        "multiply_add(first, share, second * (Acc(1) - share))",
    ),
    "classes beyond the last one unmasked": Mutation(
        "csrc/head/head_pixels.cuh",
        "if (c + kVec > classes) {",
        "if (c > classes) {",
    ),
    "cells overwritten before they have been read": Mutation(
        "csrc/head/head_pixels.cuh",
        "    if (chunk > 0) __syncthreads();",
        "    ",
    ),
    "pixels read before they are staged": Mutation(
        "csrc/head/head_gradient.cuh",
        "    __syncthreads();\n\n    for (int r",
        "    for (int r",
    ),
    "cells left of a tile forgotten": Mutation(
        "csrc/head/head_gradient.cuh",
        "for (int j = 0; j <= kColumns; ++j) {  // cell w0 - 1 + j",
        "for (int j = 1; j <= kColumns; ++j) {",
    ),
    "what lies below the last row dropped": Mutation(
        "csrc/head/head_resize.cuh",
        "if (h == H - 1) {",
        "if (h == H) {",
    ),
}


def contract(family: str, overlay: Path | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | {"FASTSEG_RUNG": "host", "FASTSEG_HOST_ORDER": "reverse"}
    environment.pop("FASTSEG_HOST_OVERLAY", None)
    if overlay is not None:
        environment["FASTSEG_HOST_OVERLAY"] = str(overlay)
    command = [
        sys.executable,
        "-m",
        "pytest",
        *FILES.get(family, ["tests/test_contract.py"]),
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        SUBSETS[family],
    ]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("family", SUBSETS)
def test_the_kernels_as_they_are_pass(family):
    result = contract(family)
    assert result.returncode == 0, result.stdout[-2000:]


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_found(name, tmp_path):
    mutation = MUTATIONS[name]
    source = (ROOT / mutation.file).read_text()
    assert source.count(mutation.right) == 1, f"the mutation {name!r} no longer fits {mutation.file}"
    changed = tmp_path / mutation.file
    changed.parent.mkdir(parents=True)
    changed.write_text(source.replace(mutation.right, mutation.wrong))
    result = contract(Path(mutation.file).parent.name, tmp_path)
    assert result.returncode == 1, f"{name}: the contract tests stayed green"
    assert "1 failed" in result.stdout, result.stdout[-2000:]
