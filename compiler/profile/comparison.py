"""Artifacts against each other."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import numpy as np

from edgesmith.compiler.budget import Interval
from edgesmith.compiler.profile.recording import Recording
from edgesmith.compiler.profile.statistics import mean_interval
from edgesmith.compiler.profile.types import Profile

RESOLUTION = 0.005
"""What is closer than this is called the same, however narrow its interval: the order of loading alone makes as much."""


class Difference(enum.Enum):
    """What is known of a ratio: UNKNOWN where its interval is too wide to say."""

    FASTER = "faster"
    SLOWER = "slower"
    SAME = "same"
    UNKNOWN = "unknown"


@dataclass(frozen=True, eq=False)
class Comparison:
    """Artifacts that were timed in one run, in the order in which they were given."""

    profiles: tuple[Profile, ...]
    recording: Recording

    def ratio(self, new: int = 1, base: int = 0) -> Interval:
        """How many times as long a call of ``new`` takes as one of ``base`` (medians), with its 95 % interval.

        The unit is the round, a pair of fresh processes: where memory happens to lie makes two processes of one file differ by more
        than the calls inside them do. A round's value is the median over its ABBA sequences of the logarithm of the ratio.
        """
        rounds = [float(np.median(logs)) for logs in self.recording.paired(new, base)]
        found = mean_interval(rounds)
        return Interval(math.exp(found.value), math.exp(found.low), math.exp(found.high))

    def difference(self, new: int = 1, base: int = 0) -> Difference:
        """Whether ``new`` is faster or slower than ``base``."""
        return difference(self.ratio(new, base))

    def within(self, precision: float) -> bool:
        """Whether every ratio to the first artifact is known to ``precision``."""
        ratios = (self.ratio(new) for new in range(1, len(self.profiles)))
        return all(ratio.high <= ratio.value * (1 + precision) and ratio.low >= ratio.value * (1 - precision) for ratio in ratios)


def difference(ratio: Interval, widest: float = 0.1) -> Difference:
    """What ``ratio`` (new over base) says; UNKNOWN if its interval holds 1 and reaches further than ``widest`` from it."""
    if abs(ratio.value - 1) > RESOLUTION and not ratio.low <= 1 <= ratio.high:
        return Difference.FASTER if ratio.value < 1 else Difference.SLOWER
    return Difference.SAME if ratio.low > 1 - widest and ratio.high < 1 + widest else Difference.UNKNOWN
