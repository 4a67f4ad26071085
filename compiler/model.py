"""The one form: a captured graph with what is known about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.candidate import Candidate
from edgesmith.compiler.diagnostics import Diagnostic
from edgesmith.compiler.fingerprint import fingerprint
from edgesmith.compiler.quantplan import QuantPlan


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. ``shape[0]`` is None where the batch is dynamic; ``dtype`` is torch's name (``float32``)."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch has it."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def at_batch(self, batch: int) -> tuple[int, ...]:
        """The shape with a dynamic batch of ``batch``."""
        return tuple(batch if size is None else size for size in self.shape)


@dataclass(frozen=True)
class PassRecord:
    """What one pass did. ``spec`` is its text form; ``params`` and ``macs`` (at batch 1) are those of its result."""

    spec: str
    seconds: float
    changed: bool
    params: int
    macs: int
    fingerprint: str
    diagnostics: tuple[Diagnostic, ...] = ()
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Model:
    """A captured graph in eval mode (see ``compiler/graph.py`` for its invariants) and its quantization plan, if any.

    A pass returns a new one; graphs and tensors are shared between models and never written in place.
    """

    graph: fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    quant: QuantPlan | None = None
    history: tuple[PassRecord, ...] = ()

    @classmethod
    def from_module(cls, module: nn.Module, example_inputs: Sequence[torch.Tensor]) -> Model:
        """Capture ``module`` once, with a dynamic batch where it allows one.

        Raises:
            CaptureError: the module cannot be captured as one graph.
        """
        from edgesmith.compiler.capture import capture

        return capture(module, tuple(example_inputs))

    @classmethod
    def load(cls, path: str | Path) -> Model:
        """Read a model that ``save`` wrote, or any ``.pt2`` of ``torch.export.save``. Nothing in the file is executed.

        Raises:
            SourceError: the file is missing, truncated, or holds pickled code.
        """
        from edgesmith.compiler.storage import load

        return load(Path(path))

    def save(self, path: str | Path) -> None:
        """Write a ``.pt2`` that plain ``torch.export.load`` runs; whole or not at all."""
        from edgesmith.compiler.storage import save

        save(self, Path(path))

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """The outputs in eval mode, without gradients: a tensor, or a tuple of them where the source had several."""
        with torch.no_grad():
            return self.graph(*inputs)

    @cached_property
    def fingerprint(self) -> str:
        """Content hash of graph, tensors and quantization plan; independent of node names and of the history."""
        return fingerprint(self.graph, self.quant)

    @property
    def dynamic_batch(self) -> bool:
        """Whether any batch size runs."""
        return any(spec.shape and spec.shape[0] is None for spec in self.inputs)

    @property
    def params(self) -> int:
        """Number of weights: elements of parameters, each tensor counted once."""
        return sum({id(p): p.numel() for p in self.graph.parameters()}.values())

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        from edgesmith.compiler.cost import macs

        return macs(self)

    def edit(self, *, tensors: bool = False) -> fx.GraphModule:
        """A copy of the graph to change; ``tensors`` copies the tensors too, for whoever trains."""
        return graphs.copied(self.graph, tensors=tensors)

    def with_graph(self, graph: fx.GraphModule, *, quant: QuantPlan | None = None) -> Model:
        """This model with an edited ``graph``: cleaned of dead nodes, checked, shapes computed anew, in eval mode."""
        graphs.set_training(graph, False)
        graphs.clean(graph)
        graphs.infer_shapes(graph, tuple(s.shape for s in self.inputs), tuple(s.torch_dtype for s in self.inputs))
        return replace(self, graph=graph, outputs=output_specs(graph, tuple(s.name for s in self.outputs)), quant=quant)

    def example_inputs(self, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, ...]:
        """Random inputs of the right shapes: normal floats, integers 0 or 1 (valid as ids and as masks)."""
        generator = torch.Generator().manual_seed(seed)
        made = []
        for spec in self.inputs:
            shape = spec.at_batch(batch)
            if spec.torch_dtype.is_floating_point:
                made.append(torch.randn(shape, generator=generator).to(spec.torch_dtype))
            else:
                made.append(torch.randint(0, 2, shape, generator=generator).to(spec.torch_dtype))
        return tuple(made)


def output_specs(graph: fx.GraphModule, names: tuple[str, ...] = ()) -> tuple[TensorSpec, ...]:
    """The specs of the graph's outputs, read off its shape metadata."""
    (output,) = graph.graph.find_nodes(op="output")
    nodes = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
    if len(names) != len(nodes):
        names = tuple(f"output_{i}" for i in range(len(nodes))) if len(nodes) > 1 else ("output",)
    specs = []
    for name, node in zip(names, nodes, strict=True):
        assert isinstance(node, fx.Node)
        value = node.meta["val"]
        shape = tuple(None if size == graphs.BATCH and dim == 0 else int(size) for dim, size in enumerate(value.shape))
        specs.append(TensorSpec(name, shape, str(value.dtype).removeprefix("torch.")))
    return tuple(specs)
