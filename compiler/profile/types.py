"""What a measurement is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from edgesmith.compiler.budget import Interval
from edgesmith.compiler.profile.memory_types import Memory
from edgesmith.compiler.profile.statistics import block_percentile

NS_PER_MS = 1e6


@dataclass(frozen=True)
class Port:
    """One input or output of an artifact. ``shape`` is at the artifact's own batch; ``dtype`` is numpy's name."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, eq=False)
class Profile:
    """One artifact, measured on one device.

    ``samples_ns``: nanoseconds of every timed call, in order; ``block_sizes``: how many of them belong to each block of
    uninterrupted calls. ``load_ms`` is the median over the fresh processes. ``memory`` is None where the kernel does not count it.
    ``environment`` says where this was: two profiles with different ones are not comparable.
    """

    device: str
    threads: int
    runtime_version: str
    samples_ns: npt.NDArray[np.int64]
    block_sizes: tuple[int, ...]
    load_ms: float
    memory: Memory | None
    environment: Mapping[str, str]

    def latency_ms(self, percentile: float) -> Interval:
        """A percentile of the time of one call, in milliseconds, with its 95 % interval over blocks.

        The upper end is infinite where too few calls were timed to bound the percentile at all.
        """
        return _latency_ms(self, percentile)


@lru_cache(maxsize=64)
def _latency_ms(profile: Profile, percentile: float) -> Interval:
    found = block_percentile(profile.samples_ns, profile.block_sizes, percentile)
    return Interval(found.value / NS_PER_MS, found.low / NS_PER_MS, found.high / NS_PER_MS)
