"""Imports point one way, heavy things stay lazy, and the four room names are nobody else's."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import edgesmith
from edgesmith.compiler.testing import imported_by

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {
    "kernels": {"kernels"},
    "compiler": {"compiler"},
    "passes": {"passes", "compiler", "kernels"},
    "targets": {"targets", "compiler", "kernels"},
}
HEAVY = {"torch", "numpy", "pydantic", "rich", "matplotlib", "scipy", "onnxruntime", "executorch", "ai_edge_litert", "transformers"}


def rooms_imported(path: Path) -> set[str]:
    """The rooms of edgesmith that a file imports; the facade itself counts as ``edgesmith``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            parts = name.split(".")
            if parts[0] == "edgesmith":
                found.add(parts[1] if len(parts) > 1 else "edgesmith")
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room: str) -> None:
    wrong = {str(p.relative_to(ROOT)): sorted(bad) for p in (ROOT / room).rglob("*.py") if (bad := rooms_imported(p) - ALLOWED[room])}
    assert wrong == {}


def test_the_check_sees_a_wrong_import(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def f():\n    from edgesmith.passes.prune import Prune\n    import edgesmith\n")
    assert rooms_imported(tmp_path / "bad.py") == {"passes", "edgesmith"}


def test_importing_edgesmith_imports_nothing_heavy() -> None:
    assert imported_by("import edgesmith") & HEAVY == set()


def test_help_imports_nothing_heavy() -> None:
    assert imported_by("import edgesmith.compiler.cli") & HEAVY == set()


def test_public_names_are_sorted_and_exist() -> None:
    assert edgesmith.__all__ == sorted(edgesmith.__all__)
    assert [name for name in edgesmith.__all__ if getattr(edgesmith, name, None) is None] == []


@pytest.mark.parametrize("name", ["compiler", "passes", "targets", "kernels"])
def test_rooms_are_not_importable_under_their_bare_names(name: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-P", "-c", f"import {name}; print({name}.__file__)"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert str(ROOT) not in done.stdout


def test_nobody_else_writes_a_timing_loop() -> None:
    """Latency comes from compiler/profile alone; ``perf_counter`` elsewhere may only time a step of our own.

    A runner is the instrument's far end: its Profiler may time what instrumentation costs, its Session nothing.
    """
    timing = {"perf_counter_ns", "process_time", "timeit", "time_ns"}
    users = {
        str(p.relative_to(ROOT))
        for room in ALLOWED
        for p in (ROOT / room).rglob("*.py")
        if any(name in p.read_text() for name in timing) and "profile" not in p.parts and p.name != "runner.py"
    }
    assert users == set()
    for runner in (ROOT / "targets").glob("*/runner.py"):
        (session,) = (node for node in ast.parse(runner.read_text()).body if isinstance(node, ast.ClassDef) and node.name == "Session")
        assert not any(name in ast.unparse(session) for name in timing), runner
