# ruff: noqa: F401 -- imported fixtures
"""Backbones: the same networks as torchvision's and timm's, dilated so that nothing but the resolution changes."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn

from fastseg.models.backbones import BACKBONES, build_backbone
from fastseg.models.backbones.xception import Xception65
from fastseg.testing import assert_alike, random_tensor
from tests.networks import lively, one_thread

SIZE = (65, 70)


def images(size=SIZE, batch=1, channels=3) -> torch.Tensor:
    return random_tensor((batch, channels, *size), torch.float32)


def built(encoder, output_stride=32, **options) -> nn.Module:
    torch.manual_seed(0)
    return lively(build_backbone(encoder, output_stride, **options)).eval()


def on_meta(encoder, output_stride=32, **options) -> nn.Module:
    with torch.device("meta"):
        return build_backbone(encoder, output_stride, **options)


@torch.no_grad()
def features(backbone, x) -> list[torch.Tensor]:
    return backbone(x)


class TestTorchvision:
    """torchvision's weights load strictly, and give torchvision's features bit for bit."""

    @pytest.mark.parametrize(
        ("name", "output_stride"),
        [("resnet18", 32), ("resnet50", 32), ("resnet50", 8), ("resnet50", 16)],
        ids=lambda value: str(value),
    )
    def test_resnet(self, name, output_stride):
        models = pytest.importorskip("torchvision.models")
        options = {}
        if output_stride < 32:
            options["replace_stride_with_dilation"] = [False, output_stride == 8, True]
        torch.manual_seed(0)
        theirs = lively(getattr(models, name)(weights=None, **options)).eval()
        ours = build_backbone(name, output_stride, keep_dilation=True).eval()
        ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
        wanted = []
        for layer in (theirs.relu, theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
            layer.register_forward_hook(lambda _, __, y: wanted.append(y))
        features(theirs, images())
        assert_all_equal(features(ours, images()), wanted)

    @pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2"])
    def test_initial_weights_are_distributed_alike(self, name):
        models = pytest.importorskip("torchvision.models")
        torch.manual_seed(0)
        theirs = {k: v for k, v in getattr(models, name)(weights=None).state_dict().items() if v.dim() == 4}
        options = {"tail": True} if name == "mobilenet_v2" else {}
        ours = {k: v for k, v in build_backbone(name, 32, **options).state_dict().items() if v.dim() == 4}
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert float(ours[key].std() / value.std()) == pytest.approx(1, rel=6 / math.sqrt(value.numel())), key

    def test_mobilenet_v2(self):
        models = pytest.importorskip("torchvision.models")
        torch.manual_seed(0)
        theirs = lively(models.mobilenet_v2(weights=None)).eval()
        ours = build_backbone("mobilenet_v2", 32, tail=True).eval()
        ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("classifier.")})
        wanted = []
        for index in (1, 3, 6, 13, 18):
            theirs.features[index].register_forward_hook(lambda _, __, y: wanted.append(y))
        features(theirs, images())
        assert_all_equal(features(ours, images()), wanted)

    @pytest.mark.parametrize("output_stride", [16, 32])
    def test_mobilenet_v3(self, output_stride):
        models = pytest.importorskip("torchvision.models")
        torch.manual_seed(0)
        theirs = lively(models.mobilenet_v3_large(weights=None, dilated=output_stride == 16)).features.eval()
        ours = build_backbone("mobilenet_v3_large", output_stride).eval()
        ours.load_state_dict(theirs.state_dict())
        wanted = []
        for index in (1, 3, 4, 12, 16):
            theirs[index].register_forward_hook(lambda _, __, y: wanted.append(y))
        features(theirs, images())
        assert_all_equal(features(ours, images()), wanted)


def assert_all_equal(found, wanted) -> None:
    assert len(found) == len(wanted)
    for y, z in zip(found, wanted, strict=True):
        assert torch.equal(y, z)


class TestDilation:
    @pytest.mark.parametrize(
        ("encoder", "output_stride", "options"),
        [
            ("resnet18", 8, dict(keep_dilation=True)),
            ("resnet18", 16, dict(keep_dilation=True)),
            ("resnet50", 8, dict(keep_dilation=True, multi_grid=(1, 2, 4))),
            ("resnet50", 8, dict(stride_in="1x1", ceil_mode=True)),
            ("resnet50_beta", 8, dict(multi_grid=(1, 2, 4))),
            ("mobilenet_v2", 8, dict(keep_dilation=True)),
            ("mobilenet_v2", 16, dict(keep_dilation=True)),
            ("xception65", 8, {}),
            ("xception65", 16, {}),
        ],
        ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else str(value),
    )
    def test_gives_the_strided_networks_features_and_those_between(self, encoder, output_stride, options):
        """The whole point of it (DeepLab v1, figure 2), exactly: dilation begins behind what had the stride."""
        strided = built(encoder, 32, **options)
        dilated = build_backbone(encoder, output_stride, **options).eval()
        dilated.load_state_dict(strided.state_dict())
        for index, (y, wanted) in enumerate(zip(features(dilated, images()), features(strided, images()), strict=True)):
            step = strided.strides[index] // dilated.strides[index]
            assert_alike(y[..., ::step, ::step], wanted)

    @pytest.mark.parametrize(
        ("output_stride", "options", "wanted"),
        [
            (32, dict(), [1, 1, 1, 1]),
            (16, dict(), [1, 2, 2, 2]),
            (8, dict(), [2, 4, 4, 4]),
            (16, dict(keep_dilation=True), [1, 1, 2, 2]),
            (8, dict(keep_dilation=True), [1, 2, 4, 4]),
            (16, dict(multi_grid=(1, 2, 4)), [1, 2, 4, 8]),
            (8, dict(multi_grid=(1, 2, 4)), [2, 4, 8, 16]),
            (32, dict(multi_grid=(1, 2, 4)), [1, 1, 2, 4]),
        ],
        ids=lambda value: str(value),
    )
    def test_of_the_first_block_of_layer3_and_the_blocks_of_layer4(self, output_stride, options, wanted):
        backbone = on_meta("resnet50", output_stride, **options)
        blocks = [backbone.layer3[0], *backbone.layer4]
        assert [block.conv2.dilation[0] for block in blocks] == wanted
        assert all(block.conv2.dilation == block.conv2.padding for block in blocks)

    @pytest.mark.parametrize(
        ("keep", "wanted"),
        [(False, {7: 2, 8: 2, 13: 2, 14: 4, 17: 4}), (True, {7: 1, 8: 2, 13: 2, 14: 2, 17: 4})],
        ids=["stage", "kept"],
    )
    def test_of_mobilenet_v2(self, keep, wanted):
        backbone = on_meta("mobilenet_v2", 8, keep_dilation=keep)
        assert {index: backbone.features[index].conv[1][0].dilation[0] for index in wanted} == wanted

    def test_of_basic_blocks_is_that_of_the_stage_behind_the_stride(self):
        block = on_meta("resnet18", 16, keep_dilation=True).layer4[0]
        assert (block.conv1.dilation, block.conv2.dilation) == ((1, 1), (2, 2))


class TestFeatures:
    @pytest.mark.parametrize("output_stride", [8, 16, 32])
    @pytest.mark.parametrize("encoder", sorted(BACKBONES.keys() - {"resnet34", "resnet50", "resnet101_beta"}))
    def test_have_the_channels_and_strides_that_are_said(self, encoder, output_stride):
        backbone = on_meta(encoder, output_stride, in_channels=4)
        found = features(backbone, torch.empty(2, 4, 97, 129, device="meta"))
        assert backbone.strides[-1] == output_stride
        assert [tuple(y.shape) for y in found] == [
            (2, channels, math.ceil(97 / stride), math.ceil(129 / stride))
            for channels, stride in zip(backbone.channels, backbone.strides, strict=True)
        ]

    @pytest.mark.parametrize(("ceil_mode", "wanted"), [(True, 17), (False, 16)], ids=["ceil", "floor"])
    def test_ceil_mode(self, ceil_mode, wanted):
        backbone = on_meta("resnet18", ceil_mode=ceil_mode)
        assert features(backbone, torch.empty(1, 3, 64, 64, device="meta"))[1].shape[-1] == wanted

    @pytest.mark.parametrize(("where", "strides"), [("1x1", (2, 1)), ("3x3", (1, 2))])
    def test_stride_in(self, where, strides):
        block = on_meta("resnet50", stride_in=where).layer2[0]
        assert (block.conv1.stride[0], block.conv2.stride[0]) == strides

    @pytest.mark.parametrize(
        ("encoder", "eps"),
        [("resnet50", 1e-5), ("mobilenet_v2", 1e-5), ("mobilenet_v3_large", 1e-3), ("xception65", 1e-3)],
        ids=["resnet50", "mobilenet_v2", "mobilenet_v3_large", "xception65"],
    )
    def test_eps(self, encoder, eps):
        for options, wanted in (({}, eps), ({"eps": 0.25}, 0.25)):
            backbone = on_meta(encoder, **options)
            assert {m.eps for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)} == {wanted}

    def test_beta_has_three_3x3_convolutions_for_the_7x7_and_its_strides_in_the_last_blocks(self):
        backbone = on_meta("resnet101_beta", 32)
        stem = [m for m in backbone.conv1 if isinstance(m, nn.Conv2d)]
        assert [(m.out_channels, m.kernel_size[0], m.stride[0]) for m in stem] == [(64, 3, 2), (64, 3, 1), (128, 3, 1)]
        layers = (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4)
        assert [len(layer) for layer in layers] == [2, 4, 23, 4]
        # The last of the 64, 128 and 256 wide blocks.
        assert [layer[0].conv2.out_channels for layer in layers[1:]] == [64, 128, 256]
        assert [layer[0].conv2.stride[0] for layer in layers[1:]] == [2, 2, 2]


class TestMobileNetV2Padding:
    """Zeros around the input of a block: its expansion turns them into the batch norm's shift."""

    def test_images_are_not_padded(self):
        backbone = on_meta("mobilenet_v2", padding="block")
        sizes = [y.shape[-1] for y in features(backbone, torch.empty(1, 3, 513, 513, device="meta"))]
        assert sizes == [256, 128, 64, 32, 16]

    def test_differs_at_the_border_alone(self):
        conv, block = (built("mobilenet_v2", padding=padding) for padding in ("conv", "block"))
        x = random_tensor((1, 24, 9, 9), torch.float32)
        y, z = (features(backbone.features[3], x) for backbone in (conv, block))
        assert_alike(y[..., 1:-1, 1:-1], z[..., 1:-1, 1:-1])
        assert float((y - z)[..., 0, :].abs().amin(1).max()) > 0

    def test_is_that_of_an_input_with_zeros_around(self):
        block = built("mobilenet_v2", 8, padding="block").features[8]
        expand, depthwise, *project = block.conv
        assert depthwise[0].dilation == (2, 2)
        x = random_tensor((1, 64, 7, 8), torch.float32)
        wide = torch.zeros(1, 64, 11, 12)
        wide[..., 2:-2, 2:-2] = x
        assert_alike(features(block, x), x + features(nn.Sequential(*project), features(depthwise, expand(wide))))


