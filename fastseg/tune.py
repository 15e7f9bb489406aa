"""tune: measures every distinct call of a model on every backend that can run it, and remembers the fastest."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator

import torch

from fastseg import winners
from fastseg.chains import undisturbed


@dataclasses.dataclass
class Tuned:
    """What `fastseg.tune` measured; str() is a table."""

    device: str
    path: str  # where the winners are kept
    winners: dict[str, winners.Winner]  # by problem

    def to_json(self) -> str:
        rows = {problem: {"backend": w.backend, "ms": w.ms, "margin": w.margin} for problem, w in self.winners.items()}
        return json.dumps({"device": self.device, "path": self.path, "winners": rows}, indent=2)

    def __str__(self) -> str:
        lines = [f"{'winner':9} {'native ms':>10} {'kernel ms':>10} {'margin':>7}  call"]
        for problem, best in self.winners.items():
            kernels = [ms for backend, ms in best.ms.items() if backend != "native"]
            kernel = f"{min(kernels):10.3f}" if kernels else f"{'':>10}"
            lines.append(f"{best.backend:9} {best.ms['native']:10.3f} {kernel} {best.margin:6.2f}x  {problem}")
        ours = sum(best.backend != "native" for best in self.winners.values())
        lines.append(
            f"{len(self.winners)} calls, {ours} won by fastseg's kernels, on {self.device}; kept in {self.path}"
        )
        return "\n".join(lines)


def tune(model: torch.nn.Module, example, *, training: bool = False) -> Tuned:
    """Run `model` on `example`, measure each distinct call of a fastseg operator, and remember the fastest backend.

    Every backend that can run a call is timed beside native, in turns; a kernel wins only where it is faster than
    native beyond doubt. From then on "auto" takes the winner for calls of these very sizes on this device, in this and later
    processes, until fastseg, its kernels or torch change. Calls that were measured before are measured again.

    Args:
        model: an accelerated module, or one of fastseg's layers.
        example: the input, or a tuple of positional or a dict of keyword arguments, on the model's device.
        training: whether to measure calls with their backward pass, in train mode; otherwise eval mode without
            gradients. The model is left as it was either way: parameters, buffers, gradients, modes, random state.

    Returns:
        A Tuned: `print` it for the table, `.winners` has each problem's winner with all times.

    Raises:
        TypeError: `model` is no torch.nn.Module.
        RuntimeError: inside another `tune`.
        Whatever `model` raises on `example`.

    Example:
        >>> import torch, fastseg
        >>> model = fastseg.accelerate(torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=8))).eval()
        >>> tuned = fastseg.tune(model, torch.randn(1, 8, 33, 33))  # doctest: +SKIP
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, but got {type(model).__name__}")
    device_type = _device_type(model, example)
    with undisturbed(model), _buffers_kept(model), torch.set_grad_enabled(training), winners.session() as found:
        if training:
            for module in model.modules():
                module.training = True
        if isinstance(example, dict):
            model(**example)
        else:
            model(*example) if isinstance(example, (tuple, list)) else model(example)
    winners.remember(device_type, found)
    table = winners.table(device_type)
    return Tuned(table.device, str(table.path), dict(found))


def _device_type(model, example) -> str:
    values = example.values() if isinstance(example, dict) else example
    values = [example] if isinstance(example, torch.Tensor) else [*values, *model.parameters()]
    return next((v.device.type for v in values if isinstance(v, torch.Tensor)), "cpu")


@contextlib.contextmanager
def _buffers_kept(model: torch.nn.Module) -> Iterator[None]:
    """Running statistics are updated in place: put their values back."""
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in saved:
                buffer.copy_(values)
