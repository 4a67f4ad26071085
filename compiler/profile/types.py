"""What a measurement is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from edgesmith.compiler.budget import Interval
from edgesmith.compiler.profile.statistics import block_percentile

NS_PER_MS = 1e6


@dataclass(frozen=True)
class Port:
    """One input or output of an artifact. ``shape`` is at the artifact's own batch; ``dtype`` is numpy's name."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one process at one moment: ``phase`` is ``base`` (runtime imported, no model), ``loaded`` or ``steady``.

    ``peak_rss_bytes`` is the highest since ``base``. ``private_dirty_bytes`` cannot be taken back by the kernel,
    ``private_clean_bytes`` (mapped files) can; both are None where the kernel does not say.
    """

    phase: str
    rss_bytes: int
    peak_rss_bytes: int
    private_dirty_bytes: int | None
    private_clean_bytes: int | None


@dataclass(frozen=True, eq=False)
class Profile:
    """One artifact, measured on one device.

    ``samples_ns``: nanoseconds of every timed call, in order; ``block_sizes``: how many of them belong to each block of
    uninterrupted calls. ``load_ms`` is the median over the fresh processes. ``peak_rss_bytes`` is of a whole process, runtime
    included; ``model_rss_bytes`` is its increase over the same process before it loaded the model (its low and high are the least
    and the most of the fresh processes), or None where the kernel does not count memory. ``memory`` holds every reading.
    ``environment`` says where this was: two profiles with different ones are not comparable.
    """

    device: str
    threads: int
    runtime_version: str
    samples_ns: npt.NDArray[np.int64]
    block_sizes: tuple[int, ...]
    load_ms: float
    peak_rss_bytes: int | None
    model_rss_bytes: Interval | None
    memory: tuple[MemoryUse, ...]
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
