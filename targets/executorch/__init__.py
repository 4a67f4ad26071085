"""ExecuTorch: ``.pte`` files whose heavy operators run in XNNPACK, the rest in ExecuTorch's portable kernels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from edgesmith.compiler.diagnostics import Diagnostic
from edgesmith.compiler.model import Model
from edgesmith.compiler.profile.memory_types import MemoryPlan
from edgesmith.compiler.profile.operator_types import Executed, Placement
from edgesmith.compiler.quantplan import Scheme
from edgesmith.compiler.target import Artifact, Target


class ExecuTorch(Target):
    """The ExecuTorch target."""

    name: ClassVar[str] = "executorch"
    suffix: ClassVar[str] = ".pte"
    extra: ClassVar[str] = "executorch"
    distribution: ClassVar[str] = "executorch"
    modules: ClassVar[tuple[str, ...]] = ("executorch", "torchao")
    schemes: ClassVar[frozenset[Scheme]] = frozenset(Scheme) - {Scheme.STATIC16X8}
    runner: ClassVar[Path] = Path(__file__).with_name("runner.py")

    def unsupported(self, model: Model) -> tuple[Diagnostic, ...]:
        """One ERROR per operator that neither decomposes into the runtime's kernels nor is one; imports nothing of ExecuTorch."""
        from edgesmith.targets.executorch.support import unsupported

        return unsupported(model)

    def lower(self, model: Model, folder: Path, stem: str = "model") -> Artifact:
        """Write ``folder/stem.pte`` whole or not at all, at batch 1.

        Raises:
            UnsupportedError: an operator that the runtime lacks.
            MissingExtraError: executorch is not installed.
            OutputError: the folder cannot be written.
        """
        from edgesmith.targets.executorch.lower import lower

        return lower(model, folder, stem + self.suffix)

    def memory_plan(self, path: Path) -> MemoryPlan:
        """Planned buffers, and what XNNPACK makes of each delegate; see memory.py."""
        from edgesmith.targets.executorch.memory import memory_plan

        return memory_plan(path)

    def place(self, operators: Sequence[Executed]) -> tuple[Placement, ...]:
        """By kind, delegate and dtype; see placement.py."""
        from edgesmith.targets.executorch.placement import place

        return place(operators)
