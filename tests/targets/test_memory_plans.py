"""Plans of memory against what the kernel counts, on the real runtimes; and files that are not planned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgesmith.compiler import registry
from edgesmith.compiler.data import Data, Split
from edgesmith.compiler.errors import UnsupportedError, UserError
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.pipeline import Pipeline
from edgesmith.compiler.profile.memory import measure_memory

TARGETS = registry.target_names()
SHAPE = (3, 64, 64)
WITHIN, PAGES_BYTES = 0.10, 100_000


class Net(nn.Module):
    """Some of everything that memory is spent on: 4 MB of activations and scratch, 5 MB of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64, stride=2)
        self.point = nn.Conv2d(64, 64, 1)
        self.hidden, self.wide, self.head = nn.Linear(64, 1000), nn.Linear(1000, 1000), nn.Linear(1000, 250)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.stem(x))))
        x = (x + self.point(x)).mean((2, 3))
        out: torch.Tensor = self.head(torch.relu(self.wide(torch.relu(self.hidden(x)))))
        return out


def samples(count: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model.from_module(Net().eval(), (torch.from_numpy(samples(2)),))


@pytest.fixture(scope="module", params=["float", pytest.param("INT8", marks=pytest.mark.slow)])
def compressed(request: pytest.FixtureRequest, model: Model) -> Model:
    if request.param == "float":
        return model
    split = Split((samples(16),), np.arange(16) % 4)
    return Pipeline.parse("quantize{samples=16}").run(model, PassContext(data=Data(split, split, split).for_passes()))


@pytest.mark.parametrize("name", TARGETS)
def test_a_plan_is_what_the_kernel_counts(compressed: Model, name: str, tmp_path: Path) -> None:
    target = registry.target(name)
    path = target.lower(compressed, tmp_path).path
    memory = measure_memory(path, target, 1, (samples(2)[:, None],))
    assert memory is not None and memory.plan is not None
    for planned, counted in ((memory.plan.dirty_bytes, memory.dirty_at("steady").value), (memory.plan.total_bytes, memory.held_bytes.value)):
        assert planned == pytest.approx(counted, rel=WITHIN, abs=PAGES_BYTES), memory.plan
    assert memory.dirty_bytes.high == pytest.approx(memory.dirty_bytes.low, rel=0.03), "two processes agree"
    assert memory.plan.packed_bytes > 0.9 * sum(t.numel() for t in model_tensors(compressed)) * (4 if compressed.quant is None else 1)


def model_tensors(model: Model) -> list[torch.Tensor]:
    return [p for p in model.graph.parameters() if p.ndim > 1]


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_no_file_of_the_runtime_is_the_users_to_mend(tmp_path: Path, name: str) -> None:
    target = registry.target(name)
    path = tmp_path / f"model{target.suffix}"
    path.write_bytes(b"not a model at all" * 100)
    with pytest.raises(UserError, match="model"):
        target.memory_plan(path)


def test_sizes_that_are_not_known_are_not_planned(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    x, y = (helper.make_tensor_value_info(n, kind, ["batch", 3]) for n in "xy")
    onnx.save(helper.make_model(helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match="cannot be planned"):
        registry.target("onnxruntime").memory_plan(tmp_path / "m.onnx")


def test_control_flow_is_not_planned(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto
    out = helper.make_tensor_value_info("z", kind.FLOAT, [1])
    branch = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "b", [], [out])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    ports = [helper.make_tensor_value_info("c", kind.BOOL, []), helper.make_tensor_value_info("x", kind.FLOAT, [1])]
    onnx.save(helper.make_model(helper.make_graph([node], "g", ports, [helper.make_tensor_value_info("y", kind.FLOAT, [1])])), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match="control flow"):
        registry.target("onnxruntime").memory_plan(tmp_path / "m.onnx")
