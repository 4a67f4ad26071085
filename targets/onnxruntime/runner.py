"""Runs an .onnx file in ONNX Runtime on the CPU. One file: standard library, numpy and onnxruntime only."""

from __future__ import annotations

import itertools
import json
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median_grouped
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int16)": "int16",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


class Session:
    """A loaded model.

    ``threads`` is the number of threads that one operator is split over; operators run one after another. Idle threads
    sleep instead of spinning: a spinning pool wins a little in a tight loop and costs a device's other work and battery,
    and on a machine with fewer free cores than threads it makes every run slower.

    8-bit products are summed exactly: without VNNI, x86 kernels for unsigned by signed bytes saturate at 16 bits, and
    ``session.x64quantprecision`` makes the runtime choose unsigned weights. With VNNI there is nothing to mend, and the choice would cost the kernels
    for signed weights, which are up to twice as fast.
    """

    def __init__(self, path: str, threads: int) -> None:
        self._session = _session(path, _options(threads))
        self.runtime_version: str = onnxruntime.__version__
        self.inputs: list[dict[str, Any]] = [_described(i) for i in self._session.get_inputs()]
        self.outputs: list[dict[str, Any]] = [_described(o) for o in self._session.get_outputs()]
        self._names = [i["name"] for i in self.inputs]

    def run(self, inputs: list[npt.NDArray[np.generic]]) -> list[npt.NDArray[np.generic]]:
        """The outputs for ``inputs``, both in the order of ``inputs`` and ``outputs``; arrays of exactly their shapes and dtypes."""
        return list(self._session.run(None, dict(zip(self._names, inputs, strict=True))))


def _options(threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not _has_vnni():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def _has_vnni() -> bool:
    """Whether this processor is known to add up products of bytes in 32 bits."""
    features = Path("/proc/cpuinfo")
    return features.is_file() and "vnni" in features.read_text()


def _session(model: str | bytes, options: Any) -> Any:
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _described(value: Any) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else None for size in value.shape]
    return {"name": value.name, "shape": shape, "dtype": _DTYPES.get(value.type, value.type)}


_CALIBRATE_EVERY = 6
_PLAIN_RUNS = 4
_ENOUGH = 5
_NS_PER_US = 1000
_LEVELS = (0.75, 2.0)


