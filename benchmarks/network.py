"""Whole networks on a real photograph: native as users call it, compiled, other engines, accelerated.

The weights are random, since speed does not depend on them; batch norm statistics come from one pass over the
photograph, so that activations have sensible sizes. "inference" is logits of the images' size; "training" a forward and
a backward pass of the cross entropy, of fastseg's own models on logits of their own resolution. No speed is given
before the results agree: the accelerated network may be at most modules.TIMES further from a float64 run than native
itself is, and its labels may differ from float64's only where scores nearly tie.
"""

from __future__ import annotations

import ast
import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import photograph, runtimes
from benchmarks.modules import TIMES, TRAINING, ModuleWorkload, rms_error, without_dropout
from benchmarks.row import AUTOCAST, BASELINE_ERROR, Candidate
from fastseg import models
from fastseg.models.counts import Summary, summary
from fastseg.models.model import SegmentationModel
from fastseg.testing import assert_no_less_accurate

# A gradient further than this from float64's is another one: that of two that have nothing in common is 1.4.
OTHER_GRADIENT = 0.5
# How much further from float64 than native a baseline may be in low precision.
AS_NATIVE = 8


@dataclass(frozen=True)
class NetworkCase:
    """A network on images of size x size.

    model: "NAME" of torchvision.models.segmentation, "smp:CLASS:ENCODER" of segmentation_models_pytorch, or
        "fastseg:NAME:OPTION=VALUE,..." of fastseg.models.
    batch: images in inference; batch_training: in training, on a GPU (2 on a CPU).
    autocast: whether a quick run has it under autocast as well.
    """

    id: str
    model: str
    size: int = 513
    batch: int = 1
    quick: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    channels: int = 3
    batch_training: int = 8
    directions: tuple[str, ...] = ("inference", TRAINING)
    autocast: bool = False
    table: str = ""

    def shape(self, device: str, direction: str) -> tuple[int, ...]:
        training = 2 if device == "cpu" else self.batch_training
        return training if direction == TRAINING else self.batch, self.channels, self.size, self.size


def _batches(id: str, model: str, size: int, **options) -> tuple[NetworkCase, ...]:
    """One image, and on a GPU sixteen as well."""
    options = {"table": "models", **options}
    large = options | {"quick": False, "autocast": False, "directions": ("inference",), "devices": ("cuda",)}
    return NetworkCase(id, model, size, **options), NetworkCase(f"{id}-n16", model, size, batch=16, **large)


_UNET = "fastseg:unet:"
NETWORKS = (
    NetworkCase("deeplabv3-mobilenet-v3", "deeplabv3_mobilenet_v3_large"),
    NetworkCase("deeplabv3-resnet50", "deeplabv3_resnet50", autocast=True),
    *_batches("deeplab-v3plus-mobilenet-v2", "fastseg:deeplab_v3plus:encoder=mobilenet_v2", 513),
    NetworkCase("deeplabv3plus-mobilenet-v2", "smp:DeepLabV3Plus:mobilenet_v2", 512),
    NetworkCase("deeplabv3plus-resnet50", "smp:DeepLabV3Plus:resnet50", 512),
    *_batches("deeplab-v3plus-xception65", "fastseg:deeplab_v3plus:encoder=xception65", 513),
    *_batches("deeplab-v3-resnet50", "fastseg:deeplab_v3:encoder=resnet50", 520, quick=False),
    *_batches("deeplab-v3-resnet101", "fastseg:deeplab_v3:encoder=resnet101", 520, quick=False),
    *_batches("unet-572", f"{_UNET}in_channels=1,num_classes=2", 572, channels=1, batch_training=4, quick=False),
    *_batches(
        "unet-512", f"{_UNET}in_channels=3,num_classes=21,padding=same,norm=batch", 512, batch_training=4, quick=False
    ),
    NetworkCase("deeplabv3-mobilenet-v3-n16", "deeplabv3_mobilenet_v3_large", batch=16, devices=("cuda",)),
    NetworkCase("lraspp-mobilenet-v3", "lraspp_mobilenet_v3_large", quick=False),
)


