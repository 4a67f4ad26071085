"""The operators of one XNNPACK delegate, and delegates that run some of them."""

from __future__ import annotations

import struct
from pathlib import Path

from .flatfile import Reader, Row, Schema, schema, written

_HEADER = struct.Struct("<4x4sHIIIQ2x")
"""Magic, header's size, where the flatbuffer starts, its size, where the constants start, their size; padded to 32 bytes."""
_MAGIC, _HEADER_SIZE = b"XH00", 30
_CONSTANT_ALIGNMENT = 16
_NO_ID = 0xFFFFFFFF
_INPUT, _OUTPUT = 1, 2
_TENSOR = "XNNTensorValue"
_DATATYPE_PREFIX = "xnn_datatype_"
_SCALAR_TYPES = {"fp32": 6, "fp16": 5, "bf16": 15, "qint8": 1, "quint8": 0, "qint32": 3, "int32": 3}
"""XNNPACK's datatypes that a tensor outside a delegate may have -> the runtime's ScalarType. The others carry parameters of their own at run time."""


def xnnpack_schema(package: Path) -> Schema:
    """The schema of XNNPACK's delegates in ``package``, the folder of the installed executorch."""
    folder = package / "backends" / "xnnpack" / "serialization"
    found = schema(folder / "runtime_schema.fbs")
    found.identifier = schema(folder / "schema.fbs").identifier
    return found


class Graph:
    """What the delegate ``blob`` computes. Operators are numbered in order of execution; tensors have XNNPACK's ids.

    Raises:
        ValueError: it is not what the schema says.
    """

    def __init__(self, blob: bytes, known: Schema) -> None:
        magic, _, start, size, self._constants_at, _ = _HEADER.unpack_from(blob)
        if magic != _MAGIC:
            raise ValueError("an XNNPACK delegate from before they had headers")
        self._blob, self._schema = blob, known
        self._row = Reader(memoryview(blob)[start : start + size], known).root()
        self._nodes: list[Row] = self._row["xnodes"]
        self._values = {_base(value)["id_out"]: value for value in self._row["xvalues"]}
        self._datatypes = {number: name.removeprefix(_DATATYPE_PREFIX) for name, number in known.enums["XNNDatatype"].items()}
        self._made = [_ids(node, output=True) for node in self._nodes]
        self._read = [_ids(node, output=False) for node in self._nodes]
        self._last_read = {i: number for number, ids in enumerate(self._read) for i in ids}

    def units(self) -> list[range]:
        """The operators in the smallest groups between which every tensor may leave the delegate."""
        found = []
        start = 0
        alive: set[int] = set()
        for number, made in enumerate(self._made):
            alive = {i for i in alive | set(made) if self._last_read.get(i, -1) > number}
            if all(self._datatype(i) in _SCALAR_TYPES for i in alive):
                found.append(range(start, number + 1))
                start = number + 1
        return found

    def kind(self, nodes: range) -> str:
        """The operators' types: ``XNNConv2d``, ``XNNConvert+XNNFullyConnected``."""
        return "+".join(str(self._nodes[n]["xnode_union_type"]) for n in nodes)

    def result(self, nodes: range) -> int:
        """The tensor that the last of ``nodes`` makes first."""
        return self._made[nodes[-1]][0]

    def handles(self, nodes: range, missing: int) -> list[int]:
        """Debug handles of ``nodes``; one that is ``missing`` is that of the next operator that has one, as what is inserted prepares it."""
        found = []
        for n in nodes:
            near = [int(self._nodes[m]["debug_handle"]) for m in (*range(n, len(self._nodes)), *range(n, -1, -1))]
            found += [handle for handle in near if handle != missing][:1]
        return list(dict.fromkeys(found))

    def border(self, nodes: range) -> tuple[list[int], list[int]]:
        """The tensors that ``nodes`` read from elsewhere, constants aside, and those that are read elsewhere (the last one's if none is)."""
        made = [i for n in nodes for i in self._made[n]]
        read = dict.fromkeys(i for n in nodes for i in self._read[n])
        entering = [i for i in read if i not in made and not _base(self._values[i])["constant_buffer_idx"]]
        leaving = [i for i in made if self._last_read.get(i, -1) >= nodes.stop or _base(self._values[i])["flags"] & _OUTPUT]
        return entering, leaving or self._made[nodes[-1]]

    def outer(self, identifier: int) -> int | None:
        """Which argument of the delegate's call the tensor is; None if it is inside."""
        base = _base(self._values[identifier])
        return int(base["external_id"]) if base["flags"] & (_INPUT | _OUTPUT) else None

    def shape(self, identifier: int) -> tuple[int, list[int]]:
        """ScalarType and sizes of a tensor that may leave the delegate."""
        return _SCALAR_TYPES[self._datatype(identifier)], list(_base(self._values[identifier])["dims"])

    def part(self, nodes: range, entering: list[int], leaving: list[int]) -> bytes:
        """A delegate of ``nodes`` alone; the arguments of its call are ``entering`` and ``leaving``."""
        used = dict.fromkeys(i for n in nodes for i in (*self._read[n], *self._made[n]))
        places = {i: (place, _INPUT if place < len(entering) else _OUTPUT) for place, i in enumerate((*entering, *leaving))}
        buffers = {0: 0}
        values = [_moved(self._values[i], *places.get(i, (_NO_ID, 0)), buffers) for i in used]
        constants, data = self._constants(list(buffers))
        graph = {
            **self._row,
            "xnodes": self._nodes[nodes.start : nodes.stop],
            "xvalues": values,
            "num_externs": len(places),
            "input_ids": entering,
            "output_ids": leaving,
            "constant_data": constants,
        }
        return _packed(graph, self._schema, data)

    def _datatype(self, identifier: int) -> str:
        return self._datatypes[_base(self._values[identifier])["datatype"]]

    def _constants(self, indices: list[int]) -> tuple[list[Row], bytes]:
        rows, data = [], b""
        for index in indices:
            row = self._row["constant_data"][index]
            if index and not row.get("named_key"):
                start = self._constants_at + row["offset"]
                data += bytes(-len(data) % _CONSTANT_ALIGNMENT)
                row = {**row, "offset": len(data)}
                data += self._blob[start : start + row["size"]]
            rows.append(row)
        return rows, data


