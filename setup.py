"""Builds fastseg and its extension `fastseg._C`: C++ kernels for the CPU, and CUDA kernels when a compiler is found.

Environment:
    FASTSEG_CUDA=0|1|auto   leave CUDA out, demand it, or build it when nvcc is found and torch is a CUDA build (auto)
    TORCH_CUDA_ARCH_LIST    as for every PyTorch extension; default: sm_80, sm_90a and PTX of compute_90
    MAX_JOBS                parallel compilers; default: by cores and free memory
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))

try:
    import torch
except ImportError:
    sys.exit(
        "fastseg builds against the torch you already have, and this build cannot see one. "
        "Install torch first, then use `pip install --no-build-isolation .`"
    )

from csrc.cuda_toolkit import INSTALL_HINT, find_toolkit  # noqa: E402
from csrc.sources import digest_of_sources  # noqa: E402

DEFAULT_ARCHITECTURES = ("-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a")
# PTX that every later GPU can compile when it is loaded; PTX of 90a would run on Hopper alone.
FORWARD_COMPATIBLE = "-gencode=arch=compute_90,code=compute_90"
GIB_PER_COMPILER = 3


def say(text):
    print(f"fastseg: {text}", file=sys.stderr, flush=True)


def default_jobs():
    """Parallel compilers that fit into memory: one that runs out of it takes the machine along."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        text = Path("/proc/meminfo").read_text()
        free = int(text.split("MemAvailable:")[1].split()[0]) / 2**20
    except (OSError, IndexError, ValueError):
        return cores
    return max(1, min(cores, int(free / GIB_PER_COMPILER)))


def cuda_or_reason():
    """(toolkit, None), or (None, why the CUDA kernels are left out). Exits when FASTSEG_CUDA=1 cannot be met."""
    wanted = os.environ.get("FASTSEG_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"fastseg: expected FASTSEG_CUDA to be 0, 1 or auto, but got {wanted!r}")
    if wanted == "0":
        return None, "FASTSEG_CUDA=0 was set when fastseg was built"
    toolkit = find_toolkit()
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a build without CUDA: install a CUDA build of torch"
    elif toolkit is None:
        reason = f"no CUDA compiler (nvcc) was found: {INSTALL_HINT}"
    elif toolkit.version.split(".")[0] != torch.version.cuda.split(".")[0]:
        reason = (
            f"nvcc in {toolkit.home} is of CUDA {toolkit.version}, but torch {torch.__version__} is built for CUDA "
            f"{torch.version.cuda}: set CUDA_HOME to a toolkit of CUDA {torch.version.cuda.split('.')[0]}"
        )
    else:
        return toolkit, None
    if wanted == "1":
        sys.exit(f"fastseg: FASTSEG_CUDA=1, but {reason}")
    return None, reason


def extension_or_reason():
    """(BuildExtension command, extension, build record), the first two None when there is no C++ compiler."""
    record = {"torch": torch.__version__, "cuda": None, "arch_list": [], "python": sys.version.split()[0]}
    compiler = os.environ.get("CXX", "g++" if shutil.which("g++") else "c++")
    if shutil.which(compiler.split()[0]) is None:
        reason = "no C++ compiler (g++) was found when fastseg was built: install g++ and build again"
        if os.environ.get("FASTSEG_CUDA") == "1":
            sys.exit(f"fastseg: FASTSEG_CUDA=1, but {reason}")
        say(f"WARNING: {reason}. Installing without the extension: Triton and native operators still work.")
        return None, None, {**record, "extension_left_out": reason}
    version = subprocess.run([compiler.split()[0], "--version"], capture_output=True, text=True, check=False).stdout
    record["compiler"] = version.splitlines()[0] if version else compiler
    record["kernels"] = digest_of_sources()

    toolkit, reason = cuda_or_reason()
    if toolkit is not None:
        os.environ["CUDA_HOME"] = str(toolkit.home)  # torch looks this up when cpp_extension is imported
    os.environ.setdefault("MAX_JOBS", str(default_jobs()))
    from torch.utils import cpp_extension

    sources = ["csrc/binding.cpp", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*/*_cpu.cpp"))]
    options = {
        "include_dirs": [str(ROOT)],
        "extra_compile_args": {"cxx": ["-O3", "-fopenmp", "-ffp-contract=fast", "-fvisibility=hidden", "-g0"]},
        "extra_link_args": ["-fopenmp"] if sys.platform != "darwin" else [],
    }
    if toolkit is None:
        say(f"WARNING: building WITHOUT the CUDA kernels: {reason}")
        record["cuda_left_out"] = reason
        return cpp_extension.BuildExtension, cpp_extension.CppExtension("fastseg._C", sources, **options), record

    architectures = []
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        architectures = [*DEFAULT_ARCHITECTURES, FORWARD_COMPATIBLE]
    record["cuda"] = toolkit.version
    record["arch_list"] = architectures or os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", " ").split()
    say(f"building with the CUDA kernels: CUDA {toolkit.version} in {toolkit.home}, {' '.join(record['arch_list'])}")
    sources += sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*/*_cuda.cpp"))
    sources += sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*/*.cu"))
    options["define_macros"] = [("FASTSEG_WITH_CUDA", None)]
    options["include_dirs"] += [str(folder) for folder in toolkit.include_dirs]
    options["library_dirs"] = [str(folder) for folder in library_dirs(toolkit)]
    options["extra_compile_args"]["nvcc"] = ["-O3", "-lineinfo", *architectures]
    return cpp_extension.BuildExtension, cpp_extension.CUDAExtension("fastseg._C", sources, **options), record


def library_dirs(toolkit):
    """Where the linker finds libcudart.so. Pip's wheel has only libcudart.so.13, so a link is made."""
    for folder in toolkit.library_dirs:
        if (folder / "libcudart.so").exists():
            return toolkit.library_dirs
    links = ROOT / "build" / "lib_links"
    links.mkdir(parents=True, exist_ok=True)
    for folder in toolkit.library_dirs:
        for library in folder.glob("libcudart.so.*"):
            link = links / "libcudart.so"
            link.unlink(missing_ok=True)
            link.symlink_to(library)
            return (links, *toolkit.library_dirs)
    sys.exit(f"fastseg: no libcudart.so beside nvcc in {toolkit.home}: {INSTALL_HINT}")


build_extension, extension, build_record = extension_or_reason()


def write_record(package_folder):
    folder = Path(package_folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build.json").write_text(json.dumps(build_record, indent=2) + "\n")


class BuildPy(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            write_record(Path(self.build_lib) / "fastseg")


commands = {"build_py": BuildPy}
if extension is not None:

    class BuildExt(build_extension):
        def run(self):
            super().run()
            write_record(Path(self.get_ext_fullpath("fastseg._C")).parent)

    commands["build_ext"] = BuildExt
elif "--inplace" in sys.argv or "-i" in sys.argv or "develop" in sys.argv:
    write_record(ROOT / "fastseg")

setup(
    packages=find_packages(include=["fastseg", "fastseg.*"]),
    ext_modules=[extension] if extension is not None else [],
    cmdclass=commands,
)
