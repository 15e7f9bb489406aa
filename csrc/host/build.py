"""Compiles CUDA kernels with g++ so that they run on the CPU (see cuda_on_cpu.h): no nvcc, no GPU.

    library = build(["tests/host/planted_bugs.cu"], "planted_bugs", sanitize=True)
    library = build_torch_library(kernels=[...], glue=[...], name="depthwise_on_cpu")

Objects and libraries are kept under build/host/ and made anew only when a source, a header of the project
that it includes, a flag, or the version of g++ or torch changes. Of CUDA only the headers are needed: those of
a toolkit, or of pip's nvidia-cuda-runtime and nvidia-cuda-crt.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from csrc import cuda_toolkit

ROOT = Path(__file__).resolve().parents[2]
BUILD_FOLDER = ROOT / "build" / "host"
EXECUTOR = ("csrc/host/executor.cpp", "csrc/host/fiber.cpp")

FLAGS = ("-std=c++17", "-DFASTSEG_HOST", "-fPIC", "-Wall", "-Wno-unknown-pragmas", f"-fmacro-prefix-map={ROOT}/=")
# -fno-strict-aliasing: kernels look at arrays through uint4* and the like, which nvcc allows.
# -fno-gnu-unique: several such libraries in one process must not share variables.
KERNEL_FLAGS = ("-fno-strict-aliasing", "-fno-gnu-unique", "-ffp-contract=off")
PLAIN_FLAGS = ("-O2",)
SANITIZER_FLAGS = (
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
)


class BuildError(RuntimeError):
    """Something that is needed is missing, or the compiler refused a source; the message says which."""


def build(
    sources: Sequence[str | Path],
    name: str,
    sanitize: bool = False,
    *,
    overlay: str | Path | None = None,
    defines: Sequence[str] = (),
) -> Path:
    """Builds a shared library from .cu (or .cpp) files without torch.

    Args:
        sources: paths, absolute or relative to the project root.
        name: of the library; its file name gets a hash of the content, so that a library that some
            process has loaded is never overwritten.
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer; run with `sanitizer_environment()`.
        overlay: a folder with changed copies of some headers, laid out as the project is, found first.
        defines: preprocessor definitions, "NAME" or "NAME=VALUE".

    Returns:
        The library's path.

    Raises:
        BuildError: no g++, no CUDA headers, or a compile error.
    """
    with _lock():
        objects = _kernel_objects(sources, sanitize, overlay, defines)
        return _link(objects, name, _sanitizer_link_flags(sanitize))


def build_torch_library(
    kernels: Sequence[str | Path],
    glue: Sequence[str | Path],
    name: str,
    sanitize: bool = False,
    *,
    overlay: str | Path | None = None,
    defines: Sequence[str] = (),
) -> Path:
    """Builds kernels and the .cpp files that bind them to torch into a library for torch.ops.load_library.

    `glue` is compiled with torch's headers and -DFASTSEG_HOST, never with the sanitizers, so that its
    slow compile happens once. The other arguments and the exceptions are those of `build`.
    """
    import torch

    # As torch.utils.cpp_extension.include_paths(), whose import complains about machines without a GPU.
    torch_headers = Path(torch.__file__).parent / "include"
    abi = int(torch.compiled_with_cxx11_abi())
    flags = [
        *_cuda_include_flags(),
        f"-isystem{torch_headers}",
        f"-isystem{torch_headers / 'torch' / 'csrc' / 'api' / 'include'}",
        f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
        f"-DFASTSEG_TORCH_VERSION={torch.__version__}",
        *(f"-D{define}" for define in defines),
        "-O1",
    ]
    libraries = Path(torch.__file__).parent / "lib"
    link_flags = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
    with _lock():
        objects = _kernel_objects(kernels, sanitize, overlay, defines)
        objects += _compile_all((source, flags) for source in glue)
        return _link(objects, name, [*_sanitizer_link_flags(sanitize), *link_flags])


def sanitizer_environment() -> dict[str, str]:
    """Environment variables with which a Python process can load a library built with sanitize=True.

    Sanitizers must be in the process from its start, and libstdc++ with them: AddressSanitizer looks up
    `__cxa_throw` only once. Leaks are not looked for, because Python itself leaks; nor globals of one name in
    several libraries, because every library built here has its own scheduler.

    Raises:
        BuildError: no g++, or no sanitizers with it.
    """
    libraries = [_runtime_library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
    return {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }


def _kernel_objects(
    sources: Iterable[str | Path], sanitize: bool, overlay: str | Path | None, defines: Iterable[str]
) -> list[Path]:
    flags = [*KERNEL_FLAGS, *_cuda_include_flags(), *(f"-D{define}" for define in defines)]
    flags += SANITIZER_FLAGS if sanitize else PLAIN_FLAGS
    jobs = []
    for source in sources:
        changed = overlay is not None and _sees_overlay(source, flags, Path(overlay).resolve())
        jobs.append((source, [f"-I{Path(overlay).resolve()}", *flags] if changed else flags))
    return _compile_all([*jobs, *((source, flags) for source in EXECUTOR)])


def _sees_overlay(source: str | Path, flags: Sequence[str], overlay: Path) -> bool:
    """Whether a file of `overlay` replaces one that `source` includes; True also while its headers are not known."""
    record = _object_file(source, _command(flags)).with_suffix(".json")
    if not record.is_file() or not _is_current(record):
        return True
    included = (Path(file) for file in json.loads(record.read_text()))
    return any((overlay / file.relative_to(ROOT)).is_file() for file in included if file.is_relative_to(ROOT))


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    """One build at a time: parallel test processes wait for the first one instead of repeating its work."""
    BUILD_FOLDER.mkdir(parents=True, exist_ok=True)
    with open(BUILD_FOLDER / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _cuda_include_flags() -> list[str]:
    for folder in cuda_toolkit.header_dirs():
        if (folder / "crt" / "host_defines.h").is_file():  # torch's own dependencies leave this one out
            return [f"-isystem{folder}"]
    raise BuildError(
        "no complete CUDA headers found in CUDA_HOME, beside nvcc or in pip's nvidia packages; "
        "`pip install nvidia-cuda-runtime==13.0.* nvidia-cuda-crt==13.0.88` brings them"
    )


def _sanitizer_link_flags(sanitize: bool) -> list[str]:
    return ["-fsanitize=address,undefined"] if sanitize else []


def _compile_all(jobs: Iterable[tuple[str | Path, Sequence[str]]]) -> list[Path]:
    """Compiles (source, flags) pairs, at most MAX_JOBS at a time, as torch's builds do."""
    workers = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda job: _compile(*job), jobs))


