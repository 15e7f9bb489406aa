"""Other libraries' weights: into our models and back, what is said about them, and what is refused."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from torch import nn

from fastseg.models import deeplab_v1, deeplab_v3, deeplab_v3plus, from_state_dict, load_weights, to_state_dict, unet
from fastseg.testing import assert_alike, random_tensor
from tests.models.published import MilesialUNet, VainfDeepLab
from tests.networks import lively, one_thread  # noqa: F401

torchvision = pytest.importorskip("torchvision")
smp = pytest.importorskip("segmentation_models_pytorch")
timm = pytest.importorskip("timm")

CLASSES = 4


class Case(NamedTuple):
    source: str
    build: Callable[[], nn.Module]  # the other library's network
    options: Mapping = MappingProxyType({})  # of ours, that weights do not tell
    size: tuple[int, int] = (64, 96)


def _torchvision(name: str, aux: bool) -> Callable[[], nn.Module]:
    builder = getattr(torchvision.models.segmentation, f"deeplabv3_{name}")
    return functools.partial(builder, weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=aux)


def _smp(kind: str, encoder: str, **options) -> Callable[[], nn.Module]:
    if kind != "Unet":
        options = {"decoder_channels": 32, **options}
    return functools.partial(getattr(smp, kind), encoder, encoder_weights=None, classes=CLASSES, **options)


def _vainf(*arguments) -> Callable[[], nn.Module]:
    return functools.partial(VainfDeepLab, CLASSES, *arguments)


NEAR = {"rates": (1, 2, 3)}  # that see something in features of small images
CASES = {
    "torchvision-resnet50-aux": Case("torchvision", _torchvision("resnet50", True), size=(65, 70)),
    "torchvision-mobilenet_v3": Case("torchvision", _torchvision("mobilenet_v3_large", False), size=(65, 70)),
    "torchvision-mobilenet_v3-aux": Case("torchvision", _torchvision("mobilenet_v3_large", True)),
    "smp-unet-resnet18": Case("smp", _smp("Unet", "resnet18", in_channels=2, decoder_channels=(32, 16, 16, 8, 4))),
    "smp-unet-mobilenet_v2-bilinear": Case(
        "smp", _smp("Unet", "mobilenet_v2", decoder_interpolation="bilinear"), {"up": "bilinear"}
    ),
    "smp-unet-timm": Case("smp", _smp("Unet", "tu-resnet18"), {"encoder": "timm:resnet18"}),
    "smp-v3-resnet18": Case("smp", _smp("DeepLabV3", "resnet18", decoder_atrous_rates=(1, 2, 3)), NEAR),
    "smp-v3-mobilenet_v2-separable": Case(
        "smp",
        _smp("DeepLabV3", "mobilenet_v2", encoder_output_stride=16, decoder_aspp_separable=True),
        {"output_stride": 16},
    ),
    "smp-v3plus-resnet34": Case("smp", _smp("DeepLabV3Plus", "resnet34", decoder_atrous_rates=(1, 2, 3)), NEAR),
    "smp-v3plus-resnet50-stride8": Case(
        "smp", _smp("DeepLabV3Plus", "resnet50", encoder_output_stride=8), {"output_stride": 8}
    ),
    "smp-v3plus-mobilenet_v2-dense": Case("smp", _smp("DeepLabV3Plus", "mobilenet_v2", decoder_aspp_separable=False)),
    "smp-v3plus-timm": Case("smp", _smp("DeepLabV3Plus", "tu-resnet18"), {"encoder": "timm:resnet18"}),
    "vainf-v3-mobilenet": Case("vainf", _vainf(False, 16), size=(129, 97)),
    "vainf-v3plus-mobilenet": Case("vainf", _vainf(True, 8), {"output_stride": 8}, size=(129, 97)),
    "vainf-v3plus-mobilenet-separable": Case("vainf", _vainf(True, 16, True), size=(65, 97)),
    "milesial-transpose": Case("milesial", lambda: MilesialUNet(3, CLASSES, False, 8), size=(37, 50)),
    "milesial-bilinear": Case("milesial", lambda: MilesialUNet(1, CLASSES, True, 8), size=(37, 50)),
}
each_case = pytest.mark.parametrize("name", CASES)


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


@each_case
def test_weights_come_back_as_they_were(name):
    assert_same_weights(quietly(to_state_dict, ours(name), CASES[name].source), theirs(name).state_dict())


@each_case
def test_outputs_are_those_of_the_other_library(name):
    first = next(m for m in ours(name).modules() if isinstance(m, nn.Conv2d))
    image = random_tensor((1, first.in_channels, *CASES[name].size), torch.float64)
    with torch.no_grad():
        wanted, got = theirs(name)(image), ours(name)(image)
    assert_alike(got, wanted["out"] if isinstance(wanted, dict) else wanted)


@each_case
def test_every_convolution_has_the_geometry_of_the_other_library(name):
    """Also dilations beyond the small images of the outputs' test."""
    model = copy.deepcopy(ours(name))
    keys = list(model.state_dict())
    for index, values in enumerate(model.state_dict().values()):
        values.fill_(index)
    names = {
        key: keys[int(values.flatten()[0])] for key, values in quietly(to_state_dict, model, CASES[name].source).items()
    }
    geometry, wanted = geometries(model), geometries(theirs(name))
    assert {key: geometry[names[key]] for key in wanted} == wanted


