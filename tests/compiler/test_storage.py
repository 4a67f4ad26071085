"""Models on disk: round trips, plain torch, and archives that would execute something."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.errors import SourceError
from edgesmith.compiler.model import Model, PassRecord
from edgesmith.compiler.quantplan import QuantPlan, Scheme, TensorRange, WeightGrid
from edgesmith.compiler.testing import TinyConvNet, TinyTransformer, tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    plain = tiny_model(TinyConvNet)
    (linear,) = (n for n in plain.graph.graph.nodes if n.target is torch.ops.aten.linear.default)
    plan = QuantPlan({linear.name: Scheme.STATIC}, {linear.name: TensorRange(-1.0, 2.0, "minmax")}, {"head.weight": WeightGrid((0.1, 0.2, 0.3, 0.4), 0)})
    record = PassRecord("prune{ratio=0.3}", 1.5, True, 10, 20, "f", (Diagnostic(Severity.INFO, "a.b", "head", "said"),))
    model = Model(plain.graph, plain.inputs, plain.outputs, plan, (record,))
    path = tmp_path_factory.mktemp("saved") / "model.pt2"
    model.save(path)
    return model, path


def test_a_saved_model_comes_back_whole(saved: tuple[Model, Path]) -> None:
    model, path = saved
    loaded = Model.load(path)
    assert loaded.fingerprint == model.fingerprint
    assert (loaded.inputs, loaded.outputs, loaded.quant, loaded.history) == (model.inputs, model.outputs, model.quant, model.history)
    sources = [[n.meta["source"] for n in m.graph.graph.nodes if n.op == "call_function"] for m in (model, loaded)]
    assert sources[0] == sources[1]


def test_plain_torch_runs_a_saved_model_at_any_batch(saved: tuple[Model, Path]) -> None:
    model, path = saved
    x = torch.randn(7, 1, 8, 8)
    torch.testing.assert_close(torch.export.load(path).module()(x), model(x), rtol=0, atol=0)


def test_a_foreign_archive_loads(tmp_path: Path) -> None:
    module = TinyTransformer().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (torch.randn(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "foreign.pt2")
    model = Model.load(tmp_path / "foreign.pt2")
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(model(x), module(x), rtol=0, atol=0)
    assert model.dynamic_batch


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def rewritten(path: Path, target: Path, change: dict[str, Any]) -> Path:
    """Copy an archive; ``change`` maps the end of a member's name to its new bytes or to a function of the old."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        seen = set()
        for name in old.namelist():
            data = old.read(name)
            for suffix, value in change.items():
                if name.endswith(suffix):
                    data = value(data) if callable(value) else value
                    seen.add(suffix)
            new.writestr(name, data)
        root = old.namelist()[0].partition("/")[0]
        for suffix in change.keys() - seen:
            new.writestr(f"{root}/{suffix}", change[suffix])
    return target


def replacing(old: str, new: str) -> Any:
    def change(data: bytes) -> bytes:
        assert old.encode() in data, old
        return data.replace(old.encode(), new.encode())

    return change


def attacks(tripwire: Path) -> dict[str, dict[str, Any]]:
    pickled = io.BytesIO()
    torch.save(Bomb(tripwire), pickled)
    call = f"__import__('os').mkdir('{tripwire}')"

    def evaluated(data: bytes) -> bytes:
        program = json.loads(data)
        text = json.dumps(program)
        start = text.index('"expr_str": "') + len('"expr_str": "')
        return (text[:start] + call + text[text.index('"', start) :]).encode()

    return {
        "pickled sample inputs": {"data/sample_inputs/model.pt": pickled.getvalue()},
        "pickled weight": {"model_weights_config.json": replacing('"use_pickle": false', '"use_pickle": true')},
        "legacy pickled weights": {"data/weights/model.pt": pickle.dumps(Bomb(tripwire))},
        "pickled constant object": {"data/constants/opaque_obj_0": pickle.dumps(Bomb(tripwire))},
        "compiled library": {"data/aotinductor/model/code.so": b"\x7fELF"},
        "operator outside ATen": {"models/model.json": replacing("torch.ops.aten.linear.default", "torch.os.mkdir")},
        "evaluated size": {"models/model.json": evaluated},
    }


@pytest.mark.parametrize("attack", list(attacks(Path("x"))))
def test_an_archive_that_would_execute_something_is_refused_and_nothing_runs(saved: tuple[Model, Path], tmp_path: Path, attack: str) -> None:
    tripwire = tmp_path / "executed"
    bad = rewritten(saved[1], tmp_path / "bad.pt2", attacks(tripwire)[attack])
    with pytest.raises(SourceError, match="could execute code"):
        Model.load(bad)
    assert not tripwire.exists()


def test_the_bomb_does_go_off_in_plain_torch(saved: tuple[Model, Path], tmp_path: Path) -> None:
    """The attack is real: without the inspection, loading executes it."""
    tripwire = tmp_path / "executed"
    bad = rewritten(saved[1], tmp_path / "bad.pt2", attacks(tripwire)["pickled sample inputs"])
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.suppress(AssertionError):
            torch.export.load(bad)
    finally:
        logging.disable(logging.NOTSET)
    assert tripwire.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 truncated", b"not a zip at all"])
def test_a_damaged_archive_is_one_clear_refusal(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.pt2"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"bad\.pt2"):
        Model.load(path)


def test_a_truncated_archive_is_refused(saved: tuple[Model, Path], tmp_path: Path) -> None:
    path = tmp_path / "cut.pt2"
    path.write_bytes(saved[1].read_bytes()[:-1000])
    with pytest.raises(SourceError):
        Model.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        Model.load(tmp_path / "absent.pt2")
