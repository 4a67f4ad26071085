"""The importances of the torch-pruning library, by name: a group's members are shown to them as one of its own groups.

``importance="torch_pruning:GroupTaylorImportance"``; the extra ``torch-pruning`` brings the library (Fang et al., DepGraph, CVPR 2023).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.axes import Axes, Member, PruneGroup
from edgesmith.compiler.errors import MissingExtraError, UnsupportedError
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.weighted import CONVOLUTIONS, LINEARS, Weighted, weighted
from edgesmith.passes.observe.batches import calibration_batches
from edgesmith.passes.prune.obs import Scores
from edgesmith.passes.train.forward import flat, learnable, rows

PREFIX = "torch_pruning:"
EXTRA = "torch-pruning"
BY_WEIGHTS = ("BNScaleImportance", "FPGMImportance", "GroupMagnitudeImportance", "LAMPImportance", "MagnitudeImportance", "RandomImportance")
BY_GRADIENTS = ("GroupTaylorImportance", "TaylorImportance")
BY_SQUARES = ("GroupHessianImportance", "HessianImportance")
"""They read the mean square of the gradients of single samples where the others read the gradient."""
NAMES = tuple(PREFIX + name for name in sorted((*BY_WEIGHTS, *BY_GRADIENTS, *BY_SQUARES)))
"""Those that look at weights and gradients alone; the others (activations, EigenDamage) watch the library's own run of a module."""

aten = torch.ops.aten
KINDS: Mapping[object, tuple[type[nn.Module], str]] = MappingProxyType(
    {
        aten.conv1d.default: (nn.Conv1d, "conv"),
        aten.conv1d.padding: (nn.Conv1d, "conv"),
        aten.conv2d.default: (nn.Conv2d, "conv"),
        aten.conv2d.padding: (nn.Conv2d, "conv"),
        aten.conv3d.default: (nn.Conv3d, "conv"),
        aten.conv_transpose2d.input: (nn.ConvTranspose2d, "conv"),
        aten.linear.default: (nn.Linear, "linear"),
    }
)
Gradients = Mapping[int, torch.Tensor]


def scorer(name: str) -> Callable[[Axes, Sequence[PruneGroup], PassContext, int], Scores]:
    """The importance ``name``, one of ``NAMES``."""

    def score(axes: Axes, groups: Sequence[PruneGroup], ctx: PassContext, samples: int) -> Scores:
        try:
            library = importlib.import_module("torch_pruning")
        except ImportError as error:
            raise MissingExtraError("torch_pruning", EXTRA) from error
        plain = name.removeprefix(PREFIX)
        graph = axes.model.edit(tensors=True)
        gradients = _gradients(axes, graph, ctx, samples, plain in BY_SQUARES) if plain in (*BY_GRADIENTS, *BY_SQUARES) else {}
        layers = _Layers(graph, gradients, library)
        importance = getattr(library.importance, plain)()
        scores: Scores = {}
        for group in groups:
            found = importance(layers.group(group))
            if found is None:
                raise UnsupportedError(
                    f"importance={name} cannot score {group.name}",
                    where=group.name,
                    why="it knows none of the layers that the units go through",
                    hint="exclude it, or use importance=taylor",
                )
            scores[group.name] = found.detach().double()[: group.size]
        return scores

    return score


