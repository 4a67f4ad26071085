"""Every coupling and every rule's case, pruned by half, in every runtime: the file's outputs are those of the graph to 1e-4, or it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from axes_couplings import COUPLINGS, Net
from axes_operators import OPERATORS

from edgesmith import Model, PassContext, Pipeline
from edgesmith.compiler import registry
from edgesmith.compiler.axes import Axes, prove, remove
from edgesmith.compiler.errors import UnsupportedError
from edgesmith.compiler.instruments import fixed_inputs
from edgesmith.compiler.lowering import Lowering

REFUSED = {
    ("conv: folded", "litert"): "stablehlo.scatter",
    ("index: counted by value", "executorch"): "aten::histc",
    ("index: counted by value", "litert"): "aten.histc",
    ("reduce: in order", "executorch"): "aten::sort",
    ("reduce: in order", "litert"): "STABLEHLO_SORT",
    **{("reduce: running products, and differences of tokens", target): "cumprod" for target in registry.target_names()},
}
"""What a runtime has no kernel for, and what it is called in the message."""
MIXED = {"index: counted by value", "reduce: over everything"}
"""What one sample gives depends on the others of its batch: a file runs them one by one."""
BATCHES = {"index: written at places"}
"""Those that address a sample by number, so that a file of one sample cannot be made."""
QUICK = {"conv: folded", "reduce: in order"}


def cases() -> list[object]:
    names = [name for name in COUPLINGS | OPERATORS if name not in BATCHES]
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("target", registry.target_names())
@pytest.mark.parametrize("case", cases())
def test_what_is_left_of_every_coupling_runs(case: str, target: str, tmp_path: Path) -> None:
    function, tensors, shape, *_ = (COUPLINGS | OPERATORS)[case]
    torch.manual_seed(0)
    inputs = torch.randint(0, 4, shape) if "embedding" in case else torch.randn(shape)
    model = Model.from_module(Net(function, **tensors).requires_grad_(False), (inputs,))
    axes = Axes.of(model)
    removals = {group.name: range(0, group.size - 1, 2) for group in axes.groups}
    pruned = remove(model, removals, axes=axes)
    prove(model, pruned, removals, axes=axes)
    pruned = Pipeline.parse("fold-batch-norm,fold-constants").run(pruned)
    lowering = Lowering(tmp_path, fixed_inputs(pruned, PassContext(), 1 if case in MIXED else 4))
    if (case, target) not in REFUSED:
        assert lowering.artifact(pruned, registry.target(target)).path.exists()
        return
    with pytest.raises(UnsupportedError, match=f"target '{target}' cannot run this model") as refused:
        lowering.artifact(pruned, registry.target(target))
    assert REFUSED[case, target] in refused.value.why
