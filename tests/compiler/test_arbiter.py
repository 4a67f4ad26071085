"""Which form is shipped: the rule on numbers, and a real target's files."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgesmith import Model, compare, targets
from edgesmith.compiler.arbiter import MIXED, Known, Limits, Ruling, Tried, arbitrate, choose, leaves_to_wish
from edgesmith.compiler.budget import Interval
from edgesmith.compiler.data import PassData, Split
from edgesmith.compiler.errors import UnsupportedError
from edgesmith.compiler.forms import FLOAT, form, forms
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.profile.session import open_session
from edgesmith.compiler.quantplan import Scheme
from edgesmith.compiler.weighted import weighted
from edgesmith.passes.quantize.quantize import Quantize
from edgesmith.targets.onnxruntime import OnnxRuntime


def tried(name: str, ratio: float, size: int, accuracy: float = 0.9, spread: float = 0.01) -> Tried:
    interval = Interval(ratio, ratio * (1 - spread), ratio * (1 + spread))
    return Tried(name, size_bytes=size, p50_ms=ratio, latency_ms=ratio, ratio=interval, accuracy=accuracy)


FILES = (tried(FLOAT, 1.0, 400, spread=0.0), tried("static", 0.6, 110, 0.85), tried("dynamic", 0.8, 120, 0.9))


@pytest.mark.parametrize(
    ("files", "limits", "chosen", "says"),
    [
        (FILES, Limits(), "static", "the fastest, 0.60 of the float file's time"),
        (FILES, Limits(floor=0.88), "dynamic", "the fastest, 0.80 .*; static is not within the limits"),
        (FILES, Limits(floor=0.95), "dynamic", r"the most accurate: none that fits keeps 0\.9500"),
        ((FILES[0], tried("static", 1.3, 110)), Limits(), FLOAT, "the fastest, 1.00 of the float file's time"),
        ((FILES[0], tried("static", 1.3, 110)), Limits(size_bytes=200), "static", "the fastest, 1.30 of the float file's time; float is not within"),
        ((FILES[0], tried("static", 1.004, 110)), Limits(), "static", "the smallest of 2 that are as fast"),
        ((FILES[0], tried("static", 1.04, 110, spread=0.5)), Limits(), FLOAT, "the fastest"),
        (FILES, Limits(size_bytes=10), "static", "the fastest"),
        ((Tried(FLOAT, size_bytes=400),), Limits(), FLOAT, "the only file"),
    ],
)
def test_the_fastest_that_keeps_the_limits_is_chosen(files: tuple[Tried, ...], limits: Limits, chosen: str, says: str) -> None:
    name, reason = choose(files, limits)
    assert name == chosen
    assert re.search(says, reason), reason


def test_a_file_slower_than_the_float_one_is_not_shipped_in_silence() -> None:
    slow = (FILES[0], tried("static", 1.3, 110))
    warning = Ruling(*choose(slow, Limits(size_bytes=200)), slow).warning
    assert re.match("slower than float; ships static: the fastest, 1.30 of the float file's time; float is not within the limits", warning)
    assert Ruling(*choose(slow, Limits()), slow).warning == ""
    tie, surely = ((FILES[0], tried("static", 1.02, 110, spread=spread)) for spread in (0.05, 0.005))
    assert Ruling(*choose(tie, Limits()), tie).warning == ""
    assert Ruling(*choose(surely, Limits()), surely).warning.startswith("slower than float; ships static: the smallest of 2 that are as fast")


@pytest.fixture(scope="module")
def quantized() -> tuple[Model, Model, Split]:
    """A large matrix product before and after quantization, and data."""
    torch.manual_seed(0)
    twin = Model.from_module(nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 10)).eval(), (torch.randn(2, 256),))
    x = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    split = Split((x,), twin(torch.from_numpy(x)).argmax(1).numpy())
    return Quantize().run(twin, PassContext(data=PassData(split, split))).model, twin, split


def test_forms_are_those_of_the_plan(quantized: tuple[Model, Model, Split]) -> None:
    model, twin, _ = quantized
    found = forms(model, twin)
    assert list(found) == [FLOAT, "auto", "static"]
    assert set(found["static"].quant.ops.values()) == {Scheme.STATIC}
    assert set(found["auto"].quant.ops.values()) == {Scheme.DYNAMIC}


def test_files_are_lowered_timed_and_scored(quantized: tuple[Model, Model, Split], tmp_path: Path) -> None:
    model, twin, split = quantized
    made = iter(range(10))

    def lower(model: Model):
        return targets["onnxruntime"].lower(model, tmp_path, f"form{next(made)}")

    def score(artifact) -> float:
        with open_session(artifact.path, OnnxRuntime.runner) as session:
            return float((session.run(split.inputs)[0].argmax(1) == split.labels).mean())

    artifact, ruling = arbitrate(forms(model, twin), lower, lambda files: compare(files, limit_s=3.0), score, Limits(floor=0.5))
    assert [t.name for t in ruling.tried] == [FLOAT, "auto", "static"]
    assert all(t.accuracy is not None and t.accuracy > 0.9 and t.p50_ms and t.p50_ms > 0 for t in ruling.tried)
    assert all(t.ratio and t.p50_ms == pytest.approx(t.ratio.value * ruling.tried[0].p50_ms) for t in ruling.tried), "one file's time is the measure of all"
    assert ruling.tried[0].ratio == Interval.exact(1.0) and ruling.tried[0].accuracy == 1.0
    chosen = next(t for t in ruling.tried if t.name == ruling.chosen)
    assert artifact.size_bytes == chosen.size_bytes
    assert chosen.ratio.low <= min(t.ratio.high for t in ruling.tried)


def test_a_form_that_cannot_be_lowered_is_noted_and_an_equal_file_is_not_timed_twice(quantized: tuple[Model, Model, Split], tmp_path: Path) -> None:
    model, twin, _ = quantized
    found = {**forms(model, twin), "again": replace(model, quant=model.quant.by("auto"))}

    def lower(model: Model):
        if model.quant is not None and Scheme.STATIC in model.quant.ops.values():
            raise UnsupportedError("no static operators here", why="none at all")
        return targets["onnxruntime"].lower(model, tmp_path, model.fingerprint)

    _, ruling = arbitrate(found, lower, lambda files: compare(files, limit_s=2.0), None, Limits())
    notes = {t.name: t.refused for t in ruling.tried}
    assert notes == {FLOAT: "", "auto": "", "static": "no static operators here: none at all", "again": "its file is that of auto"}


def test_a_mixture_joins_where_what_is_fast_is_not_accurate(quantized: tuple[Model, Model, Split], tmp_path: Path) -> None:
    """Every INT8 form is scored as too bad; of the mixtures the first is too, and the second is timed with the rest."""
    model, twin, _ = quantized
    first, second = (name for name, scheme in model.quant.by("static").ops.items() if weighted(next(n for n in model.graph.graph.nodes if n.name == name)))
    made: dict[str, float] = {}
    asked: list[tuple[list[str], float]] = []

    def lower(model: Model):
        artifact = targets["onnxruntime"].lower(model, tmp_path, model.fingerprint)
        bad = model.quant is not None and model.quant.scheme(first) is not Scheme.FLOAT
        made[artifact.sha256] = 0.5 if bad else 0.9
        return artifact

    def mixtures(known: Sequence[Known], below_ms: float):
        asked.append(([one.tried.name for one in known], below_ms))
        yield form(model, twin, {first: Scheme.STATIC})
        yield form(model, twin, {second: Scheme.STATIC})
        raise AssertionError("the second is good enough")

    def timed(files):
        return compare(files, limit_s=1.0)

    size = 200_000
    _, ruling = arbitrate(forms(model, twin), lower, timed, lambda artifact: made[artifact.sha256], Limits(floor=0.8, size_bytes=size), {MIXED: mixtures})
    assert asked == [([FLOAT, "auto", "static"], math.inf)], "what fits is not accurate, so that any time is of use"
    assert [(t.name, t.accuracy) for t in ruling.tried] == [(FLOAT, 0.9), ("auto", 0.5), ("static", 0.5), ("mixed", 0.5), ("mixed 2", 0.9)]
    assert (ruling.tried[-2].refused, ruling.tried[-2].ratio) == ("loses too much on validation data", None)
    assert ruling.tried[-1].schemes == {"0": Scheme.FLOAT, "2": Scheme.STATIC} and ruling.tried[-1].ratio is not None
    assert ruling.tried[0].size_bytes > size


def test_the_ruling_says_why_a_rung_has_no_more(quantized: tuple[Model, Model, Split], tmp_path: Path) -> None:
    """Every file is scored as too bad. The first form of a rung is too, and no second can be made; so is that of the rung above."""
    model, twin, _ = quantized
    operators = [name for name, scheme in model.quant.by("static").ops.items() if scheme is Scheme.STATIC]

    def mixtures(known: Sequence[Known], below_ms: float):
        yield form(model, twin, {operators[0]: Scheme.STATIC})
        raise UnsupportedError("operators cannot be timed")

    def late(known: Sequence[Known], below_ms: float):
        assert [one.tried.name for one in known] == [FLOAT, "auto", "static"], "what was set aside is not known"
        yield form(model, twin, {operators[1]: Scheme.STATIC})

    def lower(model: Model):
        return targets["onnxruntime"].lower(model, tmp_path, model.fingerprint)

    _, ruling = arbitrate(
        forms(model, twin), lower, lambda files: compare(files, limit_s=1.0), lambda artifact: 0.5, Limits(floor=0.8), {MIXED: mixtures, "late": late}
    )
    assert ruling.reason.endswith("; nothing mixed was tried: operators cannot be timed")
    assert [t.name for t in ruling.tried] == [FLOAT, "auto", "static", "mixed", "late"] and ruling.chosen not in {"mixed", "late"}


@pytest.mark.parametrize(
    ("files", "limits", "wishes"),
    [
        (FILES, Limits(), False),
        (FILES, Limits(floor=0.88), True),
        ((FILES[0], FILES[2], tried("static", 0.79, 110, 0.85)), Limits(floor=0.88), False),
        (FILES, Limits(floor=0.88, size_bytes=115), True),
        (FILES, Limits(floor=0.95), True),
        (FILES, Limits(size_bytes=10), False),
        (FILES, Limits(latency_ms=1.0), False),
        (FILES, Limits(latency_ms=0.5), True),
    ],
)
def test_schemes_are_mixed_where_a_limit_is_broken_or_a_faster_form_is_not_accurate(files: tuple[Tried, ...], limits: Limits, wishes: bool) -> None:
    assert leaves_to_wish(Ruling(*choose(files, limits), files), limits) is wishes
