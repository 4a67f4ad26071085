"""Attention whose queries share key heads lowers to every target."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgesmith import Model, PassContext, Pipeline
from edgesmith.compiler import registry
from edgesmith.compiler.axes import Axes
from edgesmith.compiler.instruments import fixed_inputs
from edgesmith.compiler.lowering import Lowering
from edgesmith.compiler.profile.session import open_session


class Shared(nn.Module):
    """``keys`` key heads, each for ``queries`` query heads of 6 units."""

    def __init__(self, keys: int, queries: int) -> None:
        super().__init__()
        self.keys, self.queries = keys, queries
        self.q, self.k, self.v = nn.Linear(24, 6 * keys * queries), nn.Linear(24, 6 * keys), nn.Linear(24, 6 * keys)
        self.out = nn.Linear(6 * keys * queries, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (y.view(batch, tokens, -1, 6).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        k, v = (y[:, :, None].expand(batch, self.keys, self.queries, tokens, 6).reshape(batch, -1, tokens, 6) for y in (k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, -1))


@pytest.mark.parametrize("target", registry.target_names())
@pytest.mark.parametrize(("keys", "queries"), [(1, 2), (1, 4), (2, 2)])
def test_it_lowers(keys: int, queries: int, target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, chosen, x = Model.from_module(Shared(keys, queries).eval(), (torch.randn(2, 8, 24),)), registry.target(target), torch.randn(4, 8, 24)
    artifact = chosen.lower(model, tmp_path)
    with open_session(artifact.path, chosen.runner) as session:
        (found,) = session.run((x.numpy(),))
    np.testing.assert_allclose(found, model(x).detach().numpy(), atol=1e-5)


def test_what_pruning_leaves_of_two_key_heads_lowers_to_litert(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model.from_module(Shared(2, 2).eval(), (torch.randn(2, 8, 24),))
    pruned = Pipeline.parse("prune{ratio=0.4,importance=l1,kinds=[heads]}").run(model)
    assert pruned.params < model.params
    assert [g.size for g in Axes.of(pruned).groups if g.kind == "heads"] == [2]
    Lowering(tmp_path, fixed_inputs(pruned, PassContext(), 4)).artifact(pruned, registry.target("litert"))
