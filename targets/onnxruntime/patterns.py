"""Forms that ONNX Runtime's optimiser does not recognise, brought into equal ones that it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir


def recognisable(model: ir.Model) -> None:
    """Rewrite ``model`` in place."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    for node in list(model.graph):
        if node.op_type == "ReduceMean":
            _global_pool(model.graph, node)
    RemoveUnusedNodesPass()(model)


def _global_pool(graph: ir.Graph, node: ir.Node) -> None:
    """The mean over all spatial dimensions -> ``GlobalAveragePool``, which has blocked and integer kernels."""
    import onnx_ir as ir

    x, axes = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    if x is None or x.shape is None or axes is None or axes.const_value is None or x.dtype != ir.DataType.FLOAT:
        return
    rank = len(x.shape)
    if rank < 4 or sorted(int(a) % rank for a in axes.const_value.numpy()) != list(range(2, rank)):
        return
    pool = ir.node("GlobalAveragePool", [x], metadata_props=dict(node.metadata_props))
    graph.insert_before(node, pool)
    result = pool.outputs[0]
    pool.outputs[0].type = x.type
    if node.attributes.get_int("keepdims", 1) == 0:
        shape = ir.Value(name=f"edgesmith.spatial.{node.name}", const_value=ir.tensor(np.array(range(2, rank), np.int64)))
        graph.register_initializer(shape)
        squeeze = ir.node("Squeeze", [result, shape], metadata_props=dict(node.metadata_props))
        graph.insert_before(node, squeeze)
        result = squeeze.outputs[0]
    ir.convenience.replace_all_uses_with(node.outputs[0], result, replace_graph_outputs=True)
