"""int16 activations: what LiteRT makes of ``static16x8``, and what the other targets say."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgesmith import Model, Pipeline, targets
from edgesmith.compiler.data import Data, Split
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.profile.session import open_session
from edgesmith.compiler.quantplan import Scheme
from edgesmith.compiler.simulate import simulated
from edgesmith.targets.litert import LiteRT
from edgesmith.targets.litert.flatfile import FlatFile
from edgesmith.targets.litert.match import weight_of


class Small(nn.Module):
    """A convolution, what is to be tested, and another convolution that makes a static operator of it."""

    def __init__(self, middle: Callable[[torch.Tensor], torch.Tensor], inner: int = 8) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 8, 3, padding=1), middle, nn.Conv2d(inner, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x)))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu6(self.layer(x))


class Gate(nn.Module):
    """Squeeze and excite: a mean, two products by a weight, a sigmoid, a product."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        nn.init.constant_(self.down.bias, 2.0)  # a dead ReLU has a grid so fine that no bias fits beside it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


torch.manual_seed(0)
CASES = {
    "add": Small(lambda x: x + F.relu(x)),
    "concatenation": Small(lambda x: torch.cat([x, F.relu(x)], 1), 16),
    "depthwise": Small(Depthwise()),
    "gate": Small(Gate()),
    "max-pool": Small(lambda x: F.max_pool2d(x, 2)),
    "mean-pool": Small(lambda x: F.avg_pool2d(x, 2)),
    "relu": Small(F.relu),
    "tanh": Small(torch.tanh),
    "linear": nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 16), nn.ReLU(), nn.Linear(16, 4)),
    "outliers": nn.Sequential(nn.Conv2d(3, 8, 3), nn.Hardswish(), nn.Flatten(), nn.Linear(8 * 36, 4)),
}


def quantized(module: nn.Module, scheme: str) -> tuple[Model, Split]:
    """``module`` by ``scheme``, and images that calibration did not see."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(96, 3, 8, 8)).astype(np.float32)
    split = Split((images[:64],), np.zeros(64, np.int64))
    data = Data(split, split, split).for_passes()
    model = Model.from_module(module.eval(), (torch.from_numpy(images[:1]),))
    found = Pipeline.parse(f"quantize{{scheme={scheme}}}").run(model, PassContext(data=data))
    return found, Split((images[64:],), np.zeros(32, np.int64))


def outputs(model: Model, split: Split, target: str, folder: Path) -> np.ndarray:
    """What the file computes for ``split``."""
    artifact = targets[target].lower(model, folder)
    with open_session(artifact.path, targets[target].runner, 1) as session:
        return np.concatenate([session.run([x[None]])[0] for x in split.batch(slice(None))[0]])


@pytest.mark.parametrize("case", CASES)
def test_every_operator_computes_on_int16_what_the_plan_says(case: str, tmp_path: Path) -> None:
    """Within a step of the result, and what two steps of all that the last operator reads make there: values beside a tie move on the way."""
    model, split = quantized(CASES[case], "static16x8")
    assert set(model.quant.ops.values()) == {Scheme.STATIC16X8}
    seen = outputs(model, split, "litert", tmp_path)
    wanted = simulated(model)(torch.from_numpy(split.batch(slice(None))[0])).numpy()
    last = next(reversed([n for n in model.graph.graph.nodes if n.op == "call_function"]))
    read, weight = last.args[0].name, model.graph.get_parameter(last.args[1].target).detach()
    most = float(weight.abs().flatten(1).sum(1).max()) * 2 * model.quant.activations[read].scale16
    assert np.abs(seen - wanted).max() <= 1.001 * model.quant.activations[last.name].scale16 + most
    file = FlatFile((tmp_path / "model.tflite").read_bytes())
    for op in file.ops:
        if (weight := weight_of(op)) is not None:
            assert (op.inputs[0].dtype, weight.dtype, op.outputs[0].dtype) == (np.int16, np.int8, np.int16)


def test_int16_keeps_what_int8_loses(tmp_path: Path) -> None:
    """One channel, which nothing reads, is a thousand times the others: a grid of 256 steps has none left for these."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 36, 4))
    with torch.no_grad():
        module[0].weight[0] *= 1000
        module[2].weight[:, 0] = 0
    errors = {}
    for scheme in ("static", "static16x8"):
        model, split = quantized(module, scheme)
        with torch.no_grad():
            exact = module(torch.from_numpy(split.batch(slice(None))[0])).numpy()
        folder = tmp_path / scheme
        folder.mkdir()
        errors[scheme] = float(np.square(outputs(model, split, "litert", folder) - exact).sum() / np.square(exact).sum())
    assert errors["static"] > 0.1 and errors["static16x8"] < 1e-3


@pytest.mark.parametrize("name", ["onnxruntime", "executorch"])
def test_a_runtime_without_int16_says_so_and_computes_in_float(name: str, tmp_path: Path) -> None:
    model, _ = quantized(CASES["relu"], "static16x8")
    assert Scheme.STATIC16X8 not in targets[name].schemes and Scheme.STATIC16X8 in LiteRT.schemes
    remarks = targets[name].lower(model, tmp_path).diagnostics
    assert {r.where for r in remarks} >= {"first", "last"} and all("static16x8" in r.message and "int16" in r.message for r in remarks)
