from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from edgesmith.compiler.diagnostics import Severity
from edgesmith.compiler.errors import UnsupportedError
from edgesmith.compiler.model import Model
from edgesmith.compiler.testing import TinyConvNet, TinyTransformer, tiny_model
from edgesmith.targets.executorch import ExecuTorch, support


class Solver(nn.Module):
    """Linear algebra and special functions, for which the runtime has no kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.inv(self.inner(x)) + torch.special.i0(x)


@pytest.mark.parametrize("kind", [TinyTransformer, TinyConvNet])
def test_nothing_is_missing_for_ordinary_nets(kind: type[nn.Module]) -> None:
    assert ExecuTorch().unsupported(tiny_model(kind)) == ()


def test_each_missing_operator_is_named_with_its_place() -> None:
    model = Model.from_module(nn.Sequential(nn.Linear(4, 4), Solver()), (torch.randn(2, 4, 4),))
    found = ExecuTorch().unsupported(model)
    assert {d.severity for d in found} == {Severity.ERROR}
    assert {d.where for d in found} == {"1"}
    assert len(found) == 2
    assert "linalg_inv" in found[0].message
    assert "special_i0" in found[1].message


def test_lowering_refuses_them_and_writes_nothing(tmp_path: Path) -> None:
    model = Model.from_module(Solver(), (torch.randn(2, 4, 4),))
    with pytest.raises(UnsupportedError, match="linalg_inv"):
        ExecuTorch().lower(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("function", "fits"),
    [
        (lambda x: x.flip(1), True),
        (lambda x: nn.functional.normalize(x, dim=-1) + x.norm(dim=1, keepdim=True), True),
        (lambda x: nn.functional.adaptive_avg_pool1d(x.transpose(1, 2), 1), True),
        (lambda x: x.pow(3) + torch.pow(2.0, x) + x.pow(x), True),
        (lambda x: torch.einsum("bij,bkj->bik", x, x), True),
        (lambda x: nn.functional.silu(x) * nn.functional.softplus(x), True),
        (lambda x: x.cumsum(1).roll(1, 1), True),
        (lambda x: torch.sort(x)[0], False),
        (torch.lgamma, False),
    ],
)
def test_the_answer_for_single_operators(function, fits: bool) -> None:
    class Only(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    assert (ExecuTorch().unsupported(Model.from_module(Only(), (torch.randn(2, 4, 4),))) == ()) is fits


def test_the_answer_takes_less_than_a_second() -> None:
    """On a net of thirty blocks; the first answer also builds torch's decomposition table."""
    model = tiny_model(lambda: TinyTransformer(depth=30))  # type: ignore[arg-type]
    start = time.process_time()
    ExecuTorch().unsupported(model)
    assert time.process_time() - start < 1.0


def test_asking_imports_no_executorch() -> None:
    code = """
import sys
from edgesmith.compiler.testing import tiny_model
from edgesmith.targets.executorch import ExecuTorch
ExecuTorch().unsupported(tiny_model())
assert not any(name.split('.')[0] in {'executorch', 'torchao'} for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_list_of_kernels_is_the_installed_runtimes() -> None:
    assert support.kernels() == support.live_kernels()
