"""Reference models under torch.compile and torch.export."""

from __future__ import annotations

import pytest
import torch

from fastseg.models import deeplab_v3plus, unet
from fastseg.testing import assert_alike

# Bilinear steps up, so that a resize is traced; the compiler takes half a minute over larger networks.
MODELS = {
    "unet": lambda: unet(3, 4, base_channels=4, depth=2, padding="same", norm="batch", up="bilinear"),
    "deeplab_v3plus": lambda: deeplab_v3plus(4, encoder="mobilenet_v2", rates=(1, 2, 3)),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


@pytest.mark.parametrize("model", ["unet"], indirect=True)
@torch.no_grad()
def test_compile_fullgraph(model):
    images = torch.randn(2, 3, 33, 40)
    assert_alike(torch.compile(model, backend="aot_eager", fullgraph=True)(images), model(images))


@torch.no_grad()
def test_export(model):
    images = torch.randn(2, 3, 33, 40)
    assert_alike(torch.export.export(model, (images,)).module()(images), model(images))


@pytest.mark.parametrize("model", ["unet"], indirect=True)
def test_gradients_of_a_compiled_loss(model):
    images, targets = torch.randn(2, 3, 33, 40), torch.randint(4, (2, 33, 40))
    wanted = torch.autograd.grad(model.loss(images, targets), tuple(model.parameters()))
    loss = torch.compile(model.loss, backend="aot_eager")(images, targets)
    for grad, value in zip(torch.autograd.grad(loss, tuple(model.parameters())), wanted, strict=True):
        assert_alike(grad, value)
