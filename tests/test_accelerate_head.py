# ruff: noqa: F401, F811 -- imported fixtures, and arguments that have their names
"""fastseg.accelerate and the resizes of other people's models: torch.nn.Upsample, forwards that call interpolate."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastseg
from fastseg.ops.library import OVERLOADS
from tests.networks import assert_like_native, image, one_thread, originals, predict, tensor_of
from tests.test_accelerate import assert_unchanged, snapshot

# How many resizes run on fastseg's operator in one call of each model.
RESIZES = {
    "torchvision-deeplabv3_mobilenet_v3_large": 1,
    "torchvision-lraspp_mobilenet_v3_large": 1,
    "smp-DeepLabV3Plus": 2,
}
MODES = [dict(scale_factor=2), dict(size=(9, 7)), dict(scale_factor=(1.5, 2.0), align_corners=True)]


@pytest.fixture
def resizes(monkeypatch):
    """A list that gets the output size of each call of fastseg's bilinear resize."""
    sizes = []
    real = fastseg.ops.upsample_bilinear2d

    def counted(*args, **kwargs):
        y = real(*args, **kwargs)
        sizes.append(tuple(y.shape[2:]))
        return y

    monkeypatch.setattr(fastseg.ops, "upsample_bilinear2d", counted)
    return sizes


def upsampling(**options):
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Upsample(mode="bilinear", **options))


@pytest.fixture(params=RESIZES)
def named(request, originals):
    return request.param, originals(request.param).eval()


class TestModels:
    def test_like_native(self, named, resizes):
        name, model = named
        fastseg.accelerate(model)
        predict(model, image())
        assert len(resizes) == RESIZES[name]
        assert_like_native(model, name)

    def test_trains_like_native(self, named):
        _, model = named
        x, grads = image(), {}
        for kind in ("native", "accelerated"):
            twin = copy.deepcopy(model)
            twin = fastseg.accelerate(twin, memory_format=None) if kind == "accelerated" else twin
            y = tensor_of(twin(x))
            weights = [p for p in twin.parameters() if p.requires_grad][-2:]
            grads[kind] = torch.autograd.grad(y.square().mean(), weights)
        for ours, theirs in zip(grads["accelerated"], grads["native"], strict=True):
            fastseg.testing.assert_alike(ours, theirs)

    def test_restore_is_exact(self, named):
        _, model = named
        before, y = snapshot(model), predict(model, image())
        fastseg.accelerate(model)
        fastseg.accelerate(model, backend="native")  # accelerating again replaces the settings
        predict(model, image())
        assert_unchanged(fastseg.restore(model), before)
        assert torch.equal(predict(model, image()), y)

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
    def test_copies(self, named, clone, resizes):
        name, model = named
        twin = clone(fastseg.accelerate(model))
        y = predict(twin, image())
        assert len(resizes) == RESIZES[name]
        assert torch.equal(y, predict(model, image()))
        assert type(fastseg.restore(twin)) is type(fastseg.restore(model))

    def test_hooks_keys_and_class_stay(self, named):
        _, model = named
        seen = []
        model.register_forward_hook(lambda module, args, y: seen.append(tensor_of(y).shape))
        keys, kind = list(model.state_dict()), type(model)
        fastseg.accelerate(model)
        predict(model, image())
        assert len(seen) == 1
        assert list(model.state_dict()) == keys
        assert isinstance(model, kind)
        assert type(model).__name__ == kind.__name__

    def test_accelerated_is_scoped(self, named):
        _, model = named
        before = snapshot(model)
        with fastseg.accelerated(model):
            predict(model, image())
        assert_unchanged(model, before)

    def test_explain(self, named):
        _, model = named
        report = fastseg.explain(model, image())
        assert report.resizes
        fastseg.accelerate(model)
        assert fastseg.explain(model, image()).resizes == report.resizes
        assert all(f"resize: {line}" in str(report) for line in report.resizes)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_upsample_modules(mode, resizes):
    model = upsampling(**mode)
    y = predict(model, image())
    fastseg.accelerate(model, backend="reference", memory_format=None)
    assert isinstance(model[1], nn.Upsample)
    fastseg.testing.assert_alike(predict(model, image()), y)
    assert resizes == [tuple(y.shape[2:])]
    assert repr(fastseg.restore(model)[1]) == repr(upsampling(**mode)[1])


def test_upsampling_bilinear_modules(resizes):
    model = nn.Sequential(nn.UpsamplingBilinear2d(scale_factor=2))
    y = predict(model, image())
    fastseg.accelerate(model)
    assert isinstance(model[0], nn.UpsamplingBilinear2d)
    fastseg.testing.assert_alike(predict(model, image()), y)
    assert len(resizes) == 1
    assert type(fastseg.restore(model)[0]) is nn.UpsamplingBilinear2d


