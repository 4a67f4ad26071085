"""Put weights on their int8 grid, once for all targets."""

from __future__ import annotations

import numpy as np
import torch
from torch import fx, nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.errors import DataError
from edgesmith.compiler.quantplan import WeightGrid
from edgesmith.kernels.affine import fake_quantize, weight_grid
from edgesmith.passes.quantize.schemes import Candidates


def put_on_grid(graph: fx.GraphModule, quantized: Candidates) -> dict[str, WeightGrid]:
    """Replace the weight of each of ``quantized`` in ``graph`` by its nearest grid values; tied weights stay tied.

    Raises:
        DataError: a weight is not finite.
    """
    grids: dict[str, WeightGrid] = {}
    done: dict[int, tuple[torch.Tensor, WeightGrid]] = {}
    for node, kind in quantized.items():
        attribute = kind.argument(node, kind.weight)
        assert attribute is not None
        name = str(attribute.target)
        if name in grids:
            continue
        old = graphs.tensor(graph, name)
        if id(old) not in done:
            done[id(old)] = _gridded(old, kind.axis, graphs.source(node))
        new, grids[name] = done[id(old)]
        graphs.add_tensor(graph, name, new)
    return grids


def _gridded(weight: torch.Tensor, axis: int, where: str) -> tuple[torch.Tensor, WeightGrid]:
    values = weight.detach().numpy()
    if not np.isfinite(values).all():
        raise DataError("a weight is NaN or infinite", where=where)
    grid = weight_grid(values, axis)
    new = torch.from_numpy(fake_quantize(values, grid))
    plan = WeightGrid(tuple(grid.scale.tolist()), axis)
    return (nn.Parameter(new, requires_grad=weight.requires_grad) if isinstance(weight, nn.Parameter) else new), plan
