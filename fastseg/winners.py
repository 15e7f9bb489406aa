"""Which backend was the fastest on this device, problem by problem: measured once, remembered in one file per device.

The file lies in the user's cache folder (FASTSEG_CACHE, else XDG_CACHE_HOME/fastseg, else ~/.cache/fastseg). It says
for which fastseg, kernels, torch and device it was made; one that was made for others, or cannot be read, is told once
and made anew. Writers take turns and replace the file as a whole, so several processes may share it. Winners that come
with the package, of devices that committed records were made on, stand behind the user's own.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from fastseg import extension

SCHEMA = 1
SHIPPED = Path(__file__).with_name("shipped_winners")

# A measurement takes turns between the candidates for about this many seconds, in rounds of calls of a millisecond.
_SECONDS, _ROUNDS, _ROUND_MS = 0.25, (7, 41), 1.0
# A kernel has to beat native by this much in the median, and in four rounds of five, to win.
_MARGIN = 1.02


class Winner(NamedTuple):
    """The fastest backend of a problem, and the median time of each in milliseconds."""

    backend: str
    ms: dict[str, float]
    shipped: bool = False

    @property
    def margin(self) -> float:
        """How many times native's time is the winner's; of native itself, the time of the best kernel over native's."""
        kernels = [ms for backend, ms in self.ms.items() if backend != "native"]
        if self.backend == "native":
            return min(kernels, default=math.nan) / self.ms["native"]
        return self.ms["native"] / self.ms[self.backend]

    def reason(self) -> str:
        source = "in the records of such a device" if self.shipped else "measured here"
        if math.isnan(self.margin):
            return f"{source}: nothing else can run it"
        loser = "the best kernel" if self.backend == "native" else "native"
        return f"{source}: {self.margin:.2f}x as fast as {loser}"


class Attempt(NamedTuple):
    """A call that can be made on any backend, and the tensors whose gradients it may have."""

    run: Callable[[str], torch.Tensor]
    tensors: tuple[torch.Tensor | None, ...] = ()
    repeatable: bool = True  # whether a call more leaves no trace, such as running statistics


# Measuring


def measure(candidates: list[str], attempt: Attempt, gradient: bool, device_type: str) -> Winner:
    """Time `attempt` on each of `candidates`, native first among them, in turns; with its backward pass if `gradient`.

    A kernel that fails where native does not cannot win.
    """
    calls = {backend: _call(attempt, backend, gradient) for backend in candidates}
    repeats = {}
    for backend, call in list(calls.items()):
        try:
            call()  # compiles, loads, allocates
            repeats[backend] = max(1, math.ceil(_ROUND_MS / max(_timed_ms(call, 1, device_type), 1e-3)))
        except RuntimeError:
            if backend == "native":
                raise
            del calls[backend]
    rounds: dict[str, list[float]] = {backend: [] for backend in calls}
    started, done = time.perf_counter(), 0
    while len(calls) > 1 and (
        done < _ROUNDS[0] or (done < _ROUNDS[1] and time.perf_counter() - started < _SECONDS * len(calls))
    ):
        for backend in list(calls) if done % 2 else reversed(calls):
            rounds[backend].append(_timed_ms(calls[backend], repeats[backend], device_type))
        done += 1
    if len(calls) == 1:
        return Winner("native", {"native": _timed_ms(calls["native"], repeats["native"], device_type)})
    return _judged(rounds)


def _judged(rounds: dict[str, list[float]]) -> Winner:
    ms = {backend: statistics.median(times) for backend, times in rounds.items()}
    best = min(ms, key=ms.__getitem__)
    if best != "native":
        ratios = sorted(n / t for n, t in zip(rounds["native"], rounds[best], strict=True))
        sure = statistics.median(ratios) >= _MARGIN and ratios[len(ratios) // 5] > 1
        best = best if sure else "native"
    return Winner(best, ms)


def _call(attempt: Attempt, backend: str, gradient: bool) -> Callable[[], object]:
    if not gradient:
        return lambda: attempt.run(backend)
    wanted = [tensor for tensor in attempt.tensors if tensor is not None and tensor.requires_grad]

    def forward_and_backward():
        y = attempt.run(backend)
        torch.autograd.grad(y, wanted, y.detach(), allow_unused=True)

    return forward_and_backward


def _timed_ms(call: Callable[[], object], repeats: int, device_type: str) -> float:
    _wait(device_type)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device_type)
    return (time.perf_counter() - start) / repeats * 1e3


def _wait(device_type: str) -> None:
    if device_type == "cuda":
        torch.cuda.synchronize()


# The table of a device


