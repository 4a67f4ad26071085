"""Runs an .onnx file in ONNX Runtime on the CPU. One file: standard library, numpy and onnxruntime only."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int16)": "int16",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


class Session:
    """A loaded model.

    ``threads`` is the number of threads that one operator is split over; operators run one after another. Idle threads
    sleep instead of spinning: a spinning pool wins a little in a tight loop and costs a device's other work and battery,
    and on a machine with fewer free cores than threads it makes every run slower.

    8-bit products are summed exactly: without VNNI, x86 kernels for unsigned by signed bytes saturate at 16 bits, and
    ``session.x64quantprecision`` makes the runtime choose unsigned weights there. It changes nothing on other processors.
    """

    def __init__(self, path: str, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.x64quantprecision", "1")
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.runtime_version: str = onnxruntime.__version__
        self.inputs: list[dict[str, Any]] = [_described(i) for i in self._session.get_inputs()]
        self.outputs: list[dict[str, Any]] = [_described(o) for o in self._session.get_outputs()]
        self._names = [i["name"] for i in self.inputs]

    def run(self, inputs: list[npt.NDArray[np.generic]]) -> list[npt.NDArray[np.generic]]:
        """The outputs for ``inputs``, both in the order of ``inputs`` and ``outputs``; arrays of exactly their shapes and dtypes."""
        return list(self._session.run(None, dict(zip(self._names, inputs, strict=True))))


def _described(value: Any) -> dict[str, Any]:
    return {"name": value.name, "shape": list(value.shape), "dtype": _DTYPES[value.type]}
