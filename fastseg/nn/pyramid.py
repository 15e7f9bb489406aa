"""What ASPP and separable layers compute from their modules: which operator, with which norms folded into it.

A Link is a convolution with the norm and activation behind it. In eval mode without gradients the norms are scale and
shift in the operators' epilogues, from their present values in each call (see fastseg/nn/folding.py for why nothing is
cached). In training the operators give the batch statistics of all branches in the same call, and the norm of all
branches together is one pass over their common buffer. What is neither, such as a SyncBatchNorm or a norm that is
frozen among others that are not, runs through the norm's own module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from fastseg import dispatch
from fastseg.measuring import Attempt
from fastseg.nn import folding
from fastseg.nn.joint_norm import joint_norm, takes_together
from fastseg.ops.activation import apply_activation
from fastseg.ops.batch_norm import scale_and_shift
from fastseg.ops.convolution import call_operator, records, sized
from fastseg.ops.geometry import POINTWISE
from fastseg.ops.library import OVERLOADS

Vectors = tuple[torch.Tensor | None, torch.Tensor | None]


class Link(NamedTuple):
    """A convolution, and the norm (None: there is none) and activation behind it."""

    conv: torch.nn.Conv2d
    norm: torch.nn.Module | None
    activation: str
    modules: tuple[torch.nn.Module, ...]  # all of them, to look for hooks

    @classmethod
    def chain(cls, modules: Iterable[torch.nn.Module]) -> list[Link]:
        """Convolutions with what follows each, of modules that run in order; others (pooling, dropout) are left out."""
        links: list[Link] = []
        for module in modules:
            if isinstance(module, torch.nn.Conv2d):
                links.append(cls(module, None, "none", (module,)))
            elif links and isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                name = folding.own_activation(module) or "none"
                links[-1] = links[-1]._replace(norm=module, activation=name, modules=(*links[-1].modules, module))
            elif links and folding.activation_name(module) is not None:
                name = folding.activation_name(module)
                links[-1] = links[-1]._replace(activation=name, modules=(*links[-1].modules, module))
        return links

    def folds(self, input: torch.Tensor) -> bool:
        """Whether the norm is a constant scale and shift in this call."""
        if self.norm is None:
            return not (torch.is_grad_enabled() and _needs_grad(self.conv))
        if self.norm.training or not isinstance(self.norm, torch.nn.BatchNorm2d):
            return False
        return folding.may_fold(input, folding.Operands.of(self.conv, self.norm))

    def vectors(self) -> Vectors:
        """Scale and shift of bias and norm together."""
        if self.norm is None:
            return None, self.conv.bias
        operands = folding.Operands.of(self.conv, self.norm)
        return scale_and_shift(*operands.statistics, self.norm.eps)


class Asked(NamedTuple):
    """What dispatch is asked about a call of a block, and whether all norms are folded in it."""

    problem: dispatch.Problem
    folds: bool


class Pyramid(NamedTuple):
    """The parts of atrous spatial pyramid pooling."""

    branches: list[tuple[Link, ...]]  # one Link: a dense convolution; two: a depthwise and a pointwise one
    pool: Link | None
    pool_first: bool
    project: Link | None
    activation: str  # of the sum, with reduction "sum"
    reduction: str
    dropout: torch.nn.Module | None
    pool_by_running_stats: bool = False  # for a batch of one in training

    def run(self, input, backend: str | None, apart: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """The result, or None where the modules have to run one by one, as `apart` does."""
        return run_pyramid(self, input, backend, apart)

    def asks(self, input: torch.Tensor) -> Asked | None:
        """None where the modules have to run one by one, whatever dispatch says."""
        return _ask_pyramid(self, input)

    def describe(self) -> str:
        kind = "separable ASPP" if any(len(branch) == 2 for branch in self.branches) else "ASPP"
        form = "summed" if self.reduction == "sum" else "concatenated"
        pooled = " and a pooled one" if self.pool is not None else ""
        return f"{kind}, {len(self.branches)} {form} branches{pooled}"


class Separable(NamedTuple):
    """A depthwise and a pointwise convolution, and whether the input is added to their result."""

    first: Link
    second: Link
    adds_input: bool

    def run(self, input, backend: str | None, apart: Callable[[], torch.Tensor]) -> torch.Tensor | None:
        """The result, or None where the modules have to run one by one, as `apart` does."""
        return run_separable(self.first, self.second, input, backend, apart, self.adds_input)

    def asks(self, input: torch.Tensor) -> Asked | None:
        """None where the modules have to run one by one, whatever dispatch says."""
        return _ask_separable(self.first, self.second, input, self.adds_input)

    def describe(self) -> str:
        return "separable convolution"


def run_separable(
    first: Link, second: Link, input, backend: str | None, apart: Callable[[], torch.Tensor], adds_input: bool = False
) -> torch.Tensor | None:
    """second(first(input)), and perhaps the input added, or None where the modules run one by one, as `apart` does."""
    asked = _ask_separable(first, second, input, adds_input)
    if asked is None:
        return None

    def run(name):
        return apart() if name == "native" else run_separable(first, second, input, name, apart, adds_input)

    folds = asked.folds
    choice = dispatch.choose(asked.problem, backend, _attempt(asked.problem, run, input, (first, second)))
    unmeasured = choice.margin is None and backend is None and not folds and input.is_cpu
    if choice.backend == "native" or (
        unmeasured and dispatch.pointwise_trains_on_native(second.conv.in_channels, second.conv.out_channels)
    ):
        return None
    depthwise = first.conv
    rows, columns = depthwise.padding
    geometry = (depthwise.stride, (rows, rows, columns, columns), depthwise.dilation)
    weights = (depthwise.weight, second.conv.weight)
    if folds:
        scales, shifts = zip(first.vectors(), second.vectors(), strict=True)
        last = second.activation
    else:
        scales, shifts, last = (None, None), (depthwise.bias, second.conv.bias), "none"
        if second.norm is None:
            last = second.activation
    y = call_operator(
        OVERLOADS["separable_conv2d"][choice.backend], (input, *weights, *shifts),
        input, *weights, *shifts, *geometry, first.activation, last, *scales,
    )  # fmt: skip
    if not folds and second.norm is not None:
        y = apply_activation(second.norm(y), second.activation)
    return y + input if adds_input else y


def _ask_separable(first: Link, second: Link, input, adds_input: bool) -> Asked | None:
    links, depthwise = (first, second), first.conv
    if _looked_at(links) or not isinstance(input, torch.Tensor) or input.dim() != 4:
        return None
    if depthwise.padding_mode != "zeros" or isinstance(depthwise.padding, str) or not _one_dtype(input, links):
        return None
    folds = first.folds(input) and second.folds(input)
    if not folds and first.norm is not None:
        return None  # its statistics are those of the whole batch
    return Asked(_problem("separable_conv2d", links, folds, input, adds_input), folds)


def run_pyramid(pyramid: Pyramid, input, backend: str | None, apart: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """The pyramid's result, or None where its modules have to run one by one, as `apart` does."""
    asked = _ask_pyramid(pyramid, input)
    if asked is None:
        return None

    def run(name):
        return apart() if name == "native" else run_pyramid(pyramid, input, name, apart)

    links = [*_branch_links(pyramid), *_ends(pyramid)]
    choice = dispatch.choose(asked.problem, backend, _attempt(asked.problem, run, input, links, pyramid.dropout))
    if choice.backend == "native":
        return None
    y = _branches(pyramid, asked.problem.operator, input, choice.backend, asked.folds)
    if pyramid.project is not None:
        y = _project(pyramid, y, input, choice.backend)
    return y if pyramid.dropout is None else pyramid.dropout(y)


