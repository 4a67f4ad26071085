"""The files of a build whose float file is too large and whose network is spoiled, without changing its function, so that int8 loses."""

from __future__ import annotations

from pathlib import Path

_NET = """
import numpy as np
import torch
from torch import nn
from edgesmith import Data, Split

def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10))
    with torch.no_grad():
        SPOIL
    return net

def data():
    x = np.random.default_rng(0).standard_normal((1200, 64)).astype(np.float32)
    with torch.no_grad():
        y = model()(torch.from_numpy(x)).argmax(1).numpy()
    return Data(*(Split((x[part::3],), y[part::3]) for part in range(3)))
"""
_BUILD = """
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
"""


def spoiled_build(folder: Path, spoil: tuple[str, ...], target: str) -> Path:
    """Write the network, which the lines ``spoil`` change, and the build file for ``target``; the latter's path."""
    (folder / "net.py").write_text(_NET.replace("SPOIL", "\n        ".join(spoil)))
    file = folder / "edgesmith.toml"
    file.write_text(_BUILD.replace("TARGET", target))
    return file
