"""What `summary` is tried on."""

from __future__ import annotations

import pytest
import torch
from torch import nn


def without_data(builder, **options) -> nn.Module:
    """A model that takes no time to build."""
    with torch.device("meta"):
        return builder(**options)


def native(builder, **options) -> nn.Module:
    return without_data(builder, layers="native", **options)


def torchvision_model(name, aux=True):
    models = pytest.importorskip("torchvision.models.segmentation")
    return without_data(getattr(models, name), weights=None, weights_backbone=None, aux_loss=aux)


def smp_model(name, encoder):
    smp = pytest.importorskip("segmentation_models_pytorch")
    return getattr(smp, name)(encoder, encoder_weights=None)


def timm_model(name):
    return pytest.importorskip("timm").create_model(name)


class Function(nn.Module):
    """A function of x and modules, as a module."""

    def __init__(self, function, *modules):
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(modules)

    def forward(self, x):
        return self.function(x, *self.parts)


def conv(*args, **options):
    return nn.Conv2d(2, 2, *args, **options)
