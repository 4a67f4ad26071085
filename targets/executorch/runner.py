"""Runs one ``.pte`` file through ExecuTorch's Python bindings, or times its operators; needs the standard library, numpy and that runtime.

ExecuTorch's bindings are linked against torch's Python library and exchange torch tensors, so torch is imported too (about
200 MB of resident memory; the bindings alone add 3 MB). A file's own memory is therefore the increase over this process
without a session. The bindings module is imported by itself, past ``executorch.runtime``, whose import pulls in the whole
exporter: 140 MB and five seconds more. ``Profiler`` needs the folder ``profiling`` beside this file, ``Session`` nothing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

_DTYPES = {0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 7: "float64", 11: "bool", 15: "bfloat16"}
"""The runtime's ScalarType codes."""

SIGNATURE = "edgesmith_signature"
"""A constant method of the file: JSON with the names of its inputs and outputs."""
SOURCES = "edgesmith_sources"
"""Likewise: JSON with source paths, under ``kernels`` by number of instruction, under ``operators`` by debug handle of a delegate's operator, under
``inputs`` and ``outputs`` of what reads and makes them."""


class Session:
    """A loaded ``.pte`` file. ``inputs`` and ``outputs`` describe the tensors of its method ``forward``, in order.

    Args:
        path: the file.
        threads: size of the runtime's thread pool, which all sessions of the process share: the latest one sets it.

    Raises:
        RuntimeError: the runtime refuses the file, or the thread pool cannot have that size.
    """

    runtime_version: str
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]

    def __init__(self, path: str, threads: int) -> None:
        import torch  # the bindings cannot be loaded without it
        from executorch.extension.pybindings import _portable_lib as runtime

        runtime._unsafe_reset_threadpool(threads)
        if runtime._threadpool_get_thread_count() != threads:
            raise RuntimeError(f"the thread pool has {runtime._threadpool_get_thread_count()} threads, not {threads}")
        self.runtime_version = importlib.metadata.version("executorch")
        self._from_numpy = torch.from_numpy
        self._program = runtime._load_program(path, program_verification=runtime.Verification.InternalConsistency)
        self.method = self._program.load_method("forward")
        meta = self.method.method_meta()
        names = self.note(SIGNATURE)
        self.inputs = [_described(meta.input_tensor_meta(i), names.get("inputs", {}), f"input_{i}", i) for i in range(meta.num_inputs())]
        self.outputs = [_described(meta.output_tensor_meta(i), names.get("outputs", {}), f"output_{i}", i) for i in range(meta.num_outputs())]
        self.wanted = [(tuple(spec["shape"]), np.dtype(spec["dtype"])) for spec in self.inputs]

    def note(self, method: str) -> Any:
        """What edgesmith wrote into the file as constant method ``method``; empty in a file of others."""
        methods = {self._program.get_method_name(i) for i in range(self._program.num_methods())}
        return json.loads(self._program.load_method(method)()[0]) if method in methods else {}

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """One inference.

        Args:
            inputs: one array per entry of ``self.inputs``, of exactly its shape and dtype.

        Returns:
            One fresh array per entry of ``self.outputs``.

        Raises:
            ValueError: a wrong number of inputs, a wrong shape or dtype.
        """
        return [result.numpy() for result in self.method(self.tensors(inputs))]

    def tensors(self, inputs: list[np.ndarray]) -> list[Any]:
        """``inputs`` as the bindings take them.

        Raises:
            ValueError: as of ``run``.
        """
        if len(inputs) != len(self.wanted):
            raise ValueError(f"{len(inputs)} inputs given, the file takes {len(self.wanted)}")
        for place, (array, (shape, dtype)) in enumerate(zip(inputs, self.wanted, strict=True)):
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{self.inputs[place]['name']} is {array.dtype}{list(array.shape)}, the file takes {dtype}{list(shape)}")
        return [self._from_numpy(a if a.flags.c_contiguous and a.flags.writeable else np.require(a, requirements=["C", "W"])) for a in inputs]


def _described(tensor: Any, names: Any, default: str, index: int) -> dict[str, Any]:
    return {"name": names[index] if names else default, "shape": list(tensor.sizes()), "dtype": _DTYPES[tensor.dtype()]}


