"""Models that nobody here wrote, in float and in INT8."""

from pathlib import Path

import numpy as np
import pytest
import torch

from edgesmith.compiler.data import PassData, Split
from edgesmith.compiler.diagnostics import Severity
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.profile.session import open_session
from edgesmith.compiler.simulate import DynamicGrid, simulated
from edgesmith.compiler.testing import randomise_norms
from edgesmith.passes.graph.fold_batch_norm import FoldBatchNorm
from edgesmith.passes.quantize.quantize import Quantize
from edgesmith.targets.litert import LiteRT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8, num_labels=7)
    return ViTForImageClassification(config), (torch.randn(2, 3, 32, 32),)


def resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_labels=7)
    return ResNetForImageClassification(config), (torch.randn(2, 3, 32, 32),)


def mobilenet():
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25, image_size=64, num_labels=7)), (torch.randn(2, 3, 64, 64),)


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=16, num_labels=5
    )
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    return BertForSequenceClassification(config), (torch.randint(0, 99, (2, 12)), mask)


@pytest.fixture(scope="module", params=[vit, resnet, mobilenet, bert], ids=lambda kind: kind.__name__)
def model(request):
    torch.manual_seed(0)
    module, inputs = request.param()
    captured = Model.from_module(randomise_norms(module), inputs)
    return FoldBatchNorm().run(captured, PassContext()).model


def run(artifact, inputs):
    with open_session(artifact.path, LiteRT.runner, 1) as session:
        return session.run([x.numpy() for x in inputs])[0]


def test_the_float_file_agrees_with_pytorch(model: Model, tmp_path: Path):
    artifact = LiteRT().lower(model, tmp_path)
    inputs = model.example_inputs(4, seed=2)
    wanted = model(*inputs)
    wanted = (wanted[0] if isinstance(wanted, tuple) else wanted).numpy()
    # Sums of some hundred float32 terms, some tens of layers: 1e-5 of the largest output, ten times inside what is asked for.
    assert np.abs(run(artifact, inputs) - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("scheme", ["static", "dynamic", "auto"])
def test_the_int8_file_does_what_the_plan_says(model: Model, scheme: str, tmp_path: Path):
    calibration = tuple(x.numpy() for x in model.example_inputs(32, seed=1))
    data = Split(calibration, np.zeros(32, dtype=np.int64))
    quantized = Quantize(scheme=scheme, ranges="minmax", samples=32).run(model, PassContext(data=PassData(data, data))).model
    artifact = LiteRT().lower(quantized, tmp_path)
    assert [str(d) for d in artifact.diagnostics if d.severity is Severity.WARNING] == []
    inputs = model.example_inputs(8, seed=2)
    got, wanted, plain = run(artifact, inputs), simulated(quantized, DynamicGrid.ROW_ASYMMETRIC)(*inputs), quantized(*inputs)
    wanted, plain = (x[0] if isinstance(x, tuple) else x for x in (wanted, plain))

    def rms(x: torch.Tensor) -> float:
        return float(x.square().mean().sqrt())

    # What differs from the simulation is rounding beside ties; what the plan itself costs is a rounding of everything.
    assert rms(torch.from_numpy(got) - wanted) < rms(wanted - plain)