class NetworkWorkload(ModuleWorkload):
    """A network in "float32", "bfloat16", "float16", or under "autocast"."""

    case: NetworkCase
    fastseg_layouts = ("NCHW",)  # images as users have them: accelerate sees to their layout

    def __init__(self, case: NetworkCase, dtype: torch.dtype | str, device: str):
        self.autocast = dtype == AUTOCAST
        super().__init__(case, torch.bfloat16 if self.autocast else dtype, device)
        self.weights = torch.float32 if self.autocast else dtype

    def describe(self, direction: str) -> dict:
        return {
            "case": self.case.id,
            "layer": self.case.model,
            "model": self.case.model,
            "weights": "random",
            "dtype": AUTOCAST if self.autocast else str(self.dtype).removeprefix("torch."),
            "device": self.device,
            "shape": list(self.inputs(direction).shape),
            "live_share": self.live_share(direction),
        }

    def build(self, direction: str) -> nn.Module:
        model = build(self.case, self._photograph())
        if direction == TRAINING:
            model = Loss(without_dropout(model.train()))
        return model.to(self.device, self.weights)

    def accelerated(self, direction: str, backend: str = "auto") -> nn.Module:
        accelerated = super().accelerated(direction, backend)
        for module in accelerated.modules():
            if isinstance(module, SegmentationModel):
                module.layers = "fastseg"  # its loss follows
        return accelerated

    def candidates(self) -> list[Candidate]:
        found = super().candidates()
        if self.device == "cpu" and not self.autocast and self.dtype == torch.float32:
            found[-1:-1] = runtimes.candidates(self)
        return found

    def _photograph(self) -> torch.Tensor:
        return photograph.to_tensor(photograph.photograph(self.case.size), self.case.channels)

    def inputs(self, direction: str) -> torch.Tensor:
        """The photograph; further images of a batch are the same, rolled sideways."""
        if direction not in self._inputs:
            x, batch = self._photograph(), self.case.shape(self.device, direction)[0]
            x = torch.cat([x.roll(17 * i, -1) for i in range(batch)])
            self._inputs[direction] = x.to(self.device, self.weights)
        return self._inputs[direction]

    def counts(self, direction: str) -> Summary:
        """Of the network alone: what a loss adds is little."""
        if direction not in self._counts:
            model = self.native(direction)
            model = model.model if isinstance(model, Loss) else model
            batch, channels, *size = self.case.shape(self.device, direction)
            self._counts[direction] = summary(model, tuple(size), channels, batch=batch)
        return self._counts[direction]

    def call(self, module: nn.Module, x: torch.Tensor, direction: str) -> Callable[[], object]:
        """Gives logits, or in training the loss and the gradient of every parameter."""
        if direction != TRAINING:

            def infer():
                with torch.no_grad(), self._precision(x):
                    return _tensor(module(x))

            return infer
        parameters = [p for p in module.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(2)
        classes = module.model.num_classes if isinstance(getattr(module, "model", None), SegmentationModel) else 21
        target = torch.randint(classes, (x.shape[0], *x.shape[2:]), generator=generator).to(x.device)

        def train():
            with self._precision(x):
                loss = module(x, target)
            return loss.detach(), *torch.autograd.grad(loss, parameters, allow_unused=True)

        return train

    def _precision(self, x: torch.Tensor) -> contextlib.AbstractContextManager:
        """Nothing for a float64 run, which says what is right."""
        if not self.autocast or x.dtype == torch.float64 or x.device.type == "meta":
            return contextlib.nullcontext()
        return torch.autocast(self.device, torch.bfloat16)

    def gate(self, results, direction: str, role: str, natives: Sequence) -> dict:
        exact = self.exact(direction)
        judge = agreement if direction != TRAINING else agreement_in_training
        return judge(results, natives, exact, role, low_precision=self.dtype != torch.float32)

    def extras(self, results: dict) -> dict:
        """The masks, of an inference in the first dtype that a record has."""
        if self.autocast or not all(isinstance(results.get(n), torch.Tensor) for n in ("native NCHW", "fastseg")):
            return {}
        native, fast = (results[name][0].argmax(0).cpu() for name in ("native NCHW", "fastseg"))
        if native.shape != fast.shape:
            return {}
        return {"pictures": photograph.pictures(photograph.photograph(self.case.size), native, fast)}


class Loss(nn.Module):
    """A network with its cross entropy."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if isinstance(self.model, SegmentationModel):
            return self.model.loss(images, target)
        return F.cross_entropy(_tensor(self.model(images)), target)


def build(case: NetworkCase, x: torch.Tensor) -> nn.Module:
    """The network with random weights, in eval mode, its batch norms calibrated on `x` [1, C, H, W]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _network(case.model)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        momenta = [m.momentum for m in norms]
        for norm in norms:
            norm.momentum = 1.0
        if norms:
            with torch.no_grad():
                # Two images: batch norm needs more than one value a channel after ASPP's pooling.
                model.train()(torch.cat([x, x.flip(-1)]))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model.eval()


def _network(name: str) -> nn.Module:
    """With random weights, and 21 classes where the name does not say."""
    library, *rest = name.split(":", 2)
    if library == "fastseg":
        kind, given = (*rest, "")[:2]
        options = dict(option.split("=", 1) for option in given.split(",") if option)
        return getattr(models, kind)(**{k: _value(v) for k, v in options.items()}, layers="native")
    if library == "smp":
        import segmentation_models_pytorch

        kind, encoder = rest
        return getattr(segmentation_models_pytorch, kind)(encoder, encoder_weights=None, classes=21)
    from torchvision.models import segmentation

    return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=21)


