"""The path every convolution takes: normalise, choose the backend once, call one operator."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from fastseg import dispatch
from fastseg.ops.activation import check_activation
from fastseg.ops.arguments import ConvArguments, normalise
from fastseg.ops.geometry import output_size
from fastseg.ops.library import OVERLOADS
from fastseg.ops.native import native_conv2d


def run_convolution(operator, input, weight, bias, stride, padding, dilation, groups, activation, backend):
    """Run `operator`, one of dispatch.Problem's, on the arguments of torch.nn.functional.conv2d."""
    check_activation(activation)
    arguments = choice = refusal = geometry = None
    gradient = False
    if isinstance(input, torch.Tensor):
        if dispatch.depends_on_geometry(operator, input.device.type) and not torch.compiler.is_compiling():
            arguments = normalise(input, weight, bias, stride, padding, dilation, groups)
            if arguments is None:
                return native_conv2d(input, weight, bias, stride, padding, dilation, groups, activation)
            geometry = geometry_of(arguments, weight)
            gradient = _records((input, weight, bias))
        choice, refusal = chosen(operator, input, backend, geometry, gradient)
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


def chosen(operator: str, input: torch.Tensor, backend: str | None, geometry=None, gradient: bool = False):
    """The backend for `operator` on `input`, and None; or None, and the error to raise if the arguments are right.

    A mistake in the arguments is told first, in PyTorch's words.
    """
    try:
        problem = dispatch.Problem(operator, input.device.type, input.dtype, geometry, gradient)
        return dispatch.choose(problem, backend), None
    except dispatch.BackendError as error:
        return None, error


def call_operator(overload, tensors, *args):
    """`overload(*args)`, past its autograd kernel where nobody asks for a gradient of `tensors`, which are among args.

    The operators' autograd kernels are Python, and would find nothing to do.
    """
    if _records(tensors):
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


def _records(tensors) -> bool:
    """Whether autograd, or somebody who traces it, looks at a call with these tensors; some may be None."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0 or torch._C._len_torch_dispatch_stack():
        return True
    if not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
