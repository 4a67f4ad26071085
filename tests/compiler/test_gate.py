"""Is NEW slower than BASE: artifacts and reports, and what people and build servers read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

from edgesmith import Model, targets
from edgesmith.compiler import cli, gate_formats
from edgesmith.compiler.budget import Interval, Verdict
from edgesmith.compiler.errors import UserError
from edgesmith.compiler.files import file_hash
from edgesmith.compiler.gate import Gate, Row, gate
from edgesmith.compiler.profile.comparison import Difference
from edgesmith.compiler.report import ArtifactReport, LatencyReport, ModelReport, Report, TargetReport

MACHINE = {"cpu": "Example 9000", "cpu_features": "avx2", "cores": "2", "governor": "performance", "os": "Linux"}


def target(p90: float, **changes: object) -> TargetReport:
    report = TargetReport(
        name="onnxruntime",
        runtime_version="1.31.1",
        device="host",
        threads=1,
        artifact=ArtifactReport("gone/model.onnx", 1, "0" * 64),
        latency_ms=LatencyReport(p90 * 0.9, p90, p90 * 1.2, p90 * 0.99, p90 * 1.01, 500),
        memory_mb=None,
        load_ms=1.0,
        accuracy=None,
        findings=(),
        environment=MACHINE,
    )
    return replace(report, **changes)


def report(folder: Path, *of: TargetReport) -> Path:
    folder.mkdir(exist_ok=True)
    model = ModelReport(1, 1, "0" * 64)
    (folder / "report.json").write_text(Report.of(teacher=model, model=model, passes=(), targets=of).to_json())
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two files, the second with eight times the work."""
    torch.manual_seed(0)
    made = []
    for name, layers in (("small", 1), ("large", 8)):
        folder = tmp_path_factory.mktemp(name)
        module = nn.Sequential(*(nn.Linear(512, 512) for _ in range(layers)))
        made.append(targets["onnxruntime"].lower(Model.from_module(module, (torch.randn(2, 512),)), folder).path)
    return made[0], made[1]


@pytest.mark.alone
def test_more_work_is_a_regression_and_less_is_none(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small, large = map(str, files)
    junit = tmp_path / "gate.xml"
    assert cli.run(["compare", small, large, "--limit-s", "4", "--junit", str(junit), "--github"]) == 1
    text, annotation = capsys.readouterr().out.strip().splitlines()
    assert text.startswith("MISSED  model.onnx: slower: ")
    assert annotation.startswith("::error title=edgesmith%3A model.onnx::slower")
    suite = ElementTree.parse(junit).getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("1", "1", "0")
    assert suite.find("testcase/failure") is not None
    assert cli.run(["compare", large, small, "--limit-s", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "met" and found["informational"] is False
    assert found["artifacts"][0]["difference"] == "faster"
    assert found["artifacts"][0]["ratio"]["high"] < 1


def test_without_a_baseline_the_result_is_informational(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["compare", "nothing.onnx", str(files[0]), "--limit-s", "2"]) == 0
    assert capsys.readouterr().out.startswith("INFO  model.onnx: ")


@pytest.mark.alone
def test_reports_whose_artifacts_are_there_are_timed_again(files: tuple[Path, Path], tmp_path: Path) -> None:
    reports = []
    for name, file in zip(("base", "new"), files, strict=True):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(file, folder / "model.onnx")
        kept = ArtifactReport("elsewhere/model.onnx", file.stat().st_size, file_hash(file))
        reports.append(report(folder, target(1.0, artifact=kept)))
    found = gate(reports[0], reports[1] / "report.json", max_slowdown=0.03, limit_s=4)
    assert found.rows[0].how.startswith("timed against each other")
    assert found.verdict is Verdict.MISSED


@pytest.mark.parametrize(("new", "verdict"), [(1.0, Verdict.MET), (1.2, Verdict.MISSED), (1.03, Verdict.UNKNOWN)])
def test_reports_without_artifacts_are_compared_by_their_numbers(tmp_path: Path, new: float, verdict: Verdict) -> None:
    found = gate(report(tmp_path / "a", target(1.0)), report(tmp_path / "b", target(new)), max_slowdown=0.03)
    (row,) = found.rows
    assert row.ratio is not None
    assert np.log(row.ratio.high / row.ratio.value) == pytest.approx(np.sqrt(2) * np.log(1.01 / 0.99) / 2)
    assert found.verdict is verdict and "from the p90 of two reports" in row.sentence


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"environment": {**MACHINE, "cpu": "Other"}}, "cpu was 'Example 9000', is 'Other'"),
        ({"threads": 2}, "threads was 1, is 2"),
        ({"runtime_version": "2"}, "the runtime was 1.31.1, is 2"),
    ],
)
def test_another_environment_is_said_and_decides_nothing(tmp_path: Path, change: dict[str, object], note: str) -> None:
    found = gate(report(tmp_path / "a", target(1.0)), report(tmp_path / "b", target(5.0, **change)), max_slowdown=0.03)
    assert found.verdict is Verdict.UNKNOWN
    assert found.rows[0].notes == (note,)
    assert "in different environments" in found.rows[0].sentence


@pytest.mark.parametrize(
    ("base", "new", "says"),
    [
        ("a.onnx", "missing.onnx", "missing.onnx: there is no such file"),
        ("reports", "a.onnx", "a report cannot be compared with an artifact"),
        ("a.onnx", "reports", "an artifact cannot be compared with a report"),
        ("broken.json", "reports", "broken.json: this is no report of edgesmith"),
        ("empty", "reports", "report.json: there is no report"),
        ("others", "reports", "the reports have no target in common"),
        ("a.onnx", "a.txt", "a.txt"),
    ],
)
def test_what_cannot_be_compared_is_refused(base: str, new: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report(tmp_path / "reports", target(1.0))
    report(tmp_path / "others", target(1.0, name="litert"))
    Path("empty").mkdir()
    for name in ("a.onnx", "broken.json", "a.txt"):
        Path(name).write_text("{}")
    with pytest.raises(UserError, match=says):
        gate(Path(base), Path(new), max_slowdown=0.03)


@pytest.mark.parametrize(("text", "share"), [("3%", 0.03), ("0.05", 0.05), ("0%", 0.0)])
def test_a_share_is_spelt_in_two_ways(text: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    empty = Gate((), 0.0, informational=False)
    monkeypatch.setattr("edgesmith.compiler.gate.gate", lambda *_, max_slowdown, **__: seen.append(max_slowdown) or empty)
    assert cli.run(["compare", "a.onnx", "b.onnx", "--max-slowdown", text]) == 0
    assert seen == [pytest.approx(share)]


@pytest.mark.parametrize("text", ["-1%", "fast", "3%%", "inf", "nan"])
def test_what_is_no_share_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["compare", "a.onnx", "b.onnx", f"--max-slowdown={text}"]) == 2
    assert "is no share" in capsys.readouterr().err


def test_what_cannot_be_told_is_skipped_and_warned_of() -> None:
    row = Row("m", Verdict.UNKNOWN, 1.0, 1.0, Interval(1.0, 0.0, float("inf")), Difference.UNKNOWN, "timed", ("50% idle\nno",))
    found = Gate((row,), 0.03, informational=False)
    assert gate_formats.github(found)[0].startswith("::warning ")
    assert gate_formats.github(found)[0].endswith("50%25 idle%0Ano")
    assert json.loads(json.dumps(gate_formats.data(found), allow_nan=False))["artifacts"][0]["ratio"]["high"] is None
