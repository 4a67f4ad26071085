"""The bars of per-operator times, on models that nobody here wrote and the digits transformer."""

import importlib.util
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.data import PassData, Split
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.profile.operator_types import Category
from edgesmith.compiler.profile.operators import profile_operators
from edgesmith.compiler.testing import randomise_norms
from edgesmith.passes.graph.fold_batch_norm import FoldBatchNorm
from edgesmith.passes.quantize.quantize import Quantize
from edgesmith.targets.litert import LiteRT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
DIGITS = Path(__file__).parents[2] / "examples" / "digits" / "model.py"


def digits():
    spec = importlib.util.spec_from_file_location("digits_model", DIGITS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.model(), (torch.randn(2, 1, 8, 8),)


def resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=16, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], layer_type="basic", num_labels=10)
    return ResNetForImageClassification(config), (torch.randn(2, 3, 96, 96),)


def mobilenet():
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.5, image_size=96, num_labels=10)), (torch.randn(2, 3, 96, 96),)


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=500, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512, max_position_embeddings=64, num_labels=5
    )
    return BertForSequenceClassification(config), (torch.randint(0, 500, (2, 32)), torch.ones(2, 32, dtype=torch.int64))


@pytest.fixture(scope="module", params=[digits, resnet, mobilenet, bert], ids=lambda kind: kind.__name__)
def model(request):
    torch.manual_seed(0)
    module, inputs = request.param()
    return FoldBatchNorm().run(Model.from_module(randomise_norms(module), inputs), PassContext()).model


@pytest.mark.alone
@pytest.mark.parametrize("scheme", ["float", "static", "dynamic"])
def test_operators_add_up_and_name_their_layers(model, scheme, tmp_path):
    if scheme != "float":
        samples = tuple(x.numpy() for x in model.example_inputs(16, seed=1))
        data = Split(samples, np.zeros(16, dtype=np.int64))
        model = Quantize(scheme=scheme, ranges="minmax", samples=16).run(model, PassContext(data=PassData(data, data))).model
    artifact = LiteRT().lower(model, tmp_path)
    profiles = [profile_operators(artifact, limit_s=3) for _ in range(3)]
    assert median(p.total_ms / p.whole_ms for p in profiles) == pytest.approx(1, abs=0.1)
    layers = {graphs.source(node) for node in graphs.operators(model.graph)}
    for operator in profiles[0].operators:
        assert set(operator.sources) <= layers
    assert min(p.sourced_share for p in profiles) >= 0.95
    categories = {operator.category for operator in profiles[0].operators}
    assert (Category.QUANTIZE in categories) == (scheme == "static")
