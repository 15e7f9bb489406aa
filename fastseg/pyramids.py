"""Finds what runs as a whole, by what forwards do and not by their names: pyramid poolings and separable convolutions.

A module is one when its traced forward is, from its input to its result,

    branches       convolutions (norm, activation) of the input that keep its size, dense or depthwise and pointwise
    pooled branch  mean over the image, 1x1 convolution (norm, activation), resized to the image; or none
    concat form    all of them side by side, then a 1x1 convolution (norm, activation, dropout)
    sum form       the branches added up

and a separable convolution where it is a depthwise convolution (norm, activation), a pointwise one (norm, activation),
and perhaps the input added to their result. (Those among the children of a Sequential are found there, see
fastseg/nn/sequential.py.)

What was matched is tried on a small random image beside the module's own forward: a resize that is none, say, or an
argument that tracing did not show, would give something else.
"""

from __future__ import annotations

import operator
import warnings

import torch
import torch.nn.functional as F

from fastseg.chains import _trace, undisturbed
from fastseg.nn.aspp import PyramidModule
from fastseg.nn.folding import activation_name, original_class, own_activation
from fastseg.nn.fused_module import Fusion
from fastseg.nn.pyramid import Link, Pyramid, Separable
from fastseg.ops.activation import apply_activation

_DROPOUTS = (torch.nn.Dropout, torch.nn.Dropout2d)
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_RESIZES = (F.interpolate, F.upsample)


def find_pyramids(model: torch.nn.Module) -> dict[torch.nn.Module, Fusion]:
    """The recognised modules of `model`, none of them inside another."""
    found: dict[torch.nn.Module, Fusion] = {}
    with undisturbed(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in model.modules():
            if isinstance(module, PyramidModule):
                # The others run as a whole by themselves.
                whole = module.pyramid() if type(module).forward is PyramidModule.module_by_module else None
            else:
                whole = _traced(module) if _may_be(module) else None
            if whole is not None:
                watched = [
                    (parent, name, child) for parent in module.modules() for name, child in parent._modules.items()
                ]
                found[module] = Fusion(whole, [link for link in watched if link[2] is not None])
    return found


def _may_be(module: torch.nn.Module) -> bool:
    """Whether `module` has a few convolutions of one width at different dilations, or a depthwise and a pointwise one;

    tracing tells the rest.
    """
    if isinstance(module, (torch.nn.Sequential, torch.nn.ModuleList)):
        return False
    convolutions = [m for m in module.modules() if isinstance(m, torch.nn.Conv2d)]
    if len(convolutions) == 2 and _is_depthwise(convolutions[0]) and _is_pointwise(convolutions[1]):
        return True
    dilated = [(m.in_channels, m.dilation) for m in convolutions if max(m.dilation) > 1 and max(m.kernel_size) > 1]
    return 2 <= len(convolutions) <= 32 and any(
        channels == other and dilation != another for channels, dilation in dilated for other, another in dilated
    )


def _traced(module: torch.nn.Module) -> Pyramid | Separable | None:
    traces = _trace(module)
    whole = _match(traces[0]) if traces is not None and len(traces) == 1 else None
    return whole if whole is not None and _agrees(whole, module) else None


def _match(tracer) -> Pyramid | Separable | None:
    nodes = list(tracer.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder" and node.users]
    result = nodes[-1].args[0]
    if len(inputs) != 1 or not isinstance(result, torch.fx.Node) or tracer.kept:
        return None
    back = _Backwards(tracer, inputs[0])
    return back.concatenated(result) or back.summed(result) or back.separable(result)


class _Backwards:
    """Walks a trace from a result back to the input."""

    def __init__(self, tracer, input):
        self.calls = tracer.calls
        self.input = input

    def module(self, node):
        return self.calls[node][0] if node in self.calls else None

    def concatenated(self, node) -> Pyramid | None:
        dropout = None
        if type(self.module(node)) in _DROPOUTS:
            dropout, node = self.module(node), node.args[0]
        links, node = self.links(node)
        if len(links) != 1 or not _is_pointwise(links[0].conv):
            return None
        if node.op != "call_function" or node.target not in (torch.cat, torch.concat):
            return None
        parts = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if dim not in (1, -3) or not isinstance(parts, (list, tuple)):
            return None
        pool, branches, position = None, [], 0
        for index, part in enumerate(parts):
            pooled = self.pooled(part)
            if pooled is not None and pool is None:
                pool, position = pooled, index
                continue
            branch = self.branch(part)
            if branch is None:
                return None
            branches.append(branch)
        if not branches or (pool is not None and position not in (0, len(parts) - 1)):
            return None
        first = pool is not None and position == 0
        return Pyramid(branches, pool, first, links[0], "none", "concat", dropout)

    def summed(self, node) -> Pyramid | None:
        parts = self.addends(node)
        branches = [self.branch(part) for part in parts]
        if len(branches) < 2 or any(branch is None or len(branch) != 1 for branch in branches):
            return None
        if any(link.norm is not None or link.activation != "none" for (link,) in branches):
            return None
        return Pyramid(branches, None, False, None, "none", "sum", None)

    def separable(self, node) -> Separable | None:
        parts = self.addends(node)
        adds_input = len(parts) == 2 and self.input in parts
        if adds_input:
            parts = [part for part in parts if part is not self.input]
        links, node = self.links(parts[0]) if len(parts) == 1 else ([], None)
        if len(links) != 2 or node is not self.input or not _is_depthwise(links[0].conv):
            return None
        return Separable(*links, adds_input) if _is_pointwise(links[1].conv) else None

    def addends(self, node) -> list:
        is_call = isinstance(node, torch.fx.Node) and node.op == "call_function" and not node.kwargs
        if is_call and node.target in _ADDITIONS and len(node.args) == 2:
            return [*self.addends(node.args[0]), *self.addends(node.args[1])]
        return [] if node == 0 else [node]  # 0: where sum() starts

    def branch(self, node) -> tuple[Link, ...] | None:
        links, node = self.links(node)
        if node is not self.input or len(links) not in (1, 2):
            return None
        if any(not _keeps_size(link.conv) for link in links):
            return None
        if len(links) == 1:
            return tuple(links) if links[0].conv.groups == 1 else None
        first, second = links
        depthwise = _is_depthwise(first.conv) and first.conv.in_channels == first.conv.out_channels
        return tuple(links) if depthwise and _is_pointwise(second.conv) else None

    def pooled(self, node) -> Link | None:
        if not isinstance(node, torch.fx.Node) or node.op != "call_function" or node.target not in _RESIZES:
            return None
        links, node = self.links(node.args[0] if node.args else node.kwargs.get("input"))
        pool = self.module(node) if isinstance(node, torch.fx.Node) else None
        if (
            len(links) != 1
            or not _is_pointwise(links[0].conv)
            or original_class(pool or torch.nn.Identity()) not in (torch.nn.AdaptiveAvgPool2d,)
        ):
            return None
        whole = pool.output_size in (1, (1, 1), [1, 1])
        return links[0] if whole and node.args == (self.input,) else None

    def links(self, node) -> tuple[list[Link], torch.fx.Node | None]:
        """The convolutions in a row that end in `node`, first to last, and the node that the first one reads."""
        links, modules = [], []
        while isinstance(node, torch.fx.Node):
            module = self.module(node)
            if module is None or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], torch.fx.Node):
                if not (node.op == "call_function" and node.target in (F.relu, torch.relu)) or len(node.args) != 1:
                    break
                module = torch.nn.ReLU()
            elif original_class(module) is torch.nn.Conv2d:
                found = Link.chain([module, *reversed(modules)])
                if len(found) != 1 or not _in_order(modules):
                    return [], None
                links.insert(0, found[0])
                modules, node = [], node.args[0]
                continue
            elif type(module) is torch.nn.Identity:
                node = node.args[0]
                continue
            elif _norm_activation(module) is None and activation_name(module) is None:
                break
            modules.append(module)
            node = node.args[0]
        return ([], None) if modules else (links, node)


