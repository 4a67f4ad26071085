"""A measurement against a budget."""

from __future__ import annotations

import math
from dataclasses import replace

from edgesmith.compiler.budget import Budget, Finding, Interval, Verdict, judge_below
from edgesmith.compiler.profile.types import Profile

BYTES_PER_MB = 1_000_000


def judge(budget: Budget, profile: Profile | None, size_bytes: int | None, *, device: str = "host") -> tuple[Finding, ...]:
    """One finding per limit of ``budget``: ``latency_ms`` at its percentile, ``memory_mb``, ``size_mb``.

    ``memory_mb`` is the increase of the process's peak memory over the same process without the model. What was not
    measured on ``device`` is UNKNOWN.
    """
    here = profile if profile is not None and profile.device == device else None
    why = f"nothing was measured on device {device}" if here is None else "the kernel does not count memory here"
    findings = []
    if budget.latency_ms is not None:
        findings.append(_latency(budget.latency_ms, budget.percentile, here, why))
    if budget.memory_mb is not None:
        memory = here.model_rss_bytes if here is not None else None
        findings.append(judge_below("memory_mb", budget.memory_mb, _in_mb(memory), "MB", why))
    if budget.size_mb is not None:
        size = None if size_bytes is None else Interval.exact(size_bytes / BYTES_PER_MB)
        findings.append(judge_below("size_mb", budget.size_mb, size, "MB", "there is no file"))
    return tuple(findings)


def _latency(limit_ms: float, percentile: int, profile: Profile | None, why: str) -> Finding:
    if profile is None:
        return judge_below("latency_ms", limit_ms, None, "ms", why)
    measured = profile.latency_ms(percentile)
    finding = judge_below("latency_ms", limit_ms, measured, "ms")
    message = f"p{percentile} {finding.message}"
    if finding.verdict is Verdict.UNKNOWN:
        few = f"{len(profile.samples_ns)} calls are too few to bound p{percentile}"
        message += f" ({few}: measure longer)" if math.isinf(measured.high) else " (measure longer, on a quieter machine)"
    return replace(finding, message=message)


def _in_mb(measured: Interval | None) -> Interval | None:
    if measured is None:
        return None
    return Interval(measured.value / BYTES_PER_MB, measured.low / BYTES_PER_MB, measured.high / BYTES_PER_MB)
