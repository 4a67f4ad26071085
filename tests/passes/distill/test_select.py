"""Student selection: candidates, prices, the rule, and what comes out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from edgesmith.compiler.bench import Cost
from edgesmith.compiler.budget import Budget
from edgesmith.compiler.data import PassData
from edgesmith.compiler.diagnostics import Severity
from edgesmith.compiler.errors import UnsupportedError
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.passes.distill.candidates import students
from edgesmith.passes.distill.scores import Entry, over_budget, standard_error, winner
from edgesmith.passes.distill.select import SelectStudent
from edgesmith.passes.train.recover import Recover
from edgesmith.testing import CountedBench, TinyConvNet, TinyTransformer, check_pass, tiny_data, tiny_model


def accuracy(data: PassData) -> object:
    def score(model: Model) -> float:
        (x,) = data.validation.batch(slice(None))
        return float((model(torch.from_numpy(x)).argmax(1).numpy() == data.validation.labels).mean())

    return score


@pytest.fixture(scope="module")
def taught() -> tuple[Model, PassContext]:
    """A tiny transformer that has learned its data, and a context in which 1 MAC takes 1 ns and a parameter 1 byte."""
    data = tiny_data(256).for_passes()
    fresh = tiny_model()
    ctx = PassContext(data=data, teacher=fresh, evaluate=accuracy(data), benches={"counted": CountedBench()})  # type: ignore[arg-type]
    taught = Recover(epochs=25, lr=3e-3, batch_size=32, label_weight=20).run(fresh, ctx).model
    return taught, replace(ctx, teacher=taught)


QUICK = SelectStudent(rank_epochs=1, epochs=2, batch_size=32)


def test_students_are_smaller_and_different(taught: tuple[Model, PassContext]) -> None:
    teacher, ctx = taught
    made, remarks = students(teacher, ctx, 5)
    assert [s.name for s in made] == ["depth-75", "width-75", "depth-50", "width-50", "depth-75-width-75"]
    assert not remarks
    assert len({s.model.fingerprint for s in made}) == 5
    size = {s.name: s.model.macs for s in made}
    assert size["depth-50"] < size["depth-75"] < teacher.macs
    assert size["width-50"] < size["width-75"] < teacher.macs
    assert size["depth-75-width-75"] < min(size["depth-75"], size["width-75"])
    (x,) = teacher.example_inputs(3)
    assert all(s.model(x).shape == (3, 4) and s.model.outputs == teacher.outputs for s in made)


def test_inherited_weights_beat_random_ones(taught: tuple[Model, PassContext]) -> None:
    teacher, ctx = taught
    assert ctx.evaluate is not None
    student = next(s for s in students(teacher, ctx, 2)[0] if s.name == "width-75").model
    graph = student.edit(tensors=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in graph.parameters():
            p.copy_(p.std(correction=0) * torch.randn(p.shape, generator=generator))
    assert ctx.evaluate(student) > ctx.evaluate(student.with_graph(graph)) + 0.2


def test_a_model_without_residuals_differs_in_width_alone() -> None:
    torch.manual_seed(0)
    model = Model.from_module(nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 4)), (torch.randn(2, 1, 8, 8),))
    made, remarks = students(model, PassContext(data=tiny_data(32).for_passes()), 4)
    assert [s.name for s in made] == ["width-75", "width-50", "width-88", "width-38"]
    assert [d.code for d in remarks] == ["select-student.no-depth"]


def test_convolutions_are_cut_too(tmp_path: Path) -> None:
    check_pass(replace(QUICK, candidates=1, epochs=1), folder=tmp_path, model=tiny_model(TinyConvNet))


def test_nothing_to_cut_is_refused() -> None:
    model = Model.from_module(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), (torch.randn(2, 1, 8, 8),))
    with pytest.raises(UnsupportedError, match="cut nothing"):
        QUICK.run(model, PassContext(data=tiny_data(32).for_passes()))


def test_contract(taught: tuple[Model, PassContext], tmp_path: Path) -> None:
    teacher, ctx = taught
    result = check_pass(replace(QUICK, candidates=3, epochs=1), folder=tmp_path, model=teacher, ctx=ctx)
    assert [c.name for c in result.candidates] == ["teacher", "depth-75", "width-75", "depth-50"]
    assert sum(c.kept for c in result.candidates) == 1
    assert all(c.accuracy is not None and c.latency_ms == pytest.approx(c.macs * 1e-6) and c.size_bytes == c.params for c in result.candidates)
    assert [d.where for d in result.diagnostics if d.code == "select-student.candidate"] == [c.name for c in result.candidates]


def test_candidates_over_budget_are_dropped_with_their_figures(taught: tuple[Model, PassContext]) -> None:
    teacher, ctx = taught
    limit = (teacher.params - 1) / 1e6
    result = QUICK.run(teacher, replace(ctx, budget=Budget(size_mb=limit)))
    dropped = next(c for c in result.candidates if c.name == "teacher")
    assert not dropped.kept and dropped.accuracy is None
    assert dropped.reason == f"size {teacher.params / 1e6:.4g} MB is over {limit:g} MB"
    assert result.changed
    kept = next(c for c in result.candidates if c.kept)
    assert result.model.params == kept.params <= limit * 1e6


def test_if_all_are_over_budget_the_cheapest_is_kept_and_said(taught: tuple[Model, PassContext]) -> None:
    teacher, ctx = taught
    result = QUICK.run(teacher, replace(ctx, budget=Budget(latency_ms=1e-9, size_mb=1e-9)))
    assert result.model.macs == min(c.macs for c in result.candidates)
    (warning,) = [d for d in result.diagnostics if d.code == "select-student.all-over-budget"]
    assert warning.severity is Severity.WARNING
    assert "latency" in warning.message and "size" in warning.message


def test_the_teacher_stays_where_no_student_keeps_up(taught: tuple[Model, PassContext]) -> None:
    teacher, ctx = taught
    result = QUICK.run(teacher, replace(ctx, evaluate=lambda model: float(model.params)))
    assert result.model is teacher and not result.changed
    assert next(c for c in result.candidates if c.kept).name == "teacher"


def test_distilling_the_winner_helps(taught: tuple[Model, PassContext]) -> None:
    teacher, ctx = taught
    assert ctx.evaluate is not None
    result = replace(QUICK, slack=0.5, epochs=12).run(teacher, ctx)
    kept = next(c for c in result.candidates if c.kept)
    assert kept.name != "teacher" and kept.accuracy is not None
    assert ctx.evaluate(result.model) >= max(kept.accuracy, ctx.evaluate(teacher) - 0.1)


def test_without_evaluation_the_loss_decides_and_without_prices_nothing_is_dropped(taught: tuple[Model, PassContext]) -> None:
    teacher, ctx = taught
    result = QUICK.run(teacher, replace(ctx, evaluate=None, benches={}, budget=Budget(size_mb=1e-9)))
    assert "select-student.not-priced" in {d.code for d in result.diagnostics}
    assert all(c.accuracy is None and c.latency_ms is None for c in result.candidates)
    assert result.model is teacher


@pytest.mark.parametrize(
    ("scores", "slack", "expected"),
    [
        ({"small": 0.90, "middle": 0.94, "large": 0.95}, 0.0, "large"),
        ({"small": 0.90, "middle": 0.94, "large": 0.95}, 0.02, "middle"),
        ({"small": 0.90, "middle": 0.94, "large": 0.95}, 0.06, "small"),
        ({"small": 0.95, "middle": 0.95, "large": 0.95}, 0.0, "small"),
    ],
)
def test_the_rule(scores: dict[str, float], slack: float, expected: str) -> None:
    widths = {"small": 8, "middle": 16, "large": 32}
    entries = [Entry(name, tiny_model(lambda w=widths[name]: TinyTransformer(w)), None, score) for name, score in scores.items()]  # type: ignore[misc, arg-type]
    assert winner(entries, slack).name == expected


def test_figures() -> None:
    assert standard_error(0.9, 1000) == pytest.approx((0.9 * 0.1 / 1000) ** 0.5, rel=0.02)
    assert 0 < standard_error(1.0, 200) < 0.01
    assert standard_error(-3.0, 200) == 0 == standard_error(28.4, 200)
    assert over_budget(Cost(500_000, 2.5, 2.0), Budget(latency_ms=2.0, size_mb=0.5)) == ""
    assert over_budget(Cost(500_001, 2.5, 2.0), Budget(size_mb=0.5)) == "size 0.5 MB is over 0.5 MB"
    assert over_budget(Cost(1, 2.5, 2.1), Budget(latency_ms=2.0)) == "latency of at least 2.1 ms is over 2 ms"


def test_options_are_checked() -> None:
    for options in ({"candidates": 0}, {"slack": -0.1}, {"rank_epochs": 0}, {"lr": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options)).removeprefix("rank_")):
            SelectStudent(**options)  # type: ignore[arg-type]
