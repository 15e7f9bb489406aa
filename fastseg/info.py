"""info: what this installation is, what it was built with, which backends can run here, and what was measured."""

from __future__ import annotations

import dataclasses
import os
import platform
import re

import torch

from fastseg import dispatch, extension, winners
from fastseg.counters import first_calls


@dataclasses.dataclass
class Info:
    """What `fastseg.info` found; str() is a readable text."""

    versions: dict[str, str]
    build: dict[str, str]
    devices: list[str]
    backends: dict[str, dict[str, str | None]]  # device type -> backend -> why it cannot run, or None
    tuning: dict[str, str]  # device type -> where its winners are and how many; what first calls cost in this process

    def __str__(self) -> str:
        lines = ["versions", *_pairs(self.versions), "build", *_pairs(self.build), "devices"]
        lines += [f"  {device}" for device in self.devices]
        for device_type, reasons in self.backends.items():
            lines.append(f"backends for {device_type} tensors (depthwise convolution, float32)")
            states = {name: "runs" if reason is None else f"cannot run: {reason}" for name, reason in reasons.items()}
            lines += _pairs(states)
        lines += ["tuning", *_pairs(self.tuning)]
        return "\n".join(lines)


def info() -> Info:
    """Versions, build, devices, for each backend whether it can run here and if not why, and the tables of tuning.

    Returns:
        An Info: `print` it, or read `.versions`, `.build`, `.devices`, `.backends` and `.tuning`.

    Example:
        >>> import fastseg
        >>> fastseg.info().backends["cpu"]["native"] is None
        True
    """
    return Info(
        versions=_versions(),
        build=_build(),
        devices=_devices(),
        backends={device_type: _reasons(device_type) for device_type in ("cpu", "cuda")},
        tuning=_tuning(),
    )


def _versions() -> dict[str, str]:
    import fastseg

    try:
        import triton
    except ImportError as error:
        triton_version = f"does not import: {error}"
    else:
        triton_version = triton.__version__
    return {
        "fastseg": fastseg.__version__,
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none, a build for CPUs",
        "triton": triton_version,
        "python": platform.python_version(),
    }


def _build() -> dict[str, str]:
    record = extension.BUILD
    missing, cuda_missing = extension.MISSING, extension.cuda_missing()
    found = {"C++ kernels": "there" if missing is None else f"missing: {missing}"}
    found["CUDA C++ kernels"] = "there" if cuda_missing is None else f"missing: {cuda_missing}"
    for label, key in (("built for torch", "torch"), ("CUDA", "cuda"), ("compiler", "compiler")):
        if record.get(key):
            found[label] = str(record[key])
    if record.get("arch_list"):
        flags = " ".join(record["arch_list"])  # nvcc's -gencode flags, or TORCH_CUDA_ARCH_LIST
        found["architectures"] = " ".join(re.findall(r",code=(\w+)", flags)) or flags
    return found


def _devices() -> list[str]:
    found = [f"CPU: {platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores{_instructions()}"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        capability = f"sm_{properties.major}{properties.minor}"
        found.append(f"cuda:{index}: {properties.name}, {capability}, {memory:.0f} GiB")
    if len(found) == 1:
        found.append("no CUDA device")
    return found


def _instructions() -> str:
    if extension.EXTENSION is None:
        return f", torch uses {torch.backends.cpu.get_cpu_capability()}"
    return f", kernels use {extension.EXTENSION.cpu_capability()}"


def _reasons(device_type: str) -> dict[str, str | None]:
    problem = dispatch.Problem("depthwise_conv2d", device_type, torch.float32)
    reasons = {name: dispatch.reason_not(name, problem) for name in dispatch.BACKENDS if name != "auto"}
    if device_type == "cuda" and not torch.cuda.is_available():
        reasons = {name: reason or "no CUDA device" for name, reason in reasons.items()}
    return reasons


def _tuning() -> dict[str, str]:
    found = {}
    for device_type in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        table = winners.table(device_type)
        shipped = f", {len(table.shipped)} come with fastseg" if table.shipped else ""
        found[device_type] = f"{len(table.own)} winners in {table.path}{shipped}"
    found["first calls"] = f"{first_calls.problems} measured in this process, in {first_calls.seconds:.1f} s"
    return found


def _pairs(values: dict[str, str]) -> list[str]:
    width = max(map(len, values), default=0)
    return [f"  {name.ljust(width)}  {value}" for name, value in values.items()]
