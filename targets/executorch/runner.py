"""Runs one ``.pte`` file through ExecuTorch's Python bindings; needs the standard library, numpy and that runtime.

ExecuTorch's bindings are linked against torch's Python library and exchange torch tensors, so torch is imported too (about
200 MB of resident memory; the bindings alone add 3 MB). A file's own memory is therefore the increase over this process
without a session. The bindings module is imported by itself, past ``executorch.runtime``, whose import pulls in the whole
exporter: 140 MB and five seconds more.
"""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any

import numpy as np

_DTYPES = {0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 7: "float64", 11: "bool"}
"""The runtime's ScalarType codes."""

SIGNATURE = "edgesmith_signature"
"""A constant method of the file: JSON with the names of its inputs and outputs."""


class Session:
    """A loaded ``.pte`` file. ``inputs`` and ``outputs`` describe the tensors of its method ``forward``, in order.

    Args:
        path: the file.
        threads: size of the runtime's thread pool, which all sessions of the process share: the latest one sets it.

    Raises:
        RuntimeError: the runtime refuses the file, or the thread pool cannot have that size.
    """

    runtime_version: str
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]

    def __init__(self, path: str, threads: int) -> None:
        import torch  # the bindings cannot be loaded without it
        from executorch.extension.pybindings import _portable_lib as runtime

        runtime._unsafe_reset_threadpool(threads)
        if runtime._threadpool_get_thread_count() != threads:
            raise RuntimeError(f"the thread pool has {runtime._threadpool_get_thread_count()} threads, not {threads}")
        self.runtime_version = importlib.metadata.version("executorch")
        self._from_numpy = torch.from_numpy
        self._program = runtime._load_program(path, program_verification=runtime.Verification.InternalConsistency)
        self._method = self._program.load_method("forward")
        meta = self._method.method_meta()
        names = self._signature()
        self.inputs = [_described(meta.input_tensor_meta(i), names.get("inputs", {}), f"input_{i}", i) for i in range(meta.num_inputs())]
        self.outputs = [_described(meta.output_tensor_meta(i), names.get("outputs", {}), f"output_{i}", i) for i in range(meta.num_outputs())]

    def _signature(self) -> Any:
        methods = {self._program.get_method_name(i) for i in range(self._program.num_methods())}
        return json.loads(self._program.load_method(SIGNATURE)()[0]) if SIGNATURE in methods else {}

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """One inference.

        Args:
            inputs: one array per entry of ``self.inputs``, of exactly its shape and dtype.

        Returns:
            One fresh array per entry of ``self.outputs``.

        Raises:
            ValueError: a wrong number of inputs, a wrong shape or dtype.
        """
        if len(inputs) != len(self.inputs):
            raise ValueError(f"{len(inputs)} inputs given, the file takes {len(self.inputs)}")
        for array, spec in zip(inputs, self.inputs, strict=True):
            if list(array.shape) != spec["shape"] or array.dtype != spec["dtype"]:
                raise ValueError(f"{spec['name']} is {array.dtype}{list(array.shape)}, the file takes {spec['dtype']}{spec['shape']}")
        results = self._method([self._from_numpy(np.require(array, requirements=["C", "W"])) for array in inputs])
        return [result.numpy() for result in results]


def _described(tensor: Any, names: Any, default: str, index: int) -> dict[str, Any]:
    return {"name": names[index] if names else default, "shape": list(tensor.sizes()), "dtype": _DTYPES[tensor.dtype()]}
