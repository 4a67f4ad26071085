"""The room with the runtimes that ship: a file of known weights, and files that are none."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from edgesmith.compiler import registry
from edgesmith.compiler.budget import Budget, Verdict
from edgesmith.compiler.errors import DataError, UserError
from edgesmith.compiler.profile.protocol import measure
from edgesmith.compiler.profile.session import open_session
from edgesmith.compiler.profile.verdicts import judge

SIZE = 1500


@pytest.fixture(scope="module")
def matmul(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """An .onnx of one product with 9 MB of weights."""
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    w = np.random.default_rng(0).standard_normal((SIZE, SIZE)).astype(np.float32)
    x, y = (helper.make_tensor_value_info(name, kind, [1, SIZE]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "product", [x], [y], [onnx.numpy_helper.from_array(w, "w")])
    path = tmp_path_factory.mktemp("onnx") / "product.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path, w


@pytest.mark.alone
def test_a_file_is_measured_and_its_weights_are_seen_in_memory(matmul: tuple[Path, np.ndarray]) -> None:
    path, w = matmul
    profile = measure(path, threads=1)
    assert profile.memory is not None
    assert w.nbytes <= profile.memory.dirty_bytes.low
    assert profile.memory.dirty_bytes.high < 1.1 * w.nbytes
    assert profile.memory.dirty_bytes.high == pytest.approx(profile.memory.dirty_bytes.low, rel=0.03), "two processes agree"
    assert profile.latency_ms(50).value < profile.latency_ms(90).value < profile.latency_ms(99).value
    findings = judge(Budget(latency_ms=60_000, memory_mb=8, size_mb=8), profile, path.stat().st_size)
    assert [finding.verdict for finding in findings] == [Verdict.MET, Verdict.MISSED, Verdict.MISSED]


def test_its_outputs_are_the_arithmetic(matmul: tuple[Path, np.ndarray]) -> None:
    path, w = matmul
    x = np.random.default_rng(1).standard_normal((20, SIZE)).astype(np.float32)
    with open_session(path, registry.target("onnxruntime").runner) as session:
        (y,) = session.run((x,))
    # A sum of SIZE products of standard normals, each rounded to half a unit in the last place.
    np.testing.assert_allclose(y, x.astype(np.float64) @ w, rtol=0, atol=6 * np.sqrt(SIZE) * SIZE**0.5 * np.finfo(np.float32).eps)


def test_samples_of_a_wrong_shape_are_refused(matmul: tuple[Path, np.ndarray]) -> None:
    with pytest.raises(DataError, match=r"x takes samples of float32\[1500\] but was given float32\[3\]"):
        measure(matmul[0], samples=(np.zeros((2, 3), np.float32),))


@pytest.mark.parametrize("name", ["onnxruntime", "litert", "executorch"])
@pytest.mark.parametrize("content", [b"", b"not a model at all" * 100], ids=["empty", "garbage"])
def test_a_file_that_is_no_model_is_the_users_to_mend(tmp_path: Path, name: str, content: bytes) -> None:
    target = registry.target(name)
    if any(importlib.util.find_spec(module) is None for module in target.modules):
        pytest.skip(f"{target.extra} is not installed")
    path = tmp_path / f"model{target.suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"model{target.suffix} cannot be loaded"):
        measure(path)


def test_a_file_that_no_target_writes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"known suffixes: \.onnx, \.pte, \.tflite"):
        measure(tmp_path / "model.zip")


def foreign(path: Path, kind: str, shape: list[int | str]) -> Path:
    """An .onnx of one operator that gives what it takes."""
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    x, y = (helper.make_tensor_value_info(name, getattr(onnx.TensorProto, kind), shape) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "same", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.mark.parametrize("shape", [["batch", 3], [4, 3], [], [1], [2]], ids=str)
def test_a_call_takes_what_the_file_says(tmp_path: Path, shape: list[int | str]) -> None:
    path = foreign(tmp_path / "model.onnx", "FLOAT", shape)
    assert len(measure(path, limit_s=0.5).samples_ns) > 0
    sample = [size for size in shape if size not in {"batch", 1}]
    x = np.random.default_rng(0).standard_normal((3, *sample)).astype(np.float32)
    with open_session(path, registry.target("onnxruntime").runner) as session:
        (y,) = session.run((x,))
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize(
    ("kind", "shape", "says"),
    [("FLOAT", ["batch", "words"], r"input x has dimensions of no fixed size, \(None, None\)"), ("STRING", [1, 3], r"input x is tensor\(string\)")],
)
def test_inputs_that_nobody_can_make_up_are_refused(tmp_path: Path, kind: str, shape: list[int | str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        measure(foreign(tmp_path / "model.onnx", kind, shape))
