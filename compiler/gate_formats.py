"""A gate's result for people, programs and build servers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from edgesmith.compiler.budget import Interval, Verdict
from edgesmith.compiler.files import write_text
from edgesmith.compiler.gate import Gate, Row

LEVELS = {Verdict.MET: "notice", Verdict.MISSED: "error", Verdict.UNKNOWN: "warning"}


def lines(gate: Gate) -> list[str]:
    """One line per artifact, then its notes."""
    found = []
    for row in gate.rows:
        found.append(f"{_word(gate, row)}  {row.name}: {row.sentence}")
        found += [f"      {note}" for note in row.notes]
    return found


def data(gate: Gate) -> dict[str, Any]:
    """The result as plain data."""
    return {
        "verdict": gate.verdict.value,
        "informational": gate.informational,
        "max_slowdown": gate.max_slowdown,
        "artifacts": [_row_data(row) for row in gate.rows],
    }


def _row_data(row: Row) -> dict[str, Any]:
    return {
        **dataclasses.asdict(row),
        "verdict": row.verdict.value,
        "difference": row.difference.value if row.difference else None,
        "ratio": _finite(row.ratio) if row.ratio else None,
    }


def _finite(ratio: Interval) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in dataclasses.asdict(ratio).items()}


def github(gate: Gate) -> list[str]:
    """Workflow commands that a GitHub action shows beside the change ("Workflow commands for GitHub Actions", setting a message)."""
    return [
        f"::{LEVELS[row.verdict]} title={_escaped(f'edgesmith: {row.name}', property_too=True)}::{_escaped('; '.join((row.sentence, *row.notes)))}"
        for row in gate.rows
    ]


def _escaped(text: str, *, property_too: bool = False) -> str:
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace(":", "%3A").replace(",", "%2C") if property_too else text


def write_junit(gate: Gate, path: Path) -> None:
    """Write the result as JUnit XML: a test case per artifact, failed where it is slower than allowed, skipped where that cannot be told.

    Raises:
        OutputError: the file cannot be written.
    """
    counts = {verdict: sum(row.verdict is verdict for row in gate.rows) for verdict in Verdict}
    suite = ElementTree.Element(
        "testsuite", name="edgesmith compare", tests=str(len(gate.rows)), failures=str(counts[Verdict.MISSED]), skipped=str(counts[Verdict.UNKNOWN]), errors="0"
    )
    for row in gate.rows:
        case = ElementTree.SubElement(suite, "testcase", classname="edgesmith.compare", name=row.name, time=f"{row.new_ms / 1e3:.6f}")
        if row.verdict is not Verdict.MET:
            ElementTree.SubElement(case, "failure" if row.verdict is Verdict.MISSED else "skipped", message=row.sentence)
        ElementTree.SubElement(case, "system-out").text = "\n".join((row.sentence, *row.notes))
    ElementTree.indent(suite)
    write_text(path, ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n")


def _word(gate: Gate, row: Row) -> str:
    return "INFO" if gate.informational else row.verdict.name
