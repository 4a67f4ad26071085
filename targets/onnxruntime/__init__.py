"""ONNX Runtime on the CPU: ``.onnx`` files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from edgesmith.compiler.diagnostics import Diagnostic
from edgesmith.compiler.fingerprint import file_hash
from edgesmith.compiler.model import Model
from edgesmith.compiler.profile.memory_types import MemoryPlan
from edgesmith.compiler.profile.operator_types import Executed, Placement
from edgesmith.compiler.quantplan import Scheme
from edgesmith.compiler.simulate import DynamicGrid
from edgesmith.compiler.target import Artifact, Target
from edgesmith.targets.onnxruntime.placement import place
from edgesmith.targets.onnxruntime.support import refusals


class OnnxRuntime(Target):
    """Float32, static INT8 (Q/DQ around what the runtime fuses) and dynamic INT8 (``DynamicQuantizeLinear``) on the CPU."""

    name: ClassVar[str] = "onnxruntime"
    suffix: ClassVar[str] = ".onnx"
    extra: ClassVar[str] = "onnxruntime"
    distribution: ClassVar[str] = "onnxruntime"
    modules: ClassVar[tuple[str, ...]] = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")
    schemes: ClassVar[frozenset[Scheme]] = frozenset(Scheme) - {Scheme.STATIC16X8}
    dynamic_grid: ClassVar[DynamicGrid] = DynamicGrid.TENSOR_ASYMMETRIC
    runner: ClassVar[Path] = Path(__file__).with_name("runner.py")

    def unsupported(self, model: Model) -> tuple[Diagnostic, ...]:
        """One ERROR per operator of ``model`` that the exporter cannot convert."""
        return refusals(model)

    def lower(self, model: Model, folder: Path, stem: str = "model") -> Artifact:
        """Write ``folder/stem.onnx``; see ``Target.lower``."""
        from edgesmith.targets.onnxruntime import lower

        lower.need(self.modules, self.extra)
        path = Path(folder) / f"{stem}{self.suffix}"
        diagnostics = lower.lower(model, path)
        return Artifact(
            path=path,
            target=self.name,
            size_bytes=path.stat().st_size,
            sha256=file_hash(path),
            source_fingerprint=model.fingerprint,
            built_with=lower.versions(("torch", "onnx", "onnx-ir", "onnxscript", self.distribution)),
            diagnostics=diagnostics,
        )

    def memory_plan(self, path: Path) -> MemoryPlan:
        """Constants, and an arena that grows as the runtime's does; see memory.py."""
        from edgesmith.targets.onnxruntime.memory import memory_plan

        return memory_plan(path)

    def place(self, operators: Sequence[Executed]) -> tuple[Placement, ...]:
        """By kind, and by dtype in statically quantized files; see placement.py."""
        return place(operators)