class TestXception:
    def test_65_layers(self):
        convolutions = [m for m in on_meta("xception65").modules() if isinstance(m, nn.Conv2d)]
        dense = [m for m in convolutions if m.kernel_size == (3, 3) and m.groups == 1]
        separable = [m for m in convolutions if m.groups > 1]
        assert len(dense) + len(separable) == 65
        assert [m.out_channels for m in dense] == [32, 64]

    def test_shortcuts_are_convolutions_where_a_block_changes_something(self):
        backbone = on_meta("xception65")
        assert [type(block.shortcut) for block in backbone.middle] == [nn.Identity] * 16
        blocks = (backbone.entry1, backbone.entry2, backbone.entry3, backbone.exit1)
        assert [(block.shortcut[0].out_channels, block.shortcut[0].stride[0]) for block in blocks] == [
            (128, 2), (256, 2), (728, 2), (1024, 2),
        ]  # fmt: skip
        assert not backbone.exit2.adds

    def test_the_stride_is_in_the_last_convolution_of_a_block(self):
        convs = [m for m in on_meta("xception65").entry1.convs.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
        assert [m.stride[0] for m in convs] == [1, 1, 2]

    def test_relu_stands_in_front_of_both_halves_but_behind_each_in_exit_block_2(self):
        backbone = on_meta("xception65")
        assert kinds(backbone.exit1.convs) == ["ReLU", "depthwise", "norm", "pointwise", "norm"] * 3
        assert kinds(backbone.exit2.convs) == ["depthwise", "norm", "ReLU", "pointwise", "norm", "ReLU"] * 3

    def test_low_level_features_are_those_of_the_second_convolution_of_entry_block_2(self):
        backbone = built("xception65")
        seen = []
        backbone.entry2.convs[-1].register_forward_hook(lambda _, __, y: seen.append(y))
        low_level = features(backbone, images())[1]
        assert low_level is seen[0]
        assert low_level.shape == (1, 256, 17, 18)
        assert bool((low_level < 0).any())


def kinds(sequential) -> list[str]:
    names = []
    for module in sequential.modules():
        if isinstance(module, nn.Conv2d):
            names.append("depthwise" if module.groups > 1 else "pointwise")
        elif isinstance(module, nn.BatchNorm2d):
            names.append("norm")
        elif isinstance(module, nn.ReLU):
            names.append("ReLU")
    return names


class TestTimm:
    @pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "swin_tiny_patch4_window7_224"])
    def test_features_are_timms(self, name):
        timm = pytest.importorskip("timm")
        backbone = built(f"timm:{name}")
        size = (224, 224) if "swin" in name else SIZE
        found = features(backbone, images(size))
        assert [y.shape[1] for y in found] == list(backbone.channels)
        assert [y.shape[2] for y in found] == [math.ceil(size[0] / stride) for stride in backbone.strides]
        theirs = timm.create_model(name, features_only=True).eval()
        theirs.load_state_dict(backbone.model.state_dict())
        wanted = features(theirs, images(size))
        assert_all_equal(found, [y.movedim(-1, 1) if "swin" in name else y for y in wanted])

    @pytest.mark.parametrize("output_stride", [8, 16])
    def test_output_stride(self, output_stride):
        pytest.importorskip("timm")
        backbone = on_meta("timm:resnet18", output_stride, in_channels=1)
        assert backbone.strides[-1] == output_stride
        assert features(backbone, torch.empty(1, 1, 64, 64, device="meta"))[-1].shape[-1] == 64 // output_stride

    @pytest.mark.parametrize(
        ("name", "output_stride", "sentence"),
        [
            ("no_such_network", 16, r"expected a name of timm.list_models\(\), but got 'no_such_network'"),
            ("vit_tiny_patch16_224", 8, "no features of 'vit_tiny_patch16_224' at output stride 8"),
            ("vgg11", 16, "no features of 'vgg11' at output stride 16"),
            ("swin_tiny_patch4_window7_224", 16, "no features of 'swin_tiny_patch4_window7_224' at output stride 16"),
        ],
        ids=["name", "transformer", "vgg", "swin"],
    )
    def test_what_timm_refuses_is_a_value_error(self, name, output_stride, sentence):
        pytest.importorskip("timm")
        with pytest.raises(ValueError, match=sentence):
            on_meta(f"timm:{name}", output_stride)

    def test_another_output_stride_than_wanted_is_a_value_error(self, monkeypatch):
        timm = pytest.importorskip("timm")
        create = timm.create_model
        monkeypatch.setattr(timm, "create_model", lambda name, output_stride, **rest: create(name, **rest))
        with pytest.raises(ValueError, match="expected output stride 32, which is all that timm has of 'resnet18'"):
            on_meta("timm:resnet18", 16)

    def test_without_timm_the_error_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "timm", None)
        with pytest.raises(ImportError, match=r"'timm:resnet18' needs the package timm: pip install"):
            build_backbone("timm:resnet18", 16)


