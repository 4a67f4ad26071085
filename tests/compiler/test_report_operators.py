"""Where a run's time goes, as data, as a table, as a page, and from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from edgesmith.compiler import report_operator_plots as plots
from edgesmith.compiler.budget import Verdict
from edgesmith.compiler.cli import run
from edgesmith.compiler.profile.operator_types import Category, OperatorProfile, OperatorTime
from edgesmith.compiler.report import ArtifactReport, ModelReport, Report, TargetReport
from edgesmith.compiler.report_html import page
from edgesmith.compiler.report_operators import MOST_ROWS, OperatorsReport, category_rows, headline, operator_rows

NASTY = "<script>alert('$x^2$ & co')</script>"


def operators(*more: OperatorTime) -> OperatorProfile:
    times = (
        OperatorTime("n0", "Conv", ("stem", "act"), "cpu", 4.0, 0.4, Category.FAST),
        OperatorTime("n1", "Transpose", ("blocks.0.attn",), "cpu", 1.0, 0.1, Category.LAYOUT, "permute less"),
        OperatorTime("n2", "Softmax", ("blocks.0.attn",), "cpu", 3.0, 0.3, Category.FLOAT_ISLAND, "plan it"),
        OperatorTime(NASTY, "QuantizeLinear", (), "cpu", 2.0, 0.2, Category.QUANTIZE, "fewer"),
    )
    return OperatorProfile("instrumented", 10.4, 12.0, 200, 1, "1.0", (*times, *more))


def target(name: str, profile: OperatorProfile | None) -> TargetReport:
    timed = None if profile is None else OperatorsReport.of(profile)
    return TargetReport(name, "1.0", "host", 1, ArtifactReport(f"model.{name}", 1, "0" * 64), None, None, None, None, (), operators=timed)


def built(*targets: TargetReport) -> Report:
    size = ModelReport(1, 1, "ab" * 32)
    return Report.of(teacher=size, model=size, passes=(), targets=targets)


def test_the_report_has_categories_and_operators_and_comes_back_the_same() -> None:
    report = built(target("onnxruntime", operators()), target("litert", None))
    data = json.loads(report.to_json())["targets"]
    assert data[1]["operators"] is None
    found = data[0]["operators"]
    assert (found["method"], found["whole_ms"], found["total_ms"], found["runs"]) == ("instrumented", 10.4, 10.0, 200)
    assert (found["sourced_share"], found["fast_share"]) == (pytest.approx(0.8), pytest.approx(0.4))
    assert [c["category"] for c in found["categories"]] == ["fast", "float island", "quantize-dequantize", "layout copy"]
    assert found["operators"][0] == {
        "name": "n0", "kind": "Conv", "sources": ["stem", "act"], "delegate": "cpu", "ms": 4.0, "share": 0.4, "category": "fast", "advice": "",
    }  # fmt: skip
    assert Report.from_json(report.to_json()) == report


def test_a_report_of_before_operators_were_timed_is_still_read() -> None:
    data = json.loads(built(target("litert", None)).to_json())
    del data["targets"][0]["operators"]
    assert Report.from_json(json.dumps(data)).targets[0].operators is None


def test_the_table_begins_with_the_dearest_and_sums_up_the_rest() -> None:
    small = [OperatorTime(f"m{i}", "Add", (f"block.{i}",), "", 0.01, 0.001, Category.FAST) for i in range(60)]
    rows = operator_rows(OperatorsReport.of(operators(*small)))
    assert rows[0] == ("stem, act", "Conv", "4.0000 ms", "40.0%", "fast")
    assert rows[2][0] == f"({NASTY})", "no module is known, so the runtime's own name"
    assert len(rows) == MOST_ROWS + 1
    assert rows[-1][0] == f"({4 + 60 - MOST_ROWS} more)"
    assert category_rows(OperatorsReport.of(operators()))[1] == ("float island", "1", "3.0000 ms", "30.0%", "plan it")
    assert "4 operators, instrumented, 200 runs: 10.000 ms together, 10.400 ms a whole run; 80% of the time" in headline(OperatorsReport.of(operators()))


def test_time_of_fused_modules_is_shared_among_them() -> None:
    assert plots.module_times(operators().operators) == {"stem": 2.0, "act": 2.0, "blocks.0.attn": 4.0}


def test_the_page_shows_every_target_that_was_timed() -> None:
    report = built(target("onnxruntime", operators()), target("litert", None), target("executorch", operators()))
    text = page(report)
    assert text.count("4 operators, instrumented") == 2
    assert "permute less" in text and "blocks.0.attn" in text
    assert NASTY not in text and "&lt;script&gt;" in text
    for draw in (plots.by_category, plots.by_module):
        drawing = draw(report)
        assert drawing is not None and drawing in text
        ElementTree.fromstring(drawing)
        assert "litert" not in drawing and "onnxruntime" in drawing
    assert "float island" in (plots.by_category(report) or "")


def test_a_build_without_operators_has_neither_tables_nor_plots() -> None:
    report = built(target("litert", None))
    assert plots.by_category(report) is None and plots.by_module(report) is None
    assert "<h2>Operators</h2>" not in page(report)
    foreign = built(target("onnxruntime", operators()))
    assert report.verdict is foreign.verdict is Verdict.MET


def test_the_command_prints_tables_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weights = onnx.numpy_helper.from_array(np.ones((256, 256), np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["z"], name="product"), helper.make_node("Softmax", ["z"], ["y"], name="soft")]
    nodes[0].metadata_props.add(key="edgesmith.source", value="blocks.0.fc")
    x, y = (helper.make_tensor_value_info(name, kind, [1, 256]) for name in "xy")
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], [weights]), opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "model.onnx")
    assert run(["profile", str(tmp_path / "model.onnx"), "--operators", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [(o["kind"], o["sources"]) for o in data["operators"]["operators"]] == [("MatMul", ["blocks.0.fc"]), ("Softmax", [])]
    assert sum(o["share"] for o in data["operators"]["operators"]) == pytest.approx(1.0)
    assert "latency_ms" in data