class _Own(nn.Upsample):
    def forward(self, input):
        return super().forward(input) + 1


class _Heir(nn.Upsample):
    pass


@pytest.mark.parametrize(
    "layer",
    [
        nn.Upsample(scale_factor=2),
        nn.Upsample(scale_factor=2, mode="bicubic"),
        nn.Upsample(scale_factor=1.5, mode="bilinear", recompute_scale_factor=True),
        nn.UpsamplingNearest2d(scale_factor=2),
        _Own(scale_factor=2, mode="bilinear"),
        _Heir(scale_factor=2, mode="bilinear"),
    ],
    ids=lambda layer: f"{type(layer).__name__}-{layer.mode}",
)
def test_others_are_left_alone(layer, resizes):
    model = nn.Sequential(layer)
    kind, y = type(layer), predict(model, image())
    fastseg.accelerate(model)
    assert type(model[0]) is kind
    assert torch.equal(predict(model, image()), y)
    assert resizes == []


def test_a_mode_that_changes_after_accelerating(resizes):
    model = fastseg.accelerate(upsampling(scale_factor=2))
    model[1].mode, model[1].align_corners = "nearest", None
    assert predict(model, image()).shape == (2, 4, 128, 128)
    assert resizes == []


class TestForwards:
    """Who is known, and who is not: by the function that is the class's forward, not by a name."""

    def models(self):
        utils = pytest.importorskip("torchvision.models.segmentation._utils")

        class Backbone(nn.Module):
            def forward(self, x):
                return {"out": x[:, :, ::2, ::2]}

        class Inherits(utils._SimpleSegmentationModel):
            pass

        class _SimpleSegmentationModel(utils._SimpleSegmentationModel):
            def forward(self, x):
                return {"out": F.interpolate(x, size=(3, 3), mode="bilinear")}

        return [kind(Backbone(), nn.Conv2d(3, 2, 1)) for kind in (Inherits, _SimpleSegmentationModel)]

    def test_a_subclass_without_a_forward_is_known(self, resizes):
        model, _ = self.models()
        predict(fastseg.accelerate(model), image())
        assert resizes == [(64, 64)]

    def test_a_subclass_with_a_forward_is_left_alone(self, resizes):
        _, model = self.models()
        kind = type(model)
        predict(fastseg.accelerate(model), image())
        assert type(model) is kind
        assert resizes == []

    def test_a_forward_of_the_instance_is_left_alone(self, resizes):
        model, _ = self.models()
        model.forward = lambda x: {"out": x}
        predict(fastseg.accelerate(model), image())
        assert resizes == []


def test_blocks_of_segmentation_models_pytorch(resizes):
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    for name, at_least in (("FPN", 4), ("PSPNet", 4), ("UPerNet", 3), ("Segformer", 1)):
        model = getattr(smp, name)("resnet18", encoder_weights=None, classes=3).eval()
        fastseg.accelerate(model)
        resizes.clear()
        predict(model, image())
        assert len(resizes) >= at_least, name
        assert_like_native(model, name)


def test_backend_of_the_model(monkeypatch):
    """A backend named for the model runs its resizes."""
    calls = []
    real = OVERLOADS["upsample_bilinear2d"]["reference"]
    monkeypatch.setitem(
        OVERLOADS["upsample_bilinear2d"], "reference", lambda *args: calls.append(args[1]) or real(*args)
    )
    utils = pytest.importorskip("torchvision.models.segmentation._utils")
    model = utils._SimpleSegmentationModel(_Features(), nn.Upsample(scale_factor=2, mode="bilinear"))
    predict(fastseg.accelerate(model, backend="reference"), image())
    assert calls == [[64, 64], [64, 64]]


class _Features(nn.Module):
    def forward(self, x):
        return {"out": x[:, :, ::2, ::2]}


def test_compile_and_export():
    utils = pytest.importorskip("torchvision.models.segmentation._utils")
    model = utils._SimpleSegmentationModel(_Features(), upsampling(scale_factor=2)).eval()
    x = image()
    wanted = predict(model, x)
    fastseg.accelerate(model)
    torch._dynamo.reset()
    fastseg.testing.assert_alike(predict(torch.compile(model, backend="aot_eager", fullgraph=True), x), wanted)
    exported = torch.export.export(model, (x,)).module()
    fastseg.testing.assert_alike(exported(x)["out"].detach(), wanted)


def test_under_a_transform():
    model = fastseg.accelerate(upsampling(scale_factor=2), memory_format=None)
    x = image()
    found = torch.func.vmap(lambda one: model(one[None])[0])(x)
    fastseg.testing.assert_alike(found, model(x).detach())
