"""The text form of passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgesmith.compiler.errors import SpecError
from edgesmith.compiler.spec import format_pass, parse_pass, split_top

FILE = """
from dataclasses import dataclass
from edgesmith import Numerics, Pass, PassResult

@dataclass(frozen=True)
class Options(Pass):
    name = "options"
    numerics = Numerics.EXACT
    k: int = 1
    x: float = 0.5
    on: bool = False
    where: tuple[str, ...] = ()
    maybe: float | None = None

    def run(self, model, ctx):
        return PassResult(model, False)

not_a_pass = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path


def test_options_are_read_by_their_types(folder: Path) -> None:
    step = parse_pass("mine.py:Options{k=3, x=1e-2, on=true, where=[head,blocks.*.attn], maybe=0.5}", folder)
    assert (step.k, step.x, step.on, step.where, step.maybe) == (3, 0.01, True, ("head", "blocks.*.attn"), 0.5)  # type: ignore[attr-defined]
    assert format_pass(step) == "options{k=3,x=0.01,on=true,where=[head,blocks.*.attn],maybe=0.5}"


def test_defaults_are_left_out(folder: Path) -> None:
    assert format_pass(parse_pass("mine.py:Options{k=1}", folder)) == "options"


def test_commas_inside_brackets_do_not_split() -> None:
    assert split_top("prune{ratio=0.3,exclude=[a,b]}, recover ,quantize") == ["prune{ratio=0.3,exclude=[a,b]}", "recover", "quantize"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine.py:Options{kk=3}", "did you mean 'k'"),
        ("mine.py:Options{k=three}", "not a whole number"),
        ("mine.py:Options{on=yes}", "not true or false"),
        ("mine.py:Options{k}", "no value"),
        ("mine.py:Options{k=1", "not a pass"),
        ("mine.py:Options{where=[a}", "brackets"),
        ("mine.py:not_a_pass", "no pass 'not_a_pass'"),
        ("absent.py:Options", "no such file"),
        ("", "not a pass"),
    ],
)
def test_a_mistake_is_one_clear_message(folder: Path, text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_pass(text, folder)
