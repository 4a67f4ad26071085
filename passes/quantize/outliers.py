"""Equalisation: rescale channels so that one grid for all of them fits each, with the model's function unchanged.

A tensor with one loud channel leaves the others few steps of its grid, and a weight whose columns differ by orders of magnitude leaves some of them
none. The factor s of a channel moves magnitude from one to the other: with a = max |x| and w = max |W|, s = a^share / w^(1 - share)
(Xiao et al., SmoothQuant, ICML 2023, section 4; for convolutions Nagel et al., ICCV 2019, section 4.1, which is a share of one half). The
share of every stretch is the one whose rounding changes least what its readers compute; none is among the candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.axes import Axes
from edgesmith.compiler.axes.rescale import Stretch, rescaled, stretches
from edgesmith.compiler.model import Model
from edgesmith.compiler.quantplan import Scheme
from edgesmith.compiler.simulate import fake_quantize, fake_quantize_tensor
from edgesmith.compiler.weighted import LINEARS, Weighted, weighted
from edgesmith.kernels.affine import activation_grid
from edgesmith.passes.observe.visit import Look, merged, visit
from edgesmith.passes.quantize.calibrate import JUDGED_BATCHES, not_finite

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Candidates for the share of the magnitude that goes from the activation to the weight, beside leaving both as they are."""
WORTH = 0.5
"""A stretch is rescaled only where that halves the square of its readers' error: smaller gains there do not show in the model's outputs."""
LARGEST_FACTOR = 2.0**16
CLIPS = (1.0, 0.7, 0.45)
"""Shares of a static range that are tried: what a search for ranges will find anyway is no merit of the factors."""

Floats = npt.NDArray[np.float64]
Batches = Callable[[], Iterator[tuple[torch.Tensor, ...]]]
"""The calibration batches, from the first one on."""


@dataclass(frozen=True)
class Equalised:
    """A stretch that was rescaled: where its channels are made, the share, and its readers' squared error relative to their outputs, before and after."""

    where: str
    share: float
    before: float
    after: float


def equalise(model: Model, schemes: Mapping[str, Scheme], batches: Batches) -> tuple[Model, tuple[Equalised, ...]]:
    """``model`` with the channels rescaled that its INT8 operators read (``schemes``, by node name), and which those are."""
    found = [_Candidate.of(model.graph, stretch, schemes) for stretch in stretches(Axes.of(model))]
    candidates = [candidate for candidate in found if candidate.readers]
    if not candidates:
        return model, ()
    visit(model.graph, merged(pair for c in candidates for pair in c.looks(c.extent)), batches())
    for candidate in candidates:
        candidate.propose()
    visit(model.graph, merged(pair for c in candidates for pair in c.looks(c.judge)), islice(batches(), JUDGED_BATCHES))
    graph, chosen = model.edit(), []
    for candidate in candidates:
        best = candidate.best()
        if best is not None:
            rescaled(graph, candidate.stretch, candidate.factors[best])
            chosen.append(Equalised(candidate.where, SHARES[best], candidate.relative(-1), candidate.relative(best)))
    return (model.with_graph(graph) if chosen else model), tuple(chosen)


@dataclass
class _Reader:
    """An INT8 operator that reads a stretch: the dimension of the tensor and of the weight that its channels lie on, and the channel at each index."""

    node: fx.Node
    kind: Weighted
    static: bool
    dim: int
    weight_dim: int
    units: npt.NDArray[np.int64]
    low: Floats
    high: Floats
    errors: Floats = field(default_factory=lambda: np.zeros((len(SHARES) + 1, len(CLIPS))))
    energy: float = 0.0


