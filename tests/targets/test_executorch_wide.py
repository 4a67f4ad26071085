"""Models that nobody here wrote, float and INT8, through the quantize pass's own plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgesmith.compiler.data import PassData, Split
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.simulate import DynamicGrid, simulated
from edgesmith.compiler.testing import randomise_norms
from edgesmith.passes.graph.fold_batch_norm import FoldBatchNorm
from edgesmith.passes.quantize.quantize import Quantize
from edgesmith.targets.executorch import ExecuTorch
from edgesmith.targets.executorch.runner import Session

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def hugging_face(name: str, config: str, **sizes: object) -> nn.Module:
    import transformers

    module = getattr(transformers, name)(getattr(transformers, config)(num_labels=5, **sizes))
    return randomise_norms(module).eval()


def vit() -> nn.Module:
    return hugging_face(
        "ViTForImageClassification", "ViTConfig", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )


def resnet() -> nn.Module:
    return hugging_face("ResNetForImageClassification", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")


def mobilenet() -> nn.Module:
    return hugging_face("MobileNetV2ForImageClassification", "MobileNetV2Config", depth_multiplier=0.25, image_size=32)


def bert() -> nn.Module:
    return hugging_face(
        "BertForSequenceClassification", "BertConfig", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=50
    )


def images(count: int, seed: int) -> tuple[np.ndarray, ...]:
    return (np.random.default_rng(seed).normal(size=(count, 3, 32, 32)).astype(np.float32),)


def sentences(count: int, seed: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 13, count)
    return rng.integers(0, 50, (count, 12)), (np.arange(12) < lengths[:, None]).astype(np.int64)


Data = Callable[[int, int], tuple[np.ndarray, ...]]
KINDS: dict[str, tuple[Callable[[], nn.Module], Data]] = {
    "vit": (vit, images),
    "resnet": (resnet, images),
    "mobilenet": (mobilenet, images),
    "bert": (bert, sentences),
}


@pytest.fixture(scope="module", params=KINDS)
def captured(request: pytest.FixtureRequest) -> tuple[Model, Data]:
    make, data = KINDS[request.param]
    torch.manual_seed(0)
    model = Model.from_module(make(), tuple(map(torch.from_numpy, data(2, 0))))
    return FoldBatchNorm().run(model, PassContext()).model, data


def compared(model: Model, wanted: Callable[..., torch.Tensor], data: Data, folder: Path) -> list[float]:
    """Per sample: the greatest difference of the file's outputs, relative to the greatest wanted one."""
    session = Session(str(ExecuTorch().lower(model, folder).path), threads=1)
    off = []
    for seed in range(1, 9):
        sample = list(data(1, seed))
        (got,) = session.run(sample)
        reference = wanted(*map(torch.from_numpy, sample)).numpy()
        off.append(float(np.abs(got - reference).max() / np.abs(reference).max()))
    return off


def test_float_files_agree(captured: tuple[Model, Data], tmp_path: Path) -> None:
    model, data = captured
    assert max(compared(model, model, data, tmp_path)) < 1e-5


@pytest.mark.parametrize("scheme", ["auto", "static", "dynamic"])
def test_int8_files_agree_with_the_simulated_plan(captured: tuple[Model, Data], scheme: str, tmp_path: Path) -> None:
    """A value next to a tie may take the other step, in each of the dozen layers: 1/255 of a range each, of which most average out.
    The median of eight samples stays within one such step, none strays by more than five."""
    model, data = captured
    split = Split(data(32, 0), np.zeros(32, np.int64))
    quantized = Quantize(scheme=scheme).run(model, PassContext(data=PassData(split, split)))
    if not quantized.changed:
        pytest.skip("nothing to quantize by this scheme")
    simulation = simulated(quantized.model, DynamicGrid.ROW_ASYMMETRIC)
    off = compared(quantized.model, simulation, data, tmp_path)
    assert np.median(off) < 1 / 255
    assert max(off) < 5 / 255
