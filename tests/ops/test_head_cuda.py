"""The variants of the CUDA kernels of the segmentation head: tiles, vector widths, ways out of the fast kernels."""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_head import (
    ALL_LAYOUTS,
    DTYPES,
    Loss,
    LossCase,
    ResizeCase,
    assert_resize,
    make,
    random_like,
    short,
)

LAYOUTS = pytest.mark.parametrize("layout", ALL_LAYOUTS, ids=short)

LOSSES = {
    "several tiles of pixels": LossCase(5, (20, 40), (70, 150), batch=1, ignore_index=255),
    "one lane a class": LossCase(19, (20, 19), (41, 77), smoothing=0.1, weighted=True),
    "two classes a lane": LossCase(40, (9, 10), (35, 41), batch=1, ignore_index=255),
    "two classes a lane, smoothed": LossCase(40, (9, 10), (35, 41), batch=1, smoothing=0.1, weighted=True),
    "several slabs of classes": LossCase(530, (3, 5), (7, 9), batch=1),
    "few classes, sets of columns side by side": LossCase(2, (6, 50), (9, 120)),
    "pixels of a row fill shared memory": LossCase(3, (2, 2), (5, 800), batch=1, smoothing=0.2),
    "more pixels in a row than shared memory holds": LossCase(3, (2, 3), (4, 1500), batch=1, smoothing=0.2),
    "larger tiles of cells than shared memory holds": LossCase(3, (90, 70), (45, 40), batch=1),
}
RESIZES = {f"{channels} channels": ResizeCase((2, channels, 9, 11), (21, 19)) for channels in (1, 2, 4, 8, 12, 16)} | {
    "several walks down": ResizeCase((1, 8, 70, 5), (150, 9)),
    "several walks down, to less": ResizeCase((1, 8, 70, 5), (31, 9)),
}


@pytest.fixture(autouse=True)
def only_cuda(target):
    if target.backend != "cuda":
        pytest.skip("variants of the CUDA kernels")


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("case", LOSSES.values(), ids=LOSSES)
def test_loss_within_bound(case, dtype, layout, target):
    Loss(target, case, dtype, layout).assert_within_bound()


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("case", RESIZES.values(), ids=RESIZES)
def test_resize_within_bound(case, dtype, layout, target):
    x = make(target, case, dtype, layout)
    grad_output = random_like(x.new_empty(*x.shape[:2], *case.output)).contiguous(memory_format=layout)
    assert_resize(target, x, case, grad_output)
