"""The command line: what it prints, how it ends, and what it does not import."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from PIL import Image

from edgesmith import __version__
from edgesmith.compiler import border, cli, doctor
from edgesmith.compiler.buildfile import read
from edgesmith.compiler.errors import NumericsError, UserError
from edgesmith.compiler.initfile import TEMPLATE
from edgesmith.compiler.progress import Lines, progress, silent
from edgesmith.compiler.schema import json_schema
from edgesmith.compiler.spec import load_file
from edgesmith.compiler.testing import tiny_model

EDGESMITH = [sys.executable, "-c", "from edgesmith.compiler.cli import main; main()"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edgesmith(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*EDGESMITH, *arguments], check=False, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_help_imports_nothing_heavy_and_names_every_command(here: Path) -> None:
    code = (
        "import sys\nfrom edgesmith.compiler.cli import run\nrun(['--help'])\n"
        "heavy = {'torch', 'numpy', 'rich', 'pydantic', 'scipy', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("build", "check", "axes", "profile", "passes", "targets", "devices", "doctor", "init"):
        assert f"\n  {command} " in done.stdout
    assert "..." not in done.stdout.split("Commands:")[1]


def test_help_is_instant(here: Path) -> None:
    """Processor time, which other work on the machine does not change, of a whole fresh process; the best of five."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*EDGESMITH, "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bulid"], "Did you mean 'build'?"),
        (["build", "--taget", "x"], "--target"),
        (["profile"], "Missing argument 'ARTIFACT'"),
        (["profile", "x.onnx", "--threads", "0"], "0 is not in the range"),
        (["profile", "x.onnx", "--latency-ms", "fast"], "'fast' is not a valid float"),
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_init_writes_a_file_that_reads_and_never_overwrites(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["init"]) == 0
    assert capsys.readouterr().out == "wrote edgesmith.toml\n"
    (here / "model.py").write_text("")
    (here / "photos").mkdir()
    spec = read("edgesmith.toml")
    assert len(spec.targets) == 3
    assert [name.partition("{")[0] for name in spec.passes] == ["prune", "recover", "fold-batch-norm", "fold-constants", "equalise", "quantize"]
    (here / "edgesmith.toml").write_text("mine")
    assert border.guarded(lambda: cli.run(["init"]), ["init"]) == 2
    assert "edgesmith.toml: is there already" in capsys.readouterr().err
    assert (here / "edgesmith.toml").read_text() == "mine"


def test_every_key_of_the_schema_that_init_does_not_show_is_rare() -> None:
    shown = {line.split("=")[0].strip("# \n") for line in TEMPLATE.splitlines() if "=" in line}
    tables = json_schema()["$defs"]
    assert set(tables["BudgetTable"]["properties"]) <= shown
    assert set(tables["ModelTable"]["properties"]) <= shown
    assert set(tables["TargetTable"]["properties"]) <= shown
    assert set(tables["DataTable"]["properties"]) - shown == {"rename"}


def test_init_prints_the_schema(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["init", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(json_schema()))
    assert not list(here.iterdir())


def test_lists(capsys: pytest.CaptureFixture[str]) -> None:
    for command, expected in {"passes": "quantize", "targets": ".tflite", "devices": "host"}.items():
        assert cli.run([command]) == 0
        assert expected in capsys.readouterr().out


def test_user_errors_are_one_message_and_2(here: Path) -> None:
    done = edgesmith("build", "nothing.toml", cwd=here)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: nothing.toml: there is no such build file\n  hint: 'edgesmith init' writes one\n"
    assert not list(here.iterdir())


def raising(error: BaseException):
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("no", where="there", hint="try"), 2, "error: there: no\n  hint: try\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/out/x"), 2, "error: /out/x: cannot be written: the disk is full\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), 2, "error: /out: permission denied\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.Abort(), 70, "error: Abort"),
        (NumericsError("pass 'x' broke the numbers"), 70, "error: pass 'x' broke the numbers\n  this is a defect of edgesmith; "),
        (ZeroDivisionError("division by zero"), 70, "error: ZeroDivisionError: division by zero\n  this is a defect of edgesmith; "),
    ],
)
def test_how_errors_end(here: Path, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str) -> None:
    assert border.guarded(raising(error), ["build"]) == code
    told = capsys.readouterr().err
    assert told.startswith(message)
    assert "Traceback" not in told