def _ask_pyramid(pyramid: Pyramid, input) -> Asked | None:
    links, ends = _branch_links(pyramid), _ends(pyramid)
    if not isinstance(input, torch.Tensor) or input.dim() != 4 or input.numel() == 0:
        return None
    if _looked_at((*links, *ends)) or not _one_dtype(input, (*links, *ends)):
        return None
    operator = _operator(pyramid)
    if operator is None:
        return None
    folds = all(link.folds(input) for link in links)
    if not folds and any(branch[0].norm is not None for branch in pyramid.branches if len(branch) == 2):
        return None  # a norm in the middle of a branch needs the statistics of the whole batch
    return Asked(_problem(operator, (*links, *ends), folds, input, pyramid.reduction), folds)


def _branch_links(pyramid: Pyramid) -> list[Link]:
    return [link for branch in pyramid.branches for link in branch]


def _ends(pyramid: Pyramid) -> list[Link]:
    return [link for link in (pyramid.pool, pyramid.project) if link is not None]


def _problem(operator: str, links, folds: bool, input: torch.Tensor, kind) -> dispatch.Problem:
    """A call of a block that is made of `links`; `kind` is what else decides its time."""
    sizes = sized(operator, input, (), (*map(_sizes, links), kind))
    gradient = sizes is not None and records((input, *(link.conv.weight for link in links)))
    epilogue = "norm" if folds and any(link.norm is not None for link in links) else "none"
    return dispatch.Problem(operator, input.device.type, input.dtype, sizes, gradient, epilogue)


