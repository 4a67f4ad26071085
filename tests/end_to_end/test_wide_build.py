"""A build whose largest operators read an outlier and whose float file is too large: no int8 form, no mixture is accurate, int16 activations are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from spoiled_build import spoiled_build

import edgesmith

SPOIL = (
    "for layer, reader in ((net[0], net[2]), (net[2], net[4])):",
    "    layer.bias[0] += 300",
    "    reader.bias -= 300 * reader.weight[:, 0]",
)


@pytest.mark.slow
def test_activations_are_widened_where_no_int8_form_keeps_the_accuracy(tmp_path: Path) -> None:
    built = edgesmith.build(spoiled_build(tmp_path, SPOIL, "litert"), out=tmp_path / "out")
    assert built.exit_code == 0, built.to_json()
    (found,) = json.loads((tmp_path / "out" / "report.json").read_text())["targets"]
    forms = {form["name"]: form for form in found["ruling"]["forms"]}
    assert found["ruling"]["chosen"] == "static16x8"
    assert forms["float"]["size_bytes"] > 700_000 > forms["static16x8"]["size_bytes"]
    assert all(form["accuracy"] is None or form["accuracy"] < 0.9 for name, form in forms.items() if name not in {"float", "static16x8"})
    assert forms["static16x8"]["accuracy"] >= 0.94 and set(forms["static16x8"]["schemes"].values()) == {"static16x8"}
