# ruff: noqa: F401 -- imported fixtures
"""The receptive field and the output stride that summary gives: by gradients, and by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastseg
from fastseg.models.counts import summary
from fastseg.models.deeplab_v2 import deeplab_v2
from fastseg.models.deeplab_v3 import deeplab_v3
from fastseg.models.unet import unet
from tests.models.subjects import Function, conv, native
from tests.networks import one_thread


def shuffled(x):
    return x.unflatten(1, (1, 2)).transpose(1, 2).flatten(1, 2)


def written_in_place(x, first, second):
    y = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    y[:, :1] = first(x)[:, :1]
    y[:, 1:].add_(second(x)[:, 1:])
    return y.relu_()


def cropped(x, first, second):
    return torch.cat([first(x)[:, :, :-8, :-6], second(x)[:, :, 8:, 6:]], 1)


def smaller_and_back(align_corners):
    def forward(x, first):
        small = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=align_corners)
        return x + F.interpolate(first(small), x.shape[-2:], mode="bilinear", align_corners=align_corners)

    return forward


def enlarged(mode, align_corners=None, factor=2):
    def forward(x, first, second):
        return second(F.interpolate(first(x), scale_factor=factor, mode=mode, align_corners=align_corners))

    return forward


def beside_enlarged(mode, align_corners=None):
    def forward(x, layer):
        return torch.cat([x, F.interpolate(layer(x), x.shape[-2:], mode=mode, align_corners=align_corners)], 1)

    return forward


def channels_in_the_end(x, first, norm, linear, second):
    return second(linear(norm(first(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2))


def attended(x, layer):
    return x * layer(torch.cat([x.mean(1, keepdim=True), x.sum(1, keepdim=True)], 1))


def restacked(x, layer):
    return layer(torch.stack([x[:, 1], x.unbind(1)[0]], 1))


NETWORKS = {
    "dilated": lambda: nn.Sequential(conv(3), conv(3, dilation=(3, 2)), conv((1, 2))),
    "padded": lambda: nn.Sequential(conv(3, padding=1), conv(5, padding="same", dilation=2)),
    "strided": lambda: nn.Sequential(conv(3, stride=(2, 1)), conv(3, stride=2), conv(3)),
    "pooled": lambda: nn.Sequential(conv(3), nn.AvgPool2d(3, (2, 1), 1), conv(3), nn.AvgPool2d(2), conv(2)),
    "normed": lambda: nn.Sequential(conv(3), nn.BatchNorm2d(2), nn.Hardswish(inplace=True), conv(3, stride=2)),
    "transposed": lambda: nn.Sequential(conv(2, stride=2), nn.ConvTranspose2d(2, 2, 2, 2), conv(4), conv(2)),
    "transposed-wide": lambda: nn.Sequential(conv(3, stride=3), nn.ConvTranspose2d(2, 2, 5, 3, 1, 1), conv(2)),
    "transposed-narrow": lambda: nn.Sequential(conv(2, stride=2), nn.ConvTranspose2d(2, 2, 1, 2), conv(2)),
    "nearest": lambda: Function(enlarged("nearest"), conv(2, stride=2), conv(2)),
    "nearest-exact": lambda: Function(enlarged("nearest-exact", factor=1.5), conv(2, stride=2), conv(2)),
    "bilinear": lambda: Function(enlarged("bilinear", False), conv(3, stride=2), conv(2)),
    "bilinear-corners": lambda: Function(enlarged("bilinear", True, 4), conv(3, stride=4), conv(3)),
    "bilinear-odd-factor": lambda: Function(enlarged("bilinear", False, 3), conv(3, stride=2), conv(3)),
    "bicubic": lambda: Function(enlarged("bicubic", False), conv(2, stride=2), conv(2)),
    "nearest-skip": lambda: Function(beside_enlarged("nearest"), conv(2, stride=2)),
    "nearest-exact-skip": lambda: Function(beside_enlarged("nearest-exact"), conv(2, stride=2)),
    "bilinear-skip": lambda: Function(beside_enlarged("bilinear", False), conv(2, stride=2)),
    "scales": lambda: Function(smaller_and_back(False), conv(3, padding=1)),
    "scales-corners": lambda: Function(smaller_and_back(True), conv(3, padding=1)),
    "branches": lambda: Function(lambda x, a, b: a(x) + b(x), conv(3, padding=1), conv(3, padding=4, dilation=4)),
    "cropped-skip": lambda: Function(cropped, conv(3), conv(3)),
    "sliced": lambda: Function(lambda x, a: a(x[:, :, 1::2, ::3]), conv(2)),
    "written-in-place": lambda: Function(written_in_place, conv(3, padding=1), conv(3, padding=3, dilation=3)),
    "reflected": lambda: nn.Sequential(nn.ReflectionPad2d((3, 0, 1, 2)), conv(3), nn.ZeroPad2d(1), conv(3)),
    "pixel-shuffle": lambda: nn.Sequential(nn.PixelUnshuffle(3), nn.Conv2d(18, 8, 2), nn.PixelShuffle(2), conv(2)),
    "channel-shuffle": lambda: nn.Sequential(conv(3), Function(shuffled), conv(3)),
    "attention-of-places": lambda: Function(attended, conv(3, padding=1)),
    "restacked": lambda: Function(restacked, conv(3)),
    "softmax": lambda: nn.Sequential(conv(3), nn.Softmax(1), conv(3)),
    "channels-in-the-end": lambda: Function(channels_in_the_end, conv(3), nn.LayerNorm(2), nn.Linear(2, 2), conv(2)),
    "bins": lambda: nn.Sequential(conv(3), nn.AdaptiveAvgPool2d(7), conv(2)),
    "unet": lambda: unet(2, 2, base_channels=1, layers="native"),
    "unet-bilinear": lambda: unet(2, 2, base_channels=2, depth=2, norm="batch", up="bilinear", layers="native"),
}
SIZES = {"pixel-shuffle": 42, "scales-corners": 65, "unet": 236, "unet-bilinear": 92}


def measured_field(model: nn.Module, size: int) -> tuple[int, int]:
    """The most rows and columns of an image that the gradient of one output reaches."""
    for parameter in model.double().eval().parameters():
        nn.init.uniform_(parameter, 0.5, 1)  # nothing cancels
    x = torch.rand(1, 2, size, size, dtype=torch.float64, requires_grad=True)
    y = model(x).sum(1)[0]
    fields = []
    for axis in range(2):
        line = y.select(1 - axis, y.shape[1 - axis] // 2)
        gradients = [torch.autograd.grad(value, x, retain_graph=True)[0].sum((0, 1)) for value in line]
        reached = [gradient.sum(1 - axis).nonzero().flatten() for gradient in gradients]
        fields.append(max(int(places[-1] - places[0]) + 1 for places in reached if len(places)))
    return tuple(fields)


class TestReceptiveField:
    @pytest.mark.parametrize("name", NETWORKS)
    def test_is_what_gradients_reach(self, name, monkeypatch):
        # The gradient of a maximum reaches one of the values that it looks at.
        monkeypatch.setattr(nn.MaxPool2d, "forward", lambda self, x: F.avg_pool2d(x, self.kernel_size, self.stride))
        model, size = NETWORKS[name](), SIZES.get(name, 40)
        assert summary(model, size, 2).receptive_field == measured_field(model, size)

    @pytest.mark.parametrize("arguments", [(2,), (3, 2, 1), ((3, 2), (1, 2))], ids=["2", "3-2-1", "3x2-1x2"])
    def test_of_maximum_is_that_of_mean(self, arguments):
        fields = [
            summary(nn.Sequential(conv(3), pool(*arguments), conv(3)), 40).receptive_field
            for pool in (nn.MaxPool2d, nn.AvgPool2d)
        ]
        assert fields[0] == fields[1]

    def test_of_dilated_maximum(self):
        assert summary(nn.MaxPool2d(3, 1, dilation=4), 40).receptive_field == (9, 9)

    def test_goes_on_beyond_the_image(self):
        layer = conv(3, padding=18, dilation=18)
        assert summary(layer, 9).receptive_field == summary(layer, 99).receptive_field == (37, 37)

    def test_is_before_the_last_resize(self):
        layers = [conv(3), nn.Upsample(scale_factor=2, mode="bilinear")]
        assert summary(nn.Sequential(*layers), 20).receptive_field == (3, 3)
        assert summary(nn.Sequential(*layers, conv(1)), 20).receptive_field == (4, 4)

    def test_of_the_first_tensor(self):
        model = Function(lambda x, a, b: {"out": a(x), "aux": b(x)}, conv(3), conv(7))
        assert summary(model, 20).receptive_field == (3, 3)

    def test_of_the_unpadded_unet(self):
        """Some logits see less, and none sees more."""
        assert summary(native(unet), 572).receptive_field == (204, 204)


def squeezed(x, first, second):
    return first(x) * second(x.mean((2, 3), keepdim=True)).sigmoid()


def pooled_branch(x, first, second):
    pooled = second(F.adaptive_avg_pool2d(x, 1))
    return first(x) + F.interpolate(pooled, x.shape[-2:], mode="bilinear", align_corners=False)


class TestWholeImage:
    @pytest.mark.parametrize("function", [squeezed, pooled_branch], ids=["squeezed", "pooled-branch"])
    def test_pooling_is_named_and_left_out_of_the_field(self, function):
        found = summary(Function(function, conv(3, padding=1), conv(1)), 20)
        assert found.receptive_field == (3, 3)
        assert found.whole_image == ["Function"]
        assert "receptive field: 3x3 pixels; the whole image through Function" in str(found)

    def test_norm_over_the_image(self):
        found = summary(nn.Sequential(conv(3), nn.GroupNorm(1, 2), conv(3)), 20)
        assert (found.receptive_field, found.whole_image) == ((5, 5), ["1"])

    def test_norm_of_an_instance(self):
        assert summary(nn.Sequential(conv(3), nn.InstanceNorm2d(2)), 20).whole_image == ["1"]

    def test_nothing_but_the_whole_image(self):
        model = nn.Sequential(conv(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 5))
        found = summary(model, (20, 24))
        assert (found.receptive_field, found.whole_image) == ((20, 24), ["1"])

    def test_aspp(self):
        model = nn.Sequential(conv(3), fastseg.nn.ASPP(2, 2, (2, 4)))
        found = summary(model, 20)
        assert (found.receptive_field, found.whole_image) == ((11, 11), ["1.convs.3.0"])

    def test_an_output_that_does_not_depend_on_the_image(self):
        assert summary(Function(lambda x: torch.ones(3)), 20).receptive_field == (0, 0)


class TestOutputStride:
    @pytest.mark.parametrize("stride", [8, 16, 32])
    def test_as_built(self, stride):
        model = native(deeplab_v3, encoder="resnet50", output_stride=stride)
        assert summary(model, 65).output_stride == stride

    def test_scales_do_not_count(self):
        assert summary(native(deeplab_v2, encoder="vgg16"), 65).output_stride == 8

    def test_bins_do_not_count(self):
        model = nn.Sequential(conv(3, stride=2), nn.AdaptiveAvgPool2d(3), conv(1))
        assert summary(model, 33).output_stride == 2

    def test_up_and_down_again(self):
        model = nn.Sequential(conv(2, stride=4), nn.ConvTranspose2d(2, 2, 2, 2), nn.MaxPool2d(2), conv(1))
        assert summary(model, 32).output_stride == 4

    def test_unknown_without_convolutions(self):
        assert summary(nn.ReLU(), 32).output_stride is None