@dataclass
class _Layers:
    """Modules of the library's kinds that share the graph's parameters, one for each operator."""

    graph: fx.GraphModule
    gradients: Gradients
    library: Any

    def __post_init__(self) -> None:
        self._readers: dict[str, fx.Node] = {}
        for node in self.graph.graph.find_nodes(op="get_attr"):
            for user in node.users:
                self._readers.setdefault(str(node.target), user)
        self._made: dict[fx.Node, nn.Module] = {}

    def group(self, group: PruneGroup) -> Any:
        """``group`` as one of the library's: each layer that its units go through, with the indices of all of them."""
        from torch_pruning._helpers import GroupItem
        from torch_pruning.dependency import Dependency, Group
        from torch_pruning.dependency.node import Node

        made = Group()
        for member, function in self._functions(group):
            module = self._module(self._readers[member.name])
            node = Node(module, None, member.name)
            labels = member.labels.max(axis=0)
            indices = np.flatnonzero(labels >= 0)
            item = GroupItem(dep=Dependency(function, function, node, node), idxs=indices.tolist())
            item.root_idxs = labels[indices].tolist()
            made.items.append(item)
        return made

    def _functions(self, group: PruneGroup) -> Iterator[tuple[Member, Any]]:
        functions = self.library.pruner.function
        for member in group.members:
            node = self._readers.get(member.name)
            if node is None or ((member.labels >= 0).sum(axis=0) > 1).any():
                continue
            kind = weighted(node)
            if kind is not None and node.target in KINDS and self._weight(node, kind) == member.name and member.dim < 2:
                what = KINDS[node.target][1]
                depthwise = what == "conv" and self._tensor(node, kind.weight).shape[1 - kind.axis] == 1
                side = "out" if member.dim == kind.axis else "in"
                if not (depthwise and side == "in"):
                    yield member, getattr(functions, f"prune_{'depthwise_' if depthwise else ''}{what}_{side}_channels")
            elif node.target is aten.batch_norm.default and self._argument(node, 1) == member.name:
                yield member, functions.prune_batchnorm_out_channels
            elif node.target is aten.layer_norm.default and self._argument(node, 2) == member.name:
                yield member, functions.prune_layernorm_out_channels

    def _weight(self, node: fx.Node, kind: Weighted) -> str | None:
        return self._argument(node, kind.weight)

    def _argument(self, node: fx.Node, place: int) -> str | None:
        found = node.args[place] if place < len(node.args) else None
        return str(found.target) if isinstance(found, fx.Node) and found.op == "get_attr" else None

    def _tensor(self, node: fx.Node, place: int | None) -> torch.Tensor:
        name = None if place is None else self._argument(node, place)
        assert name is not None
        return graphs.tensor(self.graph, name)

    def _module(self, node: fx.Node) -> nn.Module:
        if node not in self._made:
            self._made[node] = self._new(node)
        return self._made[node]

    def _new(self, node: fx.Node) -> nn.Module:
        module: Any
        if node.target is aten.batch_norm.default:
            weight, bias = self._tensor(node, 1), self._argument(node, 2)
            module = nn.BatchNorm2d(len(weight), device="meta")
        elif node.target is aten.layer_norm.default:
            weight, bias = self._tensor(node, 2), self._argument(node, 3)
            module = nn.LayerNorm(weight.shape, device="meta")
        else:
            kind = weighted(node)
            assert kind is not None
            weight, bias = self._tensor(node, kind.weight), None if kind.bias is None else self._argument(node, kind.bias)
            make, _ = KINDS[node.target]
            if node.target in LINEARS:
                module = make(weight.shape[1], weight.shape[0], device="meta")
            else:
                assert node.target in CONVOLUTIONS
                given = node.args[kind.activation]
                assert isinstance(given, fx.Node)
                channels, made = int(given.meta["val"].shape[1]), int(node.meta["val"].shape[1])
                groups = channels // int(weight.shape[0 if kind.transposed else 1]) if not kind.transposed else made // int(weight.shape[1])
                module = make(channels, made, tuple(weight.shape[2:]), groups=groups, device="meta")
        module.weight = self._parameter(weight)
        module.bias = None if bias is None else self._parameter(graphs.tensor(self.graph, bias))
        return module  # type: ignore[no-any-return]

    def _parameter(self, value: torch.Tensor) -> nn.Parameter:
        made = nn.Parameter(value.detach())
        made.grad = self.gradients.get(id(value))
        return made


def _gradients(axes: Axes, graph: fx.GraphModule, ctx: PassContext, samples: int, squared: bool) -> Gradients:
    """Of the cross entropy to the model's own most likely outputs, by the parameter's id, or those of single samples, squared; no label is looked at.

    Raises:
        UnsupportedError: there is no data, or no output that has a most likely value, or samples cannot be taken one by one.
    """
    model = axes.model
    if squared and not model.dynamic_batch and model.inputs[0].shape[:1] != (1,):
        why = "they are those of single samples, and the model was captured for batches of one size"
        raise UnsupportedError("squares of gradients cannot be taken", why=why, hint="importance=torch_pruning:GroupTaylorImportance needs whole batches only")
    split = ctx.need_data("a torch-pruning importance that looks at gradients").train
    positions = learnable(model)
    if not positions:
        raise UnsupportedError("there are no gradients to look at", why="the model has no floating-point output", hint="importance=l2 looks at weights only")
    graphs.set_training(graph, False)
    parameters = list(graph.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    batches = calibration_batches(model, split, samples, ctx.seed)
    for batch in _singly(batches) if squared else batches:
        outputs = flat(graph(*batch))
        logits = [rows(outputs[position]) for position in positions]
        loss = sum((nn.functional.cross_entropy(one, one.detach().argmax(1)) for one in logits), start=torch.zeros(()))
        for sum_, gradient in zip(total, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if gradient is not None:
                sum_ += gradient.square() / samples if squared else gradient
    return {id(p): gradient for p, gradient in zip(parameters, total, strict=True)}


def _singly(batches: Iterable[Sequence[torch.Tensor]]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Their samples one by one."""
    for batch in batches:
        yield from zip(*(x.split(1) for x in batch), strict=True)