def copy_of_one_number(known: Schema) -> bytes:
    """A delegate that does next to nothing: what any call of a delegate costs."""
    values = [{"datatype": 1, "num_dims": 1, "dims": [1], "external_id": i, "flags": flag, "id_out": i} for i, flag in enumerate((_INPUT, _OUTPUT))]
    graph = {
        "version": "0",
        "xnodes": [{"xnode_union_type": "XNNCopy", "xnode_union": {"input_id": 0, "output_id": 1}}],
        "xvalues": [{"xvalue_union_type": _TENSOR, "xvalue_union": value} for value in values],
        "num_externs": 2,
        "input_ids": [0],
        "output_ids": [1],
        "constant_data": [{"offset": 0, "size": 0}],
    }
    return _packed(graph, known, b"")


def _packed(graph: Row, known: Schema, data: bytes) -> bytes:
    flat = written(graph, known)
    padding = bytes(-len(flat) % _CONSTANT_ALIGNMENT)
    header = _HEADER.pack(_MAGIC, _HEADER_SIZE, _HEADER.size, len(flat), _HEADER.size + len(flat) + len(padding), len(data))
    return header + flat + padding + data


def _ids(node: Row, *, output: bool) -> list[int]:
    fields: Row = node["xnode_union"]
    return [i for name, i in fields.items() if name.endswith("_id") and name.startswith("output") == output and i != _NO_ID]


def _base(value: Row) -> Row:
    union: Row = value["xvalue_union"]
    base: Row = union if value["xvalue_union_type"] == _TENSOR else union["tensor_value"]
    return base


def _moved(value: Row, place: int, flags: int, buffers: dict[int, int]) -> Row:
    """``value`` as argument ``place`` (or inside), its constants numbered as in ``buffers``, to which new ones are added."""

    def renumbered(index: int) -> int:
        return buffers.setdefault(index, len(buffers))

    base = _base(value)
    base = {**base, "external_id": place, "flags": flags, "constant_buffer_idx": renumbered(base["constant_buffer_idx"])}
    if value["xvalue_union_type"] == _TENSOR:
        return {**value, "xvalue_union": base}
    union = {**value["xvalue_union"], "tensor_value": base}
    scales = union.get("quant_params", {}).get("scale_buffer_idx", 0)
    if scales:
        union["quant_params"] = {**union["quant_params"], "scale_buffer_idx": renumbered(scales)}
    return {**value, "xvalue_union": union}
