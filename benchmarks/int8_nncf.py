"""What NNCF makes of an ``.onnx`` file: ``PYTHON int8_nncf.py FLOAT.onnx SAMPLES.npz INT8.onnx [transformer]``.

PYTHON has nncf, onnx and onnxruntime, in an environment of their own; nothing of edgesmith is imported. SAMPLES holds one array per input, by name, first
dimension the sample. ``transformer`` is what NNCF's documentation asks for models with attention.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nncf
import numpy as np
import onnx


def main(source: str, samples: str, result: str, *kind: str) -> None:
    """Quantize by NNCF's defaults, which correct biases, on all samples."""
    with np.load(samples) as file:
        arrays = {name: file[name] for name in file.files}
    count = len(next(iter(arrays.values())))
    rows = [{name: np.ascontiguousarray(array[number : number + 1]) for name, array in arrays.items()} for number in range(count)]
    chosen = {"model_type": nncf.ModelType.TRANSFORMER} if kind == ("transformer",) else {}
    onnx.save(nncf.quantize(onnx.load(source), nncf.Dataset(rows), subset_size=count, **chosen), Path(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