def _sizes(link: Link) -> tuple:
    conv = link.conv
    normed = "none" if link.norm is None else "norm"
    return (*conv.weight.shape, conv.stride, conv.padding, conv.dilation, normed, link.activation)


def _attempt(problem, run: Callable[[str], torch.Tensor], input, links, dropout=None) -> Attempt | None:
    if problem.geometry is None:
        return None
    tensors = (input, *(tensor for link in links for tensor in (link.conv.weight, link.conv.bias)))
    changing = [link.norm for link in links if link.norm is not None]
    changing += [] if dropout is None else [dropout]
    return Attempt(folding.disarmed()(run), tensors, repeatable=not any(module.training for module in changing))


def _operator(pyramid: Pyramid) -> str | None:
    """The operator for these branches; None where there is none."""
    depthwise = [branch for branch in pyramid.branches if len(branch) == 2]
    if len({branch[-1].activation for branch in pyramid.branches}) > 1:
        return None
    if not depthwise:
        return "aspp_branches"
    plain = len(pyramid.branches) - len(depthwise)
    alike = len({branch[0].activation for branch in depthwise}) == 1 and pyramid.reduction == "concat"
    return "separable_aspp_branches" if alike and pyramid.branches[plain:] == depthwise else None


def _branches(pyramid: Pyramid, operator: str, input, backend: str, folds: bool) -> torch.Tensor:
    lasts = [branch[-1] for branch in pyramid.branches]
    depthwise = [branch[0] for branch in pyramid.branches if len(branch) == 2]
    weights = [link.conv.weight for link in lasts]
    sums = pyramid.reduction == "sum"
    scale, shift = _joined(lasts, folds, add=sums)
    activation = pyramid.activation if sums else lasts[0].activation
    norms = [link.norm for link in lasts]
    normed = not folds and any(norm is not None for norm in norms)
    together = normed and takes_together(norms, input)
    act = "none" if normed else activation
    overload = OVERLOADS[operator][backend]
    if depthwise:
        filters = [link.conv.weight for link in depthwise]
        depthwise_scale, depthwise_shift = _joined(depthwise, folds)
        dilations = [link.conv.dilation[0] for link in depthwise]
        args = (
            input, filters, weights, depthwise_shift, shift, dilations, depthwise[0].activation, act, together,
            depthwise_scale, scale,
        )  # fmt: skip
    else:
        filters, depthwise_shift = [], None
        dilations = [link.conv.dilation[0] for link in lasts]
        args = (input, weights, shift, dilations, act, pyramid.reduction, together, scale)
    y, statistics = call_operator(overload, (input, *filters, *weights, depthwise_shift, shift), *args)
    if not normed:
        return y
    if together:
        return joint_norm(y, statistics, norms, activation)
    parts = y.split([weight.shape[0] for weight in weights], 1)
    parts = [part if norm is None else norm(part) for part, norm in zip(parts, norms, strict=True)]
    return apply_activation(torch.cat(parts, 1), activation)