class Profiler:
    """Times the operators of a ``.pte`` file by running parts of it.

    ExecuTorch's package comes without its event tracer (and XNNPACK's delegate without its profiling), so that the runtime times nothing below a
    whole method. Here the file is cut into segments of consecutive operators, and of each segment the first one, the first two ... operators are run as
    methods of their own, on the tensors that the file itself computes there: what an operator adds to the one before is its time. Operators that the
    runtime fuses with their neighbours or drops therefore take no time of their own. Segments are run one after the other as in the file, so that caches
    hold what they hold then. Taking the inputs and giving the outputs are entries too.

    Args:
        path: the file.
        threads: as of ``Session``.

    Raises:
        RuntimeError: as of ``Session``.
        NotImplementedError: the file cannot be cut, and why.
    """

    method = "truncated graphs"
    repeats = 4
    """Runs of each part for one run of the file; the first is warm-up, the median of the others counts."""
    segment_ns = 1e6
    least_units, most_units = 8, 96
    """Where a segment ends, tensors are copied that otherwise are not, so segments are not short."""
    most_idle = 32
    """Methods that do nothing, between the parts, for what any call costs."""
    tolerance = 1e-3
    """Of the largest output: XNNPACK may fuse otherwise at the ends of segments."""
    most_bytes = 1e9
    """Of constants that the runtime packs anew for each part."""

    def __init__(self, path: str, threads: int) -> None:
        import torch
        from executorch.extension.pybindings import _portable_lib as runtime

        self._session = Session(path, threads)
        self._sources = self._session.note(SOURCES)
        content = Path(path).read_bytes()
        segments = max(1, round(self._guess_ns() / self.segment_ns))
        pieces = _profiling("pieces")
        package = Path(runtime.__file__).parents[2]
        self._cut = pieces.cut(content, package, segments, self.least_units, self._most_units(len(content)))
        self._program = runtime._load_program_from_buffer(self._cut.content, program_verification=runtime.Verification.InternalConsistency)
        self._full = [piece for piece in self._cut.pieces if piece.count == len(self._cut.segments[piece.segment].units)]
        rest = [piece for piece in self._cut.pieces if piece not in self._full]
        self._phases = [self._full, *([p for p in rest if p.count == count] for count in range(max((p.count for p in rest), default=0), 0, -1))]
        self._methods = {piece.method: self._program.load_method(piece.method) for piece in self._cut.pieces}
        self._idle = [(name, self._program.load_method(name)) for _ in self._full[: self.most_idle] for name in (pieces.EMPTY, pieces.NULL_DELEGATE)]
        number = [torch.zeros(1)]
        for _, method in self._idle[1::2]:
            method.set_inputs(number)
        self._ns: dict[str, list[float]] = {}

    def _most_units(self, size_bytes: int) -> int:
        """A segment of n units packs constants as of (n + 1) / 2 segments."""
        return max(1, min(self.most_units, int(2 * self.most_bytes / size_bytes)))

    def _guess_ns(self) -> int:
        zeros = [np.zeros(shape, dtype) for shape, dtype in self._session.wanted]
        taken = []
        for _ in range(self.repeats):
            start = time.perf_counter_ns()
            self._session.run(zeros)
            taken.append(time.perf_counter_ns() - start)
        return min(taken)

    def run(self, inputs: list[np.ndarray]) -> None:
        """One inference, whole and in all its parts, each some times over.

        Raises:
            ValueError: as of ``Session.run``.
            RuntimeError: the parts together do not compute what the file computes.
        """
        given = self._session.tensors(inputs)
        wanted = self._whole(given)
        values = dict(zip(self._cut.inputs, given, strict=True))
        for piece in self._full:
            method = self._methods[piece.method]
            method.set_inputs([values[key] for key in piece.inputs])
            method.execute()
            values.update(zip(piece.outputs, method.get_outputs(), strict=True))
        for key, tensor in zip(self._cut.outputs, wanted, strict=True):
            if not np.allclose(values[key].numpy(), tensor.numpy(), rtol=self.tolerance, atol=self.tolerance * float(tensor.abs().max()), equal_nan=True):
                raise RuntimeError("the file's parts, run one by one, do not compute what the file computes")
        for phase in self._phases:
            for piece in phase:
                self._methods[piece.method].set_inputs([values[key] for key in piece.inputs])
            methods = [(piece.method, self._methods[piece.method]) for piece in phase]
            self._time(methods if phase is not self._full else _mixed(methods, self._idle))

    def _whole(self, given: list[Any]) -> list[Any]:
        """Run the whole file; its outputs."""
        clock, method = time.perf_counter_ns, self._session.method
        stamps = []
        outputs: list[Any] = []
        for _ in range(self.repeats):
            start = clock()
            method.set_inputs(given)
            ready = clock()
            method.execute()
            done = clock()
            outputs = method.get_outputs()
            stamps.append((start, ready, done, clock()))
        for name, column in zip((_SET, _EXECUTE, _GET), np.diff(stamps, axis=1).T, strict=True):
            self._note(name, column[1:])
        return outputs

    def _time(self, methods: list[tuple[str, Any]]) -> None:
        """Run ``methods``, whose inputs are set, one after the other, some times over."""
        clock = time.perf_counter_ns
        taken: dict[str, list[int]] = {name: [] for name, _ in methods}
        for repeat in range(self.repeats):
            for name, method in methods:
                start = clock()
                method.execute()
                stop = clock()
                if repeat:
                    taken[name].append(stop - start)
        for name, series in taken.items():
            self._note(name, series)

    def _note(self, name: str, taken: Any) -> None:
        self._ns.setdefault(name, []).append(float(np.median(taken)))

    def operators(self) -> list[dict[str, Any]]:
        """What ran, in order, and its nanoseconds in every run: its share of its segment's time over all runs, of the segment's time in that run."""
        rows = [_entry(_SET, _SET, self._ns[_SET], self._sources.get("inputs", []))]
        for number, segment in enumerate(self._cut.segments):
            times = [self._nothing(number), *(np.asarray(self._ns[p.method]) for p in self._cut.pieces if p.segment == number)]
            for unit, ns in zip(segment.units, _shared(times), strict=True):
                entry = _entry(f"{unit.kind} {len(rows)}", unit.kind, ns, self._paths(unit))
                rows.append({**entry, "delegate": unit.delegate, "dtype": _DTYPES[unit.scalar_type]})
        return [*rows, _entry(_GET, _GET, self._ns[_GET], self._sources.get("outputs", []))]

    def _nothing(self, number: int) -> Any:
        """What a run of segment ``number`` costs that the file's own run has not got there: the call of a method, and of a delegate already called."""
        segment = self._cut.segments[number]
        series = np.asarray(self._ns[self._idle[int(bool(segment.units[0].delegate) and not segment.opens)][0]])
        return series if number else np.zeros(len(series))

    def _paths(self, unit: Any) -> list[str]:
        if not unit.delegate:
            found = [self._sources.get("kernels", {}).get(str(unit.instruction))]
        else:
            found = [self._sources.get("operators", {}).get(str(handle)) for handle in unit.handles]
        return [path for path in dict.fromkeys(found) if path]


