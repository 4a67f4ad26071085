"""The bench of a real target: what it says of a model and of a narrower one, and a pass that asks it."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgesmith import PassContext, Pipeline
from edgesmith.compiler import graph as graphs
from edgesmith.compiler.bench import KEPT
from edgesmith.compiler.profile.bench import TargetBench
from edgesmith.compiler.testing import TinyTransformer, tiny_data, tiny_model

pytestmark = pytest.mark.slow


class Wide(TinyTransformer):
    def __init__(self) -> None:
        super().__init__(width=128)


@pytest.mark.parametrize("target", ["onnxruntime", "litert", "executorch"])
def test_a_narrower_model_takes_less_and_the_share_asked_for(target: str, tmp_path: Path) -> None:
    model = tiny_model(Wide)
    bench = TargetBench.of(target, tmp_path)
    ctx = PassContext(data=tiny_data().for_passes(), benches={target: bench})
    narrow = Pipeline.parse("prune{latency=0.8,importance=l2}").run(model, ctx)
    cost, less = bench.cost(model), bench.cost(narrow)
    assert 0 < less.size_bytes < cost.size_bytes
    assert 0 < cost.latency_low_ms <= cost.latency_ms
    assert 0.5 < bench.paired(model, narrow).share.value < 0.95
    timed = {path for operator in bench.operators(model).operators for path in operator.sources}
    assert {"blocks.0.fc1", "blocks.1.fc2"} <= timed <= {graphs.source(node) for node in graphs.operators(model.graph)}
    assert len(list(tmp_path.glob(f"*{bench.target.suffix}"))) == KEPT
