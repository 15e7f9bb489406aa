# ruff: noqa: F401, F811 -- imported fixtures
"""DeepLab v3: torchvision's numbers and weights, and what every form of it promises on both kinds of layers."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import fastseg
from fastseg.models import deeplab_v3, summary
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

TORCHVISION = ("resnet50", "resnet101", "mobilenet_v3_large")
HIGH = (97, 34)
FORMS = {
    "mobilenet": dict(encoder="mobilenet_v3_large", aux=True, rates=(2, 3, 4)),
    "mobilenet-paper": dict(encoder="mobilenet_v3_large", weights_layout="paper", channels=32, output_stride=8),
    "resnet18": dict(encoder="resnet18", aux=True, output_stride=16, rates=(1, 2, 3)),
    "resnet18-paper": dict(encoder="resnet18", weights_layout="paper", multi_grid=(1, 2), aux=True, channels=32),
    "separable": dict(encoder="mobilenet_v2", separable=True, align_corners=True, channels=32, output_stride=16),
}


@functools.cache
def original(form: str, layers: str) -> nn.Module:
    torch.manual_seed(0)
    return lively(deeplab_v3(5, **FORMS[form], layers=layers))


def built(form: str, layers: str = "fastseg") -> nn.Module:
    return copy.deepcopy(original(form, layers))


def on_meta(**options) -> nn.Module:
    with torch.device("meta"):
        return deeplab_v3(21, **options, layers="native")


@functools.cache
def theirs(encoder: str) -> nn.Module:
    models = pytest.importorskip("torchvision.models.segmentation")
    build = getattr(models, f"deeplabv3_{encoder}")
    torch.manual_seed(0)
    return lively(build(weights=None, weights_backbone=None, num_classes=21, aux_loss=True)).eval()


@functools.cache
@torch.no_grad()
def their_logits(encoder: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """In float32, and as they should be."""
    x = images(1, HIGH)
    return theirs(encoder)(x), copy.deepcopy(theirs(encoder)).double()(x.double())


@pytest.fixture
def build():
    return built


@pytest.fixture
def light_form(form):
    return form


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


class WithAuxiliary(nn.Module):
    """What torchvision counts: its forward runs the auxiliary head as well."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return [logits for logits, _ in self.model.training_logits(images)]


class TestNumbers:
    """Those that torchvision publishes, on the meta device: nothing is computed."""

    @pytest.mark.parametrize(
        ("encoder", "wanted"),
        [("resnet50", 42_004_074), ("resnet101", 60_996_202), ("mobilenet_v3_large", 11_029_328)],
        ids=TORCHVISION,
    )
    def test_parameters(self, encoder, wanted):
        model = on_meta(encoder=encoder, aux=True)
        assert sum(p.numel() for p in model.parameters()) == wanted

    @pytest.mark.parametrize(
        ("encoder", "wanted"),
        [("resnet50", 178.722), ("resnet101", 258.743), ("mobilenet_v3_large", 10.452)],
        ids=TORCHVISION,
    )
    def test_multiply_adds_at_520(self, encoder, wanted):
        model = WithAuxiliary(on_meta(encoder=encoder, aux=True))
        assert round(summary(model, 520).macs / 1e9, 3) == wanted

    def test_the_papers_resnet_101(self):
        """58.16 M parameters in table 7 of the MobileNetV2 paper, which has DeepLab v3 for its baseline."""
        model = on_meta(encoder="resnet101_beta", weights_layout="paper", output_stride=16)
        assert sum(p.numel() for p in model.parameters()) == 58_164_437


class TestTorchvision:
    @pytest.mark.parametrize("encoder", TORCHVISION)
    def test_state_dict_has_the_same_keys_in_the_same_order(self, encoder):
        ours = on_meta(encoder=encoder, aux=True).state_dict()
        wanted = theirs(encoder).state_dict()
        assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in wanted.items()}
        assert list(ours) == list(wanted)

    @pytest.mark.parametrize("encoder", TORCHVISION)
    def test_gives_what_torchvision_gives(self, encoder, layers):
        model = deeplab_v3(21, encoder=encoder, aux=True, layers=layers).eval()
        model.load_state_dict(theirs(encoder).state_dict())
        wanted, exact = their_logits(encoder)
        with torch.no_grad():
            found = {"out": model(images(1, HIGH))}
            ((_, _), (auxiliary, _)) = model.training_logits(images(1, HIGH))
            found["aux"] = model.resize(auxiliary, HIGH)
        for name, y in wanted.items():
            assert_no_less_accurate(found[name], y, exact[name], 2, name)

    def test_trains_as_torchvision_does(self):
        """Half the auxiliary head's loss is added, and gradients are those of the same network."""
        encoder = "mobilenet_v3_large"
        wanted = copy.deepcopy(theirs(encoder)).double().train()
        model = deeplab_v3(21, encoder=encoder, aux=True, dropout=0.0)
        model.load_state_dict(wanted.state_dict())
        model.aux_classifier[3].p = 0.0
        model, x, target = model.double().train(), images(3, SMALL).double(), targets(3, SMALL)
        model.loss(x, target).backward()
        losses = {name: nn.functional.cross_entropy(y, target) for name, y in wanted(x).items()}
        (losses["out"] + 0.5 * losses["aux"]).backward()
        assert_alike(gradients(model), gradients(wanted))


