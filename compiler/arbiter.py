"""Which form of a model a target ships: its float file, or one of the INT8 schemes of its plan.

Whether a scheme pays is a question per model, runtime, version and processor that only a measurement answers. So every form is lowered, all are timed
against each other in one run, each is scored in its own runtime on validation data, and the fastest that keeps the accuracy is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from edgesmith.compiler.budget import Interval
from edgesmith.compiler.cost import products
from edgesmith.compiler.errors import NumericsError, UnsupportedError
from edgesmith.compiler.model import Model
from edgesmith.compiler.profile.comparison import Comparison
from edgesmith.compiler.quantplan import QuantPlan
from edgesmith.compiler.target import Artifact

FLOAT = "float"
TIE = 0.03
"""Forms whose times differ by less are as fast: what is left is for their sizes to decide."""
LEAST_SHARE = 0.1
"""A form is tried if it computes this share of the products otherwise than every form before it."""


@dataclass(frozen=True)
class Tried:
    """One form on one target.

    ``ratio`` is the time of a call over that of the float file, with its 95 % interval, and ``p50_ms`` the float file's median times that: each file's
    own median may come from another mood of the machine. ``accuracy`` is that of the file in its runtime on validation data. ``refused`` says why there
    is no file, or whose file it equals; then the numbers are None.
    """

    name: str
    size_bytes: int | None = None
    p50_ms: float | None = None
    ratio: Interval | None = None
    accuracy: float | None = None
    refused: str = ""


@dataclass(frozen=True)
class Ruling:
    """The form that was ``chosen``, why, and all that were ``tried``."""

    chosen: str
    reason: str
    tried: tuple[Tried, ...]

    @property
    def warning(self) -> str:
        """What to say with the verdict where a file is shipped that is slower than the float one, by more than a tie or beyond doubt; else nothing."""
        (ratio,) = (t.ratio for t in self.tried if t.name == self.chosen)
        if ratio is None or (ratio.value <= 1 + TIE and ratio.low <= 1):
            return ""
        return f"slower than float; ships {self.chosen}: {self.reason}"


@dataclass(frozen=True)
class Limits:
    """What a form must keep: ``floor``, the least accuracy on validation data, and ``size_bytes``. None where nothing is asked."""

    floor: float | None = None
    size_bytes: float | None = None


def forms(model: Model, twin: Model) -> dict[str, Model]:
    """``twin`` (``model`` before quantization) as FLOAT, and ``model`` by those of its plan's alternatives that differ enough to be worth a file."""
    plan = model.quant
    assert plan is not None
    work = {node.name: count for node, count in products(model.graph).items()}
    least = LEAST_SHARE * sum(work.values())
    tried: dict[str, QuantPlan] = {FLOAT: QuantPlan()}
    for name in plan.alternatives:
        form = plan.by(name)
        if all(sum(count for node, count in work.items() if form.scheme(node) is not other.scheme(node)) >= least for other in tried.values()):
            tried[name] = form
    return {name: twin if name == FLOAT else replace(model, quant=form) for name, form in tried.items()}


def arbitrate(
    models: Mapping[str, Model],
    lower: Callable[[Model], Artifact],
    compare: Callable[[Sequence[Artifact]], Comparison],
    score: Callable[[Artifact], float] | None,
    limits: Limits,
) -> tuple[Artifact, Ruling]:
    """Lower, time and score every form of ``models``, and choose.

    Args:
        models: name -> form; FLOAT first.
        lower: of one target.
        compare: times artifacts against the first.
        score: accuracy of an artifact on validation data, greater is better; None without data.
        limits: of the target.

    Raises:
        UnsupportedError: the target cannot run the float form.
    """
    artifacts: dict[str, Artifact] = {}
    tried: dict[str, Tried] = {}
    for name, model in models.items():
        artifact = _lowered(model, lower, name, tried)
        if artifact is None:
            continue
        same = next((other for other, known in artifacts.items() if known.sha256 == artifact.sha256), None)
        if same is None:
            artifacts[name] = artifact
        else:
            tried[name] = Tried(name, refused=f"its file is that of {same}")
    names = list(artifacts)
    timed = compare([artifacts[name] for name in names]) if len(names) > 1 else None
    for place, name in enumerate(names):
        ratio = _ratio(timed, place) if timed else None
        tried[name] = Tried(
            name,
            size_bytes=artifacts[name].size_bytes,
            p50_ms=timed.profiles[0].latency_ms(50).value * ratio.value if timed and ratio else None,
            ratio=ratio,
            accuracy=score(artifacts[name]) if score else None,
        )
    chosen, reason = choose([tried[name] for name in names], limits)
    return artifacts[chosen], Ruling(chosen, reason, tuple(tried[name] for name in models))


def _ratio(timed: Comparison, place: int) -> Interval:
    """The time of one file over the first's; by the medians of all calls, with no interval, where hardly a call kept its core."""
    if place == 0:
        return Interval.exact(1.0)
    ratio = timed.ratio(place)
    if math.isfinite(ratio.value):
        return ratio
    return Interval(timed.profiles[place].latency_ms(50).value / timed.profiles[0].latency_ms(50).value, 0.0, math.inf)


def _lowered(model: Model, lower: Callable[[Model], Artifact], name: str, tried: dict[str, Tried]) -> Artifact | None:
    """The file of an INT8 form, or None and a note of why there is none; the float form must have one."""
    if name == FLOAT:
        return lower(model)
    try:
        return lower(model)
    except (NumericsError, UnsupportedError) as error:
        tried[name] = Tried(name, refused=f"{error.what}: {error.why}" if error.why else error.what)
        return None


def choose(tried: Sequence[Tried], limits: Limits) -> tuple[str, str]:
    """The name of the fastest of ``tried`` that is within ``limits``, and why it; of those that are as fast, the smallest.

    Where none is within them, the size goes first (what does not fit is not shipped), and the most accurate of what is left is taken.
    """
    fitting = [t for t in tried if limits.size_bytes is None or (t.size_bytes or 0) <= limits.size_bytes] or [min(tried, key=lambda t: t.size_bytes or 0)]
    accurate = [t for t in fitting if limits.floor is None or t.accuracy is None or t.accuracy >= limits.floor]
    if not accurate:
        best = max(fitting, key=lambda t: (t.accuracy or 0.0, -_time(t)))
        return best.name, f"the most accurate: none that fits keeps {limits.floor:.4f} on validation data"
    fastest = min(accurate, key=_time)
    equal = [t for t in accurate if _as_fast(t, fastest)]
    smallest = min(equal, key=lambda t: (t.size_bytes or 0, _time(t)))
    out = [t.name for t in tried if t not in accurate]
    beyond = f"; {', '.join(out)} {'is' if len(out) == 1 else 'are'} not within the limits of accuracy and size" if out else ""
    if smallest.ratio is None:
        return smallest.name, "the only file"
    why = f"the fastest, {_share(smallest.ratio)}" if len(equal) == 1 else f"the smallest of {len(equal)} that are as fast, {_share(smallest.ratio)}"
    return smallest.name, why + beyond


def _time(tried: Tried) -> float:
    return tried.ratio.value if tried.ratio is not None else 1.0


def _as_fast(tried: Tried, fastest: Tried) -> bool:
    return tried.ratio is None or fastest.ratio is None or tried.ratio.value <= fastest.ratio.value * (1 + TIE)


def _share(ratio: Interval) -> str:
    return f"{ratio.value:.2f} of the float file's time"