def _norm_activation(module) -> str | None:
    return own_activation(module) if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) else None


def _in_order(modules) -> bool:
    """Whether what follows a convolution (last one first) is a norm, an activation, or one behind the other."""
    kinds = ["norm" if _norm_activation(m) is not None else "activation" for m in reversed(modules)]
    if kinds == ["norm", "activation"]:
        return _norm_activation(modules[1]) == "none"
    return kinds in ([], ["norm"], ["activation"])


def _is_depthwise(conv) -> bool:
    return 1 < conv.in_channels == conv.groups


def _is_pointwise(conv) -> bool:
    return (
        conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding in ((0, 0), "valid") and conv.groups == 1
    )


def _keeps_size(conv) -> bool:
    """Whether a convolution has an odd square-dilated kernel, stride 1 and zeros of padding that keep the size."""
    if conv.stride != (1, 1) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    if any(k % 2 == 0 for k in conv.kernel_size) or (
        max(conv.kernel_size) > 1 and conv.dilation[0] != conv.dilation[1]
    ):
        return False
    return all(p == d * (k // 2) for p, d, k in zip(conv.padding, conv.dilation, conv.kernel_size, strict=True))


def _agrees(whole: Pyramid | Separable, module: torch.nn.Module) -> bool:
    """Whether the module's own forward gives what the parts give, on a small image."""
    convolution = (whole.first if isinstance(whole, Separable) else whole.branches[0][0]).conv
    if convolution.weight.is_meta:
        return False  # nothing can be tried without data
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, convolution.in_channels, 5, 6), generator=generator)
    x = x.to(convolution.weight.device, convolution.weight.dtype)
    try:
        own = module(x)
        parts = _separable_by_parts(whole, x) if isinstance(whole, Separable) else _pyramid_by_parts(whole, x)
    except Exception:  # whatever a stranger's forward raises on such an image
        return False
    if not isinstance(own, torch.Tensor) or own.shape != parts.shape or not own.is_floating_point():
        return False
    return bool((own - parts).abs().max() <= 1e-2 * own.abs().max())


def _separable_by_parts(separable: Separable, x) -> torch.Tensor:
    y = _run(separable.second, _run(separable.first, x))
    return y + x if separable.adds_input else y


def _pyramid_by_parts(pyramid: Pyramid, x) -> torch.Tensor:
    found = []
    for branch in pyramid.branches:
        y = x
        for link in branch:
            y = _run(link, y)
        found.append(y)
    if pyramid.reduction == "sum":
        return sum(found)
    if pyramid.pool is not None:
        pooled = _run(pyramid.pool, x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        found.insert(0 if pyramid.pool_first else len(found), pooled)
    return _run(pyramid.project, torch.cat(found, 1))


def _run(link: Link, x) -> torch.Tensor:
    conv, norm = link.conv, link.norm
    y = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    if norm is not None:
        y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    return apply_activation(y, link.activation)
