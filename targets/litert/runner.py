"""Runs a ``.tflite`` file, or times its operators. Needs the standard library, numpy and ai-edge-litert; nothing of edgesmith."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from ctypes import byref, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ai_edge_litert
import numpy as np
from ai_edge_litert.interpreter import Interpreter

Array = np.ndarray[Any, Any]

SOURCE_MARK = "layer:"
"""What a source path in a tensor's name begins with, as targets/litert/sources.py writes it."""
PLAIN_EVERY, PLAIN_CALLS = 8, 3
"""One in so many profiled calls is followed by so many plain ones."""
MEAN_CUT_OFF_NS = 500
LEAST_LEVEL = 0.75
"""What plain calls take of a compiled model's operators at least: scaling explains no more than was ever seen (0.87) and some."""
CPU, MAX_RANK, ALIGNMENT = 1, 8, 64
"""The accelerator, the tensor's limit and the alignment of buffers, of litert/c/litert_common.h, litert_layout.h and litert_tensor_buffer_types.h."""
ELEMENT_TYPES = {"float32": 1, "int32": 2, "uint8": 3, "int64": 4, "bool": 6, "int16": 7, "int8": 9, "float16": 10, "float64": 11}
NODE, DELEGATED = 2, 8
"""Kinds of events: an operator of the file that LiteRT ran itself, and one of a delegate, which has names and numbers of its own."""
EVENT = np.dtype(
    {
        "names": ["tag", "type", "start_us", "us", "memory", "number", "extra", "source"],
        "formats": [np.uintp, np.int32, np.uint64, np.uint64, (np.uintp, 6), np.uint64, np.uint64, np.int32],
    },
    align=True,
)
"""``ProfiledEventData`` of litert/c/litert_profiler_event.h."""
OWN, HELPER, OTHER, FURTHER, WITHOUT = 0, 2, 8, 1, 2
"""What it costs to say that an operator of XNNPACK belongs to one of the file: to one that it computes, that it moves or converts values for, to any other;
not as its first; and that one of the file has none."""
HELPERS = frozenset({"Static Reshape", "Transpose", "Convert", "Copy", "Constant Pad", "Clamp"})
FOLLOWING = frozenset({"Clamp"})
"""Helpers that come behind what they help."""
FEEDING = frozenset({"DEQUANTIZE", "PAD"})
"""Operators of a file that are fused into what reads them, never into what they read."""
UNARY = "ABS CEIL COS ELU EXP FLOOR GELU HARD_SWISH LEAKY_RELU LOG LOGISTIC NEG RELU RELU6 RELU_N1_TO_1 ROUND RSQRT SIN SQRT SQUARE TANH"
COMPUTES = {
    "ApproxGELU": "GELU",
    "Average Pooling": "AVERAGE_POOL_2D MEAN",
    "Bankders Rounding": "ROUND",
    "Batch Matrix Multiply": "BATCH_MATMUL FULLY_CONNECTED",
    "Ceiling": "CEIL",
    "Clamp": "RELU RELU6 RELU_N1_TO_1 RELU_0_TO_1",
    "Constant Pad": "PAD PADV2",
    "Convert": "QUANTIZE DEQUANTIZE CAST",
    "Convolution": "CONV_2D DEPTHWISE_CONV_2D",
    "Copy": "CONCATENATION SPLIT RESHAPE",
    "Cosine": "COS",
    "Deconvolution": "TRANSPOSE_CONV",
    "Divide": "DIV",
    "Dynamic Fully Connected": "FULLY_CONNECTED BATCH_MATMUL",
    "Fully Connected": "FULLY_CONNECTED CONV_2D BATCH_MATMUL",
    "Invalid Unary Op": UNARY,
    "LeakyReLU": "LEAKY_RELU",
    "Max Pooling": "MAX_POOL_2D",
    "Multiply": "MUL",
    "Negate": "NEG",
    "Reciprocal Square Root": "RSQRT",
    "Sigmoid": "LOGISTIC",
    "Sine": "SIN",
    "Slice": "SLICE STRIDED_SLICE SPLIT",
    "Square Root": "SQRT",
    "Static Reshape": "RESHAPE EXPAND_DIMS",
    "Subtract": "SUB",
    "Unary Elementwise": UNARY,
}
"""Operators of XNNPACK, and those of a file that they compute where that is not their own name in capitals."""

