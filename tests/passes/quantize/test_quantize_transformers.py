"""Folds and quantization on models that nobody here wrote, built from small configurations with random weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.data import PassData, Split
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.quantplan import Scheme
from edgesmith.compiler.simulate import simulated
from edgesmith.compiler.testing import randomise_norms
from edgesmith.compiler.weighted import weighted
from edgesmith.passes.graph.fold_batch_norm import FoldBatchNorm
from edgesmith.passes.graph.fold_constants import FoldConstants
from edgesmith.passes.quantize.quantize import Quantize

transformers = pytest.importorskip("transformers")

RNG = np.random.default_rng(0)
IMAGES = (RNG.normal(size=(16, 3, 32, 32)).astype(np.float32),)
TEXT = (RNG.integers(0, 50, (16, 8)), np.repeat([[1] * 8, [1] * 5 + [0] * 3], 8, axis=0))


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.model(*inputs).logits


def bert() -> nn.Module:
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 16}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))


def vit() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))


def resnet() -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))


def mobilenet() -> nn.Module:
    return transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config(depth_multiplier=0.35, image_size=32))


@pytest.mark.parametrize(
    ("make", "inputs", "schemes", "floats"),
    [
        (bert, TEXT, {Scheme.DYNAMIC}, {"add", "layer_norm", "gelu"}),
        (vit, IMAGES, {Scheme.DYNAMIC, Scheme.STATIC}, {"add", "layer_norm", "gelu"}),
        (resnet, IMAGES, {Scheme.STATIC}, set()),
        pytest.param(mobilenet, IMAGES, {Scheme.STATIC}, {"pad"}, marks=pytest.mark.slow),
    ],
)
def test_a_foreign_model_folds_and_quantizes(make: Callable[[], nn.Module], inputs: tuple[np.ndarray, ...], schemes: set[Scheme], floats: set[str]) -> None:
    torch.manual_seed(0)
    tensors = tuple(torch.from_numpy(x) for x in inputs)
    model = Model.from_module(Logits(randomise_norms(make().eval())), tuple(x[:2] for x in tensors))
    split = Split(inputs, np.zeros(len(inputs[0]), np.int64))
    ctx = PassContext(data=PassData(split, split))
    wanted = model(*tensors)
    folded = FoldConstants().run(FoldBatchNorm().run(model, ctx).model, ctx).model
    assert (folded(*tensors) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    operators = {str(n.target).split(".")[1] for n in graphs.operators(folded.graph) if "." in str(n.target)}
    assert not operators & {"batch_norm", "dropout", "t"}
    plan = Quantize().run(folded, ctx).model.quant
    assert plan is not None
    products = {plan.scheme(n.name) for n in graphs.operators(folded.graph) if weighted(n)}
    assert products == schemes
    stay = {str(n.target).split(".")[1] for n in graphs.operators(folded.graph) if plan.scheme(n.name) is Scheme.FLOAT and "." in str(n.target)}
    assert (stay == floats) if schemes == {Scheme.STATIC} else (stay >= floats)
    signal = folded(*tensors)
    for scheme in ("auto", "static", "dynamic"):
        quantized = Quantize(scheme=scheme).run(folded, ctx).model
        assert (simulated(quantized)(*tensors) - signal).square().mean() < 0.02 * signal.square().mean()
