"""Models, and what the tests of the drop-in ask of them: shared by test_accelerate, test_folding and test_explain."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastseg
from fastseg.nn import conv, folding, pyramid
from fastseg.testing import assert_no_less_accurate
from tests.conftest import on_threads


def deeplabv3_mobilenet():
    models = pytest.importorskip("torchvision.models.segmentation")
    return models.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None)


def lraspp_mobilenet():
    models = pytest.importorskip("torchvision.models.segmentation")
    return models.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)


def smp_deeplabv3plus():
    smp = pytest.importorskip("segmentation_models_pytorch")
    return smp.DeepLabV3Plus("mobilenet_v2", encoder_weights=None, classes=5)


def smp_unet():
    smp = pytest.importorskip("segmentation_models_pytorch")
    return smp.Unet("resnet18", encoder_weights=None, classes=5)


def timm_model(name):
    return lambda: pytest.importorskip("timm").create_model(name, pretrained=False)


MODELS = {
    "torchvision-deeplabv3_mobilenet_v3_large": deeplabv3_mobilenet,
    "torchvision-lraspp_mobilenet_v3_large": lraspp_mobilenet,
    "smp-DeepLabV3Plus": smp_deeplabv3plus,
    "smp-Unet": smp_unet,
    "timm-mobilenetv2_100": timm_model("mobilenetv2_100"),
    "timm-legacy_xception": timm_model("legacy_xception"),
    "timm-xception41": timm_model("xception41"),
}
# How many batch norms are folded: all but those behind an addition, a concatenation, a functional or a pooled image.
FOLDS = {
    "torchvision-deeplabv3_mobilenet_v3_large": 52,
    "torchvision-lraspp_mobilenet_v3_large": 47,
    "smp-DeepLabV3Plus": 60,
    "smp-Unet": 30,
    "timm-mobilenetv2_100": 52,
    "timm-legacy_xception": 40,
    "timm-xception41": 84,
}


KEYS = ("accelerated", "native", "exact")


def lively(model: nn.Module) -> nn.Module:
    """Statistics and affine parameters as training leaves them, not the identity; dropout that drops nothing."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


class Block(nn.Module):
    """The cases of folding in one small module: a bias, a shared activation, a depthwise layer, a residual."""

    def __init__(self, channels=8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=2, dilation=2, groups=channels, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.grouped = nn.Conv2d(channels, channels, 3, padding=1, groups=2)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.depthwise(x)))
        return self.relu(self.bn3(self.grouped(y)) + x)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The images are so small that threads would mostly wait for each other."""
    with on_threads(1):
        yield


@pytest.fixture(autouse=True)
def fold_everything(monkeypatch):
    """Folding is tested on images so small that it would not pay."""
    monkeypatch.setattr(folding, "FEWEST_OUTPUTS", {})


@pytest.fixture(scope="module")
def originals():
    """Each model is built once; tests take copies."""
    built = {}

    def get(name):
        if name not in built:
            torch.manual_seed(0)
            built[name] = lively(MODELS[name]())
        return copy.deepcopy(built[name])

    return get


@pytest.fixture(params=MODELS)
def named_model(request, originals):
    return request.param, originals(request.param)


@pytest.fixture
def block():
    torch.manual_seed(0)
    return lively(Block()).eval()


@pytest.fixture
def folds(monkeypatch):
    """A list that gets one entry for each folded convolution."""
    entries = []

    def counted(layer, chain, *args):
        entries.append(chain.activation_name)
        return folded(layer, chain, *args)

    def counted_vectors(link):
        if link.norm is not None:
            entries.append(link.activation)
        return vectors(link)

    folded, vectors = conv.folded, pyramid.Link.vectors
    monkeypatch.setattr(conv, "folded", counted)
    monkeypatch.setattr(pyramid.Link, "vectors", counted_vectors)
    return entries


def image(batch=2, size=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=generator)


def tensor_of(output) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output["out"]


def predict(model, x) -> torch.Tensor:
    with torch.no_grad():
        return tensor_of(model(x))


def assert_as_accurate(actual, native, exact, what):
    """At most twice the error that native has in the same memory format, channels_last."""
    assert_no_less_accurate(actual, native, exact, 2, what)


def assert_same_labels(actual, native, exact):
    """Equal labels except where the two best logits are closer than the two results' errors."""
    errors = [(y.double() - exact).abs().max() for y in (actual, native)]
    best, second = exact.topk(2, dim=1).values.unbind(1)
    clear = best - second > sum(errors)
    assert clear.double().mean() > 0.99
    assert torch.equal(actual.argmax(1)[clear], native.argmax(1)[clear])


def channels_last(value):
    return value.to(memory_format=torch.channels_last)


def statistics(model, name) -> torch.Tensor:
    """The running statistics `name` of every norm, in one tensor."""
    return torch.cat([value for key, value in model.state_dict().items() if key.endswith(name)])


def alone_in_double(model):
    return predict(copy.deepcopy(model).double(), image().double())


def alone(layer):
    """What a layer that is not accelerated gives in channels_last."""
    return predict(channels_last(copy.deepcopy(layer)), channels_last(image()))


def assert_like_native(model, what, x=None) -> None:
    """An accelerated model gives what it gives when it is restored."""
    x = image() if x is None else x
    plain = fastseg.restore(copy.deepcopy(model))
    native, exact = predict(channels_last(copy.deepcopy(plain)), channels_last(x)), predict(plain.double(), x.double())
    assert_as_accurate(predict(model, x), native, exact, what)