def geometries(model: nn.Module) -> dict[str, tuple]:
    """Stride, dilation and padding of each convolution, by its weight's key; a 1x1 may have any dilation."""
    return {
        f"{name}.weight": (m.stride, (1, 1) if m.kernel_size == (1, 1) else m.dilation, m.padding)
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
    }


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.source in ("torchvision", "smp")])
def test_dropout_is_that_of_the_other_library(name):
    theirs_anew = on_meta(CASES[name].build)
    assert dropouts(ours(name)) == dropouts(theirs_anew)


def dropouts(model: nn.Module) -> list[float]:
    return [m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0]


@pytest.mark.parametrize("name", ["smp-v3plus-resnet34", "smp-unet-mobilenet_v2-bilinear", "milesial-transpose"])
def test_fast_layers_take_the_weights(name):
    case = CASES[name]
    model = quietly(from_state_dict, theirs(name).state_dict(), case.source, **case.options).eval()
    image = random_tensor((1, next(model.parameters()).shape[1], *case.size), torch.float32)
    with torch.no_grad():
        assert_alike(model(image), theirs(name)(image.double()).float())


# Encoders, separable or dense, and depth of the table, as keys and shapes alone: these networks are large.
LARGE = {
    "torchvision-resnet101": ("torchvision", _torchvision("resnet101", True)),
    "smp-v3-resnet101": ("smp", _smp("DeepLabV3", "resnet101")),
    "milesial-64": ("milesial", lambda: MilesialUNet(3, 2, False)),
}


@pytest.mark.parametrize("name", LARGE)
def test_keys_of_large_networks_are_known(name):
    source, build = LARGE[name]
    state = zeros(on_meta(build))
    model = quietly(from_state_dict, state, layers="native")
    assert {key: value.shape for key, value in quietly(to_state_dict, model, source).items()} == {
        key: value.shape for key, value in state.items()
    }


def vainf_head(plus: bool) -> dict[str, torch.Tensor]:
    head = on_meta(VainfDeepLab, CLASSES, plus, 16).classifier
    return {f"classifier.{key}": value for key, value in zeros(head).items()}


@pytest.mark.parametrize("plus", [False, True], ids=["v3", "v3plus"])
def test_vainf_on_a_resnet_is_torchvisions_backbone_under_its_own_head(plus):
    resnet = on_meta(torchvision.models.resnet50)
    state = {f"backbone.{key}": value for key, value in zeros(resnet).items() if not key.startswith("fc.")}
    state |= vainf_head(plus)
    aspp = "classifier.aspp" if plus else "classifier.classifier.0"
    for branch, size in enumerate((1, 3, 3, 3)):
        state[f"{aspp}.convs.{branch}.0.weight"] = torch.zeros(()).expand(256, 2048, size, size)
    state[f"{aspp}.convs.4.1.weight"] = torch.zeros(()).expand(256, 2048, 1, 1)
    if plus:
        state["classifier.project.0.weight"] = torch.zeros(()).expand(48, 256, 1, 1)
    model, said = aloud(from_state_dict, state, layers="native")
    assert "output_stride=16, rates=(6, 12, 18), dropout=0.1, align_corners=False; as VainF's" in said
    layer4 = [m.dilation[0] for m in model.backbone.layer4.modules() if getattr(m, "kernel_size", None) == (3, 3)]
    assert layer4 == [1, 2, 2]  # the first block keeps the dilation of the layer before it
    assert set(quietly(to_state_dict, model, "vainf")) == set(state)


