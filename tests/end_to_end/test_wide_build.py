"""A build whose largest operators read an outlier and whose float file is too large: no int8 form, no mixture is accurate, int16 activations are."""

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

LEVEL = 300.0

def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))
    with torch.no_grad():
        for layer, reader in ((net[0], net[2]), (net[2], net[4])):
            layer.bias[0] += LEVEL
            reader.bias -= LEVEL * reader.weight[:, 0]
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
name = "litert"

[pipeline]
passes = ["quantize{samples=64}"]
""",
}


@pytest.mark.slow
def test_activations_are_widened_where_no_int8_form_keeps_the_accuracy(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    built = edgesmith.build(tmp_path / "edgesmith.toml", out=tmp_path / "out")
    assert built.exit_code == 0, built.to_json()
    (found,) = json.loads((tmp_path / "out" / "report.json").read_text())["targets"]
    forms = {form["name"]: form for form in found["ruling"]["forms"]}
    assert found["ruling"]["chosen"] == "static16x8"
    assert forms["float"]["size_bytes"] > 700_000 > forms["static16x8"]["size_bytes"]
    assert all(form["accuracy"] is None or form["accuracy"] < 0.9 for name, form in forms.items() if name not in {"float", "static16x8"})
    assert forms["static16x8"]["accuracy"] >= 0.94 and forms["static16x8"]["schemes"]["2"] == "static16x8"
