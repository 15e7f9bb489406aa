"""The variants of the CUDA kernels of parallel convolutions: every tile, what takes more than one launch, sums."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from fastseg.ops.library import OVERLOADS
from fastseg.testing import assert_within, expected_branches, integer_tensor, random_tensor
from tests.ops.test_dilated_cuda import GATHER, GRAD_WEIGHT, SMALL, dtype_of

REDUCTIONS = ("concat", "sum")


class Case(NamedTuple):
    channels: int
    widths: tuple[int, ...]
    kernels: tuple[int, ...] = (1, 3, 3)
    dilations: tuple[int, ...] = (1, 2, 4)
    size: tuple[int, int] = (9, 8)
    batch: int = 2


# For "sum" every branch has the first width.
CASES = {
    "in chunks": Case(24, (136, 40, 16)),
    "thin": Case(136, (8, 8, 8)),
    "odd": Case(21, (67, 5, 8)),
    "odd input": Case(3, (40, 16, 8)),
    "odd output": Case(40, (19, 8, 16)),
}


@pytest.fixture(autouse=True)
def only_cuda(request):
    if request.getfixturevalue("target").backend != "cuda":
        pytest.skip("about the CUDA kernels")


@pytest.fixture
def operand(request):
    if request.param == "tf32":
        request.getfixturevalue("tf32")
    return request.param


def variants(table, cases):
    return [
        pytest.param(operand, case, tile, id=f"{operand}-{case}-{tile}")
        for operand in table
        for case in cases
        for tile in table[operand]
        if not case.startswith("odd") or tile in SMALL
    ]


def problem(case: Case, dtype, device, reduction, maker=random_tensor):
    """x, weights and grad_output, in channels_last."""
    widths = case.widths if reduction == "concat" else case.widths[:1] * len(case.widths)
    shapes = [(case.batch, case.channels, *case.size)]
    shapes += [(width, case.channels, k, k) for width, k in zip(widths, case.kernels, strict=True)]
    shapes += [(case.batch, sum(widths) if reduction == "concat" else widths[0], *case.size)]
    x, *weights, grad_output = (
        maker(shape, dtype, seed=seed, device=device).contiguous(memory_format=torch.channels_last)
        for seed, shape in enumerate(shapes)
    )
    return x, weights, grad_output


def forward(
    x, weights, dilations, reduction, *, backend="cuda", bias=None, activation="none", statistics=False, scale=None
):
    run = OVERLOADS["aspp_branches"][backend]
    return run(x, weights, bias, list(dilations), activation, reduction, statistics, scale)


def backward(x, weights, grad_output, dilations, reduction, needs_input=True, needs_weights=True):
    run = OVERLOADS["aspp_branches_backward"]["cuda"]
    return run(grad_output, x, weights, list(dilations), reduction, needs_input, needs_weights)


def assert_forward(x, weights, dilations, reduction, **options):
    (wanted,) = expected_branches(x, weights, None, dilations, reduction=reduction, **options)
    assert_within(forward(x, weights, dilations, reduction)[0], wanted, "output")


def assert_gradients(x, weights, grad_output, dilations, reduction, which=("input", "weights"), **options):
    wanted = expected_branches(x, weights, None, dilations, "none", reduction, grad_output, **options)
    needs = ("input" in which, "weights" in which)
    grad_input, grad_weights = backward(x, weights, grad_output, dilations, reduction, *needs)
    if needs[0]:
        assert_within(grad_input, wanted[1], "grad of input")
    for i, (grad, bound) in enumerate(zip(grad_weights, wanted[2:], strict=False)):
        assert_within(grad, bound, f"grad of weight {i}")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("operand", "case", "tile"), variants(GATHER, ("in chunks", "thin", "odd")), indirect=["operand"]
)
def test_every_tile_of_the_output_and_of_grad_input_is_within_bound(
    operand, case, tile, reduction, target, monkeypatch
):
    monkeypatch.setenv("FASTSEG_FORCE_TILE", tile)
    x, weights, grad_output = problem(CASES[case], dtype_of(operand), target.device, reduction)
    rest = (CASES[case].dilations, reduction)
    assert_forward(x, weights, *rest, tf32=operand == "tf32")
    assert_gradients(x, weights, grad_output, *rest, ("input",), tf32=operand == "tf32")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("operand", "case", "tile"), variants(GRAD_WEIGHT, CASES), indirect=["operand"])
def test_every_tile_of_the_weights_gradients_is_within_bound(operand, case, tile, reduction, target, monkeypatch):
    monkeypatch.setenv("FASTSEG_FORCE_TILE", tile)
    monkeypatch.setenv("FASTSEG_FORCE_SPLITS", "3")
    x, weights, grad_output = problem(CASES[case], dtype_of(operand), target.device, reduction)
    rest = (CASES[case].dilations, reduction, ("weights",))
    assert_gradients(x, weights, grad_output, *rest, tf32=operand == "tf32")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("operand", "case", "tile"), variants(GATHER, ("in chunks", "odd")), indirect=["operand"])
def test_every_tile_sums_up_its_results(operand, case, tile, reduction, target, monkeypatch):
    """Small integers: the sums and the sums of squares are exact, and so is what they are of."""
    monkeypatch.setenv("FASTSEG_FORCE_TILE", tile)
    dtype = dtype_of(operand)
    x, weights, grad_output = problem(CASES[case]._replace(size=(11, 9)), dtype, target.device, reduction, ones)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    channels = grad_output.shape[1]
    options = dict(
        bias=integer_tensor((channels,), sums, seed=7, device=x.device),
        scale=2.0 ** integer_tensor((channels,), sums, low=0, high=1, seed=8, device=x.device),
        statistics=True,
    )
    ours, exact = (
        forward(x, weights, CASES[case].dilations, reduction, backend=name, **options) for name in ("cuda", "reference")
    )
    assert ours[1].dtype == torch.float64
    assert torch.equal(ours[1], exact[1])
    if dtype != torch.bfloat16 or float(exact[0].abs().max()) <= 256:
        assert torch.equal(ours[0], exact[0])


def ones(shape, dtype, **options):
    return integer_tensor(shape, dtype, low=-1, high=1, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sums_are_of_what_the_activation_gets(reduction, target):
    x, weights, _ = problem(CASES["in chunks"], torch.float32, target.device, reduction, ones)
    plain = forward(x, weights, (1, 2, 4), reduction, statistics=True)
    relu = forward(x, weights, (1, 2, 4), reduction, activation="relu", statistics=True)
    assert torch.equal(relu[1], plain[1])
    assert torch.equal(relu[0], plain[0].relu())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_images_have_no_sums(reduction, target):
    x, weights, grad_output = problem(CASES["thin"]._replace(batch=0), torch.float32, target.device, reduction)
    y, sums = forward(x, weights, (1, 2, 4), reduction, statistics=True)
    assert y.shape == grad_output.shape
    assert torch.equal(sums, sums.new_zeros(2, grad_output.shape[1]))


MANY = {
    "thirteen branches": Case(8, (8,) * 13, (3,) * 13, tuple(range(1, 14)), (9, 8), 1),
    "twelve branches": Case(8, (8,) * 12, (3,) * 12, tuple(range(1, 13)), (15, 14), 1),
    "five rates": Case(8, (16,) * 5, (1, 3, 3, 3, 3), (1, 2, 3, 5, 6), (13, 14)),
    "large filters": Case(4, (8, 8, 8), (7, 9, 5), (1, 1, 3), (12, 11)),
    "a tall and a wide filter": Case(4, (8, 8), (17, 3), (1, 4), (19, 18), 1),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", MANY)
def test_more_branches_and_rectangles_than_one_launch_takes(name, reduction, target):
    case = MANY[name]
    x, weights, grad_output = problem(case, torch.float32, target.device, reduction)
    if len(weights) <= 12 or reduction == "concat":
        assert_forward(x, weights, case.dilations, reduction)
        whole, filters, _ = problem(case, torch.float32, target.device, reduction, ones)
        ours, exact = (
            forward(whole, filters, case.dilations, reduction, backend=name, statistics=True)[1]
            for name in ("cuda", "reference")
        )
        assert torch.equal(ours, exact)
    if len(weights) <= 12:
        assert_gradients(x, weights, grad_output, case.dilations, reduction)
    else:
        assert_gradients(x, weights, grad_output, case.dilations, reduction, ("weights",))
        with pytest.raises(RuntimeError, match="expected at most 12 dense convolutions .* but got 13"):
            backward(x, weights, grad_output, case.dilations, reduction)


@pytest.mark.parametrize("first", [8, 3], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_slice_of_a_joined_gradient_is_read_in_place(dtype, first, target):
    """After torch.cat a gradient is a slice of channels."""
    case = CASES["in chunks"]
    x, weights, grad_output = problem(case, dtype, target.device, "concat")
    joined = grad_output.new_full((case.batch, first + grad_output.shape[1] + 8, *case.size), torch.nan)
    joined = joined.contiguous(memory_format=torch.channels_last)
    view = joined[:, first : first + grad_output.shape[1]].copy_(grad_output)
    assert view.stride(1) == 1
    assert_gradients(x, weights, view, case.dilations, "concat")
    apart, whole = (backward(x, weights, g, case.dilations, "concat") for g in (view, grad_output))
    if first == 8:
        assert torch.equal(apart[0], whole[0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_the_gradients_asked_for(reduction, target):
    x, weights, grad_output = problem(CASES["thin"], torch.float32, target.device, reduction)
    grad_input, none = backward(x, weights, grad_output, (1, 2, 4), reduction, True, False)
    assert none == []
    empty, grad_weights = backward(x, weights, grad_output, (1, 2, 4), reduction, False, True)
    assert empty.shape == (0,)
    both = backward(x, weights, grad_output, (1, 2, 4), reduction)
    assert torch.equal(both[0], grad_input)
    assert all(torch.equal(a, b) for a, b in zip(both[1], grad_weights, strict=True))


@pytest.mark.parametrize("splits", [2, 5])
def test_splits_of_the_pixels_add_up(splits, target, monkeypatch):
    """Border taps, and so branches, see fewer pixels and have fewer splits."""
    monkeypatch.setenv("FASTSEG_FORCE_SPLITS", str(splits))
    case = Case(8, (16, 8, 24), dilations=(1, 6, 9), size=(15, 14))
    arguments = problem(case, torch.float16, target.device, "concat")
    assert_gradients(*arguments, case.dilations, "concat", ("weights",))
    first, second = (backward(*arguments, case.dilations, "concat")[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
