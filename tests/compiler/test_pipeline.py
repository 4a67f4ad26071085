"""Passes in order: history, the contract around them, the numbers around them, and resuming from a cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.bench import Cost
from edgesmith.compiler.cache import PassCache
from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.errors import DefectError, NumericsError, UnsupportedError
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import Numerics, Pass, PassContext, PassResult
from edgesmith.compiler.pipeline import Pipeline
from edgesmith.compiler.testing import CountedBench, check_pass, tiny_model

runs: list[str] = []


@dataclass(frozen=True)
class Scale(Pass):
    """Multiply the head's weight by ``k``."""

    name = "scale"
    numerics = Numerics.LOSSY
    k: float = 2.0

    def run(self, model: Model, ctx: PassContext) -> PassResult:
        runs.append(f"scale {self.k}")
        graph = model.edit()
        graphs.set_tensor(graph, "head.weight", graphs.tensor(graph, "head.weight") * self.k)
        after = model.with_graph(graph)
        return PassResult(after, after.fingerprint != model.fingerprint)


@dataclass(frozen=True)
class ClaimsExact(Scale):
    name = "claims-exact"
    numerics = Numerics.EXACT


@dataclass(frozen=True)
class WritesInPlace(Pass):
    name = "writes-in-place"
    numerics = Numerics.LOSSY

    def run(self, model: Model, ctx: PassContext) -> PassResult:
        with torch.no_grad():
            graphs.tensor(model.graph, "head.weight").mul_(2)
        return PassResult(model, False)


@dataclass(frozen=True)
class Lies(Pass):
    name = "lies"
    numerics = Numerics.LOSSY

    def run(self, model: Model, ctx: PassContext) -> PassResult:
        return PassResult(model, True)


@dataclass(frozen=True)
class Refuses(Pass):
    name = "refuses"
    numerics = Numerics.EXACT

    def requires(self, model: Model) -> Iterable[Diagnostic]:
        return (Diagnostic(Severity.ERROR, "refuses.always", "head", "the head is wrong", "use another"),)

    def run(self, model: Model, ctx: PassContext) -> PassResult:
        runs.append("refuses")
        return PassResult(model, False)


@dataclass(frozen=True)
class NotANumber(Scale):
    name = "not-a-number"
    k: float = field(default=float("nan"))


@dataclass(frozen=True)
class Prices(Pass):
    """Asks what the model would cost."""

    name = "prices"
    numerics = Numerics.EXACT
    trains = True

    def run(self, model: Model, ctx: PassContext) -> PassResult:
        said = str(ctx.need_bench(self.name).cost(model).latency_ms)
        return PassResult(model, False, (Diagnostic(Severity.INFO, "prices", "", said),))


def test_history_says_what_ran() -> None:
    model = Pipeline((Scale(2), Scale(1))).run(tiny_model())
    assert [(r.spec, r.changed) for r in model.history] == [("scale", True), ("scale{k=1}", False)]
    assert model.history[-1].fingerprint == model.fingerprint
    assert model.history[0].params == model.params > 0
    assert model.history[0].macs == model.macs > 0


def test_a_pass_that_writes_to_its_input_is_caught() -> None:
    with pytest.raises(DefectError, match="writes-in-place"):
        Pipeline((WritesInPlace(),)).run(tiny_model())


def test_a_pass_that_lies_about_changed_is_caught() -> None:
    with pytest.raises(DefectError, match="lies"):
        Pipeline((Lies(),)).run(tiny_model())


def test_a_pass_that_breaks_the_numbers_is_named() -> None:
    with pytest.raises(NumericsError, match="claims-exact"):
        Pipeline((Scale(1), ClaimsExact(1.001))).run(tiny_model())
    Pipeline((ClaimsExact(1.0),)).run(tiny_model())


def test_a_pass_whose_result_is_not_finite_is_named() -> None:
    with pytest.raises(NumericsError, match="not-a-number"):
        Pipeline((NotANumber(),)).run(tiny_model())


def test_a_refusal_comes_before_anything_runs() -> None:
    runs.clear()
    with pytest.raises(UnsupportedError, match="the head is wrong"):
        Pipeline((Scale(), Refuses())).run(tiny_model())
    assert runs == []


def test_a_price_includes_the_later_passes_that_do_not_train() -> None:
    model = tiny_model()
    priced: list[str] = []

    class Watched(CountedBench):
        def cost(self, candidate: Model) -> Cost:
            priced.append(candidate.history[-1].spec)
            return Cost(1, 2.5, 2.0)

    result = Pipeline((Prices(), Scale(3), Prices(), Scale(5))).run(model, PassContext(benches={"watched": Watched()}))
    assert priced == ["scale{k=5}", "scale{k=5}"]
    assert result.history[0].diagnostics[0].message == "2.5"


def test_a_cached_pass_does_not_run_again(tmp_path: Path) -> None:
    model, pipeline, cache = tiny_model(), Pipeline((Scale(2), Scale(3))), PassCache(tmp_path, "data")
    first = pipeline.run(model, instruments=[cache])
    runs.clear()
    second = pipeline.run(model, instruments=[cache])
    assert runs == []
    assert second.fingerprint == first.fingerprint
    assert second.history == first.history
    Pipeline((Scale(2), Scale(4))).run(model, instruments=[cache])
    assert runs == ["scale 4"], "what did not change is not run again; what did is"
    pipeline.run(model, replace(PassContext(), seed=1), instruments=[cache])
    assert runs == ["scale 4", "scale 2", "scale 3"], "another seed is another result"


def test_a_damaged_cache_entry_is_made_again(tmp_path: Path) -> None:
    model, pipeline, cache = tiny_model(), Pipeline((Scale(2),)), PassCache(tmp_path, "data")
    first = pipeline.run(model, instruments=[cache])
    (entry,) = tmp_path.glob("*.pt2")
    entry.write_bytes(entry.read_bytes()[:100])
    assert pipeline.run(model, instruments=[cache]).fingerprint == first.fingerprint


def test_the_contract_test_passes_an_honest_pass_and_fails_a_lying_one(tmp_path: Path) -> None:
    check_pass(Scale(), folder=tmp_path)
    with pytest.raises(DefectError):
        check_pass(Lies(), folder=tmp_path)
    with pytest.raises(NumericsError):
        check_pass(ClaimsExact(), folder=tmp_path)
