"""Networks that no package index has, from facts of their published code: names, shapes, order of channels, padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def _double_conv(in_channels: int, width: int, out_channels: int) -> nn.Module:
    layers = []
    for inputs, outputs in ((in_channels, width), (width, out_channels)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.ModuleDict({"double_conv": nn.Sequential(*layers)})


class MilesialUNet(nn.Module):
    """The padded U-Net of Pytorch-UNet, any width."""

    def __init__(self, in_channels: int, num_classes: int, bilinear: bool, width: int = 64):
        super().__init__()
        widths = [width * 2**level for level in range(5)]
        bottom = [*widths[:4], widths[4] // 2] if bilinear else widths
        self.inc = _double_conv(in_channels, width, width)
        for level in range(1, 5):
            convs = _double_conv(bottom[level - 1], bottom[level], bottom[level])
            self.add_module(f"down{level}", nn.ModuleDict({"maxpool_conv": nn.Sequential(nn.MaxPool2d(2), convs)}))
        for step, level in enumerate((3, 2, 1, 0), 1):
            wide, narrow = 2 * widths[level], widths[level]
            outputs = narrow // 2 if bilinear and level > 0 else narrow
            up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            up = up if bilinear else nn.ConvTranspose2d(wide, narrow, 2, 2)
            self.add_module(f"up{step}", nn.ModuleDict({"up": up, "conv": _double_conv(wide, narrow, outputs)}))
        self.outc = nn.ModuleDict({"conv": nn.Conv2d(width, num_classes, 1)})

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.inc["double_conv"](images)
        skips = []
        for level in range(1, 5):
            skips.append(x)
            pool, convs = getattr(self, f"down{level}")["maxpool_conv"]
            x = convs["double_conv"](pool(x))
        for step in range(1, 5):
            parts, skip = getattr(self, f"up{step}"), skips.pop()
            x = parts["up"](x)
            rows, columns = (skip.shape[axis] - x.shape[axis] for axis in (2, 3))
            x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
            x = parts["conv"]["double_conv"](torch.cat([skip, x], 1))
        return self.outc["conv"](x)


class VainfMobileNet(nn.Module):
    """MobileNetV2 of DeepLabV3Plus-Pytorch: torchvision's with blocks padded as a whole, and the stem not at all."""

    def __init__(self, output_stride: int):
        super().__init__()
        import torchvision

        features = torchvision.models.mobilenet_v2(weights=None).features[:-1]
        features[0][0].padding = (0, 0)
        reached, dilation = 2, 1
        for block in features[1:]:
            depthwise, before = block.conv[-3][0], dilation
            stride = depthwise.stride[0]
            if reached * stride > output_stride:
                dilation, stride = dilation * stride, 1
            reached *= stride
            depthwise.stride, depthwise.padding, depthwise.dilation = (stride,) * 2, (0, 0), (before,) * 2
        self.low_level_features, self.high_level_features = features[:4], features[4:]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low_level = self._blocks(self.low_level_features[1:], self.low_level_features[0](images))
        return low_level, self._blocks(self.high_level_features, low_level)

    def _blocks(self, blocks, x: torch.Tensor) -> torch.Tensor:
        for block in blocks:
            y = block.conv(F.pad(x, [block.conv[-3][0].dilation[0]] * 4))
            x = x + y if block.use_res_connect else y
        return x


class VainfDeepLab(nn.Module):
    """DeepLab v3 and v3+ of DeepLabV3Plus-Pytorch on MobileNetV2; `separable` is its --separable_conv."""

    def __init__(self, num_classes: int, plus: bool, output_stride: int, separable: bool = False):
        super().__init__()
        from torchvision.models.segmentation.deeplabv3 import ASPP

        rates = [rate * 16 // output_stride for rate in (6, 12, 18)]
        self.backbone = VainfMobileNet(output_stride)
        aspp, inputs = ASPP(320, rates), 304 if plus else 256
        convs = [nn.Conv2d(inputs, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU()]
        convs.append(nn.Conv2d(256, num_classes, 1))
        if plus:
            project = nn.Sequential(nn.Conv2d(24, 48, 1, bias=False), nn.BatchNorm2d(48), nn.ReLU())
            parts = {"project": project, "aspp": aspp, "classifier": nn.Sequential(*convs)}
        else:
            parts = {"classifier": nn.Sequential(aspp, *convs)}
        self.classifier = nn.ModuleDict(parts)
        if separable:
            _separate(self.classifier)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        low_level, features = self.backbone(images)
        if "aspp" in self.classifier:
            y, low_level = self.classifier["aspp"](features), self.classifier["project"](low_level)
            features = torch.cat([low_level, _resize(y, low_level)], 1)
        return _resize(self.classifier["classifier"](features), images)


class _Separable(nn.Module):
    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        inputs, geometry = conv.in_channels, (conv.stride, conv.padding, conv.dilation)
        depthwise = nn.Conv2d(inputs, inputs, conv.kernel_size, *geometry, inputs, bias=False)
        self.body = nn.Sequential(depthwise, nn.Conv2d(inputs, conv.out_channels, 1, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def _separate(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d) and child.kernel_size != (1, 1):
            module.add_module(name, _Separable(child))
        else:
            _separate(child)


def _resize(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)
