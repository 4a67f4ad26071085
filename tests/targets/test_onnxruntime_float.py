"""Float files: they agree with PyTorch, keep names, order and dtypes, and are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgesmith.compiler import testing
from edgesmith.compiler.errors import OutputError, UnsupportedError
from edgesmith.compiler.model import Model
from edgesmith.targets.onnxruntime import OnnxRuntime, export
from edgesmith.targets.onnxruntime.runner import Session

F = nn.functional
IMAGES = (torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)),)
AGREEMENT = 1e-5
"""Relative to the largest output; float32 sums of a few hundred terms in another order differ by about 1e-6."""


def differences(model: Model, path: Path, inputs: tuple[torch.Tensor, ...]) -> list[float]:
    """Largest difference of each output between the graph and the file, relative to the output's largest magnitude."""
    one = tuple(x[:1] for x in inputs)
    expected = model(*one)
    expected = expected if isinstance(expected, tuple) else (expected,)
    given = Session(str(path), 1).run([x.numpy() for x in one])
    assert [(g.shape, str(g.dtype)) for g in given] == [(tuple(e.shape), str(e.dtype).removeprefix("torch.")) for e in expected]
    return [float((torch.from_numpy(np.array(g)) - e).abs().max() / e.abs().max()) for g, e in zip(given, expected, strict=True)]


class BasicBlock(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        self.down = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu_(self.bn1(self.conv1(x)))
        return torch.relu_(self.bn2(self.conv2(y)) + self.down(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.layers = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 16, 2))
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(torch.relu(self.bn(self.stem(x))), 3, 2, 1)
        return self.head(F.adaptive_avg_pool2d(self.layers(x), 1).flatten(1))


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.first = function, nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.first(x))


def causal_mask() -> torch.Tensor:
    return torch.ones(2, 1, 4, 4).tril().bool()


def heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(x.shape[0], 4, 2, 4).transpose(1, 2)


def joined(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], 4, -1)


FUNCTIONS = {
    "attention over three dimensions": lambda x: F.scaled_dot_product_attention(x, x, x),
    "attention over five dimensions": lambda x: F.scaled_dot_product_attention(x[:, None, None], x[:, None, None].expand(-1, 2, 3, -1, -1), x[:, None, None]),
    "masked attention over five dimensions": lambda x: F.scaled_dot_product_attention(
        x[:, None, None], x[:, None, None].expand(-1, 2, 3, -1, -1), x[:, None, None], attn_mask=causal_mask()
    ),
    "causal attention with a scale": lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True, scale=0.3),
    "heads joined after attention with a bias that gradients reach": lambda x: joined(
        F.scaled_dot_product_attention(*[heads(x)] * 3, attn_mask=(x @ x.mT)[:, None])
    ),
    "view of a transposed tensor": lambda x: F.hardtanh(x.mT).view(x.shape[0], 2, 4, 4),
}


@pytest.mark.parametrize("kind", [testing.TinyTransformer, testing.TinyConvNet])
def test_the_target_keeps_its_contract(kind, tmp_path):
    testing.check_target(OnnxRuntime(), folder=tmp_path, model=testing.tiny_model(kind))


def test_a_residual_network_agrees_with_pytorch(tmp_path):
    torch.manual_seed(0)
    model = Model.from_module(testing.randomise_norms(ResNet()), IMAGES)
    artifact = OnnxRuntime().lower(model, tmp_path)
    assert max(differences(model, artifact.path, IMAGES)) < AGREEMENT
    assert artifact.sha256 == hashlib.sha256(artifact.path.read_bytes()).hexdigest()
    assert artifact.diagnostics == ()
    assert set(artifact.built_with) == {"torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime"}


