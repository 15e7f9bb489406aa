"""Other libraries' weights: into our models and back, and what is said about them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastseg.models import deeplab_v1, deeplab_v3, deeplab_v3plus, from_state_dict, load_weights, to_state_dict, unet
from fastseg.testing import assert_alike, random_tensor
from tests.models.foreign import (
    CASES,
    CLASSES,
    aloud,
    assert_same_weights,
    on_meta,
    ours,
    quietly,
    smp_network,
    smp_state,
    theirs,
    torchvision,
    torchvision_network,
    vainf_head,
    zeros,
)
from tests.models.published import MilesialUNet
from tests.networks import one_thread  # noqa: F401

each_case = pytest.mark.parametrize("name", CASES)


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
    "torchvision-resnet101": ("torchvision", torchvision_network("resnet101", True)),
    "smp-v3-resnet101": ("smp", smp_network("DeepLabV3", "resnet101")),
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
def test_loading_gives_the_same_weights_and_says_the_same_as_building(name):
    model = copy.deepcopy(ours(name)).float()
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    sentences, said = aloud(load_weights, model, theirs(name).state_dict())
    assert " ".join(sentences) == said
    assert all(sentence.endswith(".") for sentence in sentences)
    assert_same_weights(model.double().state_dict(), ours(name).state_dict())


def test_a_model_built_option_by_option_takes_the_weights():
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
