# ruff: noqa: F401, F811 -- imported fixtures, and arguments that have their names
"""fastseg.explain, fastseg.info and the command line."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import fastseg
from fastseg import __main__ as command_line
from fastseg import ceilings, dispatch, winners
from fastseg.chains import find_chains
from tests.networks import Block, block, fold_everything, image, lively, one_thread, predict
from tests.tuning import Whole, clock, forget, fresh


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Times are not tested, only that there are some."""
    monkeypatch.setattr(ceilings, "_RUNS", (1, 1))
    monkeypatch.setattr(ceilings, "_COPIED", {"cpu": 2**20, "cuda": 2**20})
    monkeypatch.setattr(ceilings, "_MATRIX", {"cpu": 128, "cuda": 128})
    ceilings.copy_bandwidth.cache_clear()
    ceilings.matmul_rate.cache_clear()
    yield
    ceilings.copy_bandwidth.cache_clear()
    ceilings.matmul_rate.cache_clear()


def by_name(report):
    return {row.name: row for row in report.rows}


class TestRows:
    def test_accelerated_model(self, block):
        report = fastseg.explain(fastseg.accelerate(block), image())
        assert report.accelerated
        rows = by_name(report)
        assert list(rows) == ["conv1", "depthwise", "grouped"]
        assert rows["conv1"].input == (2, 3, 64, 64)
        assert rows["conv1"].output == (2, 8, 64, 64)
        assert rows["conv1"].fold == "bn+relu in weight"
        assert rows["grouped"].fold == "bn in weight"
        assert rows["grouped"].kernel == "native"
        assert "groups == 1 and groups == channels only" in rows["grouped"].reason
        for row in report.rows:
            assert row.ms > 0
            assert row.native_ms > 0
            assert row.bound_ms > 0
            assert row.share_of_bound == row.bound_ms / row.ms

    def test_plain_model_says_what_accelerate_would_do(self, block):
        plain = fastseg.explain(block, image())
        accelerated = fastseg.explain(fastseg.accelerate(block), image())
        assert not plain.accelerated
        assert "this is what fastseg.accelerate would do" in str(plain)
        for ours, theirs in zip(plain.rows, accelerated.rows, strict=True):
            assert (ours.kernel, ours.reason, ours.fold) == (theirs.kernel, theirs.reason, theirs.fold)

    def test_kernel_chosen(self, block):
        report = fastseg.explain(fastseg.accelerate(block, backend="reference"), image())
        assert [row.kernel for row in report.rows] == ["reference", "reference", "native"]
        chosen = dispatch.choose(dispatch.Problem("depthwise_conv2d", "cpu", torch.float32), "auto")
        assert by_name(fastseg.explain(fastseg.accelerate(block), image()))["depthwise"].kernel == chosen.backend

    def test_layers_that_are_left_alone(self):
        class Doubled(nn.Conv2d):
            def forward(self, input):
                return 2 * super().forward(input)

        model = nn.Sequential(Doubled(3, 3, 3), fastseg.nn.Conv2d(3, 3, 3, activation="relu"))
        for layer in (nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)):
            model.append(layer)
        fastseg.accelerate(model[2])
        rows = fastseg.explain(model, image()).rows
        assert "Doubled has a forward of its own" in rows[0].reason
        assert rows[3].reason == "this layer is not accelerated"

    def test_a_layer_with_several_inputs(self):
        layer = nn.Conv2d(3, 3, 3, padding=1)
        model = nn.Sequential(layer, nn.MaxPool2d(2), layer, layer)
        rows = fastseg.explain(model, image()).rows
        assert [(row.name, row.input[2], row.calls) for row in rows] == [("0", 64, 1), ("0", 32, 2)]

    @pytest.mark.parametrize("example", [image(), (image(),), {"x": image()}], ids=["tensor", "tuple", "dict"])
    def test_examples(self, block, example):
        assert len(fastseg.explain(block, example).rows) == 3

    def test_unbatched_and_padded(self):
        model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), nn.Conv2d(3, 3, 3, padding="same"))
        rows = fastseg.explain(model, torch.randn(3, 9, 9)).rows
        assert rows[0].input == (1, 3, 9, 9)
        assert rows[0].live_taps == 1  # reflected values are values
        assert rows[1].live_taps < 1

    def test_no_convolutions(self):
        assert "no convolutions" in str(fastseg.explain(nn.Linear(3, 3), torch.randn(1, 3)))

    def test_bytes_and_arithmetic(self):
        row = fastseg.explain(nn.Conv2d(4, 6, 3), torch.randn(1, 4, 10, 10)).rows[0]
        assert row.megabytes * 1e6 == 4 * (4 * 100 + 6 * 4 * 9 + 6 * 64)
        assert row.gflop * 1e9 == 2 * 6 * 64 * 4 * 9