def _command(flags: Sequence[str]) -> list[str]:
    return [_compiler(), *flags, *FLAGS, f"-I{ROOT}"]


def _object_file(source: str | Path, command: Sequence[str]) -> Path:
    source = (ROOT / source).resolve()
    return BUILD_FOLDER / f"{source.stem}-{_hash(str(source), _compiler_version(), *command)}.o"


def _compile(source: str | Path, flags: Sequence[str]) -> Path:
    """Compiles one file, unless its object is there and made from the same content."""
    source = (ROOT / source).resolve()
    if not source.is_file():
        raise BuildError(f"no source file {source}")
    command = _command(flags)
    object_file = _object_file(source, command)
    record = object_file.with_suffix(".json")
    if object_file.is_file() and _is_current(record):
        return object_file

    with tempfile.TemporaryDirectory(dir=BUILD_FOLDER) as folder:
        new_object, depend = Path(folder) / "object.o", Path(folder) / "depend"
        _run([*command, "-x", "c++", "-c", source, "-o", new_object, "-MMD", "-MF", depend], f"compiling {source}")
        # A make rule, "object: file file \ file": what it names are the source and its headers,
        # except those of the system, of CUDA and of torch.
        names = depend.read_text().replace("\\\n", " ").split(": ", 1)[1].replace("\\ ", "\0").split()
        files = [str(Path(name.replace("\0", " ")).resolve()) for name in names]
        new_record = Path(folder) / "record"
        new_record.write_text(json.dumps({file: _hash_file(file) for file in files}))
        record.unlink(missing_ok=True)
        new_object.replace(object_file)
        new_record.replace(record)
    return object_file


def _is_current(record: Path) -> bool:
    """Whether all files that an object was made from are as they were then."""
    try:
        hashes = json.loads(record.read_text())
        return all(_hash_file(file) == value for file, value in hashes.items())
    except (OSError, ValueError):
        return False


def _link(objects: Sequence[Path], name: str, flags: Sequence[str]) -> Path:
    key = _hash(name, _compiler_version(), *flags, *(_hash_file(file) for file in objects))
    library = BUILD_FOLDER / f"{name}-{key}.so"
    if not library.is_file():
        with tempfile.TemporaryDirectory(dir=BUILD_FOLDER) as folder:
            new_library = Path(folder) / "library.so"
            _run([_compiler(), "-shared", "-o", new_library, *objects, *flags, "-ldl"], f"linking {name}")
            new_library.replace(library)
    return library


def _run(command: Sequence[str | Path], doing: str) -> None:
    # A sanitizer that is preloaded into this process is not for the compiler.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)
    if result.returncode != 0:
        raise BuildError(f"{doing} failed:\n{result.stderr}")
    if result.stderr:
        print(result.stderr, file=sys.stderr)


def _compiler() -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        raise BuildError("no g++ found: install the GNU C++ compiler")
    return compiler


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([_compiler(), "--version"], capture_output=True, text=True, check=True).stdout


def _runtime_library(name: str) -> str:
    command = [_compiler(), f"-print-file-name={name}"]
    path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    if not path.is_file():  # g++ answers with the bare name when it does not know
        raise BuildError(f"g++ has no {name}: install the sanitizers' runtime libraries of this g++")
    return str(path.resolve())


def _hash(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]


def _hash_file(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
