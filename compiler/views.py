"""Writes through views made functional: the tensor that was written to is put together anew, and its views are taken again."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.errors import CaptureError

aten = torch.ops.aten

_RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.view_as.default,
    aten.reshape_as.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
}
_PERMUTATIONS = {aten.permute.default, aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.mT.default, aten.swapaxes.default, aten.movedim.int}
_PIECES = {aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default, aten.tensor_split.sections, aten.tensor_split.indices}


@dataclass
class Memory:
    """Which nodes of ``graph`` share memory, told by the storage of their fake values; it follows the writes that are replaced."""

    graph: fx.GraphModule
    _owners: set[fx.Node] = field(default_factory=set)

    def replace(self, write: fx.Node, twin: Any) -> None:
        """Replace ``write`` by its functional ``twin`` and let everything that is read later see what was written.

        Raises:
            CaptureError: the view cannot be turned round, or belongs to a parameter or buffer.
        """
        written = write.args[0]
        assert isinstance(written, fx.Node)
        self._before = write
        value = self._assigned(write, written) if write.target is aten.copy_.default else self._emit(twin, *write.args, **write.kwargs)
        root = self._root(written)
        place = {node: i for i, node in enumerate(self.graph.graph.nodes)}
        storage = _storage(written)
        shared = [node for node in place if place[node] <= place[write] and _storage(node) == storage]
        readers = {node: later for node in shared if (later := [user for user in node.users if place[user] > place[write]])}
        if readers and root.op == "get_attr":
            raise CaptureError(f"{write.target} changes a parameter or buffer", where=graphs.source(write), hint="let forward work on a copy of it")
        if readers.keys() <= {written, write}:
            views = {written: self._owner(value, written.meta["val"])}
        else:
            views = {root: self._owner(self._whole(written, value), root.meta["val"])}
        for node, later in readers.items():
            new = self._viewed(written if node is write else node, views)
            for user in later:
                user.replace_input_with(node, new)
        self.graph.graph.erase_node(write)

    def close(self) -> None:
        """Take away what told tensors apart: nothing is written to any more."""
        for node in self._owners:
            node.replace_all_uses_with(node.all_input_nodes[0])
            self.graph.graph.erase_node(node)
        self._owners.clear()

    def _owner(self, node: fx.Node, value: torch.Tensor) -> fx.Node:
        """``node`` as a tensor with the memory of ``value``."""
        owner = self._emit(aten.alias.default, node)
        owner.meta["val"] = value
        self._owners.add(owner)
        return owner

    def _parent(self, node: fx.Node) -> fx.Node | None:
        """What ``node`` is a view of; None where it has memory of its own."""
        if node.op != "call_function" or node in self._owners or not node.args or not isinstance(node.args[0], fx.Node):
            return None
        parent = node.args[0]
        source = parent.args[0] if isinstance(parent.meta["val"], (list, tuple)) else parent
        return parent if isinstance(source, fx.Node) and _storage(source) == _storage(node) else None

    def _root(self, node: fx.Node) -> fx.Node:
        while (parent := self._parent(node)) is not None:
            node = parent
        return node

    def _whole(self, view: fx.Node, part: fx.Node) -> fx.Node:
        """The tensor that ``view`` belongs to, with ``part`` in the view's place."""
        while (whole := self._parent(view)) is not None:
            if isinstance(whole.meta["val"], (list, tuple)):
                part = self._joined(whole, int(view.args[1]), part)  # type: ignore[arg-type]
                view = whole
                whole = self._parent(view)
                assert whole is not None
            else:
                part = self._put_back(view, whole, part)
            view = whole
        return part

    def _viewed(self, node: fx.Node, views: dict[fx.Node, fx.Node]) -> fx.Node:
        """``node`` taken again from what has replaced the tensor that it is a view of."""
        if node not in views:
            parent = self._parent(node)
            if parent is None:
                raise self._refusal(node)
            new = self._emit(node.target, self._viewed(parent, views), *node.args[1:], **node.kwargs)
            new.meta["val"] = node.meta["val"]
            views[node] = new
        return views[node]

    def _put_back(self, view: fx.Node, whole: fx.Node, part: fx.Node) -> fx.Node:
        """``whole`` with ``part`` where ``view`` looks at it."""
        inner, outer, target = view.meta["val"], whole.meta["val"], view.target
        if _looks(inner) == _looks(outer):
            return part
        if inner.numel() == 0:
            return whole
        if target in _RESHAPES:
            return self._reshaped(part, outer.shape)
        if target in _PERMUTATIONS:
            order = _order(view, outer.dim())
            return self._emit(aten.permute.default, part, [order.index(d) for d in range(len(order))])
        if target is aten.select.int and isinstance(index := view.args[2], int):
            dim, end = int(view.args[1]) % outer.dim(), None if index == -1 else index + 1  # type: ignore[arg-type]
            return self._between(whole, dim, index, end, self._emit(aten.unsqueeze.default, part, dim))
        if target is aten.slice.Tensor:
            given: tuple[Any, ...] = (*view.args[1:], *(0, None, None, 1)[len(view.args) - 1 :])
            dim, start, end, step = int(given[0]) % outer.dim(), *given[1:]
            return self._between(whole, dim, start, end, part) if step == 1 else self._interleaved(view, whole, dim, part)
        raise self._refusal(view)

    def _between(self, whole: fx.Node, dim: int, start: Any, end: Any, part: fx.Node) -> fx.Node:
        """``part`` between what ``whole`` has before ``start`` and from ``end`` on."""
        before = [] if start is None else [self._emit(aten.slice.Tensor, whole, dim, 0, start)]
        after = [] if end is None else [self._emit(aten.slice.Tensor, whole, dim, end)]
        return self._cat([node for node in (*before, part, *after) if node.meta["val"].shape[dim] > 0], dim)

    def _interleaved(self, view: fx.Node, whole: fx.Node, dim: int, part: fx.Node) -> fx.Node:
        """``part`` at every ``step``-th unit of ``whole``."""
        step, inner, outer = int(view.args[4]), view.meta["val"], whole.meta["val"]  # type: ignore[arg-type]
        first, count, size = (inner.storage_offset() - outer.storage_offset()) // outer.stride(dim), int(inner.shape[dim]), int(outer.shape[dim])
        if graphs.any_batch(size) == -1:
            raise self._refusal(view)
        if step * count > size:
            count -= 1
            last = first + step * count
            whole = self._between(whole, dim, last, last + 1, self._emit(aten.slice.Tensor, part, dim, count))
            if not count:
                return whole
            part = self._emit(aten.slice.Tensor, part, dim, 0, count)
        start = min(first, size - step * count)
        shape, stop = list(outer.shape), start + step * count
        rows = self._reshaped(self._emit(aten.slice.Tensor, whole, dim, start, stop), [*shape[:dim], count, step, *shape[dim + 1 :]])
        joined = self._between(rows, dim + 1, first - start, first - start + 1, self._emit(aten.unsqueeze.default, part, dim + 1))
        return self._between(whole, dim, start, stop, self._reshaped(joined, [*shape[:dim], step * count, *shape[dim + 1 :]]))

    def _joined(self, pieces: fx.Node, index: int, part: fx.Node) -> fx.Node:
        """What was cut into ``pieces``, with ``part`` as one of them."""
        values = pieces.meta["val"]
        parts = [part if i == index % len(values) else self._emit(operator.getitem, pieces, i) for i in range(len(values))]
        if pieces.target is aten.unbind.int:
            return self._emit(aten.stack.default, parts, *pieces.args[1:], **pieces.kwargs)
        if pieces.target not in _PIECES:
            raise self._refusal(pieces)
        return self._cat(parts, int(pieces.kwargs.get("dim", pieces.args[2] if len(pieces.args) > 2 else 0)))  # type: ignore[arg-type]

    def _cat(self, parts: list[fx.Node], dim: int) -> fx.Node:
        return parts[0] if len(parts) == 1 else self._emit(aten.cat.default, parts, dim)

    def _reshaped(self, node: fx.Node, shape: Any) -> fx.Node:
        sizes = [graphs.any_batch(int(n)) for n in shape]
        if sizes.count(-1) > 1:
            raise self._refusal(node)
        return self._emit(aten.reshape.default, node, sizes)

    def _assigned(self, write: fx.Node, written: fx.Node) -> fx.Node:
        """What ``copy_`` writes: its source in the type and the shape of what is written to."""
        value = write.args[1]
        assert isinstance(value, fx.Node)
        mine, given = written.meta["val"], value.meta["val"]
        if given.dtype != mine.dtype:
            value = self._emit(aten.to.dtype, value, mine.dtype)
        if given.shape != mine.shape:
            value = self._emit(aten.expand_as.default, value, written)
        return value

    def _emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A node before the write, with its value."""
        with self.graph.graph.inserting_before(self._before):
            node = self.graph.graph.call_function(target, args, kwargs)
        node.meta["source"] = self._before.meta.get("source", "")
        given = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self._before.meta["val"].fake_mode, torch.no_grad():
            node.meta["val"] = target(*given[0], **given[1])
        return node

    def _refusal(self, view: fx.Node) -> CaptureError:
        return CaptureError(
            f"{self._before.target} writes through a view that is read again",
            where=graphs.source(self._before),
            why=f"what {view.target} gives cannot be put back",
            hint="write it without in-place operators",
        )


def _storage(node: fx.Node) -> object:
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        value = next((v for v in value if isinstance(v, torch.Tensor)), None)
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _looks(value: torch.Tensor) -> tuple[object, ...]:
    """All that tells two views of one memory apart."""
    return value.shape, value.stride(), value.storage_offset(), value.dtype, value.is_conj(), value.is_neg()


def _order(view: fx.Node, rank: int) -> list[int]:
    """The dimensions of what ``view`` looks at, in the order that it gives them."""
    numbered = torch.empty([i + 1 for i in range(rank)], device="meta")
    target: Any = view.target
    return [n - 1 for n in target(numbered, *view.args[1:], **view.kwargs).shape]
