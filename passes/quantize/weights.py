"""Put weights on their int8 grid, once for all targets."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.errors import DataError
from edgesmith.compiler.quantplan import TensorRange, WeightGrid
from edgesmith.kernels.affine import WEIGHT_SCALE_BITS, Grid, fake_quantize, weight_grid
from edgesmith.kernels.rounding import short
from edgesmith.passes.quantize.schemes import Candidates

LARGEST_BIAS_STEPS = 2.0**30
"""Runtimes add round(bias / (input scale x weight scale)) in int32: half of its extent is the bias's, half the products'."""


def refuse_not_finite(graph: fx.GraphModule, quantized: Candidates) -> None:
    """See that the weights of ``quantized`` are numbers.

    Raises:
        DataError: one is not finite; the message names the layer.
    """
    for node, kind in quantized.items():
        attribute = kind.argument(node, kind.weight)
        assert attribute is not None
        if not bool(torch.isfinite(graphs.tensor(graph, str(attribute.target))).all()):
            raise DataError("a weight is NaN or infinite", where=graphs.source(node))


def put_on_grid(graph: fx.GraphModule, quantized: Candidates) -> dict[str, WeightGrid]:
    """Replace the weight of each of ``quantized`` in ``graph`` by its nearest grid values; tied weights stay tied."""
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
            done[id(old)] = _gridded(old, kind.axis)
        new, grids[name] = done[id(old)]
        graphs.add_tensor(graph, name, new)
    return grids


def _gridded(weight: torch.Tensor, axis: int) -> tuple[torch.Tensor, WeightGrid]:
    values = weight.detach().numpy()
    grid = weight_grid(values, axis)
    new = torch.from_numpy(fake_quantize(values, grid))
    plan = WeightGrid(tuple(grid.scale.tolist()), axis)
    return like(weight, new), plan


def like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """``new``, a Parameter if ``old`` is one."""
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def widened(graph: fx.GraphModule, quantized: Candidates, grids: Mapping[str, WeightGrid], ranges: Mapping[str, TensorRange]) -> dict[str, WeightGrid]:
    """Coarser grids for channels whose bias would overflow int32 in a static operator; their weights in ``graph`` are rounded again.

    It happens to channels whose weights all but vanished (1e-13 beside a bias of 1, left by a batch norm after training with weight decay).
    What a product of theirs adds is changed by at most 255 x 2^-31 of the bias.
    """
    least = _least_scales(graph, quantized, ranges)
    coarser: dict[str, WeightGrid] = {}
    done: dict[int, torch.Tensor] = {}
    for name, grid in grids.items():
        old = graphs.tensor(graph, name)
        scales = np.maximum(np.asarray(grid.scales), short(least.get(id(old), 0.0), WEIGHT_SCALE_BITS, up=True))
        if (scales == np.asarray(grid.scales)).all():
            continue
        coarse = Grid(scales, np.zeros(scales.shape, np.int64), -127, 127, grid.axis)
        if id(old) not in done:
            done[id(old)] = like(old, torch.from_numpy(fake_quantize(old.detach().numpy(), coarse)))
        graphs.add_tensor(graph, name, done[id(old)])
        coarser[name] = WeightGrid(tuple(scales.tolist()), grid.axis)
    return coarser


def _least_scales(graph: fx.GraphModule, quantized: Candidates, ranges: Mapping[str, TensorRange]) -> dict[int, npt.NDArray[np.float64]]:
    """Per weight tensor and channel: the scale at which its greatest bias takes ``LARGEST_BIAS_STEPS``."""
    least: dict[int, npt.NDArray[np.float64]] = {}
    for node, kind in quantized.items():
        weight, activation, bias = (kind.argument(node, position) for position in (kind.weight, kind.activation, kind.bias))
        assert weight is not None and activation is not None
        if bias is None or bias.op != "get_attr" or node.name not in ranges:
            continue
        tensor = graphs.tensor(graph, str(weight.target))
        magnitude = graphs.tensor(graph, str(bias.target)).detach().double().abs().numpy().reshape(-1, tensor.shape[kind.axis]).max(axis=0)
        scale = magnitude / (ranges[activation.name].scale * LARGEST_BIAS_STEPS)
        least[id(tensor)] = np.maximum(least.get(id(tensor), 0.0), scale)
    return least
