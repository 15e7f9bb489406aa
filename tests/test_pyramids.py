"""ASPP, SeparableASPP and SeparableConv2d as modules, and fastseg.accelerate on those that other libraries have."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fastseg
from fastseg.nn.fused_module import FusedModule
from fastseg.nn.sequential import SeparableStep
from fastseg.pyramids import find_pyramids
from fastseg.testing import assert_alike, assert_no_less_accurate

SIZE = (9, 11)
CHANNELS, WIDTH, RATES = 16, 24, (2, 4, 6)


def torchvision_aspp():
    from torchvision.models.segmentation.deeplabv3 import ASPP

    return ASPP(CHANNELS, list(RATES), WIDTH)


def smp_aspp(separable=False):
    from segmentation_models_pytorch.decoders.deeplabv3.decoder import ASPP

    return ASPP(CHANNELS, WIDTH, list(RATES), separable=separable, dropout=0.5)


def smp_separable_aspp():
    return smp_aspp(separable=True)


class SummedHead(nn.Module):
    """DeepLab v2's."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(CHANNELS, 5, 3, padding=rate, dilation=rate) for rate in RATES)

    def forward(self, x):
        return sum(branch(x) for branch in self.branches)


class PooledFirst(nn.Module):
    """The order of TensorFlow and mmsegmentation, with functional activations and a resize by size."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(CHANNELS, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH)
        )
        self.one = nn.Sequential(nn.Conv2d(CHANNELS, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH))
        self.two = nn.Sequential(
            nn.Conv2d(CHANNELS, WIDTH, 3, padding=3, dilation=3, bias=False), nn.BatchNorm2d(WIDTH)
        )
        self.three = nn.Sequential(
            nn.Conv2d(CHANNELS, WIDTH, 3, padding=5, dilation=5, bias=False), nn.BatchNorm2d(WIDTH)
        )
        self.bottleneck = nn.Sequential(nn.Conv2d(4 * WIDTH, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU())

    def forward(self, x):
        image = nn.functional.relu(self.image(x))
        image = nn.functional.interpolate(image, x.shape[2:], mode="bilinear", align_corners=True)
        branches = [nn.functional.relu(branch(x)) for branch in (self.one, self.two, self.three)]
        return self.bottleneck(torch.cat([image, *branches], dim=1))


THEIRS = {
    "torchvision": torchvision_aspp,
    "smp": smp_aspp,
    "smp-separable": smp_separable_aspp,
    "summed": SummedHead,
    "pooled-first": PooledFirst,
}
OURS = {
    "torchvision": lambda: fastseg.nn.ASPP(CHANNELS, WIDTH, RATES),
    "smp": lambda: fastseg.nn.ASPP(CHANNELS, WIDTH, RATES),
    "smp-separable": lambda: fastseg.nn.SeparableASPP(CHANNELS, WIDTH, RATES),
}


def lively(module):
    """Norms whose statistics and factors are not ones and zeros; no dropout, whose draws would differ."""
    torch.manual_seed(0)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.running_mean.normal_()
            child.running_var.uniform_(0.5, 2)
            child.weight.data.normal_()
            child.bias.data.normal_()
        if isinstance(child, nn.Dropout):
            child.p = 0.0
    return module


def image(batch=3, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, CHANNELS, *SIZE), generator=generator, dtype=torch.float64).to(dtype)


def gradients_of(module, x, grad):
    x = x.detach().requires_grad_()
    y = module(x)
    grads = torch.autograd.grad(y, (x, *module.parameters()), grad.to(y.dtype))
    return (y.detach(), *grads)


def assert_trains_as_accurately(ours, native, exact, layout=torch.contiguous_format):
    """Output and all gradients beside native's, in the worse of its layouts: ATen's own sums differ between them.

    Over a few draws: of one alone, native's error may be small by luck.
    """
    last = copy.deepcopy(native).to(memory_format=torch.channels_last)
    draws = []
    for seed in range(6):
        x = image(seed=seed)
        grad = torch.randn(native(x).shape, generator=torch.Generator().manual_seed(10 + seed))
        native.load_state_dict(ours.state_dict())
        x_last = x.contiguous(memory_format=torch.channels_last)
        runs = (ours, x.contiguous(memory_format=layout)), (native, x), (last, x_last), (exact, x.double())
        draws.append([gradients_of(module, value, grad) for module, value in runs])
    for index, results in enumerate(zip(*(zip(*draw, strict=True) for draw in draws), strict=True)):
        own, *natives, value = (torch.stack(kind) for kind in zip(*results, strict=True))
        worse = max(natives, key=lambda other: float((other.double() - value).abs().max()))
        assert_no_less_accurate(own, worse, value, 3, f"result {index}")


@pytest.fixture(params=THEIRS)
def theirs(request):
    return lively(THEIRS[request.param]())


@pytest.fixture
def fused(monkeypatch):
    """A list that gets one entry for each pyramid that ran as a whole."""
    from fastseg.nn import aspp, pyramid

    entries = []

    def counted(*args):
        y = run_pyramid(*args)
        if y is not None:
            entries.append(args[0].reduction)
        return y

    run_pyramid = pyramid.run_pyramid
    for module in (pyramid, aspp):
        monkeypatch.setattr(module, "run_pyramid", counted)
    return entries


class TestModules:
    @pytest.mark.parametrize("name", OURS)
    def test_loads_their_weights_and_gives_their_result(self, name, fused):
        theirs, ours = lively(THEIRS[name]()).eval(), OURS[name]().eval()
        ours.load_state_dict(theirs.state_dict(), strict=True)
        x = image()
        with torch.no_grad():
            exact = copy.deepcopy(theirs).double()(x.double())
            assert_no_less_accurate(ours(x), theirs(x), exact, 2, name)
        assert fused == ["concat"]

    @pytest.mark.parametrize("name", OURS)
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_trains_like_theirs(self, name, layout, fused):
        theirs, ours = lively(THEIRS[name]()), lively(OURS[name]())
        ours.load_state_dict(theirs.state_dict())
        exact = copy.deepcopy(theirs).double()
        assert_trains_as_accurately(ours, theirs, exact, layout)
        for own, native, value in zip(ours.buffers(), theirs.buffers(), exact.buffers(), strict=True):
            if own.is_floating_point():
                assert_no_less_accurate(own, native, value, 3, "running statistics")
            else:
                assert torch.equal(own, native)
        assert fused == ["concat"] * 6

    @pytest.mark.parametrize("pooling", ["first", "last", None])
    @pytest.mark.parametrize("norm", ["batch", None])
    @pytest.mark.parametrize("kind", ["dense", "separable", "separable-mid-norm"])
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    def test_every_option_equals_its_parts(self, pooling, norm, kind, training):
        options = dict(pooling=pooling, norm=norm, activation="hardswish", dropout=0.0)
        if kind == "dense":
            ours = fastseg.nn.ASPP(CHANNELS, WIDTH, RATES, **options)
        else:
            middle = "batch" if kind.endswith("norm") else None
            ours = fastseg.nn.SeparableASPP(CHANNELS, WIDTH, RATES, depthwise_norm=middle, **options)
        ours = lively(ours).double().train(training)
        parts = copy.deepcopy(ours)
        x = image(dtype=torch.float64)
        with torch.set_grad_enabled(training):
            assert_alike(ours(x), parts.module_by_module(x))
        for own, wanted in zip(ours.buffers(), parts.buffers(), strict=True):
            assert_alike(own, wanted)

    def test_summed_form(self):
        ours = fastseg.nn.ASPP(
            CHANNELS, 5, RATES, pointwise=False, pooling=None, norm=None, activation="none", reduction="sum"
        ).double()
        x = image(dtype=torch.float64)
        assert_alike(ours(x), ours.module_by_module(x))

    def test_batch_of_one_in_training(self):
        x = image(batch=1)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            fastseg.nn.ASPP(CHANNELS, WIDTH, RATES)(x)
        safe = lively(fastseg.nn.ASPP(CHANNELS, WIDTH, RATES, single_image="running_stats"))
        before = safe.convs[-1][2].running_mean.clone()
        safe(x).sum().backward()
        assert torch.equal(safe.convs[-1][2].running_mean, before)
        assert all(p.grad is not None for p in safe.parameters())

    def test_frozen_norms_among_others(self):
        ours = lively(fastseg.nn.ASPP(CHANNELS, WIDTH, RATES, dropout=0.0)).double()
        for norm in (ours.convs[0][1], ours.project[1]):
            norm.eval()
        parts = copy.deepcopy(ours)
        x = image(dtype=torch.float64)
        assert_alike(ours(x), parts.module_by_module(x))

    def test_cumulative_momentum_and_no_statistics(self):
        for options in (dict(momentum=None), dict(track_running_stats=False), dict(affine=False)):
            ours = fastseg.nn.ASPP(CHANNELS, WIDTH, RATES, dropout=0.0).double()
            for conv in (*ours.convs, ours.project):
                index = 2 if isinstance(conv[0], nn.AdaptiveAvgPool2d) else 1
                conv[index] = nn.BatchNorm2d(WIDTH, dtype=torch.float64, **options)
            parts = copy.deepcopy(ours)
            for seed in (1, 2):
                x = image(dtype=torch.float64, seed=seed)
                assert_alike(ours(x), parts.module_by_module(x))
            for own, wanted in zip(ours.buffers(), parts.buffers(), strict=True):
                assert_alike(own, wanted)

    def test_separable_conv2d(self):
        x = image(dtype=torch.float64)
        for options in (
            dict(),
            dict(stride=2, multiplier=2, depthwise_activation="relu"),
            dict(depthwise_norm="batch", depthwise_activation="relu6", bias=False),
            dict(depthwise_bias=True, depthwise_activation="silu"),
        ):
            layer = fastseg.nn.SeparableConv2d(CHANNELS, 10, 3, padding=2, dilation=2, **options).double()
            layer = lively(layer).eval()
            with torch.no_grad():
                wanted = nn.Sequential.forward(layer, x)
                assert_alike(layer(x), wanted)
            layer.train()
            copied = copy.deepcopy(layer)
            assert_alike(layer(x), nn.Sequential.forward(copied, x))

    @pytest.mark.parametrize("make", OURS.values(), ids=OURS)
    def test_torch_compile(self, make):
        ours = lively(make()).eval()
        x = image()
        with torch.no_grad():
            compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)(x)
            assert_alike(compiled, ours(x))

    def test_bad_options_are_refused(self):
        for options in (dict(pooling="middle"), dict(norm="group"), dict(single_image="skip"), dict(reduction="max")):
            with pytest.raises(ValueError, match="expected .* to be one of"):
                fastseg.nn.ASPP(CHANNELS, WIDTH, RATES, **options)


class TestAccelerate:
    def test_eval_matches_native(self, theirs, fused):
        theirs.eval()
        x, keys = image(), list(theirs.state_dict())
        native = copy.deepcopy(theirs)
        ours = fastseg.accelerate(theirs)
        with torch.no_grad():
            exact = copy.deepcopy(native).double()(x.double())
            assert_no_less_accurate(ours(x), native(x), exact, 2, "output")
        assert len(fused) == 1
        assert isinstance(ours, FusedModule)
        assert list(ours.state_dict()) == keys
        assert type(fastseg.restore(ours)) is type(native)

    def test_train_matches_native(self, theirs, fused):
        native, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
        ours = fastseg.accelerate(theirs)
        assert_trains_as_accurately(ours, native, exact)
        assert len(fused) == 6

    def test_hooks_see_what_they_always_saw(self, theirs, fused):
        ours = fastseg.accelerate(theirs.eval())
        x, seen = image(), []
        child = next(m for m in theirs.modules() if isinstance(m, nn.Conv2d))
        handle = child.register_forward_hook(lambda module, args, output: seen.append(output.shape))
        with torch.no_grad():
            hooked = ours(x)
            assert len(seen) == 1
            assert fused == []
            assert "has hooks" in ours._fastseg.fusion.reason_not()
            handle.remove()
            assert_alike(ours(x), hooked)
        assert len(fused) == 1

    def test_explain_says_what_runs_as_a_whole(self):
        model = lively(torchvision_aspp()).eval()
        line = "ASPP (ASPP, 4 concatenated branches and a pooled one)"
        wanted = [f"{line} runs as a whole on cpu: faster than native in the committed records"]
        assert fastseg.explain(model, image()).fused == wanted
        fastseg.accelerate(model)
        assert fastseg.explain(model, image()).fused == wanted
        model.convs[1].register_forward_hook(lambda *_: None)
        report = fastseg.explain(model, image())
        assert report.fused == []
        assert f"warning: {line} runs child by child: 1 has hooks" in str(report)

    def test_replaced_children_count(self, fused):
        ours = fastseg.accelerate(lively(torchvision_aspp()).eval())
        ours.convs[1][0] = nn.Conv2d(CHANNELS, WIDTH, 3, padding=1)
        with torch.no_grad():
            ours(image())
        assert fused == []

    def test_copies_and_pickles(self, theirs):
        ours = fastseg.accelerate(theirs.eval())
        x = image()
        with torch.no_grad():
            wanted = ours(x)
            assert torch.equal(copy.deepcopy(ours)(x), wanted)
            if type(theirs).__module__ != __name__:
                assert torch.equal(pickle.loads(pickle.dumps(ours))(x), wanted)

    def test_autocast(self, theirs):
        native = copy.deepcopy(theirs).eval()
        ours = fastseg.accelerate(theirs.eval())
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert_alike(ours(image()), native(image()))

    def test_what_only_looks_like_one_is_left_alone(self):
        class Cropped(type(torchvision_aspp())):
            def forward(self, x):
                return super().forward(x)[..., 1:]

        class Shuffled(SummedHead):
            def forward(self, x):
                return sum(branch(x.flip(-1)) for branch in self.branches)

        class Resized(PooledFirst):
            def forward(self, x):
                image = nn.functional.interpolate(nn.functional.relu(self.image(x)), (3, 4))
                branches = [nn.functional.relu(branch(x)) for branch in (self.one, self.two, self.three)]
                return self.bottleneck(torch.cat([image.sum((2, 3), keepdim=True) + 0 * branches[0], *branches], 1))

        for model in (Cropped(CHANNELS, list(RATES), WIDTH), Shuffled(), Resized()):
            assert find_pyramids(lively(model).eval()) == {}

    @pytest.mark.parametrize(
        "options", [dict(), dict(out_chs=24), dict(dw_kernel_size=5, stride=2), dict(dilation=2)], ids=str
    )
    def test_timm_separable_blocks(self, options, monkeypatch):
        from timm.models._efficientnet_blocks import DepthwiseSeparableConv

        from fastseg.nn import pyramid

        options = {"out_chs": CHANNELS, **options}
        block = lively(DepthwiseSeparableConv(CHANNELS, **options)).eval()
        native, calls = copy.deepcopy(block), []
        run = pyramid.run_separable
        monkeypatch.setattr(pyramid, "run_separable", lambda *args: calls.append(1) or run(*args))
        fastseg.accelerate(block)
        x = image()
        with torch.no_grad():
            exact = copy.deepcopy(native).double()(x.double())
            assert_no_less_accurate(block(x), native(x), exact, 2, "output")
        assert calls == [1]
        with_gate = DepthwiseSeparableConv(
            CHANNELS, CHANNELS, se_layer=lambda channels, **_: nn.Conv2d(channels, channels, 1)
        )
        assert find_pyramids(lively(with_gate).eval()) == {}

    def test_inside_networks(self):
        import segmentation_models_pytorch as smp

        for make in (smp.DeepLabV3Plus, smp.DeepLabV3):
            model = make("resnet18", encoder_weights=None)
            assert [type(m).__name__ for m in find_pyramids(model)] == ["ASPP"]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_separable_convolutions_in_nested_sequentials_are_found_in_either_mode(training):
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.Sequential(block, nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6)).train(training)
    (step,) = fastseg.accelerate(model)._fastseg.steps
    assert isinstance(step, SeparableStep)


def test_the_buffer_is_the_largest_tensor_and_the_pooled_branch_stays_a_vector():
    """Every allocation of a call, as the profiler sees them."""
    channels, width, size = 64, 32, 33
    ours = lively(fastseg.nn.ASPP(channels, width, RATES)).eval()
    x = torch.randn(1, channels, size, size).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        ours(x)
        with torch.profiler.profile(profile_memory=True) as profile:
            ours(x)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = [e.nbytes() for e in events if e.nbytes() > 0]
    plane = 4 * size * size
    assert max(allocated) == 4 * width * plane  # the branches side by side; 5 * width with the pooled one
    assert sum(bytes >= width * plane for bytes in allocated) == 2  # and the result


class SmallDeepLab(nn.Module):
    """DeepLab v3+ in small: stride 4, separable ASPP, a decoder with the first feature map."""

    def __init__(self):
        super().__init__()

        def block(channels, outputs, stride):
            return nn.Sequential(
                nn.Conv2d(channels, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
            )

        self.stem, self.body = block(3, 16, 2), block(16, 32, 2)
        self.aspp = fastseg.nn.SeparableASPP(32, 24, (2, 4, 6), dropout=0.0, backend="native")
        self.decoder = nn.Sequential(
            fastseg.nn.SeparableConv2d(40, 24, 3, padding=1, bias=False, backend="native"),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 3, 1),
        )

    def forward(self, x):
        low = self.stem(x)
        high = nn.functional.interpolate(self.aspp(self.body(low)), low.shape[2:], mode="bilinear")
        logits = self.decoder(torch.cat([high, low], 1))
        return nn.functional.interpolate(logits, x.shape[2:], mode="bilinear")


def shapes(generator, batch=4, size=48):
    """Images of a disc and a square on noise, and their labels."""
    images = 0.5 * torch.randn(batch, 3, size, size, generator=generator)
    labels = torch.zeros(batch, size, size, dtype=torch.long)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    for i in range(batch):
        (cy, cx, y, x), radius = torch.randint(8, size - 16, (4,), generator=generator).tolist(), 7
        disc = (rows - cy) ** 2 + (columns - cx) ** 2 < radius**2
        square = (rows >= y) & (rows < y + 12) & (columns >= x) & (columns < x + 12)
        for label, mask in ((1, square), (2, disc)):
            labels[i][mask] = label
            images[i, label] += mask * (1 + 0.5 * torch.sin((rows + label * columns) / 2.0))
    return images, labels


def train(backend: str, steps: int):
    torch.manual_seed(0)
    model = SmallDeepLab()
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        images, labels = shapes(generator)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        images, labels = shapes(torch.Generator().manual_seed(2), batch=16)
        predicted = model.eval()(images).argmax(1)
    unions = [((predicted == c) | (labels == c)).sum() for c in range(3)]
    overlaps = [((predicted == c) & (labels == c)).sum() for c in range(3)]
    return losses, float(sum(o / u for o, u in zip(overlaps, unions, strict=True)) / 3)


def test_training_reaches_the_same_quality():
    (native, quality), (ours, own_quality) = train("native", 200), train("auto", 200)
    assert_alike(torch.tensor(ours[:5]), torch.tensor(native[:5]))
    assert native[-1] < 0.5 * native[0]
    assert quality > 0.7
    assert abs(own_quality - quality) < 0.05
