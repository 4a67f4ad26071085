"""The straight line on a small model and one target: verdicts, the report, resuming, and two builds at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import edgesmith
from edgesmith.compiler.buildfile import read

FILES = {
    "net.py": """
import torch
from edgesmith.testing import TinyTransformer, randomise_norms

def model():
    torch.manual_seed(0)
    return randomise_norms(TinyTransformer())
""",
    "samples.py": """
from edgesmith.testing import tiny_data

def data():
    return tiny_data(256)
""",
    "slow.py": """
import time
from dataclasses import dataclass
from edgesmith import Numerics, Pass, PassResult

@dataclass(frozen=True)
class Slow(Pass):
    name = "slow"
    numerics = Numerics.EXACT
    seconds: float = 30.0

    def run(self, model, ctx):
        time.sleep(self.seconds)
        return PassResult(model, False)
""",
    "edgesmith.toml": """
[model]
source = "net.py:model"
inputs = [{ name = "x", shape = [1, 8, 8] }]

[data]
source = "samples.py:data"

[accuracy]
max_drop = 0.5

[budget]
latency_ms = 1000.0
memory_mb = 500
size_mb = 5

[[target]]
name = "onnxruntime"

[pipeline]
passes = ["prune{ratio=0.25,importance=l2}", "recover{epochs=2}", "fold-constants", "quantize{samples=32}"]
""",
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def built(project: Path) -> edgesmith.compiler.report.Report:  # type: ignore[name-defined]
    return edgesmith.build(project / "edgesmith.toml", out=project / "out")


def command(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "edgesmith.compiler.cli", *arguments]
    return subprocess.run(
        [sys.executable, "-c", "from edgesmith.compiler.cli import main; main()", *line[3:]], cwd=project, capture_output=True, text=True, check=False
    )


def test_everything_is_met_and_written(project: Path, built: Any) -> None:
    assert built.exit_code == 0, built.to_json()
    assert {p.name for p in (project / "out").iterdir() if not p.name.startswith(".")} == {
        "build.log",
        "cache",
        "model.onnx",
        "model.pt2",
        "report.html",
        "report.json",
    }


def test_the_report_has_the_promised_fields(project: Path, built: Any) -> None:
    report = json.loads((project / "out" / "report.json").read_text())
    assert report["schema_version"] == 1
    assert (report["verdict"], report["exit_code"]) == ("met", 0)
    assert {"params", "macs", "fingerprint"} <= report["model"].keys()
    assert [p["spec"] for p in report["passes"]] == ["prune{ratio=0.25,importance=l2}", "recover{epochs=2}", "fold-constants", "quantize{samples=32}"]
    assert all({"spec", "seconds", "changed", "params", "macs", "diagnostics"} <= p.keys() for p in report["passes"])
    (target,) = report["targets"]
    assert {"name", "runtime_version", "device", "threads", "load_ms"} <= target.keys()
    assert target["artifact"].keys() == {"path", "size_bytes", "sha256"}
    assert {"p50", "p90", "p99", "ci_low", "ci_high", "samples"} <= target["latency_ms"].keys()
    assert {"peak_rss", "model"} <= target["memory_mb"].keys()
    assert {"metric", "value", "baseline", "drop", "samples"} <= target["accuracy"].keys()
    assert {f["budget"] for f in target["findings"]} == {"latency_ms", "memory_mb", "size_mb", "max_drop"}
    assert all({"budget", "verdict", "limit", "measured", "low", "high", "message"} <= f.keys() for f in target["findings"])
    assert target["accuracy"]["samples"] == 128


def test_the_saved_model_is_the_one_that_was_lowered(project: Path, built: Any) -> None:
    assert edgesmith.Model.load(project / "out" / "model.pt2").fingerprint == built.model.fingerprint


def test_an_unchanged_build_is_answered_from_its_report(project: Path, built: Any) -> None:
    before = (project / "out" / "report.json").stat().st_mtime_ns
    done = command(project, "build")
    assert done.returncode == 0, done.stderr
    assert "MET" in done.stdout
    assert (project / "out" / "report.json").stat().st_mtime_ns == before


def test_an_unchanged_build_does_not_import_torch(project: Path, built: Any) -> None:
    code = "import sys, edgesmith; edgesmith.build('edgesmith.toml'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_budget_that_nothing_meets_is_missed_and_the_artifact_is_kept(project: Path, built: Any) -> None:
    done = command(project, "build", "--set", "budget.size_mb=0.001", "--set", 'pipeline.passes=["fold-constants"]', "--out", "tight")
    assert done.returncode == 1, done.stderr
    assert "size_mb" in done.stdout
    assert (project / "tight" / "model.onnx").is_file()
    assert "Traceback" not in done.stdout + done.stderr


def test_a_killed_build_continues_where_it_was(project: Path, built: Any) -> None:
    passes = 'pipeline.passes=["fold-constants", "prune{ratio=0.5,importance=l1}", "slow.py:Slow"]'
    arguments = [sys.executable, "-c", "from edgesmith.compiler.cli import main; main()", "build", "--out", "killed", "--set", passes]
    running = subprocess.Popen(arguments, cwd=project, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    cache = project / "killed" / "cache"
    deadline = time.monotonic() + 120
    while len(list(cache.glob("*.json")) if cache.is_dir() else []) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    kept = {p.name: p.stat().st_mtime_ns for p in cache.glob("*.json")}
    assert len(kept) == 2, "both passes before the slow one are kept"
    assert not (project / "killed" / "report.json").exists()
    resumed = edgesmith.build(project / "edgesmith.toml", out=project / "killed", overrides=[passes.replace("slow.py:Slow", "slow.py:Slow{seconds=0}")])
    assert resumed.exit_code == 0
    assert {name: (cache / name).stat().st_mtime_ns for name in kept} == kept, "what was done is not done again"
    assert not list(cache.glob(".*"))


def test_two_builds_into_one_folder_wait_for_each_other(project: Path, built: Any) -> None:
    line = [sys.executable, "-c", "from edgesmith.compiler.cli import main; main()", "build", "--out", "shared", "--set", 'pipeline.passes=["fold-constants"]']
    both = [subprocess.Popen(line, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    results = [(*running.communicate(), running.returncode) for running in both]
    assert [code for _, _, code in results] == [0, 0], results
    assert json.loads((project / "shared" / "report.json").read_text())["exit_code"] == 0


def test_check_refuses_without_building(project: Path) -> None:
    done = command(project, "check", "--set", 'pipeline.passes=["prun"]')
    assert done.returncode == 2
    assert "did you mean 'prune'" in done.stderr
    assert command(project, "check").returncode == 0


def test_a_pass_from_the_users_file_runs(project: Path) -> None:
    spec = read(project / "edgesmith.toml", ['pipeline.passes=["slow.py:Slow{seconds=0}"]'])
    report = edgesmith.build(spec, out=project / "custom")
    assert [p.spec for p in report.passes] == ["slow{seconds=0.0}"]
