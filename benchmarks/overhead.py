"""What a call costs before it computes anything."""

from __future__ import annotations

import torch

from benchmarks import timing
from benchmarks.cases import ConvCase
from benchmarks.workload import ConvWorkload, check, direction_call


def measure(device: str, seconds: float) -> list[dict]:
    """A depthwise convolution of one 5x5 image, seconds a call; of candidates whose result is right."""
    tiny = ConvCase("overhead", "", 8, (5, 5), batch_gpu=1)
    workload = ConvWorkload(tiny, torch.float32, device)
    tensors = workload.tensors(seed=0)
    candidates = [c for c in workload.candidates() if c.role != "compile" and c.layout == "channels_last"]
    calls = {c: direction_call(c, workload, "forward", tensors) for c in candidates}
    candidates = [c for c in candidates if check(calls[c](), workload, "forward", c.role)["green"]]
    samplers = {c.name: timing.cpu_sampler(calls[c]) for c in candidates}
    samples = timing.interleave(samplers, seconds)
    native = samples.get("native channels_last")
    if native is None:
        return []
    rows = []
    for candidate in candidates:
        taken = samples[candidate.name]
        above = timing.spread([own - theirs for own, theirs in zip(taken, native, strict=True)])
        rows.append(
            {
                "name": candidate.name,
                "backend": candidate.backend,
                "seconds": timing.spread(taken)._asdict(),
                "above_native": above._asdict(),
            }
        )
    return rows
