"""Winograd's algorithm on the CPU keeps every promise wherever it can run, and runs where it pays.

Small shapes are left to the other kernels; FASTSEG_FORCE_WINOGRAD=1 gives them to this one, and =0 none.
"""

from __future__ import annotations

import pytest
import torch

import fastseg
from fastseg import extension
from fastseg.ops.library import OVERLOADS
from fastseg.testing import assert_within, expected_conv, integer_tensor, random_tensor
from tests import test_contract
from tests.conftest import RUNG, Target, on_threads
from tests.families import FAMILIES, ConvCase

pytestmark = pytest.mark.skipif(RUNG != "cpu", reason="the CPU kernels have their own rung")

CPU = Target("cpu", "cpu")
LAYOUTS = [torch.contiguous_format, torch.channels_last]
# The families made of dense convolutions, the operator itself first.
DENSE = [family for name in ("dilated_conv2d", "aspp") for family in FAMILIES if family.name == name]


def reaches(case) -> bool:
    if hasattr(case, "kernels"):
        return 3 in case.kernels
    return case.kernel == (3, 3) and case.stride == (1, 1)


CASES = [
    pytest.param(family, case, id=f"{family.name}-{name}")
    for family in DENSE
    for name, case in family.cases.items()
    if reaches(case) and case.batch > 0
]
PLAIN = [param for param in CASES if param.values[1].activation == "none"]
with_cases = pytest.mark.parametrize(("family", "case"), CASES)
with_plain_cases = pytest.mark.parametrize(("family", "case"), PLAIN)
with_layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])


@pytest.fixture
def forced(monkeypatch):
    monkeypatch.setenv("FASTSEG_FORCE_WINOGRAD", "1")


@pytest.fixture
def cpu(forced):
    return CPU


@with_cases
@with_layouts
def test_forward_within_bound(family, case, layout, cpu):
    test_contract.test_forward_within_bound(family, case, torch.float32, layout, cpu)


@with_plain_cases
@with_layouts
def test_gradients_within_bound(family, case, layout, cpu):
    test_contract.test_gradients_within_bound(family, case, torch.float32, layout, cpu)


