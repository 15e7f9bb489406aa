"""What `python -m benchmarks train` trains: a network on one kind of layers with its optimizer, alone or in a group.

A learner on native layers and one on fastseg's with the same seed start from the same parameters, bit for bit, and are
given the same batches; nothing is drawn at random after that, so that they part by rounding alone.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.modules import TIMES, rms_error
from benchmarks.row import BASELINE_ERROR, LAYOUTS
from benchmarks.shapes import CLASSES
from fastseg import models
from fastseg.models.model import SegmentationModel

WARM_UP = 0.2  # the share of steps in which the learning rate rises; then it falls to zero like a cosine
WEIGHT_DECAY = 1e-2


@dataclass(frozen=True)
class Recipe:
    """How to make a network, given its kind of layers, and how to train it."""

    build: Callable[[str], SegmentationModel]
    steps: int
    learning_rate: float


def _unet(layers: str) -> SegmentationModel:
    return models.unet(3, len(CLASSES), base_channels=16, padding="same", norm="batch", up="bilinear", layers=layers)


def _deeplab_v3plus(layers: str) -> SegmentationModel:
    # The paper's rates are for features of 33 x 33 pixels; those of the pictures here have a fifth of that, and beyond
    # their border a filter's taps see nothing. Dropout would draw in the order of memory, which layouts differ in.
    return models.deeplab_v3plus(
        len(CLASSES), encoder="mobilenet_v2", output_stride=16, rates=(1, 2, 3), dropout=0.0, layers=layers
    )


RECIPES = {"unet": Recipe(_unet, 200, 0.01), "deeplab_v3plus": Recipe(_deeplab_v3plus, 350, 0.01)}


def build(name: str, layers: str, seed: int) -> SegmentationModel:
    """The network with parameters drawn from `seed`, which do not depend on `layers`; on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RECIPES[name].build(layers)


class Group:
    """The processes that train together, each its share of every batch."""

    def __init__(self, device: str, rank: int = 0, size: int = 1):
        self.device, self.rank, self.size = device, rank, size

    @classmethod
    def joined(cls, device: str) -> Group:
        """That of torchrun's processes, or a process alone."""
        environment = os.environ
        group = cls(device, int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1)))
        if device == "cuda":
            torch.cuda.set_device(int(environment.get("LOCAL_RANK", 0)))
        if group.size > 1:
            torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl")
        return group

    def share(self, batch: torch.Tensor) -> torch.Tensor:
        return batch[self.rank :: self.size]

    def agreed(self, value):
        """The first process's value, in all of them."""
        if self.size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values)
        return values[0]

    def mean(self, value: torch.Tensor) -> float:
        if self.size > 1:
            torch.distributed.all_reduce(value)
        return float(value) / self.size

    def leave(self) -> None:
        if self.size > 1:
            torch.distributed.destroy_process_group()


class Objective(nn.Module):
    """A model's loss as a forward, which DistributedDataParallel needs."""

    def __init__(self, model: SegmentationModel):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.model.loss(images, labels)


def autocast_dtype(device: str) -> torch.dtype:
    return torch.float16 if device == "cuda" else torch.bfloat16


def autocast(device: str, amp: bool) -> contextlib.AbstractContextManager:
    return torch.autocast(device, autocast_dtype(device)) if amp else contextlib.nullcontext()