class Profiler:
    """A model loaded with the runtime's profiling switched on; ``operators`` are those of the graph as the runtime optimised it.

    The runtime counts whole microseconds, rounded down, and what it writes down of an operator (the types and shapes of what it reads and gives) is
    inside the time it gives: some 3 us, more than most small operators take. That cost is measured and taken off. How it grows with the number of tensors
    is seen on chains of trivial operators. How dear it is in this graph, where it and the kernels push each other out of the caches, is seen where a run is
    followed by some without profiling: the difference, but 0.75 to 2 times that of the chains, so that it explains no more than it can. What is left of an
    operator that does next to nothing may be a little below zero.
    """

    method = "instrumented"

    def __init__(self, path: str, threads: int) -> None:
        self._path = path
        self._folder = TemporaryDirectory(prefix="edgesmith-profile-")
        self._optimised = Path(self._folder.name, "optimised.onnx")
        self._plain = _session(path, _options(threads))
        options = _options(threads)
        options.optimized_model_filepath = str(self._optimised)
        _write_profile(options, self._folder.name, "model")
        self._session = _session(path, options)
        self._names = [i.name for i in self._session.get_inputs()]
        self._chains = _Chains(threads, self._folder.name)
        self._pairs: list[_Pair] = []
        self._counted: list[bool] = []

    def run(self, inputs: list[npt.NDArray[np.generic]]) -> None:
        """One inference of ``inputs``, as in ``Session.run``; now and then also those that the cost of profiling is measured by."""
        feed = dict(zip(self._names, inputs, strict=True))
        _, lost = _timed(self._session, feed)
        self._counted.append(True)
        if sum(self._counted) % _CALIBRATE_EVERY == 1:
            warm = [_timed(self._plain, feed) for _ in range(_PLAIN_RUNS)][1:]
            own = [ns for ns, taken in warm if not taken]
            self._pairs.append(_Pair(len(self._counted) - 1, own[-1] if own else warm[-1][0], lost or not own))
            self._chains.sample()
            self._session.run(None, feed)  # The next one that counts finds the caches as any other does.
            self._counted.append(False)

    def operators(self) -> list[dict[str, Any]]:
        """End profiling: see worker.py. An operator with a graph inside (If, Loop) is one with all that is inside."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        tensors: dict[tuple[str, str], int] = {}
        for event in _outermost(_kernel_events(self._session.end_profiling())):
            arguments = event["args"]
            name = event["name"].removesuffix(_KERNEL)
            given = arguments.get("output_type_shape") or [{}]
            entry = {"name": name, "kind": arguments["op_name"], "delegate": arguments["provider"], "dtype": _dtype(given), "ns": []}
            key = name, arguments["node_index"]
            tensors[key] = len(arguments.get("input_type_shape", ())) + len(given)
            found.setdefault(key, entry)["ns"].append(_nanoseconds(event))
        if all(len(entry["ns"]) == len(self._counted) for entry in found.values()):
            self._take_off_cost(list(found.values()), list(tensors.values()))
        sources = _sources(_nodes(self._path), _nodes(self._optimised))
        self._folder.cleanup()
        return [{**entry, "sources": sources.get(entry["name"], [])} for entry in found.values()]

    def _take_off_cost(self, entries: list[dict[str, Any]], tensors: list[int]) -> None:
        nanoseconds = np.asarray([entry["ns"] for entry in entries])
        pairs = [pair for pair in self._pairs if not pair.lost]
        if len(pairs) < _ENOUGH:
            totals = nanoseconds.sum(axis=0)
            pairs = sorted(self._pairs, key=lambda pair: int(totals[pair.run]))[: max(_ENOUGH, len(self._pairs) // 2)]
        profiled = sum(median_grouped(row, interval=_NS_PER_US) for row in nanoseconds[:, [pair.run for pair in pairs]].tolist())
        plain = float(np.median([pair.plain_ns for pair in pairs])) - self._chains.call_ns()
        costs_ns = self._chains.cost_ns(np.asarray(tensors))
        level = np.clip((profiled - plain) / costs_ns.sum(), *_LEVELS)
        for entry, cost in zip(entries, costs_ns, strict=True):
            entry["ns"] = [ns - round(level * cost) for ns, counted in zip(entry["ns"], self._counted, strict=True) if counted]


class _Pair(NamedTuple):
    """A run with profiling, one without it right after, and whether the kernel took a core away meanwhile."""

    run: int
    plain_ns: int
    lost: bool


def _dtype(types: list[dict[str, Any]]) -> str:
    name = next(iter(types[0]), "")
    return _DTYPES.get(f"tensor({name})", name)


_KERNEL = "_kernel_time"


def _write_profile(options: Any, folder: str, name: str) -> None:
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(folder, name))


def _kernel_events(path: str) -> Iterator[dict[str, Any]]:
    """One operator of one run each, from a trace in the format of Chrome's viewer: a JSON array with one event a line."""
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            if _KERNEL in line:
                yield json.loads(line.rstrip().rstrip(","))
    Path(path).unlink()


