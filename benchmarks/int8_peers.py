"""What each runtime's own quantizer makes of a float model, by its documented settings. For int8.py and the tests of planted failures."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgesmith.compiler.capture import program_at
from edgesmith.compiler.model import Model
from edgesmith.compiler.profile.devices import environment
from edgesmith.compiler.target import Artifact

Arrays = tuple[np.ndarray[Any, Any], ...]
Peer = Callable[[Model, Artifact, Arrays, Path], Path]
"""(float model, its artifact, calibration samples, where to write) -> the quantized file."""


def onnxruntime_static(model: Model, artifact: Artifact, samples: Arrays, path: Path, **settings: Any) -> Path:
    """``quantize_static`` in QDQ form after its pre-processing; the documentation advises uint8 activations, and reduce_range on x86 without VNNI."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows: Iterator[dict[str, np.ndarray[Any, Any]]] = _rows(model, samples)

        def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
            return next(self.rows, None)

    kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "reduce_range": "vnni" not in environment()["cpu_features"]}
    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(artifact.path), str(prepared), skip_symbolic_shape=True)
    quantize_static(str(prepared), str(path), Reader(), quant_format=QuantFormat.QDQ, **kinds, **settings)
    return path


def onnxruntime_dynamic(model: Model, artifact: Artifact, samples: Arrays, path: Path) -> Path:
    """``quantize_dynamic`` of matrix products; its convolutions are slower than float on every processor."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain, prepared = onnx.load(str(artifact.path)), path.with_suffix(".prepared.onnx")
    del plain.graph.value_info[:]  # it transposes weights and fails on a file that says what shape they had
    onnx.save(plain, str(prepared))
    quantize_dynamic(str(prepared), str(path), op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8)
    return path


def nncf(model: Model, artifact: Artifact, samples: Arrays, path: Path, *, python: Path, kind: str = "") -> Path:
    """NNCF by its defaults, run by ``python`` of an environment that has it; ``kind`` transformer, or nothing."""
    given = path.with_suffix(".npz")
    np.savez(given, **{spec.name: array for spec, array in zip(model.inputs, samples, strict=True)})
    command = [str(python), str(Path(__file__).with_name("int8_nncf.py")), str(artifact.path), str(given), str(path), *([kind] if kind else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "it failed")
    return path


def litert(model: Model, artifact: Artifact, samples: Arrays, path: Path, *, static: bool) -> Path:
    """ai-edge-quantizer by its recipe of this name; inputs and outputs stay float, as in all files here."""
    from ai_edge_quantizer import algorithm_manager, qtyping, quantizer, recipe

    tool = quantizer.Quantizer(str(artifact.path), recipe.static_wi8_ai8() if static else recipe.dynamic_wi8_afp32())
    statistics = None
    if static:
        from ai_edge_litert.interpreter import Interpreter

        for end in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
            tool.update_quantization_recipe(".*", end, algorithm_key=algorithm_manager.AlgorithmName.NO_QUANTIZE)
        (signature,) = Interpreter(str(artifact.path)).get_signature_list()
        statistics = tool.calibrate({signature: list(_rows(model, samples))})
    tool.quantize(statistics).export_model(str(path), overwrite=True)
    return path


def executorch(model: Model, artifact: Artifact, samples: Arrays, path: Path, *, per_channel: bool, dynamic: bool = False) -> Path:
    """XNNPACK's PT2E quantizer, prepared, calibrated and converted as its documentation has it."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    program, _ = program_at(model, batch=1)
    settings = get_symmetric_quantization_config(is_per_channel=per_channel, is_dynamic=dynamic)
    prepared = prepare_pt2e(program.module(), XNNPACKQuantizer().set_global(settings))
    rows = [tuple(torch.from_numpy(row[spec.name]) for spec in model.inputs) for row in _rows(model, samples)]
    for row in rows:
        prepared(*row)
    converted = torch.export.export(convert_pt2e(prepared), rows[0])
    path.write_bytes(to_edge_transform_and_lower(converted, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)
    return path


PEERS: Mapping[str, Mapping[str, Peer]] = {
    "onnxruntime": {
        "quantize_static": onnxruntime_static,
        "quantize_static, per channel": partial(onnxruntime_static, per_channel=True),
        "quantize_dynamic": onnxruntime_dynamic,
    },
    "litert": {"static_wi8_ai8": partial(litert, static=True), "dynamic_wi8_afp32": partial(litert, static=False)},
    "executorch": {
        "PT2E": partial(executorch, per_channel=False),
        "PT2E, per channel": partial(executorch, per_channel=True),
        "PT2E, dynamic": partial(executorch, per_channel=True, dynamic=True),
    },
}
"""Target -> name -> how it quantizes."""


def with_nncf(python: Path) -> dict[str, Mapping[str, Peer]]:
    """PEERS and NNCF, which writes for ONNX Runtime alone of the three."""
    own = {"NNCF": partial(nncf, python=python), "NNCF, transformer": partial(nncf, python=python, kind="transformer")}
    return {**PEERS, "onnxruntime": {**PEERS["onnxruntime"], **own}}


def _rows(model: Model, samples: Arrays) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """One sample after the other, by input name."""
    for number in range(len(samples[0])):
        yield {spec.name: np.ascontiguousarray(array[number : number + 1]) for spec, array in zip(model.inputs, samples, strict=True)}
