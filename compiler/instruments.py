"""What watches a pass from outside: each instrument is called around a step and may answer for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from edgesmith.compiler.errors import DefectError, NumericsError
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import Numerics, Pass, PassContext, PassResult

Step = Callable[[], PassResult]


class Instrument(Protocol):
    """Called around every pass, outermost first; ``proceed()`` runs the pass with the inner instruments around it."""

    def around(self, step: Pass, model: Model, ctx: PassContext, proceed: Step) -> PassResult:
        """The result of ``step`` on ``model``."""


@dataclass(frozen=True)
class Contract:
    """Checks what a pass promises: its input untouched, ``changed`` told truthfully."""

    def around(self, step: Pass, model: Model, ctx: PassContext, proceed: Step) -> PassResult:
        """Run the step and compare fingerprints.

        Raises:
            DefectError: the pass wrote to its input, or did not tell the truth about having changed it.
        """
        before = model.fingerprint
        result = proceed()
        if Model(model.graph, model.inputs, model.outputs, model.quant).fingerprint != before:
            raise DefectError(f"pass {step.name!r} wrote to the model it was given", hint="change a copy: model.edit()")
        changed = result.model.fingerprint != before
        if result.changed != changed:
            told, seen = ("changed", "unchanged") if result.changed else ("unchanged", "changed")
            raise DefectError(f"pass {step.name!r} says that the model is {told}, but it is {seen}")
        return result


_TOLERANCES = {Numerics.EXACT: 1e-6, Numerics.CLOSE: 1e-4}
"""Relative to the largest output: a few units in the last place of float32, and a thousand of them."""


@dataclass(frozen=True)
class NumericsCheck:
    """Compares outputs before and after each pass on fixed inputs, as close as the pass's ``numerics`` allow."""

    samples: int = 8

    def around(self, step: Pass, model: Model, ctx: PassContext, proceed: Step) -> PassResult:
        """Run the step and compare.

        Raises:
            NumericsError: the outputs differ by more, changed their shape, or are not finite.
        """
        result = proceed()
        if result.changed:
            inputs = fixed_inputs(model, ctx, self.samples)
            try:
                compare_outputs(flat_outputs(model, inputs), flat_outputs(result.model, inputs), _TOLERANCES.get(step.numerics))
            except NumericsError as error:
                raise NumericsError(f"pass {step.name!r} ({step.numerics.value}) broke the numbers", why=error.what) from error
        return result


def fixed_inputs(model: Model, ctx: PassContext, count: int) -> tuple[torch.Tensor, ...]:
    """``count`` real samples where there is data, else random ones; always the same for the same context."""
    batch = count if model.dynamic_batch else model.inputs[0].at_batch(1)[0]
    if ctx.data is None:
        return model.example_inputs(batch, seed=ctx.seed)
    return tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in ctx.data.train.batch(slice(0, batch)))


def flat_outputs(model: Model, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The outputs as a tuple, also where there is one."""
    outputs = model(*inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def compare_outputs(before: tuple[torch.Tensor, ...], after: tuple[torch.Tensor, ...], tolerance: float | None) -> None:
    """Refuse outputs that differ by more than ``tolerance`` times the largest of ``before``; None asks for shape and finiteness alone.

    Raises:
        NumericsError: saying which output, and by how much.
    """
    if len(before) != len(after):
        raise NumericsError(f"{len(before)} outputs became {len(after)}")
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        if old.shape != new.shape:
            raise NumericsError(f"output {number} had shape {tuple(old.shape)} and has {tuple(new.shape)}")
        if not torch.isfinite(new.double()).all():
            raise NumericsError(f"output {number} is not finite")
        if tolerance is not None and old.numel():
            scale = max(float(old.abs().max()), 1e-12)
            difference = float((old.double() - new.double()).abs().max()) / scale
            if difference > tolerance:
                raise NumericsError(f"output {number} differs by {difference:.2g} of its largest value; {tolerance:g} is allowed")
