"""The forms of one quantized model: its float file, and what the alternatives of its plan make of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.cost import products
from edgesmith.compiler.errors import UnsupportedError
from edgesmith.compiler.model import Model
from edgesmith.compiler.quantplan import QuantPlan, Scheme
from edgesmith.compiler.weighted import weighted

FLOAT = "float"
WIDE = Scheme.STATIC16X8.value
LEAST_SHARE = 0.1
"""A form is tried if it computes this share of the products otherwise than every form before it."""


def forms(model: Model, twin: Model) -> dict[str, Model]:
    """``twin`` (``model`` before quantization) as FLOAT, and ``model`` by those of its plan's alternatives that differ enough to be worth a file."""
    plan = model.quant
    assert plan is not None
    work = {node.name: count for node, count in products(model.graph).items()}
    least = LEAST_SHARE * sum(work.values())
    tried: dict[str, QuantPlan] = {FLOAT: QuantPlan()}
    for name in plan.alternatives:
        other = plan.by(name)
        if all(sum(count for node, count in work.items() if other.scheme(node) is not known.scheme(node)) >= least for known in tried.values()):
            tried[name] = other
    return {name: twin if name == FLOAT else form(model, twin, chosen.ops) for name, chosen in tried.items()}


def to_int16(ops: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """``ops`` with int16 activations where those are static."""
    return {name: Scheme.STATIC16X8 if scheme is Scheme.STATIC else scheme for name, scheme in ops.items()}


def wide(model: Model, twin: Model) -> Model:
    """``model`` by that of its plan's alternatives with the most static operators, with int16 activations.

    Raises:
        UnsupportedError: none has any.
    """
    plan = model.quant
    assert plan is not None
    ops = max(plan.alternatives.values(), key=lambda ops: sum(scheme is Scheme.STATIC for scheme in ops.values()))
    if Scheme.STATIC not in ops.values():
        raise UnsupportedError("no operator of the plan is static int8")
    return form(model, twin, to_int16(ops))


def form(model: Model, twin: Model, ops: Mapping[str, Scheme]) -> Model:
    """``model`` with the schemes ``ops``. What then computes in float has the weights and biases of ``twin``, which were not rounded."""
    assert model.quant is not None
    graph, rounded, floats = model.edit(), set[int](), set[str]()
    for node in graphs.operators(model.graph):
        kind = weighted(node)
        if kind is None:
            continue
        read = [a for a in (kind.argument(node, kind.weight), kind.argument(node, kind.bias)) if a is not None and a.op == "get_attr"]
        if node.name in ops:
            rounded |= {id(graphs.tensor(model.graph, str(a.target))) for a in read}
        else:
            floats |= {str(a.target) for a in read}
    for name in sorted(floats):
        if id(graphs.tensor(model.graph, name)) not in rounded:
            graphs.add_tensor(graph, name, graphs.tensor(twin.graph, name))
    return replace(model, graph=graph, quant=replace(model.quant, ops=ops, alternatives={}))


def schemes(model: Model) -> dict[str, Scheme]:
    """Source path -> scheme of the operators of ``model`` that multiply by a weight."""
    plan = model.quant or QuantPlan()
    return {graphs.source(node): plan.scheme(node.name) for node in graphs.operators(model.graph) if weighted(node) is not None}
