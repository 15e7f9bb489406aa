"""tune: measures every distinct call of a model on every backend that can run it, and remembers the fastest."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator

import torch

from fastseg import dispatch, winners
from fastseg.chains import undisturbed
from fastseg.counters import uncounted


@dataclasses.dataclass
class Tuned:
    """What `fastseg.tune` measured; str() is a table."""

    device: str
    path: str  # where the winners are kept; empty where there are no kernels for such devices
    winners: dict[str, winners.Winner]  # by problem

    def to_json(self) -> str:
        rows = {problem: {"backend": w.backend, "ms": w.ms, "margin": w.margin} for problem, w in self.winners.items()}
        return json.dumps({"device": self.device, "path": self.path, "winners": rows}, indent=2)

    def __str__(self) -> str:
        return "\n".join([HEADER, *(line(problem, best) for problem, best in self.winners.items()), self.summary()])

    def summary(self) -> str:
        """What stands below the table."""
        if not self.winners:
            return f"nothing to measure on {self.device}: no fastseg operator was called that has a kernel there"
        ours = sum(best.backend != "native" for best in self.winners.values())
        calls = f"{len(self.winners)} {'call' if len(self.winners) == 1 else 'calls'}"
        text = f"{calls}, {ours} won by fastseg's kernels, on {self.device}; kept in {self.path}"
        doubtful = sum(best.in_doubt for best in self.winners.values())
        if doubtful:
            text += f"\n{doubtful} on native though a kernel was faster, not reliably: tune while nothing else runs"
        return text


HEADER = f"{'winner':9} {'native ms':>10} {'kernel ms':>10} {'margin':>7}  call"


def line(problem: str, best: winners.Winner) -> str:
    """One line of the table."""
    kernels = [ms for backend, ms in best.ms.items() if backend != "native"]
    native = "" if "native" not in best.ms else f"{best.ms['native']:.3f}"
    kernel = f"{min(kernels):.3f}" if kernels else ""
    margin = "" if best.margin is None else f"{best.margin:.2f}x"
    return f"{best.backend:9} {native:>10} {kernel:>10} {margin:>7}  {problem}"


def tune(
    model: torch.nn.Module,
    example,
    *,
    training: bool = False,
    report: Callable[[str, winners.Winner], object] | None = None,
) -> Tuned:
    """Run `model` on `example`, measure each distinct call of a fastseg operator, and remember the fastest backend.

    Every backend that can run a call is timed beside native, in turns; a kernel wins only where it is faster than
    native beyond doubt. From then on "auto" takes the winner for calls of these very sizes on this device, in this and
    later processes, until fastseg, its kernels or torch change. Calls that were measured before are measured again.

    The winners are kept in one file per device, and on a CPU per number of threads, in the folder FASTSEG_CACHE (else
    fastseg's in XDG_CACHE_HOME or ~/.cache); several processes may share it. Winners of devices that the project has
    records of come with the package. On a GPU "auto" measures the first call of a problem that has no winner by
    itself, unless FASTSEG_TUNE=0, or in deterministic mode (torch.use_deterministic_algorithms).

    Calls that somebody looks at are left out: those with hooks on their tensors, inside activation checkpointing, of
    tensor subclasses, and inside graphs of torch.compile.

    Args:
        model: an accelerated module, or one of fastseg's layers.
        example: the input, or a tuple of positional or a dict of keyword arguments, on the model's device.
        training: whether to measure calls with their backward pass, in train mode; otherwise eval mode without
            gradients. The model is left as it was either way: parameters, buffers, gradients, modes, random state.
        report: called with the problem's text and its fastseg.winners.Winner after each measurement, as it is long.

    Returns:
        A Tuned: `print` it for the table, `.winners` has each problem's winner with all times.

    Raises:
        TypeError: `model` is no torch.nn.Module.
        RuntimeError: inside another `tune`.
        Whatever `model` raises on `example`; what was measured until then is remembered.

    Example:
        >>> import torch, fastseg
        >>> model = fastseg.accelerate(torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=8))).eval()
        >>> tuned = fastseg.tune(model, torch.randn(1, 8, 33, 33))  # doctest: +SKIP
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, but got {type(model).__name__}")
    device_type = _device_type(model, example)
    try:
        with (
            winners.session(report or (lambda problem, best: None)) as found,
            dispatch.backend("auto"),
            uncounted(),
            undisturbed(model),
            _buffers_and_random_state_kept(model),
            torch.set_grad_enabled(training),
        ):
            for module in model.modules():
                module.training = training
            if isinstance(example, dict):
                model(**example)
            else:
                model(*example) if isinstance(example, (tuple, list)) else model(example)
    finally:
        dispatch.forget_sized_choices()
    of_device = {problem: best for (of, problem), best in found.items() if of == device_type}
    if device_type not in winners.DEVICE_TYPES:
        return Tuned(device_type, "", of_device)
    table = winners.table(device_type)
    return Tuned(table.device, str(table.path), of_device)


def tune_aloud(model: torch.nn.Module, example, training: bool = False, as_json: bool = False) -> None:
    """`tune`, printing the table as it grows, or JSON in the end."""
    if as_json:
        print(tune(model, example, training=training).to_json())
        return
    print(HEADER, flush=True)
    tuned = tune(model, example, training=training, report=lambda *found: print(line(*found), flush=True))
    print(tuned.summary())


def _device_type(model, example) -> str:
    values = example.values() if isinstance(example, dict) else example
    values = [example] if isinstance(example, torch.Tensor) else [*values, *model.parameters()]
    return next((v.device.type for v in values if isinstance(v, torch.Tensor)), "cpu")


@contextlib.contextmanager
def _buffers_and_random_state_kept(model: torch.nn.Module) -> Iterator[None]:
    """Running statistics are updated in place: put their values back. Random numbers of a GPU are drawn as before."""
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, values in saved:
                if not torch.equal(buffer, values):
                    buffer.copy_(values)
