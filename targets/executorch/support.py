"""What ExecuTorch runs, answered without ExecuTorch.

Each operator of the graph is replayed on its fake tensors through torch's own decomposition table, as the exporter would
decompose it, and what comes out is looked up in ``kernels.json``: the functional operators whose out-variants the runtime
registers. ``live_kernels`` makes that list from an installed ExecuTorch; a test compares the two.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.diagnostics import Diagnostic, Severity
from edgesmith.compiler.model import Model
from edgesmith.compiler.plain import plain

_KERNELS = Path(__file__).with_name("kernels.json")


def unsupported(model: Model) -> tuple[Diagnostic, ...]:
    """One ERROR per operator (and source path) that decomposes into something without a kernel, or that refuses to decompose."""
    found = []
    verdicts: dict[str, tuple[str, ...]] = {}
    for node in graphs.operators(plain(model).graph):
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        key = _signature(node)
        if key not in verdicts:
            verdicts[key] = _missing(node)
        if verdicts[key]:
            message = f"{node.target} needs {', '.join(verdicts[key])}, for which the runtime has no kernel"
            found.append(Diagnostic(Severity.ERROR, "executorch.unsupported-op", graphs.source(node), message))
    return tuple(dict.fromkeys(found))


def _signature(node: fx.Node) -> str:
    """Equal for nodes that decompose alike: the same operator and literals on tensors of the same rank and dtype."""
    described = fx.map_arg((node.args, node.kwargs), lambda n: _rank_and_dtype(n.meta["val"]))
    return f"{node.target}{described}"


def _rank_and_dtype(value: Any) -> Any:
    return f"{value.dtype}:{value.dim()}" if isinstance(value, torch.Tensor) else str(type(value))


def _missing(node: fx.Node) -> tuple[str, ...]:
    assert isinstance(node.target, torch._ops.OpOverload)
    if node.target.name() in kernels():
        return ()
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    values = [v for v in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(v, torch._subclasses.FakeTensor)]
    recorder = _Decompose()
    mode = values[0].fake_mode if values else torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with torch.no_grad(), mode, recorder:
            node.target(*args, **kwargs)
    except (RuntimeError, NotImplementedError) as error:
        return (f"{node.target.name()} ({str(error).splitlines()[0]})",)
    return tuple(sorted(recorder.missing))


class _Decompose(TorchDispatchMode):
    """Runs operators through the decomposition table and notes those that end without a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.missing: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _functional(func.name()) in kernels() or func.name() in _VANISHING:
            return func(*args, **(kwargs or {}))
        with self:
            result = _table().get(func, func.decompose)(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        self.missing.add(func.name())
        return func(*args, **(kwargs or {}))


def _functional(name: str) -> str:
    """The name of the operator that the exporter makes of one that changes its argument in place; other names as they are."""
    base, dot, overload = name.partition(".")
    return f"{base.removesuffix('_')}{dot}{overload}"


_VANISHING = frozenset({"aten::detach", "aten::lift_fresh", "aten::empty_strided", "prim::device"})
"""Operators that the exporter drops or folds."""


@functools.cache
def _table() -> dict[Any, Callable[..., Any]]:
    """The exporter's table, less its composite operators: those know their own decomposition, and listing them takes a fifth of a second."""
    table: dict[Any, Callable[..., Any]] = torch._decomp._core_aten_decompositions_post_autograd()
    return table


@functools.cache
def kernels() -> frozenset[str]:
    """Functional ATen operators that the runtime has kernels for; a view counts through its copying twin."""
    return frozenset(json.loads(_KERNELS.read_text())["operators"])


def live_kernels() -> frozenset[str]:
    """The same from the installed ExecuTorch: operators whose out-variant is registered in the runtime."""
    from executorch.extension.pybindings import portable_lib

    registered = set(portable_lib._get_operator_names())
    found = {o.name() for o in _functional_overloads() if _out_variant(o) in registered}
    views = {o.name() for o in _functional_overloads() if _copying_twin(o.name()) in found}
    return frozenset(found | views)


_TAKEN_FROM_OUT = frozenset({"device", "dtype", "layout", "pin_memory"})
"""Arguments that an overload lacks which writes into a given tensor."""


def _out_variant(overload: torch._ops.OpOverload) -> str:
    """The name of the overload with the same arguments that writes into given tensors; nothing where there is none."""
    wanted = [(a.name, str(a.type)) for a in overload._schema.arguments if a.name not in _TAKEN_FROM_OUT]
    packet = overload.overloadpacket
    for other in (getattr(packet, name) for name in packet.overloads()):
        arguments = other._schema.arguments
        if any(a.is_out for a in arguments) and [(a.name, str(a.type)) for a in arguments if not a.is_out and a.name not in _TAKEN_FROM_OUT] == wanted:
            return str(other.name())
    return ""


def _copying_twin(name: str) -> str:
    base, dot, overload = name.partition(".")
    return f"{base}_copy{dot}{overload}"


def _functional_overloads() -> list[torch._ops.OpOverload]:
    names = sorted({s.name.removeprefix("aten::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("aten::")})
    packets = [getattr(torch.ops.aten, name) for name in names if hasattr(torch.ops.aten, name)]
    overloads = [getattr(packet, name) for packet in packets for name in packet.overloads()]
    return [o for o in overloads if not o._schema.is_mutable]
