"""Which form of a model a target ships: its float file, or one of the INT8 schemes of its plan.

Whether a scheme pays is a question per model, runtime, version and processor that only a measurement answers. So every form is lowered, all are timed
against each other in one run, each is scored in its own runtime on validation data, and the fastest that keeps the accuracy is taken. Where that leaves
something to wish, the rungs above are climbed: forms that mix their schemes, forms with int16 activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType

from edgesmith.compiler.budget import Interval
from edgesmith.compiler.errors import NumericsError, UnsupportedError
from edgesmith.compiler.forms import FLOAT, schemes
from edgesmith.compiler.model import Model
from edgesmith.compiler.profile.comparison import Comparison
from edgesmith.compiler.quantplan import Scheme
from edgesmith.compiler.target import Artifact

MIXED = "mixed"
MOST_TRIED = 3
"""So many forms of one rung are lowered for one target, until one keeps the accuracy."""
TIE = 0.03
"""Forms whose times differ by less are as fast: what is left is for their sizes to decide."""


@dataclass(frozen=True)
class Tried:
    """One form on one target.

    ``ratio`` is the time of a call over that of the float file, with its 95 % interval, and ``p50_ms`` the float file's median times that: each file's
    own median may come from another mood of the machine. ``accuracy`` is that of the file in its runtime on validation data. ``refused`` says why there
    is no file, whose file it equals, or why it was not timed; what is not known is None. ``latency_ms`` is likewise at the percentile of the limits, and
    ``schemes`` says by source path how the operators with weights run.
    """

    name: str
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    size_bytes: int | None = None
    p50_ms: float | None = None
    latency_ms: float | None = None
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
    def shipped(self) -> Tried:
        """The chosen form."""
        return next(t for t in self.tried if t.name == self.chosen)

    @property
    def warning(self) -> str:
        """What to say with the verdict where a file is shipped that is slower than the float one, by more than a tie or beyond doubt; else nothing."""
        ratio = self.shipped.ratio
        if ratio is None or (ratio.value <= 1 + TIE and ratio.low <= 1):
            return ""
        return f"slower than float; ships {self.chosen}: {self.reason}"


@dataclass(frozen=True)
class Limits:
    """What a form must keep: ``floor``, the least accuracy on validation data, ``size_bytes``, and ``latency_ms`` at ``percentile``. None: nothing is asked."""

    floor: float | None = None
    size_bytes: float | None = None
    latency_ms: float | None = None
    percentile: float = 90


@dataclass(frozen=True)
class Known:
    """A form that has a file, and what was measured of it."""

    model: Model
    artifact: Artifact
    tried: Tried


Rung = Callable[[Sequence[Known], float], Iterator[Model]]
"""What was measured so far, and a time: further forms that may take less than so many milliseconds, the most promising first."""


def arbitrate(
    models: Mapping[str, Model],
    lower: Callable[[Model], Artifact],
    compare: Callable[[Sequence[Artifact]], Comparison],
    score: Callable[[Artifact], float] | None,
    limits: Limits,
    rungs: Mapping[str, Rung] = MappingProxyType({}),
) -> tuple[Artifact, Ruling]:
    """Lower, time and score every form of ``models``, and choose; where none of them is within the limits and as fast as one that is not, climb on.

    Args:
        models: name -> form; FLOAT first.
        lower: of one target.
        compare: times artifacts against the first.
        score: accuracy of an artifact on validation data, greater is better; None without data.
        limits: of the target.
        rungs: name -> further forms, in this order, until nothing is left to wish. Where one raises ``UnsupportedError``, the ruling says why.

    Raises:
        UnsupportedError: the target cannot run the float form.
    """
    files = _Files(lower, compare, score, limits)
    for name, model in models.items():
        files.add(name, model)
    ruling, remarks = files.rule(), []
    for name, rung in rungs.items():
        if leaves_to_wish(ruling, limits):
            try:
                ruling = _climbed(files, ruling, name, rung)
            except UnsupportedError as error:
                remarks.append(f"nothing {name} was tried: {error.what}")
    seen = {t.name for t in ruling.tried}
    tried = (*ruling.tried, *(t for t in files.not_timed() if t.name not in seen))
    return files.artifacts[ruling.chosen], Ruling(ruling.chosen, "; ".join((ruling.reason, *remarks)), tried)


def _climbed(files: _Files, ruling: Ruling, name: str, rung: Rung) -> Ruling:
    """``ruling`` after the first form of ``rung`` that keeps the accuracy joined; those that do not are set aside."""
    for number, model in enumerate(islice(rung(files.known(ruling), _worth_ms(ruling, files.limits)), MOST_TRIED)):
        label = f"{name} {number + 1}" if number else name
        if files.add(label, model) and files.keeps_accuracy(label):
            return files.rule()
        files.set_aside(label)
    return ruling


def leaves_to_wish(ruling: Ruling, limits: Limits) -> bool:
    """Whether the chosen form is too inaccurate or too late, or a faster one is too inaccurate; not where none is small enough, which no mixture would be."""
    chosen = ruling.shipped
    late = limits.latency_ms is not None and chosen.latency_ms is not None and chosen.latency_ms > limits.latency_ms
    files = (t for t in ruling.tried if not t.refused)
    faster = (t for t in files if _fits(t, limits) and not _accurate(t, limits) and _time(t) * (1 + TIE) < _time(chosen))
    return _fits(chosen, limits) and (late or not _accurate(chosen, limits) or any(faster))


def _worth_ms(ruling: Ruling, limits: Limits) -> float:
    """What a form must stay below to be of use: the time of the chosen one, if that keeps the accuracy."""
    kept = _accurate(ruling.shipped, limits)
    return ruling.shipped.p50_ms if kept and ruling.shipped.p50_ms is not None else math.inf


@dataclass
class _Files:
    """The files of the forms of one model."""

    lower: Callable[[Model], Artifact]
    compare: Callable[[Sequence[Artifact]], Comparison]
    score: Callable[[Artifact], float] | None
    limits: Limits
    models: dict[str, Model] = field(default_factory=dict)
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    _refused: dict[str, str] = field(default_factory=dict)
    _accuracy: dict[str, float | None] = field(default_factory=dict)

    def add(self, name: str, model: Model) -> bool:
        """Lower and score one more form. False: there is no file, or it is that of another form."""
        self.models[name] = model
        try:
            artifact = self.lower(model)
        except (NumericsError, UnsupportedError) as error:
            if name == FLOAT:
                raise
            self._refused[name] = f"{error.what}: {error.why}" if error.why else error.what
            return False
        same = next((other for other, known in self.artifacts.items() if known.sha256 == artifact.sha256), None)
        if same is not None:
            self._refused[name] = f"its file is that of {same}"
            return False
        self.artifacts[name] = artifact
        self._accuracy[name] = self.score(artifact) if self.score else None
        return True

    def set_aside(self, name: str) -> None:
        """Do not time a form that loses too much."""
        if self.artifacts.pop(name, None) is not None:
            self._refused[name] = "loses too much on validation data"

    def keeps_accuracy(self, name: str) -> bool:
        """Whether the file of ``name`` keeps the accuracy that is asked."""
        return _accurate(Tried(name, accuracy=self._accuracy[name]), self.limits)

    def known(self, ruling: Ruling) -> list[Known]:
        """What was measured of every file."""
        return [Known(self.models[t.name], self.artifacts[t.name], t) for t in ruling.tried if t.name in self.artifacts]

    def rule(self) -> Ruling:
        """Time all files in one run and choose."""
        names = list(self.artifacts)
        timed = self.compare([self.artifacts[name] for name in names]) if len(names) > 1 else None
        tried = {name: self._tried(name, timed, place) for place, name in enumerate(names)}
        tried |= {t.name: t for t in self.not_timed()}
        chosen, reason = choose([tried[name] for name in names], self.limits)
        return Ruling(chosen, reason, tuple(tried[name] for name in self.models))

    def not_timed(self) -> list[Tried]:
        """The forms that were refused or set aside."""
        return [Tried(name, schemes(self.models[name]), accuracy=self._accuracy.get(name), refused=why) for name, why in self._refused.items()]

    def _tried(self, name: str, timed: Comparison | None, place: int) -> Tried:
        ratio = _ratio(timed, place) if timed else None
        share = ratio.value if ratio else 1.0
        return Tried(
            name,
            schemes(self.models[name]),
            size_bytes=self.artifacts[name].size_bytes,
            p50_ms=timed.profiles[0].latency_ms(50).value * share if timed else None,
            latency_ms=timed.profiles[0].latency_ms(self.limits.percentile).value * share if timed else None,
            ratio=ratio,
            accuracy=self._accuracy[name],
        )


def _ratio(timed: Comparison, place: int) -> Interval:
    """The time of one file over the first's; by the medians of all calls, with no interval, where hardly a call kept its core."""
    if place == 0:
        return Interval.exact(1.0)
    ratio = timed.ratio(place)
    if math.isfinite(ratio.value):
        return ratio
    return Interval(timed.profiles[place].latency_ms(50).value / timed.profiles[0].latency_ms(50).value, 0.0, math.inf)


def choose(tried: Sequence[Tried], limits: Limits) -> tuple[str, str]:
    """The name of the fastest of ``tried`` that is within ``limits``, and why it; of those that are as fast, the smallest.

    Where none is within them, the size goes first (what does not fit is not shipped), and the most accurate of what is left is taken.
    """
    fitting = [t for t in tried if _fits(t, limits)] or [min(tried, key=lambda t: t.size_bytes or 0)]
    accurate = [t for t in fitting if _accurate(t, limits)]
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


def _fits(tried: Tried, limits: Limits) -> bool:
    return limits.size_bytes is None or (tried.size_bytes or 0) <= limits.size_bytes


def _accurate(tried: Tried, limits: Limits) -> bool:
    return limits.floor is None or tried.accuracy is None or tried.accuracy >= limits.floor


def _time(tried: Tried) -> float:
    return tried.ratio.value if tried.ratio is not None else 1.0


def _as_fast(tried: Tried, fastest: Tried) -> bool:
    return tried.ratio is None or fastest.ratio is None or tried.ratio.value <= fastest.ratio.value * (1 + TIE)


def _share(ratio: Interval) -> str:
    return f"{ratio.value:.2f} of the float file's time"
