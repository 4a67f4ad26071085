"""Choices by value (the largest, an order): between equals, two graphs that agree may choose differently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_WITH_VALUES = {aten.topk.default, aten.sort.default, aten.sort.stable, aten.max.dim, aten.min.dim}
CHOICES = _WITH_VALUES | {aten.argsort.default, aten.argsort.stable, aten.argmax.default, aten.argmin.default}


class SameChoices(fx.Interpreter):
    """Runs a graph, and between values that differ by no more than ``tolerance`` (relative to the largest) chooses as another graph did.

    ``choices``: node name -> what the operator gave in the other graph.
    """

    def __init__(self, graph: fx.GraphModule, choices: Mapping[str, Any], tolerance: float) -> None:
        super().__init__(graph)
        self._choices = choices
        self._tolerance = tolerance

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node."""
        value = super().run_node(n)
        if n.target not in CHOICES or n.name not in self._choices:
            return value
        theirs, with_values = self._choices[n.name], n.target in _WITH_VALUES
        indices, other = (value[1], theirs[1]) if with_values else (value, theirs)
        if indices.shape != other.shape or not indices.numel():
            return value
        x = self.fetch_args_kwargs_from_env(n)[0][0]
        given = {a.name: a.default_value for a in n.target._schema.arguments}
        given |= dict(zip(given, n.args, strict=False)) | n.kwargs
        dim: Any = given["dim"]
        if dim is None:
            x, dim, indices, other = x.flatten(), 0, indices.reshape(1), other.reshape(1)
        elif indices.dim() < x.dim():
            indices, other = indices.unsqueeze(dim), other.unsqueeze(dim)
        if int(other.max()) >= x.shape[dim]:
            return value  # numbers of units some of which are gone: nobody reads them
        mine, chosen = x.gather(dim, indices), x.gather(dim, other)
        largest = float(x[x.isfinite()].abs().max()) if bool(x.isfinite().any()) else 0.0
        if not torch.isclose(mine.double(), chosen.double(), rtol=0.0, atol=self._tolerance * largest, equal_nan=True).all():
            return value
        return (chosen.reshape(value[0].shape), theirs[1]) if with_values else theirs
