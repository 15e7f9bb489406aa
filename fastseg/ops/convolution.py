"""The path every convolution takes: normalise, choose the backend once, call one operator."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from fastseg import dispatch, winners
from fastseg.ops.activation import check_activation
from fastseg.ops.arguments import ConvArguments, normalise
from fastseg.ops.geometry import output_size
from fastseg.ops.library import OVERLOADS
from fastseg.ops.native import native_conv2d


def run_convolution(operator, input, weight, bias, stride, padding, dilation, groups, activation, backend):
    """Run `operator`, one of dispatch.Problem's, on the arguments of torch.nn.functional.conv2d."""
    check_activation(activation)
    arguments = choice = refusal = geometry = attempt = None
    gradient = False
    if isinstance(input, torch.Tensor):
        if not torch.compiler.is_compiling() and dispatch.depends_on_geometry(operator, input.device.type):
            arguments = normalise(input, weight, bias, stride, padding, dilation, groups)
            if arguments is None:
                return native_conv2d(input, weight, bias, stride, padding, dilation, groups, activation)
            geometry = geometry_of(arguments, weight)
            gradient = records((input, weight, bias))

            def run(name):
                return run_convolution(
                    operator, input, weight, bias, stride, padding, dilation, groups, activation, name
                )

            attempt = winners.Attempt(run, (input, weight, bias))
        choice, refusal = chosen(operator, input, backend, geometry, gradient, activation, attempt)
    if choice is not None and choice.backend == "native":
        dispatch.count_native(operator, choice.reason)
        return native_conv2d(input, weight, bias, stride, padding, dilation, groups, activation)
    if arguments is None:
        arguments = normalise(input, weight, bias, stride, padding, dilation, groups)
    if arguments is None:
        return native_conv2d(input, weight, bias, stride, padding, dilation, groups, activation)
    if refusal is not None:
        raise refusal
    y = call_operator(
        OVERLOADS[operator][choice.backend], (input, weight, bias),
        arguments.input, weight, bias, arguments.stride, arguments.padding, arguments.dilation, activation,
    )  # fmt: skip
    return y if arguments.batched else y.squeeze(0)


def chosen(
    operator: str, input: torch.Tensor, backend: str | None, geometry=None, gradient: bool = False,
    epilogue: str = "none", attempt: winners.Attempt | None = None, dtype: torch.dtype | None = None,
):  # fmt: skip
    """The backend for `operator` on `input`, and None; or None, and the error to raise if the arguments are right.

    A mistake in the arguments is told first, in PyTorch's words. `dtype` is that of the arithmetic, None for what
    convolutions take under autocast.
    """
    try:
        device_type = input.device.type
        dtype = arithmetic_dtype(input) if dtype is None else dtype
        problem = dispatch.Problem(operator, device_type, dtype, geometry, gradient, epilogue)
        return dispatch.choose(problem, backend, attempt), None
    except dispatch.BackendError as error:
        return None, error


def arithmetic_dtype(input: torch.Tensor) -> torch.dtype:
    """The dtype that a convolution of `input` runs in."""
    device_type, dtype = input.device.type, input.dtype
    if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type) and dtype.is_floating_point:
        return dtype if dtype == torch.float64 else torch.get_autocast_dtype(device_type)
    return dtype


def sized(operator: str, input: torch.Tensor, detail: tuple) -> dispatch.Sizes | None:
    """The sizes of a call that is not one convolution, where "auto" looks at them."""
    if torch.compiler.is_compiling() or not winners.consulted(operator, input.device.type):
        return None
    return dispatch.Sizes(tuple(input.shape), detail, input.stride(1) == 1)


def chosen_by_size(
    operator: str, input: torch.Tensor, backend: str | None, detail: tuple, tensors: tuple, run, dtype=None
) -> dispatch.Choice:
    """The backend for a call that is not one convolution, and that `run(name)` makes on any backend.

    Its time depends on `input`'s shape, on `detail`, and on whether one of `tensors` wants a gradient.

    Raises:
        BackendError: the backend named cannot run it.
    """
    sizes = sized(operator, input, detail)
    attempt = None if sizes is None else winners.Attempt(run, tensors)
    gradient = sizes is not None and records(tensors)
    choice, refusal = chosen(operator, input, backend, sizes, gradient, "none", attempt, dtype)
    if refusal is not None:
        raise refusal
    return choice


def call_operator(overload, tensors, *args):
    """`overload(*args)`, past its autograd kernel where nobody asks for a gradient of `tensors`, which are among args.

    The operators' autograd kernels are Python, and would find nothing to do.
    """
    if records(tensors):
        return overload(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return overload(*args)


def geometry_of(arguments: ConvArguments, weight: torch.Tensor) -> dispatch.Geometry:
    """What dispatch looks at where the sizes decide."""
    input, stride, padding, dilation = arguments.input, arguments.stride, arguments.padding, arguments.dilation
    output = output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    return dispatch.Geometry(
        tuple(input.shape), tuple(weight.shape), tuple(stride), tuple(padding), tuple(dilation), output,
        input.stride(1) == 1,
    )  # fmt: skip


def records(tensors) -> bool:
    """Whether autograd, or somebody who traces it, looks at a call with these tensors; some may be None."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0 or torch._C._len_torch_dispatch_stack():
        return True
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
