"""Compiles every kernel variant without a GPU and tabulates the registers, stack and shared memory each one takes.

    python tests/offline/compile_table.py            compile everything and write resources.csv
    python tests/offline/compile_table.py --print    compile everything and print the table

Triton's kernels are taken from the operators: an operator runs on meta tensors, every launch it makes is caught, and
the kernel is compiled with the arguments and specialisations of that launch. CUDA C++ is compiled with nvcc where there
is one. Registers differ between compilers, so a row belongs to one version of Triton or nvcc; rows of others stay.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).parent.parent.parent
TABLE = Path(__file__).parent / "resources.csv"
REGENERATE = "python tests/offline/compile_table.py"
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.offline.triton_cases import TRITON_CASES, Case  # noqa: E402  found from any folder now

TRITON_TARGETS = (80, 90, 100)
NVCC_TARGETS = ("sm_80", "sm_90a")
MAX_SPILLS_IN_LOOP = 1  # in 140 instructions of four products of 64 x 256 x 16


class Key(NamedTuple):
    """What a row is about. `kernel` names the variant as well."""

    compiler: str  # "triton 3.6.0" or "nvcc 13.0.88"
    target: str  # "sm_90"
    kernel: str


class Resources(NamedTuple):
    """Registers and bytes of stack of a thread (spills show there), and bytes of shared memory of a block."""

    registers: int
    stack: int
    shared: int


Table = dict[Key, Resources]


def read_table(path: Path = TABLE) -> Table:
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {
            Key(row["compiler"], row["target"], row["kernel"]): Resources(*(int(row[f]) for f in Resources._fields))
            for row in csv.DictReader(file)
        }


def write_table(table: Table, file) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow((*Key._fields, *Resources._fields))
    writer.writerows((*key, *table[key]) for key in sorted(table))


def triton_compiler() -> str:
    import triton

    return f"triton {triton.__version__}"


def compile_launch(kernel, arguments: dict, target: int):
    """Compile what `kernel[grid](**arguments)` would, with the specialisations that Triton would choose."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    arguments = dict(arguments)
    while not isinstance(kernel, triton.JITFunction):  # under triton.heuristics
        arguments |= {name: derive(arguments) for name, derive in kernel.values.items()}
        kernel = kernel.fn
    gpu = GPUTarget("cuda", target, 32)
    backend = make_backend(gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**arguments)
    options, signature, constants, attributes = kernel._pack_args(backend, arguments, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    with triton.knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as log:
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=gpu, options=options.__dict__)
    if "wgmma.mma_async instructions are serialized" in log.getvalue():
        raise RuntimeError(f"ptxas lets the tensor core's products wait for each other:\n{log.getvalue()}")
    return compiled


def lost_values(early: str, late: str) -> list[str]:
    """Loops of a kernel that carry fewer scalars in Triton's later representation than in its earlier one.

    Triton 3.6 may take a scalar for constant that one loop carries and an inner loop starts from, and then computes
    something else than the interpreter. Tensors come and go for good reasons, as loads are moved ahead.
    """

    def carried(text: str) -> list[tuple[str, int]]:
        loops = re.findall(r"(scf\.for) [^\n]*?(?:-> \(([^\n]*?)\)  : i32|: i32 \{)", text)
        return [(types, len(re.findall(r"(?:^|, )(?:i|f|!tt\.ptr<\w+)\d+", types))) for _, types in loops]

    before, after = carried(early), carried(late)
    if len(before) != len(after):
        return []  # a loop was unrolled or joined with another: they cannot be compared
    return [types for (types, scalars), (_, left) in zip(before, after, strict=True) if left < scalars]


def spills_in_products(sass: str) -> list[str]:
    """The accesses to spilled registers in the loop that multiplies on tensor cores, of a kernel's SASS."""
    lines = [(int(m[1], 16), m[2].strip()) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)]
    jumps = [(int(m[1], 16), at) for at, line in lines if (m := re.search(r"\bBRA\b[^;]* 0x([0-9a-f]+)", line))]
    bodies = [[line for at, line in lines if first <= at <= last] for first, last in jumps if first <= last]
    loops = [body for body in bodies if any("GMMA" in line for line in body)]
    return [line for line in min(loops, key=len, default=[]) if re.search(r"\b(LDL|STL)\b", line)]


def triton_rows(case: Case, target: int) -> Table:
    """The rows of one case. Runs in a worker process."""
    rows = {}
    for kernel, arguments in case.launches():
        compiled = compile_launch(kernel, arguments, target)
        if lost := lost_values(compiled.asm["ttir"], compiled.asm["ttgir"]):
            raise RuntimeError(f"Triton has dropped a value that a loop of [{case}] carries: one of ({lost[0]})")
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            ((name, resources),) = cubin_resources(Path(file.name)).items()
            spills = spills_in_products(_report(Path(file.name), "-sass")) if resources.stack else []
            if len(spills) > MAX_SPILLS_IN_LOOP:
                raise RuntimeError(f"the inner loop of {name} [{case}] has spilled registers: {', '.join(spills)}")
        key = Key(triton_compiler(), f"sm_{target}", f"{name} [{case}]")
        rows[key] = resources._replace(shared=compiled.metadata.shared)  # Triton's shared memory is dynamic
    return rows


