"""Scores, their intervals, and the verdict on them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from edgesmith.compiler.accuracy import Accuracy, Outputs, accuracy_of, judge_accuracy, load_metric, model_outputs_of, outputs_of, top1
from edgesmith.compiler.budget import AccuracyGoal, Verdict
from edgesmith.compiler.data import Split
from edgesmith.compiler.errors import DataError, NumericsError, UserError
from edgesmith.compiler.model import Model
from edgesmith.compiler.profile.session import open_session

MATMUL = Path(__file__).with_name("profile") / "runners" / "matmul_runner.py"


def one_hot(classes: np.ndarray, count: int = 4) -> Outputs:
    return (np.eye(count, dtype=np.float32)[classes],)


def compare(outputs: Outputs, baseline: Outputs, labels: np.ndarray) -> Accuracy:
    return accuracy_of("top1", top1, outputs, baseline, labels)


def pair(count: int, lost: int, won: int, wrong: int = 0) -> tuple[Outputs, Outputs, np.ndarray]:
    """Outputs, baseline outputs and labels where ``lost`` samples turned wrong, ``won`` right and ``wrong`` stayed wrong."""
    labels = np.zeros(count, np.int64)
    after, before = np.zeros(count, np.int64), np.zeros(count, np.int64)
    after[:lost] = 1
    before[lost : lost + won] = 1
    after[lost + won : lost + won + wrong] = before[lost + won : lost + won + wrong] = 2
    return one_hot(after), one_hot(before), labels


def test_top1_of_an_artifact_in_its_runtime(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((5, 4)).astype(np.float32)
    np.savez(tmp_path / "m.npz", w=w)
    x = rng.standard_normal((600, 5)).astype(np.float32)
    labels = (x @ w).argmax(axis=1)
    labels[:150] = (labels[:150] + 1) % 4
    split = Split((x * 2,), labels, transform=lambda arrays: (arrays[0] / 2,))
    with open_session(tmp_path / "m.npz", MATMUL) as session:
        outputs = outputs_of(session, split)
    assert top1(outputs, labels) == 0.75
    linear = torch.nn.Linear(5, 4, bias=False)
    linear.weight.data = torch.from_numpy(w.T.copy())
    baseline = model_outputs_of(Model.from_module(linear, (torch.zeros(2, 5),)), split)
    np.testing.assert_allclose(outputs[0], baseline[0], rtol=0, atol=1e-5)
    found = compare(outputs, baseline, labels)
    assert (found.value.value, found.baseline, found.drop.value, found.samples) == (0.75, 0.75, 0.0, 600)


def test_the_drop_is_paired() -> None:
    found = compare(*pair(1000, lost=12, won=2, wrong=300))
    assert found.value.value == pytest.approx(0.688)
    assert found.drop.value == pytest.approx(0.010)
    # Two independent samples of 1000 at 0.69 would give a half-width of 0.04; 14 discordant pairs give 1.96 * sqrt(14) / 1000.
    assert (found.drop.high - found.drop.low) / 2 == pytest.approx(1.96 * math.sqrt(16) / 1000, rel=0.05)
    assert found.drop.low < 0.010 < found.drop.high


def test_no_difference_seen_is_not_no_difference() -> None:
    few, many = (compare(*pair(count, 0, 0)).drop.high for count in (50, 5000))
    # With no event in n, the 97.5 % bound is about 3.7 / n.
    assert 2 / 50 < few < 4 / 50
    assert 2 / 5000 < many < 4 / 5000


@pytest.mark.parametrize(("loss", "gain"), [(0.002, 0.002), (0.02, 0.0), (0.1, 0.05)])
def test_intervals_of_the_drop_cover(loss: float, gain: float) -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        lost, won, _ = rng.multinomial(400, [loss, gain, 1 - loss - gain])
        drop = compare(*pair(400, lost, won)).drop
        covered += drop.low <= loss - gain <= drop.high
    assert covered >= 300 * 0.95 - 3 * math.sqrt(300 * 0.95 * 0.05)


def test_a_users_function_is_resampled_in_pairs(tmp_path: Path) -> None:
    file = tmp_path / "metrics.py"
    file.write_text("def score(outputs, labels):\n    return float((outputs.argmax(1) == labels).mean())\n")
    outputs, baseline, labels = pair(1000, lost=30, won=10, wrong=300)
    closed = compare(outputs, baseline, labels)
    found = accuracy_of("score", load_metric(f"{file}:score"), outputs, baseline, labels)
    assert found.value.value == pytest.approx(closed.value.value)
    for mine, exact in ((found.value, closed.value), (found.drop, closed.drop)):
        assert mine.high - mine.low == pytest.approx(exact.high - exact.low, rel=0.15)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise KeyError('boxes')", r"KeyError: 'boxes'"),
        ("return float('nan')", "the metric gave nan"),
        ("return 'good'", "ValueError"),
    ],
)
def test_a_users_function_that_fails_is_the_users(tmp_path: Path, body: str, says: str) -> None:
    file = tmp_path / f"metrics_{abs(hash(body))}.py"
    file.write_text(f"def score(outputs, labels):\n    {body}\n")
    with pytest.raises(UserError, match=says):
        load_metric(f"{file}:score")(one_hot(np.zeros(3, np.int64)), np.zeros(3, np.int64))


def test_what_top1_cannot_score_is_refused() -> None:
    labels = np.zeros(3, np.int64)
    for outputs in ((np.zeros((3, 2, 2), np.float32),), (np.zeros((2, 4), np.float32),), (np.zeros((3, 4), np.float32),) * 2):
        with pytest.raises(DataError, match="top1 needs one output of class scores"):
            top1(outputs, labels)
    with pytest.raises(NumericsError, match="NaN"):
        top1((np.full((3, 4), np.nan, np.float32),), labels)


@pytest.mark.parametrize(
    ("goal", "verdicts"),
    [
        (AccuracyGoal(max_drop=0.03), [Verdict.MET]),
        (AccuracyGoal(max_drop=0.001), [Verdict.MISSED]),
        (AccuracyGoal(max_drop=0.012), [Verdict.UNKNOWN]),
        (AccuracyGoal(floor=0.5, max_drop=0.03), [Verdict.MET, Verdict.MET]),
        (AccuracyGoal(floor=0.9), [Verdict.MISSED]),
        (AccuracyGoal(floor=0.69), [Verdict.UNKNOWN]),
        (AccuracyGoal(), []),
    ],
)
def test_the_pessimistic_end_decides(goal: AccuracyGoal, verdicts: list[Verdict]) -> None:
    found = compare(*pair(1000, lost=12, won=2, wrong=300))
    assert [finding.verdict for finding in judge_accuracy(goal, found)] == verdicts


def test_unknown_says_how_to_decide() -> None:
    found = compare(*pair(1000, lost=12, won=2, wrong=300))
    (finding,) = judge_accuracy(AccuracyGoal(max_drop=0.012), found)
    # Half-width 0.0078, distance 0.002: 1000 * 15.3.
    assert "1000 test samples cannot decide it, about 16000 more alike would" in finding.message
    (finding,) = judge_accuracy(AccuracyGoal(max_drop=0.012), None)
    assert (finding.verdict, finding.message) == (Verdict.UNKNOWN, "max_drop was not measured: the artifact was not scored")
