"""The table of bad artifacts: ``profile --operators`` and ``compare`` end with one message and exit code 2, and leave nothing behind."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import onnx
import psutil
import pytest
import torch
from torch import nn

from edgesmith import Model, targets
from edgesmith.compiler import cli

SUFFIXES = {"onnxruntime": ".onnx", "litert": ".tflite", "executorch": ".pte"}
OTHER = {"onnxruntime": "litert", "litert": "executorch", "executorch": "onnxruntime"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each target, with an operator that no delegate takes."""
    torch.manual_seed(0)
    model = Model.from_module(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8), nn.LogSoftmax(-1)), (torch.randn(2, 64),))
    folder = tmp_path_factory.mktemp("good")
    return {name: targets[name].lower(model, folder).path for name in SUFFIXES}


def truncated(bad: Path, file: Path, other: Path) -> None:
    bad.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def corrupt(bad: Path, file: Path, other: Path) -> None:
    content = bytearray(file.read_bytes())
    content[: len(content) // 2 : 3] = b"\xa5" * len(content[: len(content) // 2 : 3])
    bad.write_bytes(content)


def foreign(bad: Path, file: Path, other: Path) -> None:
    shutil.copyfile(other, bad)


def folder(bad: Path, file: Path, other: Path) -> None:
    bad.mkdir()


def missing(bad: Path, file: Path, other: Path) -> None:
    pass


def lacking(bad: Path, file: Path, other: Path) -> None:
    """One operator is called something that the runtime has never heard of."""
    if bad.suffix == ".onnx":
        model = onnx.load(file)
        model.graph.node[-1].op_type = "NoSuchOperator"
        onnx.save(model, bad)
    elif bad.suffix == ".tflite":
        from ai_edge_litert.tools import flatbuffer_utils

        read = flatbuffer_utils.read_model(str(file))
        read.operatorCodes[-1].customCode, read.operatorCodes[-1].builtinCode, read.operatorCodes[-1].deprecatedBuiltinCode = b"NoSuchOperator", 32, 32
        flatbuffer_utils.write_model(read, str(bad))
    else:
        content = file.read_bytes()
        assert content.count(b"aten::_log_softmax") == 1
        bad.write_bytes(content.replace(b"aten::_log_softmax", b"aten::_log_no_such"))


@pytest.mark.parametrize("target", SUFFIXES)
@pytest.mark.parametrize("spoil", [truncated, corrupt, foreign, folder, missing, lacking], ids=lambda spoil: spoil.__name__)
def test_a_bad_artifact_is_one_message(
    good: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    target: str,
    spoil: Callable[[Path, Path, Path], None],
) -> None:
    bad, scratch = tmp_path / f"bad{SUFFIXES[target]}", tmp_path / "scratch"
    scratch.mkdir()
    spoil(bad, good[target], good[OTHER[target]])
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    for arguments in (["profile", str(bad), "--operators"], ["compare", str(good[target]), str(bad)]):
        with pytest.raises(SystemExit) as ended:
            monkeypatch.setattr("sys.argv", ["edgesmith", *arguments])
            cli.main()
        shown = capfd.readouterr()
        assert ended.value.code == 2, shown.err
        assert len(re.findall("^error:", shown.err, re.MULTILINE)) == 1, shown.err
        assert bad.name in shown.err
        assert "Traceback" not in shown.err
        assert shown.out == ""
        assert not list(scratch.iterdir())
        assert not psutil.Process().children(recursive=True)