NO_KERNEL = ("Didn't find op for builtin opcode", "operations are currently supported for stablehlo")
"""What the runtime says of a file that holds what it has no kernel for."""


class Session:
    """One loaded file.

    Args:
        path: the ``.tflite`` file.
        threads: number of threads of the runtime.

    ``inputs`` and ``outputs`` are in the file's own order: ``{"name", "shape", "dtype"}`` with numpy's name of the dtype.
    """

    def __init__(self, path: str, threads: int) -> None:
        self.runtime_version: str = version("ai-edge-litert")
        try:
            self._interpreter: Any = Interpreter(model_path=str(path), num_threads=threads)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            if any(said in str(error) for said in NO_KERNEL):
                raise NotImplementedError(str(error).strip().splitlines()[0]) from error
            raise
        self._in: list[dict[str, Any]] = self._interpreter.get_input_details()
        self._out: list[dict[str, Any]] = self._interpreter.get_output_details()
        signature: dict[str, Any] = next(iter(self._interpreter._get_full_signature_list().values()), {"inputs": {}, "outputs": {}})
        self.inputs: list[dict[str, Any]] = _described(self._in, signature["inputs"])
        self.outputs: list[dict[str, Any]] = _described(self._out, signature["outputs"])

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """The outputs for ``inputs``, both in the file's order.

        Raises:
            ValueError: the number, a shape or a dtype of ``inputs`` is not the file's.
        """
        for detail, value in zip(self._in, inputs, strict=True):
            self._interpreter.set_tensor(detail["index"], value)
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(detail["index"]) for detail in self._out]


def _described(details: list[dict[str, Any]], signature: dict[str, int]) -> list[dict[str, Any]]:
    names: dict[int, list[str]] = {}
    for name, index in signature.items():
        names.setdefault(index, []).append(name)
    return [
        {
            "name": names[d["index"]].pop(0) if names.get(d["index"]) else d["name"],
            "shape": [int(size) for size in d["shape"]],
            "dtype": np.dtype(d["dtype"]).name,
        }
        for d in details
    ]