_SET, _EXECUTE, _GET = "set_inputs", "execute", "get_outputs"


def _entry(name: str, kind: str, ns: Any, sources: list[str]) -> dict[str, Any]:
    return {"name": name, "kind": kind, "ns": [round(value) for value in ns], "sources": sources, "delegate": "", "dtype": ""}


def _mixed(some: list[tuple[str, Any]], others: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Both lists in one, in their order, evenly."""
    placed = [(place / len(items), item) for items in (some, others) for place, item in enumerate(items)]
    return [item for _, item in sorted(placed, key=lambda pair: pair[0])]


def _shared(times: list[Any]) -> list[Any]:
    """Each unit's nanoseconds in every run, from those of nothing, the first, the first two ... units, which cannot fall.

    Shares are taken from the lower quartiles, which other load on the machine disturbs least.
    """
    quiet = _rising([float(np.quantile(series, 0.25)) for series in times])
    total = quiet[-1] - quiet[0]
    whole = np.maximum(times[-1] - times[0], 0)
    return [whole * (after - before) / total if total else np.zeros(len(whole)) for before, after in pairwise(quiet)]


def _rising(values: list[float]) -> list[float]:
    """The rising sequence nearest to ``values`` by squares: pool adjacent violators (Ayer et al., 1955)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] >= mean:
            earlier, size = pools.pop()
            mean, count = (earlier * size + mean * count) / (size + count), size + count
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def _profiling(module: str) -> Any:
    """Module ``module`` of the folder ``profiling`` beside this file, which is no part of a package here."""
    name = "edgesmith_executorch_profiling"
    if name not in sys.modules:
        folder = Path(__file__).with_name("profiling")
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(f"{name}.{module}")
