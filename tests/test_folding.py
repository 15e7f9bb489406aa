# ruff: noqa: F401, F811 -- imported fixtures, and arguments that have their names
"""Batch norm and activation inside the convolution: right for this very call, or not done."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import fastseg
from fastseg.nn import folding
from fastseg.testing import STEEPEST_ACTIVATION, assert_within, expected
from tests.networks import (
    Block,
    alone,
    assert_as_accurate,
    assert_like_native,
    block,
    channels_last,
    fold_everything,
    folds,
    image,
    lively,
    one_thread,
    predict,
)


def expected_chain(conv, norm, activation, x):
    """Value and element-wise bound of a convolution, norm and activation, all in float64."""
    with torch.no_grad():
        value = activation(norm(conv(x)))
        scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).abs()
        shift = norm.bias.abs() + norm.running_mean.abs() * scale
        for parameter in conv.parameters():
            parameter.abs_()
        absolute = conv(x.abs()) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    # Each product may carry the roundings of scale (variance + eps, root, weight) and of the scaled weight.
    terms = conv.weight[0].numel() + 6
    return expected(value, STEEPEST_ACTIVATION * absolute + 4 * value.abs(), terms, torch.float32)


def fail(module, args):
    raise ZeroDivisionError


def flat(values):
    """Copies of the tensors in a hook's arguments."""
    return [t.clone() for value in values for t in (value if isinstance(value, tuple) else (value,))]


class InOrder(nn.ModuleList):
    """A Sequential with a forward of its own."""

    def __init__(self, *layers):
        super().__init__(layers)

    def forward(self, x):
        for module in self:
            x = module(x)
        return x


