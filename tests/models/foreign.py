"""Networks of other libraries, their weights, and our models that take these."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from torch import nn

from fastseg.models import from_state_dict
from tests.models.published import MilesialUNet, VainfDeepLab
from tests.networks import lively

torchvision = pytest.importorskip("torchvision")
smp = pytest.importorskip("segmentation_models_pytorch")
timm = pytest.importorskip("timm")

CLASSES = 4


class Case(NamedTuple):
    source: str
    build: Callable[[], nn.Module]  # the other library's network
    options: Mapping = MappingProxyType({})  # of ours, that weights do not tell
    size: tuple[int, int] = (64, 96)


def torchvision_network(name: str, aux: bool) -> Callable[[], nn.Module]:
    builder = getattr(torchvision.models.segmentation, f"deeplabv3_{name}")
    return functools.partial(builder, weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=aux)


def smp_network(kind: str, encoder: str, **options) -> Callable[[], nn.Module]:
    if kind != "Unet":
        options = {"decoder_channels": 32, **options}
    return functools.partial(getattr(smp, kind), encoder, encoder_weights=None, classes=CLASSES, **options)


def _vainf(*arguments) -> Callable[[], nn.Module]:
    return functools.partial(VainfDeepLab, CLASSES, *arguments)


NEAR = {"rates": (1, 2, 3)}  # that see something in features of small images
CASES = {
    "torchvision-resnet50-aux": Case("torchvision", torchvision_network("resnet50", True), size=(65, 70)),
    "torchvision-mobilenet_v3": Case("torchvision", torchvision_network("mobilenet_v3_large", False), size=(65, 70)),
    "torchvision-mobilenet_v3-aux": Case("torchvision", torchvision_network("mobilenet_v3_large", True)),
    "smp-unet-resnet18": Case(
        "smp", smp_network("Unet", "resnet18", in_channels=2, decoder_channels=(32, 16, 16, 8, 4))
    ),
    "smp-unet-mobilenet_v2-bilinear": Case(
        "smp", smp_network("Unet", "mobilenet_v2", decoder_interpolation="bilinear"), {"up": "bilinear"}
    ),
    "smp-unet-timm": Case("smp", smp_network("Unet", "tu-resnet18"), {"encoder": "timm:resnet18"}),
    "smp-v3-resnet18": Case("smp", smp_network("DeepLabV3", "resnet18", decoder_atrous_rates=(1, 2, 3)), NEAR),
    "smp-v3-mobilenet_v2-separable": Case(
        "smp",
        smp_network("DeepLabV3", "mobilenet_v2", encoder_output_stride=16, decoder_aspp_separable=True),
        {"output_stride": 16},
    ),
    "smp-v3plus-resnet34": Case("smp", smp_network("DeepLabV3Plus", "resnet34", decoder_atrous_rates=(1, 2, 3)), NEAR),
    "smp-v3plus-resnet50-stride8": Case(
        "smp", smp_network("DeepLabV3Plus", "resnet50", encoder_output_stride=8), {"output_stride": 8}
    ),
    "smp-v3plus-mobilenet_v2-dense": Case(
        "smp", smp_network("DeepLabV3Plus", "mobilenet_v2", decoder_aspp_separable=False)
    ),
    "smp-v3plus-timm": Case("smp", smp_network("DeepLabV3Plus", "tu-resnet18"), {"encoder": "timm:resnet18"}),
    "vainf-v3-mobilenet": Case("vainf", _vainf(False, 16), size=(129, 97)),
    "vainf-v3plus-mobilenet": Case("vainf", _vainf(True, 8), {"output_stride": 8}, size=(129, 97)),
    "vainf-v3plus-mobilenet-separable": Case("vainf", _vainf(True, 16, True), size=(65, 97)),
    "milesial-transpose": Case("milesial", lambda: MilesialUNet(3, CLASSES, False, 8), size=(37, 50)),
    "milesial-bilinear": Case("milesial", lambda: MilesialUNet(1, CLASSES, True, 8), size=(37, 50)),
}


@functools.cache
def theirs(name: str) -> nn.Module:
    """The other library's network of a case, in double."""
    torch.manual_seed(0)
    return lively(CASES[name].build()).eval().double()


@functools.cache
def ours(name: str) -> nn.Module:
    """Our model of a case, as the weights alone give it, in double."""
    return quietly(from_state_dict, theirs(name).state_dict(), layers="native", **CASES[name].options).eval().double()


def quietly(function, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return function(*arguments, **options)


def aloud(function, *arguments, **options):
    """The result, and the text of its one warning."""
    with pytest.warns(UserWarning, match=r"\.$") as record:
        result = function(*arguments, **options)
    assert len(record) == 1
    return result, str(record[0].message)


def assert_same_weights(state: dict, wanted: dict) -> None:
    assert set(state) == set(wanted)
    assert [key for key in wanted if not torch.equal(state[key], wanted[key])] == []


def zeros(model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict of the model's keys and shapes that takes no memory."""
    return {key: torch.zeros(()).expand(value.shape) for key, value in model.state_dict().items()}


def on_meta(build, *arguments, **options) -> nn.Module:
    with torch.device("meta"):
        return build(*arguments, **options)


def smp_state(kind="Unet", encoder="resnet18", **options) -> dict[str, torch.Tensor]:
    return zeros(on_meta(smp_network(kind, encoder, **options)))


def vainf_head(plus: bool) -> dict[str, torch.Tensor]:
    head = on_meta(VainfDeepLab, CLASSES, plus, 16).classifier
    return {f"classifier.{key}": value for key, value in zeros(head).items()}