class TestLiveTaps:
    @pytest.mark.parametrize(
        ("size", "rate", "percent"),
        [(33, 6, 77), (33, 12, 57), (33, 18, 40), (65, 36, 40), (33, 36, 11), (32, 36, 11)],
    )
    def test_known_shares(self, size, rate, percent):
        """6.95, 5.17, 3.64, 3.58 and 1 of nine taps."""
        layer = nn.Conv2d(2, 2, 3, padding=rate, dilation=rate, groups=2)
        row = fastseg.explain(layer, torch.randn(1, 2, size, size)).rows[0]
        assert round(100 * row.live_taps) == percent

    @pytest.mark.parametrize("stride", [1, 2, 3])
    @pytest.mark.parametrize("padding", [0, 2, (1, 4)])
    def test_counted_by_convolving_ones(self, stride, padding):
        layer = nn.Conv2d(1, 1, (3, 4), stride, padding, dilation=(2, 3), bias=False)
        row = fastseg.explain(layer, torch.randn(1, 1, 15, 17)).rows[0]
        counts = nn.functional.conv2d(torch.ones(1, 1, 15, 17), torch.ones(1, 1, 3, 4), None, stride, padding, (2, 3))
        assert row.live_taps == pytest.approx(float(counts.double().mean()) / 12)

    def test_warning(self):
        report = fastseg.explain(nn.Conv2d(2, 2, 3, padding=36, dilation=36), torch.randn(1, 2, 32, 32))
        assert report.warnings == ["Conv2d: rate 36 at 32x32 leaves 11 % of taps live"]
        assert f"warning: {report.warnings[0]}" in str(report)


class TestAfterTune:
    """What is shown is what runs, from the table that `fastseg.tune` filled."""

    @pytest.fixture(params=["native", "cpu"])
    def best(self, request, clock):
        clock.let(request.param)
        return request.param

    def test_folded_chains_and_plain_layers(self, block, best):
        fastseg.accelerate(block)
        fastseg.tune(block, image())
        rows = by_name(fastseg.explain(block, image()))
        for name, fold in (("conv1", "bn+relu"), ("depthwise", "bn+relu")):
            row = rows[name]
            assert (row.kernel, row.reason, row.margin) == (best, "measured here", 2.0)
            assert row.fold.startswith(fold)
        assert (rows["grouped"].kernel, rows["grouped"].margin) == ("native", None)

    def test_reasons_are_one_line_and_margins_a_column(self, block, best):
        fastseg.accelerate(block)
        fastseg.tune(block, image())
        report = fastseg.explain(block, image())
        lines = str(report).splitlines()
        assert f"2 on {best}: measured here" in lines
        head = next(line for line in lines if line.startswith("layer"))
        row = next(line for line in lines if line.startswith("conv1"))
        assert row[: head.index("margin") + len("margin")].endswith("2.00x")
        assert json.loads(report.to_json())["rows"][0]["margin"] == 2.0

    def test_padding_in_words_and_activations_of_layers(self, best):
        conv = nn.Conv2d(3, 3, 3, padding="same")
        model = nn.Sequential(conv, nn.BatchNorm2d(3), nn.ReLU(), fastseg.nn.Conv2d(3, 3, 1, activation="silu"))
        fastseg.accelerate(lively(model).eval())
        fastseg.tune(model, image())
        assert [row.reason for row in fastseg.explain(model, image()).rows] == ["measured here", "measured here"]

    def test_blocks_and_resizes(self, best):
        model = fastseg.accelerate(lively(Whole()).eval())
        fastseg.tune(model, image())
        report = fastseg.explain(model, image())
        how = "runs child by child" if best == "native" else "runs as a whole on cpu"
        assert [line.split(") ", 1)[1] for line in report.fused] == [f"{how}: measured here, 2.00x"] * 2
        assert report.resizes == [f"up on {best}: measured here, 2.00x"]

    def test_nothing_is_measured_and_no_table_changes(self, block, monkeypatch, clock):
        monkeypatch.setattr(winners, "_measures_first_calls", lambda device_type: True)
        fastseg.accelerate(block)
        rows = by_name(fastseg.explain(block, image()))
        assert (
            rows["depthwise"].reason == "faster than native in the committed records; its first call will be measured"
        )
        assert clock.timed == []
        assert winners.table("cpu").own == {}
        assert not winners.table("cpu").path.exists()
        predict(block, image())
        assert clock.timed


