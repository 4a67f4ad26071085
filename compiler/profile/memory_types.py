"""What a model costs in memory: as the kernel counts it, and as planned from its file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from edgesmith.compiler.budget import Interval

PHASES = BASE, LOADED, FIRST, STEADY = ("base", "loaded", "first", "steady")


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that the kernel counts for one process at one moment, free memory given back before (proc(5), smaps).

    ``phase`` is ``base`` (the runtime has loaded, run and dropped the model once), ``loaded`` (loaded again), ``first`` (run once) or
    ``steady`` (run often). ``peak_rss_bytes`` is the highest resident memory since ``base``, what was given back included.
    ``dirty_bytes`` are private pages that exist nowhere else and so cannot be taken back: heap, copied and packed weights, arenas.
    ``mapped_bytes`` are clean pages of files, which the kernel may drop and read again; ``artifact_bytes`` are those of the artifact itself.
    """

    phase: str
    rss_bytes: int
    peak_rss_bytes: int
    dirty_bytes: int
    mapped_bytes: int
    artifact_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a runtime takes for an artifact in steady state, computed from its file.

    ``weights_bytes``: constants copied out of the file and kept as they are. ``packed_bytes``: constants rearranged for the kernels.
    ``arena_bytes``: activations and scratch, shared by what does not live at the same time. ``runtime_bytes``: the runtime's own
    records of the graph. ``mapped_bytes``: pages of the file that stay mapped; clean, so that the kernel may drop them.
    """

    weights_bytes: int
    packed_bytes: int
    arena_bytes: int
    runtime_bytes: int
    mapped_bytes: int

    @property
    def dirty_bytes(self) -> int:
        """All but what is mapped."""
        return self.weights_bytes + self.packed_bytes + self.arena_bytes + self.runtime_bytes

    @property
    def total_bytes(self) -> int:
        """Dirty and mapped."""
        return self.dirty_bytes + self.mapped_bytes


@dataclass(frozen=True)
class Memory:
    """Readings of fresh processes, each of the four phases in order. What is given as an Interval is the median of the processes, and the
    least and the most of them; all but ``process_peak_rss_bytes`` is the increase over ``base``. ``plan`` is None where the target has none.
    """

    processes: tuple[tuple[MemoryUse, ...], ...]
    plan: MemoryPlan | None = None

    @property
    def dirty_bytes(self) -> Interval:
        """What a phone counts against the app: the most that was dirty when loaded, after the first run, or in steady state."""
        return self._interval(lambda uses: max(use.dirty_bytes for use in uses[1:]) - uses[0].dirty_bytes)

    @property
    def mapped_bytes(self) -> Interval:
        """Clean pages of the artifact's own file in steady state."""
        return self._interval(lambda uses: uses[-1].artifact_bytes)

    @property
    def held_bytes(self) -> Interval:
        """Dirty, and pages of the artifact's file, in steady state."""
        return self._interval(lambda uses: uses[-1].dirty_bytes - uses[0].dirty_bytes + uses[-1].artifact_bytes)

    @property
    def peak_rss_bytes(self) -> Interval:
        """Resident memory at its highest, pages of files and what was needed for a moment while loading included."""
        return self._interval(lambda uses: uses[-1].peak_rss_bytes - uses[0].rss_bytes)

    @property
    def process_peak_rss_bytes(self) -> int:
        """That of a whole process with its runtime."""
        return max(uses[-1].peak_rss_bytes for uses in self.processes)

    def dirty_at(self, phase: str) -> Interval:
        """What is dirty at ``phase``."""
        at = PHASES.index(phase)
        return self._interval(lambda uses: uses[at].dirty_bytes - uses[0].dirty_bytes)

    def _interval(self, quantity: Callable[[tuple[MemoryUse, ...]], int]) -> Interval:
        found = [quantity(uses) for uses in self.processes]
        return Interval(median(found), min(found), max(found))
