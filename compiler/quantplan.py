"""The abstract quantization plan: which operator runs how, on which grid. Targets legalise it."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType


class Scheme(enum.Enum):
    """How one operator's arithmetic runs."""

    FLOAT = "float"
    """float32 throughout."""
    DYNAMIC = "dynamic"
    """int8 weights; activations are quantized at run time from their own range."""
    STATIC = "static"
    """int8 weights and int8 activations with ranges fixed from calibration data."""
    STATIC16X8 = "static16x8"
    """int8 weights and int16 activations, symmetric, with ranges fixed from calibration data."""


STATIC_SCHEMES = frozenset({Scheme.STATIC, Scheme.STATIC16X8})
"""Those whose activations have ranges in the plan."""
STEPS16 = 2**15 - 1
"""Steps of an int16 grid on either side of zero."""


@dataclass(frozen=True)
class TensorRange:
    """The real interval [low, high] that an activation's int8 grid covers (low <= 0 <= high, low < high), and how it was found (``minmax`` ...).

    ``peak`` is the largest magnitude that was seen: what an int16 grid covers, whose steps are small enough to cut nothing off. None: that of the interval.
    """

    low: float
    high: float
    method: str
    peak: float | None = None

    @property
    def scale(self) -> float:
        """Step of the int8 grid: (high - low) / 255. Ranges of the quantize pass make it exact in float32."""
        return (self.high - self.low) / 255

    @property
    def zero_point(self) -> int:
        """The int8 value in [-128, 127] that stands for 0.0; for uint8 add 128."""
        return min(max(round(-128 - self.low / self.scale), -128), 127)

    @property
    def scale16(self) -> float:
        """Step of the int16 grid, whose zero point is 0."""
        return (max(-self.low, self.high) if self.peak is None else self.peak) / STEPS16


@dataclass(frozen=True)
class WeightGrid:
    """Symmetric int8 grid of a weight: ``real = scale[c] * q``, q in [-127, 127], one scale per index of ``axis``.

    The weight in the graph already lies on this grid and every channel that is not all zero has an element at
    +-127 steps, so that a min-max quantizer of any toolchain recovers exactly these integers. The exception: channels of static operators
    whose weights all but vanish beside their bias have fewer steps in use, so that the bias stays within 2^30 steps.
    """

    scales: tuple[float, ...]
    axis: int


@dataclass(frozen=True)
class QuantPlan:
    """One plan for all targets. Keys are node names of ``Model.graph`` except in ``weights``.

    ``ops``: operator node -> scheme (absent means FLOAT). ``activations``: tensor-valued node (placeholders included)
    -> range; it holds every activation input and output of each operator of ``STATIC_SCHEMES``. ``weights``: parameter name
    (``get_attr`` target) -> grid. ``alternatives``: name -> other ``ops`` that the same ranges and weights serve; which of them a
    target runs is for the arbiter to say.
    """

    ops: Mapping[str, Scheme] = field(default_factory=dict)
    activations: Mapping[str, TensorRange] = field(default_factory=dict)
    weights: Mapping[str, WeightGrid] = field(default_factory=dict)
    alternatives: Mapping[str, Mapping[str, Scheme]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("ops", "activations", "weights", "alternatives"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def by(self, alternative: str) -> QuantPlan:
        """This plan with the operators of one of its alternatives, and no others to choose from."""
        return replace(self, ops=self.alternatives[alternative], alternatives={})

    def scheme(self, node_name: str) -> Scheme:
        """The scheme of the operator ``node_name``."""
        return self.ops.get(node_name, Scheme.FLOAT)

    def __hash__(self) -> int:
        others = frozenset((name, frozenset(ops.items())) for name, ops in self.alternatives.items())
        return hash((frozenset(self.ops.items()), frozenset(self.activations.items()), frozenset(self.weights.items()), others))
