"""Which backend was the fastest on this device, problem by problem: measured once, remembered in one file per device.

The file lies in the user's cache folder (FASTSEG_CACHE, else XDG_CACHE_HOME/fastseg, else ~/.cache/fastseg). It says
for which fastseg, kernels, torch and device it was made; one that was made for others, or cannot be read, is told once
and made anew. Writers take turns and replace the file as a whole, so several processes may share it. Winners that come
with the package, of devices that committed records were made on, stand behind the user's own.

"auto" asks here when it meets a problem for the first time in a process. Where there is no winner, on a GPU the call
is measured there and then, as torch.backends.cudnn.benchmark does; FASTSEG_TUNE=0 turns that off.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from fastseg import extension
from fastseg.counters import first_calls
from fastseg.measuring import MARGIN, Attempt, can_be_repeated, measure

if TYPE_CHECKING:
    from fastseg.dispatch import Problem

SCHEMA = 2
PACKAGE = Path(__file__).parent
SHIPPED = PACKAGE / "shipped_winners"
# What there are kernels for.
DEVICE_TYPES = ("cpu", "cuda")


class Winner(NamedTuple):
    """The fastest backend of a problem, and the median time of each in milliseconds."""

    backend: str
    ms: dict[str, float]
    shipped: bool = False

    @property
    def margin(self) -> float | None:
        """How many times faster than native; of native itself, how many times faster than the best kernel.

        Less than 1 where a kernel was faster than native, but not reliably. None where nothing else could run it.
        """
        others = [ms for backend, ms in self.ms.items() if (backend == "native") != (self.backend == "native")]
        return min(others) / self.ms[self.backend] if others else None

    @property
    def in_doubt(self) -> bool:
        """Whether native was kept although a kernel's median was better by more than a kernel has to win by."""
        return self.backend == "native" and self.margin is not None and self.margin * MARGIN < 1

    @property
    def reason(self) -> str:
        return "measured on such a device" if self.shipped else "measured here"


# Problems by name


def key(problem: Problem, tf32: bool | None = None) -> str:
    """A problem with sizes as a line of text; `tf32`: whether cuDNN multiplies float32 so, None for as torch is set."""
    sizes = " ".join(f"{name}={_text(value)}" for name, value in problem.geometry._asdict().items())
    dtype = str(problem.dtype).removeprefix("torch.")
    if problem.device_type == "cuda" and problem.dtype == torch.float32:
        dtype = "tf32" if (_multiplies_tf32() if tf32 is None else tf32) else dtype
    direction = "training" if problem.gradient else "inference"
    return f"{problem.operator} {dtype} {direction} {sizes} epilogue={problem.epilogue}"


def _multiplies_tf32() -> bool:
    conv = getattr(torch.backends.cudnn, "conv", None)  # new in torch 2.9, where the older name may raise
    return torch.backends.cudnn.allow_tf32 if conv is None else conv.fp32_precision == "tf32"


def _text(value) -> str:
    return "(" + ",".join(map(_text, value)) + ")" if isinstance(value, (tuple, list)) else str(value)


def device_name(device_type: str) -> str:
    """What the tables call this device. Of a CPU the number of threads decides as much as the model."""
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    instructions = "" if extension.EXTENSION is None else f", {extension.EXTENSION.cpu_capability()}"
    return f"{cpu_model()}{instructions}, {torch.get_num_threads()} threads"


