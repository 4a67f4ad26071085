"""What timing leaves behind: blocks of calls, and which of them count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgesmith.compiler.profile.session import Timed

CANARY_DRIFT = 0.1
"""A block counts if a fixed piece of work beside it took at most this much longer than at its fastest in the same process."""
LEAST_KEPT = 0.25
"""Where fewer calls than this share count, the machine was too loaded: all calls are shown, and nothing is refused for its time."""


@dataclass(frozen=True, eq=False)
class Block:
    """Uninterrupted calls of one artifact. ``round`` is the number of its process, ``turn`` that of the ABBA sequence inside the round."""

    entrant: int
    round: int
    turn: int
    timed: Timed

    @property
    def canary_ns(self) -> int:
        """The slower of the canaries before and after."""
        return max(self.timed.canary_ns)

    @property
    def clean_ns(self) -> npt.NDArray[np.int64]:
        """The calls during which the kernel gave the core to nobody else."""
        return self.timed.ns[~self.timed.lost]


@dataclass
class Recording:
    """Every block that was timed, also those that do not count."""

    blocks: list[Block] = field(default_factory=list)
    fastest: dict[tuple[int, int], int] = field(default_factory=dict)
    """The fastest canary of every entrant's process in every round."""

    def add(self, block: Block) -> bool:
        """Take ``block`` in; whether it counts, by what was seen so far."""
        self.blocks.append(block)
        process = (block.entrant, block.round)
        self.fastest[process] = min(self.fastest.get(process, block.canary_ns), *block.timed.canary_ns)
        return self.counts(block)

    def counts(self, block: Block) -> bool:
        """Whether ``block`` has clean calls, on a machine that was as fast as it had been."""
        return len(block.clean_ns) > 0 and block.canary_ns <= (1 + CANARY_DRIFT) * self.fastest[block.entrant, block.round]

    def kept(self, entrant: int, least: float = LEAST_KEPT) -> tuple[list[Block], list[npt.NDArray[np.int64]], float]:
        """The blocks of ``entrant`` that count, their clean calls, and which share of all its calls these are.

        Where that share is below ``least``: all blocks and all calls, and the share.
        """
        mine = [block for block in self.blocks if block.entrant == entrant]
        clean = [block for block in mine if self.counts(block)]
        calls = [block.clean_ns for block in clean]
        share = sum(map(len, calls)) / sum(len(block.timed.ns) for block in mine)
        return (clean, calls, share) if share >= least else (mine, [block.timed.ns for block in mine], share)

    def paired(self, new: int, base: int) -> Iterator[npt.NDArray[np.float64]]:
        """For every round, the logarithms of the ratio ``new`` / ``base`` of the medians of blocks, one per turn in which both have blocks that count."""
        logs: dict[int, dict[int, dict[int, list[float]]]] = {}
        for block in filter(self.counts, self.blocks):
            turns = logs.setdefault(block.round, {})
            turns.setdefault(block.turn, {}).setdefault(block.entrant, []).append(float(np.log(np.median(block.clean_ns))))
        for turns in logs.values():
            found = [np.mean(turn[new]) - np.mean(turn[base]) for turn in turns.values() if new in turn and base in turn]
            if found:
                yield np.asarray(found)
