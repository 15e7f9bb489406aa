# ruff: noqa: F401, F811 -- imported fixtures, and arguments that have their names
"""fastseg.tune: who wins, what is measured, and that the model is left as it was."""

from __future__ import annotations

import copy
import itertools
import json
import threading
import time

import pytest
import torch
from torch import nn

import fastseg
from fastseg import __main__ as command_line
from fastseg import dispatch, extension, measuring, winners
from fastseg.ops import convolution
from fastseg.ops.library import OVERLOADS
from fastseg.winners import Winner
from tests.networks import assert_as_accurate, lively, predict
from tests.tuning import CHANNELS, clock, filters, forget, fresh, image, ran, whole

pytestmark = [
    pytest.mark.skipif(extension.EXTENSION is None, reason="there are no kernels without the extension"),
    pytest.mark.filterwarnings("error::UserWarning"),
]


# Who wins


@pytest.mark.parametrize(
    ("native", "kernel", "winner"),
    [
        ([2.0] * 7, [1.0] * 7, "cpu"),
        ([1.0] * 7, [2.0] * 7, "native"),
        ([1.01] * 7, [1.0] * 7, "native"),
        ([2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.1], [1.0] * 7, "cpu"),
        ([2.0, 2.0, 2.0, 2.0, 0.9, 0.9, 0.9], [1.0] * 7, "native"),
    ],
    ids=["faster", "slower", "as-fast", "one-outlier", "not-in-doubt"],
)
def test_a_kernel_wins_beyond_doubt_or_not_at_all(native, kernel, winner):
    assert measuring.judged({"native": native, "cpu": kernel})[0] == winner


def test_of_several_kernels_the_fastest_wins():
    best, ms = measuring.judged({"native": [3.0] * 7, "cuda": [2.0] * 7, "triton": [1.0] * 7})
    assert best == "triton"
    winner = Winner(best, ms)
    assert (winner.margin, winner.reason) == (3, "measured here")
    assert Winner("native", ms | {"native": 0.5}).margin == 2
    assert Winner("native", {"native": 0.5}).margin is None


@pytest.mark.parametrize("best", ["native", "cpu"])
def test_what_won_is_what_runs(best, clock, ran):
    layer, x = filters(), image()
    clock.let(best)
    with torch.no_grad():
        tuned = fastseg.tune(layer, x)
        ran.clear()
        layer(x)
    assert [w.backend for w in tuned.winners.values()] == [best]
    assert ran["depthwise_conv2d"] == (best == "cpu")


def test_what_was_measured_before_is_measured_again(clock):
    layer, x = filters(), image()
    clock.let("cpu")
    fastseg.tune(layer, x)
    predict(layer, x)
    clock.let("native")
    (best,) = fastseg.tune(layer, x).winners.values()
    assert best.backend == "native"


def test_a_kernel_that_dawdles_loses_by_the_real_clock(monkeypatch):
    monkeypatch.setattr(measuring, "_SECONDS", 0.05)
    kernel = OVERLOADS["depthwise_conv2d"]["cpu"]

    def dawdling(*args):
        time.sleep(0.005)
        return kernel(*args)

    monkeypatch.setitem(OVERLOADS["depthwise_conv2d"], "cpu", dawdling)
    (best,) = fastseg.tune(filters(), image()).winners.values()
    assert best.backend == "native"
    assert best.ms["cpu"] > 5
    assert best.margin > 1


def test_a_native_operator_that_dawdles_loses_by_the_real_clock(monkeypatch):
    monkeypatch.setattr(measuring, "_SECONDS", 0.05)
    native = convolution.native_conv2d

    def dawdling(*args):
        time.sleep(0.005)
        return native(*args)

    monkeypatch.setattr(convolution, "native_conv2d", dawdling)
    (best,) = fastseg.tune(filters(), image()).winners.values()
    assert best.backend == "cpu"
    assert best.margin > 1


def test_every_operator_is_tuned(whole, clock):
    fastseg.accelerate(whole)
    assert operators(fastseg.tune(whole, image(channels=3, batch=2))) == {
        "dilated_conv2d", "depthwise_conv2d", "separable_conv2d", "aspp_branches", "separable_aspp_branches",
        "upsample_bilinear2d", "upsample_argmax",
    }  # fmt: skip
    criterion, target = fastseg.nn.UpsampleCrossEntropyLoss(), torch.zeros(1, 9, 9, dtype=torch.int64)
    logits = torch.randn(1, 3, 5, 5, requires_grad=True)
    assert operators(fastseg.tune(criterion, (logits, target), training=True)) == {"upsample_cross_entropy"}


def operators(tuned) -> set[str]:
    return {problem.partition(" ")[0] for problem in tuned.winners}


def test_chains_are_tuned_as_they_are_folded(whole, clock):
    fastseg.accelerate(whole)
    found = fastseg.tune(whole.stem, image(channels=3)).winners
    assert [problem.split()[-1] for problem in found] == ["epilogue=norm+relu"]
    found = fastseg.tune(whole.stem, image(channels=3), training=True).winners
    assert [(problem.split()[2], problem.split()[-1]) for problem in found] == [("training", "epilogue=none")]