@pytest.mark.parametrize(
    ("encoder", "output_stride", "options", "sentence"),
    [
        ("resnet20", 16, {}, r"expected encoder to be one of 'resnet18', .* or 'timm:NAME', but got 'resnet20'"),
        ("resnet50", 4, {}, "expected output_stride to be one of 8, 16, 32, but got 4"),
        ("xception65", 64, {}, "expected output_stride to be one of 8, 16, 32, but got 64"),
        ("mobilenet_v2", 2, {}, "expected output_stride to be one of 8, 16, 32, but got 2"),
        ("mobilenet_v3_large", 2, {}, "expected output_stride to be one of 8, 16, 32, but got 2"),
        ("xception65", 16, dict(multi_grid=(1, 2, 4)), r"expected options of xception65 \(.*\), but got multi_grid"),
        ("resnet50", 16, dict(multi_grid=(1, 2)), r"to have 3 factors for resnet50, but got \(1, 2\)"),
        ("resnet50", 16, dict(stride_in="7x7"), "expected stride_in to be one of '3x3', '1x1', but got '7x7'"),
        ("mobilenet_v2", 16, dict(padding="same"), "expected padding to be one of 'conv', 'block', but got 'same'"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_wrong_arguments(encoder, output_stride, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        on_meta(encoder, output_stride, **options)
