"""The table of bad input: each ends with one message and its exit code, without a traceback, and loses nothing that was there.

Every row spoils a copy of a project that was built before, and builds again into the same folder.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from edgesmith.compiler import border, cli
from edgesmith.compiler.errors import OutputError
from edgesmith.compiler.model import Model

NET = """\
import torch
from torch import nn


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Bessel(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


class Exotic(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 3), Bessel())


class Failing(nn.Module):
    def forward(self, x):
        raise LookupError("no such layer")
"""
BUILD = """\
[model]
source = "net.py:net"
weights = "net.safetensors"
inputs = [{name = "input", shape = [4]}]

[data]
source = "data.npz"

[accuracy]
max_drop = 0.5

[budget]
size_mb = 1

[[target]]
name = "onnxruntime"

[pipeline]
passes = ["fold-constants"]
"""
WEIGHTS = {"0.weight": (6, 4), "0.bias": (6,), "2.weight": (3, 6), "2.bias": (3,)}


def edgesmith(*arguments: str) -> int:
    """The command, in this process."""
    return border.guarded(lambda: cli.run(list(arguments)), arguments)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good project, built once."""
    folder = tmp_path_factory.mktemp("built")
    generator = torch.Generator().manual_seed(0)
    save_file({name: torch.randn(shape, generator=generator) for name, shape in WEIGHTS.items()}, folder / "net.safetensors")
    rng = np.random.default_rng(0)
    arrays = {f"x_{part}": rng.normal(size=(30, 4)).astype(np.float32) for part in ("train", "val", "test")}
    np.savez(folder / "data.npz", **arrays, **{f"y_{part}": np.arange(30) % 3 for part in ("train", "val", "test")})
    (folder / "net.py").write_text(NET)
    (folder / "edgesmith.toml").write_text(BUILD)
    assert edgesmith("build", str(folder / "edgesmith.toml"), "--out", str(folder / "out")) == 0
    return folder


