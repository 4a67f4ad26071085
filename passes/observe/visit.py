"""Look at operators while samples run through a graph: what each reads and gives, one at a time, so that memory stays that of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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


def visit(graph: fx.GraphModule, looks: Mapping[fx.Node, Look], batches: Iterable[tuple[torch.Tensor, ...]]) -> None:
    """Run ``batches`` through ``graph`` and call ``looks`` on its nodes."""
    visitor = _Visitor(graph, looks)
    with torch.no_grad():
        for batch in batches:
            visitor.run(*batch)


def merged(looks: Iterable[tuple[fx.Node, Look]]) -> dict[fx.Node, Look]:
    """One look for each node, of all that there are."""
    found: dict[fx.Node, list[Look]] = {}
    for node, look in looks:
        found.setdefault(node, []).append(look)
    return {node: _all(several) for node, several in found.items()}


def _all(looks: Sequence[Look]) -> Look:
    def look(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        for one in looks:
            one(args, kwargs, result)

    return look
