"""The pass: channels rescaled before quantization, so that one grid for all of them fits each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.errors import SpecError
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import Numerics, Pass, PassContext, PassResult
from edgesmith.passes.observe.batches import calibration_batches, told
from edgesmith.passes.quantize.outliers import equalise
from edgesmith.passes.quantize.schemes import SCHEMES, assign, candidates
from edgesmith.passes.quantize.weights import refuse_not_finite


@dataclass(frozen=True)
class Equalise(Pass):
    """Rescales channels where that lessens the rounding error of what reads them; the function stays the same. For right before ``quantize``.

    One loud channel leaves the others of its tensor few steps of a grid: outliers of transformers, imbalance of depthwise filters. A channel may be
    rescaled where only parameters make it and only parameters and functions that a factor goes through read it (a norm and the layers after it, layers
    around a ReLU). ``scheme`` and ``exclude`` are those of ``quantize``; ``samples``: calibration samples, drawn from the training split.
    """

    name: ClassVar[str] = "equalise"
    numerics: ClassVar[Numerics] = Numerics.CLOSE

    scheme: str = "auto"
    samples: int = 128
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise SpecError(f"equalise: scheme={self.scheme} is not one of {', '.join(SCHEMES)}")
        if self.samples < 1:
            raise SpecError(f"equalise: samples={self.samples} is not positive")

    def requires(self, model: Model) -> Iterable[Diagnostic]:
        """A model that is quantized already is refused."""
        if model.quant is not None:
            yield Diagnostic(Severity.ERROR, "equalise.already", "", "the model is quantized already", "equalise before quantize")

    def run(self, model: Model, ctx: PassContext) -> PassResult:
        """The model with other scales between its layers, and a remark for each place.

        Raises:
            UnsupportedError: there is no data.
            DataError: a weight, or an activation on a calibration sample, is not finite.
        """
        train = ctx.need_data(self.name).train
        found, _ = candidates(model.graph, self.scheme, self.exclude)
        refuse_not_finite(model.graph, found)
        schemes = {node.name: scheme for node, scheme in assign(model.graph, found, self.scheme, self.exclude).items()}
        total = min(self.samples, len(train))
        result, places = equalise(
            model,
            schemes,
            lambda: told(calibration_batches(model, train, self.samples, ctx.seed), lambda done: ctx.progress(min(done, total), total, "calibrating")),
        )
        remarks = tuple(
            Diagnostic(
                Severity.INFO,
                "equalise.rescaled",
                place.where,
                f"channels rescaled (share {place.share:g}): rounding changed {place.before:.2g} of what reads them (in squares), now {place.after:.2g}",
            )
            for place in places
        )
        return PassResult(result, bool(places), remarks)
