"""How an operator family is registered with PyTorch: one operator name, one overload per backend.

`torch.ops.fastseg.<operator>.<backend>` are overloads of one operator with one schema. The choice between them is made
once, in Python, by `fastseg.dispatch`; from there PyTorch's dispatcher goes straight to the kernel, with no branch on a
name in between. C++ registers "cpu" and "cuda" when `fastseg._C` is imported, Python registers the rest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("fastseg", "DEF")
KERNEL_BACKENDS = ("reference", "cpu", "triton", "cuda")

# OVERLOADS[operator][backend] is what the public functions call.
OVERLOADS: dict[str, dict[str, torch._ops.OpOverload]] = {}

# Python kernels are called for these keys; autograd and autocast sit above them.
_PYTHON_KEY = "CompositeExplicitAutograd"


def define(
    operator: str,
    schema: str,
    *,
    fake: Callable,
    python_kernels: dict[str, Callable],
    setup_context: Callable | None = None,
    backward: Callable[[str], Callable] | None = None,
    autocast: bool = False,
) -> dict[str, torch._ops.OpOverload]:
    """Define `operator` once per backend and return its overloads by backend.

    `backward(backend)` makes the autograd formula of one overload, so that a gradient runs on the backend that ran the
    forward pass; None for results without a gradient. `autocast` casts floating-point tensors as
    torch.nn.functional.conv2d does under torch.autocast.
    """
    overloads = OVERLOADS[operator] = {}
    for backend in KERNEL_BACKENDS:
        name = f"{operator}.{backend}"
        qualified = f"fastseg::{name}"
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
        torch.library.register_fake(qualified, fake, lib=LIBRARY)
        if backward is not None:
            torch.library.register_autograd(qualified, backward(backend), setup_context=setup_context, lib=LIBRARY)
        if backend in python_kernels:
            LIBRARY.impl(name, python_kernels[backend], _PYTHON_KEY)
        overloads[backend] = getattr(getattr(torch.ops.fastseg, operator), backend)
        if autocast:
            for device_type in ("cpu", "cuda"):
                LIBRARY.impl(name, _autocast(overloads[backend], device_type), f"Autocast{device_type.upper()}")
    return overloads


def _autocast(overload: torch._ops.OpOverload, device_type: str) -> Callable:
    key = torch._C.DispatchKey.AutocastCPU if device_type == "cpu" else torch._C.DispatchKey.AutocastCUDA
    keys = torch._C.DispatchKeySet(key)

    def cast(value):
        if isinstance(value, (list, tuple)):
            return [cast(item) for item in value]
        eligible = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
        return value.to(torch.get_autocast_dtype(device_type)) if eligible else value

    def run(*args):
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return overload(*[cast(arg) for arg in args])

    return run
