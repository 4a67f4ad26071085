"""A build whose every INT8 form loses the accuracy that is asked, and whose float file is too large: the operators' schemes are mixed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from spoiled_build import spoiled_build

import edgesmith

SPOIL = (
    "net[2].bias[0] = 1.0",
    "net[2].weight[0] *= 1024",
    "net[2].bias[0] *= 1024",
    "net[4].weight[:, 0] /= 1024",
)


@pytest.mark.slow
@pytest.mark.parametrize("target", edgesmith.targets)
def test_the_operator_that_an_outlier_spoils_stays_float(tmp_path: Path, target: str) -> None:
    built = edgesmith.build(spoiled_build(tmp_path, SPOIL, target), out=tmp_path / "out")
    assert built.exit_code == 0, built.to_json()
    (found,) = json.loads((tmp_path / "out" / "report.json").read_text())["targets"]
    forms = {form["name"]: form for form in found["ruling"]["forms"]}
    assert found["ruling"]["chosen"] == "mixed"
    assert forms["float"]["size_bytes"] > 700_000 > forms["mixed"]["size_bytes"]
    assert all(form["accuracy"] < 0.8 for name, form in forms.items() if name not in {"float", "mixed"})
    assert forms["mixed"]["accuracy"] >= 0.94
    assert forms["mixed"]["schemes"]["4"] == "float" and forms["mixed"]["schemes"]["2"] != "float"
