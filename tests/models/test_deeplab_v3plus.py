# ruff: noqa: F401, F811 -- imported fixtures
"""DeepLab v3+: the papers' numbers, and what every form of it promises on both kinds of layers."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import fastseg
from fastseg.models import deeplab_v3plus, summary
from fastseg.testing import (
    assert_alike,
    assert_argmax,
    assert_no_less_accurate,
    assert_within,
    expected_cross_entropy,
    expected_scores,
    random_tensor,
)
from tests.models.common import SIZE, SMALL, FormPromises, gradients, images, layers, targets
from tests.networks import fold_everything, folds, lively, one_thread

FORMS = {
    "xception65": dict(),
    "mobilenet_v2": dict(encoder="mobilenet_v2", channels=32),
    "dense-8-pool-first": dict(
        encoder="mobilenet_v2", output_stride=8, separable=False, rates=(1, 2, 3), channels=32, pooling="first"
    ),
    "beta-mixed-no-pool": dict(
        encoder="resnet50_beta", encoder_options=dict(multi_grid=(1, 2, 4)), separable="aspp", pooling=None
    ),
    "smp": dict(
        encoder="resnet18", rates=(12, 24, 36), separable_norm=False, refine=True, decoder_convs=1, dropout=0.5,
        align_corners=True, channels=32,
    ),
    "vainf": dict(
        encoder="mobilenet_v2", encoder_options=dict(keep_dilation=True, padding="block"), separable=False,
        decoder_convs=1, channels=32,
    ),
    "no-decoder": dict(encoder="mobilenet_v2", rates=(), decoder_convs=0, channels=32),
}  # fmt: skip


@functools.cache
def original(form: str, layers: str) -> nn.Module:
    torch.manual_seed(0)
    return lively(deeplab_v3plus(5, **FORMS[form], layers=layers))


def built(form: str, layers: str = "fastseg") -> nn.Module:
    return copy.deepcopy(original(form, layers))


def on_meta(**options) -> nn.Module:
    with torch.device("meta"):
        return deeplab_v3plus(21, **options, layers="native")


@pytest.fixture
def build():
    return built


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


@pytest.fixture(params=[form for form, options in FORMS.items() if "channels" in options])
def light_form(request):
    """For what the head alone decides."""
    return request.param


DENSE = dict(separable=False)
ENCODER = dict(separable=False, decoder_convs=0)
BETA = dict(encoder="resnet101_beta", encoder_options=dict(multi_grid=(1, 2, 4)))
MOBILENET = dict(encoder="mobilenet_v2", decoder_convs=0)


class TestNumbers:
    """Those that the papers publish, on the meta device: nothing is computed."""

    @pytest.mark.parametrize(
        ("options", "output_stride", "published", "plain"),
        [
            (ENCODER, 16, 68.00, 64.92),
            (ENCODER, 8, 240.85, None),
            (DENSE, 16, 89.76, 86.68),
            (DENSE, 8, 262.59, None),
            (dict(), 16, 54.17, 54.04),
            (dict(), 8, 177.10, None),
            (ENCODER | BETA, 16, 81.02, None),
            (ENCODER | BETA, 8, 276.18, None),
            (ENCODER | BETA, 32, 52.43, None),
            (DENSE | BETA, 8, 297.92, None),
            (DENSE | BETA, 32, 74.20, None),
            # In this row alone the decoder costs 20.26, and 21.7 in the others: the figure is that of the network
            # without a multi-grid.
            (DENSE | dict(encoder="resnet101_beta"), 16, 101.28, None),
            (MOBILENET | dict(rates=()), 16, 2.75, None),
            (MOBILENET | DENSE, 16, 5.8, None),
        ],
        ids=[
            "xception-encoder-16", "xception-encoder-8", "xception-decoder-16", "xception-decoder-8",
            "xception-separable-16", "xception-separable-8", "resnet-encoder-16", "resnet-encoder-8",
            "resnet-encoder-32", "resnet-decoder-8", "resnet-decoder-32", "resnet-decoder-16", "mobilenet-pooling",
            "mobilenet-encoder",
        ],
    )  # fmt: skip
    def test_multiply_adds_at_513(self, options, output_stride, published, plain):
        """Tables 3 and 5 of the paper, and table 7 of MobileNetV2's, which count space-to-batch's padding: to 0.5 %."""
        found = summary(on_meta(output_stride=output_stride, **options), 513)
        assert found.macs_space_to_batch / 1e9 == pytest.approx(published, rel=0.005)
        assert plain is None or round(found.macs / 1e9, 2) == plain

    @pytest.mark.parametrize(
        ("options", "published"),
        [(MOBILENET | dict(rates=()), 2.11), (MOBILENET | DENSE, 4.52), (ENCODER | BETA, 58.16)],
        ids=["mobilenet-pooling", "mobilenet-encoder", "resnet101"],
    )
    def test_published_parameters(self, options, published):
        """Table 7 of the MobileNetV2 paper, in millions."""
        assert round(sum(p.numel() for p in on_meta(**options).parameters()) / 1e6, 2) == published


class TestForm:
    @pytest.mark.parametrize(
        ("options", "rates"),
        [
            (dict(output_stride=16), (6, 12, 18)),
            (dict(output_stride=8), (12, 24, 36)),
            (dict(output_stride=32), (3, 6, 9)),
            (dict(output_stride=8, rates=(4, 5)), (4, 5)),
            (dict(rates=()), ()),
        ],
        ids=["16", "8", "32", "given", "none"],
    )
    @pytest.mark.parametrize("separable", [True, False], ids=["separable", "dense"])
    def test_rates_follow_the_output_stride(self, options, rates, separable):
        model = on_meta(encoder="mobilenet_v2", separable=separable, **options)
        dilations = [next(m for m in branch.modules() if isinstance(m, nn.Conv2d)) for branch in model.aspp.convs]
        assert tuple(conv.dilation[0] for conv in dilations[1:-1]) == rates
        assert model.backbone.strides[-1] == options.get("output_stride", 16)

    @pytest.mark.parametrize(
        ("separable", "aspp", "decoder"),
        [(True, 3, 2), (False, 0, 0), ("aspp", 3, 0), ("decoder", 0, 2)],
        ids=["both", "neither", "aspp", "decoder"],
    )
    def test_separable(self, separable, aspp, decoder):
        model = on_meta(encoder="resnet50", separable=separable)
        for part, wanted in ((model.aspp, aspp), (model.decoder, decoder)):
            assert sum(isinstance(m, nn.Conv2d) and m.groups > 1 for m in part.modules()) == wanted

    @pytest.mark.parametrize(
        ("norm", "wanted"), [(True, [nn.BatchNorm2d, nn.ReLU]), (False, [])], ids=["norm", "no-norm"]
    )
    def test_what_stands_between_the_halves(self, norm, wanted):
        model = on_meta(encoder="resnet50", separable_norm=norm)
        for _, *between, pointwise in (model.aspp.convs[1][0], model.decoder.convs[0][:-2]):
            assert isinstance(pointwise, nn.Conv2d)
            assert list(map(type, between)) == wanted

    def test_decoder_is_the_papers(self):
        """48 low-level channels beside the 256 of the ASPP, two 3x3 convolutions of 256."""
        decoder = on_meta(encoder="resnet50", separable=False).decoder
        convolutions = [m for m in decoder.modules() if isinstance(m, nn.Conv2d)]
        assert [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in convolutions] == [
            (256, 48, 1), (304, 256, 3), (256, 256, 3),
        ]  # fmt: skip

    @pytest.mark.parametrize("align_corners", [True, False], ids=["corners", "centres"])
    def test_the_enlarged_pyramid_comes_first_in_the_concatenation(self, align_corners):
        model = deeplab_v3plus(5, encoder="mobilenet_v2", channels=32, align_corners=align_corners).eval()
        x, low_level = random_tensor((1, 32, 5, 4), torch.float32), random_tensor((1, 24, 9, 8), torch.float32)
        with torch.no_grad():
            large = nn.functional.interpolate(x, (9, 8), mode="bilinear", align_corners=align_corners)
            wanted = model.decoder.convs(torch.cat([large, model.decoder.low_level(low_level)], 1))
            assert_alike(model.decoder(x, low_level), wanted)
        assert model.resize.align_corners == align_corners

    @pytest.mark.parametrize(
        ("options", "count"),
        [(dict(), 0), (dict(refine=True), 2), (dict(refine=True, separable="aspp"), 1)],
        ids=["off", "separable", "dense"],
    )
    def test_refinement_stands_between_aspp_and_decoder(self, options, count):
        model = on_meta(encoder="mobilenet_v2", channels=32, **options).eval()
        convolutions = [m for m in model.refinement.modules() if isinstance(m, nn.Conv2d)]
        assert [(m.in_channels, m.out_channels) for m in convolutions] == [(32, 32)] * count
        seen = []
        model.refinement.register_forward_hook(lambda _, inputs, y: seen.extend((inputs[0], y)))
        model.aspp.register_forward_hook(lambda _, __, y: seen.append(y))
        model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        model(torch.empty(1, 3, 65, 65, device="meta"))
        pyramid, before, after, enlarged = seen
        assert pyramid is before
        assert after is enlarged

    @pytest.mark.parametrize(("options", "wanted"), [(dict(), 0.1), (dict(dropout=0.5), 0.5)], ids=["paper", "given"])
    @pytest.mark.parametrize("separable", [True, False], ids=["separable", "dense"])
    def test_dropout(self, separable, options, wanted):
        model = on_meta(encoder="mobilenet_v2", separable=separable, **options)
        assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [wanted]

    @pytest.mark.parametrize(
        ("encoder", "channels"),
        [("resnet50", 256), ("resnet101_beta", 256), ("mobilenet_v2", 24), ("xception65", 256)],
    )
    @pytest.mark.parametrize("output_stride", [8, 16])
    def test_low_level_features_have_stride_4(self, encoder, channels, output_stride):
        model = on_meta(encoder=encoder, output_stride=output_stride)
        assert model.decoder.low_level[0].in_channels == channels
        assert model.eval().logits(torch.empty(1, 3, 129, 97, device="meta")).shape == (1, 21, 33, 25)

    def test_low_level_features_of_timm(self):
        pytest.importorskip("timm")
        model = deeplab_v3plus(5, encoder="timm:mobilenetv3_small_050", low_level_channels=12).eval()
        assert model.decoder.low_level[0].out_channels == 12
        with torch.no_grad():
            assert model(images(1)).shape == (1, 5, *SIZE)
            assert model.logits(images(1)).shape == (1, 5, 25, 18)

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            (dict(encoder="resnet20"), "expected encoder to be one of .*, but got 'resnet20'"),
            (dict(output_stride=4), "expected output_stride to be one of 8, 16, 32, but got 4"),
            (dict(separable="all"), "expected separable to be one of True, False, 'aspp', 'decoder', but got 'all'"),
            (dict(decoder_convs=-1), "expected decoder_convs to be a number of convolutions, but got -1"),
            (dict(pooling="middle"), "expected pooling to be one of 'last', 'first', None, but got 'middle'"),
            (dict(encoder_options=dict(multi_grid=(1, 2, 4))), "expected options of xception65 .*, but got multi_grid"),
            (dict(single_image="skip"), "expected single_image to be one of .*, but got 'skip'"),
        ],
        ids=["encoder", "output_stride", "separable", "decoder_convs", "pooling", "encoder_options", "single_image"],
    )
    def test_wrong_arguments(self, options, sentence):
        with pytest.raises(ValueError, match=sentence):
            on_meta(**options)

    def test_an_encoder_without_stride_4_is_refused(self, monkeypatch):
        from fastseg.models.backbones.resnet import ResNet

        initialize = ResNet.__init__

        def without(self, *args, **kwargs):
            initialize(self, *args, **kwargs)
            self.strides = (2, 8, 8, 16, 16)

        monkeypatch.setattr(ResNet, "__init__", without)
        with pytest.raises(ValueError, match="features at stride 4, but resnet18 has them at \\(2, 8, 8, 16, 16\\)"):
            on_meta(encoder="resnet18")
        assert on_meta(encoder="resnet18", decoder_convs=0).decoder is None

    def test_unknown_layers(self):
        with pytest.raises(ValueError, match="expected layers to be one of .*, but got 'fast'"):
            deeplab_v3plus(2, encoder="mobilenet_v2", layers="fast")

    def test_wrong_channels(self, layers):
        with pytest.raises(RuntimeError, match="to have 3 channels, but got 4 channels"):
            built("mobilenet_v2", layers)(torch.zeros(2, 4, 33, 33))


class TestEveryForm(FormPromises):
    def test_logits_have_the_images_size(self, light_form, layers):
        model = built(light_form, layers).eval()
        with torch.no_grad():
            y, own = model(images(1)), model.logits(images(1))
        assert y.shape == (1, 5, *SIZE)
        corners = FORMS[light_form].get("align_corners", False)
        assert_alike(y, nn.functional.interpolate(own, SIZE, mode="bilinear", align_corners=corners))

    def test_accelerate_fuses_the_aspp_and_folds_every_norm(self, form, folds):
        """All but the pooled image's, a vector."""
        model = built(form).eval()
        assert model.aspp._fastseg.fusion.reason_not() is None
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        pooled = sum(isinstance(m, nn.AdaptiveAvgPool2d) for m in model.aspp.modules())
        for call in (model, model.predict):
            folds.clear()
            with torch.no_grad():
                call(images(1, SMALL))
            assert len(folds) == norms - pooled

    def test_loss_is_that_of_the_resized_logits(self, light_form, layers):
        model, x, target = built(light_form, layers).eval(), images(2, SMALL), targets(2, SMALL)
        options = dict(weight=torch.tensor([0.5, 1, 1.5, 2, 3]), label_smoothing=0.1)
        with torch.no_grad():
            logits, loss = model.logits(x), model.loss(x, target, **options)
        corners = model.resize.align_corners
        assert_within(loss, expected_cross_entropy(logits, target, align_corners=corners, **options)[0], "loss")


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("mobilenet_v2", "separable ASPP, 4 concatenated branches and a pooled one"),
        ("dense-8-pool-first", "ASPP, 4 concatenated branches and a pooled one"),
    ],
    ids=["separable", "dense"],
)
def test_explain_shows_the_aspp_as_a_whole(form, name):
    assert name in str(fastseg.explain(built(form).eval(), images(1, SMALL)))


class TestBatchOfOne:
    """The pooled image of one picture has one value a channel, which has no variance."""

    def test_is_an_error_unless_asked_for(self, layers):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            built("mobilenet_v2", layers).loss(images(1), targets(1))

    @pytest.mark.parametrize("separable", [True, False], ids=["separable", "dense"])
    def test_trains_with_running_stats(self, layers, separable):
        options = dict(encoder="mobilenet_v2", channels=32, separable=separable, layers=layers)
        model = deeplab_v3plus(5, single_image="running_stats", **options)
        before = {key: value.clone() for key, value in model.named_buffers()}
        model.loss(images(1), targets(1)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        changed = {key for key, value in model.named_buffers() if not torch.equal(value, before[key])}
        assert before.keys() - changed == {f"aspp.convs.4.2.{name}" for name in (
            "running_mean", "running_var", "num_batches_tracked",
        )}  # fmt: skip

    def test_trains_without_pooling(self, layers):
        model = deeplab_v3plus(5, encoder="mobilenet_v2", channels=32, pooling=None, layers=layers)
        model.loss(images(1), targets(1)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
