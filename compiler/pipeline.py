"""An ordered list of passes, checked and run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgesmith.compiler.diagnostics import Diagnostic, errors
from edgesmith.compiler.errors import UnsupportedError
from edgesmith.compiler.instruments import Contract, Instrument, NumericsCheck, Step
from edgesmith.compiler.model import Model, PassRecord
from edgesmith.compiler.passbase import Pass, PassContext, PassResult
from edgesmith.compiler.spec import format_pass, parse_pass, split_top

WATCH: tuple[Instrument, ...] = (NumericsCheck(), Contract())
"""Always around every pass."""


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order in which they run.

    Example: ``Pipeline.parse("prune{ratio=0.3},recover,quantize").run(model, PassContext(data=...))``.
    """

    passes: tuple[Pass, ...]

    @classmethod
    def parse(cls, text: str | Sequence[str], folder: Path | None = None) -> Pipeline:
        """A comma-separated text, or a sequence of pass specifications. ``file.py:Class`` is looked up from ``folder``.

        Raises:
            SpecError: an unknown pass or option.
        """
        parts = split_top(text) if isinstance(text, str) else text
        return cls(tuple(parse_pass(part, folder) for part in parts))

    def check(self, model: Model) -> tuple[Diagnostic, ...]:
        """What the passes say of ``model`` before anything runs."""
        return tuple(d for step in self.passes for d in step.requires(model))

    def run(self, model: Model, ctx: PassContext | None = None, instruments: Sequence[Instrument] = ()) -> Model:
        """Every pass in turn. The teacher is ``model`` unless ``ctx`` brings one.

        Raises:
            UnsupportedError: a pass refuses the model.
            NumericsError: a pass broke the numbers; it is named.
        """
        ctx = ctx or PassContext()
        ctx = replace(ctx, teacher=ctx.teacher or model)
        refused = errors(self.check(model))
        if refused:
            raise UnsupportedError(refused[0].message, where=refused[0].where, hint=refused[0].hint)
        for position, step in enumerate(self.passes):
            result = _around(step, model, self._priced(position, ctx), (*instruments, *WATCH))
            after = result.model
            record = PassRecord(
                spec=format_pass(step),
                seconds=result.seconds,
                changed=result.changed,
                params=after.params,
                macs=after.macs,
                fingerprint=after.fingerprint,
                diagnostics=result.diagnostics,
                candidates=result.candidates,
            )
            model = replace(after, history=(*model.history, record))
        return model

    def _priced(self, position: int, ctx: PassContext) -> PassContext:
        """The context of the pass at ``position``: what a model costs there includes what the later passes save without training."""
        rest = Pipeline(tuple(step for step in self.passes[position + 1 :] if not step.trains))
        unpriced = replace(ctx, benches={})
        return replace(ctx, benches={name: bench.after(lambda model: rest.run(model, unpriced)) for name, bench in ctx.benches.items()})


def _around(step: Pass, model: Model, ctx: PassContext, instruments: Sequence[Instrument]) -> PassResult:
    if not instruments:
        started = time.perf_counter()
        result = step.run(model, ctx)
        return replace(result, seconds=time.perf_counter() - started)
    first, *rest = instruments
    proceed: Step = lambda: _around(step, model, ctx, rest)  # noqa: E731
    return first.around(step, model, ctx, proceed)
