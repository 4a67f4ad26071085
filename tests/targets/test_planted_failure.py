"""Outlier channels that leave the float function as it is: the runtimes' own quantizers collapse, ours does not."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from digits_networks import CONTEXT, TEST, TRAIN, Rectified, Transformer, planted, trained_on_digits
from int8_peers import PEERS
from torch import nn

from edgesmith import Model, targets
from edgesmith.compiler.accuracy import outputs_of
from edgesmith.compiler.profile.session import open_session
from edgesmith.passes.quantize.equalise import Equalise
from edgesmith.passes.quantize.quantize import Quantize

pytestmark = pytest.mark.slow

ALLOWED_DROP = 0.005
COLLAPSE = 0.05
CALIBRATION = 128
STATIC = {"onnxruntime": "quantize_static", "litert": "static_wi8_ai8", "executorch": "PT2E"}
"""Each runtime's own quantizer, by its defaults."""


@cache
def trained(kind: type[nn.Module]) -> Model:
    return trained_on_digits(kind)


def top1(path: Path, target: str, *, foreign: bool = False) -> float:
    """Of the file in its runtime, on images that neither training nor calibration saw."""
    with open_session(path, targets[target].runner, extra=targets[target].extra, foreign=foreign) as session:
        (outputs,) = outputs_of(session, TEST)
    return float((outputs.argmax(1) == TEST.labels).mean())


@pytest.mark.parametrize("target", targets)
@pytest.mark.parametrize("factor", [2.0**6, 2.0**10])
@pytest.mark.parametrize("kind", [Rectified, Transformer])
def test_outlier_channels_cost_nothing_here_and_everything_elsewhere(kind: type[nn.Module], factor: float, target: str, tmp_path: Path) -> None:
    """Transformer: gains of layer norms times s, what they feed divided by s; Rectified: channels of depthwise convolutions likewise."""
    spoiled = planted(trained(kind), factor)
    x = torch.from_numpy(TEST.inputs[0])
    assert (spoiled(x) - trained(kind)(x)).abs().max() < 1e-3
    plain = targets[target].lower(spoiled, tmp_path, "float")
    exact = top1(plain.path, target)
    equal = Equalise(scheme="static").run(spoiled, CONTEXT).model
    ours = targets[target].lower(Quantize(scheme="static").run(equal, CONTEXT).model, tmp_path, "ours")
    assert top1(ours.path, target) >= exact - ALLOWED_DROP
    samples = tuple(array[:CALIBRATION] for array in TRAIN.inputs)
    theirs = PEERS[target][STATIC[target]](spoiled, plain, samples, tmp_path / f"theirs{targets[target].suffix}")
    if factor > 100:
        assert top1(theirs, target, foreign=True) < exact - COLLAPSE
