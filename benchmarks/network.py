"""Whole networks on a real photograph: native as users call it, native in channels_last, torch.compile, accelerated.

The weights are random, since speed does not depend on them; batch norm statistics come from one pass over the
photograph, so that activations have sensible sizes. No speed is given before the results agree: the accelerated network
may be at most TIMES further from a float64 run than native itself is, and its labels may differ from float64's only
where scores nearly tie.
"""

from __future__ import annotations

import base64
import copy
import io
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import fastseg
from benchmarks import memory, timing
from fastseg.testing import assert_no_less_accurate

TIMES = 3
PICTURE = 257  # pixels a side of the pictures kept in the record
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class NetworkCase:
    """`model` names a function of torchvision.models.segmentation, or "smp:CLASS:ENCODER" of another library."""

    id: str
    model: str
    size: int = 513
    batch: int = 1
    quick: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")


NETWORKS = (
    NetworkCase("deeplabv3-mobilenet-v3", "deeplabv3_mobilenet_v3_large"),
    NetworkCase("deeplabv3-mobilenet-v3-n16", "deeplabv3_mobilenet_v3_large", batch=16, devices=("cuda",)),
    NetworkCase("deeplabv3plus-mobilenet-v2", "smp:DeepLabV3Plus:mobilenet_v2", 512),
    NetworkCase("deeplabv3plus-resnet50", "smp:DeepLabV3Plus:resnet50", 512),
    NetworkCase("lraspp-mobilenet-v3", "lraspp_mobilenet_v3_large", quick=False),
)


def photograph(size: int):
    """Matplotlib's portrait of Grace Hopper (US Navy, public domain), cut to `size` x `size`; a PIL image."""
    from matplotlib.cbook import get_sample_data
    from PIL import Image, ImageOps

    with get_sample_data("grace_hopper.jpg") as file:
        image = Image.open(file).convert("RGB")
    return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC, centering=(0.5, 0.3))


def to_tensor(image) -> torch.Tensor:
    """[1, 3, H, W] float32, normalised as torchvision's models expect."""
    width, height = image.size
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, height, width, 3)
    x = pixels.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    return ((x - mean) / std).contiguous()


def build(case: NetworkCase, x: torch.Tensor) -> torch.nn.Module:
    """The network with random weights, in eval mode, its batch norms calibrated on `x` [1, 3, H, W]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _network(case.model)
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        momenta = [m.momentum for m in norms]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            # Two images: batch norm needs more than one value a channel after ASPP's pooling.
            model.train()(torch.cat([x, x.flip(-1)]))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model.eval()


def _network(name: str) -> torch.nn.Module:
    """With 21 classes and random weights."""
    if not name.startswith("smp:"):
        from torchvision.models import segmentation

        return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=21)
    import segmentation_models_pytorch

    _, kind, encoder = name.split(":")
    return getattr(segmentation_models_pytorch, kind)(encoder, encoder_weights=None, classes=21)


def measure(case: NetworkCase, device: str, dtype: torch.dtype, seconds: float, compile_reason: str | None) -> dict:
    """The record's row of one network. `compile_reason` says why torch.compile is left out, or is None."""
    with timing.measuring_stream(device):
        return _measure(case, device, dtype, seconds, compile_reason)


