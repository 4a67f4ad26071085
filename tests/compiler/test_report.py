"""The report as data, as text and as a page."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from edgesmith.compiler import report_plots
from edgesmith.compiler.accuracy import accuracy_of, judge_accuracy, top1
from edgesmith.compiler.budget import AccuracyGoal, Budget, Finding, Verdict
from edgesmith.compiler.candidate import Candidate
from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.files import file_hash
from edgesmith.compiler.model import PassRecord
from edgesmith.compiler.profile.memory_types import PHASES, Memory, MemoryPlan, MemoryUse
from edgesmith.compiler.profile.types import Profile
from edgesmith.compiler.profile.verdicts import judge
from edgesmith.compiler.report import ModelReport, Report, TargetReport, binding, summary
from edgesmith.compiler.report_html import gauge, page
from edgesmith.compiler.report_text import show
from edgesmith.compiler.target import Artifact

MB = 1_000_000
READINGS = [[n * MB // 10 for n in row] for row in ((400, 510, 545, 540), (400, 650, 660, 660), (150, 235, 275, 270), (250, 260, 275, 275), (0, 20, 25, 25))]
"""Of each phase: resident memory, its peak, dirty, mapped, of the artifact's file."""
NASTY = "<script>alert('$x^2$ & co')</script>"