def hugging_face(kind: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    options = {
        "ViT": {"image_size": 32, "patch_size": 8, **small},
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        "MobileNetV2": {"depth_multiplier": 0.25, "image_size": 32},
        "Bert": {"vocab_size": 50, "max_position_embeddings": 32, **small},
    }
    config = getattr(transformers, f"{kind}Config")(**options[kind])
    torch.manual_seed(0)
    if kind == "Bert":
        mask = torch.ones(2, 12, dtype=torch.int64)
        mask[:, 9:] = 0
        return testing.randomise_norms(transformers.BertForSequenceClassification(config)), (torch.randint(0, 50, (2, 12)), mask)
    return testing.randomise_norms(getattr(transformers, f"{kind}ForImageClassification")(config)), IMAGES


@pytest.mark.parametrize("kind", [pytest.param("ViT", marks=pytest.mark.slow), "ResNet", pytest.param("MobileNetV2", marks=pytest.mark.slow), "Bert"])
def test_models_that_nobody_here_wrote_agree_with_pytorch(kind, tmp_path):
    module, inputs = hugging_face(kind)
    model = Model.from_module(module, inputs)
    assert OnnxRuntime().unsupported(model) == ()
    artifact = OnnxRuntime().lower(model, tmp_path)
    assert max(differences(model, artifact.path, inputs)) < AGREEMENT
    session = Session(str(artifact.path), 1)
    assert [(i["name"], i["dtype"], tuple(i["shape"])) for i in session.inputs] == [(s.name, s.dtype, s.at_batch(1)) for s in model.inputs]
    assert [(o["name"], o["dtype"], tuple(o["shape"])) for o in session.outputs] == [(s.name, s.dtype, s.at_batch(1)) for s in model.outputs]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forms_that_the_exporter_refuses_are_rewritten(name, tmp_path):
    inputs = (torch.randn(2, 4, 8),)
    model = Model.from_module(Function(FUNCTIONS[name]), inputs)
    assert max(differences(model, OnnxRuntime().lower(model, tmp_path).path, inputs)) < AGREEMENT


def test_zeros_around_negative_numbers_stay_the_largest(tmp_path):
    """ONNX Runtime would let the pool pad, with what is less than all numbers."""
    inputs = (torch.rand(2, 3, 8, 8),)
    model = Model.from_module(Function(lambda x: nn.functional.max_pool2d(nn.functional.pad(-1 - x.abs(), (1, 1, 1, 1)), 3, 2)), inputs)
    assert model(*inputs).max() == 0
    assert max(differences(model, OnnxRuntime().lower(model, tmp_path).path, inputs)) < AGREEMENT


class Awkward(nn.Module):
    """An input that shares its name with an operator, an input nobody reads, and an output given twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, linear: torch.Tensor, unused: torch.Tensor, output: torch.Tensor):
        hidden = torch.relu(self.a(linear) + output)
        return {"linear_1": self.b(hidden), "again": hidden, "same": hidden}


def test_names_that_clash_and_inputs_that_nobody_reads_are_kept(tmp_path):
    inputs = (torch.randn(2, 8), torch.randn(2, 8), torch.randn(2, 8))
    model = Model.from_module(Awkward(), inputs)
    path = OnnxRuntime().lower(model, tmp_path).path
    assert max(differences(model, path, inputs)) < AGREEMENT
    session = Session(str(path), 1)
    assert [i["name"] for i in session.inputs] == [s.name for s in model.inputs]
    assert [o["name"] for o in session.outputs] == [s.name for s in model.outputs]


def test_the_same_model_gives_the_same_bytes_and_nothing_of_this_machine(tmp_path):
    model = testing.tiny_model()
    first, second = (OnnxRuntime().lower(model, tmp_path, stem) for stem in ("a", "b"))
    assert first.sha256 == second.sha256
    content = first.path.read_bytes()
    assert str(Path.cwd()).encode() not in content
    assert Path(torch.__file__).parent.as_posix().encode() not in content


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        OnnxRuntime().lower(testing.tiny_model(), tmp_path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_weights_beyond_one_file_are_refused(monkeypatch):
    monkeypatch.setattr(export, "MAX_BYTES", 1000)
    with pytest.raises(UnsupportedError, match="MB"):
        export.export(testing.tiny_model())


def test_lowering_says_nothing(tmp_path):
    code = (
        "from pathlib import Path; from edgesmith.compiler import testing; from edgesmith.targets.onnxruntime import OnnxRuntime;"
        f"OnnxRuntime().lower(testing.tiny_model(), Path({str(tmp_path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == ""


def test_importing_the_target_imports_no_converter_and_no_runtime():
    loaded = testing.imported_by("import edgesmith.targets.onnxruntime")
    assert not loaded & {"onnx", "onnx_ir", "onnxscript", "onnxruntime"}
