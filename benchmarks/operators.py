"""One row: every candidate of a case and direction, checked first, then timed in turns.

A candidate whose result is wrong is red and gets no speed. The kernels under test have to stay inside fastseg.testing's
bound, element by element. Baselines may use TF32 or round intermediate results: they have to be recognisably right.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks import memory, timing
from benchmarks.cases import ConvCase
from benchmarks.workload import LAYOUTS, Candidate, ConvWorkload
from fastseg.testing import assert_within

# A baseline's largest error, relative to the largest value. TF32 and bfloat16 stay far below, a wrong result far above.
BASELINE_ERROR = 2.0**-5


def direction_call(candidate: Candidate, workload, direction: str, tensors) -> Callable[[], dict[str, torch.Tensor]]:
    """A function that runs `direction` once and returns its results by name.

    For the gradients alone the forward pass is run here, once, and kept; they come through autograd, as in training.
    """
    layout = LAYOUTS[candidate.layout]
    needed = workload.gradients[direction]
    given = {
        name: tensors[name].contiguous(memory_format=layout).detach().requires_grad_(name in needed)
        for name in workload.inputs
    }
    wanted = [given[name] for name in needed]
    names = [f"grad_{name}" for name in needed]
    grad_y = tensors["grad_y"].contiguous(memory_format=layout)
    inputs = tuple(given.values())
    if direction == "forward":
        return lambda: {"y": candidate.function(*inputs)}
    if direction == "forward+backward":

        def both():
            y = candidate.function(*inputs)
            return {"y": y.detach(), **dict(zip(names, torch.autograd.grad(y, wanted, grad_y), strict=True))}

        return both
    y = candidate.function(*inputs)
    return lambda: dict(zip(names, torch.autograd.grad(y, wanted, grad_y, retain_graph=True), strict=True))


def check(results: dict[str, torch.Tensor], workload, direction: str, role: str) -> dict:
    """The gate: {"green", "error", "message"}; the error is the largest one, relative to the largest value.

    The error is None where a result has the wrong shape or is not finite.
    """
    errors, message = [], ""
    for name, wanted in workload.expected(direction).items():
        actual = results[name].detach()
        same_shape = actual.shape == wanted.value.shape
        difference = float((actual.double() - wanted.value).abs().max()) if same_shape else math.inf
        errors.append(difference / float(wanted.value.abs().max()))
        try:
            if role == "fastseg":
                assert_within(actual, wanted, name)
            elif not errors[-1] <= BASELINE_ERROR:
                raise AssertionError(f"{name}: the largest error is {errors[-1]:.3g} of the largest value")
        except AssertionError as failure:
            message = message or str(failure)
    finite = all(math.isfinite(error) for error in errors)
    return {"green": not message, "error": max(errors) if finite else None, "message": message}


def measure(
    workload,
    direction: str,
    ceilings: dict[str, float],
    seconds: float,
    candidates: Sequence[Candidate] | None = None,
    skip: Callable[[Candidate], str | None] = lambda candidate: None,
) -> dict:
    """The row of the record for one case and direction; timing takes about `seconds`.

    `skip` gives a reason to leave a candidate out, or None.
    """
    with timing.measuring_stream(workload.device):
        return _measure(workload, direction, ceilings, seconds, candidates, skip)


def _measure(workload, direction, ceilings, seconds, candidates, skip):
    cost = workload.cost(direction)
    bounds = {
        "memory": cost.bytes / ceilings["copy_bytes_per_s"],
        "compute": cost.flops / timing.matrix_ceiling(ceilings, workload.dtype),
    }
    bound = max(bounds, key=bounds.get)
    described = workload.describe()
    row = {
        "id": f"{described['case']}/{direction}/{described['dtype']}",
        **described,
        "direction": direction,
        "bytes": cost.bytes,
        "flops": cost.flops,
        "bound": {"name": bound, "seconds": bounds[bound]},
        "candidates": [],
    }
    sets = [workload.tensors(seed) for seed in range(timing.buffer_sets(cost.bytes, workload.device))]
    calls = {}
    for candidate in workload.candidates() if candidates is None else candidates:
        entry = {k: getattr(candidate, k) for k in ("name", "role", "layout", "backend", "reason")}
        row["candidates"].append(entry)
        entry["skipped"] = skip(candidate)
        if entry["skipped"]:
            continue
        start = time.perf_counter()
        try:
            prepared = [direction_call(candidate, workload, direction, tensors) for tensors in sets]
            results = prepared[0]()
            entry["prepare_seconds"] = time.perf_counter() - start
            entry["gate"] = check(results, workload, direction, candidate.role)
            if entry["gate"]["green"]:
                entry["peak_bytes"] = memory.peak_bytes(prepared[0], workload.device)
                entry["saved_bytes"] = _saved_bytes(candidate, workload, direction, sets[0])
                calls[candidate.name] = prepared
        except (RuntimeError, NotImplementedError) as error:
            message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            if candidate.role == "fastseg" and not isinstance(error, torch.OutOfMemoryError):
                entry["gate"] = {"green": False, "error": None, "message": message}
            else:
                entry["skipped"] = message
    row["baseline"] = None
    if calls:
        samplers, row["timed"] = timing.samplers_for(calls, workload.device)
        _add_speeds(row, timing.interleave(samplers, seconds))
    return row


def _saved_bytes(candidate, workload, direction, tensors) -> int | None:
    if not workload.gradients[direction]:
        return None
    return memory.saved_bytes(lambda: direction_call(candidate, workload, direction, tensors)())


def _add_speeds(row: dict, samples: dict[str, list[float]]) -> None:
    """Times, the ratio to the better native layout, rates and shares of the ceilings, of every green candidate."""
    natives = [c["name"] for c in row["candidates"] if c["role"] == "native" and c["name"] in samples]
    baseline = min(natives, key=lambda name: timing.spread(samples[name]).median, default=None)
    row["baseline"] = baseline
    for entry in row["candidates"]:
        taken = samples.get(entry["name"])
        if taken is None:
            continue
        seconds = timing.spread(taken)
        entry["seconds"] = seconds._asdict()
        entry["rounds"] = len(taken)
        if baseline is not None:
            entry["ratio"] = timing.ratio(samples[baseline], taken)._asdict()
        if entry["role"] == "fastseg":
            for name in natives:
                entry[f"ratio to {name}"] = timing.ratio(samples[name], taken)._asdict()
        entry["bytes_per_s"] = row["bytes"] / seconds.median
        entry["flop_per_s"] = row["flops"] / seconds.median
        entry["share_of_bound"] = row["bound"]["seconds"] / seconds.median


def overhead(device: str, seconds: float) -> list[dict]:
    """What a call costs before it computes anything: a depthwise convolution of one 5x5 image, seconds a call."""
    tiny = ConvCase("overhead", "", 8, (5, 5), batch_gpu=1)
    workload = ConvWorkload(tiny, torch.float32, device)
    tensors = workload.tensors(seed=0)
    candidates = [c for c in workload.candidates() if c.role != "compile" and c.layout == "channels_last"]
    samplers = {c.name: timing.cpu_sampler(direction_call(c, workload, "forward", tensors)) for c in candidates}
    samples = timing.interleave(samplers, seconds)
    native = samples["native channels_last"]
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