def test_a_crash_report_says_how_to_make_it_happen_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "my.toml").write_text("[model]\nsource = 'x'\n")
    assert border.guarded(raising(ZeroDivisionError("division by zero")), ["build", "my.toml", "--set", "a b=1"]) == 70
    (report,) = here.glob("edgesmith-crash-*.txt")
    assert str(report) in capsys.readouterr().err
    text = report.read_text()
    for part in ("command: edgesmith build my.toml --set 'a b=1'", "torch: 2.", "source = 'x'", "Traceback (most recent call last)", "raise error"):
        assert part in text


def test_a_crash_report_is_not_lost_where_the_folder_cannot_be_written(here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spare = tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr(border.tempfile, "gettempdir", lambda: str(spare))
    gone = tmp_path / "gone"
    monkeypatch.setattr(border.Path, "cwd", lambda: gone)
    assert border.write_crash_report(ZeroDivisionError(), []).startswith(str(spare))


def test_what_a_users_own_code_raises_later_is_theirs(here: Path) -> None:
    (here / "mine.py").write_text("def transform(x):\n    return x.no_such_thing\n")
    module = load_file(here / "mine.py")
    with pytest.raises(AttributeError) as theirs:
        module.transform(3)
    told = border.translate(theirs.value)
    assert told is not None
    assert (told.exit_code, str(told)) == (2, "mine.py:2 in transform(): AttributeError: 'int' object has no attribute 'no_such_thing'")


def test_an_error_inside_edgesmith_is_ours_though_a_user_called(here: Path) -> None:
    (here / "mine2.py").write_text("def deep(f):\n    return f()\n")
    module = load_file(here / "mine2.py")
    with pytest.raises(TypeError) as ours:
        module.deep(lambda: read(None))  # type: ignore[arg-type]
    assert border.translate(ours.value) is None


def test_ctrl_c_ends_a_command_with_130(here: Path) -> None:
    lines = [
        "import signal, sys, time",
        "from edgesmith.compiler import border",
        "signal.signal(signal.SIGINT, signal.default_int_handler)",  # A shell's background jobs ignore it.
        "sys.exit(border.guarded(lambda: print('on', flush=True) or time.sleep(60), []))",
    ]
    code = "\n".join(lines)
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    _, told = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "Traceback" not in told


def test_a_closed_pipe_is_no_error(here: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*EDGESMITH, "init", "--schema"], check=False, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (border.BROKEN_PIPE, "")


def test_plain_lines_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("edgesmith.compiler.progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    lines = Lines(stream)
    lines.step("prune")
    for i in range(25):
        now[0] += 1
        lines.update(i, 25, "groups")
    lines.step("quantize")
    lines.close()
    assert stream.getvalue() == "prune\nprune: 9/25 groups\nprune: 19/25 groups\nprune: done in 25 s\nquantize\n"


def test_progress_is_plain_where_nobody_watches_and_survives_a_silenced_descriptor(capfd: pytest.CaptureFixture[str]) -> None:
    from edgesmith.compiler.quiet import quiet

    with progress() as shown:
        with quiet():
            shown.step("lowering")
            shown.update(0, 0, "")
        silent().step("nothing")
    captured = capfd.readouterr()
    assert captured.err == "lowering\n"
    assert captured.out == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal, progress(terminal) as shown:
        shown.step("prune")
        shown.update(1, 4, "groups")
        time.sleep(0.3)
        shown.step("quantize")
    seen = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "prune" in seen
    assert "groups" in seen
    assert "━" in seen
    assert "\x1b[" in seen


def test_doctor_finds_nothing_broken_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "torch" in told
    assert "cores: " in told


HEALTHY = (doctor.Finding("", "torch", "==2.13.*", "2.13.0+cpu"), doctor.Finding("litert", "a", ">=1", "1.5"), doctor.Finding("litert", "b", "<2", "1.0"))


@pytest.mark.parametrize(
    ("changed", "broken", "missing"),
    [
        ({}, [], ()),
        ({0: "2.14.0"}, ["torch"], ()),
        ({0: None}, ["torch"], ()),
        ({1: None, 2: None}, [], ("litert",)),
        ({1: None}, [], ("litert",)),
        ({2: "2.0"}, ["b"], ()),
    ],
)
def test_what_doctor_calls_broken(changed: dict[int, str | None], broken: list[str], missing: tuple[str, ...]) -> None:
    direct = tuple(doctor.Finding(f.extra, f.name, f.wanted, changed.get(i, f.installed)) for i, f in enumerate(HEALTHY))
    health = doctor.Health(True, direct, (), {})
    assert [f.name for f in health.broken] == broken
    assert health.missing_extras == missing


def test_doctor_looks_below_what_edgesmith_itself_requires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, requires in {"edgesmith_top-1.0": ["mid>=1", "opt>=1; extra == 'litert'"], "mid-1.0": ["low<2"], "low-2.0": []}.items():
        folder = tmp_path / f"{name}.dist-info"
        folder.mkdir()
        title, version = name.rsplit("-", 1)
        folder.joinpath("METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {title}\nVersion: {version}\n" + "".join(f"Requires-Dist: {r}\n" for r in requires)
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctor, "DISTRIBUTION", "edgesmith_top")
    health = doctor.examine()
    assert [(f.name, f.status) for f in health.direct] == [("mid", "ok"), ("opt", "missing")]
    assert [(f.by, f.name, f.wanted, f.installed, f.status) for f in health.broken] == [("mid", "low", "<2", "2.0", "conflict")]
    assert health.missing_extras == ("litert",)


def test_axes_are_shown_as_text_as_json_and_as_a_picture(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    tiny_model().save(here / "model.pt2")
    assert cli.run(["axes", "model.pt2"]) == 0
    said = capsys.readouterr().out
    assert "blocks.1.fc1: 64 units of kind hidden\n  made by   blocks.1.fc1.weight[0], blocks.1.fc1.bias[0]\n  read by   blocks.1.fc2.weight[1]\n" in said
    assert "blocks.0.qkv:heads: 4 units of kind heads\n  made by   blocks.0.qkv.weight[0] x24, blocks.0.qkv.bias[0] x24\n" in said
    assert "must stay: an output of the model (output)\n            head.weight[0] of 4, head.bias[0] of 4\n" in said
    assert "and 4 more" in said.split("patches:residual")[1].split("read by")[0]
    assert all(len(line) <= 80 for line in said.splitlines())

    for picture in ("axes.svg", "axes.png"):
        assert cli.run(["axes", "model.pt2", "--json", "--picture", picture]) == 0
        data = json.loads(capsys.readouterr().out)
    (residual,) = (g for g in data["groups"] if g["kind"] == "residual")
    assert not residual["exact"] and residual["size"] == 32
    assert {"tensor": "head.weight", "dim": 1, "side": "consumer", "slices_per_unit": 1} in residual["members"]
    assert {"tensor": "head.weight", "dim": 0, "size": 4, "why": "an output of the model", "by": "output"} in data["pinned"]
    drawn = (here / "axes.svg").read_text()
    assert all(group["name"] in drawn for group in data["groups"])
    with Image.open(here / "axes.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 2 * len(data["groups"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.pt2"], "nowhere.pt2: does not exist"),
        (["notes.txt"], "notes.txt: is no model"),
        (["model.pt2", "--picture", "axes.gif"], "axes.gif is no picture: .gif is not one of .svg, .png, .pdf"),
    ],
)
def test_axes_of_what_is_no_model_are_refused(arguments: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model().save(here / "model.pt2")
    (here / "notes.txt").write_text("")
    assert border.guarded(lambda: cli.run(["axes", *arguments]), ["axes"]) == 2
    assert said in capsys.readouterr().err
