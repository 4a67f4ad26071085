"""Refusals: quick, named by source path, and true."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from edgesmith.compiler import testing
from edgesmith.compiler.diagnostics import Severity
from edgesmith.compiler.errors import UnsupportedError
from edgesmith.compiler.model import Model
from edgesmith.targets.onnxruntime import OnnxRuntime, export, support
from edgesmith.targets.onnxruntime.runner import Session

F = nn.functional


class Net(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.first, self.odd = nn.Linear(8, 8), Step(function)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.odd(self.first(x))


class Step(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


REFUSED = {
    "no conversion": lambda x: torch.cummax(x, -1)[0],
    "decomposes into what does not convert": lambda x: torch.linalg.svd(x)[1],
    "special function": torch.lgamma,
    "complex decomposition": lambda x: torch.linalg.solve(x @ x.mT + torch.eye(4), x),
}
ACCEPTED = {
    "composite": lambda x: F.adaptive_avg_pool2d(x[:, None], (3, 3)),
    "complex numbers": lambda x: torch.fft.rfft2(x).abs(),
    "a decomposition that writes in place": lambda x: x.quantile(0.3, -1),
    "half precision": lambda x: (x.half() @ x.half().mT).float(),
    "determinant": lambda x: torch.linalg.det(x @ x.mT),
}


@pytest.mark.alone
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_convert_is_named_with_its_source(name):
    model = Model.from_module(Net(REFUSED[name]), (torch.randn(2, 4, 8),))
    support.converted.cache_clear()
    support._decompositions.cache_clear()
    started = time.perf_counter()
    (refusal,) = OnnxRuntime().unsupported(model)
    assert time.perf_counter() - started < 1
    assert (refusal.severity, refusal.code, refusal.where) == (Severity.ERROR, support.CODE, "odd")
    with pytest.raises(UnsupportedError, match="does not convert to ONNX"):
        export.export(model)


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_converts_is_not_refused(name, tmp_path):
    model = Model.from_module(Net(ACCEPTED[name]), (torch.randn(2, 4, 8),))
    assert OnnxRuntime().unsupported(model) == ()
    Session(str(OnnxRuntime().lower(model, tmp_path).path), 1)


DTYPES = {
    "bfloat16": (torch.bfloat16, lambda x: x @ x.mT),
    "float64 convolution": (torch.float64, lambda x: F.conv1d(x, torch.ones(4, 4, 1, dtype=x.dtype))),
    "float64 gelu": (torch.float64, F.gelu),
}


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_without_a_kernel_are_refused_and_the_runtime_agrees(name, tmp_path):
    dtype, function = DTYPES[name]
    model = Model.from_module(Step(function), (torch.randn(2, 4, 8, dtype=dtype),))
    assert all(str(dtype) in refusal.message for refusal in OnnxRuntime().unsupported(model))
    assert OnnxRuntime().unsupported(model)
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        Session(str(OnnxRuntime().lower(model, tmp_path).path), 1)


@pytest.mark.parametrize("kind", [testing.TinyTransformer, testing.TinyConvNet])
def test_ordinary_models_are_not_refused(kind):
    assert OnnxRuntime().unsupported(testing.tiny_model(kind)) == ()


def test_the_table_is_the_exporters_own():
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    functions = ONNXRegistry.from_torchlib(export.OPSET).functions
    live = {"real": set(), "complex": set()}
    for name, conversions in functions.items():
        if isinstance(name, str) and name.startswith(("aten::", "prims::")):  # others come and go with what else is imported
            for conversion in conversions:
                live["complex" if conversion.is_complex else "real"].add(name)
    assert {kind: set(names) for kind, names in support.converted().items()} == live
