# ruff: noqa: F401 -- imported fixtures
"""U-Net: the paper's numbers, and what every form of it promises on both kinds of layers."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastseg.models.unet import unet
from fastseg.testing import (
    assert_alike,
    assert_argmax,
    assert_within,
    expected_cross_entropy,
    expected_scores,
    random_tensor,
)
from tests.networks import lively, one_thread

# Each form of the network with images that suit it, small where the form allows.
FORMS = {
    "paper": (dict(base_channels=2), (188, 204)),
    "paper-norm-bilinear": (dict(base_channels=4, depth=2, norm="batch", up="bilinear"), (60, 64)),
    "padded-norm": (dict(padding="same", base_channels=4, norm="batch"), (37, 50)),
    "padded-norm-bilinear": (dict(padding="same", base_channels=4, norm="batch", up="bilinear"), (37, 50)),
    "padded": (dict(padding="same", base_channels=3, depth=3), (33, 24)),
    "resnet18": (dict(encoder="resnet18", decoder_channels=(16, 8, 8, 8, 8)), (37, 50)),
    "mobilenet_v2": (dict(encoder="mobilenet_v2", up="bilinear"), (37, 50)),
    "timm": (dict(encoder="timm:mobilenetv3_small_050"), (37, 50)),
}
LOSSES = {
    "plain": dict(),
    "options": dict(weight=torch.tensor([0.5, 1, 1.5, 2, 3]), ignore_index=1, label_smoothing=0.1),
}


@functools.cache
def original(form: str, layers: str) -> nn.Module:
    if "timm" in form:
        pytest.importorskip("timm")
    torch.manual_seed(0)
    return lively(unet(3, 5, **FORMS[form][0], layers=layers))


def built(form: str, layers: str = "fastseg") -> nn.Module:
    return copy.deepcopy(original(form, layers))


def images(form: str, batch: int = 2) -> torch.Tensor:
    return random_tensor((batch, 3, *FORMS[form][1]), torch.float32)


def targets(size, batch: int = 2, classes: int = 5, ignored: int = -100) -> torch.Tensor:
    found = torch.randint(classes, (batch, *size), generator=torch.Generator().manual_seed(3))
    found[:, :2] = ignored
    return found


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


@pytest.fixture(params=["fastseg", "native"])
def layers(request):
    return request.param


class TestPaper:
    """The paper's numbers, on the meta device: nothing is computed."""

    @pytest.mark.parametrize(
        ("arguments", "options", "wanted"),
        [
            ((1, 2), {}, 31_030_658),
            ((3, 2), {}, 31_031_810),
            ((3, 21), {}, 31_033_045),
            ((3, 2), dict(padding="same", norm="batch"), 31_037_698),
        ],
        ids=["1-2", "3-2", "3-21", "padded-3-2"],
    )
    def test_parameters(self, arguments, options, wanted):
        with torch.device("meta"):
            model = unet(*arguments, **options, layers="native")
        assert sum(p.numel() for p in model.parameters()) == wanted

    def test_multiply_adds(self):
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            unet(1, 2, layers="native")(torch.empty(1, 1, 572, 572))
        assert round(counter.get_total_flops() / 2e9, 2) == 150.43

    def test_23_convolution_layers_and_their_sizes(self):
        sizes = []
        with torch.device("meta"):
            model = unet(1, 2, layers="native")
            for module in model.modules():
                if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                    module.register_forward_hook(lambda _, __, y: sizes.append(tuple(y.shape[-2:])))
            model(torch.empty(1, 1, 572, 572))
        down = [570, 568, 282, 280, 138, 136, 66, 64, 30, 28]
        up = [56, 54, 52, 104, 102, 100, 200, 198, 196, 392, 390, 388]
        assert sizes == [(n, n) for n in (*down, *up, 388)]
        assert len(sizes) == 23

    def test_he_initialisation(self):
        model = unet(3, 2, base_channels=16)
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                taps = 1 if isinstance(module, nn.ConvTranspose2d) else module.weight[0, 0].numel()
                wanted, weight = math.sqrt(2 / (module.in_channels * taps)), module.weight.detach()
                assert float(weight.std()) == pytest.approx(wanted, rel=4 / math.sqrt(weight.numel()))
                assert not module.bias.any()


