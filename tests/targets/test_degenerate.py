"""Networks with nothing to calibrate in places: dead channels, constant activations, one image. Valid files, or a refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgesmith import Model, targets
from edgesmith.compiler.accuracy import model_outputs_of, outputs_of
from edgesmith.compiler.data import PassData, Split
from edgesmith.compiler.instruments import fixed_inputs
from edgesmith.compiler.lowering import Lowering
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.profile.session import open_session
from edgesmith.passes.quantize.equalise import Equalise
from edgesmith.passes.quantize.quantize import Quantize

pytestmark = pytest.mark.slow


class Degenerate(nn.Module):
    """A channel without weights, one that is constant, a layer that is all zero after its ReLU, a sorting that no runtime has in int8, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dead, self.last = (nn.Conv2d(*channels, 3, padding=1) for channels in ((3, 16), (16, 16), (16, 16)))
        self.head = nn.Linear(16, 6)
        with torch.no_grad():
            self.first.weight[:2] = 0
            self.first.bias[:2] = torch.tensor([0.0, 3.0])
            self.dead.bias.fill_(-1e3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        x = self.last(x + self.dead(x).relu()).relu()
        out: torch.Tensor = self.head(x.cumsum(3).mean((2, 3)))
        return out


@pytest.mark.parametrize("samples", [1, 64])
@pytest.mark.parametrize("scheme", ["auto", "static"])
@pytest.mark.parametrize("target", targets)
def test_files_answer_like_the_float_model(target: str, scheme: str, samples: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model.from_module(Degenerate().eval(), (torch.randn(2, 3, 12, 12),))
    x = np.random.default_rng(0).standard_normal((200, 3, 12, 12)).astype(np.float32)
    split = Split((x,), np.zeros(len(x), np.int64))
    ctx = PassContext(data=PassData(split, split))
    plan = Quantize(scheme=scheme, samples=samples).run(Equalise(scheme=scheme, samples=samples).run(model, ctx).model, ctx).model
    artifact = Lowering(tmp_path, fixed_inputs(plan, ctx, 8)).artifact(plan, targets[target])
    with open_session(artifact.path, targets[target].runner, extra=targets[target].extra) as session:
        (found,) = outputs_of(session, split)
    (exact,) = model_outputs_of(model, split)
    assert np.isfinite(found).all()
    assert (found.argmax(1) == exact.argmax(1)).mean() > 0.9
