"""What the converter lacks is known without it; what is said agrees with the installed converter."""

import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgesmith.compiler.diagnostics import Severity
from edgesmith.compiler.model import Model
from edgesmith.compiler.testing import TinyConvNet, TinyTransformer, tiny_model
from edgesmith.targets.litert.operators import ALSO_DECOMPOSED, LOWERED, NOT_DECOMPOSED, REPLACED
from edgesmith.targets.litert.support import unsupported


@pytest.mark.alone
@pytest.mark.parametrize("kind", [TinyTransformer, TinyConvNet])
def test_ordinary_models_are_supported_within_a_second(kind):
    model = tiny_model(kind)
    started = time.perf_counter()
    assert unsupported(model) == ()
    assert time.perf_counter() - started < 1


class Inverse(nn.Module):
    def forward(self, x):
        return torch.linalg.inv(x @ x.mT)


class Clean(nn.Module):
    def forward(self, x):
        x = F.pixel_shuffle(F.prelu(x, torch.tensor([0.1])), 2)
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear")
        return F.group_norm(x, 1).roll(1, dims=-1).std(dim=-1)


def test_each_operator_that_is_lacking_is_named_with_its_layer():
    model = Model.from_module(nn.Sequential(nn.Linear(3, 3), Inverse(), Inverse()), (torch.randn(2, 3, 3),))
    found = unsupported(model)
    assert [(d.where, d.code, d.severity) for d in found] == [("1", "litert.unsupported-op", Severity.ERROR), ("2", "litert.unsupported-op", Severity.ERROR)]
    assert "aten.linalg_inv.default" in found[0].message


def test_operators_that_decompose_are_supported():
    assert unsupported(Model.from_module(Clean(), (torch.randn(2, 4, 4, 4),))) == ()


def returns_a_new_tensor(operator):
    schema = operator._schema
    return not any(a.is_out for a in schema.arguments) and any("Tensor" in str(r.type) for r in schema.returns)


@pytest.mark.slow
def test_the_tables_are_those_of_the_installed_converter():
    import litert_torch  # noqa: F401
    from litert_torch.backend.lowerings import registry
    from litert_torch.fx_infra import decomp

    live = [k for k in registry.global_registry.registered_ops if isinstance(k, torch._ops.OpOverload) and k.namespace in {"aten", "prims"}]
    assert {str(k) for k in live if returns_a_new_tensor(k)} == LOWERED
    default, used = torch.export.default_decompositions(), decomp.pre_lower_decomp()
    assert {str(k) for k in used if k not in default and returns_a_new_tensor(k)} - LOWERED | {"aten.addmm.default"} >= set(ALSO_DECOMPOSED) - LOWERED
    assert {str(k) for k in default if k not in used and returns_a_new_tensor(k)} == set(NOT_DECOMPOSED)
    assert {str(k) for k in used} >= REPLACED