class TestUnpadded:
    @pytest.mark.parametrize(("depth", "smallest"), [(1, 18), (2, 44), (3, 92), (4, 188), (5, 380)])
    def test_works_on_exactly_the_sizes_it_says(self, depth, smallest):
        with torch.device("meta"):
            model = unet(1, 2, base_channels=1, depth=depth, layers="native")
            for n in range(smallest - 2**depth, smallest + 2**depth + 2):
                if n in (smallest, smallest + 2**depth):
                    assert tuple(model(torch.empty(1, 1, n, smallest)).shape[-2:]) == model.output_size((n, smallest))
                else:
                    with pytest.raises(ValueError, match="nearest"):
                        model(torch.empty(1, 1, n, smallest))

    @pytest.mark.parametrize(
        ("size", "sentence"),
        [
            (
                (570, 580),
                "sides are 188 + 16 k, but got 570 x 580; nearest are 556 and 572 for 570, 572 and 588 for 580",
            ),
            ((512, 572), "but got 512 x 572; nearest are 508 and 524 for 512, 572 for 572"),
            ((64, 64), "but got 64 x 64; nearest are 188 for 64"),
        ],
        ids=["between", "one-side", "too-small"],
    )
    def test_other_sizes_are_refused_with_the_nearest(self, size, sentence):
        model = unet(1, 2, base_channels=1)
        for call in (model, model.predict, lambda x: model.loss(x, targets(size, 1, 2))):
            with pytest.raises(ValueError, match=sentence.replace("+", r"\+")):
                call(torch.zeros(1, 1, *size))

    def test_tiles_agree_with_the_whole(self):
        """The paper's overlap-tile strategy is exact: nothing of a tile's border reaches its logits."""
        model = unet(1, 3, base_channels=4, depth=2)
        whole = random_tensor((1, 1, 60, 68), torch.float32)
        assert model.output_size(whole.shape[-2:]) == (20, 28)
        with torch.no_grad():
            assert_alike(model(whole[..., 8:56, 12:60]), model(whole)[..., 8:16, 12:20])

    def test_mirrored_filters_mirror_the_logits(self):
        """So they do only where what is skipped is cropped to its middle."""
        model = unet(1, 3, base_channels=4, depth=3)
        x = random_tensor((1, 1, 108, 124), torch.float32)
        with torch.no_grad():
            wanted = model(x.flip(2, 3)).flip(2, 3)
            for parameter in model.parameters():
                if parameter.dim() == 4:
                    parameter.copy_(parameter.flip(2, 3))
            assert_alike(model(x), wanted)

    def test_targets_of_the_images_size_are_cut_to_the_middle(self):
        model, x = unet(1, 5, base_channels=2, depth=2), random_tensor((2, 1, 60, 64), torch.float32)
        wide = targets((60, 64))
        assert torch.equal(model.loss(x, wide), model.loss(x, wide[:, 20:40, 20:44]))

    def test_targets_of_another_size_are_refused(self):
        model = unet(1, 5, base_channels=2, depth=2)
        wanted = r"images' size \(60, 64\) or the logits' \(20, 24\), but got \(20, 25\)"
        with pytest.raises(ValueError, match=wanted):
            model.loss(torch.zeros(2, 1, 60, 64), targets((20, 25)))


class TestPadded:
    @pytest.mark.parametrize("up", ["transpose", "bilinear"])
    @pytest.mark.parametrize("size", [(16, 16), (31, 33), (47, 50), (17, 64)], ids=str)
    def test_any_size(self, size, up):
        model = unet(2, 3, base_channels=2, padding="same", norm="batch", up=up).eval()
        assert model(torch.zeros(1, 2, *size)).shape == (1, 3, *size)

    def test_what_comes_up_short_is_padded_with_zeros_at_the_far_sides(self):
        join = unet(padding="same", base_channels=1).join
        skip, x = random_tensor((1, 2, 5, 7), torch.float32), random_tensor((1, 2, 4, 6), torch.float32)
        y = join(skip, x)
        assert torch.equal(y[:, :2], skip)
        assert torch.equal(y[:, 2:], F.pad(x, (0, 1, 0, 1)))

    def test_bilinear_halves_the_channels_in_front_of_a_resize(self):
        with torch.device("meta"):
            model = unet(3, 2, padding="same", norm="batch", up="bilinear", layers="native")
        widths = [[m.out_channels for m in convs if isinstance(m, nn.Conv2d)] for convs in model.expanding]
        assert widths == [[512, 256], [256, 128], [128, 64], [64, 64]]
        assert model.contracting[-1][0].out_channels == 512
        assert all(up.align_corners for up in model.up)


