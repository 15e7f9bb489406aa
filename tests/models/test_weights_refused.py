"""Weights that do not fit are refused with the reason, and nothing changes."""

from __future__ import annotations

import pytest
import torch

from fastseg.models import deeplab_v1, deeplab_v3, deeplab_v3plus, from_state_dict, load_weights, to_state_dict, unet
from tests.models.foreign import (
    CASES,
    CLASSES,
    assert_same_weights,
    on_meta,
    quietly,
    smp_state,
    theirs,
    torchvision,
    vainf_head,
    zeros,
)
from tests.models.published import MilesialUNet
from tests.networks import one_thread  # noqa: F401


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


def test_another_classification_networks_weights_are_refused():
    state = zeros(on_meta(torchvision.models.resnet34))
    with pytest.raises(ValueError, match="not those of the model's encoder: got an unexpected layer1.2.conv1.weight"):
        load_weights(unet(3, 2, encoder="resnet18"), state)
    with pytest.raises(ValueError, match="build it, and use fastseg.models.load_weights"):
        from_state_dict(state)
