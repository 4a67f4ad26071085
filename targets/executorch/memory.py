"""What ExecuTorch takes in memory for a ``.pte`` file: its planned buffers, and what XNNPACK makes of each delegate."""

from __future__ import annotations

import importlib.util
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from edgesmith.compiler.errors import UnsupportedError, UserError
from edgesmith.compiler.profile.memory_types import MemoryPlan
from edgesmith.kernels import arena, packing
from edgesmith.targets.executorch.profiling.flatfile import Reader, Row, Schema
from edgesmith.targets.executorch.profiling.ptefile import PteFile
from edgesmith.targets.executorch.profiling.xnngraph import xnnpack_schema


def _kinds(text: str, prefix: str = "") -> frozenset[str]:
    return frozenset(f"{prefix}{kind}" for kind in text.split())


METHOD, XNNPACK = "forward", "XnnpackBackend"
_HEADER = struct.Struct("<4x4sHIIIQ")
_NO_ID = 0xFFFFFFFF
_INPUT, _OUTPUT = 1, 2
_BITS = {1: 32, 2: 16, 3: 8, 4: 8, 5: 32, 6: 8, 7: 32, 8: 4, 9: 8, 10: 4, 11: 8, 12: 32, 13: 32, 14: 16}
"""Of XNNPACK's datatypes."""
_FLOATS, _DYNAMIC = frozenset({1, 2, 13, 14}), frozenset({9, 11})
_IN_PLACE = _kinds(
    "Add Subtract Multiply Div Minimum Maximum Clamp Sigmoid Softmax Gelu Tanh Hardswish SquareRoot ReciprocalSquareRoot Square Abs Negate Exp Log Floor "
    "Ceiling ELU LeakyReLU StaticReshape Copy",
    prefix="XNN",
)
"""XNNPACK's operators whose output may overwrite an input of its size (``src/subgraph.c``)."""
_WORKSPACE_BYTES = 32
RECORDS_BYTES, NODE_BYTES, VALUE_BYTES = 30_000, 600, 1_300
"""The runtime's records: of any file, of an operator of a delegate, of a value of the method. Measured with version 1.4."""


def memory_plan(path: Path) -> MemoryPlan:
    """The plan of the file ``path``; see ``Target.memory_plan``.

    Raises:
        UnsupportedError: the file has a delegate that is not XNNPACK's, or the runtime's package, whose schemas it takes, is not installed.
        UserError: it is no ``.pte`` file.
    """
    package = importlib.util.find_spec("executorch")
    if package is None or not package.submodule_search_locations:
        raise UnsupportedError("the memory of a .pte file is planned with the schemas of executorch", hint="pip install 'edgesmith[executorch]'")
    folder = Path(next(iter(package.submodule_search_locations)))
    try:
        file = PteFile.read(path.read_bytes(), folder)
        return _planned(file, xnnpack_schema(folder), path.stat().st_size - len(file.segments))
    except ValueError as error:
        raise UserError(f"{path} cannot be read", why=str(error)) from error


def _planned(file: PteFile, schema: Schema, program_bytes: int) -> MemoryPlan:
    method = file.method(METHOD)
    foreign = {delegate["id"] for delegate in method["delegates"]} - {XNNPACK}
    if foreign:
        raise UnsupportedError(f"the memory of {', '.join(sorted(foreign))} is not planned")
    delegates = [_Delegate.read(file.delegate(delegate["processed"]), schema) for delegate in method["delegates"]]
    constants = file.program.get("constant_segment", {})
    kept = file.program["segments"][constants["segment_index"]]["size"] if len(constants.get("offsets", ())) > 1 else 0
    return MemoryPlan(
        weights_bytes=0,
        packed_bytes=sum(delegate.packed_bytes for delegate in delegates),
        arena_bytes=sum(method["non_const_buffer_sizes"])
        + max((delegate.workspace_bytes for delegate in delegates), default=0)
        + sum(delegate.indirection_bytes for delegate in delegates),
        runtime_bytes=RECORDS_BYTES + NODE_BYTES * sum(d.nodes for d in delegates) + VALUE_BYTES * len(method["values"]),
        mapped_bytes=kept + program_bytes,
    )


@dataclass(frozen=True)
class _Delegate:
    packed_bytes: int
    workspace_bytes: int
    indirection_bytes: int
    nodes: int

    @classmethod
    def read(cls, blob: bytes, schema: Schema) -> _Delegate:
        """A delegate's part of a file, from its serialized graph."""
        _, _, start, size, _, _ = _HEADER.unpack_from(blob)
        graph = Reader(memoryview(blob)[start : start + size], schema).root()
        values = {base["id_out"]: base for base in map(_base, graph["xvalues"])}
        nodes = [(node["xnode_union_type"], node["xnode_union"]) for node in graph["xnodes"]]
        padded = _fused_pads(nodes)
        steps = [_step(kind, node, view=node["output_id"] in padded) for kind, node in nodes]
        inside = {i: _bytes(v) for i, v in values.items() if not v["constant_buffer_idx"] and not v["flags"] & (_INPUT | _OUTPUT)}
        workspace = arena.greedy_by_size(arena.blocks(steps, inside))
        return cls(
            packed_bytes=sum(packing.allocated(_packed(node, values)) for _, node in nodes if "filter_id" in node),
            workspace_bytes=workspace + _WORKSPACE_BYTES if workspace else 0,
            indirection_bytes=sum(_indirection(node, values) for _, node in nodes if "kernel_height" in node),
            nodes=len(nodes),
        )


def _base(value: Row) -> Row:
    union: Row = value["xvalue_union"]
    base: Row = union.get("tensor_value", union)
    return base


def _bytes(value: Row) -> int:
    return math.prod(value["dims"]) * _BITS[value["datatype"]] // 8


def _fused_pads(nodes: list[tuple[str, Row]]) -> set[int]:
    """Outputs of paddings by zero that only convolutions read: these pad by themselves."""
    pads = {node["output_id"] for kind, node in nodes if kind == "XNNStaticConstantPad"}
    others = {i for kind, node in nodes if "kernel_height" not in node for i in _reads(node)}
    return pads - others


def _step(kind: str, node: Row, *, view: bool) -> arena.Step:
    return arena.Step(_reads(node), (node["output_id"],), in_place=kind in _IN_PLACE, view=view)


def _reads(node: Row) -> tuple[int, ...]:
    return tuple(i for name, i in node.items() if name.endswith("_id") and not name.startswith("output") and i != _NO_ID)


def _packed(node: Row, values: dict[int, Row]) -> int:
    filters, source = values[node["filter_id"]], values[node["input1_id"]]
    scheme = "float" if filters["datatype"] in _FLOATS else "dynamic" if source["datatype"] in _DYNAMIC else "static"
    bits = _BITS[filters["datatype"]]
    if "kernel_height" not in node:
        outputs = values[node["output_id"]]["dims"][-1]
        return packing.matrix_bytes(outputs, math.prod(filters["dims"]) // outputs, bits, scheme)
    depth = node["group_input_channels"] * node["kernel_height"] * node["kernel_width"]
    return packing.convolution_bytes(node["groups"], node["group_output_channels"], depth, bits, scheme)


def _indirection(node: Row, values: dict[int, Row]) -> int:
    _, height, width, _ = values[node["output_id"]]["dims"]
    return packing.indirection_bytes(
        (node["kernel_height"], node["kernel_width"]),
        (node["subsampling_height"], node["subsampling_width"]),
        (height, width),
        depthwise=node["groups"] > 1 and node["group_output_channels"] == 1,
    )