class TestEveryForm:
    def test_logits_have_the_output_size(self, form):
        model, x = built(form).eval(), images(form)
        with torch.no_grad():
            y = model(x)
        assert y.shape == (2, 5, *(model.output_size(x.shape[-2:]) if "paper" in form else x.shape[-2:]))
        assert y.isfinite().all()

    def test_both_kinds_of_layers_have_the_same_parameters(self, form):
        fast, native = built(form).state_dict(), built(form, "native").state_dict()
        assert list(fast) == list(native)
        for key, value in fast.items():
            assert torch.equal(value, native[key]), key

    @pytest.mark.parametrize("mode", ["eval", "train"])
    def test_both_kinds_of_layers_give_the_same(self, form, mode):
        x = images(form)
        with torch.no_grad():
            fast, native = (built(form, layers).train(mode == "train")(x) for layers in ("fastseg", "native"))
        assert_alike(fast, native)

    def test_norms_are_folded(self, form):
        """Every batch norm stands in a chain that `accelerate` sees."""
        chains = [m._fastseg.chain for m in built(form).modules() if isinstance(m, nn.Conv2d)]
        norms = {m for m in built(form).modules() if isinstance(m, nn.BatchNorm2d)}
        assert len([chain for chain in chains if chain is not None]) == len(norms)

    @pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
    def test_loss_is_the_cross_entropy_of_the_resized_logits(self, form, layers, options):
        model, x = built(form, layers).eval(), images(form)
        with torch.no_grad():
            logits = model.logits(x)
            target = targets(logits.shape[-2:], ignored=options.get("ignore_index", -100))
            wanted, _ = expected_cross_entropy(logits, target, **options)
            assert_within(model.loss(x, target, **options), wanted, "loss")

    def test_predict_is_the_argmax_of_the_resized_logits(self, form, layers):
        model, x = built(form, layers), images(form)
        with torch.no_grad():
            logits = copy.deepcopy(model).eval().logits(x)
        assert_argmax(model.predict(x), expected_scores(logits, logits.shape[-2:], False))
        assert model.predict(x, torch.uint8).dtype == torch.uint8
        assert model.training

    def test_images_of_other_channels_are_refused(self, form, layers):
        model, x = built(form, layers).eval(), images(form)[:, :2]
        with torch.no_grad(), pytest.raises(RuntimeError, match="to have 3 channels, but got 2 channels"):
            model(x)

    def test_one_image_trains(self, form):
        model, x = built(form), images(form, batch=1)
        model.loss(x, targets(x.shape[-2:], 1)).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    def test_copies_give_the_same(self, form, layers):
        model, x = built(form, layers).eval(), images(form)
        loaded = built(form, layers).eval()
        for value in loaded.state_dict().values():
            value.zero_()
        loaded.load_state_dict(model.state_dict())
        with torch.no_grad():
            y = model(x)
            assert torch.equal(copy.deepcopy(model)(x), y)
            assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
            assert torch.equal(loaded(x), y)


def name_in_smp(key: str) -> str:
    """What segmentation_models_pytorch calls a parameter or buffer of the form with an encoder."""
    key = re.sub(r"(decoder\.blocks\.\d+)\.convs\.([01])", r"\1.conv1.\2", key)
    key = re.sub(r"(decoder\.blocks\.\d+)\.convs\.([34])", lambda m: f"{m[1]}.conv2.{int(m[2]) - 3}", key)
    return key.replace("classifier", "segmentation_head.0")


NARROW = (64, 48, 32, 16, 8)


class TestEncoder:
    @pytest.mark.parametrize(
        ("encoder", "shape", "options", "their_options"),
        [
            ("resnet34", (3, 64, 65), {}, {}),
            ("resnet50", (1, 33, 64), dict(up="bilinear"), dict(decoder_interpolation="bilinear")),
            ("mobilenet_v2", (4, 49, 50), dict(decoder_channels=NARROW), dict(decoder_channels=NARROW)),
            ("timm:mobilenetv3_small_050", (1, 64, 65), {}, {}),
            ("timm:convnext_atto", (3, 64, 67), {}, {}),
            ("timm:dla46_c", (3, 64, 96), {}, {}),  # DLA takes no odd sizes
        ],
        ids=["resnet34", "resnet50-bilinear", "mobilenet_v2-narrow", "timm", "timm-no-stride-2", "timm-stride-1"],
    )
    def test_gives_what_smp_gives(self, encoder, shape, options, their_options):
        smp = pytest.importorskip("segmentation_models_pytorch")
        ours = lively(unet(shape[0], 5, encoder=encoder, **options)).eval()
        name = encoder.replace("timm:", "tu-")
        theirs = smp.Unet(name, encoder_weights=None, in_channels=shape[0], classes=5, **their_options).eval()
        theirs.load_state_dict({name_in_smp(key): value for key, value in ours.state_dict().items()})
        x = random_tensor((2, *shape), torch.float32)
        with torch.no_grad():
            assert_alike(ours(x), theirs(x))

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            (dict(encoder="resnet20"), "to be one of 'resnet18', .* or 'timm:NAME', but got 'resnet20'"),
            (dict(encoder="resnet18", padding="valid"), "expected padding with an encoder to be .*, but got 'valid'"),
            (dict(encoder="resnet18", up="transpose"), "expected up with an encoder to be .*, but got 'transpose'"),
            (dict(encoder="resnet18", depth=3), "expected depth with an encoder to be .*, but got 3"),
            (dict(encoder="resnet18", decoder_channels=(8, 8)), r"to be 5 numbers, but got \[8, 8\]"),
            (dict(decoder_channels=(8, 8)), r"decoder_channels to be None without an encoder, but got \(8, 8\)"),
            (dict(padding="full"), "expected padding to be one of .*, but got 'full'"),
            (dict(norm="group"), "expected norm to be one of .*, but got 'group'"),
            (dict(up="nearest"), "expected up to be one of .*, but got 'nearest'"),
            (dict(depth=0), "expected depth and base_channels to be positive, but got 0 and 64"),
            (dict(layers="fast"), "expected layers to be one of .*, but got 'fast'"),
        ],
        ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
    )
    def test_options_that_do_not_go_together(self, options, sentence):
        with torch.device("meta"), pytest.raises(ValueError, match=sentence):
            unet(3, 2, **options)
