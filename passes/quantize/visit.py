"""Look at operators while samples run through a graph: what each reads and gives, one at a time, so that memory stays that of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

Look = Callable[[tuple[Any, ...], dict[str, Any], Any], None]
"""Called with what an operator was given, positional and by name, and with its result."""


class _Visitor(fx.Interpreter):
    """Runs a graph, shows chosen operators, and frees every tensor after its last reader."""

    def __init__(self, graph: fx.GraphModule, looks: Mapping[fx.Node, Look]) -> None:
        super().__init__(graph)
        self._looks = looks

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self._looks:
            self._looks[n](*self.fetch_args_kwargs_from_env(n), result)
        return result


def visit(graph: fx.GraphModule, looks: Mapping[fx.Node, Look], batches: Iterable[tuple[torch.Tensor, ...]], done: Callable[[int], None]) -> None:
    """Run ``batches`` through ``graph`` and call ``looks`` on its nodes; ``done`` is told the number of samples so far."""
    visitor = _Visitor(graph, looks)
    count = 0
    with torch.no_grad():
        for batch in batches:
            visitor.run(*batch)
            count += len(batch[0])
            done(count)