def profile(p50_ms: float, threads: int = 1) -> Profile:
    rng = np.random.default_rng(0)
    return Profile(
        device="host",
        threads=threads,
        runtime_version="1.31.1",
        samples_ns=(p50_ms * 1e6 * np.exp(rng.normal(0, 0.05, 800))).astype(np.int64),
        block_sizes=(40,) * 20,
        rounds=tuple(number // 4 for number in range(20)),
        kept=1.0,
        load_ms=18.4,
        memory=Memory(tuple(tuple(map(MemoryUse, PHASES, *READINGS)) for _ in range(2)), MemoryPlan(1_000_000, 7_000_000, 4_000_000, 300_000, 2_000_000)),
        environment={"cpu": "Example 9000", "cpu_features": "avx2 avx512_vnni", "cores": "2", "load_average": str(p50_ms)},
    )


def artifact(folder: Path, suffix: str, size: int) -> Artifact:
    path = folder / f"model{suffix}"
    path.write_bytes(bytes(size))
    return Artifact(path, suffix, size, file_hash(path), "f" * 64, diagnostics=(Diagnostic(Severity.INFO, "litert.float-island", "head.norm", "stays float"),))


def target(folder: Path, name: str, suffix: str, p50_ms: float, *, limit_ms: float = 5.0, lost: int = 4, size: int = 120_000) -> TargetReport:
    made, measured = artifact(folder, suffix, size), profile(p50_ms)
    labels = np.zeros(800, np.int64)
    right, wrong = np.eye(2, dtype=np.float32)[[0, 1]]
    outputs = np.where((np.arange(800) < 20 + lost)[:, None], wrong, right)
    before = np.where((np.arange(800) < 20)[:, None], wrong, right)
    accuracy = accuracy_of("top1", top1, (outputs,), (before,), labels)
    budget = Budget(latency_ms=limit_ms, percentile=90, memory_mb=100, size_mb=1)
    findings = (*judge(budget, measured, size), *judge_accuracy(AccuracyGoal(max_drop=0.02), accuracy))
    return TargetReport.of(name, made, measured, accuracy, findings)


def records() -> tuple[PassRecord, ...]:
    sizes = [(depth, width) for depth in (4, 6, 8) for width in (0.5, 0.75, 1.0)]
    candidates = tuple(
        Candidate(
            name=f"depth {depth}, width {width:.2f}",
            params=int(1.2e6 * depth / 8 * width**2),
            macs=int(9e7 * depth / 8 * width**2),
            accuracy=0.97 - 0.05 * (1 - width) - 0.012 * (8 - depth),
            latency_ms=3.2 * depth * width / 8,
            size_bytes=500_000,
            kept=(depth, width) == (6, 0.75),
            reason=NASTY if width == 1 else "ranked after a short distillation",
        )
        for depth, width in sizes
    )
    warned = (Diagnostic(Severity.WARNING, "axes.no-rule", "blocks.3.attn", f"no rule for {NASTY}", "its channels stay as they are"),)
    return (
        PassRecord("select-student", 61.2, True, 500_000, 40_000_000, "a", (), candidates),
        PassRecord("prune{ratio=0.25,heads=0.4}", 3.1, True, 290_000, 22_000_000, "b", warned),
        PassRecord("recover{epochs=30}", 44.0, True, 290_000, 22_000_000, "c"),
        PassRecord("fold-batch-norm", 0.2, False, 290_000, 22_000_000, "c"),
        PassRecord("quantize", 2.5, True, 290_000, 22_000_000, "d"),
    )


def built(*targets: TargetReport, passes: tuple[PassRecord, ...] | None = None) -> Report:
    teacher, model = ModelReport(1_200_000, 90_000_000, "0" * 64), ModelReport(290_000, 22_000_000, "ab" * 32)
    return Report.of(teacher=teacher, model=model, passes=records() if passes is None else passes, targets=targets, key="k")


@pytest.fixture
def met(tmp_path: Path) -> Report:
    return built(target(tmp_path, "onnxruntime", ".onnx", 0.8), target(tmp_path, "litert", ".tflite", 0.4), target(tmp_path, "executorch", ".pte", 1.9))


@pytest.fixture
def missed(tmp_path: Path) -> Report:
    return built(
        target(tmp_path, "onnxruntime", ".onnx", 0.8),
        target(tmp_path, "litert", ".tflite", 7.4, lost=8),
        target(tmp_path, "executorch", ".pte", 1.9, limit_ms=2.03, lost=40),
    )


def test_verdict_and_exit_code(met: Report, missed: Report, tmp_path: Path) -> None:
    assert (met.verdict, met.exit_code) == (Verdict.MET, 0)
    assert (missed.verdict, missed.exit_code) == (Verdict.MISSED, 1)
    unknown = built(target(tmp_path, "litert", ".tflite", 1.9, limit_ms=2.03))
    assert (unknown.verdict, unknown.exit_code) == (Verdict.UNKNOWN, 3)


def test_json_has_what_the_schema_promises(missed: Report) -> None:
    data = json.loads(missed.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert data["schema_version"] == 1
    assert (data["verdict"], data["exit_code"]) == ("missed", 1)
    assert set(data["model"]) == {"params", "macs", "fingerprint"}
    assert {"spec", "seconds", "changed", "params", "macs", "diagnostics"} <= set(data["passes"][0])
    first = data["targets"][0]
    assert set(first) >= {"name", "runtime_version", "device", "threads", "artifact", "latency_ms", "memory_mb", "load_ms", "accuracy", "findings"}
    assert set(first["artifact"]) == {"path", "size_bytes", "sha256"}
    assert set(first["latency_ms"]) == {"p50", "p90", "p99", "ci_low", "ci_high", "samples"}
    assert set(first["accuracy"]) == {"metric", "value", "baseline", "drop", "samples"}
    assert set(first["findings"][0]) == {"budget", "verdict", "limit", "measured", "low", "high", "message"}
    plan = {"weights": 1.0, "packed": 7.0, "arena": 4.0, "runtime": 0.3, "mapped": 2.0}
    model = {"model": 12.5, "loaded": 8.5, "first": 12.5, "steady": 12.0, "mapped": 2.5, "peak": 26.0, "plan": plan}
    assert first["memory_mb"] == {"peak_rss": 66.0, **model}
    assert (first["accuracy"]["drop"], first["accuracy"]["samples"]) == (pytest.approx(0.005), 800)
    assert len(data["candidates"]) == 9
    assert data["environment"] == {"cpu": "Example 9000", "cpu_features": "avx2 avx512_vnni", "cores": "2"}


def test_json_comes_back_as_the_same_report(missed: Report) -> None:
    assert Report.from_json(missed.to_json()) == missed
    with pytest.raises(ValueError, match="schema_version is 2"):
        Report.from_json(replace(missed, schema_version=2).to_json())


def test_an_unbounded_interval_is_null_in_json(tmp_path: Path) -> None:
    slow = replace(profile(500.0), samples_ns=np.full(20, 500_000_000), block_sizes=(4,) * 5, rounds=tuple(range(5)))
    findings = judge(Budget(latency_ms=1000), slow, 1)
    report = built(TargetReport.of("litert", artifact(tmp_path, ".tflite", 10), slow, None, findings))
    data = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert data["targets"][0]["latency_ms"]["ci_high"] is None
    assert data["targets"][0]["findings"][0]["high"] is None
    assert data["verdict"] == "unknown"
    assert "Infinity" not in page(report) and "inf" in findings[0].message


def test_a_written_report_is_known_until_something_it_speaks_of_changes(met: Report, tmp_path: Path) -> None:
    assert Report.known(tmp_path, "k") is None
    met.write(tmp_path)
    assert Report.known(tmp_path, "k") == met
    assert Report.known(tmp_path, "another") is None
    (tmp_path / "model.onnx").write_bytes(bytes([1] * 120_000))
    assert Report.known(tmp_path, "k") is None
    met.write(tmp_path)
    (tmp_path / "report.json").write_text("{")
    assert Report.known(tmp_path, "k") is None


def test_a_report_whose_latency_is_undecided_is_not_known(met: Report, tmp_path: Path) -> None:
    first, *others = met.targets
    findings = tuple(replace(f, verdict=Verdict.UNKNOWN) if f.budget == "latency_ms" else f for f in first.findings)
    built(replace(first, findings=findings), *others).write(tmp_path)
    assert Report.known(tmp_path, "k") is None


def test_the_binding_limit_is_named_with_its_excess(met: Report, missed: Report) -> None:
    assert summary(met) == "Every limit is met; latency_ms on executorch comes nearest, 2.027 ms of 5 ms"
    found = binding(missed)
    assert found is not None
    assert (found.target, found.finding.budget) == ("executorch", "max_drop")
    assert summary(missed) == "max_drop on executorch binds: 0.05 is over its limit of 0.02 by 0.03, 150%"


@pytest.mark.parametrize(
    ("finding", "used"),
    [
        (Finding("latency_ms", Verdict.MISSED, 5.0, 7.5, 7.0, 8.0, ""), 1.5),
        (Finding("max_drop", Verdict.MET, 0.02, -0.01, -0.02, 0.0, ""), 0.0),
        (Finding("floor", Verdict.MISSED, 0.9, 0.6, 0.5, 0.7, ""), 1.5),
    ],
)
def test_how_much_of_a_limit_is_used(tmp_path: Path, finding: Finding, used: float) -> None:
    found = binding(built(replace(target(tmp_path, "litert", ".tflite", 1.0), findings=(finding,))))
    assert found is not None and found.used == pytest.approx(used)


def test_the_terminal_shows_every_target_and_ends_with_what_binds(missed: Report) -> None:
    stream = io.StringIO()
    show(missed, Console(file=stream, width=100))
    text = stream.getvalue()
    assert "\x1b" not in text
    assert max(len(line) for line in text.splitlines() if "limit" not in line) <= 100
    for name in ("onnxruntime", "litert", "executorch"):
        assert name in text
    assert re.search(r"litert: p90 latency_ms 7\.\d+ ms .* is over the limit of 5 ms by", text)
    assert text.rstrip().splitlines()[-1].startswith("MISSED  max_drop on executorch binds")


class Checker(HTMLParser):
    """Counts what is open, and collects identifiers and what a browser would fetch."""

    VOID = frozenset({"meta", "link", "br", "img", "path", "use", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        found = dict(attrs)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.fetched += [str(found[key]) for key in ("src", "href") if key in found and tag != "a" and not str(found[key]).startswith("#")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.handle_starttag(tag, attrs)
            self.open.pop()
        else:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_self_contained(missed: Report) -> None:
    text = page(missed)
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.fetched == []
    assert len(checker.ids) == len(set(checker.ids))
    assert text.count("<svg") == 4
    assert "<script" not in text and "@import" not in text and "http://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert "Budget missed" in text


def test_what_others_wrote_is_escaped(missed: Report) -> None:
    text = page(missed)
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    renamed = built(passes=(replace(records()[0], spec="a$b$<i>"),))
    assert "a$b$&lt;i&gt;" in page(renamed)


def test_plots_take_colours_and_font_from_the_page(missed: Report) -> None:
    scatter = report_plots.accuracy_against_latency(missed)
    assert scatter is not None
    root = ElementTree.fromstring(scatter)
    assert root.get("viewBox") and root.get("width") is None
    assert scatter.count("<title>") == 12
    for number in (1, 2, 3):
        assert f"var(--series-{number})" in scatter
    assert "var(--font)" in scatter and "DejaVu" not in scatter
    left = re.findall(r"#[0-9a-f]{6}", scatter)
    assert left == [], "no colour of its own"


def test_a_report_of_nothing_is_still_a_page(tmp_path: Path) -> None:
    bare = built(passes=())
    assert bare.exit_code == 0
    assert "<svg" not in page(bare)
    assert "No budget was given" in page(bare)
    unmeasured = replace(target(tmp_path, "litert", ".tflite", 1.0), latency_ms=None, memory_mb=None, load_ms=None, accuracy=None, runtime_version=None)
    stream = io.StringIO()
    show(built(unmeasured), Console(file=stream, width=100))
    assert "<svg" in page(built(unmeasured))


def test_a_gauge_keeps_its_numbers_in_order_and_on_the_bar() -> None:
    found = gauge(Finding("max_drop", Verdict.UNKNOWN, 0.02, 0.01, -0.005, float("inf"), ""))
    assert found is not None
    assert 0 <= found.low < found.zero < found.value < found.limit < found.high <= 100
    assert gauge(Finding("latency_ms", Verdict.UNKNOWN, 5.0, None, None, None, "")) is None
