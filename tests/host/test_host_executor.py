"""csrc/host runs correct kernels right in every order of threads, and shows each planted bug.

The kernels, and their names here, are in planted_bugs.cu.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from csrc.host import build as host

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "tests/host/planted_bugs.cu"
ORDERS = ["forward", "reverse", "shuffled:1", "shuffled:2", "shuffled:3"]


def _open(library):
    opened = ctypes.CDLL(str(library))
    opened.run_case.restype = ctypes.c_char_p
    return opened


@pytest.fixture(scope="module")
def plain():
    return _open(host.build([SOURCE], "planted_bugs"))


@pytest.fixture(scope="module")
def sanitized_path():
    return host.build([SOURCE], "planted_bugs", sanitize=True)


def _run(library, case, size=4096):
    """What the case wrote, in a buffer of zeros; RuntimeError with the message of what it threw."""
    y = np.zeros(size, np.float32)
    error = library.run_case(case.encode(), y.ctypes.data_as(ctypes.c_void_p))
    if error is not None:
        raise RuntimeError(error.decode())
    return y


def _line(name):
    """Where the line marked "// line: NAME" is, as messages say it."""
    lines = (ROOT / SOURCE).read_text().splitlines()
    [number] = [i for i, line in enumerate(lines, 1) if line.endswith(f"// line: {name}")]
    return f"{SOURCE}:{number}"


# ---- What correct kernels compute ----


def _warp_operations():
    lane = np.arange(64) % 32
    rows = [
        np.full(64, 496),
        np.full(64, 496),
        np.where(lane % 8 < 3, lane, lane - 3),
        lane // 16 * 16 + 5,
        np.where(lane & 8, lane - 8, lane),
        np.full(64, 1),
        np.full(64, 10),
        np.where(lane < 16, 0xFF00, 0),
    ]
    return np.stack(rows, 1).ravel()


def _product(k):
    a = (np.arange(16 * k) * 7 % 19 - 9).reshape(16, k)
    b = (np.arange(8 * k) * 5 % 23 - 11).reshape(8, k)
    return (a @ b.T + 1000).ravel()


EXPECTED = {
    "block_sum": np.arange(5 * 128).reshape(5, 128).sum(1),
    "transpose": np.arange(37 * 50).reshape(37, 50).T.ravel(),
    "early_exit": (39 - np.arange(40)) * 100 + np.where(np.arange(40) < 32, 32, 8),
    "late_exit": np.where(np.arange(63) < 32, 32, 31),
    "block_votes": np.full(70, 241010),
    "warp_operations": _warp_operations(),
    "shift": np.maximum(np.arange(64) - 1, 0),
    "turn_in_warp": np.r_[31:-1:-1, 63:31:-1],
    "multiply_fp16": _product(16),
    "multiply_bf16": _product(16),
    "multiply_tf32": _product(8),
    "sum_rows": np.arange(7 * 128).reshape(7, 128).sum(0),
}


def _is_right(y, case):
    expected = EXPECTED[case]
    return np.array_equal(y[: expected.size], expected) and not y[expected.size :].any()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", EXPECTED)
def test_correct_kernel_is_right_in_every_order(plain, case, order, monkeypatch):
    monkeypatch.setenv("FASTSEG_HOST_ORDER", order)
    assert _is_right(_run(plain, case), case)


@pytest.mark.parametrize("case", ["block_sum", "warp_operations", "divergent_barrier"])
def test_portable_fibers_do_the_same(plain, case):
    portable = _open(host.build([SOURCE], "planted_bugs_ucontext", defines=["FASTSEG_HOST_UCONTEXT"]))
    if case in EXPECTED:
        assert _is_right(_run(portable, case), case)
    else:
        with pytest.raises(RuntimeError) as expected:
            _run(plain, case)
        with pytest.raises(RuntimeError) as got:
            _run(portable, case)
        assert str(got.value) == str(expected.value)


# ---- Races and unwritten memory ----


@pytest.mark.parametrize(
    ("bug", "case"),
    [
        ("block_sum_without_barrier", "block_sum"),
        ("transpose_without_barrier", "transpose"),
        ("turn_in_warp_without_syncwarp", "turn_in_warp"),
        ("shift_without_barrier", "shift"),
        ("sum_rows_no_wait", "sum_rows"),
        ("sum_rows_wait_for_too_few", "sum_rows"),
        ("sum_rows_no_commit", "sum_rows"),
        ("sum_rows_no_barrier_after_wait", "sum_rows"),
        ("sum_rows_no_barrier_before_reuse", "sum_rows"),
    ],
)
def test_race_changes_the_result_in_some_order(plain, bug, case, monkeypatch):
    right = []
    for order in ORDERS:
        monkeypatch.setenv("FASTSEG_HOST_ORDER", order)
        right.append(_is_right(_run(plain, bug), case))
    assert not all(right)
    if bug == "shift_without_barrier":  # one that a single order would not show
        assert right[0]


def test_every_block_finds_nan_in_shared_memory(plain):
    y = _run(plain, "uninitialized_shared")
    assert np.isnan(y[:4]).all()
    assert not y[4:].any()


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_run_in_the_chosen_order(plain, order, monkeypatch):
    monkeypatch.setenv("FASTSEG_HOST_ORDER", order)
    ranks = _run(plain, "order_of_blocks")[:50]
    ascending = np.arange(50)
    assert np.array_equal(np.sort(ranks), ascending)
    assert np.array_equal(ranks, ascending) == (order == "forward")
    assert np.array_equal(ranks, ascending[::-1]) == (order == "reverse")
    assert np.array_equal(_run(plain, "order_of_blocks")[:50], ranks)


@pytest.mark.parametrize("order", ["backward", "shuffled", "shuffled:", "shuffled:x"])
def test_unknown_order_is_refused(plain, order, monkeypatch):
    monkeypatch.setenv("FASTSEG_HOST_ORDER", order)
    with pytest.raises(RuntimeError, match=f"expected FASTSEG_HOST_ORDER to be forward.*but got '{order}'"):
        _run(plain, "block_sum")


# ---- Barriers, warps, and what else throws ----


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("bug", "words"),
    [
        ("divergent_barrier", ["divergent_barrier(float*)", _line("even threads"), _line("odd threads")]),
        ("barrier_in_loop", [_line("loop barrier"), _line("barrier after loop")]),
        ("missing_lane", [_line("shuffle without lane 31"), _line("barrier of lane 31"), "waiting for lanes 31"]),
        ("caller_outside_mask", [_line("mask without lane 31"), "lane 31, which is not in its mask 0x7fffffff"]),
        ("multiply_without_lane", [_line("mma"), "without the exited lanes 31"]),
        ("misaligned_copy", [_line("misaligned copy"), "no multiple of 16"]),
        ("trap", [_line("trap"), "thread (3, 0, 0)"]),
        ("throws", ["thrown in a kernel"]),
    ],
)
def test_error_names_the_lines(plain, bug, words, order, monkeypatch):
    monkeypatch.setenv("FASTSEG_HOST_ORDER", order)
    with pytest.raises(RuntimeError) as error:
        _run(plain, bug)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    ("bug", "words"),
    [
        ("grid_too_large", "cannot launch write_thread_number.* grid .1, 65536, 1.*: a grid goes from"),
        ("block_too_large", "cannot launch write_thread_number.* block .1025, 1, 1.*: a block has 1 to 1024 threads"),
        ("shared_too_large", "232449 bytes of dynamic shared memory: a block has at most 232448 bytes"),
        ("grid_size_too_large", "expected a grid from .*, but got .4294967296, 1, 1."),
    ],
)
def test_impossible_launch_is_refused(plain, bug, words):
    with pytest.raises(RuntimeError, match=words):
        _run(plain, bug)


def test_lane_that_takes_no_part_gives_nan(plain):
    exited = _run(plain, "value_of_exited_lane")
    assert np.array_equal(exited[:19], np.arange(1, 20))
    assert np.isnan(exited[19])
    assert np.isnan(_run(plain, "different_masks")[:16]).all()


def test_launches_after_an_error_are_right_and_keep_no_stacks(plain):
    def mappings():
        return len(Path("/proc/self/maps").read_text().splitlines())

    for bug in ("divergent_barrier", "missing_lane", "throws", "trap"):
        with pytest.raises(RuntimeError):
            _run(plain, bug)
    before = mappings()
    for _ in range(20):
        for bug in ("divergent_barrier", "missing_lane", "throws", "trap"):
            with pytest.raises(RuntimeError):
                _run(plain, bug)
    assert mappings() < before + 20
    assert _is_right(_run(plain, "block_sum"), "block_sum")


# ---- Tensor cores ----


def _positions_in_manual(dtype):
    """Per lane: row and k of A's registers, k and column of B's, row and column of D's.

    From the PTX manual, "Matrix Fragments for mma.m16n8k16 with floating point type" and "... for mma.m16n8k8".
    """
    rows = []
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        if dtype == "fp16":  # element 2 i of the manual is the first one of register i
            a = [(group if i in (0, 1, 4, 5) else group + 8, thread * 2 + (0 if i < 4 else 8)) for i in (0, 2, 4, 6)]
            b = [(thread * 2, group), (thread * 2 + 8, group)]
        else:
            a = [(group, thread), (group + 8, thread), (group, thread + 4), (group + 8, thread + 4)]
            b = [(thread, group), (thread + 4, group)]
        d = [(group if i < 2 else group + 8, thread * 2 + (i & 1)) for i in range(4)]
        rows.append([a, b, d])
    return np.array([number for lane in rows for matrix in lane for pair in matrix for number in pair])


@pytest.mark.parametrize("dtype", ["fp16", "tf32"])
def test_fragments_are_those_of_the_ptx_manual(plain, dtype):
    expected = _positions_in_manual(dtype)
    assert np.array_equal(_run(plain, f"positions_{dtype}")[: expected.size], expected)


def test_tf32_rounds_to_nearest_ties_away_from_zero(plain):
    pi = -np.round(np.float32(np.pi) * 2**9) / 2**9
    large = np.round(np.float32(1e30) / np.float32(2.0**89)) * 2.0**89
    expected = np.float32([1, pi, 1 + 2**-10, 1 + 2**-10, 1, large, np.inf, np.nan])
    assert np.array_equal(_run(plain, "round_to_tf32")[:8], expected, equal_nan=True)


# ---- Sanitizers: in a process of its own, which they end ----


def _run_sanitized(library, case, order="forward"):
    code = (
        "import ctypes, sys\n"
        "library = ctypes.CDLL(sys.argv[1])\n"
        "library.run_case.restype = ctypes.c_char_p\n"
        "for case in sys.argv[2:]:\n"
        "    error = library.run_case(case.encode(), (ctypes.c_float * 4096)())\n"
        "    print(case, error.decode() if error else 'ran to its end')\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(library), *([case] if isinstance(case, str) else case)],
        env={**os.environ, **host.sanitizer_environment(), "FASTSEG_HOST_ORDER": order},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("order", ["forward", "shuffled:1"])
def test_sanitizers_accept_correct_kernels_and_errors(sanitized_path, order):
    right = [*EXPECTED, "global_in_bounds", "shared_in_bounds"]
    wrong = ["divergent_barrier", "missing_lane", "throws", "trap"]
    result = _run_sanitized(sanitized_path, [*right, *wrong, *right], order)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.count("ran to its end") == 2 * len(right)


@pytest.mark.parametrize(
    ("bug", "words"),
    [
        ("global_read_beyond_end", ["heap-buffer-overflow", "READ of size 4", "touch_global"]),
        ("global_write_before_start", ["heap-buffer-overflow", "WRITE of size 4", "touch_global"]),
        ("dynamic_shared_read_beyond_end", ["heap-buffer-overflow", "READ of size 4", "touch_shared"]),
        ("static_shared_read_beyond_end", ["heap-buffer-overflow", "READ of size 4", "touch_shared"]),
        ("copy_beyond_end", ["heap-buffer-overflow", "READ of size 1 at", "copy_beyond_end"]),
        ("misaligned_vector", ["misaligned address", "float4", SOURCE]),
        ("signed_overflow", ["signed integer overflow: 1073741824 * 2", SOURCE]),
    ],
)
def test_sanitizers_report(sanitized_path, bug, words):
    result = _run_sanitized(sanitized_path, bug)
    assert result.returncode != 0
    assert [word for word in words if word not in result.stderr] == []


# ---- Building ----


def test_plain_shared_variable_is_refused_with_advice(tmp_path):
    source = tmp_path / "kernel.cu"
    source.write_text('#include "csrc/common/launch.cuh"\n__global__ void kernel() { __shared__ float tile[8]; }\n')
    with pytest.raises(host.BuildError, match="declare shared memory by FASTSEG_SHARED"):
        host.build([source], "refused")


def test_library_is_rebuilt_when_a_header_changes(tmp_path):
    source, header = tmp_path / "number.cpp", tmp_path / "number.h"
    source.write_text('#include "number.h"\nextern "C" int number() { return NUMBER; }\n')
    libraries = []
    for number in (1, 2, 1):
        header.write_text(f"#define NUMBER {number}\n")
        libraries.append(host.build([source], "number"))
        assert ctypes.CDLL(str(libraries[-1])).number() == number
    assert libraries[0] == libraries[2] != libraries[1]


def test_overlay_replaces_a_header(tmp_path):
    (tmp_path / "csrc" / "common").mkdir(parents=True)
    (tmp_path / "csrc" / "common" / "conv_shape.h").write_text("#define NUMBER 3\n")
    source = tmp_path / "number.cpp"
    source.write_text('#include "csrc/common/conv_shape.h"\nextern "C" int number() { return NUMBER; }\n')
    library = host.build([source], "overlay", overlay=tmp_path)
    assert ctypes.CDLL(str(library)).number() == 3


def test_missing_cuda_headers_are_named(monkeypatch):
    monkeypatch.setattr(host.cuda_toolkit, "header_dirs", list)
    with pytest.raises(host.BuildError, match="no complete CUDA headers found.*pip install"):
        host.build([SOURCE], "no_headers")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_headers_compile_with_nvcc(tmp_path):
    command = ["nvcc", "-std=c++17", "-arch=sm_80", f"-I{ROOT}", "-ptx", ROOT / SOURCE, "-o", tmp_path / "out.ptx"]
    result = subprocess.run([*command, "-Werror=all-warnings"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    ptx = (tmp_path / "out.ptx").read_text()
    for instruction in (
        "cp.async.cg.shared.global",
        "cp.async.wait_group",
        "mma.sync.aligned.m16n8k16",
        "cvt.rna.tf32",
    ):
        assert instruction in ptx
