"""A build whose every INT8 form loses the accuracy that is asked, and whose float file is too large: the operators' schemes are mixed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import edgesmith

FILES = {
    "net.py": """
import numpy as np
import torch
from torch import nn
from edgesmith import Data, Split

def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))
    with torch.no_grad():
        net[2].bias[0] = 1.0
        net[2].weight[0] *= 1024
        net[2].bias[0] *= 1024
        net[4].weight[:, 0] /= 1024
    return net

def data():
    x = np.random.default_rng(0).standard_normal((1200, 64)).astype(np.float32)
    with torch.no_grad():
        y = model()(torch.from_numpy(x)).argmax(1).numpy()
    return Data(*(Split((x[part::3],), y[part::3]) for part in range(3)))
""",
    "edgesmith.toml": """
[model]
source = "net.py:model"
inputs = [{ name = "input", shape = [64] }]

[data]
source = "net.py:data"

[accuracy]
max_drop = 0.06

[budget]
size_mb = 0.7

[[target]]
name = "TARGET"

[pipeline]
passes = ["quantize{samples=64}"]
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("target", edgesmith.targets)
def test_the_operator_that_an_outlier_spoils_stays_float(tmp_path: Path, target: str) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text.replace("TARGET", target))
    built = edgesmith.build(tmp_path / "edgesmith.toml", out=tmp_path / "out")
    assert built.exit_code == 0, built.to_json()
    (found,) = json.loads((tmp_path / "out" / "report.json").read_text())["targets"]
    forms = {form["name"]: form for form in found["ruling"]["forms"]}
    assert found["ruling"]["chosen"] == "mixed"
    assert forms["float"]["size_bytes"] > 700_000 > forms["mixed"]["size_bytes"]
    assert all(form["accuracy"] < 0.8 for name, form in forms.items() if name not in {"float", "mixed"})
    assert forms["mixed"]["accuracy"] >= 0.94
    assert forms["mixed"]["schemes"]["4"] == "float" and forms["mixed"]["schemes"]["2"] != "float"