class TestForm:
    @pytest.mark.parametrize(
        ("options", "stride", "rates"),
        [
            (dict(encoder="resnet50"), 8, (12, 24, 36)),
            (dict(encoder="resnet50", output_stride=16), 16, (6, 12, 18)),
            (dict(encoder="resnet50", output_stride=32), 32, (3, 6, 9)),
            (dict(encoder="mobilenet_v3_large"), 16, (12, 24, 36)),
            (dict(encoder="mobilenet_v3_large", weights_layout="paper"), 16, (6, 12, 18)),
            (dict(encoder="mobilenet_v3_large", weights_layout="paper", output_stride=8), 8, (12, 24, 36)),
            (dict(encoder="resnet50", rates=(5, 7)), 8, (5, 7)),
        ],
        ids=["resnet-8", "resnet-16", "resnet-32", "mobilenet", "paper-16", "paper-8", "given"],
    )
    def test_rates_follow_the_output_stride(self, options, stride, rates):
        model = on_meta(**options)
        assert model.backbone.strides[-1] == stride
        branches = [branch[0] for branch in model.classifier[0].convs][1:-1]
        assert tuple(branch.dilation[0] for branch in branches) == rates

    @pytest.mark.parametrize(
        ("options", "wanted"),
        [
            (dict(), [1, 2, 4, 4]),
            (dict(output_stride=16), [1, 1, 2, 2]),
            (dict(output_stride=16, weights_layout="paper"), [1, 2, 4, 8]),
            (dict(output_stride=8, weights_layout="paper"), [2, 4, 8, 16]),
            (dict(output_stride=16, weights_layout="paper", multi_grid=(1, 2, 1)), [1, 2, 4, 2]),
            (dict(output_stride=16, multi_grid=(1, 2, 4)), [1, 1, 4, 8]),
        ],
        ids=["torchvision-8", "torchvision-16", "paper-16", "paper-8", "paper-given", "torchvision-given"],
    )
    def test_unit_rates_of_layer3_and_layer4(self, options, wanted):
        backbone = on_meta(**options).backbone
        assert [block.conv2.dilation[0] for block in (backbone.layer3[0], *backbone.layer4)] == wanted

    @pytest.mark.parametrize(
        ("options", "count", "dropout"),
        [
            (dict(), 5, 0.5),
            (dict(weights_layout="paper"), 2, 0.1),
            (dict(dropout=0.25), 5, 0.25),
            (dict(weights_layout="paper", dropout=0.0), 2, 0.0),
        ],
        ids=["torchvision", "paper", "torchvision-given", "paper-given"],
    )
    def test_what_comes_behind_the_aspp(self, options, count, dropout):
        classifier = on_meta(**options).classifier
        assert len(classifier) == count
        assert classifier[0].project[-1].p == dropout

    def test_separable_branches_have_no_norm_between_their_halves(self):
        for branch in on_meta(separable=True).classifier[0].convs[1:-1]:
            depthwise, pointwise = branch[0]
            assert (depthwise.groups, pointwise.kernel_size) == (2048, (1, 1))
        for branch in on_meta().classifier[0].convs[1:-1]:
            assert (branch[0].groups, branch[0].kernel_size) == (1, (3, 3))

    def test_options_of_the_encoder(self):
        model = on_meta(encoder="resnet50", in_channels=4, encoder_options=dict(eps=1e-3, keep_dilation=False))
        assert model.backbone.bn1.eps == 1e-3
        assert model.backbone.layer4[0].conv2.dilation == (4, 4)
        assert model(torch.empty(2, 4, 65, 65, device="meta")).shape == (2, 21, 65, 65)

    def test_timm_encoder(self):
        pytest.importorskip("timm")
        model = deeplab_v3(5, encoder="timm:mobilenetv3_small_050", output_stride=16, aux=True).eval()
        with torch.no_grad():
            assert model(images(1)).shape == (1, 5, *SIZE)
        assert model.loss(images(1), targets(1)).isfinite()

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            (dict(encoder="resnet20"), "expected encoder to be one of .*, but got 'resnet20'"),
            (dict(weights_layout="caffe"), "expected weights_layout to be one of .*, but got 'caffe'"),
            (dict(output_stride=4), "expected output_stride to be one of 8, 16, 32, but got 4"),
            (dict(encoder="mobilenet_v3_large", multi_grid=(1, 2, 4)), "but got multi_grid"),
            (dict(multi_grid=(1, 2)), r"expected multi_grid to have 3 factors for resnet50, but got \(1, 2\)"),
            (dict(encoder_options=dict(depth=3)), "expected options of resnet50 .*, but got depth"),
            (dict(single_image="skip"), "expected single_image to be one of .*, but got 'skip'"),
        ],
        ids=["encoder", "weights_layout", "output_stride", "multi_grid", "factors", "encoder_options", "single_image"],
    )
    def test_wrong_arguments(self, options, sentence):
        with pytest.raises(ValueError, match=sentence):
            on_meta(**options)

    def test_unknown_layers(self):
        with pytest.raises(ValueError, match="expected layers to be one of .*, but got 'fast'"):
            deeplab_v3(2, encoder="mobilenet_v3_large", layers="fast")

    def test_wrong_channels(self, layers):
        with pytest.raises(RuntimeError, match="to have 3 channels, but got 4 channels"):
            built("mobilenet", layers)(torch.zeros(2, 4, 33, 33))