@each_case
def test_a_model_built_by_hand_takes_the_same_weights_and_says_the_same(name):
    model = copy.deepcopy(ours(name)).float()
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    sentences, said = aloud(load_weights, model, theirs(name).state_dict())
    assert " ".join(sentences) == said
    assert all(sentence.endswith(".") for sentence in sentences)
    assert_same_weights(model.double().state_dict(), ours(name).state_dict())


def test_weights_go_into_the_model_that_the_readme_builds():
    model = deeplab_v3plus(
        CLASSES, encoder="resnet34", channels=32, separable_norm=False, refine=True, decoder_convs=1, rates=(1, 2, 3),
        dropout=0.5, align_corners=True,
    )  # fmt: skip
    _, said = aloud(load_weights, model, theirs("smp-v3plus-resnet34").state_dict(), "smp")
    assert "one 3x3 convolution, the paper's two" in said


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("torchvision-resnet50-aux", "The first block of a dilated layer keeps the dilation of the layer before it."),
        ("torchvision-mobilenet_v3", "Rates are 12, 24 and 36 at output stride 16, where the paper has 6, 12 and 18."),
        ("smp-v3plus-timm", "Rates are 12, 24 and 36 at output stride 16, where the paper has 6, 12 and 18."),
        ("smp-v3plus-timm", "Resizes align corners (align_corners=True)."),
        ("smp-v3plus-timm", "A separable 3x3 convolution follows the ASPP."),
        ("smp-v3plus-resnet34", "Dilated layers have their dilation in 1x1 convolutions too"),
        ("smp-v3plus-resnet34", "The weights do not tell output_stride=16, rates=(1, 2, 3)"),
        ("smp-v3plus-resnet34", "the defaults of segmentation_models_pytorch's DeepLabV3Plus are rates=(12, 24, 36)."),
        ("smp-unet-mobilenet_v2-bilinear", "Resizes (bilinear) stand for the 2x2 up-convolutions."),
        ("vainf-v3plus-mobilenet", "MobileNetV2's blocks are padded in front of their 1x1 expansion"),
        ("milesial-bilinear", "Bilinear resizes (align_corners=True) stand for the 2x2 up-convolutions"),
    ],
)
def test_deviations_are_said_aloud(name, sentence):
    _, said = aloud(load_weights, copy.deepcopy(ours(name)), theirs(name).state_dict())
    assert sentence in said


@pytest.mark.parametrize("wrap", [
    lambda state: {"epoch": 3, "model_state": {f"module.{key}": value for key, value in state.items()}},
    lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}},
    lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
    lambda state: {**state, "mask_values": [0, 255]},
    lambda state: {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")},
], ids=["vainf-checkpoint", "lightning", "compiled-and-parallel", "mask_values", "without-counters"])  # fmt: skip
def test_weights_are_found_in_what_scripts_wrap_around_them(wrap):
    name = "milesial-transpose"
    model = quietly(from_state_dict, wrap(theirs(name).state_dict()), layers="native")
    assert_same_weights(dict(model.double().named_parameters()), dict(ours(name).named_parameters()))


def test_own_weights_load_without_a_word(recwarn):
    model, other = (unet(1, 2, base_channels=4, depth=1) for _ in range(2))
    assert load_weights(model, other.state_dict()) == []
    assert load_weights(model, other.state_dict(), "fastseg") == []
    assert not recwarn.list
    assert_same_weights(model.state_dict(), other.state_dict())
    assert_same_weights(to_state_dict(model, "fastseg"), other.state_dict())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"multi_grid": (1, 2)}, r"layer4.1.conv1.padding is \(8, 8\) where \(4, 4\) is wanted"),
        ({"channels": 8}, r"do not fit .*convs.0.0.weight \[8, 512, 1, 1\] where \[256, 512, 1, 1\] is wanted"),
    ],
    ids=["multi_grid", "channels"],
)
def test_own_deeplab_v3_with_torchvisions_keys_in_another_form_is_our_own(options, reason, recwarn):
    model, other = (deeplab_v3(2, encoder="resnet18", layers="native", **options) for _ in range(2))
    assert load_weights(model, other.state_dict()) == []
    assert not recwarn.list
    assert_same_weights(model.state_dict(), other.state_dict())
    with pytest.raises(ValueError, match=reason):
        load_weights(model, other.state_dict(), "torchvision")


