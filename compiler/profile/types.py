"""What a measurement is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from edgesmith.compiler.budget import Interval
from edgesmith.compiler.profile.memory_types import Memory
from edgesmith.compiler.profile.statistics import between_rounds, block_percentile

NS_PER_MS = 1e6


@dataclass(frozen=True)
class Port:
    """One input or output of an artifact. ``shape`` is that of one call, None where a dimension is free; ``dtype`` is numpy's name, else the runtime's."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    @property
    def one_by_one(self) -> bool:
        """Whether a call takes one sample, so that a sample has a dimension less than a call."""
        return self.shape[:1] in ((1,), (None,))

    @property
    def sample_shape(self) -> tuple[int | None, ...]:
        """Shape of one sample: what one call takes, without a leading 1."""
        return self.shape[1:] if self.one_by_one else self.shape


@dataclass(frozen=True, eq=False)
class Profile:
    """One artifact, measured on one device.

    ``samples_ns``: nanoseconds of every call that counts, in order; ``block_sizes``: how many of them belong to each block of
    calls, and ``rounds``: the number of the process that each block ran in. ``kept`` is the share of the calls that count; where it is below
    ``recording.LEAST_KEPT`` the machine was too loaded and ``samples_ns`` holds all of them. ``load_ms`` is the median over the fresh
    processes. ``memory`` is None where the kernel does not count it, or where it was not asked for.
    ``environment`` says where this was: two profiles with different ones are not comparable.
    """

    device: str
    threads: int
    runtime_version: str
    samples_ns: npt.NDArray[np.int64]
    block_sizes: tuple[int, ...]
    rounds: tuple[int, ...]
    kept: float
    load_ms: float
    memory: Memory | None
    environment: Mapping[str, str]

    def latency_ms(self, percentile: float) -> Interval:
        """A percentile of the time of one call, in milliseconds, with its 95 % interval over blocks and over processes, whichever is wider.

        The upper end is infinite where too few calls were timed to bound the percentile at all.
        """
        return _latency_ms(self, percentile)


@lru_cache(maxsize=64)
def _latency_ms(profile: Profile, percentile: float) -> Interval:
    found = block_percentile(profile.samples_ns, profile.block_sizes, percentile)
    low, high = found.low, found.high
    if len(set(profile.rounds)) > 1:
        factor = between_rounds(profile.samples_ns, profile.block_sizes, profile.rounds, percentile)
        low, high = min(low, found.value / factor), max(high, found.value * factor)
    return Interval(found.value / NS_PER_MS, low / NS_PER_MS, high / NS_PER_MS)
