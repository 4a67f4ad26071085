"""Every architecture that the axes are tested on, 40 % of each of its groups gone, is saved, loaded, lowered to every target and quantized.

What a runtime cannot run on integers stays float there, named.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import ALWAYS, EXPERTS, SLOW, built, samples

from edgesmith import Model, Pipeline
from edgesmith.compiler import registry
from edgesmith.compiler.data import Data, Split
from edgesmith.compiler.errors import UnsupportedError
from edgesmith.compiler.forms import forms, schemes
from edgesmith.compiler.instruments import fixed_inputs, flat_outputs
from edgesmith.compiler.lowering import Lowering
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.quantplan import Scheme
from edgesmith.passes.prune.candidates import KINDS

SAMPLES = 32


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [*ALWAYS, *SLOW])
def test_it_prunes_quantizes_and_lowers_to_every_target(name: str, tmp_path: Path) -> None:
    """``Lowering`` compares each file, run in its runtime, with the graph (to 1e-4) or with what the plan says."""
    pruned = Pipeline.parse(f"prune{{ratio=0.4,importance=l1,kinds=[{','.join(KINDS[:-1])}]}}").run(built(name))
    pruned.save(tmp_path / "model.pt2")
    inputs, loaded = pruned.example_inputs(), Model.load(tmp_path / "model.pt2")
    assert all(map(torch.equal, flat_outputs(loaded, inputs), flat_outputs(pruned, inputs)))
    twin = Pipeline.parse("fold-batch-norm,fold-constants").run(pruned)
    torch.manual_seed(1)
    arrays = tuple(x.numpy() for x in samples(name, SAMPLES))
    split = Split(arrays, np.zeros(SAMPLES, np.int64))
    ctx = PassContext(data=Data(split, split, split).for_passes())
    twin = Pipeline.parse("equalise{samples=16}").run(twin, ctx)
    model = Pipeline.parse("quantize{samples=16}").run(twin, ctx)
    lowering = Lowering(tmp_path, fixed_inputs(model, ctx, 4))
    found = {form: one for form, one in forms(model, twin).items() if form in {"auto", "static"}}
    assert found
    for target in registry.target_names():
        lowering.artifact(twin, registry.target(target))
        for form, one in found.items():
            file = lowering.artifact(one, registry.target(target))
            planned = {path for path, scheme in schemes(one).items() if scheme is not Scheme.FLOAT}
            honoured = planned - {d.where for d in file.diagnostics}
            assert honoured, f"{target}: of {form} {len(honoured)} of {len(planned)} operators are on integers"


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("target", registry.target_names())
def test_experts_run_where_the_runtime_can_sort_and_are_refused_elsewhere(name: str, target: str, tmp_path: Path) -> None:
    model = Pipeline.parse("prune{ratio=0.4,importance=l1},fold-constants").run(built(name))
    lowering = Lowering(tmp_path, fixed_inputs(model, PassContext(), 2))
    if target == "onnxruntime":
        assert lowering.artifact(model, registry.target(target)).path.exists()
        return
    with pytest.raises(UnsupportedError, match=r"mlp\.experts: .* cannot run this model") as caught:
        lowering.artifact(model, registry.target(target))
    assert "aten.sort" in str(caught.value.why) or "aten.histc" in str(caught.value.why)
