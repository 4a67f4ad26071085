"""Every registered pass and target keeps the same promises, on a transformer and on a convolutional net."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from edgesmith.compiler import registry
from edgesmith.compiler.errors import SpecError
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.spec import format_pass, parse_pass
from edgesmith.compiler.testing import TinyConvNet, TinyTransformer, check_pass, check_target, tiny_data, tiny_model

KINDS = {"transformer": TinyTransformer, "convolutional": TinyConvNet}
QUICK = {"epochs": 1, "rank_epochs": 1, "samples": 16, "batch_size": 32}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", registry.pass_names())
def test_pass_keeps_its_contract(name: str, kind: str, tmp_path: Path) -> None:
    cls = registry.pass_class(name)
    quick = {f.name: QUICK[f.name] for f in dataclasses.fields(cls) if f.name in QUICK}
    check_pass(cls(**quick), folder=tmp_path, model=tiny_model(KINDS[kind]), ctx=PassContext(data=tiny_data().for_passes()))


@pytest.mark.parametrize("name", registry.pass_names())
def test_pass_is_called_what_the_table_calls_it(name: str) -> None:
    cls = registry.pass_class(name)
    assert cls.name == name
    assert format_pass(parse_pass(name)) == name
    assert cls.__doc__, "the command line shows the docstring"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", registry.target_names())
def test_target_keeps_its_contract(name: str, kind: str, tmp_path: Path) -> None:
    target = registry.target(name)
    assert target.name == name
    check_target(target, folder=tmp_path, model=tiny_model(KINDS[kind]))


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(SpecError, match="did you mean 'quantize'"):
        registry.pass_class("quantise")
    with pytest.raises(SpecError, match="did you mean 'litert'"):
        registry.target("litrt")
