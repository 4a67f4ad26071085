"""What INT8 costs on real images: small networks trained on handwritten digits, quantized and simulated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from digits_networks import CONTEXT, TEST, ConvNet, Rectified, Transformer, planted, trained_on_digits

from edgesmith.compiler.axes.rescale import rescaled
from edgesmith.compiler.errors import NumericsError
from edgesmith.compiler.instruments import NumericsCheck
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.quantplan import TensorRange
from edgesmith.compiler.simulate import DynamicGrid, simulated
from edgesmith.kernels.affine import activation_grid, ends
from edgesmith.passes.quantize import outliers
from edgesmith.passes.quantize.equalise import Equalise
from edgesmith.passes.quantize.quantize import Quantize

ALLOWED_DROP = 0.01
"""One point: 5 of 497 images."""


@pytest.fixture(scope="module", params=[ConvNet, Transformer])
def trained(request: pytest.FixtureRequest) -> Model:
    model = trained_on_digits(request.param)
    assert accuracy(model) > 0.93
    return model


def accuracy(model: Model, dynamic: DynamicGrid = DynamicGrid.ROW_ASYMMETRIC) -> float:
    """Top-1 on images that neither training nor calibration saw, as the plan says it runs."""
    predicted = simulated(model, dynamic)(torch.from_numpy(TEST.inputs[0])).argmax(1).numpy()
    return float((predicted == TEST.labels).mean())


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("scheme", ["auto", "static"])
def test_accuracy_is_kept(trained: Model, scheme: str, ranges: str) -> None:
    quantized = Quantize(scheme=scheme, ranges=ranges).run(trained, CONTEXT).model
    assert accuracy(quantized) >= accuracy(trained) - ALLOWED_DROP


@pytest.mark.parametrize("dynamic", DynamicGrid)
def test_accuracy_is_kept_by_every_kind_of_dynamic_grid(trained: Model, dynamic: DynamicGrid) -> None:
    quantized = Quantize(scheme="dynamic").run(trained, PassContext()).model
    assert accuracy(quantized, dynamic) >= accuracy(trained) - ALLOWED_DROP


def test_a_broken_range_is_seen(trained: Model) -> None:
    """The twin of the test above: ranges 64 times too wide, or too narrow, cost more than what is allowed."""
    quantized = Quantize(scheme="static").run(trained, CONTEXT).model
    assert quantized.quant is not None
    for factor in (64.0, 1 / 64):
        broken = {k: TensorRange(*ends(activation_grid(r.low * factor, r.high * factor)), "broken") for k, r in quantized.quant.activations.items()}
        spoiled = replace(quantized, quant=replace(quantized.quant, activations=broken))
        assert accuracy(spoiled) < accuracy(trained) - ALLOWED_DROP


@pytest.mark.parametrize("scheme", ["auto", "static", "dynamic"])
@pytest.mark.parametrize("factor", [64.0, 1024.0])
@pytest.mark.parametrize("trained", [Rectified, Transformer], indirect=True)
def test_planted_outlier_channels_are_seen_and_equalised(trained: Model, factor: float, scheme: str) -> None:
    """The float function is unchanged, but a grid for the whole tensor has little left for the other channels, and one for a row of weights for theirs."""
    spoiled = planted(trained, factor)
    x = torch.from_numpy(TEST.inputs[0])
    assert (spoiled(x) - trained(x)).abs().max() < 1e-3
    equal = Equalise(scheme=scheme).run(spoiled, CONTEXT).model
    naive, ours = (Quantize(scheme=scheme, ranges="minmax").run(model, CONTEXT).model for model in (spoiled, equal))
    assert accuracy(ours) >= accuracy(trained) - 0.005
    if factor > 100 and scheme == "static":
        assert accuracy(naive) < accuracy(trained) - 0.05


@pytest.mark.parametrize("trained", [Transformer], indirect=True)
def test_a_wrong_rescaling_stops_the_pass(trained: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outliers, "rescaled", lambda graph, stretch, scales: rescaled(graph, replace(stretch, read=()), scales))
    spoiled = planted(trained, 1024.0)
    with pytest.raises(NumericsError):
        NumericsCheck().around(Equalise(), spoiled, CONTEXT, lambda: Equalise().run(spoiled, CONTEXT))


def test_the_same_seed_gives_the_same_plan_and_another_seed_another(trained: Model) -> None:
    plans = [Quantize(scheme="static", samples=32).run(trained, replace(CONTEXT, seed=seed)).model.quant for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
