"""The contract of a target: what it can run, and how a Model becomes its file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from edgesmith.compiler.diagnostics import Diagnostic
from edgesmith.compiler.errors import UnsupportedError
from edgesmith.compiler.model import Model
from edgesmith.compiler.profile.memory_types import MemoryPlan
from edgesmith.compiler.profile.operator_types import Executed, Placement
from edgesmith.compiler.quantplan import Scheme
from edgesmith.compiler.simulate import DynamicGrid


@dataclass(frozen=True)
class Artifact:
    """A file that a runtime loads. It takes and gives what the Model does, at batch 1, in the same order and dtypes.

    ``built_with``: distribution name -> version of what wrote it. ``diagnostics``: what of the quantization plan could not be honoured.
    """

    path: Path
    target: str
    size_bytes: int
    sha256: str
    source_fingerprint: str
    built_with: Mapping[str, str] = field(default_factory=dict)
    diagnostics: tuple[Diagnostic, ...] = ()


class Target(ABC):
    """One file format and its runtime. Importing a target imports neither its converter nor its runtime.

    ``extra`` is the extra of the edgesmith distribution that installs it, ``distribution`` the runtime's distribution on the
    package index (its version is part of a result's identity), ``modules`` the imports that lowering and running need.
    ``runner`` is one file that needs only the standard library, numpy and the runtime; see compiler/profile/worker.py.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    extra: ClassVar[str]
    distribution: ClassVar[str]
    modules: ClassVar[tuple[str, ...]]
    schemes: ClassVar[frozenset[Scheme]]
    runner: ClassVar[Path]
    dynamic_grid: ClassVar[DynamicGrid] = DynamicGrid.ROW_ASYMMETRIC
    """Which activations share a grid in its DYNAMIC operators: what its files are compared with."""

    @abstractmethod
    def unsupported(self, model: Model) -> tuple[Diagnostic, ...]:
        """Why this target cannot run ``model``, within a second and without lowering: one ERROR per operator, with its source path."""

    @abstractmethod
    def lower(self, model: Model, folder: Path, stem: str = "model") -> Artifact:
        """Write ``folder/stem + suffix`` whole or not at all, honouring ``model.quant``; the outputs agree with the graph.

        Raises:
            UnsupportedError: an operator that the runtime lacks.
            MissingExtraError: the converter or runtime is not installed.
        """

    def memory_plan(self, path: Path) -> MemoryPlan:
        """What the runtime takes in memory for the file ``path``, computed from the file alone, at one thread.

        Raises:
            UnsupportedError: the target makes no plans, or none for such a file.
        """
        raise UnsupportedError(f"target {self.name!r} makes no memory plans")

    def place(self, operators: Sequence[Executed]) -> tuple[Placement, ...]:
        """For each of a file's executed ``operators``, in their order: whether it is on the runtime's fast path, and if not what to do about it.

        Raises:
            UnsupportedError: the target does not say; one whose runner has a ``Profiler`` does.
        """
        raise UnsupportedError(f"target {self.name!r} does not say which operators are fast")
