# ruff: noqa: F401 -- imported fixtures
"""DeepLab v1 and v2: the papers' numbers, and what both promise on both kinds of layers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastseg.models.backbones.vgg import VGG16
from fastseg.models.deeplab_v1 import VARIANTS, deeplab_v1
from fastseg.models.deeplab_v2 import deeplab_v2
from fastseg.nn.fused_module import FusedModule
from fastseg.testing import (
    UNIT_ROUNDOFF,
    Expected,
    assert_alike,
    assert_argmax,
    assert_within,
    expected_cross_entropy,
    expected_scores,
    random_tensor,
)
from tests.networks import lively, one_thread


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def on_meta(builder, **options) -> nn.Module:
    with torch.device("meta"):
        return builder(**options, layers="native").eval()


def images(batch: int = 2) -> torch.Tensor:
    return random_tensor((batch, 3, 33, 42), torch.float32)


def targets(batch: int = 2, ignored: int = -100) -> torch.Tensor:
    found = torch.randint(5, (batch, 33, 42), generator=torch.Generator().manual_seed(3))
    found[:, :5] = ignored
    return found


class TestV1Numbers:
    @pytest.mark.parametrize(
        ("variant", "millions", "extent"),
        [("largefov", 20.5, 25), ("7x7", 134.3, 25), ("4x4", 65.1, 13), ("4x4-dilation8", 65.1, 25)],
    )
    def test_variants_of_the_papers_table(self, variant, millions, extent):
        model = on_meta(deeplab_v1, variant=variant)
        assert round(parameters(model) / 1e6, 1) == millions
        fc6 = model.classifier.fc6
        assert [d * (k - 1) + 1 for k, d in zip(fc6.kernel_size, fc6.dilation, strict=True)] == [extent, extent]

    def test_largefov_parameters(self):
        assert parameters(on_meta(deeplab_v1)) == 20_505_429

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_output_stride_is_8(self, variant):
        logits = on_meta(deeplab_v1, variant=variant).logits(torch.empty(1, 3, 513, 321, device="meta"))
        assert logits.shape == (1, 21, 65, 41)

    def test_unknown_variant(self):
        with pytest.raises(ValueError, match="expected variant to be one of .*, but got 'smallfov'"):
            deeplab_v1(variant="smallfov")


class TestV2Numbers:
    def test_parameters(self):
        model = on_meta(deeplab_v2)
        assert parameters(model) == 44_048_532
        assert parameters(model.classifier) == 1_548_372

    def test_vgg16_parameters(self):
        assert parameters(on_meta(deeplab_v2, encoder="vgg16")) == 37_877_652

    def test_multiply_adds(self):
        model = on_meta(deeplab_v2, multi_scale=False)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 513, 513, device="meta"))
        assert round(counter.get_total_flops() / 2e9, 2) == 188.89

    def test_scales_and_their_sizes(self):
        scales = on_meta(deeplab_v2, encoder="vgg16").scale_logits(torch.empty(1, 3, 513, 321, device="meta"))
        assert [tuple(logits.shape) for logits in scales] == [(1, 21, 65, 41), (1, 21, 49, 31), (1, 21, 33, 21)]

    def test_branches_have_the_papers_rates_and_initialisation(self):
        torch.manual_seed(0)
        convolutions = [branch[0] for branch in deeplab_v2(layers="native").classifier.convs]
        assert [conv.dilation for conv in convolutions] == [(6, 6), (12, 12), (18, 18), (24, 24)]
        for conv in convolutions:
            assert float(conv.weight.detach().std()) == pytest.approx(0.01, rel=0.01)
            assert not conv.bias.any()

    def test_strides_are_in_the_first_1x1_of_a_block(self):
        backbone = on_meta(deeplab_v2).backbone
        assert [backbone.layer2[0].conv1.stride, backbone.layer2[0].conv2.stride] == [(2, 2), (1, 1)]
        assert [block.conv2.dilation[0] for block in backbone.layer3] == [2] * 23
        assert [block.conv2.dilation[0] for block in backbone.layer4] == [4] * 3
        assert backbone.maxpool.ceil_mode

    def test_pyramid_runs_as_a_whole(self):
        with torch.device("meta"):
            assert isinstance(deeplab_v2().classifier, FusedModule)

    def test_unknown_encoder(self):
        with pytest.raises(ValueError, match="expected encoder to be one of 'resnet101', 'vgg16', but got 'vgg19'"):
            deeplab_v2(encoder="vgg19")


class TestVGG16:
    def test_parameters_are_torchvisions(self):
        vgg16 = pytest.importorskip("torchvision.models").vgg16
        with torch.device("meta"):
            ours, theirs = VGG16(), vgg16()
        wanted = {name: p.shape for name, p in theirs.named_parameters() if name.startswith("features")}
        assert {name: p.shape for name, p in ours.named_parameters()} == wanted

    def test_gives_what_torchvisions_gives_up_to_the_first_pool(self):
        vgg16 = pytest.importorskip("torchvision.models").vgg16
        with torch.device("meta"):
            features = vgg16().features
        ours = VGG16()
        features.load_state_dict(ours.features.state_dict(), assign=True)
        with torch.no_grad():
            wanted = F.max_pool2d(features[:4](images()), 3, 2, 1, ceil_mode=True)
            assert_alike(ours(images())[0], wanted)

    def test_features_are_as_said(self):
        with torch.device("meta"):
            backbone = VGG16()
            features = backbone(torch.empty(1, 3, 129, 65))
        assert [y.shape[1] for y in features] == [*backbone.channels]
        assert [128 // (y.shape[2] - 1) for y in features] == [*backbone.strides]
        assert [64 // (y.shape[3] - 1) for y in features] == [*backbone.strides]
        assert [conv.dilation[0] for conv in backbone.features if isinstance(conv, nn.Conv2d)] == [1] * 10 + [2] * 3


MODELS = {
    "v1": lambda layers: deeplab_v1(5, layers=layers),
    "v2": lambda layers: deeplab_v2(5, layers=layers),
    "v2-vgg16-plain": lambda layers: deeplab_v2(
        5, encoder="vgg16", multi_scale=False, align_corners=False, layers=layers
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """One model on both kinds of layers; tests leave its weights as they are."""
    built = {}
    for layers in ("fastseg", "native"):
        torch.manual_seed(0)
        built[layers] = lively(MODELS[request.param](layers))
    return built


@pytest.fixture(params=["fastseg", "native"])
def model(request, pair):
    return pair[request.param].eval()


LOSSES = {
    "plain": dict(),
    "options": dict(weight=torch.tensor([0.5, 1, 1.5, 2, 3]), ignore_index=1, label_smoothing=0.1),
}


class TestEveryModel:
    def test_both_kinds_of_layers_have_the_same_parameters(self, pair):
        fast, native = pair["fastseg"].state_dict(), pair["native"].state_dict()
        assert list(fast) == list(native)
        for key, value in fast.items():
            assert torch.equal(value, native[key]), key

    def test_both_kinds_of_layers_give_the_same(self, pair):
        with torch.no_grad():
            fast, native = (pair[layers].eval()(images()) for layers in ("fastseg", "native"))
        assert fast.shape == (2, 5, 33, 42)
        assert_alike(fast, native)

    def test_both_kinds_of_layers_give_the_same_in_training(self, pair):
        with torch.no_grad():
            fast, native = (copy.deepcopy(pair[layers]).train()(images()) for layers in ("fastseg", "native"))
        several = isinstance(native, list)
        for ours, wanted in zip(fast, native, strict=True) if several else [(fast, native)]:
            assert ours.shape == (2, 5, 33, 42)
            assert_alike(ours, wanted)

    def test_forward_gives_the_resized_logits(self, model):
        with torch.no_grad():
            wanted = F.interpolate(
                model.logits(images()), (33, 42), mode="bilinear", align_corners=model.resize.align_corners
            )
            assert_alike(model(images()), wanted)

    @pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
    def test_loss_is_the_cross_entropy_of_the_resized_logits(self, model, options):
        target, align_corners = targets(ignored=options.get("ignore_index", -100)), model.resize.align_corners
        with torch.no_grad():
            wanted = [
                expected_cross_entropy(logits, target, align_corners=align_corners, **options)[0]
                for logits, _ in model.training_logits(images())
            ]
            loss = model.loss(images(), target, **options)
        value, bound = (sum(terms) for terms in zip(*wanted, strict=True))
        # Adding them up rounds as often as there are losses.
        assert_within(loss, Expected(value, bound + len(wanted) * UNIT_ROUNDOFF[loss.dtype] * value.abs()), "loss")

    def test_predict_is_the_argmax_of_the_resized_logits(self, model):
        with torch.no_grad():
            logits = model.logits(images())
        labels = model.train().predict(images())
        assert model.training
        assert_argmax(labels, expected_scores(logits, (33, 42), model.resize.align_corners))
        assert torch.equal(model.predict(images(), torch.uint8), labels.to(torch.uint8))

    def test_images_of_other_channels_are_refused(self, model):
        with torch.no_grad(), pytest.raises(RuntimeError, match="to have 3 channels, but got 2 channels"):
            model(images()[:, :2])

    def test_one_image_trains(self, pair):
        model = copy.deepcopy(pair["fastseg"]).train()
        model.loss(images(1), targets(1)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    def test_copies_give_the_same(self, model):
        loaded = copy.deepcopy(model)
        for value in loaded.state_dict().values():
            value.zero_()
        loaded.load_state_dict(model.state_dict())
        with torch.no_grad():
            y = model(images(1))
            assert torch.equal(loaded(images(1)), y)
            assert torch.equal(copy.deepcopy(model)(images(1)), y)
            assert torch.equal(pickle.loads(pickle.dumps(model))(images(1)), y)


def resized(x: torch.Tensor, size) -> torch.Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


@pytest.fixture(scope="module")
def networks():
    """The same weights with and without several scales."""
    several = lively(deeplab_v2(5, encoder="vgg16"))
    one = deeplab_v2(5, encoder="vgg16", multi_scale=False, layers="native")
    one.load_state_dict(several.state_dict(), assign=True)
    return several, one.eval()


@pytest.fixture(scope="module")
def wanted(networks):
    """Logits of each scale at its own resolution, and their maximum."""
    scales = [images(), resized(images(), (25, 31)), resized(images(), (17, 21))]
    with torch.no_grad():
        logits = [networks[1].logits(x) for x in scales]
    size = logits[0].shape[-2:]
    return [*logits, torch.stack([resized(y, size) for y in logits]).amax(0)]


class TestMultiScale:
    def test_logits_are_the_maximum(self, networks, wanted):
        with torch.no_grad():
            assert_alike(networks[0].eval().logits(images()), wanted[-1])

    def test_training_looks_at_every_scale_and_the_maximum(self, networks, wanted):
        with torch.no_grad():
            found = networks[0].train().training_logits(images())
        assert [share for _, share in found] == [1.0] * 4
        for (logits, _), y in zip(found, wanted, strict=True):
            assert_alike(logits, y)

    def test_forward_in_training_gives_all_of_them(self, networks, wanted):
        with torch.no_grad():
            found = networks[0].train()(images())
        for logits, y in zip(found, wanted, strict=True):
            assert_alike(logits, resized(y, (33, 42)))

    def test_one_scale_gives_one_tensor_in_training(self, networks):
        with torch.no_grad():
            assert networks[1].train()(images()).shape == (2, 5, 33, 42)
