"""One folder per file format. ``BUILTIN`` is the table of targets: name -> import path."""

BUILTIN: dict[str, str] = {
    "executorch": "edgesmith.targets.executorch:ExecuTorch",
    "litert": "edgesmith.targets.litert:LiteRT",
}