class TestReport:
    def test_json_has_everything(self, block):
        report = fastseg.explain(block, image())
        record = json.loads(report.to_json())
        assert record["model"] == "Block"
        assert [row["name"] for row in record["rows"]] == ["conv1", "depthwise", "grouped"]
        assert record["rows"][0]["share_of_bound"] > 0
        assert record["ms"] == report.ms

    def test_table_is_aligned(self, block):
        lines = str(fastseg.explain(block, image())).splitlines()
        head = next(i for i, line in enumerate(lines) if line.startswith("layer"))
        columns = [match.start() for match in re.finditer(r"(?<=  )kernel|convolution", lines[head])]
        for line in lines[head + 2 : head + 5]:
            assert all(line[column - 1] == " " and line[column] != " " for column in columns)
        assert any(line.startswith("3 convolutions: ") for line in lines)


class TestNothingChanges:
    def test_model_and_counters(self, block):
        block.train().bn1.eval()
        flags = [module.training for module in block.modules()]
        values = {key: value.clone() for key, value in block.state_dict().items()}
        strides = [(p.data_ptr(), p.stride()) for p in block.parameters()]
        counted, random = dispatch.native_calls.copy(), torch.get_rng_state()
        fastseg.explain(block, image())
        assert [module.training for module in block.modules()] == flags
        assert all(torch.equal(value, values[key]) for key, value in block.state_dict().items())
        assert [(p.data_ptr(), p.stride()) for p in block.parameters()] == strides
        assert dispatch.native_calls == counted
        assert torch.equal(torch.get_rng_state(), random)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())
        assert type(block.conv1) is nn.Conv2d

    def test_a_failing_example(self, block):
        with pytest.raises(RuntimeError, match="expected input"):
            fastseg.explain(block, torch.randn(1, 5, 8, 8))
        assert not any(module._forward_hooks for module in block.modules())

    def test_types(self):
        with pytest.raises(TypeError, match=r"torch\.nn\.Module, but got int"):
            fastseg.explain(3, image())


