from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgesmith.compiler.errors import OutputError
from edgesmith.compiler.model import Model
from edgesmith.compiler.target import Artifact
from edgesmith.compiler.testing import TinyConvNet, TinyTransformer, tiny_model
from edgesmith.targets.executorch import ExecuTorch
from edgesmith.targets.executorch.runner import Session

RELATIVE = 1e-5
"""float32 sums of at most some hundred terms, in another order: sqrt(100) x 2^-24 per layer, some ten layers."""


def sequence() -> nn.Module:
    """Its tensors are called "0.weight" and so on."""
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


@pytest.fixture(scope="module", params=[lambda: TinyTransformer(depth=1), TinyConvNet, sequence], ids=["transformer", "convolutional", "sequence"])
def lowered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Artifact]:
    model = tiny_model(request.param)
    return model, ExecuTorch().lower(model, tmp_path_factory.mktemp("pte"), "net")


def relative(got: np.ndarray, wanted: torch.Tensor) -> float:
    return float(np.abs(got - wanted.numpy()).max() / wanted.abs().max())


def test_the_file_computes_what_the_graph_computes(lowered: tuple[Model, Artifact]) -> None:
    model, artifact = lowered
    session = Session(str(artifact.path), threads=1)
    for seed in range(5):
        inputs = model.example_inputs(1, seed)
        (output,) = session.run([x.numpy() for x in inputs])
        assert relative(output, model(*inputs)) < RELATIVE


def test_gelu_by_tanh_is_not_the_one_by_erf(tmp_path: Path) -> None:
    """They differ by up to 5e-4, most of all near 2.7."""
    x = torch.linspace(-4, 4, 64)[None]
    model = Model.from_module(nn.Sequential(nn.GELU(approximate="tanh")), (x,))
    (output,) = Session(str(ExecuTorch().lower(model, tmp_path, "net").path), threads=1).run([x.numpy()])
    assert relative(output, model(x)) < RELATIVE


def test_next_to_everything_is_delegated(lowered: tuple[Model, Artifact]) -> None:
    """A kernel between delegates copies tensors out and in again, and most of those kernels are not vectorised. Left is the mean of the tokens."""
    plan = forward_plan(lowered[1].path)
    assert {o.name for o in plan.operators} <= {"aten::mean"}
    assert len(plan.delegates) <= 2


def forward_plan(path: Path):
    from executorch.exir._serialize._program import deserialize_pte_binary

    program = deserialize_pte_binary(path.read_bytes())
    return next(p for p in getattr(program, "program", program).execution_plan if p.name == "forward")


def test_the_artifact_describes_its_file(lowered: tuple[Model, Artifact]) -> None:
    model, artifact = lowered
    content = artifact.path.read_bytes()
    assert artifact.path.name == "net.pte"
    assert (artifact.size_bytes, artifact.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert artifact.source_fingerprint == model.fingerprint
    assert {"executorch", "torch"} <= set(artifact.built_with)
    assert artifact.diagnostics == ()
    assert [p.name for p in artifact.path.parent.iterdir()] == ["net.pte"], "no temporary file is left"


def test_the_session_describes_its_tensors(lowered: tuple[Model, Artifact]) -> None:
    session = Session(str(lowered[1].path), threads=1)
    assert session.inputs == [{"name": lowered[0].inputs[0].name, "shape": [1, 1, 8, 8], "dtype": "float32"}]
    assert session.outputs == [{"name": "output", "shape": [1, 4], "dtype": "float32"}]
    assert session.runtime_version == lowered[1].built_with["executorch"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "0 inputs given, the file takes 1"),
        ([np.zeros((2, 1, 8, 8), np.float32)], r"float32\[2, 1, 8, 8\]"),
        ([np.zeros((1, 1, 8, 8), np.float64)], r"float64\[1, 1, 8, 8\]"),
    ],
)
def test_the_session_refuses_misfits(lowered: tuple[Model, Artifact], inputs: list[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Session(str(lowered[1].path), threads=1).run(inputs)


def test_the_session_sets_the_thread_pool(lowered: tuple[Model, Artifact]) -> None:
    from executorch.extension.pybindings import _portable_lib

    for threads in (2, 1):
        Session(str(lowered[1].path), threads)
        assert _portable_lib._threadpool_get_thread_count() == threads


def test_results_are_fresh_arrays(lowered: tuple[Model, Artifact]) -> None:
    model, artifact = lowered
    session = Session(str(artifact.path), threads=1)
    first = session.run([x.numpy() for x in model.example_inputs(1, 0)])[0]
    kept = first.copy()
    session.run([x.numpy() for x in model.example_inputs(1, 1)])
    np.testing.assert_array_equal(first, kept)


def test_a_truncated_file_is_refused(lowered: tuple[Model, Artifact], tmp_path: Path) -> None:
    broken = tmp_path / "broken.pte"
    content = lowered[1].path.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    with pytest.raises(RuntimeError):
        Session(str(broken), threads=1)


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setattr("edgesmith.targets.executorch.lower.serialised", lambda model: b"content")
    with pytest.raises(OutputError):
        ExecuTorch().lower(tiny_model(), blocked / "folder")
    assert blocked.read_text() == "in the way"