def smp_state(kind="Unet", encoder="resnet18", **options) -> dict[str, torch.Tensor]:
    return zeros(on_meta(_smp(kind, encoder, **options)))


def without(state: dict, key: str) -> dict:
    return {name: value for name, value in state.items() if name != key}


def misshapen(state: dict, key: str, *shape: int) -> dict:
    return {**state, key: torch.zeros(shape)}


UNREPRESENTABLE = {
    "attention": (lambda: smp_state(decoder_attention_type="scse"), "decoder_attention_type=None"),
    "no-norm": (lambda: smp_state(decoder_use_norm=False), "with batch norm in the decoder"),
    "layer-norm": (
        lambda: without(smp_state(), "decoder.blocks.0.conv1.1.running_mean"),
        "with batch norm in the decoder",
    ),
    "classification-head": (lambda: smp_state(aux_params={"classes": 2}), "leave out the keys"),
    "shallow": (lambda: smp_state(encoder_depth=4, decoder_channels=(8, 8, 8, 8)), "with encoder_depth=5"),
    "vgg": (lambda: smp_state(encoder="vgg11"), "two convolutions between encoder and decoder"),
    "mobileone": (
        lambda: smp_state("DeepLabV3", "mobileone_s0"),
        "no encoder here has these weights: .*keys like encoder.",
    ),
    "resnext": (lambda: smp_state(encoder="resnext50_32x4d"), r"a grouped \(ResNeXt\) one"),
    "resnet152": (lambda: smp_state(encoder="resnet152"), r"layers of \(3, 8, 36, 3\) blocks"),
    "shallow-v3": (
        lambda: smp_state("DeepLabV3", encoder_depth=4),
        r"convs.0.0.weight \[32, 256, 1, 1\] where \[32, 512",
    ),
    "timm-without-name": (lambda: smp_state(encoder="tu-resnet18"), "expected encoder='timm:NAME'"),
    "hrnet": (
        lambda: {"backbone.stage2.0.weight": torch.zeros(64, 64, 1, 1), **vainf_head(True)},
        "no encoder here has these weights: .*keys like backbone.stage2.0.weight",
    ),
}


@pytest.mark.parametrize("name", UNREPRESENTABLE)
def test_what_no_model_here_can_be_is_refused_with_the_reason(name):
    build, reason = UNREPRESENTABLE[name]
    with pytest.raises(ValueError, match=reason):
        from_state_dict(build())