class TestEveryForm(FormPromises):
    def test_logits_have_the_images_size(self, form, layers):
        model = built(form, layers).eval()
        with torch.no_grad():
            y, own = model(images(1)), model.logits(images(1))
        assert y.shape == (1, 5, *SIZE)
        stride = model.backbone.strides[-1]
        assert own.shape == (1, 5, *(-(-n // stride) for n in SIZE))
        corners = FORMS[form].get("align_corners", False)
        assert_alike(y, nn.functional.interpolate(own, SIZE, mode="bilinear", align_corners=corners))

    def test_accelerate_fuses_the_aspp_and_folds_every_norm(self, form, folds):
        """All but the auxiliary head's, which `forward` does not run, and the pooled image's, a vector."""
        model = built(form).eval()
        assert "fusion" in vars(model.classifier[0]._fastseg)
        assert model.classifier[0]._fastseg.fusion.reason_not() is None
        for call in (model, model.predict):
            folds.clear()
            with torch.no_grad():
                call(images(1, SMALL))
            norms = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
            inside = [name for name in norms if not name.startswith("aux_classifier")]
            assert len(folds) == len(inside) - 1

    def test_explain_shows_the_aspp_as_a_whole(self):
        report = fastseg.explain(built("mobilenet").eval(), images(1, SMALL))
        assert "ASPP, 4 concatenated branches and a pooled one" in str(report)

    def test_loss_is_that_of_the_resized_logits_and_half_the_auxiliary_ones(self, form, layers):
        model = built(form, layers).eval()
        x, target = images(2, SMALL), targets(2, SMALL)
        options = dict(weight=torch.tensor([0.5, 1, 1.5, 2, 3]), label_smoothing=0.1)
        with torch.no_grad():
            outputs, loss = model.training_logits(x), model.loss(x, target, **options)
        assert [share for _, share in outputs] == ([1.0, 0.5] if FORMS[form].get("aux") else [1.0])
        corners = model.resize.align_corners
        wanted = [expected_cross_entropy(y, target, align_corners=corners, **options)[0] for y, _ in outputs]
        value = sum(share * one.value for one, (_, share) in zip(wanted, outputs, strict=True))
        bound = sum(share * one.bound for one, (_, share) in zip(wanted, outputs, strict=True))
        # Their sum is rounded once more.
        assert_within(loss, type(wanted[0])(value, bound + 2.0**-24 * value), "loss")


class TestBatchOfOne:
    """The pooled image of one picture has one value a channel, which has no variance."""

    def test_is_an_error_unless_asked_for(self, layers):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            built("mobilenet-paper", layers).loss(images(1), targets(1))

    def test_trains_with_running_stats(self, layers):
        model = deeplab_v3(5, encoder="mobilenet_v3_large", channels=32, single_image="running_stats", layers=layers)
        before = {key: value.clone() for key, value in model.named_buffers()}
        model.loss(images(1), targets(1)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        changed = {key for key, value in model.named_buffers() if not torch.equal(value, before[key])}
        assert before.keys() - changed == {f"classifier.0.convs.4.2.{name}" for name in (
            "running_mean", "running_var", "num_batches_tracked",
        )}  # fmt: skip

    def test_two_images_update_them_all(self, layers):
        model = deeplab_v3(5, encoder="mobilenet_v3_large", channels=32, single_image="running_stats", layers=layers)
        before = {key: value.clone() for key, value in model.named_buffers()}
        model.loss(images(2), targets(2))
        assert not [key for key, value in model.named_buffers() if torch.equal(value, before[key])]