class Table:
    """The winners of one device: the user's own, and behind them those that come with the package."""

    def __init__(self, device: str, path: Path, shipped: Path):
        self.device = device
        self.path = path
        self.own = self._read_own()
        self.shipped = _read(shipped)["winners"] if shipped.exists() else {}
        self.operators = {key.partition(" ")[0] for key in (*self.own, *self.shipped)}

    def winner(self, key: str) -> Winner | None:
        if key in self.own:
            return Winner(**self.own[key])
        return Winner(**self.shipped[key], shipped=True) if key in self.shipped else None

    def add(self, key: str, winner: Winner) -> None:
        self.own[key] = {"backend": winner.backend, "ms": {name: round(ms, 6) for name, ms in winner.ms.items()}}
        self.operators.add(key.partition(" ")[0])

    def save(self) -> None:
        """Write the winners, together with those that other processes have written since; say once if it cannot."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock")):
                self.own = self._read_own(quiet=True) | self.own
                temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
                content = {"schema": SCHEMA, "made_for": made_for(self.device), "winners": self.own}
                temporary.write_text(json.dumps(content, indent=1) + "\n")
                temporary.replace(self.path)
        except OSError as error:
            _say_once(f"the winners of tuning are kept in this process only: {error}")

    def _read_own(self, quiet: bool = False) -> dict[str, dict]:
        if not self.path.exists():
            return {}
        try:
            content = _read(self.path)
            if content["made_for"] == made_for(self.device):
                return content["winners"]
            problem = "was made for another version of fastseg or torch, or another device"
        except (OSError, ValueError) as error:
            problem = f"cannot be read ({error})"
        if not quiet:
            _say_once(f"{self.path} {problem}: tuning starts anew")
        return {}


def _read(path: Path) -> dict:
    """The content of a file of winners.

    Raises ValueError where it is none.
    """
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or not isinstance(content.get("winners"), dict):
        raise ValueError("not a file of winners")
    for key, entry in content["winners"].items():
        if not isinstance(entry, dict) or set(entry) != {"backend", "ms"} or "native" not in entry["ms"]:
            raise ValueError(f"no winner of {key!r}")
    return content


def made_for(device: str) -> dict[str, str]:
    """What a table depends on."""
    import fastseg

    return {
        "fastseg": fastseg.__version__,
        "kernels": extension.BUILD.get("kernels", "none"),
        "torch": torch.__version__,
        "device": device,
    }


def cache_folder() -> Path:
    own = os.environ.get("FASTSEG_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastseg"


def device_name(device_type: str) -> str:
    """What the tables call this device. Of a CPU the number of threads decides as much as the model."""
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    instructions = "" if extension.EXTENSION is None else f", {extension.EXTENSION.cpu_capability()}"
    return f"{_cpu_model()}{instructions}, {torch.get_num_threads()} threads"


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def file_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


_tables: dict[str, Table] = {}


def table(device_type: str) -> Table:
    device = device_name(device_type)
    if device not in _tables:
        name = file_name(device)
        _tables[device] = Table(device, cache_folder() / name, SHIPPED / name)
    return _tables[device]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # no such locks on this system: the last writer wins
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


_said: set[str] = set()


def _say_once(sentence: str) -> None:
    if sentence not in _said:
        _said.add(sentence)
        warnings.warn(f"fastseg: {sentence}", stacklevel=3)


# What "auto" asks


_session: dict[str, Winner] | None = None
# (operator, device type) -> whether sizes matter to calls of it; thrown away when a table or the session changes.
_consulted: dict[tuple[str, str], bool] = {}
# Seconds that first calls of new problems took to measure, and how many there were; for `fastseg.info`.
first_calls = {"problems": 0, "seconds": 0.0}


def consulted(operator: str, device_type: str) -> bool:
    """Whether "auto" has to know the sizes of a call of `operator` to look for, or find out, its winner."""
    known = _consulted.get((operator, device_type))
    if known is None:
        known = _session is not None or _measures_first_calls(device_type)
        known = known or (device_type in ("cpu", "cuda") and operator in table(device_type).operators)
        _consulted[operator, device_type] = known
    return known


def winner(problem, candidates: list[str], attempt: Attempt | None) -> Winner | None:
    """The winner of a dispatch.Problem with sizes: remembered, or measured now where that is right; else None."""
    text = key(problem)
    if _session is not None:
        if text not in _session and attempt is not None:
            # While it is measured its own call is no news, and those inside of it are measured first.
            _session[text] = measure(candidates, attempt, problem.gradient, problem.device_type)
        return _session.get(text)
    found = table(problem.device_type)
    known = found.winner(text)
    if known is None and attempt is not None and may_measure_now(problem, attempt):
        started = time.perf_counter()
        known = measure(candidates, attempt, problem.gradient, problem.device_type)
        first_calls["problems"] += 1
        first_calls["seconds"] += time.perf_counter() - started
        found.add(text, known)
        found.save()
    return known


def is_open(problem) -> bool:
    """Whether a later call of the same problem may be measured though this one was not."""
    if _session is not None:
        return key(problem) not in _session
    if not _measures_first_calls(problem.device_type):
        return False
    return table(problem.device_type).winner(key(problem)) is None


def _measures_first_calls(device_type: str) -> bool:
    return device_type == "cuda" and os.environ.get("FASTSEG_TUNE", "1") != "0"


def may_measure_now(problem, attempt: Attempt) -> bool:
    """Whether the first call of a new problem may be measured: on a GPU, and where nobody could tell."""
    if not _measures_first_calls(problem.device_type) or not attempt.repeatable:
        return False
    if torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing():
        return False
    return not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()


def key(problem) -> str:
    """A problem as a line of text."""
    sizes = " ".join(f"{name}={_text(value)}" for name, value in problem.geometry._asdict().items())
    dtype = str(problem.dtype).removeprefix("torch.")
    direction = "training" if problem.gradient else "inference"
    return f"{problem.operator} {dtype} {direction} {sizes} epilogue={problem.epilogue}"


def _text(value) -> str:
    return "(" + ",".join(map(_text, value)) + ")" if isinstance(value, (tuple, list)) else str(value)


@contextlib.contextmanager
def session() -> Iterator[dict[str, Winner]]:
    """Measure every problem met inside, once, and remember the winners; yields them by key."""
    global _session
    if _session is not None:
        raise RuntimeError("fastseg.tune is running already")
    _session = found = {}
    forget_choices()
    try:
        yield found
    finally:
        _session = None
        forget_choices()


def forget_choices() -> None:
    """What was chosen from the tables before they changed is chosen anew."""
    from fastseg import dispatch

    _consulted.clear()
    dispatch.forget_sized_choices()


def remember(device_type: str, found: dict[str, Winner]) -> None:
    """Put winners into the device's table, in memory and on disk."""
    own = table(device_type)
    for text, best in found.items():
        own.add(text, best)
    own.save()
    forget_choices()
