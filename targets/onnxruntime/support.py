"""What the ONNX exporter converts, and why not: answered from a table, without importing the exporter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.model import Model

CODE = "onnxruntime.unsupported-op"

_TABLE = Path(__file__).with_name("operators.json")


@cache
def converted() -> dict[str, frozenset[str]]:
    """``real`` and ``complex``: the ATen overloads that the exporter converts for tensors of that kind.

    Generated from the exporter's own registry at the opset used here; a test compares the two.
    """
    table: dict[str, list[str]] = json.loads(_TABLE.read_text(encoding="utf-8"))
    return {kind: frozenset(names) for kind, names in table.items()}


def refusals(model: Model) -> tuple[Diagnostic, ...]:
    """One ERROR for each operator of ``model`` that neither converts nor decomposes into operators that do."""
    return tuple(_refusal(node, reason) for node in graphs.operators(model.graph) if (reason := _why_not(node)))


def _refusal(node: fx.Node, reason: str) -> Diagnostic:
    hint = "replace the layer by one that ONNX has, or drop this target"
    return Diagnostic(Severity.ERROR, CODE, graphs.source(node), f"{node.target} has no ONNX form: {reason}", hint)


def _why_not(node: fx.Node) -> str:
    """The reason why ``node`` does not convert, or nothing."""
    if not any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(node.meta.get("val"))):
        return ""  # arithmetic on sizes: plain integers once the batch is fixed
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return "" if getattr(target, "__module__", "") == "_operator" else "the exporter does not know it"
    for dtype in {t.dtype for t in _tensors(node)}:
        if target.name().startswith(_WITHOUT_KERNEL.get(dtype, ())):
            return f"ONNX Runtime has no CPU kernel for {dtype}"
    return "" if target.name() in _known(node) else _decomposition_gap(node, target)


_EVERY = ("",)
_WITHOUT_KERNEL: Mapping[torch.dtype, tuple[str, ...]] = MappingProxyType(
    {
        torch.bfloat16: _EVERY,
        torch.float8_e4m3fn: _EVERY,
        torch.float8_e5m2: _EVERY,
        torch.float64: tuple(f"aten::{name}" for name in ("conv", "erf", "gelu", "avg_pool", "group_norm", "instance_norm", "upsample", "grid_sampler")),
    }
)
"""Which operators (by the start of their names) ONNX Runtime 1.31 cannot run on tensors of a dtype, although they convert."""


def _tensors(node: fx.Node) -> Iterator[torch.Tensor]:
    values = [node.meta["val"], *(n.meta.get("val") for n in node.all_input_nodes)]
    return (v for v in pytree.tree_leaves(values) if isinstance(v, torch.Tensor))


def _known(node: fx.Node) -> frozenset[str]:
    complex_inputs = any(n.meta["val"].is_complex() for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor))
    return converted()["complex" if complex_inputs else "real"]


@cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Those that the exporter applies: torch's, except for operators that it converts whole."""
    known = converted()["real"]
    table = {**torch._decomp.decomposition_table, **torch.export.default_decompositions()}
    return {op: rule for op, rule in table.items() if isinstance(op, torch._ops.OpOverload) and op.name() not in known}


def _decomposition_gap(node: fx.Node, target: torch._ops.OpOverload) -> str:
    """Decompose the one operator on fake tensors and name what is left that does not convert."""
    composite = target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    if target not in _decompositions() and not composite:
        return "the exporter has neither a conversion nor a decomposition"
    try:
        traced = _traced(node, target)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        return f"its decomposition fails ({str(error).splitlines()[0]})" if str(error) else "its decomposition fails"
    left = sorted({str(n.target) for n in graphs.operators(traced) if isinstance(n.target, torch._ops.OpOverload) and _functional(n.target) not in _known(n)})
    return f"it decomposes into {', '.join(left)}, which the exporter does not convert" if left else ""


def _functional(target: torch._ops.OpOverload) -> str:
    """The name of ``target``, or of its functional twin if it writes in place: export makes decompositions functional."""
    base, dot, overload = target.name().partition(".")
    return f"{base.removesuffix('_') if target._schema.is_mutable else base}{dot}{overload}"


def _traced(node: fx.Node, target: torch._ops.OpOverload) -> fx.GraphModule:
    leaves, structure = pytree.tree_flatten((node.args, node.kwargs))
    values = [leaf.meta["val"] if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
    places = [i for i, value in enumerate(values) if isinstance(value, torch.Tensor)]
    mode = next((values[i].fake_mode for i in places if isinstance(values[i], FakeTensor)), None) or FakeTensorMode()

    def call(*tensors: torch.Tensor) -> Any:
        filled = list(values)
        for place, value in zip(places, tensors, strict=True):
            filled[place] = value
        args, kwargs = pytree.tree_unflatten(filled, structure)
        return target(*args, **kwargs)

    with mode, torch.no_grad():
        fresh = [torch.empty(values[i].shape, dtype=values[i].dtype) for i in places]
    return make_fx(call, decomposition_table=_decompositions(), tracing_mode="fake", _allow_non_fake_inputs=True)(*fresh)