def _outermost(events: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without those that ran inside another."""
    kept: list[dict[str, Any]] = []
    end = -1
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        if event["ts"] >= end:
            kept.append(event)
            end = event["ts"] + event["dur"]
    return kept


def _nanoseconds(event: dict[str, Any]) -> int:
    """The middle of the microsecond that the time of ``event`` was rounded down from."""
    return int(event["dur"]) * _NS_PER_US + _NS_PER_US // 2


def _timed(session: Any, feed: dict[str, Any]) -> tuple[int, bool]:
    """Nanoseconds of a run, and whether the kernel took a core away from this process meanwhile (involuntary context switches, getrusage(2))."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    start = time.perf_counter_ns()
    session.run(None, feed)
    nanoseconds = time.perf_counter_ns() - start
    return nanoseconds, resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw > before


class _Chains:
    """What profiling adds to the time of a trivial operator, by how many tensors it reads and gives: a line through two chains of such operators."""

    LENGTH = 64
    READS = (1, 8)
    RUNS = 3
    SHAPE = (1, 4, 4, 16)

    def __init__(self, threads: int, folder: str) -> None:
        self._input: dict[str, Any] = {"x": np.ones(self.SHAPE, np.float32)}
        self._single = self._chain(1, 1, threads)
        self._plain = [self._chain(self.LENGTH, reads, threads) for reads in self.READS]
        self._profiled = [self._chain(self.LENGTH, reads, threads, folder) for reads in self.READS]
        self._call: list[int] = []
        self._plain_ns: list[list[int]] = [[] for _ in self.READS]

    def _chain(self, length: int, reads: int, threads: int, folder: str = "") -> Any:
        options = _options(threads)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if folder:
            _write_profile(options, folder, f"chain-{reads}")
        return _session(_chain(length, reads, self.SHAPE), options)

    def sample(self) -> None:
        """Run every chain a few times."""
        for _ in range(self.RUNS):
            self._call.append([_timed(self._single, self._input)[0] for _ in range(_PLAIN_RUNS)][-1])
            for plain, profiled, times in zip(self._plain, self._profiled, self._plain_ns, strict=True):
                times.append(_timed(plain, self._input)[0])
                profiled.run(None, self._input)

    def call_ns(self) -> float:
        """What a run takes beside its operators."""
        return float(np.median(self._call))

    def cost_ns(self, tensors: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Numbers of tensors -> nanoseconds. Ends profiling."""
        costs = []
        for profiled, times in zip(self._profiled, self._plain_ns, strict=True):
            seen = [_nanoseconds(event) for event in _kernel_events(profiled.end_profiling())]
            costs.append(median_grouped(seen, interval=_NS_PER_US) - (float(np.median(times)) - self.call_ns()) / self.LENGTH)
        slope = (costs[1] - costs[0]) / (self.READS[1] - self.READS[0])
        return np.asarray(costs[0] + slope * (tensors - 1 - self.READS[0]), dtype=np.float64)


class _Node(NamedTuple):
    name: str
    kind: str
    inputs: list[str]
    outputs: list[str]
    source: str


_CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_ACTIVATIONS = frozenset({"Clip", "HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Tanh"})
_SOURCE = "edgesmith.source"
_INHERITANCE_STEPS = 4


class _Tracing:
    """Finds which nodes of the ``original`` graph each node of the ``optimised`` one computes.

    An optimised node is identified with the original tensors that it gives: by their names, or by its own, which the runtime's fusions derive from a
    node or a tensor that they replace. It computes the nodes from those tensors back to tensors that are identified with others.
    """

    def __init__(self, original: Sequence[_Node], optimised: Sequence[_Node]) -> None:
        self.original, self.optimised = original, optimised
        self.producer = {tensor: number for number, node in enumerate(original) for tensor in node.outputs}
        self.readers, self.optimised_readers = _readers(original), _readers(optimised)
        self.makers = {tensor: number for number, node in enumerate(optimised) for tensor in node.outputs}
        by_name = {node.name: node.outputs for node in original}
        exact = [[t for t in node.outputs if t in self.producer] for node in optimised]
        self.given = [tensors or self._named_after(node.name, by_name) for node, tensors in zip(optimised, exact, strict=True)]
        self.owner = {tensor: number for number, tensors in enumerate(self.given) for tensor in tensors}
        for number, tensors in enumerate(exact):
            if not tensors:
                self._extend(number)

    def _named_after(self, name: str, by_name: dict[str, list[str]]) -> list[str]:
        """The results of the original node, or the original tensor, with whose name ``name`` begins; the longest such."""
        for end in range(len(name), 0, -1):
            if end == len(name) or name[end] in "/_":
                if name[:end] in by_name:
                    return by_name[name[:end]]
                if name[:end] in self.producer:
                    return [name[:end]]
        return []

    def _extend(self, number: int) -> None:
        """A fusion may be named after its first node: follow the tensor through what nobody else has and only this node can have computed."""
        added = False
        while len(self.given[number]) == 1 and len(self.readers.get(self.given[number][0], ())) == 1:
            (tensor,) = self.given[number]
            follower = self.original[self.readers[tensor][0]]
            others = [t for t in follower.inputs if t in self.producer and t != tensor]
            same = not others and follower.source == self.original[self.producer[tensor]].source
            activates = added and not others and follower.kind in _ACTIVATIONS
            adds = bool(others) and self._reads_alone(number, others)
            if any(t in self.owner for t in follower.outputs) or not (same or activates or adds):
                return
            added = added or adds
            self.given[number] = follower.outputs
            self.owner.update(dict.fromkeys(follower.outputs, number))

    def _reads_alone(self, number: int, tensors: Sequence[str]) -> bool:
        """Whether the optimised node reads ``tensors``, and no reader of its own results does."""
        node = self.optimised[number]
        owners = {self.owner.get(tensor, -1) for tensor in tensors}
        further = {reader for tensor in node.outputs for reader in self.optimised_readers.get(tensor, ())}
        return owners <= self._sources_of(node) and not any(owners & self._sources_of(self.optimised[reader]) for reader in further)

    def _sources_of(self, node: _Node) -> set[int]:
        return {self.makers[tensor] for tensor in node.inputs if tensor in self.makers}

    def computed(self, number: int) -> list[_Node]:
        """The original nodes that the optimised node computes, in order; conversions only where there is nothing else."""
        borders = {tensor for tensor in self.optimised[number].inputs if tensor in self.producer}
        reached: set[int] = set()
        waiting = [self.producer[tensor] for tensor in self.given[number]]
        while waiting:
            found = waiting.pop()
            if found not in reached:
                reached.add(found)
                inputs = (t for t in self.original[found].inputs if t in self.producer and t not in borders)
                waiting += [self.producer[t] for t in inputs if self.owner.get(t, number) == number]
        nodes = [self.original[found] for found in sorted(reached)]
        return [node for node in nodes if node.kind not in _CONVERSIONS] or nodes


def _sources(original: Sequence[_Node], optimised: Sequence[_Node]) -> dict[str, list[str]]:
    """Name of an optimised node -> source paths of what it computes of the original graph.

    What the runtime adds on its own (layout copies, reshapes) belongs to the node that reads it, else to the one that it reads.
    """
    if not any(node.source for node in original):
        return {}
    tracing = _Tracing(original, optimised)
    computed = [tracing.computed(number) for number in range(len(optimised))]
    found = {node.name: list(dict.fromkeys(n.source for n in nodes if n.source)) for node, nodes in zip(optimised, computed, strict=True)}
    added = [node for node, nodes in zip(optimised, computed, strict=True) if not nodes]
    for _ in range(_INHERITANCE_STEPS):
        for node in added:
            near = [optimised[number].name for tensor in node.outputs for number in tracing.optimised_readers.get(tensor, ())]
            near += [optimised[tracing.makers[tensor]].name for tensor in node.inputs if tensor in tracing.makers]
            found[node.name] = found[node.name] or next((found[name] for name in near if found[name]), [])
    return found


def _readers(nodes: Sequence[_Node]) -> dict[str, list[int]]:
    """Tensor -> numbers of the nodes that read it."""
    found: dict[str, list[int]] = {}
    for number, node in enumerate(nodes):
        for tensor in node.inputs:
            found.setdefault(tensor, []).append(number)
    return found


def _nodes(path: str | Path) -> list[_Node]:
    """The nodes of an .onnx file; fields by their numbers in onnx.proto."""
    content: Any = np.memmap(path, dtype=np.uint8, mode="r")
    (graph,) = (value for number, value in _fields(memoryview(content)) if number == 7)
    return [_node(value) for number, value in _fields(graph) if number == 1]


def _node(data: memoryview) -> _Node:
    fields: dict[int, list[Any]] = {}
    for number, value in _fields(data):
        fields.setdefault(number, []).append(value)
    inputs, outputs, names, kinds = ([str(value, "utf-8") for value in fields.get(number, ())] for number in (1, 2, 3, 4))
    properties = (dict(_fields(entry)) for entry in fields.get(9, ()))
    source = next((str(p[2], "utf-8") for p in properties if str(p[1], "utf-8") == _SOURCE), "")
    return _Node(names[0] if names else "", kinds[0], inputs, outputs, source)


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffer: integers, and bytes of strings and messages; numbers of fixed size are passed over."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
        elif key & 7 == 2:
            size, at = _varint(data, at)
            yield key >> 3, data[at : at + size]
            at += size
        else:
            at += {1: 8, 5: 4}[key & 7]


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _chain(length: int, reads: int, shape: Sequence[int]) -> bytes:
    """An .onnx file of ``length`` sums of ``reads`` tensors each, one after the other."""

    def port(name: str) -> bytes:
        dimensions = b"".join(_field(1, _field(1, size)) for size in shape)
        return _field(1, name) + _field(2, _field(1, _field(1, 1) + _field(2, dimensions)))

    tensors = ["x", *(f"blocks.{number}.attention.values" for number in range(1, length)), "y"]
    nodes = b"".join(
        _field(1, b"".join(_field(1, name) for name in [read, *["x"] * (reads - 1)]) + _field(2, gives) + _field(3, f"{gives}/Sum") + _field(4, "Sum"))
        for read, gives in itertools.pairwise(tensors)
    )
    graph = nodes + _field(2, "chain") + _field(11, port("x")) + _field(12, port("y"))
    return _field(1, 9) + _field(7, graph) + _field(8, _field(2, 20))


def _field(number: int, value: int | str | bytes) -> bytes:
    """One field of a protocol buffer."""
    if isinstance(value, int):
        return _encoded(number << 3) + _encoded(value)
    data = value.encode() if isinstance(value, str) else value
    return _encoded(number << 3 | 2) + _encoded(len(data)) + data


def _encoded(value: int) -> bytes:
    more, low = divmod(value, 128)
    return bytes([low | 128]) + _encoded(more) if more else bytes([low])