# batch, channels, size, outputs, dilation, of layers that it is fast for; at the last ones an image is a tile or a few.
LAYERS = {
    "32": (1, 32, 33, 32, 1),
    "128": (1, 128, 33, 128, 1),
    "256": (1, 256, 25, 256, 2),
    "96-to-256": (1, 96, 40, 256, 1),
    "512-d6": (1, 512, 33, 64, 6),
    "512-d12": (1, 512, 33, 256, 12),
    "512-d18": (1, 512, 33, 256, 18),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_no_less_accurate_than_native(layer):
    """Its sums are of larger numbers than the convolution's, but each is shorter."""
    batch, channels, size, outputs, dilation = layer
    assert forms(images=batch, channels=channels, outputs=outputs, size=(size, size), dilation=(dilation, dilation))
    case = ConvCase(batch, channels, (size, size), padding=(dilation,) * 2, dilation=(dilation,) * 2, outputs=outputs)
    test_contract.test_no_less_accurate_than_native(DENSE[0], case, torch.float32, CPU)


@with_plain_cases
def test_exact_on_small_integers(family, case, cpu):
    test_contract.test_exact_on_small_integers(family, case, torch.float32, cpu)


@with_plain_cases
@with_layouts
def test_every_element_is_written(family, case, layout, cpu, poison):
    test_contract.test_every_element_is_written(family, case, layout, cpu, None)


@with_plain_cases
@with_layouts
def test_nothing_outside_is_read(family, case, layout, cpu):
    test_contract.test_nothing_outside_is_read(family, case, layout, cpu)


@with_plain_cases
@pytest.mark.parametrize("where", range(4), ids=["input", "weight", "bias", "grad_output"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
def test_non_finite_values_stay_in_their_window(family, case, where, value, cpu):
    """Sums and differences spread them: such calls are computed again by the other kernels."""
    test_contract.test_non_finite_values_stay_in_their_window(family, case, where, value, torch.channels_last, cpu)


@pytest.mark.parametrize("family", DENSE, ids=lambda f: f.name)
def test_any_strides(family, cpu):
    test_contract.test_any_strides(family, cpu)


# batch, channels, size, outputs, padding, dilation: several blocks of channels, of tiles, and of those of grad_weight.
SHAPES = {
    "channels": (1, 270, (6, 5), 300, (1, 1), (1, 1)),
    "tiles": (3, 20, (20, 18), 17, (1, 1), (1, 1)),
    "passes": (1, 5, (70, 66), 256, (2, 2), (2, 2)),
    "no-padding": (2, 16, (15, 16), 24, (0, 0), (3, 2)),
    "much-padding": (1, 16, (7, 6), 24, (5, 4), (1, 2)),
}


def allowed(rows, columns):
    """The forms of axes for which these cost least: "three" rounds more, and is for one axis and AVX-512 alone."""
    if extension.EXTENSION.cpu_capability() == "avx512":
        return ("two" if rows == columns == "three" else rows), columns
    return tuple("two" if form == "three" else form for form in (rows, columns))


# An axis for each form: size, dilation.
AXES = {"two": (8, 2), "pair": (7, 4), "triple": (8, 3), "three": (9, 1)}


@pytest.mark.parametrize("columns", AXES)
@pytest.mark.parametrize("rows", AXES)
def test_every_form(rows, columns, forced, poison):
    """Within the bound and exact on small integers, in all three directions."""
    (height, *dilation), (width, last) = AXES[rows], AXES[columns]
    dilation.append(last)
    found = forms(channels=40, outputs=36, size=(height, width), dilation=dilation)
    assert found == allowed(rows, columns)
    geometry = ([1, 1], [dilation[0]] * 2 + [dilation[1]] * 2, dilation)
    for maker in (random_tensor, integer_tensor):
        x, weight = maker((2, 40, height, width), torch.float32, seed=1), maker((36, 40, 3, 3), torch.float32, seed=2)
        grad_y = maker((2, 36, height, width), torch.float32, seed=3)
        y = OVERLOADS["dilated_conv2d"]["cpu"](x, weight, None, *geometry, "none")
        grads = OVERLOADS["dilated_conv2d_backward"]["cpu"](grad_y, x, weight, *geometry, [True, True, False])
        wanted = expected_conv(x, weight, None, *geometry, grad_output=grad_y)
        for name, result, bound in zip(("y", "grad_x", "grad_weight"), (y, *grads[:2]), wanted[:3], strict=True):
            assert_within(result, bound, name)
            assert maker is random_tensor or torch.equal(result.double(), bound.value)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("weight_layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_block(shape, layout, weight_layout, monkeypatch, poison):
    """Within the bound, the same on any number of threads, and not what the other kernels compute."""
    batch, channels, size, outputs, padding, dilation = shape
    x = random_tensor((batch, channels, *size), torch.float32, seed=1, memory_format=layout)
    weight = random_tensor((outputs, channels, 3, 3), torch.float32, seed=2, memory_format=weight_layout)
    bias = random_tensor((outputs,), torch.float32, seed=3)
    geometry = ([1, 1], [padding[0]] * 2 + [padding[1]] * 2, list(dilation))

    def results():
        y = OVERLOADS["dilated_conv2d"]["cpu"](x, weight, bias, *geometry, "silu")
        grad_y = random_tensor(tuple(y.shape), torch.float32, seed=4, memory_format=layout)
        return y, *OVERLOADS["dilated_conv2d_backward"]["cpu"](grad_y, x, weight, *geometry, [True] * 3), grad_y

    monkeypatch.setenv("FASTSEG_FORCE_WINOGRAD", "0")
    others, found = results(), []
    monkeypatch.setenv("FASTSEG_FORCE_WINOGRAD", "1")
    for count in (1, 2, 5):
        with on_threads(count):
            found.append(results())
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(found[0][:3], others[:3], strict=True))
    *results, grad_y = found[0]
    wanted = expected_conv(x, weight, bias, *geometry, "silu", grad_y)
    for name, result, bound in zip(("y", "grad_x", "grad_weight", "grad_bias"), results, wanted, strict=True):
        assert_within(result, bound, name)


def forms(*, images=1, channels=256, outputs=256, size=(65, 65), kernel=(3, 3), stride=(1, 1), dilation=(2, 2)):
    padding = [d * (k // 2) for d, k in zip(dilation, kernel, strict=True)]
    output = [(n - 1) // s + 1 for n, s in zip(size, stride, strict=True)]
    padding = [padding[0]] * 2 + [padding[1]] * 2
    return extension.EXTENSION.winograd_forms(
        images, channels, outputs, size, output, kernel, stride, padding, dilation
    )


def test_it_runs_where_it_pays():
    assert forms() == allowed("three", "three")
    assert forms(channels=2048, size=(33, 33), dilation=(6, 6)) == allowed("three", "three")
    assert forms(channels=2048, size=(33, 33), dilation=(12, 12)) == ("triple", "triple")
    assert forms(channels=2048, size=(33, 33), dilation=(18, 18)) == ("pair", "pair")
    assert forms(channels=2048, size=(65, 129), dilation=(36, 36)) == allowed("pair", "three")
    assert forms(channels=32, outputs=32, size=(129, 129), dilation=(1, 1))
    assert not forms(kernel=(5, 5))
    assert not forms(kernel=(1, 1))
    assert not forms(stride=(2, 2))
    # Few channels are not worth the sums and differences.
    assert not forms(channels=16, outputs=16, size=(129, 129), dilation=(1, 1))
    # Few tiles are not worth the filter's transformation; most taps of a wide filter look at padding anyway.
    assert not forms(size=(4, 4))
    assert not forms(channels=2048, size=(33, 33), dilation=(33, 33))


def test_auto_takes_it(monkeypatch):
    x, weight = random_tensor((1, 128, 24, 24), torch.float32), random_tensor((128, 128, 3, 3), torch.float32)
    assert forms(channels=128, outputs=128, size=(24, 24), dilation=(1, 1))
    y = fastseg.ops.conv2d(x, weight, padding=1)
    assert torch.equal(y, fastseg.ops.conv2d(x, weight, padding=1, backend="cpu"))
    assert not torch.equal(y, fastseg.ops.conv2d(x, weight, padding=1, backend="native"))
    monkeypatch.setenv("FASTSEG_FORCE_WINOGRAD", "0")
    assert not torch.equal(y, fastseg.ops.conv2d(x, weight, padding=1, backend="cpu"))
