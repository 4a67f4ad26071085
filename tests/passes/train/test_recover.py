"""Recovery on captured graphs: it helps, never harms, repeats itself, and takes whatever model there is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.data import PassData, Split
from edgesmith.compiler.diagnostics import Severity
from edgesmith.compiler.errors import DataError, UnsupportedError
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.quantplan import QuantPlan
from edgesmith.passes.train.forward import label_output, outputs_of, rows
from edgesmith.passes.train.loop import Schedule, train
from edgesmith.passes.train.objective import Objective
from edgesmith.passes.train.recover import Recover
from edgesmith.testing import TinyConvNet, TinyTransformer, check_pass, tiny_data, tiny_model


def accuracy(data: PassData) -> object:
    def score(model: Model) -> float:
        (x,) = data.validation.batch(slice(None))
        return float((model(torch.from_numpy(x)).argmax(1).numpy() == data.validation.labels).mean())

    return score


def hurt(model: Model, seed: int = 1) -> Model:
    """``model`` with noise in every weight: what a crude cut does to it."""
    generator = torch.Generator().manual_seed(seed)
    graph = model.edit(tensors=True)
    with torch.no_grad():
        for p in graph.parameters():
            p.add_(0.7 * p.std(correction=0) * torch.randn(p.shape, generator=generator))
    return model.with_graph(graph)


@pytest.fixture(scope="module")
def taught() -> tuple[Model, PassContext]:
    """A tiny transformer that has learned its data, and the context it teaches in."""
    data = tiny_data(256).for_passes()
    fresh = tiny_model()
    ctx = PassContext(data=data, teacher=fresh, evaluate=accuracy(data))  # type: ignore[arg-type]
    taught = Recover(epochs=25, lr=3e-3, batch_size=32, label_weight=20).run(fresh, ctx).model
    assert accuracy(data)(taught) > 0.9  # type: ignore[operator]
    return taught, replace(ctx, teacher=taught)


@pytest.mark.parametrize("label_weight", [0.0, 0.5])
def test_a_damaged_model_gets_its_accuracy_back(taught: tuple[Model, PassContext], label_weight: float) -> None:
    teacher, ctx = taught
    assert ctx.evaluate is not None
    damaged = hurt(teacher)
    result = Recover(epochs=20, batch_size=32, label_weight=label_weight).run(damaged, ctx)
    lost = ctx.evaluate(teacher) - ctx.evaluate(damaged)
    assert lost > 0.1
    assert ctx.evaluate(result.model) >= ctx.evaluate(teacher) - 0.1 * lost
    assert result.changed
    assert [d.code for d in result.diagnostics] == ["recover.gain"]
    assert result.model.params == damaged.params


def test_it_is_never_worse_than_what_came_in(taught: tuple[Model, PassContext]) -> None:
    teacher, ctx = taught
    result = Recover(epochs=1, lr=5.0, batch_size=32).run(teacher, ctx)
    assert result.model is teacher and not result.changed
    assert result.diagnostics[0].code == "recover.no-gain" and result.diagnostics[0].severity is Severity.WARNING


def test_divergence_is_said_and_the_input_kept(taught: tuple[Model, PassContext]) -> None:
    teacher, ctx = taught
    result = Recover(epochs=3, lr=1e30, batch_size=32).run(teacher, ctx)
    assert result.model is teacher
    assert "recover.diverged" in {d.code for d in result.diagnostics}


def test_progress_counts_every_step_and_random_state_is_left_alone(taught: tuple[Model, PassContext]) -> None:
    teacher, ctx = taught
    told: list[tuple[int, int]] = []
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Recover(epochs=2, batch_size=32).run(hurt(teacher), replace(ctx, progress=lambda done, total, text: told.append((done, total))))
    assert told == [(i, 16) for i in range(1, 17)]
    assert torch.equal(torch.rand(3), expected)


def test_a_small_model_trains_alike_however_many_threads_there_are(taught: tuple[Model, PassContext]) -> None:
    teacher, ctx = taught
    damaged, before, results = hurt(teacher), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(Recover(epochs=2, batch_size=32).run(damaged, ctx).model.fingerprint)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1]


def test_contract(taught: tuple[Model, PassContext], tmp_path: Path) -> None:
    teacher, ctx = taught
    check_pass(Recover(epochs=2, batch_size=32), folder=tmp_path, model=hurt(teacher), ctx=ctx)


def test_another_seed_is_another_result(taught: tuple[Model, PassContext]) -> None:
    teacher, ctx = taught
    damaged = hurt(teacher)
    step = Recover(epochs=2, batch_size=32)
    assert step.run(damaged, ctx).model.fingerprint != step.run(damaged, replace(ctx, seed=1)).model.fingerprint


def test_frozen_parameters_train_and_stay_marked(taught: tuple[Model, PassContext]) -> None:
    teacher, ctx = taught
    graph = hurt(teacher).edit(tensors=True)
    graphs.tensor(graph, "head.weight").requires_grad_(False)
    frozen = teacher.with_graph(graph)
    recovered = Recover(epochs=2, batch_size=32).run(frozen, ctx).model
    assert not graphs.tensor(recovered.graph, "head.weight").requires_grad
    assert not torch.equal(graphs.tensor(recovered.graph, "head.weight"), graphs.tensor(frozen.graph, "head.weight"))


def test_batch_norm_learns_its_statistics_and_dropout_is_off_afterwards() -> None:
    class Dropping(TinyConvNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(super().forward(x), 0.3, self.training)

    data = tiny_data(64).for_passes()
    teacher = tiny_model(Dropping)
    damaged = hurt(teacher)
    recovered = Recover(epochs=2, batch_size=16).run(damaged, PassContext(data=data, teacher=teacher)).model
    assert not torch.equal(graphs.tensor(recovered.graph, "norm.running_mean"), graphs.tensor(damaged.graph, "norm.running_mean"))
    (x,) = recovered.example_inputs()
    assert torch.equal(recovered(x), recovered(x))


def test_dropout_is_off_unless_asked_for() -> None:
    class Dropping(TinyTransformer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(nn.functional.dropout(x, self.p, self.training))

        p = 0.0

    class DroppingMore(Dropping):
        p = 0.4

    data = tiny_data(64).for_passes()
    found = {}
    for kind in (Dropping, DroppingMore):
        teacher = tiny_model(kind)
        for dropout in (False, True):
            result = Recover(epochs=1, batch_size=16, dropout=dropout).run(hurt(teacher), PassContext(data=data, teacher=teacher))
            found[kind.p, dropout] = graphs.tensor(result.model.graph, "head.weight")
    assert torch.equal(found[0.4, False], found[0.0, True])
    assert not torch.equal(found[0.4, True], found[0.0, True])


class TwoInputs(nn.Module):
    """Token ids and a padding mask -> (logits, token states)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = torch.tanh(self.mix(self.embed(ids))) * mask[..., None]
        return self.head(states.sum(1) / mask.sum(1, keepdim=True)), states