DEEPLAB = dict(num_classes=CLASSES, encoder="resnet18", channels=32, separable_norm=False, refine=True, decoder_convs=1)
REFUSED = {
    "missing": (
        lambda: unet(3, CLASSES, encoder="resnet18"),
        lambda: without(smp_state(), "decoder.blocks.4.conv2.1.bias"),
        "in_channels=3.*: got no decoder.blocks.4.convs.4.bias$",
    ),
    "missing-and-looked-at": (
        lambda: unet(3, CLASSES, encoder="resnet18"),
        lambda: without(smp_state(), "decoder.blocks.2.conv2.0.weight"),
        "but have no decoder.blocks.2.conv2.0.weight$",
    ),
    "unexpected": (
        lambda: unet(3, CLASSES, encoder="resnet18"),
        lambda: {**smp_state(), "decoder.extra": torch.zeros(1)},
        "an unexpected decoder.extra$",
    ),
    "our-key-among-theirs": (
        lambda: unet(3, CLASSES, encoder="resnet18"),
        lambda: {**smp_state(), "decoder.blocks.0.convs.0.weight": smp_state()["decoder.blocks.0.conv1.0.weight"]},
        "an unexpected decoder.blocks.0.convs.0.weight$",
    ),
    "misshapen": (
        lambda: unet(3, CLASSES, encoder="resnet18"),
        lambda: misshapen(smp_state(), "decoder.blocks.4.conv2.1.bias", 3),
        r"decoder.blocks.4.convs.4.bias \[3\] where \[16\] is wanted",
    ),
    "classes": (
        lambda: unet(3, 2, encoder="resnet18"),
        smp_state,
        r"unet\(in_channels=3, num_classes=4, .*encoder='resnet18', .*\) builds it.*classifier.weight \[2, 16, 3, 3\]",
    ),
    "another-model": (
        lambda: unet(3, CLASSES, base_channels=4),
        smp_state,
        r"need a model as fastseg.models.unet\(in_channels=3.*encoder='resnet18'",
    ),
    "no-aux": (
        lambda: deeplab_v3(CLASSES, encoder="mobilenet_v3_large"),
        lambda: zeros(on_meta(CASES["torchvision-mobilenet_v3-aux"].build)),
        "aux=True.*but got another: no aux_classifier",
    ),
    "align_corners": (
        lambda: deeplab_v3plus(**DEEPLAB, rates=(12, 24, 36), dropout=0.5),
        lambda: smp_state("DeepLabV3Plus"),
        r"align_corners=True.*but got another: resize.align_corners is False where True is wanted",
    ),
    "first-blocks-dilation": (
        lambda: deeplab_v3plus(**DEEPLAB, align_corners=True, encoder_options={"keep_dilation": True}),
        lambda: smp_state("DeepLabV3Plus"),
        r"backbone.layer4.0.conv1.padding is \(1, 1\) where \(2, 2\) is wanted",
    ),
    "eps": (
        lambda: deeplab_v3plus(**DEEPLAB, align_corners=True, encoder_options={"eps": 1e-3}),
        lambda: smp_state("DeepLabV3Plus"),
        "backbone.bn1.eps is 0.001 where 1e-05 is wanted",
    ),
    "padding-of-blocks": (
        lambda: deeplab_v3(CLASSES, encoder="mobilenet_v2", output_stride=16, encoder_options={"keep_dilation": True}),
        lambda: zeros(on_meta(CASES["vainf-v3-mobilenet"].build)),
        "'padding': 'block'",
    ),
    "unpadded": (
        lambda: unet(3, CLASSES, base_channels=8, norm="batch"),
        lambda: theirs("milesial-transpose").state_dict(),
        "padding='same'",
    ),
    "transposed": (
        lambda: unet(1, CLASSES, base_channels=8, padding="same", norm="batch"),
        lambda: theirs("milesial-bilinear").state_dict(),
        "up='bilinear'",
    ),
    "own-keys": (
        lambda: unet(1, 2, base_channels=4, depth=1),
        lambda: unet(1, 3, base_channels=4, depth=1).state_dict(),
        r"expected the state dict of this model, but got classifier.weight \[3, 4, 1, 1\]",
    ),
    "unknown-keys": (
        lambda: unet(1, 2, base_channels=4, depth=1),
        lambda: {"blocks.0.weight": torch.zeros(1), "blocks.0.bias": torch.zeros(1)},
        "of none that we know: blocks.0.weight, blocks.0.bias",
    ),
    "no-tensors": (lambda: unet(1, 2, base_channels=4, depth=1), lambda: {"epoch": 3}, "but got epoch of int"),
    "empty": (lambda: unet(1, 2, base_channels=4, depth=1), dict, "but got an empty one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_why_and_leaves_the_model_as_it_was(name):
    build, state, reason = REFUSED[name]
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=reason):
        load_weights(model, state())
    assert_same_weights(model.state_dict(), before)


def test_the_call_in_a_refusal_builds_a_model_that_takes_the_weights():
    state = theirs("vainf-v3plus-mobilenet-separable").state_dict()
    with pytest.raises(ValueError, match="need a model as") as refusal:
        load_weights(deeplab_v3plus(CLASSES, encoder="mobilenet_v2"), state)
    call = str(refusal.value).split("as fastseg.models.")[1].split(" builds it")[0]
    assert quietly(load_weights, eval(call), state)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("torchvision", "expected the weights of torchvision's DeepLabV3, but got keys like encoder.conv1.weight"),
        ("milesial", "expected the weights of milesial's UNet, but got"),
        ("keras", "expected source to be one of 'fastseg', 'torchvision'"),
        ("fastseg", "expected the state dict of this model, but got no "),
    ],
)
def test_a_source_that_is_not_the_weights_is_refused(source, reason):
    with pytest.raises(ValueError, match=reason):
        load_weights(unet(3, 2, encoder="resnet18"), smp_state(), source)


