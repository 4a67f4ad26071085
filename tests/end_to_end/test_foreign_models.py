"""Models that nobody here wrote go from module through prune and quantize to three artifacts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgesmith.compiler import registry
from edgesmith.compiler.capture import program_at
from edgesmith.compiler.data import Data, Split
from edgesmith.compiler.frontends.model_source import only_logits
from edgesmith.compiler.instruments import fixed_inputs
from edgesmith.compiler.lowering import Lowering
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.pipeline import Pipeline
from edgesmith.compiler.quantplan import Scheme
from edgesmith.compiler.testing import randomise_norms

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow


class WithMask(nn.Module):
    """A text model called by position."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8, num_labels=5)
    )


def resnet() -> nn.Module:
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=32, hidden_sizes=[96, 192], depths=[2, 2], layer_type="bottleneck", num_labels=5)
    )


def mobilenet() -> nn.Module:
    return transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.35, num_labels=5))


def bert() -> nn.Module:
    config = transformers.BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=100, num_labels=5)
    return WithMask(transformers.BertForSequenceClassification(config))


def images(count: int) -> tuple[np.ndarray, ...]:
    return (np.random.default_rng(0).normal(size=(count, 3, 32, 32)).astype(np.float32),)


def sentences(count: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 17, count)
    return rng.integers(0, 100, (count, 16)), (np.arange(16) < lengths[:, None]).astype(np.int64)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[np.ndarray, ...]]]] = {
    "ViTForImageClassification": (vit, images),
    "ResNetForImageClassification": (resnet, images),
    "MobileNetV2ForImageClassification": (mobilenet, images),
    "BertForSequenceClassification": (bert, sentences),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[Model, PassContext, nn.Module]:
    make, samples = MODELS[request.param]
    torch.manual_seed(0)
    module = randomise_norms(make()).eval()
    split = Split(samples(64), np.arange(64) % 5)
    model = only_logits(Model.from_module(module, tuple(torch.from_numpy(a) for a in samples(2))))
    return model, PassContext(data=Data(split, split, split).for_passes()), module


@pytest.mark.parametrize("name", registry.target_names())
def test_float_artifacts_agree_with_pytorch(case: tuple[Model, PassContext, nn.Module], name: str, tmp_path: Path) -> None:
    model, ctx, module = case
    inputs = fixed_inputs(model, ctx, 4)
    with torch.no_grad():
        expected = module(*inputs)
    expected = expected if isinstance(expected, torch.Tensor) else expected.logits
    torch.testing.assert_close(model(*inputs), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    artifact = Lowering(tmp_path, inputs).artifact(model, registry.target(name))  # refuses a difference above 1e-4
    assert artifact.size_bytes > 0


@pytest.mark.parametrize("name", registry.target_names())
def test_pruned_and_quantized_artifacts_keep_to_their_plan(case: tuple[Model, PassContext, nn.Module], name: str, tmp_path: Path) -> None:
    model, ctx, _ = case
    compressed = Pipeline.parse("prune{ratio=0.3,heads=0.4},fold-batch-norm,fold-constants,quantize{samples=64}").run(model, ctx)
    assert compressed.params < 0.85 * model.params
    assert compressed.quant is not None
    assert set(compressed.quant.ops.values()) - {Scheme.FLOAT}
    program_at(compressed)
    artifact = Lowering(tmp_path, fixed_inputs(model, ctx, 4)).artifact(compressed, registry.target(name))
    assert artifact.size_bytes < 4 * compressed.params
