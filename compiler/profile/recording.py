"""What timing leaves behind: blocks of calls, and which of them count."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgesmith.compiler.profile.session import Timed

CANARY_DRIFT = 0.3
"""A block counts if a fixed piece of work took at most this much longer before it than after it, or after it than before it."""
CANARY_LEVEL = 0.1
"""A call is shown as the machine's own if the canaries beside it took at most this much longer than the fastest of all."""
LEAST_KEPT = 0.05
"""Where fewer calls than this share are the machine's own, it was too loaded: all calls are shown, and nothing is refused for its time."""


@dataclass(frozen=True, eq=False)
class Block:
    """Uninterrupted calls of one artifact. ``round`` is the number of its process, ``turn`` that of the ABBA sequence inside the round."""

    entrant: int
    round: int
    turn: int
    timed: Timed

    @property
    def clean_ns(self) -> npt.NDArray[np.int64]:
        """The calls during which the kernel gave the core to nobody else."""
        return self.timed.ns[~self.timed.lost]

    @property
    def steady(self) -> bool:
        """Whether it has clean calls, and the machine was about as fast after it as before it."""
        return len(self.clean_ns) > 0 and max(self.timed.canary_ns) <= (1 + CANARY_DRIFT) * min(self.timed.canary_ns)


@dataclass
class Recording:
    """Every block that was timed, also those that do not count."""

    blocks: list[Block] = field(default_factory=list)
    fastest_ns: int = sys.maxsize
    """The fastest canary of all."""

    def add(self, block: Block) -> None:
        """Take ``block`` in."""
        self.blocks.append(block)
        self.fastest_ns = min(self.fastest_ns, *block.timed.canary_ns)

    @property
    def quiet_ns(self) -> int:
        """The canary of a machine that is as fast as it ever was takes at most this long."""
        return int((1 + CANARY_LEVEL) * self.fastest_ns)

    def unloaded(self, block: Block) -> bool:
        """Whether ``block`` has clean calls, on a machine that was as fast as it ever was."""
        return len(block.clean_ns) > 0 and max(block.timed.canary_ns) <= self.quiet_ns

    def kept(self, entrant: int, least: float = LEAST_KEPT) -> tuple[list[int], list[npt.NDArray[np.int64]], float]:
        """The machine's own calls of ``entrant``, those of one turn together, the round of each turn, and which share of all calls these are.

        Where that share is below ``least``: all calls, and the share.
        """
        mine = [block for block in self.blocks if block.entrant == entrant]
        own = [(block, block.clean_ns) for block in mine if self.unloaded(block)]
        share = sum(len(calls) for _, calls in own) / sum(len(block.timed.ns) for block in mine)
        shown = own if share >= least else [(block, block.timed.ns) for block in mine]
        turns: dict[tuple[int, int], list[npt.NDArray[np.int64]]] = {}
        for block, calls in shown:
            turns.setdefault((block.round, block.turn), []).append(calls)
        return [number for number, _ in turns], [np.concatenate(calls) for calls in turns.values()], share

    def paired(self, new: int, base: int) -> list[npt.NDArray[np.float64]]:
        """For every round, the logarithms of the ratio ``new`` / ``base`` of the medians of blocks, one per turn in which both have steady blocks.

        A machine that is slow for both, for as long as a turn takes, is no reason to leave the turn out. A round that the limit ended before half of its
        turns were through is left out.
        """
        logs: dict[int, dict[int, dict[int, list[float]]]] = {}
        for block in self.blocks:
            if block.steady:
                turns = logs.setdefault(block.round, {})
                turns.setdefault(block.turn, {}).setdefault(block.entrant, []).append(float(np.log(np.median(block.clean_ns))))
        rounds = [[np.mean(turn[new]) - np.mean(turn[base]) for turn in turns.values() if new in turn and base in turn] for turns in logs.values()]
        fullest = max(map(len, rounds), default=0)
        return [np.asarray(found) for found in rounds if found and len(found) >= fullest / 2]
