"""Which operators of a model the converter lacks, found without it: each kind is decomposed once on fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.model import Model
from edgesmith.compiler.plain import plain
from edgesmith.targets.litert.operators import ALSO_DECOMPOSED, LOWERED, NOT_DECOMPOSED, REPLACED

_DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def unsupported(model: Model) -> tuple[Diagnostic, ...]:
    """One ERROR per operator of ``model`` that litert-torch cannot lower, with the path of the layer it came from."""
    missing: dict[Any, frozenset[str]] = {}
    found = []
    for node in graphs.operators(plain(model).graph):
        kind = (node.target, _pattern(node))
        if kind not in missing:
            missing[kind] = _missing(node)
        if missing[kind]:
            found.append(_refused(node, missing[kind]))
    return tuple(found)


def _refused(node: fx.Node, names: frozenset[str]) -> Diagnostic:
    parts = "" if names == {str(node.target)} else f" (it comes down to {', '.join(sorted(names))})"
    return Diagnostic(
        Severity.ERROR,
        "litert.unsupported-op",
        graphs.source(node),
        f"LiteRT's converter has no lowering for {node.target}{parts}",
        "replace this layer, or leave the target litert out",
    )


def _pattern(node: fx.Node) -> tuple[Any, ...]:
    """What may decide how an operator decomposes: the dtype and rank of its tensors, and its literals other than sizes."""
    leaves = pytree.tree_leaves((_values(node.args), _values(node.kwargs)))
    return tuple((v.dtype, v.dim()) if isinstance(v, torch.Tensor) else type(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in leaves)


def _values(arguments: Any) -> Any:
    return fx.map_arg(arguments, lambda n: n.meta["val"])


def _missing(node: fx.Node) -> frozenset[str]:
    if not isinstance(node.target, OpOverload) or _lowered(node.target):
        return frozenset()
    args, kwargs = _values(node.args), _values(node.kwargs)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    if not at:
        return frozenset({str(node.target)})
    target: Callable[..., Any] = _decompositions().get(node.target, node.target)

    def call(*tensors: torch.Tensor) -> Any:
        filled = list(leaves)
        for i, value in zip(at, tensors, strict=True):
            filled[i] = value
        positional, named = pytree.tree_unflatten(filled, spec)
        return target(*positional, **named)

    with torch.no_grad():
        parts = make_fx(call, decomposition_table=_decompositions(), _allow_non_fake_inputs=True)(*[leaves[i] for i in at])
    return frozenset(str(n.target) for n in graphs.operators(parts) if isinstance(n.target, OpOverload) and not _lowered(n.target))


def _lowered(target: OpOverload) -> bool:
    return str(target) in LOWERED or str(target) in REPLACED or str(target).startswith("aten.sym_")


@cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """The converter's table. What it adds for composite operators is left out: a trace below autograd takes those apart by itself."""
    table: dict[Any, Callable[..., Any]] = torch._decomp._core_aten_decompositions_post_autograd()
    table.update(torch._decomp.get_decompositions([_overload(name) for name in ALSO_DECOMPOSED]))
    for name in (*NOT_DECOMPOSED, *REPLACED):
        table.pop(_overload(name), None)
    return table


def _overload(name: str) -> OpOverload:
    _, packet, overload = name.split(".")
    operator: OpOverload = getattr(getattr(torch.ops.aten, packet), overload)
    return operator
