"""Which kernels one call of a module ran: fastseg's, by backend, and the convolutions and resizes that native did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_NATIVE = {
    _aten.convolution.default: "convolution",
    _aten.convolution_overrideable.default: "convolution",
    _aten.upsample_bilinear2d.default: "upsample_bilinear2d",
    _aten.upsample_bilinear2d.vec: "upsample_bilinear2d",
}


class _Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.called: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastseg":
            self.called[f"{func._schema.name.removeprefix('fastseg::')} {func._overloadname}"] += 1
        elif func in _NATIVE:
            self.called[f"{_NATIVE[func]} native"] += 1
        elif func.namespace == "mkldnn" and "convolution" in func._schema.name:
            self.called["convolution native"] += 1
        return func(*args, **(kwargs or {}))


def count(call: Callable[[], object]) -> dict[str, int]:
    """ "operator backend" -> how often `call` called it, the most frequent first."""
    with _Watch() as watch:
        call()
    return dict(watch.called.most_common())


def in_words(kernels: dict[str, int]) -> str:
    """By backend: "12 cpu, 3 native"."""
    backends: Counter[str] = Counter()
    for name, calls in kernels.items():
        backends[name.split()[-1]] += calls
    return ", ".join(f"{calls} {backend}" for backend, calls in backends.most_common())