@pytest.fixture
def project(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(built, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def outputs(folder: Path) -> dict[str, bytes]:
    """Everything in the output folder that a user would miss, by name: log and lock are for machines."""
    return {p.name: p.read_bytes() for p in sorted((folder / "out").iterdir()) if p.is_file() and p.name not in {"build.log", ".lock"}}


@dataclass(frozen=True)
class Row:
    """What is wrong, how to make it so, what the message must begin with, and the exit code."""

    what: str
    spoil: Callable[[Path], object]
    message: str
    code: int = 2


def toml(old: str, new: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        assert old in BUILD
        (folder / "edgesmith.toml").write_text(BUILD.replace(old, new))

    return spoil


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "net.safetensors")
        change(tensors)
        save_file(tensors, folder / "net.safetensors")

    return spoil


def data(**changes: object) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        with np.load(folder / "data.npz") as file:
            arrays = dict(file)
        for key, value in changes.items():
            arrays[key] = value(arrays[key]) if callable(value) else value
        np.savez(folder / "data.npz", **arrays)

    return spoil


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[: (folder / name).stat().st_size // 2])


def other_model(function: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / "edgesmith.toml").write_text(
            BUILD.replace("net.py:net", f"net.py:{function}")
            .replace('weights = "net.safetensors"\n', "")
            .replace('"input"', '"input"' if function == "Exotic" else '"x"')
        )

    return spoil


class Executes:
    """Unpickling it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def pickled_weights(folder: Path) -> None:
    torch.save({"0.weight": Executes()}, folder / "net.pth")
    toml("net.safetensors", "net.pth")(folder)


def pickled_in_pt2(folder: Path) -> None:
    Model.from_module(torch.nn.Linear(4, 3), (torch.zeros(1, 4),)).save(folder / "net.pt2")
    torch.save(Executes(), folder / "evil.pt")
    with zipfile.ZipFile(folder / "net.pt2") as source, zipfile.ZipFile(folder / "evil.pt2", "w") as target:
        for name in source.namelist():
            inner = name.endswith("sample_inputs/model.pt")
            target.writestr(name, (folder / "evil.pt").read_bytes() if inner else source.read(name))
    (folder / "edgesmith.toml").write_text(BUILD.replace('"net.py:net"\nweights = "net.safetensors"\ninputs = [{name = "input", shape = [4]}]', '"evil.pt2"'))


def truncated_pt2(folder: Path) -> None:
    Model.from_module(torch.nn.Linear(4, 3), (torch.zeros(1, 4),)).save(folder / "net.pt2")
    cut("net.pt2")(folder)
    (folder / "edgesmith.toml").write_text(BUILD.replace('"net.py:net"\nweights = "net.safetensors"\ninputs = [{name = "input", shape = [4]}]', '"net.pt2"'))


def bad_image(folder: Path) -> None:
    for i in range(10):
        (folder / "photos" / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / "photos" / "a" / f"{i}.png")
    cut("photos/a/3.png")(folder)
    toml("data.npz", "photos")(folder)


def nan_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors["2.weight"][1, 2] = float("nan")


def nan_sample(x: np.ndarray) -> np.ndarray:
    x[4, 1] = np.nan
    return x


TABLE = [
    Row("build file: missing", lambda f: (f / "edgesmith.toml").unlink(), "edgesmith.toml: there is no such build file"),
    Row("build file: not TOML", toml("[data]", "[data"), "edgesmith.toml:6: not valid TOML"),
    Row("build file: unknown key", toml("size_mb", "sise_mb"), "edgesmith.toml:13: budget.sise_mb: unknown key\n  hint: did you mean 'size_mb'?"),
    Row("build file: wrong type", toml("size_mb = 1", "size_mb = true"), "edgesmith.toml:13: budget.size_mb: must be a valid number, not True"),
    Row("build file: missing file", toml("data.npz", "dato.npz"), "edgesmith.toml:7: data.source: there is no dato.npz\n  hint: did you mean 'data.npz'?"),
    Row(
        "build file: unknown target",
        toml("onnxruntime", "onnxruntim"),
        "edgesmith.toml:16: target.0.name: there is no target 'onnxruntim'\n  hint: did you mean 'onnxruntime'?",
    ),
    Row("build file: unknown device", toml('"onnxruntime"', '"onnxruntime"\ndevice = "hots"'), "edgesmith.toml:17: target.0.device: unknown device 'hots'"),
    Row(
        "build file: unknown pass",
        toml("fold-constants", "fold-constant"),
        "edgesmith.toml:19: pipeline.passes.0: there is no pass 'fold-constant'\n  hint: did you mean 'fold-constants'?",
    ),
    Row(
        "build file: unknown option",
        toml("fold-constants", "fold-constants{x=1}"),
        "edgesmith.toml:19: pipeline.passes.0: 'fold-constants{x=1}': pass 'fold-constants' has no option 'x'",
    ),
    Row(
        "model: file does not import",
        lambda f: (f / "net.py").write_text("import nothing_there\n"),
        "net.py:1: ModuleNotFoundError: No module named 'nothing_there'",
    ),
    Row("model: no such function", toml("net.py:net", "net.py:nett"), "net.py: there is no function 'nett'\n  hint: did you mean 'net'?"),
    Row("model: cannot be captured", other_model("Branching"), "net.py:11 in forward(): Branching cannot be captured as one graph"),
    Row("model: raises", other_model("Failing"), "net.py:26 in forward(): "),
    Row("model: operator that a target lacks", other_model("Exotic"), "1: "),
    Row("weights: missing", weights(lambda w: w.pop("2.bias")), "net.safetensors: '2.bias' is missing"),
    Row("weights: NaN", weights(nan_weight), "net.safetensors: '2.weight' holds NaN or infinite values"),
    Row("weights: wrong shape", weights(lambda w: w.update({"2.bias": torch.zeros(4)})), "net.safetensors: '2.bias' has shape (4,), the model wants (3,)"),
    Row("weights: truncated", cut("net.safetensors"), "net.safetensors: not a safetensors file, or a truncated one"),
    Row("weights: pickled", pickled_weights, "net.pth: refused: it holds pickled objects"),
    Row("pt2: pickled", pickled_in_pt2, "{project}/evil.pt2: refused, because loading it could execute code"),
    Row("pt2: truncated", truncated_pt2, "{project}/net.pt2: not a .pt2 archive, or a damaged one"),
    Row("data: empty", data(x_train=np.zeros((0, 4), np.float32), y_train=np.zeros(0, np.int64)), "data.npz: train: a split holds no samples"),
    Row("data: wrong shape", data(x_test=np.zeros((30, 5), np.float32)), "data.npz: test: samples of input 'input' have shape (5,), the model takes (4,)"),
    Row("data: wrong type", data(x_val=np.zeros((30, 4), np.float64)), "data.npz: validation: samples of input 'input' are float64, the model takes float32"),
    Row("data: NaN", data(x_train=nan_sample), "data.npz: train: sample 4 of input 'input' holds NaN or infinite values"),
    Row("data: labels out of range", data(y_train=lambda y: y + 1), "data.npz: train: label 3 of sample 2 is out of range"),
    Row("data: labels not integers", data(y_train=lambda y: y / 2), "data.npz: train: labels are float64"),
    Row("data: pickled", data(x_train=np.array([None] * 30)), "data.npz: cannot be read: an array holds Python objects"),
    Row("data: truncated", cut("data.npz"), "data.npz: not an .npz file, or a truncated one"),
    Row("data: corrupt image", bad_image, "photos: a/3.png: cannot be decoded as an image"),
]


@pytest.mark.parametrize("command", ["check", "build"])
@pytest.mark.parametrize("row", TABLE, ids=[row.what for row in TABLE])
def test_bad_input_is_one_message_and_loses_nothing(project: Path, capfd: pytest.CaptureFixture[str], row: Row, command: str) -> None:
    before = outputs(project)
    row.spoil(project)
    there = {p.name for p in project.iterdir()}
    message = row.message.replace("{project}", str(project))
    code = edgesmith(command, "edgesmith.toml", *(("--out", "out") if command == "build" else ()))
    captured = capfd.readouterr()
    told = captured.err.removeprefix("reading the model and its data\n")
    assert code == row.code
    assert told.startswith(f"error: {message}") or (command == "check" and told.startswith("error [") and message in told)
    assert "Traceback" not in captured.err + captured.out
    assert len(told.splitlines()) <= 2
    assert outputs(project) == before
    assert {p.name for p in project.iterdir()} == there


def test_an_output_folder_that_cannot_be_made(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (project / "taken").write_text("a file")
    for out in ("taken", "taken/below"):
        assert edgesmith("build", "edgesmith.toml", "--out", out) == 2
        told = capfd.readouterr().err
        assert told.startswith(f"error: {out}: cannot be written: ")
        assert len(told.splitlines()) == 2
    assert (project / "taken").read_text() == "a file"


def test_an_output_that_is_in_the_way(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(project / "out")
    (project / "out" / "model.onnx").mkdir(parents=True)
    assert edgesmith("build", "edgesmith.toml", "--out", "out") == 2
    assert "model.onnx: cannot be written: " in capfd.readouterr().err
    assert not (project / "out" / "report.json").exists()


LIMITED = "import resource, sys\nfrom edgesmith.compiler.cli import main\nresource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)\nmain()"


@pytest.mark.parametrize("most_bytes", [0, 5_000])
def test_a_full_disk(project: Path, most_bytes: int) -> None:
    """No file may grow beyond some bytes, which every writer meets as it meets a full disk: a failing write."""
    weights(lambda w: w["0.bias"].add_(1))(project)
    before = outputs(project)
    command = [sys.executable, "-c", LIMITED, str(most_bytes), "build", "edgesmith.toml", "--out", "out"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env={**os.environ, "TMPDIR": str(project)})
    message = done.stderr[done.stderr.index("error: ") :]
    assert (done.returncode, done.stdout) == (2, "")
    assert ("no folder for temporary files can be written" if most_bytes == 0 else "cannot be written: the file would be too large") in message
    assert len(message.splitlines()) <= 2
    assert outputs(project) == before
    assert most_bytes == 0 or edgesmith("build", "edgesmith.toml", "--out", "out") == 0


def test_saving_a_model_to_a_full_disk_keeps_the_one_before(tmp_path: Path) -> None:
    model = Model.from_module(torch.nn.Linear(50, 40), (torch.zeros(1, 50),))
    model.save(tmp_path / "model.pt2")
    before = (tmp_path / "model.pt2").read_bytes()
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, was[1]))
    try:
        with pytest.raises(OutputError):
            model.save(tmp_path / "model.pt2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
    assert (tmp_path / "model.pt2").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]


def test_a_budget_nothing_can_meet_still_saves_the_artifact(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert edgesmith("build", "edgesmith.toml", "--out", "new", "--set", "budget.size_mb=0.000001") == 1
    told = capfd.readouterr()
    assert "Traceback" not in told.err + told.out
    assert "size_mb" in told.out
    assert "is over its limit of 1e-06 MB by" in told.out
    assert (project / "new" / "model.onnx").stat().st_size > 0
    assert (project / "new" / "report.json").is_file()
