"""One folder per file format. ``BUILTIN`` is the table of targets: name -> import path.

The package is itself the mapping of all registered targets: ``edgesmith.targets["litert"]``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

from edgesmith.compiler import registry

if TYPE_CHECKING:
    from edgesmith.compiler.target import Target

BUILTIN: dict[str, str] = {
    "onnxruntime": "edgesmith.targets.onnxruntime:OnnxRuntime",
    "executorch": "edgesmith.targets.executorch:ExecuTorch",
    "litert": "edgesmith.targets.litert:LiteRT",
}


class _Targets(ModuleType):
    """A module that is looked up in: a name that is both a package and a mapping cannot be two objects."""

    def __getitem__(self, name: str) -> Target:
        return registry.target(name)

    def __iter__(self) -> Iterator[str]:
        return iter(registry.target_names())

    def __len__(self) -> int:
        return len(registry.target_names())

    def __contains__(self, name: object) -> bool:
        return name in registry.target_names()


sys.modules[__name__].__class__ = _Targets
