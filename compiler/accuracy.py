"""How well an artifact does on data that no pass saw, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy import stats

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

Outputs = Array | tuple[Array, ...]
"""An array of N samples; a tuple of them where the model has several outputs."""
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
    parts: list[tuple[Array, ...]] = []
    for inputs, _ in split.batches(size):
        found = model(*(torch.from_numpy(np.ascontiguousarray(array)) for array in inputs))
        parts.append(tuple(output.numpy() for output in (found if isinstance(found, tuple) else (found,))))
    return _joined(parts)


def _joined(parts: Sequence[tuple[Array, ...]]) -> Outputs:
    columns = tuple(np.concatenate(column) for column in zip(*parts, strict=True))
    return columns[0] if len(columns) == 1 else columns


def find_metric(name: str) -> Metric:
    """``top1``, or the function that ``file.py:function`` names.

    Raises:
        UserError: there is no such file or function. What the function raises when called is one too.
    """
    if name == TOP1:
        return top1
    from edgesmith.compiler.buildfile import Source
    from edgesmith.compiler.frontends.user_code import Running, load_function

    file, _, function_name = name.rpartition(":")
    function = load_function(Source(Path(file), function_name), DataError)

    def called(outputs: Outputs, labels: Array) -> float:
        with Running(Path(file), DataError):
            score = float(function(outputs, labels))
        if not math.isfinite(score):
            raise DataError(f"the metric gave {score}", where=name, hint="return a finite number; higher is better")
        return score

    return called


def top1(outputs: Outputs, labels: Array) -> float:
    """The fraction of samples whose largest output is that of their label.

    Raises:
        DataError: the outputs are not one row of class scores for each label.
        NumericsError: they hold NaN.
    """
    return float(_hits(outputs, labels).mean())


def _hits(outputs: Outputs, labels: Array) -> npt.NDArray[np.bool_]:
    if isinstance(outputs, tuple) or outputs.ndim != 2 or len(outputs) != len(labels) or labels.ndim != 1:
        shapes = [array.shape for array in outputs] if isinstance(outputs, tuple) else outputs.shape
        raise DataError(
            "top1 needs one output of class scores, [samples, classes], and one label a sample",
            why=f"the outputs are {shapes}, the labels {labels.shape}",
            hint='give your own function: metric = "file.py:function"',
        )
    if np.isnan(outputs).any():
        raise NumericsError("the outputs hold NaN")
    found: npt.NDArray[np.bool_] = outputs.argmax(axis=1) == labels
    return found


def compare(name: str, outputs: Outputs, baseline: Outputs, labels: Array, metric: Metric | None = None) -> Accuracy:
    """The accuracy of ``outputs``, and what it lost against ``baseline`` on the same samples.

    Samples are paired: what both models get wrong does not widen the interval of the drop. ``top1`` has exact forms, which also
    hold where hardly any sample differs; a function's intervals come from resampling test samples.
    """
    if name == TOP1:
        return _compare_hits(_hits(outputs, labels), _hits(baseline, labels))
    return _compare_resampled(name, metric or find_metric(name), (outputs, baseline), labels)


def _compare_hits(hits: npt.NDArray[np.bool_], before: npt.NDArray[np.bool_]) -> Accuracy:
    """Wilson's interval for the score; for the drop that of Bonett and Price 2012 ("Adjusted Wald confidence interval for a difference of
    binomial proportions based on paired data"): one more sample is counted lost and one more won.
    """
    count = len(hits)
    lost, won = int((before & ~hits).sum()), int((hits & ~before).sum())
    loss, gain = (lost + 1) / (count + 2), (won + 1) / (count + 2)
    middle = loss - gain
    half = float(stats.norm.ppf(1 - TAIL)) * math.sqrt((loss + gain - middle**2) / (count + 2))
    ends = stats.binomtest(int(hits.sum()), count).proportion_ci(1 - 2 * TAIL, method="wilson")
    drop = Interval((lost - won) / count, max(-1.0, middle - half), min(1.0, middle + half))
    return Accuracy(TOP1, Interval(float(hits.mean()), float(ends.low), float(ends.high)), float(before.mean()), drop, count)


def _compare_resampled(name: str, metric: Metric, both: tuple[Outputs, Outputs], labels: Array) -> Accuracy:
    """Intervals from the percentiles of a paired bootstrap (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", 13.3)."""
    rng = np.random.default_rng(0)
    value, baseline = (metric(outputs, labels) for outputs in both)
    scores = np.empty((RESAMPLES, 2))
    for row in scores:
        index = rng.integers(0, len(labels), len(labels))
        row[:] = [metric(_taken(outputs, index), labels[index]) for outputs in both]
    levels = [100 * TAIL, 100 * (1 - TAIL)]
    low, high = np.percentile(scores[:, 0], levels)
    drop_low, drop_high = np.percentile(scores[:, 1] - scores[:, 0], levels)
    drop = Interval(baseline - value, float(drop_low), float(drop_high))
    return Accuracy(name, Interval(value, float(low), float(high)), baseline, drop, len(labels))


def _taken(outputs: Outputs, index: npt.NDArray[np.int64]) -> Outputs:
    return tuple(array[index] for array in outputs) if isinstance(outputs, tuple) else outputs[index]


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
    message = " ".join(finding.message.split()).replace(" :", ":")
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