@torch.no_grad()
def _measure(case, device, dtype, seconds, compile_reason):
    image = photograph(case.size)
    x = to_tensor(image)
    model = build(case, x).to(device, dtype)
    # Further images of a batch are the photograph, rolled sideways.
    x = torch.cat([x.roll(17 * i, -1) for i in range(case.batch)]).to(device, dtype)
    exact = _logits(copy.deepcopy(model).double(), x.double())

    row = {
        "id": f"{case.id}/inference/{str(dtype).removeprefix('torch.')}",
        "case": case.id,
        "model": case.model,
        "weights": "random",
        "direction": "inference",
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "shape": list(x.shape),
        "candidates": [],
    }
    last = {"memory_format": torch.channels_last}
    model_last = copy.deepcopy(model).to(**last)
    x_last = x.contiguous(**last)
    candidates = [
        ("native NCHW", "native", lambda: (model, x)),
        ("native channels_last", "native", lambda: (model_last, x_last)),
        ("torch.compile", "compile", lambda: (torch.compile(model_last, dynamic=False), x_last)),
        ("fastseg", "fastseg", lambda: (fastseg.accelerate(copy.deepcopy(model)), x)),
    ]
    calls, outputs = {}, {}
    for name, role, prepare in candidates:
        entry = {"name": name, "role": role, "skipped": compile_reason if role == "compile" else None}
        row["candidates"].append(entry)
        if entry["skipped"]:
            continue
        network, given = prepare()
        outputs[name] = _logits(network, given)
        natives = [outputs[n] for n in ("native NCHW", "native channels_last") if n in outputs]
        entry["gate"] = agreement(outputs[name], natives, exact, role)
        if entry["gate"]["green"]:
            calls[name] = [lambda network=network, given=given: network(given)]
            entry["peak_bytes"] = memory.peak_bytes(calls[name][0], device)
    row["pictures"] = _pictures(image, exact, outputs)
    samplers, row["timed"] = timing.samplers_for(calls, device)
    timing.add_speeds(row["candidates"], timing.interleave(samplers, seconds), ("native NCHW", "native channels_last"))
    return row


def _logits(network, x) -> torch.Tensor:
    result = network(x)
    return result["out"] if isinstance(result, dict) else result


def agreement(logits, natives, exact, role: str) -> dict:
    """The gate of a network: errors against float64 beside native's own, and labels."""
    error = float((logits.double() - exact).abs().max())
    wrong = logits.argmax(1) != exact.argmax(1)
    best = exact.topk(2, dim=1).values
    tied = best[:, 0] - best[:, 1] <= 2 * error
    message = ""
    native = max(natives, key=lambda n: float((n.double() - exact).abs().max()))
    try:
        if role == "fastseg":
            assert_no_less_accurate(logits, native, exact, TIMES, "logits")
        if bool((wrong & ~tied).any()) or not bool(logits.isfinite().all()):
            raise AssertionError(f"{int((wrong & ~tied).sum())} labels differ from float64's where scores do not tie")
    except AssertionError as failure:
        message = str(failure)
    return {
        "green": not message,
        "message": message,
        "error": error / float(exact.abs().max()),
        "labels": wrong.numel(),
        "labels_unlike_float64": int(wrong.sum()),
        "labels_unlike_native": int((logits.argmax(1) != native.argmax(1)).sum()),
    }


def _pictures(image, exact, outputs) -> dict[str, str]:
    """The photograph and its masks as data URLs, small; a differing pixel is never lost in making them small."""
    from PIL import Image

    small = image.resize((PICTURE, PICTURE), Image.Resampling.LANCZOS)
    pictures = {"photograph": _data_url(small, "JPEG", quality=80)}
    labels = {name: logits[0].argmax(0).cpu() for name, logits in outputs.items()}
    native, fast = labels["native NCHW"], labels["fastseg"]
    differ = F.adaptive_max_pool2d((native != fast).float()[None, None], PICTURE)[0, 0]
    pictures["native"] = _data_url(_mask(native), "PNG", optimize=True)
    pictures["fastseg"] = _data_url(_mask(fast), "PNG", optimize=True)
    gray = (255 * differ).to(torch.uint8).numpy()
    pictures["difference"] = _data_url(Image.fromarray(gray).convert("1"), "PNG", optimize=True)
    pictures["differing_labels"] = int((native != fast).sum())
    return pictures


def _mask(labels: torch.Tensor):
    """The labels in PASCAL VOC's colours."""
    from PIL import Image

    mask = Image.fromarray(labels.to(torch.uint8).numpy()).resize((PICTURE, PICTURE), Image.Resampling.NEAREST)
    palette = []
    for label in range(256):
        # VOC spreads the label's bits, three at a time, over red, green and blue from the highest bit down.
        palette += [sum((label >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
    mask.putpalette(palette)
    return mask


def _data_url(image, kind: str, **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
