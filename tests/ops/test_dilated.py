"""What only the dense convolutions have: the scale in their epilogue."""

from __future__ import annotations

import pytest
import torch

import fastseg
from fastseg.nn import folding
from fastseg.ops.library import OVERLOADS
from fastseg.testing import assert_within, expected_conv, random_tensor

LAYOUTS = [torch.contiguous_format, torch.channels_last]
GEOMETRY = ([1, 1], [2, 2, 2, 2], [2, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_scale_is_multiplied_to_the_sum(dtype, layout, activation, target):
    """y = act(scale * conv(x, w) + bias), rounded once: a norm in eval mode without rounding a scaled weight."""
    if not target.takes(dtype):
        pytest.skip(f"{target} has no kernels for {dtype}")
    x = random_tensor((2, 24, 9, 8), dtype, seed=1, device=target.device, memory_format=layout)
    weight = random_tensor((16, 24, 3, 3), dtype, seed=2, device=target.device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale, bias = (random_tensor((16,), wide, seed=seed, device=target.device) for seed in (3, 4))
    y = OVERLOADS["dilated_conv2d"][target.backend](x, weight, bias, *GEOMETRY, activation, scale)
    scaled = weight.double() * scale.double().view(-1, 1, 1, 1)
    wanted = expected_conv(x, scaled, bias, *GEOMETRY, activation, roundoff=target.roundoff(dtype)).output
    assert y.dtype == dtype
    assert_within(y, wanted, "output")


def test_scale_has_no_gradient(target):
    x, weight = torch.ones(1, 2, 3, 3, device=target.device), torch.ones(2, 2, 1, 1, device=target.device)
    with pytest.raises(NotImplementedError, match="a convolution with scale has no gradient"):
        OVERLOADS["dilated_conv2d"][target.backend](
            x, weight.requires_grad_(), None, [1, 1], [0] * 4, [1, 1], "none", weight.detach()[:, 0, 0, 0]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_norm_behind_it_is_folded_in_every_dtype(dtype, target, monkeypatch):
    """The named backend runs convolution, norm and activation of an accelerated chain, also of low precision."""
    monkeypatch.setattr(folding, "FEWEST_OUTPUTS", {})
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(24, 16, 3, padding=2, dilation=2), torch.nn.BatchNorm2d(16), torch.nn.ReLU()
    ).eval()
    conv, norm, _ = model
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    model.to(target.device, dtype)
    x = random_tensor((2, 24, 9, 8), dtype, seed=1, device=target.device)
    fastseg.accelerate(model, backend=target.backend)
    with torch.no_grad():
        y = model(x)
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        shift = norm.bias.double() + (conv.bias.double() - norm.running_mean.double()) * scale
        scaled = conv.weight.double() * scale.view(-1, 1, 1, 1)
    wanted = expected_conv(x, scaled, shift, *GEOMETRY, "relu", roundoff=target.roundoff(dtype)).output
    assert y.dtype == dtype
    assert_within(y, wanted, "output")