def _joined(links: list[Link], folds: bool, add: bool = False) -> Vectors:
    """Scales and shifts of all links side by side (with `add`: their biases' sum); None stands for ones and zeros."""
    pairs = [link.vectors() if folds else (None, link.conv.bias) for link in links]
    if add:
        biases = [shift for _, shift in pairs if shift is not None]
        return None, sum(biases[1:], biases[0]) if biases else None
    scale = shift = None
    if any(a is not None for a, _ in pairs):
        like = next(a for a, _ in pairs if a is not None)
        ones = [
            like.new_ones(link.conv.out_channels) if a is None else a for link, (a, _) in zip(links, pairs, strict=True)
        ]
        scale = torch.cat(ones)
    if any(b is not None for _, b in pairs):
        like = next(b for _, b in pairs if b is not None)
        zeros = [
            like.new_zeros(link.conv.out_channels) if b is None else b
            for link, (_, b) in zip(links, pairs, strict=True)
        ]
        shift = torch.cat(zeros)
    return scale, shift


def _project(pyramid: Pyramid, y, input, backend: str) -> torch.Tensor:
    """The projection of the branches `y`; the pooled image, the same at every pixel, is a part of its bias."""
    link, pool = pyramid.project, pyramid.pool
    weight, bias, first = link.conv.weight, link.conv.bias, 0
    folds = link.folds(input)
    scale = None
    if folds:
        scale, bias = link.vectors()
    if pool is not None:
        width = pool.conv.out_channels
        first = width if pyramid.pool_first else 0
        seen = weight[:, :width] if pyramid.pool_first else weight[:, y.shape[1] :]
        constant = torch.nn.functional.linear(_pooled(pool, input, pyramid.pool_by_running_stats), seen.flatten(1))
        constant = constant if scale is None else constant * scale
        bias = constant if bias is None else constant + bias  # [N, K]
    weight = weight[:, first : first + y.shape[1]]
    done = folds or link.norm is None
    y = call_operator(
        OVERLOADS["dilated_conv2d"][backend], (y, weight, bias),
        y, weight, bias, *POINTWISE, link.activation if done else "none", scale,
    )  # fmt: skip
    return y if done else apply_activation(link.norm(y), link.activation)


def _pooled(pool: Link, input, by_running_stats: bool) -> torch.Tensor:
    """The pooled branch, one vector [N, K] an image."""
    z = torch.nn.functional.linear(input.mean((2, 3)), pool.conv.weight.flatten(1), pool.conv.bias)
    if pool.norm is not None:
        z = norm_of_pooled(pool.norm, z[:, :, None, None], by_running_stats).flatten(1)
    return apply_activation(z, pool.activation)


def norm_of_pooled(norm: torch.nn.Module, z: torch.Tensor, by_running_stats: bool) -> torch.Tensor:
    """`norm` of pooled images z [N, K, 1, 1]; of one image in training perhaps with the running statistics."""
    if by_running_stats and norm.training and z.shape[0] == 1 and norm.running_mean is not None:
        return torch.nn.functional.batch_norm(
            z, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
        )
    return norm(z)


def _needs_grad(conv: torch.nn.Conv2d) -> bool:
    return conv.weight.requires_grad or (conv.bias is not None and conv.bias.requires_grad)


def _looked_at(links) -> bool:
    """Whether somebody's hooks would miss the calls of these modules."""
    if torch.nn.modules.module._has_any_global_hook():
        return True
    return any(folding.has_foreign_hooks(module) for link in links for module in link.modules)


def _one_dtype(input, links) -> bool:
    """Whether all weights are ordinary tensors like the input, without autocast in between."""
    device_type = input.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return False
    return all(
        type(link.conv.weight) in (torch.nn.Parameter, torch.Tensor)
        and link.conv.weight.dtype == input.dtype
        and link.conv.weight.device == input.device
        for link in links
    )
