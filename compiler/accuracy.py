"""How well an artifact does on data that no pass saw, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgesmith.compiler.budget import AccuracyGoal, Finding, Interval, Verdict, judge_above, judge_below
from edgesmith.compiler.data import Array, Split
from edgesmith.compiler.errors import DataError, NumericsError

if TYPE_CHECKING:
    from edgesmith.compiler.model import Model
    from edgesmith.compiler.profile.session import RunnerSession

TOP1 = "top1"
TAIL = 0.025
RESAMPLES = 500
BATCH = 256

Outputs = tuple[Array, ...]
"""One array of N samples for each output of the model."""
Metric = Callable[[Outputs, Array], float]
"""``(outputs, labels) -> score``; higher is better."""


@dataclass(frozen=True)
class Accuracy:
    """A score on ``samples`` test samples with its 95 % interval, and what it lost against ``baseline``, the source model's score on the same."""

    metric: str
    value: Interval
    baseline: float
    drop: Interval
    samples: int


def outputs_of(session: RunnerSession, split: Split) -> Outputs:
    """What the artifact in ``session`` says of every sample of ``split``, in order.

    Raises:
        DataError: the samples are not what the artifact takes.
        RunnerError: the runner died or hung.
    """
    return _joined([session.run(inputs) for inputs, _ in split.batches(BATCH)])


def model_outputs_of(model: Model, split: Split) -> Outputs:
    """What ``model`` says of every sample of ``split``, in order."""
    import torch

    size = BATCH if model.dynamic_batch else model.inputs[0].at_batch(1)[0]
    parts: list[Outputs] = []
    for inputs, _ in split.batches(size):
        found = model(*(torch.from_numpy(np.ascontiguousarray(array)) for array in inputs))
        parts.append(tuple(output.numpy() for output in (found if isinstance(found, tuple) else (found,))))
    return _joined(parts)


def _joined(parts: Sequence[Outputs]) -> Outputs:
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def load_metric(name: str) -> Metric:
    """``top1``, or the function that ``file.py:function`` names: it is called with the outputs (an array of N samples, a tuple of them where
    the model has several outputs) and the labels.

    Raises:
        UserError: there is no such file or function. What the function raises when called is one too.
    """
    if name == TOP1:
        return top1
    from edgesmith.compiler.buildfile import Source
    from edgesmith.compiler.frontends.user_code import load_function

    file, _, function_name = name.rpartition(":")
    return UserMetric(Path(file), load_function(Source(Path(file), function_name), DataError))


@dataclass(frozen=True)
class UserMetric:
    """A function of the user's ``file``; whatever it raises is a ``DataError`` with its line."""

    file: Path
    function: Callable[..., float]

    def __call__(self, outputs: Outputs, labels: Array) -> float:
        """One score."""
        return self.scores([(outputs, labels)])[0]

    def scores(self, pairs: Iterable[tuple[Outputs, Array]]) -> list[float]:
        """A score for each of ``pairs``, at the price of guarding one."""
        from edgesmith.compiler.frontends.user_code import Running

        with Running(self.file, DataError):
            found = [float(self.function(outputs[0] if len(outputs) == 1 else outputs, labels)) for outputs, labels in pairs]
        for score in found:
            if not math.isfinite(score):
                raise DataError(f"the metric gave {score}", where=str(self.file), hint="return a finite number; higher is better")
        return found


def top1(outputs: Outputs, labels: Array) -> float:
    """The fraction of samples whose largest output is that of their label.

    Raises:
        DataError: the outputs are not one row of class scores for each label.
        NumericsError: they hold NaN.
    """
    return float(_hits(outputs, labels).mean())


def _hits(outputs: Outputs, labels: Array) -> npt.NDArray[np.bool_]:
    if len(outputs) != 1 or outputs[0].ndim != 2 or labels.shape != outputs[0].shape[:1]:
        raise DataError(
            "top1 needs one output of class scores, [samples, classes], and one label a sample",
            why=f"the outputs are {[array.shape for array in outputs]}, the labels {labels.shape}",
            hint='give your own function: metric = "file.py:function"',
        )
    if np.isnan(outputs[0]).any():
        raise NumericsError("the outputs hold NaN")
    found: npt.NDArray[np.bool_] = outputs[0].argmax(axis=1) == labels
    return found


