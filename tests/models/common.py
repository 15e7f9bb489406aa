"""What the tests of the reference models share."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fastseg.testing import assert_alike, assert_argmax, assert_no_less_accurate, expected_scores, random_tensor
from tests.networks import lively

# No side is a multiple of any stride; rate 12 at output stride 8 sees something of the height.
SIZE = (97, 70)
SMALL = (33, 20)


def images(batch=2, size=SIZE) -> torch.Tensor:
    return random_tensor((batch, 3, *size), torch.float32)


def targets(batch=2, size=SIZE) -> torch.Tensor:
    found = torch.randint(5, (batch, *size), generator=torch.Generator().manual_seed(3))
    found[:, :2] = -100
    return found


def gradients(model) -> torch.Tensor:
    """All in one vector: of a bias that a batch norm takes away again, the gradient is nothing but rounding."""
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.fixture(params=["fastseg", "native"])
def layers(request):
    return request.param


class FormPromises:
    """What every form of a DeepLab promises.

    The module has fixtures: `build`, a function of a form and its kind of layers; `form`, and `light_form` for what the
    head alone decides.
    """

    def test_both_kinds_of_layers_have_the_same_parameters(self, build, form):
        fast, native = build(form).state_dict(), build(form, "native").state_dict()
        assert list(fast) == list(native)
        for key, value in fast.items():
            assert torch.equal(value, native[key]), key

    def test_fastseg_layers_are_as_accurate_as_native_ones(self, build, form):
        model, native = build(form).eval(), build(form, "native").eval()
        with torch.no_grad():
            exact = copy.deepcopy(native).double()(images(1).double())
            assert_no_less_accurate(model(images(1)), native(images(1)), exact, 2, form)

    def test_both_kinds_of_layers_train_alike(self, build, light_form):
        models = [build(light_form, layers).double() for layers in ("fastseg", "native")]
        for model in models:
            # Of two pooled images a batch norm keeps the sign alone, and gradients behind it are nothing but rounding.
            model.loss(images(3, SMALL).double(), targets(3, SMALL)).backward()
        assert_alike(*map(gradients, models))
        for a, b in zip(*(model.buffers() for model in models), strict=True):
            assert_alike(a, b)

    def test_predict_is_the_argmax_of_the_resized_logits(self, build, light_form, layers):
        model = build(light_form, layers)
        with torch.no_grad():
            logits = copy.deepcopy(model).eval().logits(images(2, SMALL))
        assert_argmax(model.predict(images(2, SMALL)), expected_scores(logits, SMALL, model.resize.align_corners))
        assert model.training

    def test_copies_give_the_same(self, build, light_form, layers):
        model = build(light_form, layers).eval()
        other = lively(build(light_form, layers)).eval()
        with torch.no_grad():
            wanted = model(images(1, SMALL))
            assert not torch.equal(other(images(1, SMALL)), wanted)
            other.load_state_dict(model.state_dict())
            for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
                assert torch.equal(twin(images(1, SMALL)), wanted)
