"""What the wheel installs: one top-level name, real files, every room."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, tracked):
        path, copy = ROOT / name, source / name
        if not path.exists():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(path.readlink()) if path.is_symlink() else copy.write_bytes(path.read_bytes())
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)], check=True, capture_output=True)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        return wheel.namelist()


def test_the_wheel_installs_one_top_level_name(names: list[str]) -> None:
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"edgesmith"}


def test_the_wheel_holds_every_module_and_the_type_marker(names: list[str]) -> None:
    expected = {f"edgesmith/{p.relative_to(ROOT)}" for room in ("compiler", "passes", "targets", "kernels") for p in (ROOT / room).rglob("*.py")}
    expected |= {"edgesmith/py.typed", "edgesmith/testing.py", "edgesmith/__init__.py"}
    data = {f"edgesmith/{p.relative_to(ROOT)}" for room in ("compiler", "targets") for p in (ROOT / room).rglob("*") if p.suffix in {".json", ".html", ".toml"}}
    assert (expected | data) - set(names) == set()