class Learner:
    """One network, its optimizer, and the times of its steps.

    Args:
        name: a key of RECIPES.
        layers: "native" or "fastseg".
        layout: a key of LAYOUTS, of the images and of native's parameters; fastseg chooses its own.
        steps: of the whole training, for the learning rate.
        amp: whether forward passes run under autocast.
    """

    def __init__(self, name: str, layers: str, layout: str, seed: int, steps: int, group: Group, amp: bool = False):
        self.layers, self.layout, self.steps, self.group, self.amp = layers, layout, steps, group, amp
        self.memory_format = LAYOUTS[layout]
        self.model = build(name, layers, seed).to(group.device).train()
        if layers == "native":
            self.model.to(memory_format=self.memory_format)
        self.objective: nn.Module = Objective(self.model)
        if group.size > 1:
            self.objective = DistributedDataParallel(self.objective)
        self.learning_rate = RECIPES[name].learning_rate
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=WEIGHT_DECAY, fused=True)
        self.scaler = torch.amp.GradScaler(group.device, enabled=amp and group.device == "cuda")
        self.done = 0
        self.losses: list[float] = []  # the mean of each call of `train`
        self.seconds: list[float] = []  # a step, likewise
        self.spent = 0.0  # seconds in steps

    def train(self, images: torch.Tensor, labels: torch.Tensor, batches: torch.Tensor) -> None:
        """One step for each row of `batches` [steps, batch], which are indices of images [N, C, H, W]."""
        given = [self.batch(images, labels, chosen) for chosen in batches]
        self._wait()
        start = time.perf_counter()
        losses = [self._step(*pair) for pair in given]
        self._wait()
        spent = time.perf_counter() - start
        self.spent += spent
        self.seconds.append(spent / len(batches))
        self.losses.append(self.group.mean(torch.stack(losses).mean()))

    def batch(self, images: torch.Tensor, labels: torch.Tensor, chosen: torch.Tensor):
        """This process's share of the images [N, C, H, W] and labels [N, H, W] int64 that `chosen` [batch] names."""
        chosen = self.group.share(chosen)
        return images[chosen].contiguous(memory_format=self.memory_format), labels[chosen].long()

    def backward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Leaves gradients in the parameters; the loss."""
        with autocast(self.group.device, self.amp):
            loss = self.objective(images, labels)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _step(self, images, labels):
        self.optimizer.zero_grad()
        loss = self.backward(images, labels)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.learning_rate * _share(self.done / self.steps)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.done += 1
        return loss

    def _wait(self) -> None:
        if self.group.device == "cuda":
            torch.cuda.synchronize()

    def predict(self, images: torch.Tensor, batch: int) -> torch.Tensor:
        """Labels [N, H, W] uint8."""
        with autocast(self.group.device, self.amp):
            found = [
                self.model.predict(part.contiguous(memory_format=self.memory_format), torch.uint8)
                for part in images.split(batch)
            ]
        return torch.cat(found)


def _share(progress: float) -> float:
    """Of the learning rate, after this share of the steps."""
    if progress < WARM_UP:
        return (progress + 0.01) / (WARM_UP + 0.01)
    return 0.5 + 0.5 * math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))


def batches(count: int, batch: int, steps: int, seed: int) -> torch.Tensor:
    """[steps, batch] indices of `count` images: all of them in a random order, then again in another."""
    generator = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-steps * batch // count))]
    return torch.cat(rounds)[: steps * batch].view(steps, batch)


def agreement(name: str, seed: int, device: str, amp: bool, images: torch.Tensor, labels: torch.Tensor) -> dict:
    """The gate of fastseg: its first logits and gradients beside native's in both layouts, seen from float64.

    An early rounding decides on which side of a ReLU's kink some values fall, so gradients are compared as a whole, and
    native's own error may be large.
    """
    start = [build(name, layers, seed).state_dict().values() for layers in ("native", "fastseg")]
    if not all(torch.equal(*pair) for pair in zip(*start, strict=True)):
        return {"green": False, "message": "native and fastseg start from different parameters", "error": None}
    exact = _first_step(build(name, "native", seed).double(), images.double(), labels, device, False)
    errors: dict[str, list[list[float]]] = {"native": [], "fastseg": []}
    for layers, layout in itertools.product(errors, LAYOUTS.values()):
        model = build(name, layers, seed)
        if layers == "native":
            model.to(memory_format=layout)
        got = _first_step(model, images.contiguous(memory_format=layout), labels, device, amp)
        errors[layers].append([rms_error(*pair) for pair in zip(got, exact, strict=True)])
    natives, own = (torch.tensor(errors[layers]).amax(0).tolist() for layers in ("native", "fastseg"))
    message = ""
    for what, native, error in zip(("logits", "gradients"), natives, own, strict=True):
        allowed = max(TIMES * native, BASELINE_ERROR)
        if not error <= allowed:
            message = message or f"{what}: the error is {error:.3g} of the values, {allowed:.3g} is allowed"
    return {"green": not message, "message": message, "error": max(own) if all(map(math.isfinite, own)) else None}


def _first_step(model, images, labels, device, amp):
    model.to(device).train()
    with autocast(device, amp):
        loss = model.loss(images, labels)
        with torch.no_grad():
            logits = model(images)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return logits, torch.cat([gradient.flatten() for gradient in gradients])
