"""The twin of ldmatrix, lane by lane."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from csrc.host import build as host


@pytest.mark.parametrize("turn", [False, True], ids=["as they are", "turned"])
def test_lanes_get_what_the_ptx_manual_says(turn):
    """From the PTX manual, "ldmatrix": thread T receives row T / 4, elements 2 (T % 4) and 2 (T % 4) + 1."""
    y = np.full((32, 4, 2), -1, np.int32)
    library = ctypes.CDLL(str(host.build(["tests/host/load_matrices.cu"], "load_matrices")))
    library.run(int(turn), y.ctypes.data_as(ctypes.c_void_p))
    matrices = np.arange(256).reshape(4, 8, 8)
    if turn:
        matrices = matrices.transpose(0, 2, 1)
    expected = matrices.reshape(4, 32, 2).transpose(1, 0, 2)
    assert np.array_equal(y, expected)
