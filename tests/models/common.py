"""What the tests of the reference models share."""

from __future__ import annotations

import pytest
import torch

from fastseg.testing import random_tensor

# No side is a multiple of any stride; rate 12 at output stride 8 sees something of the height.
SIZE = (97, 70)


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