def sequences(count: int, seed: int, labels: bool) -> Split:
    rng = np.random.default_rng(seed)
    ids, mask = rng.integers(0, 20, (count, 6)), np.ones((count, 6), np.int64)
    mask[:, 4:] = rng.integers(0, 2, (count, 1))
    return Split((ids, mask), (ids[:, 0] % 3 if labels else np.zeros(count)).astype(np.int64))


@pytest.mark.parametrize("labels", [True, False])
def test_several_inputs_and_outputs_with_and_without_labels(labels: bool) -> None:
    torch.manual_seed(0)
    teacher = Model.from_module(TwoInputs(), (torch.zeros(2, 6, dtype=torch.int64), torch.ones(2, 6, dtype=torch.int64)))
    data = PassData(sequences(64, 0, labels), sequences(40, 1, labels))
    result = Recover(epochs=4, batch_size=16).run(hurt(teacher), PassContext(data=data, teacher=teacher))
    assert result.changed
    assert ("recover.no-labels" in {d.code for d in result.diagnostics}) is not labels


def test_augmentation_reaches_the_teacher_too() -> None:
    seen: list[bool] = []

    def shifted(arrays: tuple[np.ndarray, ...], rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        seen.append(True)
        return (np.roll(arrays[0], rng.integers(-1, 2), axis=3),)

    data = tiny_data(64).for_passes()
    data = PassData(replace(data.train, augment=shifted), data.validation)
    teacher = tiny_model()
    objective = Objective(teacher, data, "kl", 0.0)
    index = np.arange(8)
    (x,) = data.train.batch(index, np.random.default_rng(3))
    inputs = (torch.from_numpy(x),)
    assert float(objective.on_train((teacher(*inputs),), objective.wanted(inputs, index), index)) == pytest.approx(0, abs=1e-6)
    assert seen


def test_bfloat16_trains_the_same_graph(taught: tuple[Model, PassContext]) -> None:
    teacher, ctx = taught
    data = ctx.need_data("test")
    trained = train(hurt(teacher), Objective(teacher, data, "standardized-kl", 0.0), Schedule(epochs=4, lr=1e-3, batch_size=32, bf16=True), ctx)
    assert trained.score > trained.before
    assert all(p.dtype is torch.float32 for p in trained.model.graph.parameters())


class FixedBatch(nn.Module):
    """Runs batches of its example's size alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TinyTransformer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) * (2 if x.shape[0] == 6 else 1)


def test_a_fixed_batch_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.export.save(torch.export.export(FixedBatch().eval(), (torch.randn(6, 1, 8, 8),)), tmp_path / "six.pt2")
    teacher = Model.load(tmp_path / "six.pt2")
    assert not teacher.dynamic_batch
    data = tiny_data(64).for_passes()
    (first, *_), labels = data.train.inputs, data.train.labels
    whole = torch.cat([outputs[0] for _, outputs in outputs_of(teacher, data.train, 100)])
    assert whole.shape == (64, 4)
    assert torch.equal(whole[60:], teacher(torch.from_numpy(np.concatenate([first[60:], first[:2]])))[:4])
    assert Recover(epochs=2).run(hurt(teacher), PassContext(data=data, teacher=teacher)).changed
    few = PassData(Split((first[:4],), labels[:4]), data.validation)
    with pytest.raises(DataError, match="batches of 6 alone and there are 4"):
        Recover(epochs=1).run(hurt(teacher), PassContext(data=few, teacher=teacher))


def test_refusals() -> None:
    model = tiny_model()
    with pytest.raises(UnsupportedError, match="needs data"):
        Recover().run(model, PassContext(teacher=model))
    with pytest.raises(UnsupportedError, match="needs a teacher"):
        Recover().run(model, PassContext(data=tiny_data(8).for_passes()))
    quantized = Model(model.graph, model.inputs, model.outputs, QuantPlan())
    assert [d.code for d in Recover().requires(quantized)] == ["recover.quantized"]
    assert not list(Recover().requires(model))
    for options in ({"epochs": 0}, {"lr": 0.0}, {"label_weight": -1.0}, {"loss": "dost"}, {"batch_size": 0}, {"lr": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Recover(**options)  # type: ignore[arg-type]


def test_labels_fit_only_where_they_are_class_numbers() -> None:
    model = tiny_model()
    assert label_output(model, np.array([0, 3, 1])) == 0
    for labels in (np.array([0, 4]), np.array([-1, 2]), np.array([2, 2]), np.array([0.0, 1.0]), np.array([[0, 1]])):
        assert label_output(model, labels) is None


def test_rows_have_classes_last() -> None:
    assert rows(torch.zeros(5, 7)).shape == (5, 7)
    assert rows(torch.zeros(5, 3, 7)).shape == (15, 7)
    assert rows(torch.zeros(5, 7, 2, 3)).shape == (30, 7)
