"""Cuts the method ``forward`` of a ``.pte`` file into pieces, each a method of its own in a derived file.

A unit is what is timed as one: a kernel, or the fewest operators of an XNNPACK delegate that can be parted from the others. A segment is a
kernel or some consecutive units of one delegate. A piece runs the first few units of a segment: it reads the tensors that enter the segment
and writes those that leave the piece. Constants stay where the file has them; every other tensor has a place of its own in memory, because
the runtime lets all methods of a program share one memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .flatfile import Row, Schema
from .ptefile import PteFile, method_row
from .xnngraph import Graph, copy_of_one_number, xnnpack_schema

METHOD = "forward"
EMPTY, NULL_DELEGATE = "empty", "null_delegate"
"""Methods of the derived file: no instruction at all, and a delegate that copies one number."""
XNNPACK = "XnnpackBackend"
NO_HANDLE = 65535
"""The debug handle of operators that XNNPACK's lowering inserted."""
_ALIGNMENT = 64
_MEMORY = 1
_VIEW = "executorch_prim::et_view"
"""A kernel whose result is its argument, where that is."""
_FLOAT = 6
_ITEM_BYTES = {0: 1, 1: 1, 2: 2, 3: 4, 4: 8, 5: 2, 6: 4, 7: 8, 11: 1, 15: 2}
"""Bytes of an element, by the runtime's ScalarType code."""
_DYNAMIC_BOUND = 1
_LISTS = frozenset({"IntList", "TensorList", "OptionalTensorList"})
"""Values whose items are indices of values."""

Key = tuple[int, ...]
"""A tensor: (index of its value in the method), or (instruction, id inside the delegate)."""


@dataclass(frozen=True)
class Unit:
    """``instruction``: its number in the method. ``kind``: as the file names it. ``scalar_type``: of its result. ``handles``: of a delegate's operators."""

    instruction: int
    kind: str
    scalar_type: int
    delegate: str = ""
    handles: tuple[int, ...] = ()


@dataclass(frozen=True)
class Piece:
    """The first ``count`` units of segment ``segment``, and the tensors that the method takes and gives."""

    method: str
    segment: int
    count: int
    inputs: tuple[Key, ...]
    outputs: tuple[Key, ...]


@dataclass(frozen=True)
class Segment:
    """``opens``: its first unit is that of a delegate, whose time then includes what the call of a delegate costs."""

    units: tuple[Unit, ...]
    opens: bool


@dataclass(frozen=True)
class Cut:
    """``content`` is the derived file; ``inputs`` and ``outputs`` are those of the whole method."""

    content: bytes
    segments: tuple[Segment, ...]
    pieces: tuple[Piece, ...]
    inputs: tuple[Key, ...]
    outputs: tuple[Key, ...]


def cut(content: bytes, package: Path, segments: int, least: int, most: int) -> Cut:
    """Cut ``content``, a ``.pte`` file, into about ``segments`` segments, each of ``least`` to ``most`` units where a delegate has as many.

    ``package`` is the folder of the installed executorch. The derived file is as large as ``content`` and some kilobytes a piece; the runtime packs
    the constants of each piece anew.

    Raises:
        ValueError: it is no such file.
        NotImplementedError: it does what cannot be cut: control flow, tensors that outlive a run, sizes computed at run time, delegates other
            than XNNPACK's.
    """
    cutter = _Cutter(PteFile.read(content, package), xnnpack_schema(package))
    cutter.most = min(most, max(least, math.ceil(cutter.count() / segments)))
    return cutter.cut()


