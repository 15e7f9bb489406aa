"""Every kernel variant compiles without a GPU, spills nothing, and takes no more than resources.csv says it did."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton")

from tests.offline.compile_table import (
    REGENERATE,
    TABLE,
    Key,
    Table,
    compile_everything,
    compile_launch,
    cuda_sources,
    lost_values,
    nvcc_compiler,
    read_table,
    spills_in_products,
    triton_compiler,
)
from tests.offline.triton_cases import DilatedCase

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") == "1", reason="TRITON_INTERPRET=1: kernels are interpreted, not compiled"
)

COMMITTED = read_table()
COMPILERS = {"triton": triton_compiler(), "nvcc": nvcc_compiler()}


@pytest.fixture(scope="session")
def compiled() -> Table:
    return compile_everything()


def rows_of(compiled: Table, name: str) -> Table:
    """What the compiler called `name` made; skips where it made nothing."""
    if COMPILERS[name] is None:
        pytest.skip("no nvcc found: the CUDA C++ kernels were not compiled")
    if name == "nvcc" and not cuda_sources():
        pytest.skip("there is no .cu file")
    return {key: row for key, row in compiled.items() if key.compiler == COMPILERS[name]}


@pytest.mark.parametrize("key", sorted(COMMITTED), ids=" ".join)
def test_resources_do_not_grow(compiled, key: Key):
    if key.compiler not in COMPILERS.values():
        pytest.skip(f"{key.compiler} is not installed; installed: {COMPILERS}")
    assert key in compiled, f"no longer compiled: drop the row with `{REGENERATE}`"
    now, committed = compiled[key], COMMITTED[key]
    grown = [name for name in ("registers", "shared") if getattr(now, name) > getattr(committed, name)]
    assert not grown, f"now {now}, committed {committed}: make {grown} smaller, or accept it with `{REGENERATE}`"


@pytest.mark.parametrize("name", COMPILERS)
def test_table_is_complete(compiled, name: str):
    rows = rows_of(compiled, name)
    if not any(key.compiler == COMPILERS[name] for key in COMMITTED):
        pytest.skip(f"{TABLE.name} has no rows of {COMPILERS[name]}: add them with `{REGENERATE}`")
    missing = [" ".join(key) for key in rows if key not in COMMITTED]
    assert not missing, f"not in {TABLE.name}: add them with `{REGENERATE}`\n" + "\n".join(missing)


def test_a_value_that_a_loop_loses_is_noticed():
    loop = "%r:2 = scf.for %i = %a to %b step %c iter_args(%p = %x, %t = %y) -> ({})  : i32 {{"
    whole, without = loop.format("i32, tensor<16x64xf32>"), loop.format("tensor<16x64xf32, #blocked>")
    assert lost_values(whole, without) == ["i32, tensor<16x64xf32>"]
    assert lost_values(without, without) == lost_values(whole, loop.format("i32, tensor<16x64xf32, #mma>")) == []
    plain = "scf.for %i = %a to %b step %c  : i32 {"
    assert lost_values(plain, plain) == lost_values(whole + "\n" + plain, without) == []


def test_products_that_wait_for_each_other_are_refused(tmp_path, monkeypatch):
    """As those of a loop that may be empty do."""
    from fastseg.ops.dilated.triton_plan import WIDE_CONFIGS

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, arguments = DilatedCase(tile=WIDE_CONFIGS[0], target=90).launches()[0]
    assert arguments["HAS_STEPS"]
    compile_launch(kernel, arguments, 90)
    with pytest.raises(RuntimeError, match="products wait for each other"):
        compile_launch(kernel, arguments | {"HAS_STEPS": False}, 90)


def test_spills_in_the_inner_loop_are_noticed():
    code = ["STL [R1], R2", "HGMMA.64x256x16 R24", "LDGSTS [R2]", "{}", "@P0 BRA 0x0010", "LDL R2, [R1]", "BRA 0x0000"]
    sass = "".join(f"/*{16 * i:04x}*/ {line} ;\n" for i, line in enumerate(code))
    assert spills_in_products(sass.format("NOP")) == []
    assert spills_in_products(sass.format("LDL R3, [R1]")) == ["LDL R3, [R1]"]


# These spill between two tiles; what their inner loops may read of it, triton_rows checks.
SPILLS_BETWEEN_TILES = ("dilated_forward_shared", "dilated_grad_input_shared")


@pytest.mark.parametrize("name", COMPILERS)
def test_nothing_spills(compiled, name: str):
    rows = {key: row for key, row in rows_of(compiled, name).items() if not key.kernel.startswith(SPILLS_BETWEEN_TILES)}
    spilled = [f"{' '.join(key)}: {row}" for key, row in rows.items() if row.stack]
    assert not spilled, "stack means spilled registers (or an array indexed at run time):\n" + "\n".join(spilled)
