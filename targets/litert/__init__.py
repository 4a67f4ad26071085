"""LiteRT (TensorFlow Lite): ``.tflite`` files, made by litert-torch and quantized by ai-edge-quantizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgesmith.compiler.diagnostics import Diagnostic
from edgesmith.compiler.model import Model
from edgesmith.compiler.profile.memory_types import MemoryPlan
from edgesmith.compiler.profile.operator_types import Executed, Placement
from edgesmith.compiler.quantplan import Scheme
from edgesmith.compiler.target import Artifact, Target
from edgesmith.targets.litert.lower import lower
from edgesmith.targets.litert.placement import place
from edgesmith.targets.litert.support import unsupported

__all__ = ["LiteRT"]


class LiteRT(Target):
    """The target ``litert``. Linear and convolution layers run statically or dynamically quantized, everything else in float32."""

    name = "litert"
    suffix = ".tflite"
    extra = "litert"
    distribution = "ai-edge-litert"
    modules = ("litert_torch", "ai_edge_quantizer", "ai_edge_litert")
    schemes = frozenset(Scheme)
    runner = Path(__file__).with_name("runner.py")

    def unsupported(self, model: Model) -> tuple[Diagnostic, ...]:
        """See ``Target.unsupported``."""
        return unsupported(model)

    def lower(self, model: Model, folder: Path, stem: str = "model") -> Artifact:
        """See ``Target.lower``."""
        return lower(model, folder, stem)

    def memory_plan(self, path: Path) -> MemoryPlan:
        """See ``Target.memory_plan``."""
        from edgesmith.targets.litert.memory import memory_plan

        return memory_plan(path)

    def place(self, operators: Sequence[Executed]) -> tuple[Placement, ...]:
        """See ``Target.place``."""
        return place(operators)