class Profiler:
    """One loaded file whose operators LiteRT times: the profiler of its compiled models, by the C interface that the package brings.

    Args:
        path: the ``.tflite`` file.
        threads: number of threads of the runtime.

    Times are those in the plain interpreter, whose calls in between tell how long all operators together take there. Where the compiled model takes
    longer, which it does when its caches are under pressure, its operators are scaled down to that, by a quarter at most. Where they take less, it is
    because XNNPACK tells whole microseconds, cut off: what is missing is shared out evenly, so that no operator's time is off by more than a
    microsecond.

    Raises:
        RuntimeError: the package lacks the interface, LiteRT refuses the file, or it has several subgraphs, whose operators cannot be told apart.
    """

    method = "instrumented"

    def __init__(self, path: str, threads: int) -> None:
        self._session = Session(path, threads)
        self._interpreter = self._session._interpreter
        if self._interpreter.num_subgraphs() > 1:
            raise RuntimeError(f"operators are timed in files of one subgraph; this one has {self._interpreter.num_subgraphs()}")
        self._compiled = _Compiled(path, threads, self._session._in, self._session._out)
        self._events: list[_Event] = []
        self._readings_us: list[Array] = []
        self._plain: list[tuple[int, float]] = []

    def run(self, inputs: list[np.ndarray]) -> None:
        """One timed inference; after one in eight, a few plain ones.

        Raises:
            ValueError: the number, a shape or a dtype of ``inputs`` is not the file's.
            RuntimeError: not the same operators ran as in the first inference.
        """
        for memory, value in zip(self._compiled.inputs, inputs, strict=True):
            if memory.shape != value.shape or memory.dtype != value.dtype:
                raise ValueError(f"an input is {memory.dtype} {memory.shape}, not {value.dtype} {value.shape}")
            memory[...] = value
        found = self._compiled.run()
        if not self._events:
            self._events = [_Event(ctypes.string_at(int(e["tag"])).decode(), int(e["number"]), bool(e["type"] == DELEGATED)) for e in found]
        if [event.number for event in self._events] != found["number"].tolist():
            raise RuntimeError("not the same operators run each time")
        self._readings_us.append(found["us"])
        if len(self._readings_us) % PLAIN_EVERY == PLAIN_EVERY // 2:
            self._session.run(inputs)
            self._plain.append((len(self._readings_us), float(np.median([self._call_ns() for _ in range(PLAIN_CALLS)]))))

    def _call_ns(self) -> int:
        start = time.perf_counter_ns()
        self._interpreter.invoke()
        return time.perf_counter_ns() - start

    def operators(self) -> list[dict[str, Any]]:
        """What ran, in order, with its nanoseconds in every run. ``name``: the operators of the file that it computes, by kind and number."""
        self._compiled.close()
        nanoseconds = self._in_plain_calls(np.stack(self._readings_us, axis=1) * 1000.0)
        return [
            {
                "name": " + ".join(f"{op.kind} {op.number}" for op in ops) or event.tag,
                "kind": event.tag,
                "ns": row.tolist(),
                "sources": list(dict.fromkeys(source for op in ops for source in op.sources)),
                "delegate": "XNNPACK" if event.delegated else "",
                "dtype": ops[-1].dtype if ops else "",
            }
            for event, ops, row in zip(self._events, _computed(self._events, self._interpreter), nanoseconds, strict=True)
        ]

    def _in_plain_calls(self, nanoseconds: Array) -> Array:
        """[operators, runs] as read -> what they would be in plain calls."""
        total = nanoseconds.sum(axis=0)
        around = [slice(max(0, run - PLAIN_EVERY // 2), run + PLAIN_EVERY // 2) for run, _ in self._plain]
        level = np.median([plain_ns / np.median(total[runs]) for runs, (_, plain_ns) in zip(around, self._plain, strict=True)]) if around else 1.0
        delegated = np.array([event.delegated for event in self._events], dtype=bool)
        cut_off = max(0.0, level - 1) * np.median(total) / max(1, delegated.sum())
        found: Array = nanoseconds * np.clip(level, LEAST_LEVEL, 1.0) + min(cut_off, MEAN_CUT_OFF_NS) * delegated[:, None]
        return found


class _Compiled:
    """A compiled model of LiteRT's C interface with its profiler on. ``inputs`` and ``outputs`` are its buffers, in the file's order."""

    def __init__(self, path: str, threads: int, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        found = sorted(Path(ai_edge_litert.__file__).parent.glob("libLiteRt.*"))
        if not found:
            raise RuntimeError(f"ai-edge-litert {version('ai-edge-litert')} brings no libLiteRt, which times operators")
        self._library = ctypes.CDLL(str(found[0]))
        self._environment = self._made("LiteRtCreateEnvironment", 0, None)
        self._file = self._made("LiteRtCreateModelFromFile", self._environment, str(path).encode())
        self._options = self._made("LiteRtCreateOptions")
        self._call("LiteRtSetOptionsHardwareAccelerators", self._options, CPU)
        self._texts = ((b"runtime_options_string", b"enable_profiling = true"), (b"xnnpack", f"num_threads = {threads}".encode()))
        self._keep = ctypes.CFUNCTYPE(None, c_void_p)(lambda _: None)
        for name, text in self._texts:
            self._call("LiteRtAddOpaqueOptions", self._options, self._made("LiteRtCreateOpaqueOptions", name, text, self._keep))
        self._model = self._made("LiteRtCreateCompiledModel", self._environment, self._file, self._options)
        self._profiler = self._made("LiteRtCompiledModelGetProfiler", self._model)
        self._buffers: dict[int, tuple[Array, c_void_p]] = {}
        self.inputs = [self._buffer(detail)[0] for detail in inputs]
        self.outputs = [self._buffer(detail)[0] for detail in outputs]
        handles = [[self._buffer(detail)[1].value for detail in details] for details in (inputs, outputs)]
        self._ports = [port for row in handles for port in (c_size_t(len(row)), (c_void_p * len(row))(*row))]

    def run(self) -> Array:
        """The events of one inference that are operators."""
        self._call("LiteRtStartProfiler", self._profiler)
        self._call("LiteRtRunCompiledModel", self._model, c_size_t(0), *self._ports)
        count = c_int()
        self._call("LiteRtGetNumProfilerEvents", self._profiler, byref(count))
        events = np.zeros(count.value, EVENT)
        self._call("LiteRtGetProfilerEvents", self._profiler, count, c_void_p(events.ctypes.data))
        return events[np.isin(events["type"], (NODE, DELEGATED))]

    def close(self) -> None:
        """Give everything back."""
        for _, handle in self._buffers.values():
            self._library.LiteRtDestroyTensorBuffer(handle)
        self._library.LiteRtDestroyCompiledModel(self._model)
        self._library.LiteRtDestroyOptions(self._options)
        self._library.LiteRtDestroyModel(self._file)
        self._library.LiteRtDestroyEnvironment(self._environment)

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise RuntimeError(f"{function} failed with status {status}")

    def _made(self, function: str, *arguments: Any) -> c_void_p:
        """What ``function`` writes to its last argument."""
        made = c_void_p()
        self._call(function, *arguments, byref(made))
        return made

    def _buffer(self, detail: dict[str, Any]) -> tuple[Array, c_void_p]:
        """An array for a tensor, and the runtime's handle of it; the same for inputs and outputs that are one tensor."""
        index = int(detail["index"])
        if index not in self._buffers:
            shape, dtype = detail["shape"], np.dtype(detail["dtype"])
            size = int(np.prod(shape)) * dtype.itemsize
            raw = np.zeros(size + 2 * ALIGNMENT, np.uint8)
            start = -raw.ctypes.data % ALIGNMENT
            array = raw[start : start + size].view(dtype).reshape(shape)
            described = np.array([ELEMENT_TYPES[dtype.name], len(shape), *shape, *[0] * (2 * MAX_RANK - len(shape))], np.int32)
            place = (c_void_p(described.ctypes.data), c_void_p(array.ctypes.data), c_size_t(size), None)
            self._buffers[index] = array, self._made("LiteRtCreateTensorBufferFromHostMemory", *place)
        return self._buffers[index]


@dataclass(frozen=True)
class _Event:
    """An operator that was timed. ``number``: of the file's operator, or within its part of the file when a delegate ran it."""

    tag: str
    number: int
    delegated: bool


@dataclass(frozen=True)
class _Op:
    """An operator of the file; ``reads`` and ``writes`` are tensor numbers."""

    kind: str
    number: int
    reads: frozenset[int]
    writes: frozenset[int]
    dtype: str
    sources: tuple[str, ...]


def _computed(events: Sequence[_Event], interpreter: Any) -> list[list[_Op]]:
    """For each event the operators of the file that it computes; none where that cannot be told."""
    tensors = {int(t["index"]): t for t in interpreter.get_tensor_details()}
    ops = [_op(row, tensors) for row in interpreter._get_ops_details()]
    own = {event.number for event in events if not event.delegated}
    parts = [_part(op, [other for other in ops if other.kind != "DELEGATE" and other.number not in own]) for op in ops if op.kind == "DELEGATE"]
    starts = [i for i, event in enumerate(events) if event.delegated and event.number == 0]
    found = [[ops[event.number]] if not event.delegated else [] for event in events]
    for start, part in zip(starts, parts, strict=False) if len(starts) == len(parts) else ():
        end = next((i for i in range(start + 1, len(events)) if not events[i].delegated or events[i].number == 0), len(events))
        if part:
            found[start:end] = _aligned(part, [event.tag for event in events[start:end]])
    return found


def _op(row: dict[str, Any], tensors: dict[int, dict[str, Any]]) -> _Op:
    reads, writes = (frozenset(int(i) for i in row[key] if i >= 0) for key in ("inputs", "outputs"))
    written = [tensors[i] for i in sorted(writes) if i in tensors]
    parts = [part for tensor in written for part in tensor["name"].split(";")]
    sources = tuple(part.removeprefix(SOURCE_MARK) for part in parts if part.startswith(SOURCE_MARK))
    return _Op(row["op_name"], int(row["index"]), reads, writes, np.dtype(written[0]["dtype"]).name if written else "", sources)


def _part(delegate: _Op, ops: Sequence[_Op]) -> list[_Op]:
    """Those of ``ops`` that ``delegate`` runs: what its outputs need, back to its inputs."""
    found: list[_Op] = []
    wanted = set(delegate.writes)
    for op in reversed(ops):
        if op.writes & wanted:
            found.append(op)
            wanted |= op.reads - delegate.reads
    return found[::-1]


def _aligned(ops: Sequence[_Op], tags: Sequence[str]) -> list[list[_Op]]:
    """For each operator of XNNPACK, by its name in ``tags``, the operators of the file that it computes: the cheapest assignment in order."""
    kinds, kind = np.unique([op.kind for op in ops], return_inverse=True)
    names, name = np.unique([tag.partition(" (")[0] for tag in tags], return_inverse=True)
    follows = np.isin(names, list(FOLLOWING))[name]
    price = np.array([[_price(str(k), str(n)) for n in names] for k in kinds])[kind][:, name]
    first, further = np.where(follows & (price > OWN), OTHER, price), price + np.where(follows, 0, FURTHER)
    best = np.full((len(ops) + 1, len(tags) + 1), len(ops) * OTHER + len(tags) * (OTHER + FURTHER))
    best[0, 0] = 0
    for i in range(len(ops)):
        shift = np.concatenate([[0], np.cumsum(further[i])])
        fresh = best[i] + WITHOUT
        fresh[1:] = np.minimum(fresh[1:], best[i, :-1] + first[i])
        best[i + 1] = np.minimum.accumulate(fresh - shift) + shift
    owners = [0] * len(tags)
    i, j = len(ops), len(tags)
    while i and j:
        if best[i, j] == best[i - 1, j] + WITHOUT:
            i -= 1
        elif best[i, j] == best[i, j - 1] + further[i - 1, j - 1]:
            j -= 1
            owners[j] = i - 1
        else:
            i, j = i - 1, j - 1
            owners[j] = i
    groups = _groups(ops, set(owners))
    return [groups[owner] for owner in owners]


def _price(kind: str, name: str) -> int:
    if kind in COMPUTES.get(name, name.upper().replace(" ", "_")).split() or kind.replace("_", "") == name.upper():
        return OWN
    return HELPER if name in HELPERS else OTHER


def _groups(ops: Sequence[_Op], owners: set[int]) -> dict[int, list[_Op]]:
    """Each owner with the operators that were fused into it: those that work on what it writes, and those that prepare what it reads."""
    groups: dict[int, list[_Op]] = {}
    waiting: list[_Op] = []
    last: list[_Op] = []
    for i, op in enumerate(ops):
        if i in owners:
            groups[i] = last = [*waiting, op]
            waiting = []
        elif op.kind not in FEEDING and any(op.reads & other.writes for other in last):
            last.append(op)
        else:
            waiting.append(op)
    last.extend(waiting)
    return groups
