"""The build says what it does, and each failure says what to do."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastseg
from csrc import cuda_toolkit
from fastseg import extension

ROOT = Path(__file__).parent.parent


def setup_py(*arguments, without=(), **environment):
    """Run setup.py in a fresh process; modules in `without` cannot be imported there."""
    blocked = (
        f"import sys; sys.modules.update(dict.fromkeys({list(without)!r})); sys.argv = {['setup.py', *arguments]!r};"
    )
    program = (
        blocked
        + "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__name__': '__main__', '__file__': 'setup.py'})"
    )
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


@pytest.fixture
def fake_nvcc(tmp_path):
    """A toolkit folder whose nvcc says it is of `version`."""

    def make(version: str) -> Path:
        nvcc = tmp_path / "cuda" / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.0'\n")
        nvcc.chmod(nvcc.stat().st_mode | stat.S_IEXEC)
        return tmp_path / "cuda"

    return make


def test_without_torch_the_build_says_how_to_install():
    result = setup_py("--version", without=["torch"])
    assert result.returncode != 0
    assert "pip install --no-build-isolation ." in result.stderr
    assert "Traceback" not in result.stderr


def test_cuda_of_another_major_version_is_refused_when_demanded(fake_nvcc):
    result = setup_py("--version", FASTSEG_CUDA="1", CUDA_HOME=str(fake_nvcc("11.8")))
    assert result.returncode != 0
    assert "is of CUDA 11.8, but torch" in result.stderr
    assert "set CUDA_HOME to a toolkit of CUDA" in result.stderr


def test_cuda_of_another_major_version_is_left_out_aloud(fake_nvcc):
    result = setup_py("--version", CUDA_HOME=str(fake_nvcc("11.8")))
    assert result.returncode == 0
    assert "WARNING: building WITHOUT the CUDA kernels" in result.stderr


def test_cuda_can_be_left_out():
    result = setup_py("--version", FASTSEG_CUDA="0")
    assert "WITHOUT the CUDA kernels: FASTSEG_CUDA=0 was set" in result.stderr


def test_unknown_switch_is_refused():
    result = setup_py("--version", FASTSEG_CUDA="yes")
    assert result.returncode != 0
    assert "expected FASTSEG_CUDA to be 0, 1 or auto, but got 'yes'" in result.stderr


def test_without_a_compiler_the_package_still_installs():
    result = setup_py("--version", CXX="no-such-compiler")
    assert result.returncode == 0
    assert "no C++ compiler (g++) was found" in result.stderr
    demanded = setup_py("--version", CXX="no-such-compiler", FASTSEG_CUDA="1")
    assert demanded.returncode != 0
    assert "install g++" in demanded.stderr


def test_without_any_nvcc_the_hint_names_the_pinned_packages(monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_toolkit, "_homes", lambda: [tmp_path])
    assert cuda_toolkit.find_toolkit() is None
    assert "nvidia-cuda-nvcc==13.0.88" in cuda_toolkit.INSTALL_HINT


def test_nvcc_behind_a_wrapper_is_asked_where_it_lives(monkeypatch, tmp_path):
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    real = home / "bin" / "nvcc"
    real.write_text("#!/bin/sh\necho 'release 13.0, V13.0.88'\n")
    wrapper = tmp_path / "path" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f"#!/bin/sh\necho '#$ TOP={home}/bin/..'\n")
    for script in (real, wrapper):
        script.chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    assert cuda_toolkit.find_toolkit().home == home


def test_pip_cuda_headers_are_found_beside_torch():
    if torch.version.cuda is None:
        pytest.skip("torch without CUDA brings no CUDA headers")
    assert (cuda_toolkit.pip_cuda_home() / "include" / "cuda_runtime_api.h").exists()


def test_the_build_is_recorded():
    assert extension.EXTENSION is not None, extension.MISSING
    assert extension.BUILD["torch"] == torch.__version__
    assert extension.EXTENSION.has_cuda == (extension.BUILD["cuda"] is not None)
    assert extension.EXTENSION.cpu_capability() in ("avx512", "avx2", "plain")


def test_an_extension_of_another_torch_is_not_loaded(tmp_path):
    """The record of the build is compared before the library is opened: no undefined symbols, but a sentence."""
    package = tmp_path / "fastseg"
    subprocess.run(["cp", "-r", str(ROOT / "fastseg"), str(package)], check=True)
    record = json.loads((package / "_build.json").read_text()) | {"torch": "1.0.0"}
    (package / "_build.json").write_text(json.dumps(record))
    program = (
        "import fastseg, torch; print(fastseg.ops.depthwise_conv2d(torch.ones(1,2,3,3), torch.ones(2,1,3,3)).sum())"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "the extension was built for torch 1.0.0 and this is torch" in result.stderr
    assert "18." in result.stdout


def test_a_python_only_package_imports_and_works(tmp_path):
    package = tmp_path / "fastseg"
    subprocess.run(["cp", "-r", str(ROOT / "fastseg"), str(package)], check=True)
    for built in (*package.glob("_C*.so"), package / "_build.json"):
        built.unlink(missing_ok=True)
    program = (
        "import fastseg, torch; x, w = torch.ones(1, 2, 3, 3), torch.ones(2, 1, 3, 3);"
        "print(fastseg.ops.conv2d(x, w, groups=2).sum());"
        "print(fastseg.ops.conv2d(x, w, groups=2, backend='reference').sum());"
        "fastseg.ops.conv2d(x, w, groups=2, backend='cpu')"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stdout.count("18.") == 2
    assert "BackendError: backend 'cpu' cannot run depthwise_conv2d: the extension is not built" in result.stderr


def test_version_is_the_packages():
    assert fastseg.__version__ in (ROOT / "pyproject.toml").read_text()