def cubin_resources(cubin: Path) -> dict[str, Resources]:
    """What each kernel takes, by its name as the linker knows it."""
    return _resources(_report(cubin))


def _report(binary: Path, option: str = "-res-usage") -> str:
    """What cuobjdump (Triton's wheel brings one) says of the kernels in a file."""
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, option, str(binary)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _resources(report: str) -> dict[str, Resources]:
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", report)
    return {name: Resources(*map(int, numbers)) for name, *numbers in found}


def nvcc_compiler() -> str | None:
    """The name and version of nvcc, or None with a message when there is none."""
    from csrc.cuda_toolkit import INSTALL_HINT, find_toolkit

    toolkit = find_toolkit()
    if toolkit is None:
        print(f"no nvcc found, so the CUDA C++ kernels are not compiled: {INSTALL_HINT}", file=sys.stderr)
        return None
    version = subprocess.run([toolkit.nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return f"nvcc {re.search(r'V([0-9.]+)', version).group(1)}"


def built_rows() -> Table | None:
    """The rows of the CUDA C++ kernels in the extension, where it was built from these sources, else None.

    Compiling them once more would take most of the time that the table takes.
    """
    from csrc.cuda_toolkit import find_toolkit
    from csrc.sources import digest_of_sources
    from fastseg import extension

    if extension.EXTENSION is None or extension.BUILD.get("kernels") != digest_of_sources():
        return None
    toolkit = find_toolkit()
    if toolkit is None or extension.BUILD["cuda"] != toolkit.version:
        return None
    rows = {}
    for cubin in _report(Path(extension.EXTENSION.__file__)).split("Fatbin elf code:")[1:]:
        if resources := _resources(cubin):
            source, target = (re.search(rf"{field} = (\S+)", cubin).group(1) for field in ("identifier", "arch"))
            rows |= _nvcc_table(resources, Path(source), target)
    return rows if {key.target for key in rows} == set(NVCC_TARGETS) else None


def nvcc_rows(source: Path, target: str) -> Table:
    """The rows of one .cu file: one for each kernel it instantiates. Runs in a worker process."""
    from csrc.cuda_toolkit import find_toolkit

    toolkit = find_toolkit()
    includes = [f"-I{folder}" for folder in (ROOT, *toolkit.include_dirs)]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [toolkit.nvcc, "-cubin", f"-arch={target}", "-O3", "-std=c++17", "--expt-relaxed-constexpr"]
        subprocess.run([*command, *includes, "-o", cubin, source], check=True)
        return _nvcc_table(cubin_resources(cubin), source, target)


def _nvcc_table(resources: dict[str, Resources], source: Path, target: str) -> Table:
    compiler = nvcc_compiler()
    names = [f"{name} [{Path(*source.parts[-3:])}]" for name in demangled(resources)]
    return {Key(compiler, target, name): row for name, row in zip(names, resources.values(), strict=True)}


def demangled(names: Iterable[str]) -> list[str]:
    """C++ names without return type and parameters: what tells two instantiations apart are the template arguments."""
    program = shutil.which("cu++filt") or shutil.which("c++filt")
    if program is None:
        raise RuntimeError("c++filt is not installed: it comes with g++ (binutils)")
    text = "\n".join(names)
    lines = subprocess.run([program], input=text, capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"\([^()]*\)$", "", line).removeprefix("void ") for line in lines]


def cuda_sources() -> list[Path]:
    return sorted(ROOT.glob("csrc/*/*.cu"))


def jobs(without_nvcc: bool) -> Iterator[tuple]:
    """(function, *arguments) of every piece of work; each returns rows."""
    for target in TRITON_TARGETS:
        yield from ((triton_rows, case, target) for cases in TRITON_CASES for case in cases(target))
    if cuda_sources() and not without_nvcc and nvcc_compiler() is not None:
        yield from ((nvcc_rows, source, target) for source, target in itertools.product(cuda_sources(), NVCC_TARGETS))


def _run(job: tuple) -> Table:
    function, *arguments = job
    return function(*arguments)


def compile_everything(workers: int | None = None) -> Table:
    """The rows of every compiler that is installed."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set: kernels are interpreted in this process, not compiled")
    workers = workers or os.cpu_count() or 1
    table = built_rows() or {}
    with (
        # Kernels that many cases launch are compiled once; what somebody's own cache holds would show no log of ptxas.
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": cache}),
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
    ):
        for rows in pool.map(_run, list(jobs(without_nvcc=bool(table)))):
            table |= rows
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print the table instead of writing it")
    parser.add_argument("--jobs", type=int, help="processes (default: one a core)")
    arguments = parser.parse_args()
    compiled = compile_everything(arguments.jobs)
    if arguments.print:
        write_table(compiled, sys.stdout)
        return
    compilers = {key.compiler for key in compiled}
    kept = {key: row for key, row in read_table().items() if key.compiler not in compilers}
    with TABLE.open("w", newline="") as file:
        write_table(kept | compiled, file)
    print(f"{TABLE.relative_to(ROOT)}: {len(compiled)} rows of {', '.join(sorted(compilers))}, {len(kept)} rows kept")


if __name__ == "__main__":
    main()
