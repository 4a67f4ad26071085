"""What an INT8 file answers is known without the device: the plan's simulation gives the same class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from digits_networks import CONTEXT, TRAIN, ConvNet, Transformer, trained_on_digits
from torch import nn

from edgesmith import targets
from edgesmith.compiler.accuracy import outputs_of
from edgesmith.compiler.data import Split
from edgesmith.compiler.forms import FLOAT, forms
from edgesmith.compiler.profile.session import open_session
from edgesmith.compiler.simulate import simulated
from edgesmith.passes.quantize.quantize import Quantize

pytestmark = pytest.mark.slow

IMAGES, LEAST_AGREEMENT = 1000, 0.995


@pytest.mark.parametrize("target", targets)
@pytest.mark.parametrize("kind", [ConvNet, Transformer])
def test_top1_of_a_thousand_images_is_predicted(kind: type[nn.Module], target: str, tmp_path: Path) -> None:
    twin = trained_on_digits(kind)
    some = Split((TRAIN.inputs[0][:IMAGES],), TRAIN.labels[:IMAGES])
    x = torch.from_numpy(some.inputs[0])
    agreed = {}
    for name, form in forms(Quantize().run(twin, CONTEXT).model, twin).items():
        artifact = targets[target].lower(form, tmp_path, name)
        with open_session(artifact.path, targets[target].runner, extra=targets[target].extra) as session:
            (found,) = outputs_of(session, some)
        run = twin if name == FLOAT else simulated(form, targets[target].dynamic_grid)
        expected = torch.cat([run(one) for one in x.split(1)])
        agreed[name] = float((found.argmax(1) == expected.argmax(1).numpy()).mean())
    assert len(agreed) > 1 and min(agreed.values()) >= LEAST_AGREEMENT, agreed
