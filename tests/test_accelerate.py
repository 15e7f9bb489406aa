# ruff: noqa: F401, F811 -- imported fixtures, and arguments that have their names
"""fastseg.accelerate on models that people have: the same model, the same results, and an exact undo.

The file is long because what accelerate promises is one list, over models that its tests share.
"""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fastseg
from fastseg.nn.conv import AcceleratedConv2d
from fastseg.ops.library import OVERLOADS
from fastseg.testing import assert_no_less_accurate
from tests.networks import (
    FOLDS,
    KEYS,
    Block,
    alone,
    alone_in_double,
    assert_as_accurate,
    assert_like_native,
    assert_same_labels,
    block,
    channels_last,
    fold_everything,
    folds,
    image,
    lively,
    named_model,
    one_thread,
    originals,
    predict,
    statistics,
    tensor_of,
)


def snapshot(model):
    """Everything the undo promises: classes, attributes, parameter objects, strides and values."""
    return {
        name: (
            type(module),
            dict(vars(module)),
            {key: dict(value) for key, value in vars(module).items() if isinstance(value, dict)},
            [(id(p), p.stride(), p.clone()) for p in module.parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    }


def assert_unchanged(model, before):
    after = snapshot(model)
    assert list(after) == list(before)
    for name, (kind, attributes, registries, parameters) in after.items():
        assert kind is before[name][0]
        assert list(attributes) == list(before[name][1])
        assert registries == before[name][2]
        for now, then in zip(parameters, before[name][3], strict=True):
            assert now[:2] == then[:2]
            assert torch.equal(now[2], then[2])


class TestModels:
    """Every promise of the drop-in that depends on the model, on each of them."""

    def test_keys_and_parameters_stay(self, named_model):
        _, model = named_model
        keys = list(model.state_dict())
        parameters = [(name, id(p)) for name, p in model.named_parameters()]
        modules = [(name, id(m)) for name, m in model.named_modules()]
        assert fastseg.accelerate(model) is model
        assert list(model.state_dict()) == keys
        assert [(name, id(p)) for name, p in model.named_parameters()] == parameters
        assert [(name, id(m)) for name, m in model.named_modules()] == modules
        assert not any(type(m) is nn.Conv2d for m in model.modules())

    def test_eval_matches_native(self, named_model, folds):
        name, model = named_model
        model.eval()
        x = image()
        native = predict(channels_last(copy.deepcopy(model)), channels_last(x))
        exact = predict(copy.deepcopy(model).double(), x.double())
        actual = predict(fastseg.accelerate(model), x)
        assert_as_accurate(actual, native, exact, name)
        assert_same_labels(actual, native, exact)
        assert len(folds) == FOLDS[name]

    def test_train_matches_native(self, named_model, folds):
        name, model = named_model
        model.train()
        x = image(batch=4)
        accelerated = fastseg.accelerate(copy.deepcopy(model))
        runs = {
            "native": (channels_last(copy.deepcopy(model)), channels_last(x)),
            "exact": (model.double(), x.double()),
            "accelerated": (accelerated, x),
        }
        outputs = {key: tensor_of(network(inputs)).detach() for key, (network, inputs) in runs.items()}
        assert_as_accurate(outputs["accelerated"], outputs["native"], outputs["exact"], name)
        assert folds == []
        for statistic in ("running_mean", "running_var"):  # they move as native's do
            values = {key: statistics(network, statistic) for key, (network, _) in runs.items()}
            assert_as_accurate(values["accelerated"], values["native"], values["exact"], f"{name} {statistic}")

    def test_restore_is_exact(self, named_model):
        _, model = named_model
        model.eval()
        before, y = snapshot(model), predict(model, image())
        fastseg.accelerate(model)
        predict(model, image())
        assert fastseg.restore(model) is model
        assert_unchanged(model, before)
        assert torch.equal(predict(model, image()), y)

    def test_deepcopy_and_pickle(self, named_model):
        _, model = named_model
        fastseg.accelerate(model.eval())
        y = predict(model, image())
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(predict(twin, image()), y)
            ours = {id(module) for module in model.modules()}
            chains = [m._fastseg.chain for m in twin.modules() if isinstance(m, AcceleratedConv2d)]
            assert not any(id(chain.norm) in ours for chain in chains if chain is not None)
            assert not any(hasattr(m, "_fastseg") for m in fastseg.restore(twin).modules())


class TestUndo:
    def test_restore_of_a_plain_model_does_nothing(self, block):
        before = snapshot(block)
        assert fastseg.restore(block) is block
        assert_unchanged(block, before)

    def test_scoped(self, block):
        before = snapshot(block)
        with fastseg.accelerated(block) as inside:
            assert inside is block
            assert type(block.conv1) is AcceleratedConv2d
        assert_unchanged(block, before)

    def test_scoped_with_an_exception(self, block):
        before = snapshot(block)
        with pytest.raises(ZeroDivisionError), fastseg.accelerated(block):
            raise ZeroDivisionError
        assert_unchanged(block, before)

    def test_scoped_inside_accelerated(self, block, folds):
        fastseg.accelerate(block, backend="reference")
        settings, y, before = vars(block.depthwise)["_fastseg"], predict(block, image()), settings_of(block)
        with fastseg.accelerated(block, backend="native", memory_format=None):
            assert block.depthwise._fastseg.backend == "native"
        assert block.depthwise._fastseg is settings
        assert settings_of(block) == before
        folds.clear()
        assert torch.equal(predict(block, image()), y)
        assert len(folds) == 3

    def test_scoped_after_layers_left_and_came(self, block):
        """Layers that leave the model inside the block are restored too, and so are those that come."""
        with fastseg.accelerated(block):
            left, block.conv1 = block.conv1, fastseg.accelerate(nn.Conv2d(3, 8, 3))
        assert type(left) is type(block.conv1) is nn.Conv2d

    def test_twice(self, block, folds):
        before = snapshot(block)
        fastseg.accelerate(block)
        fastseg.accelerate(block, memory_format=None)
        assert block.conv1._fastseg.memory_format is None
        assert not block.conv1.weight.is_contiguous(memory_format=torch.channels_last)
        predict(block, image())
        assert len(folds) == 3
        fastseg.restore(block)
        assert_unchanged(block, before)

    def test_part_then_whole_then_part(self, folds):
        torch.manual_seed(0)
        model = nn.Sequential(Block(3 * 4), nn.Conv2d(12, 3, 1), Block())
        lively(model).eval()
        before = snapshot(model)
        fastseg.accelerate(model[0])
        fastseg.accelerate(model)
        fastseg.restore(model[2])
        assert_like_native(model, "partly restored")
        assert len(folds) == 3
        fastseg.restore(model)
        assert_unchanged(model, before)

    def test_norm_restored_by_itself(self, block):
        """Its convolution must not fold any more."""
        fastseg.accelerate(block)
        fastseg.restore(block.bn1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_like_native(block, "norm restored")

    def test_shared_modules_and_weights(self):
        torch.manual_seed(0)
        conv, tied = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        tied.weight = conv.weight
        model = nn.Sequential(conv, nn.ReLU(), conv, tied).eval()
        before = snapshot(model)
        fastseg.accelerate(model)
        assert model[0] is model[2]
        assert model[3].weight is model[0].weight
        assert_like_native(model, "shared")
        fastseg.restore(model)
        assert_unchanged(model, before)

    def test_values_learned_meanwhile_stay(self, block):
        strides = block.conv1.weight.stride()
        fastseg.accelerate(block)
        with torch.no_grad():
            block.conv1.weight.fill_(2)
        fastseg.restore(block)
        assert (block.conv1.weight == 2).all()
        assert block.conv1.weight.stride() == strides

    def test_hooks_of_the_user_survive(self, block):
        calls = []
        block.register_forward_hook(lambda *_: calls.append("before"))
        fastseg.accelerate(block)
        block.register_forward_hook(lambda *_: calls.append("after"))
        fastseg.restore(block)
        predict(block, image())
        assert calls == ["before", "after"]


def settings_of(model):
    return [(type(m), vars(m).get("_fastseg"), [p.stride() for p in m.parameters()]) for m in model.modules()]


class TestSwap:
    """Which layers change, and how."""

    def test_a_single_layer(self):
        layer = nn.Conv2d(3, 8, 3)
        assert fastseg.accelerate(layer) is layer
        assert isinstance(layer, AcceleratedConv2d)
        assert isinstance(layer, nn.Conv2d)
        assert type(fastseg.restore(layer)) is nn.Conv2d

    def test_subclasses_are_left_alone(self):
        class Doubled(nn.Conv2d):
            def forward(self, input):
                return 2 * super().forward(input)

        parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
        model = nn.Sequential(Doubled(3, 3, 3), parametrized, nn.LazyConv2d(4, 3), fastseg.nn.Conv2d(4, 4, 3))
        kinds = [type(layer) for layer in model]
        fastseg.accelerate(model)
        assert [type(layer) for layer in model] == kinds

    def test_weight_without_parameter(self):
        """Pruning and the older weight_norm make the weight a plain attribute, set by a pre-hook."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        prune.random_unstructured(model[0], "weight", amount=0.5)
        predict(lively(model).eval(), image())  # the weight is now one without a graph, and can be copied
        assert_like_native(fastseg.accelerate(model), "pruned")

    def test_memory_shared_with_others_stays(self):
        shared, flat_weights = nn.Conv2d(3, 8, 3).share_memory(), torch.randn(1000)
        view = nn.Conv2d(3, 8, 3)
        view.weight.data = flat_weights[4 : 4 + 216].view(8, 3, 3, 3)
        for layer in (shared, view):
            pointer = layer.weight.data_ptr()
            fastseg.accelerate(layer)
            assert layer.weight.data_ptr() == pointer

    def test_activations_flow_in_channels_last(self, block):
        formats = []
        for layer in (block.depthwise, block.grouped):
            layer.register_forward_pre_hook(
                lambda module, args: formats.append(args[0].is_contiguous(memory_format=torch.channels_last))
            )
        y = predict(fastseg.accelerate(block), image())
        assert formats == [True, True]
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert block.conv1.weight.is_contiguous(memory_format=torch.channels_last)

    def test_strides_in_dimensions_of_size_one(self):
        """Those of channels_last, as native's gradients have them: DistributedDataParallel compares strides."""
        for layer in (nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, groups=8)):
            strides, pointer = layer.weight.stride(), layer.weight.data_ptr()
            fastseg.accelerate(layer)(torch.randn(1, layer.in_channels, 5, 5)).sum().backward()
            assert layer.weight.grad.stride() == layer.weight.stride() != strides
            fastseg.restore(layer)
            assert layer.weight.stride() == strides
            assert layer.weight.data_ptr() == pointer

    def test_layouts_left_alone(self, block):
        strides = [p.stride() for p in block.parameters()]
        y = predict(fastseg.accelerate(block, memory_format=None), image())
        assert y.is_contiguous()
        assert [p.stride() for p in block.parameters()] == strides

    def test_unbatched_input(self):
        layer = nn.Conv2d(4, 4, 3, groups=4)
        x = torch.randn(4, 9, 9)
        y = predict(layer, x)
        assert predict(fastseg.accelerate(layer), x).shape == y.shape

    def test_bad_input_raises_as_before(self, block):
        fastseg.accelerate(block)
        with pytest.raises(RuntimeError, match="expected input"):
            block(torch.randn(1, 5, 8, 8))
        with pytest.raises(TypeError):
            block("image")

    def test_backend_by_name(self, block):
        fastseg.accelerate(block, backend="reference")
        assert block.depthwise._fastseg.backend == block.conv1._fastseg.backend == "reference"
        assert block.grouped._fastseg.backend == "auto"
        assert_like_native(block, "reference")

    def test_kernels_run_under_autocast(self, block, monkeypatch):
        """There the input is bfloat16 and the weight float32."""
        calls = []
        kernels = OVERLOADS["depthwise_conv2d"]
        reference = kernels["reference"]
        monkeypatch.setitem(kernels, "reference", lambda *args: calls.append(args[0].dtype) or reference(*args))
        fastseg.accelerate(block, backend="reference")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = predict(block, image())
        assert calls == [torch.bfloat16]
        assert y.dtype == torch.bfloat16

    def test_backend_that_cannot_run(self, block):
        fastseg.accelerate(block, backend="cuda")
        with pytest.raises(fastseg.BackendError, match="'cuda' cannot run dilated_conv2d"):
            block(image())

    def test_auto_takes_the_surrounding_choice(self, block):
        fastseg.accelerate(block)
        with fastseg.backend("cuda"), pytest.raises(fastseg.BackendError):
            block(image())


class TestArguments:
    def test_types_and_values(self):
        layer = nn.Conv2d(3, 3, 3)
        for function in (fastseg.accelerate, fastseg.restore):
            with pytest.raises(TypeError, match="torch.nn.Module, but got Tensor"):
                function(torch.zeros(1))
        with pytest.raises(ValueError, match="expected backend to be one of auto, .*'fast'"):
            fastseg.accelerate(layer, backend="fast")
        with pytest.raises(ValueError, match="expected on_fallback to be one of silent, warn, error, but got 'raise'"):
            fastseg.accelerate(layer, on_fallback="raise")
        with pytest.raises(ValueError, match="expected memory_format to be"):
            fastseg.accelerate(layer, memory_format=torch.channels_last_3d)
        with pytest.raises(ValueError, match="backend"), fastseg.accelerated(layer, backend="fast"):
            pass
        assert type(layer) is nn.Conv2d

    def test_fallback_error_changes_nothing(self, block):
        before = snapshot(block)
        with pytest.raises(fastseg.BackendError, match=r"1 convolution is left to native \(grouped\): there"):
            fastseg.accelerate(block, on_fallback="error")
        assert_unchanged(block, before)

    def test_fallback_warns_once_a_reason(self):
        model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3))
        with pytest.warns(UserWarning, match=r"2 convolutions are left to native \(0, 1\)") as record:
            fastseg.accelerate(model, on_fallback="warn")
        assert len(record) == 1
        assert record[0].filename == __file__

    @pytest.mark.parametrize(
        ("layer", "backend", "message"),
        [
            (nn.Conv2d(4, 4, 3, groups=4, dtype=torch.complex64), "auto", "not complex64"),
            (nn.Conv2d(4, 4, 3, groups=4), "cuda", "backend 'cuda' cannot run"),
            (fastseg.nn.Conv2d(4, 4, 3, groups=4), "auto", "Conv2d has a forward of its own"),
        ],
        ids=["dtype", "backend", "subclass"],
    )
    def test_fallback_reasons(self, layer, backend, message):
        with pytest.raises(fastseg.BackendError, match=message):
            fastseg.accelerate(nn.Sequential(layer), backend=backend, on_fallback="error")

    def test_dense_layers_are_no_fallback(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fastseg.accelerate(nn.Conv2d(3, 8, 3), on_fallback="error")
            fastseg.accelerate(nn.Conv2d(4, 4, 3, groups=2), backend="native", on_fallback="error")


class TestTraining:
    def test_gradients(self, block):
        block.train()
        gradients = {}
        accelerated = fastseg.accelerate(copy.deepcopy(block))
        for key, network, x in (
            ("native", channels_last(copy.deepcopy(block)), channels_last(image())),
            ("exact", copy.deepcopy(block).double(), image().double()),
            ("accelerated", accelerated, image()),
        ):
            network(x).square().mean().backward()
            gradients[key] = [p.grad for p in network.parameters()]
        for parameter, ours, native, exact in zip(accelerated.parameters(), *map(gradients.get, KEYS), strict=True):
            assert_no_less_accurate(ours, native, exact, 3, "gradient")
            assert ours.stride() == parameter.stride()

    def test_optimizer_made_before_stays_valid(self, block):
        """Momentum gathered before accelerate is used after it."""
        networks = {
            "accelerated": (block, image()),
            "native": (channels_last(copy.deepcopy(block)), channels_last(image())),
            "exact": (copy.deepcopy(block).double(), image().double()),
        }
        for key, (network, x) in networks.items():
            optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
            network.train()
            for step in range(3):
                optimizer.zero_grad()
                network(x).square().mean().backward()
                optimizer.step()
                if step == 0 and key == "accelerated":
                    fastseg.accelerate(network)
        weights = [torch.cat([p.detach().flatten() for p in networks[key][0].parameters()]) for key in KEYS]
        assert_no_less_accurate(*weights, 3, "weights after three steps")


class TestComposition:
    """What people do with a model afterwards."""

    @pytest.mark.parametrize("name", ["torchvision-lraspp_mobilenet_v3_large", "timm-mobilenetv2_100"])
    def test_compile_fullgraph(self, originals, name):
        model = fastseg.accelerate(originals(name).eval())
        y = predict(model, image())
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert_as_accurate(predict(compiled, image()), y, alone_in_double(originals(name).eval()), name)

    def test_compile_inductor(self, block):
        exact, native = alone_in_double(block), alone(block)
        torch.compiler.reset()
        compiled = torch.compile(fastseg.accelerate(block), fullgraph=True)
        assert_as_accurate(predict(compiled, image()), native, exact, "inductor")

    def test_compiled_before(self, block):
        exact, native = alone_in_double(block), alone(block)
        torch.compiler.reset()
        compiled = torch.compile(block, fullgraph=True, backend="eager")
        predict(compiled, image())
        fastseg.accelerate(compiled)
        assert_as_accurate(predict(compiled, image()), native, exact, "accelerated after compile")

    @pytest.mark.parametrize("strict", [False, True])
    def test_export(self, block, strict):
        exact, native = alone_in_double(block), alone(block)
        program = torch.export.export(fastseg.accelerate(block), (image(),), strict=strict)
        assert_as_accurate(predict(program.module(), image()), native, exact, "export")

    def test_fx_and_jit_tracing(self, block, folds):
        exact, native = alone_in_double(block), alone(block)
        fastseg.accelerate(block)
        graph = torch.fx.symbolic_trace(block)
        assert sum(node.op == "call_module" for node in graph.graph.nodes) == 9
        assert_as_accurate(predict(graph, image()), native, exact, "fx")
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(block, image(), check_trace=False)
        assert folds == []
        assert_as_accurate(predict(traced, image()), native, exact, "jit.trace")

    def test_feature_extractor(self):
        extraction = pytest.importorskip("torchvision.models.feature_extraction")
        torch.manual_seed(0)
        model = lively(pytest.importorskip("torchvision.models").resnet18(weights=None)).eval()
        names = ["conv1", "layer1.0.conv2", "layer2.1.bn1", "layer3"]
        runs = {}
        for key, network, x in (
            ("native", channels_last(copy.deepcopy(model)), channels_last(image())),
            ("exact", copy.deepcopy(model).double(), image().double()),
            ("accelerated", fastseg.accelerate(model), image()),
        ):
            with torch.no_grad():
                runs[key] = extraction.create_feature_extractor(network, names)(x)
        for name in names:
            assert_as_accurate(*(runs[key][name] for key in KEYS), name)

    def test_moves_and_casts(self, block):
        fastseg.accelerate(block)
        assert block.half().conv1.weight.dtype == torch.float16
        assert block.float().conv1.weight.is_contiguous(memory_format=torch.channels_last)
        assert predict(block.to("meta"), image().to("meta")).shape == (2, 8, 64, 64)

    def test_data_parallel_training(self, block, tmp_path):
        distributed = torch.distributed
        distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            fastseg.accelerate(block.train())
            twin = copy.deepcopy(block)
            parallel = nn.parallel.DistributedDataParallel(block)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                parallel(image()).sum().backward()
            twin(image()).sum().backward()
        finally:
            distributed.destroy_process_group()
        assert [str(w.message) for w in caught if "strides" in str(w.message)] == []
        for ours, theirs in zip(block.parameters(), twin.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)