def _value(text: str):
    try:
        return ast.literal_eval(text)
    except ValueError:
        return text


def _tensor(result) -> torch.Tensor:
    return result["out"] if isinstance(result, dict) else result


def _joined(result) -> tuple[torch.Tensor, torch.Tensor]:
    loss, *grads = result
    return loss, torch.cat([grad.flatten() for grad in grads if grad is not None])


def agreement_in_training(results, natives: Sequence, exact, role: str, low_precision: bool = False) -> dict:
    """The gate of a loss and the gradient of all parameters together, on root mean square errors.

    In a deep network with random weights rounding grows on its way back: baselines are held to their loss, and to a
    gradient that is no other in float32; neither error of the accelerated network may exceed TIMES native's larger one.
    """
    loss, gradient = (rms_error(own, wanted) for own, wanted in zip(_joined(results), _joined(exact), strict=True))
    natives = [max(map(rms_error, _joined(native), _joined(exact))) for native in natives]
    if role == "fastseg":
        allowed = (max(TIMES * max(natives, default=0.0), 1e-6),) * 2
    else:
        allowed = BASELINE_ERROR, math.inf if low_precision else OTHER_GRADIENT
    wrong = [
        f"{name}: the error is {error:.3g}, {most:.3g} is allowed"
        for name, error, most in zip(("loss", "gradient of the parameters"), (loss, gradient), allowed, strict=True)
        if not error <= most
    ]
    error = max(loss, gradient)
    return {"green": not wrong, "message": "; ".join(wrong), "error": error if math.isfinite(error) else None}


def agreement(
    logits: torch.Tensor, natives: Sequence[torch.Tensor], exact: torch.Tensor, role: str, low_precision: bool = False
) -> dict:
    """The gate of an inference: errors against float64 beside native's own, and labels.

    A baseline has to be recognisably right in float32, and in low precision about as right as native.
    """
    if logits.shape != exact.shape:
        message = f"expected logits of shape {tuple(exact.shape)}, but got {tuple(logits.shape)}"
        return {"green": False, "message": message, "error": None}
    error = float((logits.double() - exact).abs().max())
    wrong = logits.argmax(1) != exact.argmax(1)
    best = exact.topk(2, dim=1).values
    tied = best[:, 0] - best[:, 1] <= 2 * error
    message = ""
    native = max(natives, key=lambda n: float((n.double() - exact).abs().max()))
    try:
        if role == "fastseg":
            assert_no_less_accurate(logits, native, exact, TIMES, "logits")
        elif role != "native" or not low_precision:
            own = float((native.double() - exact).abs().max())
            allowed = max(BASELINE_ERROR * float(exact.abs().max()), AS_NATIVE * own if low_precision else 0.0)
            if not error <= allowed:
                raise AssertionError(f"the largest error is {error:.3g}, {allowed:.3g} is allowed")
        if bool((wrong & ~tied).any()) or not bool(logits.isfinite().all()):
            raise AssertionError(f"{int((wrong & ~tied).sum())} labels differ from float64's where scores do not tie")
    except AssertionError as failure:
        message = str(failure)
    return {
        "green": not message,
        "message": message,
        "error": error / float(exact.abs().max()) if math.isfinite(error) else None,
        "labels": wrong.numel(),
        "labels_unlike_float64": int(wrong.sum()),
        "labels_unlike_native": int((logits.argmax(1) != native.argmax(1)).sum()),
    }
