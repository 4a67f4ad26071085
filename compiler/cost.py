"""What a model costs, counted on its graph."""

from __future__ import annotations

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from edgesmith.compiler.model import Model
from edgesmith.compiler.weighted import weighted


def macs(model: Model) -> int:
    """Multiply-accumulates of one sample: half of the floating-point operations that torch's own counter finds.

    Element-wise operators are not counted.
    """
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        inputs = [torch.empty(spec.at_batch(1), dtype=spec.torch_dtype) for spec in model.inputs]
        _FakeInterpreter(model.graph, mode).run(*inputs)
    return int(counter.get_total_flops()) // 2


class _FakeInterpreter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module)
        self._mode = mode

    def fetch_attr(self, target: str) -> torch.Tensor:
        return self._mode.from_tensor(super().fetch_attr(target).detach(), static_shapes=True)


def products(graph: fx.GraphModule) -> dict[fx.Node, int]:
    """Multiply-accumulates of each operator that multiplies by a weight, for one batch of the shape metadata: elements of the result times those that
    make one of them.
    """
    found = {}
    for node in graph.graph.nodes:
        kind = weighted(node) if node.op == "call_function" else None
        weight = kind.argument(node, kind.weight) if kind is not None else None
        if kind is not None and weight is not None:
            value = weight.meta["val"]
            found[node] = node.meta["val"].numel() * (value.numel() // value.shape[kind.axis])
    return found