class TwoWays(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.stop = False

    def forward(self, x):
        x = self.conv(x)
        return x if self.stop else self.bn(x)


class Crossed(nn.Module):
    """Two norms that change places."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.crossed = False

    def forward(self, x):
        first, second = (self.bn2, self.bn1) if self.crossed else (self.bn1, self.bn2)
        return second(self.conv2(first(self.conv1(x))))


class OptionalSkip(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x, skip=None):
        x = self.conv(x)
        y = self.bn(x)
        return y + (x if skip is None else skip)


def test_weights_are_read_in_each_call(block, folds):
    """As an EMA writes them: through .data, which no version counter sees."""
    fastseg.accelerate(block)
    predict(block, image())
    for tensor in (*block.parameters(), block.bn1.running_mean, block.bn2.running_var):
        tensor.data.mul_(0.9)
    assert_like_native(block, "after an EMA")
    assert len(folds) == 6


def test_load_state_dict_is_seen(block):
    other = lively(Block()).eval()
    y = predict(fastseg.accelerate(copy.deepcopy(other)), image())
    fastseg.accelerate(block)
    predict(block, image())
    block.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(predict(block, image()), y)


def test_functional_call_is_seen(block):
    other = lively(Block()).eval()
    y = predict(fastseg.accelerate(copy.deepcopy(other)), image())
    fastseg.accelerate(block)
    with torch.no_grad():
        assert torch.equal(torch.func.functional_call(block, other.state_dict(), (image(),)), y)


def test_inference_mode(block, folds):
    y = predict(fastseg.accelerate(block), image())
    with torch.inference_mode():
        assert torch.equal(block(image()), y)
    assert len(folds) == 6


def test_model_made_in_inference_mode():
    with torch.inference_mode():
        model = lively(Block()).eval()
        y = model(image())
        strides = model.conv1.weight.stride()
        z = fastseg.accelerate(model)(image())
    exact = predict(copy.deepcopy(model).double(), image().double())
    assert_as_accurate(z, y, exact, "inference tensors as parameters")
    assert fastseg.restore(model).conv1.weight.stride() == strides


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(block, folds, dtype):
    block.to(dtype)
    assert_like_native(fastseg.accelerate(block), str(dtype), image().to(dtype))
    assert len(folds) == 3


def test_autocast(block, folds):
    exact = predict(copy.deepcopy(block).double(), image().double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        native = predict(channels_last(copy.deepcopy(block)), channels_last(image()))
        actual = predict(fastseg.accelerate(block), image())
    assert actual.dtype == native.dtype
    assert_as_accurate(actual, native, exact, "autocast")
    assert len(folds) == 3


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 8, (4, 2), padding="same"),
        nn.Conv2d(8, 8, 3, stride=(2, 1), padding=2, dilation=(1, 3), groups=8),
        nn.Conv2d(8, 16, 3, groups=8),
        nn.Conv2d(8, 64, 3, padding=1),
    ],
    ids=lambda layer: layer.extra_repr(),
)
@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.SiLU])
@pytest.mark.parametrize("size", [3, 24], ids=["output", "weight"])
@pytest.mark.parametrize("form", [nn.Sequential, InOrder])
def test_every_layer_and_activation(folds, layer, activation, size, form):
    torch.manual_seed(0)
    model = lively(form(copy.deepcopy(layer), nn.BatchNorm2d(layer.out_channels), activation())).eval()
    x = torch.randn(1, 8, size + 4, size + 4)
    wanted = expected_chain(*copy.deepcopy(model).double(), x.double())
    assert_within(predict(fastseg.accelerate(model), x), wanted, "conv, norm, activation")
    assert len(folds) == 1


@pytest.mark.parametrize("affine", [False, True])
def test_norm_without_weight(folds, affine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=affine, eps=1e-3)).eval()
    model[1].running_mean.normal_()
    assert_like_native(fastseg.accelerate(model), "norm without weight")
    assert len(folds) == 1


def test_empty_batch(block):
    fastseg.accelerate(block)
    assert predict(block, torch.empty(0, 3, 16, 16)).shape == (0, 8, 16, 16)


def test_timm_norm_with_activation(folds):
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    known = layers.BatchNormAct2d(8, act_layer=nn.SiLU, inplace=False)
    unknown = layers.BatchNormAct2d(8, act_layer=nn.GELU, act_kwargs={}, inplace=False)
    model = lively(nn.Sequential(nn.Conv2d(3, 8, 3), known, nn.Conv2d(8, 8, 3), unknown)).eval()
    fastseg.accelerate(model)
    assert isinstance(model[1], layers.BatchNormAct2d)
    assert type(model[3]) is layers.BatchNormAct2d
    assert_like_native(pickle.loads(pickle.dumps(model)), "BatchNormAct2d")
    assert folds == ["silu"]
    handle = model[1].act.register_forward_hook(lambda *_: None)
    predict(model, image())
    handle.remove()
    assert folds == ["silu"]
    assert type(fastseg.restore(model)[1]) is layers.BatchNormAct2d


def test_training_and_gradients_do_not_fold(block, folds):
    fastseg.accelerate(block)
    block(image())  # gradients are recorded
    block.train()
    predict(block, image())
    block.eval().bn1.train()
    predict(block, image())
    assert len(folds) == 2  # the other norms of the last call
    block.eval().training = True  # its members are frozen, but its forward may branch on the flag
    predict(block, image())
    assert len(folds) == 2


def test_frozen_model_folds_with_gradients_on(block, folds):
    fastseg.accelerate(block).requires_grad_(False)
    block(image())
    assert len(folds) == 3
    block(image().requires_grad_()).sum().backward()  # conv1 is in front of a gradient, and so are the others
    assert len(folds) == 3


def test_a_layer_called_by_itself_is_a_convolution(block):
    y = alone(block.conv1)
    fastseg.accelerate(block)
    predict(block, image())
    assert torch.equal(predict(block.conv1, image()), y)
    assert (predict(block.bn1, y) < 0).any()  # a norm by itself has no activation either
    assert torch.equal(predict(block.relu, y), y.relu())


@pytest.mark.parametrize("name", ["conv1", "bn1", "relu"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_see_what_they_always_did(block, name, register):
    def seen_by_hook(model, x):
        seen = []
        hooked = getattr(model.get_submodule(name), register)
        handle = hooked(lambda module, *values: seen.extend(flat(values)))
        predict(model, x)
        handle.remove()
        return seen

    native = seen_by_hook(channels_last(copy.deepcopy(block)), channels_last(image()))
    exact = seen_by_hook(copy.deepcopy(block).double(), image().double())
    actual = seen_by_hook(fastseg.accelerate(block), image())
    for ours, theirs, reference in zip(actual, native, exact, strict=True):
        assert_as_accurate(ours, theirs, reference, f"{register} of {name}")


def test_hook_on_a_container_inside_the_chain(folds):
    """The container's output is the convolution's, before the norm."""
    torch.manual_seed(0)
    model = lively(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.ReLU())).eval()
    fastseg.accelerate(model)
    predict(model, image())
    assert len(folds) == 1
    seen = []
    handle = model[0].register_forward_hook(lambda module, args, y: seen.append(y))
    predict(model, image())
    assert torch.equal(seen[0], predict(model[0], image()))
    handle.remove()
    predict(model, image())
    assert len(folds) == 2


def test_global_hook(block, folds):
    fastseg.accelerate(block)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: None)
    try:
        predict(block, image())
    finally:
        handle.remove()
    assert folds == []


def test_replaced_norm(block, folds):
    fastseg.accelerate(block)
    block.bn1 = lively(nn.BatchNorm2d(8)).eval()
    assert_like_native(block, "replaced norm")
    assert len(folds) == 2


def test_sync_batch_norm_conversion(block, folds):
    fastseg.accelerate(block)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(block)
    assert isinstance(converted.bn1, nn.SyncBatchNorm)
    assert_like_native(converted, "SyncBatchNorm")
    assert folds == []


def test_forward_that_goes_another_way():
    """Tracing saw one way, the call takes another: it is repeated without folding."""
    torch.manual_seed(0)
    model = lively(TwoWays()).eval()
    y = predict(channels_last(copy.deepcopy(model)), channels_last(image()))
    fastseg.accelerate(model)
    predict(model, image())
    model.stop = True
    with pytest.warns(UserWarning, match="repeated without folding"):
        stopped = predict(model, image())
    assert torch.equal(stopped, alone(model.conv))
    model.stop = False
    assert torch.equal(predict(model, image()), y)


def test_a_norm_takes_no_mark_of_another():
    torch.manual_seed(0)
    model = fastseg.accelerate(lively(Crossed()).eval())
    model.crossed = True
    with pytest.warns(UserWarning, match="repeated without folding"):
        y = predict(model, image())
    assert torch.equal(y, predict(channels_last(fastseg.restore(model)), channels_last(image())))


def test_second_user_behind_a_default_argument(folds):
    """`is None` is false for a symbolic value, so the default is traced as well."""
    torch.manual_seed(0)
    model = lively(OptionalSkip()).eval()
    assert_like_native(fastseg.accelerate(model), "optional argument")
    assert folds == []


def test_convolution_shared_by_two_norms(folds):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = lively(nn.Sequential(conv, nn.BatchNorm2d(3), conv, nn.BatchNorm2d(3), nn.ReLU())).eval()
    assert_like_native(fastseg.accelerate(model), "shared convolution")
    assert folds == []


def test_block_used_twice(folds):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Hardswish())
    model = lively(nn.Sequential(inner, inner)).eval()
    assert_like_native(fastseg.accelerate(model), "shared block")
    assert len(folds) == 2


class Stage(nn.Sequential):
    """A user's own class of Sequential."""


@pytest.fixture
def stage():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Identity(), nn.BatchNorm2d(4)
    return lively(Stage(*layers)).eval()


def test_sequential_keeps_its_class(stage, folds):
    fastseg.accelerate(stage)
    for model in (stage, copy.deepcopy(stage), pickle.loads(pickle.dumps(stage))):
        assert isinstance(model, Stage)
        assert type(model).__name__ == "Stage"
        assert_like_native(model, "a subclass of Sequential")
        assert type(fastseg.restore(model)) is Stage
    assert len(folds) == 2 * 3


@pytest.mark.parametrize("index", [0, 1, 2])
def test_hook_inside_a_sequential_sees_what_it_always_saw(stage, folds, index):
    wanted, seen = [], []
    handle = stage[index].register_forward_hook(lambda module, args, y: wanted.append(y.clone()))
    predict(stage, image())
    handle.remove()
    fastseg.accelerate(stage)
    stage[index].register_forward_hook(lambda module, args, y: seen.append(y.clone()))
    predict(stage, image())
    torch.testing.assert_close(seen, wanted)
    assert len(folds) == 1  # the other chain


def test_children_of_a_sequential_change(stage, folds):
    fastseg.accelerate(stage)
    stage[2] = nn.Tanh()
    assert_like_native(stage, "a child replaced")
    stage.append(nn.ReLU())
    assert_like_native(stage, "a child more")
    assert "relu" not in folds


def test_norm_of_a_sequential_trains_alone(stage, folds):
    fastseg.accelerate(stage)
    stage[1].train()
    with torch.no_grad():
        stage(image())
    assert folds == ["none"]
    assert fastseg.restore(stage)[1].num_batches_tracked == 1


def test_part_of_a_sequential_restored(stage, folds):
    fastseg.accelerate(stage)
    fastseg.restore(stage[0])
    assert_like_native(stage, "a convolution restored")
    assert folds == ["none"]


def test_input_of_another_dtype_is_pytorchs_mistake():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)).eval()
    x = torch.randn(1, 8, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        with pytest.raises(RuntimeError) as wanted:
            model(x)
        with pytest.raises(RuntimeError) as actual:
            fastseg.accelerate(model)(x)
    assert str(actual.value) == str(wanted.value)


def test_exception_leaves_nothing_armed(block):
    y = alone(block.conv1)
    fastseg.accelerate(block)
    with pytest.raises(RuntimeError):
        predict(block, torch.randn(1, 4, 8, 8))
    handle = block.bn2.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        predict(block, image())
    handle.remove()
    assert torch.equal(predict(block.conv1, image()), y)


def test_other_threads_are_not_armed(block):
    y = alone(block.conv1)
    fastseg.accelerate(block)
    inside, leave = threading.Event(), threading.Event()

    def wait(module, args):
        inside.set()
        leave.wait(10)

    block.grouped.register_forward_pre_hook(wait)
    thread = threading.Thread(target=predict, args=(block, image()))
    thread.start()
    assert inside.wait(10)
    try:
        assert torch.equal(predict(block.conv1, image()), y)
    finally:
        leave.set()
        thread.join()


def test_function_transforms(block, folds):
    fastseg.accelerate(block)
    states = [lively(Block()).state_dict() for _ in range(2)]
    stacked = {key: torch.stack([state[key] for state in states]) for key in states[0]}
    with torch.no_grad():
        y = torch.vmap(lambda state, x: torch.func.functional_call(block, state, (x,)), (0, None))(stacked, image())
    assert y.shape == (2, 2, 8, 64, 64)
    torch.func.jvp(block.requires_grad_(False), (image(),), (image(seed=2),))
    assert folds == []


def test_small_outputs_do_not_fold(block, folds, monkeypatch):
    """There, scale and shift cost more than the passes they save."""
    monkeypatch.setattr(folding, "FEWEST_OUTPUTS", {"cpu": 2 * 8 * 32 * 32})
    fastseg.accelerate(block)
    predict(block, image(size=31))
    assert folds == []
    predict(block, image(size=32))
    assert len(folds) == 3
