"""The record: one JSON with everything a run found and what it was found on. Reports and tables come from it alone.

Its keys:
schema     1
created    UTC, ISO 8601
finished   the same of the end; None while the run goes on, and where it was interrupted
commit     git commit; dirty says whether files differed from it
kernels    path -> sha256 of every kernel source
sources    sha256 of all code that is measured or measures
machine    processor, GPU, driver, versions
settings   threads, dtypes, what was selected
ceilings   measured in the same run
operators  rows (row.py) of convolutions, workload.py
networks   rows of network.py
blocks     rows of blocks.py and head.py
overhead   rows of overhead.py
skipped    {"id", "reason"} of what was not run
training   rows of train.py
data       only beside training: the pictures, and the mIoU of linear classifiers on them
stages     only from gpu.py: {"name", "status", "seconds", "detail"}
promises   only from gpu.py: test -> how many of its cases passed, failed and were skipped
failures   only from gpu.py: the first of those that failed, and what they said
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from fastseg import winners

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# The record's lists of rows, in the order they are shown in.
KINDS = ("networks", "blocks", "operators")
# Why rows that another run can make good were left out.
SPENT = "the time budget was spent"


def kernel_files(root: Path = ROOT) -> list[Path]:
    """Every source file of a kernel. csrc/host executes kernels for tests and is none."""
    sources = [p for p in (root / "csrc").rglob("*") if p.suffix in {".h", ".cuh", ".cu", ".cpp"}]
    host = root / "csrc" / "host"
    return sorted([p for p in sources if host not in p.parents] + list((root / "fastseg" / "ops").glob("*/triton*.py")))


def kernel_hashes(root: Path = ROOT) -> dict[str, str]:
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in kernel_files(root)}


def gpu_files(root: Path = ROOT) -> set[str]:
    """The kernel files that reach a GPU: Triton's, CUDA's, and whatever CUDA's include."""
    files = {path.relative_to(root).as_posix(): path for path in kernel_files(root)}
    found: set[str] = set()
    waiting = [name for name in files if name.endswith((".cu", ".cuh", ".py"))]
    while waiting:
        name = waiting.pop()
        if name in files and name not in found:
            found.add(name)
            waiting += re.findall(r'^\s*#\s*include\s+"([^"]+)"', files[name].read_text(), re.MULTILINE)
    return found


def not_yet_run_on_a_gpu(root: Path = ROOT, results: Path = RESULTS) -> list[str]:
    """Kernel files whose content differs from what the newest GPU record was made with, or that it never saw."""
    record = newest("cuda", results)
    seen = record["kernels"] if record else {}
    hashes = kernel_hashes(root)
    return [path for path in sorted(gpu_files(root)) if seen.get(path) != hashes[path]]


def committed(device: str, results: Path = RESULTS) -> list[dict]:
    """The committed records of "cpu" or "cuda", the newest first."""
    records = [load(path) for path in sorted(results.glob("*.json"))]
    return sorted((r for r in records if r["settings"]["device"] == device), key=lambda r: r["created"], reverse=True)


def newest(device: str, results: Path = RESULTS) -> dict | None:
    """The newest committed record of "cpu" or "cuda", or None."""
    return next(iter(committed(device, results)), None)


def start(settings: dict) -> dict:
    """A record with nothing measured yet."""
    return {
        "schema": SCHEMA,
        "created": _now(),
        "finished": None,
        "commit": commit(),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "kernels": kernel_hashes(),
        "sources": sources(),
        "machine": machine(settings["device"]),
        "settings": settings,
        "ceilings": {},
        "operators": [],
        "networks": [],
        "blocks": [],
        "overhead": [],
        "skipped": [],
    }


def save(record: dict, path: Path) -> None:
    """Write atomically: an interrupted run leaves the last complete record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)


def load(path: Path) -> dict:
    """Raises ValueError where the file is no record that this version reads."""
    try:
        record = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{Path(path).name} is no JSON: {error}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        got = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"expected a benchmark record of schema {SCHEMA} in {Path(path).name}, but got {got}")
    return _upgraded(record)


def finish(record: dict) -> None:
    """Note the end, and how busy the machine was: more than its threads can account for means that others ran too.

    A run that left rows out for want of time is not finished.
    """
    record["machine"]["load_at_end"] = _load()
    if all(skipped["reason"] != SPENT for skipped in record["skipped"]):
        record["finished"] = _now()


def rows(record: dict) -> list[dict]:
    return [row for kind in KINDS for row in record[kind]]


def _upgraded(record: dict) -> dict:
    """An earlier version's record as this one writes it."""
    record = {"blocks": [], "sources": None, "finished": record["created"]} | record
    for row in rows(record):
        timed = {c["name"]: c for c in row["candidates"] if "seconds" in c}
        if "baseline" not in row:
            natives = [name for name, entry in timed.items() if entry["role"] == "native"]
            row["baseline"] = min(natives, key=lambda name: timed[name]["seconds"]["median"], default=None)
        for entry in timed.values():
            to_baseline = entry.get(f"ratio to {row['baseline']}")
            if to_baseline:
                entry.setdefault("ratio", to_baseline)
    return record


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def commit() -> str | None:
    return _git("rev-parse", "HEAD")


def sources(root: Path = ROOT) -> str:
    files = [*(root / "fastseg").rglob("*.py"), *(root / "benchmarks").glob("*.py"), *kernel_files(root)]
    digest = hashlib.sha256()
    for path in sorted(set(files)):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def gates(record: dict) -> dict[str, int]:
    """How many candidates were found right and wrong."""
    found = [c["gate"]["green"] for row in rows(record) for c in row["candidates"] if "gate" in c]
    return {"green": sum(found), "red": len(found) - sum(found)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def machine(device: str) -> dict:
    """Hardware and versions, without names of hosts or users."""
    facts = {
        "device": winners.device_name("cpu" if device == "cpu" else "cuda"),
        "cpu": winners.cpu_model(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": _load(),
        "load_at_end": None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "onednn": torch.backends.mkldnn.is_available(),
    }
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "gpu_memory": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "multiprocessors": properties.multi_processor_count,
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        }
    return facts


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _version(package: str) -> str | None:
    try:
        return __import__(package).__version__
    except ImportError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
