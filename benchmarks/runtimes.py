"""Other inference engines on the CPU, as baselines of whole networks: ONNX Runtime and OpenVINO.

Both read what torch.onnx exports of the native network, run it with as many threads as PyTorch does and in float32, and
pass the same gate as the other candidates. The extra "runtimes" installs them; without it their rows say so.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from benchmarks.row import Candidate, Skip

EXPORTERS = ("onnx", "onnxscript")
ENGINES = {"ONNX Runtime": "onnxruntime", "OpenVINO": "openvino"}


def candidates(workload) -> list[Candidate]:
    """One for each engine; `workload` is a benchmarks.modules.ModuleWorkload."""
    export = _Export(workload)
    return [
        Candidate("ONNX Runtime", "runtime", "NCHW", export.onnx_runtime, "onnxruntime"),
        Candidate("OpenVINO", "runtime", "NCHW", export.openvino, "openvino"),
    ]


class _Export:
    """A workload's network as an ONNX file, made when an engine first asks for it."""

    def __init__(self, workload):
        self.workload = workload

    def onnx_runtime(self, direction: str) -> Callable[[torch.Tensor], torch.Tensor]:
        engine = self._engine("ONNX Runtime", direction)
        options = engine.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = engine.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        (given,) = (value.name for value in session.get_inputs())

        def run(x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(session.run(None, {given: x.numpy()})[0])

        return run

    def openvino(self, direction: str) -> Callable[[torch.Tensor], torch.Tensor]:
        engine = self._engine("OpenVINO", direction)
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        core = engine.Core()
        compiled = core.compile_model(core.read_model(self.path), "CPU", settings)
        request = compiled.create_infer_request()

        def run(x: torch.Tensor) -> torch.Tensor:
            # The results' memory is the request's own: the next call writes over it.
            return torch.from_numpy(request.infer([x.numpy()], share_inputs=True)[0]).clone()

        return run

    def _engine(self, name: str, direction: str):
        if direction != "inference":
            raise Skip(f"{name} does not train")
        for module in (*EXPORTERS, ENGINES[name]):
            if importlib.util.find_spec(module) is None:
                raise Skip(f"{module} is not installed: pip install fastseg-kernels[runtimes]")
        return importlib.import_module(ENGINES[name])

    @cached_property
    def path(self) -> str:
        """Of the ONNX file; its folder goes with this object."""
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "network.onnx"
        network = _TensorOnly(self.workload.native("inference"))
        x = self.workload.inputs("inference")
        try:
            with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "onnx_ir"):
                warnings.simplefilter("ignore")
                torch.onnx.export(network, (x,), path, dynamo=True, verbose=False, optimize=True)
        except Exception as error:  # the exporter has many of its own
            raise Skip(f"torch.onnx cannot export it: {(str(error).splitlines() or [''])[0][:200]}") from error
        return str(path)


class _TensorOnly(nn.Module):
    """A network whose result is its logits, also where it gives a dict."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.network(x)
        return result["out"] if isinstance(result, dict) else result


@contextlib.contextmanager
def _quiet(*names: str):
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
