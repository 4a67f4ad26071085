"""Removal: tensors are sliced and literals recomputed, both from the axes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.axes.analysis import Axes
from edgesmith.compiler.axes.axes import Axis, Term, resolve
from edgesmith.compiler.errors import DefectError, UserError
from edgesmith.compiler.model import Model

Keep = npt.NDArray[np.bool_]


def remove(model: Model, removals: Mapping[str, Iterable[int]], *, axes: Axes | None = None) -> Model:
    """``model`` without the given units: group name -> unit numbers (duplicates count once), several groups at once.

    Parameters, buffers and constants are sliced (tied tensors once, under each of their names); view and split sizes,
    group counts, normalised shapes and slice bounds follow. An attention's scale stays what it was. With nothing to remove the result is ``model``.
    ``axes`` is the analysis of this very model, where it is at hand.

    Raises:
        UserError: an unknown group, a unit that is not there, or a group that would be emptied.
    """
    axes = axes or Axes.of(model)
    keep = {axes.group(name).axis: kept for name, units in removals.items() if not (kept := _kept(axes, name, units)).all()}
    if not keep:
        return model
    graph = model.edit()
    _slice_tensors(graph, axes, keep)
    _recompute_literals(graph, axes, keep)
    graph.recompile()
    try:
        return model.with_graph(graph)
    except (RuntimeError, ValueError, IndexError) as error:
        raise DefectError("the graph does not fit together after a removal", where=", ".join(removals), why=str(error).splitlines()[0]) from error


def _kept(axes: Axes, name: str, units: Iterable[int]) -> Keep:
    group = axes.group(name)
    kept = np.ones(group.size, dtype=np.bool_)
    for unit in units:
        if not 0 <= unit < group.size:
            raise UserError(f"prune group {name!r} has no unit {unit}", why=f"it has {group.size}, counted from 0")
        kept[unit] = False
    if not kept.any():
        raise UserError(f"prune group {name!r} would be empty", why=f"all of its {group.size} units are to be removed", hint="keep at least one")
    return kept


def kept_mask(term: Term, keep: Mapping[Axis, Keep]) -> Keep:
    """Which indices along ``term`` stay."""
    mask = np.ones(1, dtype=np.bool_)
    for axis in resolve(term):
        if axis.parts is not None:
            inner = np.concatenate([kept_mask(part, keep) for part in axis.parts])
        else:
            found = keep.get(axis)
            inner = np.ones(axis.size, dtype=np.bool_) if found is None else found
        mask = np.logical_and.outer(mask, inner).reshape(-1)
    return mask


def kept_size(term: Term, keep: Mapping[Axis, Keep]) -> int:
    """How many indices along ``term`` stay."""
    return prod(
        (int(keep[axis].sum()) if axis in keep else axis.size) if axis.parts is None else sum(kept_size(part, keep) for part in axis.parts)
        for axis in resolve(term)
    )


def _slice_tensors(graph: fx.GraphModule, axes: Axes, keep: Mapping[Axis, Keep]) -> None:
    sliced: dict[int, torch.Tensor] = {}
    for name in dict.fromkeys(str(node.target) for node in graph.graph.find_nodes(op="get_attr")):
        old = graphs.tensor(graph, name)
        if id(old) not in sliced:
            sliced[id(old)] = _sliced(old, axes.state.tensors[id(old)], keep)
        if sliced[id(old)] is not old:
            graphs.add_tensor(graph, name, sliced[id(old)])


def _sliced(old: torch.Tensor, shape: tuple[Term, ...], keep: Mapping[Axis, Keep]) -> torch.Tensor:
    new = old.detach()
    for dim, term in enumerate(shape):
        mask = kept_mask(term, keep)
        if not mask.all():
            new = new.index_select(dim, torch.from_numpy(np.flatnonzero(mask)).to(new.device))
    if new.shape == old.shape:
        return old
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _recompute_literals(graph: fx.GraphModule, axes: Axes, keep: Mapping[Axis, Keep]) -> None:
    def kept(term: Term) -> int:
        return kept_size(term, keep)

    copies = list(graph.graph.nodes)
    for original, node in zip(axes.model.graph.graph.nodes, copies, strict=True):
        for edit in axes.state.edits.get(original, ()):
            edit(node, kept)
