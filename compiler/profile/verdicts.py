"""A measurement against a budget."""

from __future__ import annotations

import math
from dataclasses import replace

from edgesmith.compiler.budget import Budget, Finding, Interval, Verdict, judge_below
from edgesmith.compiler.profile.memory_types import Memory
from edgesmith.compiler.profile.recording import LEAST_KEPT
from edgesmith.compiler.profile.types import Profile

BYTES_PER_MB = 1_000_000


def judge(budget: Budget, profile: Profile | None, size_bytes: int | None, *, device: str = "host") -> tuple[Finding, ...]:
    """One finding per limit of ``budget``: ``latency_ms`` at its percentile, ``memory_mb``, ``size_mb``.

    ``memory_mb`` is what a phone counts against the app: private dirty memory that the model adds to its process, packed weights and
    arenas included, at the most of three moments (loaded, first run, steady state). Clean pages of the mapped file do not count, since the
    kernel can drop them. What was not measured on ``device`` is UNKNOWN,
    and so is a latency that did not meet its limit on a machine which other processes kept busy.
    """
    here = profile if profile is not None and profile.device == device else None
    why = f"nothing was measured on device {device}" if here is None else "the kernel does not count memory here"
    findings = []
    if budget.latency_ms is not None:
        findings.append(_latency(budget.latency_ms, budget.percentile, here, why))
    if budget.memory_mb is not None:
        findings.append(_memory(budget.memory_mb, here.memory if here is not None else None, why))
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
    if finding.verdict is Verdict.MET:
        return replace(finding, message=message)
    if math.isinf(measured.high):
        return replace(finding, message=f"{message} ({len(profile.samples_ns)} calls are too few to bound p{percentile}: measure longer)")
    if profile.kept < LEAST_KEPT:
        loaded = f"the machine is too loaded to decide: {1 - profile.kept:.0%} of the calls were disturbed by other processes"
        return replace(finding, verdict=Verdict.UNKNOWN, message=f"{message}; {loaded}")
    longer = " (measure longer, on a quieter machine)" if finding.verdict is Verdict.UNKNOWN else ""
    return replace(finding, message=message + longer)


def _memory(limit_mb: float, memory: Memory | None, why: str) -> Finding:
    if memory is None:
        return judge_below("memory_mb", limit_mb, None, "MB", why)
    finding = judge_below("memory_mb", limit_mb, _in_mb(memory.dirty_bytes), "MB", between=f"{len(memory.processes)} processes:")
    message = finding.message.replace(" is ", " of dirty memory is ", 1)
    beside = [(memory.mapped_bytes.high, "clean pages of the file"), (memory.peak_rss_bytes.high, "at the peak of resident memory")]
    message += f" (not counted: {', '.join(f'{size / BYTES_PER_MB:.4g} MB {what}' for size, what in beside)})"
    return replace(finding, message=message)


def _in_mb(measured: Interval) -> Interval:
    return Interval(measured.value / BYTES_PER_MB, measured.low / BYTES_PER_MB, measured.high / BYTES_PER_MB)