def test_inside_a_block_is_tuned_before_the_block(whole, clock):
    fastseg.accelerate(whole)
    *inside, block = fastseg.tune(whole.separable, image()).winners
    assert {problem.partition(" ")[0] for problem in inside} == {"depthwise_conv2d", "dilated_conv2d"}
    assert block.startswith("separable_conv2d")


def test_a_block_inside_the_same_block_is_native_while_that_is_timed(monkeypatch, clock, ran):
    """Both ask the same question; timing the kernel against itself would leave it to chance."""

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            depthwise = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)
            self.layers = nn.Sequential(
                depthwise, nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 1),
                nn.BatchNorm2d(CHANNELS), nn.ReLU(),
            )  # fmt: skip

        def forward(self, x):
            return self.layers(x)

    model = fastseg.accelerate(lively(Wrapped()).eval())
    assert [type(m).__mro__[1].__name__ for m in (model, model.layers)] == ["FusedModule", "FoldedSequential"]
    timed, by_native = measuring._timed_ms, []

    def watched(call, repeats, device_type):
        before = ran["separable_conv2d"]
        call()
        if call.backend == "native":
            by_native.append(ran["separable_conv2d"] - before)
        return timed(call, repeats, device_type)

    monkeypatch.setattr(measuring, "_timed_ms", watched)
    found = fastseg.tune(model, image()).winners
    assert sum(problem.startswith("separable_conv2d") for problem in found) == 1
    assert by_native
    assert not any(by_native)


def test_small_separable_training_stays_native_beside_winners_of_others(ran):
    winners.table("cpu").add({"separable_conv2d of some other size": Winner("cpu", {"native": 2.0, "cpu": 1.0})})
    layer = fastseg.nn.SeparableConv2d(CHANNELS, CHANNELS, 3, padding=1)
    layer(image()).sum().backward()
    assert ran["separable_conv2d"] == 0