@dataclass
class _Candidate:
    stretch: Stretch
    where: str
    readers: list[_Reader]
    weight: Floats
    factors: list[Floats] = field(default_factory=list)

    @classmethod
    def of(cls, graph: fx.GraphModule, stretch: Stretch, schemes: Mapping[str, Scheme]) -> _Candidate:
        readers, weight = [], np.zeros(stretch.channels)
        for (node, _), part in zip(stretch.readers, stretch.read, strict=True):
            kind, scheme = weighted(node), schemes.get(node.name, Scheme.FLOAT)
            if kind is None or scheme is Scheme.FLOAT:
                continue
            values = graphs.tensor(graph, part.name).detach().double().abs().movedim(part.dim, 0).flatten(1).amax(1).numpy()
            np.maximum.at(weight, part.units, values)
            size, dim = stretch.channels, -1 if node.target in LINEARS else 1
            ends = np.full(size, np.inf), np.full(size, -np.inf)
            readers.append(_Reader(node, kind, scheme is Scheme.STATIC, dim, part.dim, part.units, *ends))
        return cls(stretch, stretch.made[0].name.rpartition(".")[0] or stretch.made[0].name, readers, weight)

    def looks(self, look: Callable[[_Reader, tuple[Any, ...], dict[str, Any], Any], None]) -> Iterator[tuple[fx.Node, Look]]:
        for reader in self.readers:
            yield reader.node, _bound(look, reader)

    def extent(self, reader: _Reader, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Take down the least and greatest value of each channel.

        Raises:
            DataError: one is not finite.
        """
        x = args[reader.kind.activation].movedim(reader.dim, 0).flatten(1)
        if not bool(torch.isfinite(x).all()):
            source = reader.kind.argument(reader.node, reader.kind.activation)
            assert source is not None
            raise not_finite(source)
        np.minimum.at(reader.low, reader.units, x.amin(1).double().numpy())
        np.maximum.at(reader.high, reader.units, x.amax(1).double().numpy())

    def propose(self) -> None:
        """The factors for every share."""
        loud = np.max([np.maximum(-r.low, r.high) for r in self.readers], axis=0)
        alive = (loud > 0) & (self.weight > 0)
        for share in SHARES:
            factors = np.ones(self.stretch.channels)
            factors[alive] = loud[alive] ** share / self.weight[alive] ** (1 - share)
            middle = np.exp(np.mean(np.log(factors[alive]))) if alive.any() else 1.0
            factors[alive] = np.clip(factors[alive] / middle, 1 / LARGEST_FACTOR, LARGEST_FACTOR)
            self.factors.append(factors)

    def judge(self, reader: _Reader, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Add up how far rounding takes the reader's result, for every share and for none."""
        given = list(args)
        x, weight = given[reader.kind.activation], given[reader.kind.weight]
        reader.energy += float(result.double().square().sum())
        for place, factors in enumerate((*self.factors, np.ones(self.stretch.channels))):
            given[reader.kind.weight] = _rounded_weight(weight * _along(factors[reader.units], reader.weight_dim, weight), reader.kind.axis)
            for number, clip in enumerate(CLIPS if reader.static else CLIPS[:1]):
                given[reader.kind.activation] = _rounded(x, reader, factors, clip)
                computed = reader.node.target(*given, **kwargs)  # type: ignore[operator]
                reader.errors[place, number] += float((computed - result).double().square().sum())

    def relative(self, place: int) -> float:
        """The readers' squared error over the square of what they give, of the share number ``place``, added up."""
        errors = (reader.errors[place] if reader.static else reader.errors[place, :1] for reader in self.readers)
        return float(sum(least.min() / max(reader.energy, 1e-30) for least, reader in zip(errors, self.readers, strict=True)))

    def best(self) -> int | None:
        """Number of the share to rescale by; None where leaving it is about as good."""
        place = min(range(len(SHARES)), key=self.relative)
        return place if self.relative(place) < WORTH * self.relative(-1) else None


def _bound(look: Callable[[_Reader, tuple[Any, ...], dict[str, Any], Any], None], reader: _Reader) -> Look:
    return lambda args, kwargs, result: look(reader, args, kwargs, result)


def _rounded(x: torch.Tensor, reader: _Reader, factors: Floats, clip: float) -> torch.Tensor:
    """``x`` divided by ``factors`` and rounded to int8, on one grid of ``clip`` times the extent seen where the reader is static, else on each sample's own."""
    small = x / _along(factors[reader.units], reader.dim, x)
    if not reader.static:
        return torch.stack([fake_quantize_tensor(sample) for sample in small])
    grid = activation_grid(clip * float((reader.low / factors).min()), clip * float((reader.high / factors).max()))
    return fake_quantize(small, float(grid.scale), int(grid.zero_point))


def _rounded_weight(weight: torch.Tensor, axis: int) -> torch.Tensor:
    others = [dim for dim in range(weight.dim()) if dim != axis % weight.dim()]
    step = weight.abs().amax(others, keepdim=True) / 127
    step = torch.where(step > 0, step, torch.ones_like(step))
    return torch.round(weight / step) * step


def _along(values: Floats, dim: int, like: torch.Tensor) -> torch.Tensor:
    shape = [1] * like.dim()
    shape[dim] = -1
    return torch.from_numpy(values).to(like.dtype).reshape(shape)
