"""What a model costs, counted on its graph."""

from __future__ import annotations

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from edgesmith.compiler.model import Model


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
