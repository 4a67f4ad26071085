"""The pass: one abstract INT8 plan for all targets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.errors import SpecError
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import Numerics, Pass, PassContext, PassResult
from edgesmith.compiler.quantplan import QuantPlan, Scheme, TensorRange
from edgesmith.kernels.affine import activation_grid, ends
from edgesmith.kernels.ranges import SEARCHES, Histogram
from edgesmith.passes.quantize.calibrate import calibration_batches, histograms
from edgesmith.passes.quantize.equalise import equalise
from edgesmith.passes.quantize.grids import grid_groups
from edgesmith.passes.quantize.schemes import assign, candidates
from edgesmith.passes.quantize.weights import put_on_grid, refuse_not_finite, widened

SCHEMES = ("auto", "dynamic", "static")


@dataclass(frozen=True)
class Quantize(Pass):
    """INT8: weights per output channel, activations static or dynamic.

    ``scheme``: ``static`` fixes activation ranges from calibration data for every convolution and matrix product; ``dynamic`` needs no data
    and takes only matrix products; ``auto`` makes convolutions static, and matrix products too where their input already lies on a static
    grid, else dynamic. ``auto`` is the default because that is what pays on CPUs: static integers carry a convolutional net from layer to
    layer without a conversion, while a transformer's matrix products stand between float normalisations, softmax and residual sums, where
    fixed per-tensor ranges cost accuracy and conversions cost time.
    ``ranges``: how a static range is found: ``minmax``, ``percentile`` (99.99 %), ``mse``, ``entropy``. ``mse`` is the default: its
    candidates include min-max, and it cuts an outlier off only where that pays.
    ``samples``: calibration samples, drawn from the training split by the context's seed.
    ``exclude``: glob patterns of source paths that stay float. First and last layers are quantized like the others (with weights per channel
    they lose little, and a float first layer often costs more time than any other); name them here to keep them float.
    ``equalise``: rescale channels first, where that lessens the error of what reads them (needs data; the function stays the same).
    """

    name: ClassVar[str] = "quantize"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    scheme: str = "auto"
    ranges: str = "mse"
    samples: int = 128
    exclude: tuple[str, ...] = ()
    equalise: bool = True

    def __post_init__(self) -> None:
        for option, value, valid in (("scheme", self.scheme, SCHEMES), ("ranges", self.ranges, tuple(SEARCHES))):
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
        model, equalised = self._equalised(model, assign(model.graph, found, self.scheme, self.exclude), ctx)
        graph = model.edit()
        found, _ = candidates(graph, self.scheme, self.exclude)
        schemes = assign(graph, found, self.scheme, self.exclude)
        weights = put_on_grid(graph, found)
        activations = self._ranges(model, graph, schemes, ctx)
        weights |= widened(graph, found, weights, activations)
        plan = QuantPlan({node.name: scheme for node, scheme in schemes.items()}, activations, weights)
        return PassResult(model.with_graph(graph, quant=plan), True, (*remarks, *equalised))

    def _equalised(self, model: Model, schemes: dict[fx.Node, Scheme], ctx: PassContext) -> tuple[Model, tuple[Diagnostic, ...]]:
        """The model with its channels rescaled where that takes error away, and a remark for each place."""
        data = ctx.data
        if not self.equalise or data is None:
            return model, ()
        total = min(self.samples, len(data.train))
        equal, places = equalise(
            model,
            {node.name: scheme for node, scheme in schemes.items()},
            lambda: calibration_batches(model, data.train, self.samples, ctx.seed),
            lambda done: ctx.progress(min(done, total), total, "equalising"),
        )
        return equal, tuple(
            Diagnostic(
                Severity.INFO,
                "quantize.equalised",
                place.where,
                f"channels rescaled (share {place.share:g}): the error of what reads them falls from {place.before:.2g} to {place.after:.2g} of its square",
            )
            for place in places
        )

    def _ranges(self, model: Model, graph: fx.GraphModule, schemes: dict[fx.Node, Scheme], ctx: PassContext) -> dict[str, TensorRange]:
        """The range of every tensor that a static operator reads or writes."""
        groups = grid_groups(schemes)
        if not groups:
            return {}
        data = ctx.need_data(f"quantize{{scheme={self.scheme}}}, which fixes activation ranges,")
        watched = [node for group in groups for node in group.watched]
        total = min(self.samples, len(data.train))
        batches = calibration_batches(model, data.train, self.samples, ctx.seed)
        seen = histograms(graph, watched, batches, lambda done: ctx.progress(min(done, total), total, "calibrating"))
        result = {}
        for group in groups:
            merged = Histogram()
            for node in group.watched:
                merged.merge(seen[node])
            low, high = group.fixed or ends(activation_grid(*SEARCHES[self.ranges](merged)))
            found = TensorRange(low, high, "fixed" if group.fixed else self.ranges)
            result.update({node.name: found for node in group.members})
        return result