def accuracy_of(name: str, metric: Metric, outputs: Outputs, baseline: Outputs, labels: Array, *, seed: int = 0) -> Accuracy:
    """The accuracy of ``outputs`` by the metric called ``name``, and what it lost against ``baseline`` on the same samples.

    Samples are paired: what both models get wrong does not widen the interval of the drop. ``top1`` has closed forms, which also
    hold where hardly any sample differs; a function's intervals come from resampling test samples, drawn with ``seed``.
    """
    if name == TOP1:
        return _compare_hits(_hits(outputs, labels), _hits(baseline, labels))
    return _compare_resampled(name, metric, (outputs, baseline), labels, seed)


def _compare_hits(hits: npt.NDArray[np.bool_], before: npt.NDArray[np.bool_]) -> Accuracy:
    """Wilson's interval for the score; for the drop that of Bonett and Price 2012 ("Adjusted Wald confidence interval for a difference of
    binomial proportions based on paired data"): one more sample is counted lost and one more won.
    """
    from scipy import stats

    count = len(hits)
    lost, won = int((before & ~hits).sum()), int((hits & ~before).sum())
    loss, gain = (lost + 1) / (count + 2), (won + 1) / (count + 2)
    middle = loss - gain
    half = float(stats.norm.ppf(1 - TAIL)) * math.sqrt((loss + gain - middle**2) / (count + 2))
    ends = stats.binomtest(int(hits.sum()), count).proportion_ci(1 - 2 * TAIL, method="wilson")
    drop = Interval((lost - won) / count, max(-1.0, middle - half), min(1.0, middle + half))
    return Accuracy(TOP1, Interval(float(hits.mean()), float(ends.low), float(ends.high)), float(before.mean()), drop, count)


def _compare_resampled(name: str, metric: Metric, both: tuple[Outputs, Outputs], labels: Array, seed: int) -> Accuracy:
    """Intervals from the percentiles of a paired bootstrap (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", 13.3)."""
    rng = np.random.default_rng(seed)
    everything = np.arange(len(labels))
    draws = (everything, *(rng.integers(0, len(labels), len(labels)) for _ in range(RESAMPLES)))
    pairs = ((tuple(array[index] for array in outputs), labels[index]) for index in draws for outputs in both)
    found = metric.scores(pairs) if isinstance(metric, UserMetric) else [metric(*pair) for pair in pairs]
    (value, baseline), scores = found[:2], np.reshape(found[2:], (RESAMPLES, 2))
    levels = [100 * TAIL, 100 * (1 - TAIL)]
    low, high = np.percentile(scores[:, 0], levels)
    drop_low, drop_high = np.percentile(scores[:, 1] - scores[:, 0], levels)
    drop = Interval(baseline - value, float(drop_low), float(drop_high))
    return Accuracy(name, Interval(value, float(low), float(high)), baseline, drop, len(labels))


def judge_accuracy(goal: AccuracyGoal, accuracy: Accuracy | None) -> tuple[Finding, ...]:
    """One finding for each of ``max_drop`` and ``floor`` that ``goal`` sets; UNKNOWN where nothing was scored."""
    why = "the artifact was not scored"
    findings = []
    if goal.max_drop is not None:
        findings.append(_decidable(judge_below("max_drop", goal.max_drop, accuracy.drop if accuracy else None, "", why), accuracy))
    if goal.floor is not None:
        findings.append(_decidable(judge_above("floor", goal.floor, accuracy.value if accuracy else None, "", why), accuracy))
    return tuple(findings)


def _decidable(finding: Finding, accuracy: Accuracy | None) -> Finding:
    """The finding with how many test samples would decide it: an interval narrows with the root of their number."""
    message = " ".join(finding.message.split())
    if finding.verdict is Verdict.UNKNOWN and accuracy is not None and finding.measured is not None:
        assert finding.low is not None and finding.high is not None
        distance, half = abs(finding.measured - finding.limit), (finding.high - finding.low) / 2
        needed = f"about {_rounded_up(accuracy.samples * (half / distance) ** 2)}" if distance > half / 10 else "many"
        message += f"; {accuracy.samples} test samples cannot decide it, {needed} more alike would"
    return replace(finding, message=message)


def _rounded_up(count: float) -> int:
    """To two digits: it is an estimate."""
    unit = 10 ** max(0, math.floor(math.log10(count)) - 1)
    return int(math.ceil(count / unit) * unit)
