"""Runs a ``.tflite`` file. Needs the standard library, numpy and ai-edge-litert; nothing of edgesmith."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter


class Session:
    """One loaded file.

    Args:
        path: the ``.tflite`` file.
        threads: number of threads of the runtime.

    ``inputs`` and ``outputs`` are in the file's own order: ``{"name", "shape", "dtype"}`` with numpy's name of the dtype.
    """

    def __init__(self, path: str, threads: int) -> None:
        self.runtime_version: str = version("ai-edge-litert")
        self._interpreter: Any = Interpreter(model_path=str(path), num_threads=threads)
        self._interpreter.allocate_tensors()
        self._in: list[dict[str, Any]] = self._interpreter.get_input_details()
        self._out: list[dict[str, Any]] = self._interpreter.get_output_details()
        signature: dict[str, Any] = next(iter(self._interpreter._get_full_signature_list().values()), {"inputs": {}, "outputs": {}})
        self.inputs: list[dict[str, Any]] = _described(self._in, signature["inputs"])
        self.outputs: list[dict[str, Any]] = _described(self._out, signature["outputs"])

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """The outputs for ``inputs``, both in the file's order.

        Raises:
            ValueError: the number, a shape or a dtype of ``inputs`` is not the file's.
        """
        for detail, value in zip(self._in, inputs, strict=True):
            self._interpreter.set_tensor(detail["index"], value)
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(detail["index"]) for detail in self._out]


def _described(details: list[dict[str, Any]], signature: dict[str, int]) -> list[dict[str, Any]]:
    names: dict[int, list[str]] = {}
    for name, index in signature.items():
        names.setdefault(index, []).append(name)
    return [
        {
            "name": names[d["index"]].pop(0) if names.get(d["index"]) else d["name"],
            "shape": [int(size) for size in d["shape"]],
            "dtype": np.dtype(d["dtype"]).name,
        }
        for d in details
    ]