@dataclass
class _Memory:
    """Places of tensors, one after the other."""

    size: int = 0
    starts: dict[Key, int] = field(default_factory=dict)

    def placed(self, key: Key, value: Row) -> Row:
        """``value``, a tensor, at the place of ``key``."""
        tensor = value["val"]
        if key not in self.starts:
            self.starts[key] = self.size
            self.size += -(-math.prod(tensor["sizes"]) * _ITEM_BYTES[tensor["scalar_type"]] // _ALIGNMENT) * _ALIGNMENT
        start = self.starts[key]
        info = {"memory_id": _MEMORY, "memory_offset_low": start & 0xFFFFFFFF, "memory_offset_high": start >> 32}
        return {**value, "val": {**tensor, "allocation_info": info}}

    def share(self, view: Key, of: Key) -> None:
        """Give ``view`` the place of tensor ``of``."""
        self.starts[view] = self.starts[of]


@dataclass
class _Cutter:
    file: PteFile
    xnnpack: Schema
    most: int = 1
    segments: list[Segment] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    methods: list[Row] = field(default_factory=list)
    blobs: list[bytes] = field(default_factory=list)
    memory: _Memory = field(default_factory=_Memory)

    def __post_init__(self) -> None:
        self._plan = self.file.method(METHOD)
        self._values: list[Row] = self._plan["values"]
        self._constants = {i for i, value in enumerate(self._values) if _is_constant(value)}
        self._known = self._constants | set(self._plan["inputs"])
        self._instructions = [(row["instr_args_type"], row["instr_args"]) for row in self._plan["chains"][0]["instructions"]]
        self._graphs = {number: self._graph(call) for number, (kind, call) in enumerate(self._instructions) if kind == "DelegateCall"}

    def _graph(self, call: Row) -> Graph:
        delegate = self._plan["delegates"][call["delegate_index"]]
        if delegate["id"] != XNNPACK:
            raise NotImplementedError(f"a delegate of {delegate['id']} cannot be cut into pieces, only those of {XNNPACK} can")
        return Graph(self.file.delegate(delegate["processed"]), self.xnnpack)

    def count(self) -> int:
        return sum(len(graph.units()) for graph in self._graphs.values())

    def cut(self) -> Cut:
        """One piece for every further instruction, delegates taken apart.

        Raises:
            NotImplementedError: the file has control flow.
        """
        steps = {"KernelCall": self._kernel, "DelegateCall": self._delegate}
        for number, (kind, call) in enumerate(self._instructions):
            if kind not in steps:
                raise NotImplementedError(f"a file with control flow ({kind}) cannot be cut into pieces")
            steps[kind](number, call)
        numbers = [self.memory.placed((-1, i), _tensor(_FLOAT, [1])) for i in (0, 1)]
        self._add_delegate(NULL_DELEGATE, numbers, [0], [1], {"id": XNNPACK, "compile_specs": []}, copy_of_one_number(self.xnnpack))
        self.methods.append(method_row(EMPTY, [], [], [], []))
        plans = [{**method, "non_const_buffer_sizes": [0, self.memory.size]} for method in self.methods]
        program = {**self.file.program, "execution_plan": plans, "backend_delegate_data": [{"data": blob} for blob in self.blobs]}
        content = PteFile(program, self.file.segments, self.file.schema).written()
        inputs, outputs = (tuple((i,) for i in self._plan[side]) for side in ("inputs", "outputs"))
        return Cut(content, tuple(self.segments), tuple(self.pieces), inputs, outputs)

    def _kernel(self, number: int, call: Row) -> None:
        operator = self._plan["operators"][call["op_index"]]
        used = list(dict.fromkeys(self._reached(call["args"])))
        tensors = [i for i in used if self._values[i]["val_type"] == "Tensor"]
        outputs = [i for i in tensors if i not in self._known]
        if not outputs:
            raise NotImplementedError(f"{operator['name']} makes no tensor: a file that computes sizes, or changes tensors in place, cannot be cut into pieces")
        inputs = [i for i in tensors if i in self._known - self._constants]
        self._known |= set(outputs)
        place = {index: position for position, index in enumerate(used)}
        if operator["name"] == _VIEW:
            self.memory.share((outputs[0],), (inputs[0],))
        values = [self._placed(i) if i in tensors else _renumbered(self._values[i], place) for i in used]
        call = {"op_index": 0, "args": [place[i] for i in call["args"]]}
        name = f"piece_{len(self.methods)}"
        method = method_row(name, values, [place[i] for i in inputs], [place[i] for i in outputs], [("KernelCall", call)])
        self.methods.append({**method, "operators": [operator]})
        kind = ".".join(filter(None, (operator["name"], operator.get("overload"))))
        unit = Unit(number, kind, self._values[outputs[0]]["val"]["scalar_type"])
        self.segments.append(Segment((unit,), opens=False))
        self.pieces.append(Piece(name, len(self.segments) - 1, 1, tuple((i,) for i in inputs), tuple((i,) for i in outputs)))

    def _placed(self, index: int) -> Row:
        value = self._values[index]
        return value if index in self._constants else self.memory.placed((index,), value)

    def _reached(self, indices: Iterable[int]) -> Iterator[int]:
        """Values that ``indices`` refer to, also by lists, whose items the runtime wants first."""
        for index in indices:
            value = self._values[index]
            if value["val_type"] in _LISTS:
                yield from (i for i in value["val"]["items"] if i >= 0)
            yield index

    def _delegate(self, number: int, call: Row) -> None:
        self._known |= set(call["args"])
        delegate, graph = self._plan["delegates"][call["delegate_index"]], self._graphs[number]
        units = graph.units()
        size = math.ceil(len(units) / math.ceil(len(units) / self.most))
        for start in range(0, len(units), size):
            chosen = units[start : start + size]
            self.segments.append(Segment(tuple(_unit(number, graph, nodes) for nodes in chosen), opens=start == 0))
            for count in range(1, len(chosen) + 1):
                self._delegate_piece(number, call["args"], delegate, graph, range(chosen[0].start, chosen[count - 1].stop), count)

    def _delegate_piece(self, number: int, arguments: list[int], delegate: Row, graph: Graph, nodes: range, count: int) -> None:
        entering, leaving = graph.border(nodes)
        keys: list[Key] = []
        rows: list[Row] = []
        for identifier in (*entering, *leaving):
            outer = graph.outer(identifier)
            key = (number, identifier) if outer is None else (arguments[outer],)
            keys.append(key)
            rows.append(self.memory.placed(key, _tensor(*graph.shape(identifier))) if outer is None else self._placed(arguments[outer]))
        inputs = [place for place, key in enumerate(keys[: len(entering)]) if len(key) > 1 or key[0] not in self._constants]
        outputs = list(range(len(entering), len(keys)))
        name = f"piece_{len(self.methods)}"
        self._add_delegate(name, rows, inputs, outputs, delegate, graph.part(nodes, entering, leaving))
        self.pieces.append(Piece(name, len(self.segments) - 1, count, tuple(keys[i] for i in inputs), tuple(keys[i] for i in outputs)))

    def _add_delegate(self, name: str, rows: list[Row], inputs: list[int], outputs: list[int], delegate: Row, blob: bytes) -> None:
        method = method_row(name, rows, inputs, outputs, [("DelegateCall", {"delegate_index": 0, "args": list(range(len(rows)))})])
        moved = {**delegate, "processed": {"location": 0, "index": len(self.blobs)}}
        self.methods.append({**method, "delegates": [moved]})
        self.blobs.append(blob)


def _unit(number: int, graph: Graph, nodes: range) -> Unit:
    scalar_type, _ = graph.shape(graph.result(nodes))
    return Unit(number, graph.kind(nodes), scalar_type, XNNPACK, tuple(graph.handles(nodes, NO_HANDLE)))


def _is_constant(value: Row) -> bool:
    if value["val_type"] != "Tensor" or not value["val"]["data_buffer_idx"]:
        return False
    if "allocation_info" in value["val"]:
        raise NotImplementedError("a file that keeps tensors from one run to the next cannot be cut into pieces")
    return True


def _renumbered(value: Row, place: dict[int, int]) -> Row:
    if value["val_type"] not in _LISTS:
        return value
    return {**value, "val": {"items": [place.get(i, -1) for i in value["val"]["items"]]}}


def _tensor(scalar_type: int, sizes: list[int]) -> Row:
    tensor = {"scalar_type": scalar_type, "sizes": sizes, "dim_order": bytes(range(len(sizes))), "shape_dynamism": _DYNAMIC_BOUND}
    return {"val_type": "Tensor", "val": tensor}