class TestChains:
    """Tracing runs strangers' code, and must leave no trace."""

    def test_forward_with_side_effects(self):
        class Remembers(Block):
            def forward(self, x):
                self.last = x
                self.bn1.running_mean.add_(1)
                self.noise = torch.rand(3)
                return super().forward(x)

        model = lively(Remembers()).train()
        mean, random = model.bn1.running_mean.clone(), torch.get_rng_state()
        assert len(find_chains(model)) == 3
        assert torch.equal(model.bn1.running_mean, mean)
        assert not hasattr(model, "last")
        assert model.training
        assert torch.equal(torch.get_rng_state(), random)

    def test_values_kept_in_attributes_are_used(self):
        """The graph does not show them, but somebody may look at them later."""

        class Keeps(Block):
            def __init__(self):
                super().__init__()
                self.features = []

            def forward(self, x):
                x = self.conv1(x)
                self.features.append(x)
                x = self.depthwise(self.relu(self.bn1(x)))
                self.last = x
                return self.grouped(self.relu(self.bn2(x)))

        model = Keeps()
        assert find_chains(model) == {}
        assert model.features == []

    def test_untraceable_parts_cost_their_own_chains_only(self):
        class Branches(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn, self.inside = nn.Conv2d(8, 3, 1), nn.BatchNorm2d(3), Block()

            def forward(self, x):
                y = self.bn(self.conv(x))
                return self.inside(y) if y.mean() > 0 else y

        model = nn.Sequential(Block(), Branches(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        owners = {type(chain.owner) for chain in find_chains(model).values()}
        assert owners == {Block, nn.Sequential}
        assert len(find_chains(model)) == 7

    def test_hooks_do_not_run(self):
        model = nn.Sequential(Block())
        for module in model.modules():
            module.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
        find_chains(model)

    def test_what_follows_must_be_alone(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()

            def forward(self, x):
                x = self.conv(x)
                return self.relu(self.bn(x)) + x

        untracked = nn.BatchNorm2d(3, track_running_stats=False)
        assert find_chains(Twice()) == {}
        assert find_chains(nn.Sequential(nn.Conv2d(3, 3, 1), untracked)) == {}
        assert find_chains(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(), nn.BatchNorm2d(3))) == {}
        assert len(find_chains(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Identity(), nn.BatchNorm2d(3)))) == 1

    @pytest.mark.parametrize("wrap", [nn.DataParallel, torch.jit.script, torch.compile], ids=lambda f: f.__name__)
    def test_wrapped_models(self, wrap):
        model = wrap(nn.Sequential(Block()).eval())
        assert len(find_chains(model)) == (0 if wrap is torch.jit.script else 3)


class TestInfo:
    def test_every_backend_has_an_answer(self):
        info = fastseg.info()
        for device_type, reasons in info.backends.items():
            assert list(reasons) == [name for name in dispatch.BACKENDS if name != "auto"]
            for name, reason in reasons.items():
                problem = dispatch.Problem("depthwise_conv2d", device_type, torch.float32)
                assert reason is not None or dispatch.reason_not(name, problem) is None
        assert info.backends["cpu"]["reference"] is None

    def test_text(self):
        text = str(fastseg.info())
        words = ("versions", "build", "devices", "backends for cpu tensors", torch.__version__, "reference", "tuning")
        for word in words:
            assert word in text
        assert "None" not in text


class TestCommandLine:
    def run(self, capsys, *arguments):
        code = command_line.main(list(arguments))
        return code, capsys.readouterr()

    def test_info(self, capsys):
        code, output = self.run(capsys, "info")
        assert code == 0
        assert str(fastseg.info()).splitlines()[0] in output.out

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("lraspp_mobilenet_v3_large", ["--plain"]),
            ("timm:mobilenetv2_050", ["--batch", "2"]),
            ("smp:DeepLabV3Plus:mobilenet_v2", ["--accelerate"]),
        ],
    )
    def test_explain(self, capsys, name, options):
        pytest.importorskip(
            {"timm": "timm", "smp": "segmentation_models_pytorch"}.get(name.split(":")[0], "torchvision")
        )
        code, output = self.run(capsys, "explain", name, "--size", "64", *options)
        assert code == 0
        assert output.out.startswith(f"{name} ({'not accelerated' if '--plain' in options else 'accelerated'}")
        assert "random weights" in output.out

    def test_explain_json(self, capsys):
        pytest.importorskip("torchvision")
        code, output = self.run(capsys, "explain", "resnet18", "--size", "33", "--json")
        assert code == 0
        assert len(json.loads(output.out)["rows"]) == 20

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                ["deeplabv3_resnet5"],
                "no torchvision model is called 'deeplabv3_resnet5'; near it are deeplabv3_resnet50",
            ),
            (["timm:xceptoin41"], "no timm model is called 'xceptoin41'; near it are xception41"),
            (["smp:Unett"], "no segmentation_models_pytorch class is called 'Unett'; near it are Unet"),
            (["smp:Unet:resnet17"], "no segmentation_models_pytorch encoder is called 'resnet17'; near it are"),
            (["alexnet", "--size", "8"], "alexnet does not run on an input of [1, 3, 8, 8]"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_mistakes(self, capsys, arguments, message):
        for module in ("torchvision", "timm", "segmentation_models_pytorch"):
            pytest.importorskip(module)
        code, output = self.run(capsys, "explain", *arguments)
        assert code == 2
        assert output.out == ""
        assert message in output.err
        assert output.err.startswith("fastseg: ")
        assert output.err.count("\n") == 1

    def test_missing_package(self, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "timm", None)
        code, output = self.run(capsys, "explain", "timm:resnet18")
        assert code == 2
        assert "pip install timm" in output.err

    @pytest.mark.parametrize("arguments", [[], ["explain"], ["explain", "resnet18", "--size", "-1"], ["segment"]])
    def test_usage(self, capsys, arguments):
        with pytest.raises(SystemExit) as error:
            command_line.main(arguments)
        assert error.value.code == 2

    def test_as_a_module(self):
        process = subprocess.run([sys.executable, "-m", "fastseg", "info"], capture_output=True, text=True, check=False)
        assert process.returncode == 0
        assert process.stdout.startswith("versions")