def test_native_that_lacks_memory_loses_this_once(monkeypatch, clock, forget):
    def lacking(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(convolution, "native_conv2d", lacking)
    (best,) = fastseg.tune(filters(), image()).winners.values()
    assert (best.backend, best.margin) == ("cpu", None)
    forget()
    assert winners.table("cpu").own == {}


def test_a_kernel_that_fails_loses_aloud(monkeypatch, clock):
    class CompilerError(Exception):
        pass

    def failing(*args):
        raise CompilerError("no such instruction\nand much more")

    monkeypatch.setitem(OVERLOADS["depthwise_conv2d"], "cpu", failing)
    with pytest.warns(UserWarning, match="cpu failed") as told:
        best = [
            *fastseg.tune(filters(), image(9)).winners.values(),
            *fastseg.tune(filters(), image(10)).winners.values(),
        ]
    assert [w.backend for w in best] == ["native", "native"]
    (warning,) = told
    assert str(warning.message) == (
        "fastseg: cpu failed in depthwise_conv2d, so another backend runs it: no such instruction"
    )


def test_a_mistake_in_a_call_is_told_as_without_tuning(clock):
    with pytest.raises(RuntimeError, match="to have 8 channels, but got 4"):
        fastseg.tune(filters(), image(channels=4))


def test_a_busy_machine_is_told(clock, monkeypatch):
    """A kernel twice as fast in most rounds, and slower in too many."""
    times = {"native": itertools.cycle([1.0]), "cpu": itertools.cycle([0.5, 0.5, 4.0])}
    monkeypatch.setattr(measuring, "_timed_ms", lambda call, *_: next(times[call.backend]))
    tuned = fastseg.tune(filters(), image())
    assert [(best.backend, best.in_doubt) for best in tuned.winners.values()] == [("native", True)]
    assert str(tuned).splitlines()[-1].startswith("1 on native though a kernel was faster, not reliably")


# Nobody notices


def chains_of(model):
    settings = [vars(module).get("_fastseg") for module in model.modules()]
    return [found.chain for found in settings if found is not None and found.chain is not None]


def state_of(model):
    return {
        "values": {key: value.clone() for key, value in model.state_dict().items()},
        "memory": [(p.data_ptr(), p.stride(), p._version) for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "hooks": [[dict(m._forward_hooks), dict(m._forward_pre_hooks)] for m in model.modules()],
        "attributes": [list(vars(m)) for m in model.modules()],
        "folding": [
            m._fastseg.chain.enabled for m in model.modules() if m.__dict__.get("_fastseg") and m._fastseg.chain
        ],
        "random": torch.get_rng_state(),
        "counted": dispatch.native_calls.copy(),
        "grad_mode": torch.is_grad_enabled(),
    }


def assert_same_state(model, before) -> None:
    after = state_of(model)
    for ours, theirs in zip(after.pop("values").values(), before["values"].values(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(after.pop("random"), before["random"])
    for ours, theirs in zip(after.pop("grads"), before["grads"], strict=True):
        assert ours is theirs
    for name, value in after.items():
        assert value == before[name], name


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_the_model_is_left_as_it_was(whole, clock, training):
    clock.let("native")
    fastseg.accelerate(whole).train()
    whole.aspp.eval()
    whole.aspp.project[-1].p = 0.5
    whole.stem[0].weight.grad = torch.ones_like(whole.stem[0].weight)
    before = state_of(whole)
    assert len(fastseg.tune(whole, image(channels=3, batch=2), training=training).winners) > 5
    assert any(before["folding"])
    assert_same_state(whole, before)


def test_the_model_is_left_as_it_was_when_it_fails_and_what_was_measured_stays(whole, clock, forget):
    fastseg.accelerate(whole).train()
    handle = whole.up.register_forward_hook(lambda *_: 1 / 0)
    before = state_of(whole)
    with pytest.raises(ZeroDivisionError):
        fastseg.tune(whole, image(channels=3, batch=2), training=True)
    assert_same_state(whole, before)
    handle.remove()
    forget()
    assert len(winners.table("cpu").own) > 5
    fastseg.tune(whole, image(channels=3, batch=2))  # nothing stands in the way of the next


@pytest.mark.parametrize("best", ["native", "cpu"])
def test_results_stay_as_accurate_whoever_wins(whole, clock, best):
    whole.eval()
    x = image(channels=3, batch=2).contiguous(memory_format=torch.channels_last)
    native, exact = (
        predict(copy.deepcopy(whole).to(memory_format=torch.channels_last), x),
        predict(copy.deepcopy(whole).double(), x.double()),
    )
    clock.let(best)
    fastseg.accelerate(whole)
    fastseg.tune(whole, x)
    assert_as_accurate(predict(whole, x), native, exact, "out")


def test_tuning_inside_of_tuning_is_refused(clock):
    layer = filters()
    layer.register_forward_hook(lambda *_: fastseg.tune(filters(), image()))
    with pytest.raises(RuntimeError, match=r"fastseg\.tune is running already"):
        fastseg.tune(layer, image())


def test_other_threads_are_not_measured(clock):
    layer, found = filters(), []

    def elsewhere(*_):
        thread = threading.Thread(target=lambda: found.append(filters()(image(11))))
        thread.start()
        thread.join()

    layer.register_forward_hook(elsewhere)
    assert len(fastseg.tune(layer, image()).winners) == 1
    assert len(found) == 1


def test_a_surrounding_backend_does_not_keep_auto_from_being_tuned(clock):
    with fastseg.backend("native"):
        assert len(fastseg.tune(filters(), image()).winners) == 1
    assert fastseg.tune(filters(backend="native"), image()).winners == {}


def test_what_there_are_no_kernels_for(clock):
    tuned = fastseg.tune(filters(device="meta"), image().to("meta"))
    assert (tuned.device, tuned.path, tuned.winners) == ("meta", "", {})
    assert str(tuned).endswith("nothing to measure on meta: no fastseg operator was called that has a kernel there")
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, but got int"):
        fastseg.tune(3, image())


@pytest.mark.parametrize("example", [image(), (image(),), {"input": image()}], ids=["tensor", "tuple", "dict"])
def test_examples(example, clock):
    assert len(fastseg.tune(filters(), example).winners) == 1


def test_the_table_and_its_json(clock):
    reported = []
    tuned = fastseg.tune(filters(), image(), report=lambda problem, best: reported.append((problem, best)))
    assert reported == [*tuned.winners.items()]
    head, row, last = str(tuned).splitlines()
    assert row.split()[:4] == ["cpu", "1.000", "0.500", "2.00x"]
    assert len(head) - len("call") == row.index("depthwise_conv2d")
    assert last == f"1 call, 1 won by fastseg's kernels, on {tuned.device}; kept in {tuned.path}"
    (entry,) = json.loads(tuned.to_json())["winners"].values()
    assert entry == {"backend": "cpu", "ms": {"native": 1.0, "cpu": 0.5}, "margin": 2.0}


# The command line


def test_command(clock, capsys):
    assert command_line.main(["tune", "deeplab_v3plus:mobilenet_v2", "--size", "33"]) == 0
    head, *rows, last = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "winner"
    assert all("inference" in row for row in rows)
    assert last.startswith(f"{len(rows)} calls, {len(rows)} won by fastseg's kernels")


def test_command_in_training_as_json(clock, capsys):
    assert (
        command_line.main(
            ["tune", "deeplab_v3plus:mobilenet_v2", "--size", "33", "--batch", "2", "--training", "--json"]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert all(" training input=(2," in problem for problem in found["winners"])


def test_command_says_what_does_not_run(clock, capsys):
    assert command_line.main(["tune", "deeplab_v3plus:mobilenet_v2", "--size", "64", "--training"]) == 2
    assert "does not run on an input of [1, 3, 64, 64]" in capsys.readouterr().err
