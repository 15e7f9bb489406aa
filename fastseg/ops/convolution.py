"""The path every convolution takes: normalise, choose the backend once, call one operator."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from fastseg import dispatch, winners
from fastseg.measuring import Attempt
from fastseg.ops.activation import check_activation
from fastseg.ops.arguments import ConvArguments, normalise
from fastseg.ops.geometry import output_size
from fastseg.ops.library import OVERLOADS
from fastseg.ops.native import native_conv2d


def run_convolution(operator, input, weight, bias, stride, padding, dilation, groups, activation, backend):
    """Run `operator`, one of dispatch.Problem's, on the arguments of torch.nn.functional.conv2d."""
    check_activation(activation)
    arguments = choice = refusal = geometry = attempt = call = None
    gradient = False
    if isinstance(input, torch.Tensor):
        dtype = arithmetic_dtype(input)
        if not torch.compiler.is_compiling() and dispatch.depends_on_geometry(operator, input.device.type):
            if _are_strided(input, weight, bias):
                gradient = records((input, weight, bias))
                call = (
                    operator, input.device.type, input.shape, input.stride(), weight.shape, dtype, stride, padding,
                    dilation, groups, gradient, activation,
                )  # fmt: skip
                known = dispatch.left_to_native(call, backend)
                if known is not None:
                    dispatch.count_native(operator, known.reason)
                    return native_conv2d(input, weight, bias, stride, padding, dilation, groups, activation)
            arguments = normalise(input, weight, bias, stride, padding, dilation, groups)
            if arguments is None:
                return native_conv2d(input, weight, bias, stride, padding, dilation, groups, activation)
            geometry = geometry_of(arguments, weight)

            def run(name):
                return run_convolution(
                    operator, input, weight, bias, stride, padding, dilation, groups, activation, name
                )

            attempt = Attempt(run, (input, weight, bias))
        problem = dispatch.Problem(operator, input.device.type, dtype, geometry, gradient, activation)
        choice, refusal = chosen(problem, backend, attempt)
    if choice is not None and choice.backend == "native":
        if call is not None:
            dispatch.leave_to_native(call, backend, choice)
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


def _are_strided(input: torch.Tensor, weight, bias) -> bool:
    """Whether all are tensors, and this one has strides: whether they say what a call is made with."""
    tensor = torch.Tensor
    return input.layout == torch.strided and isinstance(weight, tensor) and isinstance(bias, (tensor, type(None)))


def chosen(problem: dispatch.Problem, backend: str | None, attempt: Attempt | None):
    """The backend for `problem`, and None; or None, and the error to raise if the arguments are right.

    A mistake in the arguments is told first, in PyTorch's words.
    """
    try:
        return dispatch.choose(problem, backend, attempt), None
    except dispatch.BackendError as error:
        return None, error


def arithmetic_dtype(input: torch.Tensor) -> torch.dtype:
    """The dtype that a convolution of `input` runs in."""
    device_type, dtype = input.device.type, input.dtype
    if device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type) and dtype.is_floating_point:
        return dtype if dtype == torch.float64 else torch.get_autocast_dtype(device_type)
    return dtype


def sized(operator: str, input: torch.Tensor, output: tuple, detail: tuple) -> dispatch.Sizes | None:
    """The sizes of a call that is not one convolution, where "auto" looks at them, and nobody traces them."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    if not winners.consulted(operator, input.device.type):
        return None
    return dispatch.Sizes(tuple(input.shape), output, detail, input.stride(1) == 1)


def chosen_by_size(
    operator: str, input: torch.Tensor, backend: str | None, detail: tuple, tensors: tuple, run, *,
    output: tuple = (), dtype: torch.dtype | None = None,
) -> dispatch.Choice:  # fmt: skip
    """The backend for a call that is not one convolution, and that `run(name)` makes on any backend.

    Its time depends on `input`'s shape, that of the `output` where the image's size changes, on `detail`, and on
    whether one of `tensors` wants a gradient. `dtype` is that of the arithmetic, None for what convolutions take under
    autocast.

    Raises:
        BackendError: the backend named cannot run it.
    """
    sizes = sized(operator, input, output, detail)
    attempt = None if sizes is None else Attempt(run, tensors)
    gradient = sizes is not None and records(tensors)
    dtype = arithmetic_dtype(input) if dtype is None else dtype
    return dispatch.choose(dispatch.Problem(operator, input.device.type, dtype, sizes, gradient), backend, attempt)


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
