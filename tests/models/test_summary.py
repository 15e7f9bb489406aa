# ruff: noqa: F401 -- imported fixtures
"""summary: published counts, counts by trying all, what it says, and that nothing is changed."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastseg
from fastseg import ceilings, dispatch
from fastseg.models.counts import summary
from fastseg.models.deeplab_v1 import deeplab_v1
from fastseg.models.deeplab_v2 import deeplab_v2
from fastseg.models.deeplab_v3 import deeplab_v3
from fastseg.models.deeplab_v3plus import deeplab_v3plus
from fastseg.models.unet import unet
from tests.models.subjects import Function, conv, native, smp_model, timm_model, torchvision_model
from tests.networks import one_thread

TORCHVISION = {
    "deeplabv3_resnet50": (42_004_074, "178.722", 8),
    "deeplabv3_resnet101": (60_996_202, "258.743", 8),
    "deeplabv3_mobilenet_v3_large": (11_029_328, "10.452", 16),
}
BETA = {"encoder": "resnet101_beta", "separable": False, "encoder_options": {"multi_grid": (1, 2, 4)}}
# At 513 pixels: options of deeplab_v3plus; billions of multiply-adds in the paper, which are TensorFlow's; plain ones.
PAPER = {
    "xception65-16": (dict(separable=False, decoder_convs=0), 68.00, "64.92"),
    "xception65-16-decoder": (dict(separable=False), 89.76, "86.68"),
    "xception65-16-decoder-separable": (dict(), 54.17, "54.04"),
    "xception65-8": (dict(separable=False, decoder_convs=0, output_stride=8), 240.85, None),
    "xception65-8-decoder": (dict(separable=False, output_stride=8), 262.59, None),
    "xception65-8-decoder-separable": (dict(output_stride=8), 177.10, None),
    "resnet101-16": (dict(decoder_convs=0, **BETA), 81.02, None),
    # This row alone fits without multi-grid; the decoder costs 21.7 in all others.
    "resnet101-16-decoder": (dict(encoder="resnet101_beta", separable=False), 101.28, None),
    "resnet101-8": (dict(decoder_convs=0, output_stride=8, **BETA), 276.18, None),
    "resnet101-8-decoder": (dict(output_stride=8, **BETA), 297.92, None),
    "resnet101-32": (dict(decoder_convs=0, output_stride=32, **BETA), 52.43, None),
    "resnet101-32-decoder": (dict(output_stride=32, **BETA), 74.20, None),
}


class TestPublishedNumbers:
    @pytest.mark.parametrize("name", TORCHVISION)
    def test_torchvision(self, name):
        parameters, billions, stride = TORCHVISION[name]
        found = summary(torchvision_model(name), 520)
        assert found.parameters == parameters
        assert f"{found.macs / 1e9:.3f}" == billions
        assert found.output_stride == stride

    @pytest.mark.parametrize("encoder", ["resnet50", "resnet101", "mobilenet_v3_large"])
    def test_deeplab_v3_counts_as_torchvisions(self, encoder):
        ours = summary(native(deeplab_v3, encoder=encoder), 520)
        theirs = summary(torchvision_model(f"deeplabv3_{encoder}", aux=False), 520)
        for count in ("parameters", "macs", "macs_space_to_batch", "macs_live", "output_stride", "receptive_field"):
            assert getattr(ours, count) == getattr(theirs, count), count

    def test_unet(self):
        found = summary(native(unet), 572)
        assert found.parameters == 31_030_658
        assert f"{found.macs / 1e9:.2f}" == "150.43"
        assert found.macs_live == found.macs_space_to_batch == found.macs
        sizes = [row.output[2] for row in found.rows]
        down = [570, 568, 282, 280, 138, 136, 66, 64, 30, 28]
        assert sizes == [*down, 56, 54, 52, 104, 102, 100, 200, 198, 196, 392, 390, 388, 388]
        assert len(found.rows) == 23
        assert found.output_stride == 16

    def test_deeplab_v2(self):
        found = summary(native(deeplab_v2, multi_scale=False), 513)
        assert found.parameters == 44_048_532
        assert f"{found.macs / 1e9:.2f}" == "188.89"

    @pytest.mark.parametrize("row", PAPER)
    def test_deeplab_v3plus(self, row):
        options, billions, plain = PAPER[row]
        found = summary(native(deeplab_v3plus, **options), 513)
        assert found.macs_space_to_batch / 1e9 == pytest.approx(billions, rel=0.005)
        assert plain is None or f"{found.macs / 1e9:.2f}" == plain


LAYERS = {
    "plain": nn.Conv2d(4, 6, 3),
    "strided": nn.Conv2d(4, 6, (3, 4), (2, 3), (1, 2), bias=False),
    "dilated": nn.Conv2d(4, 6, 3, padding=(4, 9), dilation=(4, 9)),
    "mostly-dead": nn.Conv2d(4, 6, 3, padding=15, dilation=15),
    "grouped": nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(4, 4, 5, padding=4, dilation=2, groups=4),
    "transposed": nn.ConvTranspose2d(4, 6, 2, 2),
    "transposed-cropped": nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2),
    "pointwise-dilated": nn.Conv2d(4, 6, 1, dilation=2),
}


def products(layer: nn.Module, x: torch.Tensor) -> int:
    """How many products with a filter tap reach the output, padding left out: filters and image of ones."""
    ones = copy.deepcopy(layer).double()
    for parameter in ones.parameters():
        nn.init.constant_(parameter, 1)
    if ones.bias is not None:
        nn.init.zeros_(ones.bias)
    with torch.no_grad():
        return int(ones(torch.ones_like(x, dtype=torch.float64)).sum())


class TestCounts:
    @pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
    def test_live_by_convolving_ones(self, layer):
        (row,) = summary(layer, (17, 19)).rows
        assert row.macs_live == products(layer, torch.empty(row.input))

    @pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
    def test_padding_counts_as_pixels(self, layer):
        """Plain counts are those on an image that goes on where padding was."""
        (row,) = summary(layer, (17, 19)).rows
        assert row.macs == max(row.macs, row.macs_live)
        if isinstance(layer, nn.ConvTranspose2d):
            whole = nn.ConvTranspose2d(4, 6, layer.kernel_size, layer.stride, groups=layer.groups)
            assert row.macs == products(whole, torch.empty(row.input))
        else:
            whole = copy.deepcopy(layer)
            whole.padding = (0, 0)
            size = [n + 2 * p for n, p in zip(row.input[2:], layer.padding, strict=True)]
            assert row.macs == products(whole, torch.empty(1, 4, *size))

    @pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
    def test_a_row_says_what_the_layer_is(self, layer):
        (row,) = summary(layer, (17, 19)).rows
        assert row.parameters == sum(p.numel() for p in layer.parameters())
        assert (row.kernel, row.stride, row.dilation) == (layer.kernel_size, layer.stride, layer.dilation)
        assert row.groups == layer.groups
        assert row.input == (1, 4, 17, 19)
        assert row.output == tuple(layer(torch.empty(row.input)).shape)
        assert row.kind == ("transposed" if isinstance(layer, nn.ConvTranspose2d) else "convolution")

    @pytest.mark.parametrize(("size", "rate", "rounded"), [(33, 6, 36), (33, 12, 36), (65, 36, 72), (36, 6, 36)])
    def test_space_to_batch_rounds_up(self, size, rate, rounded):
        dilated = summary(nn.Conv2d(3, 8, 3, padding=rate, dilation=rate), size)
        assert dilated.macs_space_to_batch == summary(nn.Conv2d(3, 8, 3, padding=1), rounded).macs

    @pytest.mark.parametrize("layer", ["plain", "strided", "transposed", "pointwise-dilated"])
    def test_space_to_batch_leaves_alone(self, layer):
        found = summary(LAYERS[layer], 17)
        assert found.macs_space_to_batch == found.macs

    def test_linear_layers(self):
        model = nn.Sequential(conv(3), nn.Flatten(), nn.Linear(32, 5), nn.Linear(5, 3, bias=False))
        rows = summary(model, 6, batch=2).rows[1:]
        assert [(row.kind, row.parameters, row.macs) for row in rows] == [("linear", 165, 320), ("linear", 15, 30)]

    def test_projections_of_attention_count_and_products_of_features_do_not(self):
        attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(x, first, attention):
            tokens = first(x).flatten(2).transpose(1, 2)
            return attention(tokens, tokens, tokens)[0]

        rows = summary(Function(forward, nn.Conv2d(3, 8, 1), attention), 4).rows[1:]
        assert sum(row.macs for row in rows) == 16 * 4 * 8 * 8

    def test_a_layer_with_several_inputs(self):
        layer = conv(3, padding=1)
        found = summary(nn.Sequential(layer, nn.MaxPool2d(2), layer, layer), 8)
        assert [(row.name, row.input[2], row.calls, row.macs) for row in found.rows] == [
            ("0", 8, 1, 64 * 36), ("0", 4, 2, 2 * 16 * 36),
        ]  # fmt: skip
        assert found.parameters == 38

    def test_totals_are_sums_of_rows(self):
        found = summary(native(deeplab_v1), 65)
        for count in ("macs", "macs_space_to_batch", "macs_live"):
            assert getattr(found, count) == sum(getattr(row, count) for row in found.rows)

    def test_images_of_a_batch(self):
        one, three = (summary(native(deeplab_v1), 65, batch=batch) for batch in (1, 3))
        assert (three.macs, three.macs_live) == (3 * one.macs, 3 * one.macs_live)
        assert three.receptive_field == one.receptive_field

    def test_live_taps_are_those_of_explain(self, monkeypatch):
        monkeypatch.setattr(ceilings, "_RUNS", (1, 1))
        model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), fastseg.nn.ASPP(4, 4, (2, 5, 9))).eval()
        report = fastseg.explain(model, torch.randn(1, 3, 33, 35))
        shares = {row.name: row.live for row in summary(model, (33, 35)).rows}
        assert shares == pytest.approx({row.name: row.live_taps for row in report.rows})


class TestWarnings:
    def test_taps_in_the_padding(self):
        aspp = fastseg.nn.ASPP(8, 4, (36,))
        found = summary(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), aspp), 32)
        assert found.warnings == ["1.convs.1.0: at 32x32 rate 36 leaves 11 % of taps live"]
        assert f"warning: {found.warnings[0]}" in str(found)

    @pytest.mark.parametrize(
        ("stride", "rates", "fitting"),
        [(16, (12, 24, 36), "6, 12, 18"), (8, (6, 12, 18), "12, 24, 36"), (32, (6, 12, 18), "3, 6, 9")],
    )
    def test_rates_that_do_not_fit_the_output_stride(self, stride, rates, fitting):
        found = summary(native(deeplab_v3, output_stride=stride, rates=rates), 1025)
        assert found.warnings[0] == (
            f"classifier.0.convs: rates {', '.join(map(str, rates))} at output stride {stride}, "
            f"where DeepLab v3 has {fitting}"
        )

    @pytest.mark.parametrize("separable", [False, True])
    def test_rates_of_separable_branches(self, separable):
        found = summary(native(deeplab_v3plus, encoder="mobilenet_v2", rates=(12, 24, 36), separable=separable), 513)
        assert found.warnings[0].startswith("aspp.convs: rates 12, 24, 36 at output stride 16")

    @pytest.mark.parametrize("stride", [8, 16])
    def test_none_where_they_fit(self, stride):
        assert summary(native(deeplab_v3, output_stride=stride), 1025).warnings == []

    def test_none_about_deeplab_v2(self):
        assert summary(native(deeplab_v2, multi_scale=False), 513).warnings == []


def lraspp():
    models = pytest.importorskip("torchvision.models.segmentation")
    return models.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)


ACCELERATED = {
    "torchvision": lraspp,
    "smp-DeepLabV3Plus": lambda: smp_model("DeepLabV3Plus", "mobilenet_v2"),
    "smp-Unet": lambda: smp_model("Unet", "resnet18"),
    "timm": lambda: timm_model("mobilenetv2_050"),
    "deeplab_v3plus": lambda: deeplab_v3plus(encoder="mobilenet_v2", layers="native"),
}


class TestAcceleratedModels:
    @pytest.mark.parametrize("name", ACCELERATED)
    def test_count_as_plain_ones(self, name):
        model = ACCELERATED[name]()
        plain = summary(model, 64).to_dict()
        assert summary(fastseg.accelerate(model), 64).to_dict() == plain

    @pytest.mark.parametrize("backend", ["reference", "native"])
    def test_whatever_backend_is_asked_for(self, backend):
        model = nn.Sequential(
            fastseg.nn.Conv2d(3, 8, 3, backend=backend),
            fastseg.nn.ASPP(8, 8, (2, 4), backend=backend),
            fastseg.nn.SeparableConv2d(8, 8, 3, backend=backend),
            fastseg.nn.SeparableASPP(8, 8, (2, 4), backend=backend),
            fastseg.nn.BilinearUpsample(scale_factor=2, backend=backend),
        )
        with fastseg.backend(backend):
            found = summary(model, 32)
        assert len(found.rows) == 1 + 5 + 2 + 7
        assert found.rows[-1].name == "3.project.0"


class TestNothingChanges:
    def test_modes_parameters_and_random_state(self):
        model = fastseg.accelerate(deeplab_v3plus(encoder="mobilenet_v2", layers="native")).train()
        model.backbone.eval()
        state = {key: (value.data_ptr(), value.clone()) for key, value in model.state_dict().items()}
        modes = [(type(module), module.training, len(module._forward_hooks)) for module in model.modules()]
        random_state, native_calls = torch.get_rng_state(), dispatch.native_calls.copy()
        summary(model, 64)
        assert modes == [(type(module), module.training, len(module._forward_hooks)) for module in model.modules()]
        for key, value in model.state_dict().items():
            assert value.data_ptr() == state[key][0]
            assert torch.equal(value, state[key][1])
        assert torch.equal(torch.get_rng_state(), random_state)
        assert dispatch.native_calls == native_calls

    def test_hooks_stay_and_do_not_run(self):
        calls = []
        model = nn.Sequential(conv(3), conv(3))
        model[0].register_forward_hook(lambda *args: calls.append(args))
        model.register_forward_pre_hook(lambda *args: calls.append(args))
        summary(model, 9)
        assert calls == []
        model(torch.randn(1, 2, 9, 9))
        assert len(calls) == 2

    def test_needs_no_memory(self):
        """Neither these images nor a copy of these weights would fit anywhere."""
        layer = nn.Conv2d(3, 8, 3)
        layer.weight = nn.Parameter(torch.zeros(()).expand(10**5, 10**5, 3, 3))
        found = summary(nn.Sequential(layer), 513, 10**5, batch=10**4)
        assert found.rows[0].output == (10**4, 10**5, 511, 511)

    @pytest.mark.parametrize(
        "function", [lambda x: x + torch.rand(3, 1, 1), lambda x: F.dropout(x, 0.5)], ids=["rand", "dropout"]
    )
    def test_random_state_of_a_forward_that_draws(self, function):
        random_state = torch.get_rng_state()
        summary(Function(function), 9)
        assert torch.equal(torch.get_rng_state(), random_state)

    def test_a_forward_that_keeps_what_it_computes(self):
        def forward(x, layer):
            layer.kept = layer(x)
            return layer.kept

        model = Function(forward, conv(3))
        summary(model, 9)
        assert not hasattr(model.parts[0], "kept")


class TestOtherModels:
    @pytest.mark.parametrize(
        "wrap",
        [nn.DataParallel, lambda model: torch.compile(model), nn.Sequential],
        ids=["data-parallel", "compiled", "sequential"],
    )
    def test_wrapped(self, wrap):
        model = nn.Sequential(conv(3), nn.BatchNorm2d(2), conv(5))
        found = summary(wrap(model), 20)
        assert (found.macs, found.receptive_field) == (summary(model, 20).macs, (7, 7))

    def test_parametrised_weights(self):
        model = nn.Sequential(conv(3), conv(3))
        nn.utils.parametrizations.weight_norm(model[0])
        nn.utils.parametrizations.spectral_norm(model[1])
        assert summary(model, 20).receptive_field == (5, 5)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtypes(self, dtype):
        assert summary(conv(3).to(dtype), 20).macs == summary(conv(3), 20).macs

    @pytest.mark.parametrize("device", [None, "cpu"], ids=["default", "named"])
    def test_a_forward_that_makes_tensors(self, device):
        model = Function(lambda x, layer: layer(x) + torch.arange(x.shape[-1], device=device), conv(1))
        assert summary(model, 20).receptive_field == (1, 1)

    def test_a_forward_that_moves_tensors(self):
        assert summary(Function(lambda x, layer: layer(x.to("cpu")), conv(3)), 20).receptive_field == (3, 3)

    def test_tensors_that_are_no_parameters(self):
        model = Function(lambda x, layer: layer(x) * layer.scale, conv(3))
        model.parts[0].scale = torch.ones(2, 1, 1)
        assert summary(model, 20).receptive_field == (3, 3)

    @pytest.mark.parametrize(
        ("name", "encoder", "stride"),
        [("FPN", "resnet18", 32), ("PSPNet", "resnet18", 8), ("DeepLabV3Plus", "resnet18", 16), ("Unet", "mit_b0", 32)],
    )
    def test_segmentation_models(self, name, encoder, stride):
        assert summary(smp_model(name, encoder), 64).output_stride == stride


class TestArguments:
    def test_channels_of_the_first_convolution(self):
        assert summary(nn.Conv2d(7, 2, 3), 9).input == (1, 7, 9, 9)

    def test_given_channels(self):
        assert summary(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), 9, 5).input == (1, 5, 9, 9)

    def test_height_and_width(self):
        assert summary(conv(3), (9, 12)).rows[0].output == (1, 2, 7, 10)

    @pytest.mark.parametrize("options", [dict(size=0), dict(size=(9, 9, 9)), dict(size=9.5), dict(size=9, batch=0)])
    def test_sizes_that_are_none(self, options):
        with pytest.raises(ValueError, match=r"expected size .*, but got size .*9|expected size .*, but got size \(0"):
            summary(conv(3), **options)

    def test_no_module(self):
        with pytest.raises(TypeError, match=r"expected model to be a torch\.nn\.Module, but got int"):
            summary(3, 9)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_script(self):
        with pytest.raises(TypeError, match="ScriptModule"):
            summary(nn.Sequential(torch.jit.script(conv(3))), 9)

    def test_no_tensor(self):
        with pytest.raises(TypeError, match="expected the model to give a tensor, .* but got str"):
            summary(Function(str), 9)

    def test_what_the_model_raises(self):
        with pytest.raises(ValueError, match="188"):
            summary(native(unet), 100)


@pytest.fixture(scope="module")
def found():
    return summary(native(deeplab_v3, output_stride=16, rates=(12, 24, 36)), 513)


class TestReport:
    def test_json_has_everything(self, found):
        record = json.loads(found.to_json())
        assert record == json.loads(json.dumps(found.to_dict()))
        names = ["parameters", "macs", "macs_space_to_batch", "macs_live", "output_stride"]
        assert [record[name] for name in names] == [getattr(found, name) for name in names]
        assert record["receptive_field"] == list(found.receptive_field)
        assert record["rows"][0]["name"] == "backbone.conv1"
        assert record["rows"][0]["live"] == found.rows[0].live
        assert record["features"][-1] == {"name": "resize", "shape": [1, 21, 513, 513]}

    def test_one_row_a_convolution(self, found):
        convolutions = [name for name, m in native(deeplab_v3).named_modules() if isinstance(m, nn.Conv2d)]
        assert sorted(row.name for row in found.rows) == sorted(convolutions)

    def test_features_are_those_of_stages(self, found):
        shapes = {feature.name: feature.shape for feature in found.features}
        assert shapes["backbone.layer1"] == (1, 256, 129, 129)
        assert shapes["backbone.layer4"] == (1, 2048, 33, 33)
        assert shapes["classifier.0"] == (1, 256, 33, 33)
        assert "backbone.layer1.0" not in shapes
        assert "backbone.relu" not in shapes

    def test_table_is_aligned(self, found):
        lines = str(found).splitlines()
        head = next(i for i, line in enumerate(lines) if line.startswith("layer"))
        columns = [match.start() for match in re.finditer(r"(?<=  )(convolution|input|output)", lines[head])]
        ends = [match.end() for match in re.finditer("parameters|mult-adds|live", lines[head])]
        for line in lines[head + 2 : head + 2 + len(found.rows)]:
            assert all(line[column - 1] == " " and line[column] != " " for column in columns)
            assert all(line[end - 1] != " " and line[end : end + 1] in (" ", "") for end in ends)

    def test_text_says_it_all(self, found):
        text = str(found)
        assert text.startswith("DeepLabV3 on 1x3x513x513")
        assert re.search(r"^backbone.layer4.1.conv2 +3x3 d2 +1x512x33x33 +1x512x33x33 +2 359 296 ", text, re.MULTILINE)
        assert re.search(r"^backbone.layer2 +1x512x65x65$", text, re.MULTILINE)
        assert f"parameters: {found.parameters:,}".replace(",", " ") in text
        assert f"multiply-adds: {found.macs / 1e9:.3f} G; {found.macs_space_to_batch / 1e9:.3f} G" in text
        assert "output stride: 16" in text
        assert "warning: classifier.0.convs: rates 12, 24, 36 at output stride 16" in text

    def test_kinds_of_convolutions(self):
        model = nn.Sequential(
            nn.Conv2d(4, 4, (3, 5), (2, 1), groups=2), nn.ConvTranspose2d(4, 4, 2, 2), nn.Conv2d(4, 4, 3, dilation=2)
        )
        kinds = [re.split("  +", line)[1] for line in str(summary(model, 20)).splitlines()[4:7]]
        assert kinds == ["3x5 s2,1 g2", "2x2 s2 transposed", "3x3 d2"]
