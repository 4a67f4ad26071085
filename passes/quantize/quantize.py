"""The pass: one abstract INT8 plan for all targets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
from torch import fx

from edgesmith.compiler.data import PassData
from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.errors import SpecError
from edgesmith.compiler.forms import WIDE, to_int16
from edgesmith.compiler.grid_operators import FIXED_PEAK
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import Numerics, Pass, PassContext, PassResult
from edgesmith.compiler.quantplan import QuantPlan, Scheme, TensorRange
from edgesmith.compiler.spread import Schemes
from edgesmith.compiler.weighted import CONVOLUTIONS
from edgesmith.kernels.affine import ends
from edgesmith.kernels.ranges import Histogram
from edgesmith.passes.observe.batches import calibration_batches, told
from edgesmith.passes.quantize.bias import correct_biases
from edgesmith.passes.quantize.calibrate import JUDGED_BATCHES, histograms
from edgesmith.passes.quantize.grids import grid_groups
from edgesmith.passes.quantize.refit import refit
from edgesmith.passes.quantize.schemes import SCHEMES, Candidates, assign, candidates
from edgesmith.passes.quantize.search import AUTO, CANDIDATES, Choice, judge
from edgesmith.passes.quantize.weights import put_on_grid, refuse_not_finite, widened

REFITTING = 64
"""Samples of those for calibration that weights are refitted on: each has many positions or tokens."""


@dataclass(frozen=True)
class Quantize(Pass):
    """INT8: weights per output channel, activations static or dynamic.

    ``scheme``: ``static`` fixes activation ranges from calibration data for every convolution and matrix product; ``static16x8`` does so for int16
    activations, which lose next to nothing and which few runtimes have; ``dynamic`` needs no data
    and takes only matrix products; ``auto`` makes convolutions static, and matrix products too where their input already lies on a static
    grid, else dynamic. ``auto`` is the default because that is what pays on CPUs: static integers carry a convolutional net from layer to
    layer without a conversion, while a transformer's matrix products stand between float normalisations, softmax and residual sums, where
    fixed per-tensor ranges cost accuracy and conversions cost time. With ``auto`` and data the plan also names what else could be: everything static,
    matrix products alone, convolutions alone; a build times them all on each target and ships the best.
    ``ranges``: how a static range is found: ``minmax``, ``percentile`` (99.99 %), ``percentile-99.9``, ``percentile-99.999``, ``mse``, ``entropy``;
    ``auto`` takes of these, tensor by tensor, the one that changes least what the tensor's readers compute.
    ``samples``: calibration samples, drawn from the training split by the context's seed.
    ``exclude``: glob patterns of source paths that stay float. First and last layers are quantized like the others (with weights per channel
    they lose little, and a float first layer often costs more time than any other); name them here to keep them float.
    """

    name: ClassVar[str] = "quantize"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    scheme: str = "auto"
    ranges: str = AUTO
    samples: int = 128
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option, value, valid in (("scheme", self.scheme, SCHEMES), ("ranges", self.ranges, (AUTO, *CANDIDATES))):
            if value not in valid:
                raise SpecError(f"quantize: {option}={value} is not one of {', '.join(valid)}")
        if self.samples < 1:
            raise SpecError(f"quantize: samples={self.samples} is not positive")

    def requires(self, model: Model) -> Iterable[Diagnostic]:
        """A model that is quantized already is refused."""
        if model.quant is not None:
            yield Diagnostic(Severity.ERROR, "quantize.already", "", "the model is quantized already", "quantize once, after everything that changes weights")

    def run(self, model: Model, ctx: PassContext) -> PassResult:
        """The model with its weights on int8 grids and a ``QuantPlan``.

        Raises:
            UnsupportedError: a static operator, but no data to calibrate with.
            DataError: a weight, or an activation on a calibration sample, is not finite.
        """
        found, remarks = candidates(model.graph, self.scheme, self.exclude)
        if not found:
            nothing = Diagnostic(Severity.WARNING, "quantize.nothing", "", "no operator of this model can run in int8 by this scheme")
            return PassResult(model, False, (*remarks, nothing))
        refuse_not_finite(model.graph, found)
        schemes = assign(model.graph, found, self.scheme, self.exclude)
        graph = model.edit()
        weights = put_on_grid(graph, found)
        if ctx.data is not None:
            data = ctx.data
            refit(model.graph, graph, found, weights, lambda: self._batches(model, data, ctx, "refitting weights", REFITTING))
        alternatives = self._alternatives(model.graph, found, schemes, ctx)
        activations = self._ranges(model, alternatives.get("static", schemes), ctx)
        if ctx.data is not None:
            correct_biases(model.graph, graph, found, self._batches(model, ctx.data, ctx, "correcting biases"))
        weights |= widened(graph, found, weights, activations)
        ops = {name: self._as_asked(one) for name, one in alternatives.items()}
        plan = QuantPlan(self._as_asked(schemes), activations, weights, ops)
        return PassResult(model.with_graph(graph, quant=plan), True, remarks)

    def _alternatives(self, graph: fx.GraphModule, found: Candidates, schemes: Schemes, ctx: PassContext) -> dict[str, Schemes]:
        """What a target's arbiter may choose from: the scheme asked for alone, or, of ``auto``, every one that differs."""
        if self.scheme != "auto" or ctx.data is None:
            return {self.scheme: schemes}
        convolutions = {node: kind for node, kind in found.items() if node.target in CONVOLUTIONS}
        products = {node: kind for node, kind in found.items() if node.target not in CONVOLUTIONS}
        others = {
            "static": assign(graph, found, "static", self.exclude),
            "dynamic": assign(graph, products, "dynamic", self.exclude),
            "convolutions": assign(graph, convolutions, "static", self.exclude),
        }
        chosen = {"auto": schemes}
        for name, ops in others.items():
            if ops and ops not in chosen.values():
                chosen[name] = ops
        return chosen

    def _ranges(self, model: Model, schemes: Schemes, ctx: PassContext) -> dict[str, TensorRange]:
        """The range of every tensor that a static operator reads or writes."""
        groups = grid_groups(schemes)
        if not groups:
            return {}
        data = ctx.need_data(f"quantize{{scheme={self.scheme}}}, which fixes activation ranges,")
        watched = [node for group in groups for node in group.watched]
        seen = histograms(model.graph, watched, self._batches(model, data, ctx, "calibrating"))
        choices = [Choice.of(group, _merged(seen[node] for node in group.watched), self.ranges) for group in groups if not group.fixed]
        judge(model.graph, choices, schemes, islice(self._batches(model, data, ctx, "choosing ranges"), JUDGED_BATCHES))
        found = {group: TensorRange(*group.fixed, "fixed", FIXED_PEAK) for group in groups if group.fixed}
        for choice in choices:
            name, grid = choice.best()
            found[choice.group] = TensorRange(*ends(grid), name, choice.peak)
        return {node.name: extent for group, extent in found.items() for node in group.members}

    def _as_asked(self, schemes: Schemes) -> dict[str, Scheme]:
        """``schemes`` by name, with int16 activations if these are asked for."""
        ops = {node.name: scheme for node, scheme in schemes.items()}
        return to_int16(ops) if self.scheme == WIDE else ops

    def _batches(self, model: Model, data: PassData, ctx: PassContext, what: str, most: int | None = None) -> Iterator[tuple[torch.Tensor, ...]]:
        """The calibration samples, or the first ``most`` of them; each batch that is done is told as progress in doing ``what``."""
        total = min(self.samples, len(data.train), most or self.samples)
        return told(calibration_batches(model, data.train, total, ctx.seed), lambda done: ctx.progress(min(done, total), total, what))


def _merged(histograms: Iterable[Histogram]) -> Histogram:
    result = Histogram()
    for histogram in histograms:
        result.merge(histogram)
    return result
