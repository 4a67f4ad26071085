"""One folder per file format. ``BUILTIN`` is the table of targets: name -> import path."""

BUILTIN: dict[str, str] = {
    "onnxruntime": "edgesmith.targets.onnxruntime:OnnxRuntime",
    "executorch": "edgesmith.targets.executorch:ExecuTorch",
    "litert": "edgesmith.targets.litert:LiteRT",
}
