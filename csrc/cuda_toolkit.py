"""Finds the CUDA compiler: a system toolkit, or the one that pip installs beside torch.

Used by setup.py, by the tests that compile kernels, and by nothing at run time.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# nvcc from pip must match torch's CUDA in all three parts; without pins they do not match each other.
PIP_COMPILER = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-cccl==13.0.*",
)
INSTALL_HINT = (
    "install it with `pip install " + " ".join(f"'{p}'" for p in PIP_COMPILER) + "`, or install a CUDA toolkit"
)


@dataclass(frozen=True)
class Toolkit:
    """A CUDA compiler with what is needed to use it."""

    home: Path
    nvcc: Path
    version: str  # "13.0"
    include_dirs: tuple[Path, ...]
    library_dirs: tuple[Path, ...]


def pip_cuda_home() -> Path | None:
    """The folder nvidia/cu13 that torch's own dependencies (and nvcc from pip) install into, when there is one."""
    try:
        files = importlib.metadata.files("nvidia-cuda-runtime") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == "cuda_runtime_api.h":
            return Path(file.locate()).resolve().parent.parent
    return None


def _homes() -> list[Path]:
    """Where a compiler may be, best first."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    if on_path is not None:
        # nvcc on PATH may be a wrapper script in another folder, so nvcc itself is asked where it lives.
        dry_run = subprocess.run([on_path, "--dryrun", "-c", "any.cu"], capture_output=True, text=True, check=False)
        top = re.search(r"^#\$ TOP=(.*)$", dry_run.stderr + dry_run.stdout, re.MULTILINE)
        homes.append(Path(top.group(1).strip()) if top else Path(on_path).resolve().parent.parent)
    pip_home = pip_cuda_home()
    if pip_home is not None:
        homes.append(pip_home)
    homes.append(Path("/usr/local/cuda"))
    return homes


def header_dirs() -> list[Path]:
    """Every include folder that may hold CUDA headers, the best first; nvcc need not be there."""
    homes = _homes()
    folders = [home / "include" for home in homes]
    return [folder.resolve() for folder in folders if (folder / "cuda_fp16.h").exists()]


def find_toolkit() -> Toolkit | None:
    """The first compiler found, or None."""
    for home in _homes():
        nvcc = home / "bin" / "nvcc"
        if not nvcc.exists():
            continue
        text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=False).stdout
        release = re.search(r"release (\d+\.\d+)", text)
        if release is None:
            continue
        # A system toolkit may lack cusparse.h and its like, which torch's headers want: pip's folder has them.
        roots = [home.resolve()]
        pip_home = pip_cuda_home()
        if pip_home is not None and pip_home not in roots:
            roots.append(pip_home)
        includes = tuple(root / "include" for root in roots if (root / "include").is_dir())
        libraries = tuple(root / lib for root in roots for lib in ("lib64", "lib") if (root / lib).is_dir())
        return Toolkit(home.resolve(), nvcc.resolve(), release.group(1), includes, libraries)
    return None


def main(arguments: list[str]) -> int:
    """`python -m csrc.cuda_toolkit [--install-if-missing]`: says which compiler is there, or installs pip's."""
    toolkit = find_toolkit()
    if toolkit is None and "--install-if-missing" in arguments and os.environ.get("FASTSEG_CUDA", "auto") != "0":
        print("no CUDA compiler found: installing the one from pip", flush=True)
        install = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
        subprocess.run([*install, *PIP_COMPILER], check=True)
        importlib.invalidate_caches()
        toolkit = find_toolkit()
    print(f"CUDA {toolkit.version} compiler in {toolkit.home}" if toolkit else f"no CUDA compiler: {INSTALL_HINT}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
