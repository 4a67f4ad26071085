"""Watch tensors while calibration samples run, with bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.errors import DataError
from edgesmith.kernels.ranges import Histogram
from edgesmith.passes.observe.visit import Look, visit

JUDGED_BATCHES = 1
"""So many suffice to tell which of several roundings changes an operator's results least."""


def not_finite(node: fx.Node) -> DataError:
    """What to raise where ``node`` gives something that no grid can hold."""
    return DataError("a calibration sample gives NaN or infinity", where=graphs.source(node), hint="check the data and the weights")


def histograms(graph: fx.GraphModule, watched: Sequence[fx.Node], batches: Iterable[tuple[torch.Tensor, ...]]) -> dict[fx.Node, Histogram]:
    """A histogram of the values of each of ``watched`` over all ``batches``.

    Raises:
        DataError: a value is not finite; the message names the layer.
    """
    found = {node: Histogram() for node in watched}

    def counted(node: fx.Node) -> Look:
        def look(args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> None:
            try:
                found[node].update(result.numpy())
            except ValueError as error:
                raise not_finite(node) from error

        return look

    visit(graph, {node: counted(node) for node in watched}, batches)
    return found
