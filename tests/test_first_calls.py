# ruff: noqa: F401, F811 -- imported fixtures, and arguments that have their names
"""First calls of new problems are measured as on a GPU, once, and never where somebody would notice; counters."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fastseg
from fastseg import dispatch, extension, measuring, winners
from tests.tuning import CHANNELS, PLAIN, clock, filters, forget, fresh, image, ran, whole

pytestmark = pytest.mark.skipif(extension.EXTENSION is None, reason="there are no kernels without the extension")


@pytest.fixture
def first_calls(monkeypatch, clock):
    """The CPU's first calls are measured as a GPU's are; the problems that were."""
    measured, measure = [], winners.measure

    def watched(problem, candidates, attempt):
        measured.append(problem)
        return measure(problem, candidates, attempt)

    monkeypatch.setattr(winners, "_measures_first_calls", lambda device_type: device_type == "cpu")
    monkeypatch.setattr(winners, "measure", watched)
    return measured


# A problem of training, and a call of it that may be measured.
TRAINING = PLAIN._replace(gradient=True), measuring.Attempt(lambda name: depthwise(), (image().requires_grad_(),))


def depthwise(x=None, weight=None):
    x, weight = image() if x is None else x, torch.ones(CHANNELS, 1, 3, 3) if weight is None else weight
    return fastseg.ops.depthwise_conv2d(x, weight, padding=1)


def test_the_first_call_of_a_problem_is_measured_once(first_calls, clock, forget):
    clock.let("native")
    for _ in range(2):
        depthwise()
        depthwise(image(10))
        depthwise(image().requires_grad_())
    assert [(p.geometry.input[2], p.gradient) for p in first_calls] == [(9, False), (10, False), (9, True)]
    assert fastseg.counters().native == {("depthwise_conv2d", "measured here"): 6}
    assert fastseg.counters().measured == 3
    assert fastseg.info().tuning["first calls"].startswith("3 measured in this process")
    forget()
    depthwise()
    assert len(first_calls) == 3


def test_first_calls_inside_a_block_are_counted_once(first_calls, whole, monkeypatch):
    seconds = iter(range(1000))
    monkeypatch.setattr(winners.time, "perf_counter", lambda: float(next(seconds)))
    fastseg.accelerate(whole.separable.eval())
    with torch.no_grad():
        whole.separable(image())
    assert [p.operator for p in first_calls] == ["separable_conv2d", "depthwise_conv2d", "dilated_conv2d"]
    assert fastseg.counters().seconds <= next(seconds)


def test_images_of_ever_new_sizes_are_measured_a_few_times(first_calls):
    for size in range(9, 9 + 2 * winners.MOST_SIZES):
        depthwise(image(size))
    assert len(first_calls) == winners.MOST_SIZES
    fastseg.ops.depthwise_conv2d(image(40), torch.ones(CHANNELS, 1, 5, 5))
    assert len(first_calls) == winners.MOST_SIZES + 1


def test_what_may_not_be_measured_now_is_measured_later(first_calls):
    with winners.unmeasured():
        depthwise()
    assert first_calls == []
    depthwise()
    assert len(first_calls) == 1


def resized(x):
    return fastseg.ops.upsample_bilinear2d(x, (20, 20))


def checkpointed():
    torch.utils.checkpoint.checkpoint(depthwise, image().requires_grad_(), use_reentrant=False).sum().backward()


def with_hook():
    x = image().requires_grad_()
    x.register_hook(lambda grad: pytest.fail("nobody asked for a gradient"))
    depthwise(x)


def with_kept_gradient():
    x = image().requires_grad_() * 1
    x.retain_grad()
    depthwise(x)
    assert x.grad is None


def forward_mode():
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        depthwise(forward_ad.make_dual(image(), image()))
        assert not measuring.can_be_repeated(*TRAINING)


def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        depthwise()
    finally:
        torch.use_deterministic_algorithms(False)


def cudnn_deterministic():
    with torch.backends.cudnn.flags(deterministic=True):
        depthwise()


def in_training():
    block = fastseg.nn.ASPP(CHANNELS, CHANNELS, (2, 4))
    block.dropout = 0.5
    convolutions = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winners, "consulted", lambda operator, device_type: operator == "aspp_branches")
        block(image(batch=2))
    assert all(c.weight.grad is None for c in convolutions)
    assert all(m.num_batches_tracked <= 1 for m in block.modules() if isinstance(m, nn.BatchNorm2d))


class Tagged(torch.Tensor):
    pass


class Model(nn.Module):
    def forward(self, x):
        return depthwise(x)


UNSEEN = {
    "compile": lambda: torch.compile(depthwise, backend="eager")(image()),
    "export": lambda: torch.export.export(Model(), (image(),)),
    "make_fx": lambda: make_fx(Model())(image()),
    "fake": lambda: make_fx(Model(), tracing_mode="fake")(image()),
    "jit-trace": lambda: torch.jit.trace(resized, image(), check_trace=False),
    "vmap": lambda: torch.func.vmap(depthwise)(image()[None]),
    "forward-mode": forward_mode,
    "flop-counter": lambda: _under(torch.utils.flop_counter.FlopCounterMode(display=False)),
    "checkpoint": checkpointed,
    "hook": with_hook,
    "kept-gradient": with_kept_gradient,
    "subclass": lambda: depthwise(image().as_subclass(Tagged)),
    "deterministic": deterministic,
    "cudnn-deterministic": cudnn_deterministic,
    "batch-norm-in-training": in_training,
    "explain": lambda: fastseg.explain(filters(), image()),
    "by-name": lambda: fastseg.ops.depthwise_conv2d(image(), torch.ones(CHANNELS, 1, 3, 3), backend="cpu"),
    "no-kernel": lambda: depthwise(image().to(torch.complex64), torch.ones(CHANNELS, 1, 3, 3, dtype=torch.complex64)),
}


def _under(mode):
    with mode:
        depthwise(image().requires_grad_())


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("call", UNSEEN.values(), ids=UNSEEN)
def test_no_first_call_is_measured_where_somebody_would_notice(call, first_calls):
    torch._dynamo.reset()
    call()
    assert first_calls == []


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["checkpoint", "hook", "kept-gradient", "fake", "jit-trace"])
def test_nor_is_it_in_the_midst_of_tune(name, clock):
    class Calls(nn.Module):
        def forward(self, x):
            UNSEEN[name]()
            return x

    assert fastseg.tune(Calls(), image(), training=True).winners == {}


def test_nothing_is_measured_while_a_graph_is_compiled(monkeypatch):
    assert winners.may_measure(*TRAINING)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not winners.may_measure(*TRAINING)


def test_nothing_is_measured_while_a_gpu_captures(monkeypatch):
    problem, attempt = PLAIN._replace(device_type="cuda"), measuring.Attempt(depthwise, (image(),))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert winners.may_measure(problem, attempt)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not winners.may_measure(problem, attempt)


def test_first_calls_are_measured_on_a_gpu_unless_told_not_to(monkeypatch):
    problem = PLAIN._replace(device_type="cuda")
    monkeypatch.delenv("FASTSEG_TUNE")
    assert winners.is_awaited(problem)
    assert not winners.is_awaited(PLAIN)
    monkeypatch.setenv("FASTSEG_TUNE", "0")
    assert not winners.is_awaited(problem)


# Counters


def test_counters_leave_out_what_was_asked_for_by_name_tuned_or_explained(clock):
    grouped = torch.ones(CHANNELS, 4, 3, 3)
    for backend in ("native", None):
        fastseg.ops.conv2d(image(), grouped, groups=2, backend=backend)
    fastseg.tune(filters(), image())
    fastseg.explain(nn.Conv2d(CHANNELS, CHANNELS, 3, groups=2), image())
    found = fastseg.counters(reset=True)
    assert list(found.native.values()) == [1]
    assert str(found).splitlines() == [
        "1 of grouped_conv2d on native: there are kernels for groups == 1 and groups == channels only",
        "0 first calls were measured, in 0.0 s",
    ]
    assert json.loads(found.to_json())["native"][0]["calls"] == 1
    assert fastseg.counters().native == {}
