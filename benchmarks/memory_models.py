"""The models that benchmarks/memory.py measures: random weights (memory does not depend on them), 0.1 to 100 MB, float and INT8."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgesmith.compiler import registry
from edgesmith.compiler.data import Array, Data, Split
from edgesmith.compiler.frontends.model_source import only_logits
from edgesmith.compiler.instruments import fixed_inputs
from edgesmith.compiler.lowering import Lowering
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.pipeline import Pipeline
from edgesmith.compiler.testing import randomise_norms

DIGITS = Path(__file__).parents[1] / "examples" / "digits" / "model.py"
FLOAT = "fold-batch-norm,fold-constants"
INT8 = f"{FLOAT},quantize{{samples=32}}"
CALIBRATION = 32


class Sentences(nn.Module):
    """A text model of Hugging Face, called by position."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Ids and mask [batch, tokens] -> logits [batch, classes]."""
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def digits() -> nn.Module:
    """The digits transformer of examples/digits: 0.34 M parameters."""
    spec = importlib.util.spec_from_file_location("digits_model", DIGITS)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: nn.Module = module.model()
    return made


def resnet() -> nn.Module:
    """A ResNet-18: 11 M parameters."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10))


def mobilenet() -> nn.Module:
    """A MobileNetV2 of full width: 2.2 M parameters."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    return MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=10))


def bert() -> nn.Module:
    """Four layers of 512: 17 M parameters, 4 M of them the embedding of words."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048, vocab_size=8000, num_labels=5)
    return Sentences(BertForSequenceClassification(config))


def vit_of(width: int, depth: int, heads: int) -> nn.Module:
    """A ViT of patches of 16 pixels."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width, num_labels=10)
    return ViTForImageClassification(config)


def vit() -> nn.Module:
    """A ViT-Small: 22 M parameters."""
    return vit_of(384, 12, 6)


def images(*shape: int) -> Callable[[int], tuple[Array, ...]]:
    """Normal floats of ``shape``."""
    return lambda count: (np.random.default_rng(0).normal(size=(count, *shape)).astype(np.float32),)


def sentences(count: int) -> tuple[Array, ...]:
    """Ids of 64 tokens, and masks."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 8000, (count, 64)), (np.arange(64) < rng.integers(16, 65, count)[:, None]).astype(np.int64)


@dataclass(frozen=True)
class Case:
    """One model and the passes that it goes through."""

    make: Callable[[], nn.Module]
    samples: Callable[[int], tuple[Array, ...]]
    passes: str


CASES: dict[str, Case] = {
    "digits ViT, float": Case(digits, images(1, 8, 8), FLOAT),
    "digits ViT, INT8": Case(digits, images(1, 8, 8), INT8),
    "MobileNetV2, float": Case(mobilenet, images(3, 224, 224), FLOAT),
    "MobileNetV2, INT8": Case(mobilenet, images(3, 224, 224), INT8),
    "ResNet-18, INT8": Case(resnet, images(3, 128, 128), INT8),
    "BERT, float": Case(bert, sentences, FLOAT),
    "BERT, INT8": Case(bert, sentences, INT8),
    "ViT-S/16, float": Case(vit, images(3, 224, 224), FLOAT),
}


def artifact(name: str, target: str, folder: Path) -> Path:
    """The file of a case for ``target``, in ``folder``; made when it is not there yet."""
    case, chosen = CASES[name], registry.target(target)
    path = folder / f"{name.replace(', ', '-').replace(' ', '-').replace('/', '-').lower()}{chosen.suffix}"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        arrays = case.samples(CALIBRATION)
        split = Split(arrays, np.arange(CALIBRATION) % 5)
        ctx = PassContext(data=Data(split, split, split).for_passes())
        model = only_logits(Model.from_module(randomise_norms(case.make()).eval(), tuple(torch.from_numpy(a[:2]) for a in arrays)))
        model = Pipeline.parse(case.passes).run(model, ctx)
        Lowering(folder / "cache", fixed_inputs(model, ctx, 2)).artifact(model, chosen).path.replace(path)
    return path