@functools.cache
def cpu_model(facts: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, with family and model where it names no model, as those of virtual machines."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in facts.read_text().splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    if "model name" not in found:
        return platform.processor() or platform.machine()
    if re.search(r"\d", found["model name"]) or not {"cpu family", "model"} <= found.keys():
        return found["model name"]
    return f"{found['model name']} family {found['cpu family']} model {found['model']}"


def file_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


# The table of a device


class Table:
    """The winners of one device: the user's own, and behind them those that come with the package."""

    def __init__(self, device: str, path: Path, shipped: Path):
        self.device = device
        self.path = path
        self.own = self._read_own()
        self.unsaved: dict[str, dict] = {}
        self.shipped = _read(shipped)["winners"] if shipped.exists() else {}
        self.operators = {key.partition(" ")[0] for key in (*self.own, *self.shipped)}

    def winner(self, key: str) -> Winner | None:
        if key in self.own:
            return Winner(**self.own[key])
        return Winner(**self.shipped[key], shipped=True) if key in self.shipped else None

    def add(self, found: dict[str, Winner]) -> None:
        """Take winners over, in memory and into the file; say once if that cannot be written."""
        entries = {key: entry(best) for key, best in found.items()}
        if not entries:
            return
        self.own |= entries
        self.unsaved |= entries
        self.operators |= {key.partition(" ")[0] for key in entries}
        try:
            self._save()
        except OSError as error:
            _say_once(f"the winners of tuning are kept in this process only: {error}")

    def _save(self) -> None:
        """Write what was added, together with what other processes have written since."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self.path.with_suffix(".lock")):
            everything = self._read_own(quiet=True) | self.unsaved
            content = {"schema": SCHEMA, "made_for": made_for(self.device), "winners": everything}
            temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(content, indent=1) + "\n")
            temporary.replace(self.path)
        self.own, self.unsaved = everything, {}

    def _read_own(self, quiet: bool = False) -> dict[str, dict]:
        try:
            content = _read(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError) as error:
            problem = f"cannot be read ({error})"
        else:
            if content["made_for"] == made_for(self.device):
                return content["winners"]
            problem = "was made for another version of fastseg or torch"
        if not quiet:
            _say_once(f"{self.path} {problem}: tuning starts anew")
        return {}


def entry(best: Winner) -> dict:
    """A winner as files have it."""
    return {"backend": best.backend, "ms": {backend: round(value, 6) for backend, value in best.ms.items()}}


def _read(path: Path) -> dict:
    """The content of a file of winners.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file, or one of an earlier form.
    """
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ValueError(f"not a file of winners of schema {SCHEMA}")
    if not isinstance(content.get("made_for"), dict) or not isinstance(content.get("winners"), dict):
        raise ValueError("not a file of winners")
    for problem, found in content["winners"].items():
        if not _is_winner(found):
            raise ValueError(f"no winner of {problem!r}")
    return content


def _is_winner(found) -> bool:
    if not isinstance(found, dict) or set(found) != {"backend", "ms"} or not isinstance(found["ms"], dict):
        return False
    times = found["ms"].values()
    return {"native", found["backend"]} <= set(found["ms"]) and all(isinstance(ms, float) and ms > 0 for ms in times)


def made_for(device: str) -> dict[str, str]:
    """What a table depends on."""
    import fastseg

    return {
        "fastseg": fastseg.__version__,
        "kernels": extension.BUILD.get("kernels", "none"),
        "operators": _operators(),
        "torch": torch.__version__,
        "device": device,
    }


@functools.cache
def _operators() -> str:
    """A digest of the operators' Python sources, Triton's kernels among them."""
    digest = hashlib.sha256()
    for path in sorted((PACKAGE / "ops").rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def cache_folder() -> Path:
    own = os.environ.get("FASTSEG_CACHE")
    if own:
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastseg"
    except RuntimeError:  # nobody's home: a path that cannot be written, which is told when something is to be kept
        return Path(os.devnull) / "fastseg"


_tables: dict[str, Table] = {}


def table(device_type: str) -> Table:
    """The table of the current device of a type that there are kernels for."""
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


# (operator, device type) -> whether sizes matter to calls of it, from the tables as they were.
_consulted: dict[tuple[str, str], bool] = {}


def consulted(operator: str, device_type: str) -> bool:
    """Whether "auto" has to know the sizes of a call of `operator` to look for, or find out, its winner."""
    if device_type not in DEVICE_TYPES:
        return False
    if _session is not None:
        return True
    known = _consulted.get((operator, device_type))
    if known is None:
        known = _measures_first_calls(device_type) or operator in table(device_type).operators
        _consulted[operator, device_type] = known
    return known


def winner(problem: Problem, candidates: Sequence[str], attempt: Attempt | None) -> Winner | None:
    """The winner of a problem with sizes: remembered, or measured now where that is right; else None."""
    text = key(problem)
    if (threading.get_ident(), problem.device_type, text) in _in_progress:
        # A block whose only part is the same block: its modules one by one are what is timed.
        return Winner("native", {})
    if tuning():
        return _winner_of_session(problem, text, candidates, attempt)
    found = table(problem.device_type)
    known = found.winner(text)
    if known is not None or attempt is None or not (is_awaited(problem) and may_measure(problem, attempt)):
        return known
    with _measuring:
        return found.winner(text) or _measured_first(problem, text, candidates, attempt)


# One measurement at a time, and those inside of it.
_measuring = threading.RLock()
_in_progress: set[tuple[int, str, str]] = set()  # (thread, device type, key)


def _measured(problem: Problem, text: str, candidates: Sequence[str], attempt: Attempt) -> Winner:
    name = (threading.get_ident(), problem.device_type, text)
    with _measuring:
        _in_progress.add(name)
        try:
            backend, ms, failures = measure(problem, candidates, attempt)
        finally:
            _in_progress.remove(name)
    for kernel, error in failures.items():
        if kernel != "native" and not isinstance(error, torch.OutOfMemoryError):
            first_line = str(error).strip().partition("\n")[0] or type(error).__name__
            _say_once(f"{kernel} failed in {problem.operator}, so another backend runs it: {first_line}")
    return Winner(backend, ms)


def _is_lasting(best: Winner) -> bool:
    """Whether to remember it: where native did not run, it may have lacked memory for once."""
    return "native" in best.ms


# Measuring the first call of a problem


# Images of ever new sizes are no new problems: first calls of one layer are measured for this many of them.
MOST_SIZES = 8
_sizes_measured: Counter[Problem] = Counter()
_paused = False


def _measures_first_calls(device_type: str) -> bool:
    return device_type == "cuda" and os.environ.get("FASTSEG_TUNE", "1") != "0"


def is_awaited(problem: Problem) -> bool:
    """Whether the first call of `problem`, whose winner is not known, is to be measured when one comes that can be."""
    return _measures_first_calls(problem.device_type) and _sizes_measured[_of_any_size(problem)] < MOST_SIZES


def may_measure(problem: Problem, attempt: Attempt) -> bool:
    """Whether this call of `problem` may be measured."""
    if _paused or not attempt.repeatable or not can_be_repeated(problem, attempt):
        return False
    # Who wants the same results in every run does not want the clock to choose.
    return not (torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic)


def _of_any_size(problem: Problem) -> Problem:
    sizes = problem.geometry
    return problem._replace(geometry=sizes._replace(input=sizes.input[1:2], output=()))


def _measured_first(problem: Problem, text: str, candidates: Sequence[str], attempt: Attempt) -> Winner:
    started, inside = time.perf_counter(), first_calls.seconds
    best = _measured(problem, text, candidates, attempt)
    # First calls inside of this one, of the modules of a block, have counted their own time.
    first_calls.seconds += time.perf_counter() - started - (first_calls.seconds - inside)
    first_calls.problems += 1
    _sizes_measured[_of_any_size(problem)] += 1
    if _is_lasting(best):
        table(problem.device_type).add({text: best})
    return best


@contextlib.contextmanager
def unmeasured() -> Iterator[None]:
    """First calls inside are not measured."""
    global _paused
    before, _paused = _paused, True
    try:
        yield
    finally:
        _paused = before


# Measuring every problem on purpose


class _Session(NamedTuple):
    thread: int
    found: dict[tuple[str, str], Winner]  # (device type, key) -> winner
    report: Callable[[str, Winner], object]


_session: _Session | None = None


def tuning() -> bool:
    """Whether this thread measures whatever it meets."""
    return _session is not None and _session.thread == threading.get_ident()


@contextlib.contextmanager
def session(report: Callable[[str, Winner], object]) -> Iterator[dict[tuple[str, str], Winner]]:
    """Measure every problem that this thread meets inside, once, whatever the tables say, and remember the winners.

    Yields them by device type and key; `report` is given key and winner of each. What was found before an exception is
    remembered as well.

    Raises:
        RuntimeError: inside another session.
    """
    global _session
    if _session is not None:
        raise RuntimeError("fastseg.tune is running already")
    _session = _Session(threading.get_ident(), {}, report)
    found = _session.found
    try:
        yield found
    finally:
        _session = None
        for device_type in sorted({device_type for device_type, _ in found}):
            own = {text: best for (of, text), best in found.items() if of == device_type and _is_lasting(best)}
            table(device_type).add(own)
        _consulted.clear()


def _winner_of_session(problem, text: str, candidates: Sequence[str], attempt: Attempt | None) -> Winner | None:
    found, name = _session.found, (problem.device_type, text)
    if name not in found and attempt is not None and can_be_repeated(problem, attempt):
        # Problems inside of this one, of the modules of a block, come first.
        best = _measured(problem, text, candidates, attempt)
        found[name] = best
        _session.report(text, best)
    return found.get(name)
