"""How much each unit of each group matters: scores by name, larger is more important."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from torch import fx, nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.axes import Axes, Member, PruneGroup
from edgesmith.compiler.errors import UnsupportedError
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.passes.prune import torch_pruning
from edgesmith.passes.prune.obs import Scores, activation, by_readers, obs
from edgesmith.passes.train.forward import as_tensors, batch_size, flat, learnable, rows

_BATCH = 8


Importance = Callable[[Axes, Sequence[PruneGroup], PassContext, int], Scores]
"""A way to score units; it may look at so many training samples."""


def magnitude(power: int) -> Importance:
    """The sum of |w|^power over every parameter slice that goes with the unit (Li et al. 2017, section 3; over groups: Fang et al. 2023, section 3.3)."""

    def score(axes: Axes, groups: Sequence[PruneGroup], ctx: PassContext, samples: int) -> Scores:
        return {g.name: sum_over_units(g, parameters(axes.model.graph, g), lambda p: p.detach().double().abs() ** power) for g in groups}

    return score


def fisher(axes: Axes, groups: Sequence[PruneGroup], ctx: PassContext, samples: int) -> Scores:
    """The rise of the divergence to the model's own outputs, to second order, when the unit alone is switched off.

    A unit's switch scales what is read of it (where nothing reads it by weights, what makes it). With the gradient of the log-likelihood of an output
    drawn from the model itself, half the expected square of the switch's gradient is that rise; no label is looked at
    (Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", section 4.1). A single number is the mean of a normal distribution.
    """
    model = axes.model
    split = ctx.need_data("prune{importance=taylor}").train
    generator = torch.Generator().manual_seed(ctx.seed)
    order = np.random.default_rng(ctx.seed).permutation(len(split))[:samples]
    size = batch_size(model, min(_BATCH, len(split)))
    order = np.resize(order, -(-len(order) // size) * size) if not model.dynamic_batch else order
    graph = model.edit(tensors=True)
    graphs.set_training(graph, False)
    read = {g.name: _switched(parameters(graph, g)) for g in groups}
    for parameter in graph.parameters():
        parameter.requires_grad_(False)
    wanted = list({id(p): p for found in read.values() for _, p in found}.values())
    for parameter in wanted:
        parameter.requires_grad_(True)
    scores: Scores = {g.name: torch.zeros(g.size, dtype=torch.float64) for g in groups}
    for start in range(0, len(order), size):
        outputs = flat(graph(*as_tensors(split.batch(order[start : start + size]))))
        loss = _own_likelihood(model, outputs, generator)
        gradients = dict(zip(map(id, wanted), torch.autograd.grad(loss, wanted, allow_unused=True), strict=True))
        for group in groups:
            switch = sum_over_units(group, read[group.name], partial(_times_gradient, gradients))
            scores[group.name] += 0.5 * switch**2 / len(order)
    return scores


def _switched(found: list[tuple[Member, nn.Parameter]]) -> list[tuple[Member, nn.Parameter]]:
    for side in ("consumer", "producer"):
        chosen = [(m, p) for m, p in found if m.side == side]
        if chosen:
            return chosen
    return found


def _own_likelihood(model: Model, outputs: Sequence[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    """Minus the log-likelihood of outputs drawn from the model's own distribution."""
    positions = learnable(model)
    if not positions:
        raise UnsupportedError("importance=taylor finds no floating-point output to look at", hint="importance=l2 looks at weights only")
    total = torch.zeros(())
    for position in positions:
        logits = rows(outputs[position])
        if logits.shape[1] > 1:
            drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)
            total = total - logits.log_softmax(1).gather(1, drawn).sum()
        else:
            total = total + (logits * torch.randn(logits.shape, generator=generator)).sum()
    return total


def _times_gradient(gradients: Mapping[int, torch.Tensor | None], parameter: nn.Parameter) -> torch.Tensor:
    gradient = gradients[id(parameter)]
    return torch.zeros_like(parameter) if gradient is None else parameter.detach() * gradient


def parameters(graph: fx.GraphModule, group: PruneGroup) -> list[tuple[Member, nn.Parameter]]:
    """The members that are parameters, with those of ``graph``."""
    found = ((member, graphs.tensor(graph, member.name)) for member in group.members)
    return [(member, value) for member, value in found if isinstance(value, nn.Parameter)]


def sum_over_units(group: PruneGroup, found: list[tuple[Member, nn.Parameter]], of: Callable[[nn.Parameter], torch.Tensor]) -> torch.Tensor:
    """The sum of ``of(parameter)`` over the slices of each unit: float64 [size]."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for member, parameter in found:
        value = of(parameter)
        others = [d for d in range(value.dim()) if d != member.dim]
        per_index = (value.sum(others) if others else value).double()
        for labels in torch.from_numpy(member.labels):
            here = labels >= 0
            total.index_add_(0, labels[here], per_index[here])
    return total


IMPORTANCES: Mapping[str, Importance] = MappingProxyType(
    {
        "obs": by_readers("obs", obs),
        "activation": by_readers("activation", activation),
        "taylor": fisher,
        "l2": magnitude(2),
        "l1": magnitude(1),
        **{name: torch_pruning.scorer(name) for name in torch_pruning.NAMES},
    }
)
"""The importances that an option may name."""