def test_keys_of_two_libraries_are_ambiguous():
    both = {**smp_state(), **zeros(MilesialUNet(3, CLASSES, False, 8))}
    with pytest.raises(ValueError, match="those of 'smp' and 'milesial' alike: say which"):
        from_state_dict(both)


def test_options_that_weights_do_not_tell_are_taken_from_the_call():
    model, said = aloud(
        from_state_dict, smp_state("DeepLabV3Plus"), output_stride=8, rates=(6, 12, 18), dropout=0.1,
        encoder_options={"eps": 1e-3}, single_image="running_stats", layers="native",
    )  # fmt: skip
    assert model.backbone.strides[-1] == 8
    assert [conv[0][0].dilation for conv in model.aspp.convs[1:4]] == [(6, 6), (12, 12), (18, 18)]
    assert model.backbone.layer4[0].conv1.dilation == (4, 4)  # eps comes beside smp's form of the encoder
    assert model.backbone.bn1.eps == 1e-3
    assert "output_stride=16, rates=(12, 24, 36), dropout=0.5" in said


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"num_classes": 5}, ValueError, "expected num_classes=4, as the weights have it, but got 5"),
        ({"encoder": "resnet34"}, ValueError, "expected encoder='resnet18'"),
        ({"colour": 5}, TypeError, "unet takes no colour; it takes in_channels, num_classes"),
    ],
    ids=["classes", "encoder", "unknown"],
)
def test_options_that_contradict_the_weights_are_refused(options, error, reason):
    with pytest.raises(error, match=reason):
        from_state_dict(smp_state(), **options)


OURS_ALONE = {
    "paper-v3plus": (lambda: deeplab_v3plus(2, encoder="resnet18", channels=8), "smp"),
    "paper-v3": (lambda: deeplab_v3(2, encoder="resnet18", weights_layout="paper", multi_grid=(1, 2)), "torchvision"),
    "paper-unet": (lambda: unet(1, 2, base_channels=4), "milesial"),
    "v1": (lambda: on_meta(deeplab_v1, 2, layers="native"), "vainf"),
}


@pytest.mark.parametrize("name", OURS_ALONE)
def test_models_that_the_other_library_does_not_have_are_not_written_as_its(name):
    build, source = OURS_ALONE[name]
    with pytest.raises(ValueError, match=f"no network of '{source}' computes what this model does"):
        to_state_dict(build(), source)


def test_writing_says_how_to_build_the_other_network():
    _, said = aloud(to_state_dict, ours("smp-v3plus-resnet34"), "smp")
    assert "'rates': (1, 2, 3)" in said
    assert "DeepLabV3Plus are rates=(12, 24, 36)" in said


ENCODERS = {
    "unet-resnet18": ("resnet18", lambda: unet(3, 2, encoder="resnet18"), "fc"),
    "v3-mobilenet_v3": ("mobilenet_v3_large", lambda: deeplab_v3(2, encoder="mobilenet_v3_large"), "classifier.0"),
    "v3plus-mobilenet_v2": ("mobilenet_v2", lambda: deeplab_v3plus(2, encoder="mobilenet_v2"), "features.18.0"),
    "v1-vgg16": ("vgg16", lambda: deeplab_v1(2), "classifier.6"),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_a_classification_networks_weights_go_into_the_encoder_alone(name):
    network, build, left_out = ENCODERS[name]
    state, model = zeros(on_meta(getattr(torchvision.models, network))), build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    _, said = aloud(load_weights, model, state)
    after = model.state_dict()
    encoder = [key for key in after if key.startswith(("backbone.", "encoder."))]
    assert all(not after[key].any() for key in encoder)
    assert all(torch.equal(after[key], before[key]) for key in after if key not in encoder)
    assert left_out in said
    assert "the rest of the model keeps what it had" in said


def test_another_classification_networks_weights_are_refused():
    state = zeros(on_meta(torchvision.models.resnet34))
    with pytest.raises(ValueError, match="not those of the model's encoder: got an unexpected layer1.2.conv1.weight"):
        load_weights(unet(3, 2, encoder="resnet18"), state)
    with pytest.raises(ValueError, match="build it, and use fastseg.models.load_weights"):
        from_state_dict(state)
