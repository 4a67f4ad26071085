from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.data import PassData, Split
from edgesmith.compiler.errors import UnsupportedError
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.profile.operator_types import FAST, Category, Executed
from edgesmith.compiler.profile.operators import profile_operators
from edgesmith.compiler.testing import TinyConvNet, TinyTransformer, tiny_model
from edgesmith.passes.quantize.quantize import Quantize
from edgesmith.targets.executorch import ExecuTorch
from edgesmith.targets.executorch.profiling.pieces import cut
from edgesmith.targets.executorch.profiling.ptefile import PteFile
from edgesmith.targets.executorch.runner import SIGNATURE, SOURCES, Profiler, Session, _rising, _shared

PACKAGE = Path(str(pytest.importorskip("executorch.extension.pybindings._portable_lib").__file__)).parents[2]


class Lopsided(nn.Module):
    """Two products, the second of sixteen times the work, and between them an operator that XNNPACK does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Linear(64, 256), nn.Linear(256, 1024)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.large(torch.cumsum(self.small(x), dim=1))
        return out


@pytest.fixture(scope="module", params=[TinyTransformer, TinyConvNet])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    make = {TinyTransformer: lambda: TinyTransformer(depth=1)}.get(request.param, request.param)
    return make(), ExecuTorch().lower(tiny_model(make), tmp_path_factory.mktemp("operators"), "net").path


@pytest.fixture(scope="module")
def lopsided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = Model.from_module(Lopsided(), (torch.randn(2, 64, 64),))
    return ExecuTorch().lower(model, tmp_path_factory.mktemp("lopsided"), "net").path


@pytest.fixture(scope="module", params=["static", "dynamic"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network whose softmax XNNPACK has in float only."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.Softmax(-1), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    model = Model.from_module(module, (torch.randn(2, 64),))
    split = Split((np.random.default_rng(0).standard_normal((8, 64), dtype=np.float32),), np.zeros(8, np.int64))
    plan = Quantize(scheme=request.param, ranges="minmax", samples=8).run(model, PassContext(data=PassData(split, split))).model
    return ExecuTorch().lower(plan, tmp_path_factory.mktemp(request.param), request.param).path


def profiled(path: Path, runs: int) -> list[dict[str, Any]]:
    profiler = Profiler(str(path), threads=1)
    rng = np.random.default_rng(0)
    for _ in range(runs):
        profiler.run([rng.standard_normal(spec["shape"]).astype(spec["dtype"]) for spec in profiler._session.inputs])
    return profiler.operators()


def median(row: dict[str, Any]) -> float:
    return float(np.median(row["ns"]))


def test_every_operator_of_the_file_is_timed_in_order(tiny: tuple[nn.Module, Path]) -> None:
    rows = profiled(tiny[1], runs=3)
    plan = PteFile.read(tiny[1].read_bytes(), PACKAGE).method("forward")
    instructions = [row["instr_args_type"] for row in plan["chains"][0]["instructions"]]
    assert [row["kind"] for row in rows if not row["delegate"]] == ["set_inputs", *(f"{o['name']}.{o['overload']}" for o in plan["operators"]), "get_outputs"]
    assert len({row["delegate"] for row in rows}) == 2 and "DelegateCall" in instructions
    assert all(len(row["ns"]) == 3 and min(row["ns"]) >= 0 for row in rows)
    assert len({row["name"] for row in rows}) == len(rows)


def test_operators_carry_the_paths_of_the_modules_they_compute(tiny: tuple[nn.Module, Path]) -> None:
    module, path = tiny
    rows = profiled(path, runs=1)
    operators = list(graphs.operators(tiny_model(lambda: module).graph))
    assert {source for row in rows for source in row["sources"]} <= {graphs.source(node) for node in operators}
    assert all(row["sources"] for row in rows)
    assert (rows[0]["sources"], rows[-1]["sources"]) == ([next(name for name, _ in module.named_modules() if name)], ["head"])
    heavy = {source for row in rows if any(word in row["kind"] for word in ("FullyConnected", "Conv2d")) for source in row["sources"]}
    assert {name for name, child in module.named_modules() if isinstance(child, (nn.Linear, nn.Conv2d))} <= heavy


def test_a_file_of_others_has_names_of_the_runtime_only(tiny: tuple[nn.Module, Path], tmp_path: Path) -> None:
    file = PteFile.read(tiny[1].read_bytes(), PACKAGE)
    own = [plan for plan in file.program["execution_plan"] if plan["name"] not in {SIGNATURE, SOURCES}]
    foreign = tmp_path / "foreign.pte"
    foreign.write_bytes(PteFile({**file.program, "execution_plan": own}, file.segments, file.schema).written())
    rows = profiled(foreign, runs=1)
    assert not any(row["sources"] for row in rows)
    assert {row["kind"] for row in rows if row["delegate"]} & {"XNNFullyConnected", "XNNConv2d"}


@pytest.mark.parametrize("most", [1, 5, 1000])
def test_pieces_compute_to_the_last_bit_what_the_file_computes(tiny: tuple[nn.Module, Path], most: int) -> None:
    from executorch.extension.pybindings import _portable_lib as runtime

    found = cut(tiny[1].read_bytes(), PACKAGE, segments=1, least=1, most=most)
    assert most == 1000 or len(found.segments) >= 3
    program = runtime._load_program_from_buffer(found.content, program_verification=runtime.Verification.InternalConsistency)
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    values = {found.inputs[0]: x}
    for piece in found.pieces:
        outputs = program.load_method(piece.method)([values[key] for key in piece.inputs])
        for key, tensor in zip(piece.outputs, outputs, strict=True):
            assert key not in values or torch.equal(values[key], tensor), "a longer piece computes the same"
            values[key] = tensor
    (wanted,) = Session(str(tiny[1]), 1).run([x.numpy()])
    assert np.array_equal(values[found.outputs[0]].numpy(), wanted)


def test_the_cut_covers_every_operator_once(tiny: tuple[nn.Module, Path]) -> None:
    whole, single = (cut(tiny[1].read_bytes(), PACKAGE, segments=1, least=1, most=most) for most in (1000, 1))
    assert [u for s in whole.segments for u in s.units] == [u for s in single.segments for u in s.units]
    assert len(whole.pieces) == len(single.pieces) == sum(len(s.units) for s in whole.segments)


@pytest.mark.alone
def test_times_follow_the_work(lopsided: Path) -> None:
    """64 x 256 x 1024 multiplications against 64 x 64 x 256: sixteen times, of which overhead and caches may take half."""
    rows = {row["sources"][0]: median(row) for row in profiled(lopsided, runs=15) if "FullyConnected" in row["kind"]}
    assert 5 < rows["large"] / rows["small"] < 40


@pytest.mark.alone
def test_operators_together_take_what_the_file_takes(lopsided: Path) -> None:
    """Within 25 %: this test runs beside others; the benchmark holds files of its own to 10 %."""
    profiler = Profiler(str(lopsided), threads=1)
    x = [np.random.default_rng(0).standard_normal((1, 64, 64), dtype=np.float32)]
    for _ in range(20):
        profiler.run(x)
    rows = profiler.operators()
    whole = sum(np.median(profiler._ns[name]) for name in ("set_inputs", "execute", "get_outputs"))
    assert 0.8 < sum(map(median, rows)) / whole < 1.25


def test_an_undelegated_operator_is_found_and_advised_on(lopsided: Path) -> None:
    rows = profiled(lopsided, runs=1)
    executed = [Executed(row["name"], row["kind"], tuple(row["sources"]), row["delegate"], row["dtype"]) for row in rows]
    slow = [(operator, placement) for operator, placement in zip(executed, ExecuTorch().place(executed), strict=True) if placement != FAST]
    assert [(operator.kind, placement.category) for operator, placement in slow] == [("aten::cumsum.out", Category.UNDELEGATED)]
    assert slow[0][1].advice


def test_an_int8_file_is_cut_where_its_tensors_may_leave_the_delegate(quantized: Path) -> None:
    """Dynamic INT8 keeps what it converts inside: conversion and product are timed as one. Profiler.run compares the outputs of the parts."""
    rows = [row for row in profiled(quantized, runs=2) if row["delegate"]]
    kinds = [row["kind"] for row in rows]
    if quantized.stem == "dynamic":
        assert kinds.count("XNNConvert+XNNFullyConnected") == 3
        assert {row["dtype"] for row in rows} == {"float32"}
    else:
        assert kinds == ["XNNConvert", "XNNFullyConnected", "XNNConvert", "XNNSoftmax", "XNNConvert", "XNNFullyConnected", "XNNFullyConnected", "XNNConvert"]
        executed = [Executed(row["name"], row["kind"], tuple(row["sources"]), row["delegate"], row["dtype"]) for row in rows]
        slow = [placement.category for placement in ExecuTorch().place(executed) if placement != FAST]
        assert slow == [Category.QUANTIZE, Category.QUANTIZE, Category.FLOAT_ISLAND, Category.QUANTIZE, Category.QUANTIZE]


def test_parts_do_not_write_into_each_others_memory(tiny: tuple[nn.Module, Path]) -> None:
    """The runtime lets all methods of a program share one memory."""
    from executorch.extension.pybindings import _portable_lib as runtime

    found = cut(tiny[1].read_bytes(), PACKAGE, segments=1, least=1, most=4)
    program = runtime._load_program_from_buffer(found.content)
    methods = [program.load_method(piece.method) for piece in found.pieces]
    values = {found.inputs[0]: torch.randn(1, 1, 8, 8)}
    for piece, method in zip(found.pieces, methods, strict=True):
        values.update(zip(piece.outputs, method([values[key] for key in piece.inputs]), strict=True))
    for method in methods:
        method.execute()
    for piece, method in zip(found.pieces, methods, strict=True):
        assert all(torch.equal(values[key], tensor) for key, tensor in zip(piece.outputs, method.get_outputs(), strict=True))


PLACES = [
    ("XNNConvert", "XnnpackBackend", "int8", Category.QUANTIZE),
    ("XNNConvert", "XnnpackBackend", "float32", Category.QUANTIZE),
    ("XNNStaticTranspose", "XnnpackBackend", "float32", Category.LAYOUT),
    ("XNNSoftmax", "XnnpackBackend", "float32", Category.FLOAT_ISLAND),
    ("XNNStaticReshape", "XnnpackBackend", "float32", Category.FAST),
    ("XNNConv2d", "XnnpackBackend", "int8", Category.FAST),
    ("quantized_decomposed::quantize_per_tensor.out", "", "int8", Category.QUANTIZE),
    ("aten::permute_copy.out", "", "float32", Category.LAYOUT),
    ("aten::mean.out", "", "float32", Category.UNDELEGATED),
    ("set_inputs", "", "", Category.FAST),
]


def test_what_is_slow_is_sorted_by_kind_delegate_and_dtype() -> None:
    executed = [Executed(str(n), kind, (), delegate, dtype) for n, (kind, delegate, dtype, _) in enumerate(PLACES)]
    found = ExecuTorch().place(executed)
    assert [placement.category for placement in found] == [category for *_, category in PLACES]
    assert all(bool(placement.advice) == (placement.category is not Category.FAST) for placement in found)


def test_float_is_no_island_in_a_file_of_dynamic_int8() -> None:
    kinds = ("XNNConvert+XNNFullyConnected", "XNNSoftmax")
    assert ExecuTorch().place([Executed(kind, kind, (), "XnnpackBackend", "float32") for kind in kinds]) == (FAST, FAST)


def test_a_noisy_series_is_made_to_rise_without_losing_time() -> None:
    assert _rising([0.0, 3.0, 1.0, 4.0]) == [0.0, 2.0, 2.0, 4.0]
    rows = _shared([np.full(4, 10.0), np.full(4, 30.0), np.full(4, 20.0), np.array([60.0, 60.0, 60.0, 110.0])])
    assert math.isclose(sum(row[0] for row in rows), 50) and math.isclose(sum(row[3] for row in rows), 100)
    assert [row[0] for row in rows] == [15, 0, 35]


def test_what_cannot_be_cut_is_refused_as_unsupported(lopsided: Path, tmp_path: Path) -> None:
    """Here one more instruction, which moves the output onto itself."""
    file = PteFile.read(lopsided.read_bytes(), PACKAGE)
    plan = file.method("forward")
    move = {"instr_args_type": "MoveCall", "instr_args": {"move_from": plan["outputs"][0], "move_to": plan["outputs"][0]}}
    chain = {**plan["chains"][0], "instructions": [*plan["chains"][0]["instructions"], move]}
    path = tmp_path / "moving.pte"
    path.write_bytes(PteFile({**file.program, "execution_plan": [{**plan, "chains": [chain]}]}, file.segments, file.schema).written())
    samples = [np.zeros((2, 64, 64), np.float32)]
    with pytest.raises(UnsupportedError, match=r"moving\.pte.*control flow \(MoveCall\)"):
        profile_operators(path, target=ExecuTorch(), samples=samples, limit_s=0.1)


def _without(content: bytes, at: slice) -> bytes:
    return content[: at.start] + bytes(at.stop - at.start) + content[at.stop :]


@pytest.mark.parametrize(
    ("spoil", "message"), [(lambda c: b"", "too short"), (lambda c: _without(c, slice(8, 12)), "no .pte file"), (lambda c: _without(c, slice(4, 8)), "ET12")]
)
def test_what_is_no_pte_file_is_refused(tiny: tuple[nn.Module, Path], spoil: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PteFile.read(spoil(tiny[1].read_bytes()), PACKAGE)


def test_a_flatbuffer_that_points_outside_is_refused(tiny: tuple[nn.Module, Path]) -> None:
    content = bytearray(tiny[1].read_bytes())
    struct.pack_into("<I", content, 0, 0x7FFFFFFF)
    with pytest.raises(ValueError, match="broken"):
        PteFile.read(bytes(content), PACKAGE)


def test_reading_and_writing_a_file_keeps_it(tiny: tuple[nn.Module, Path]) -> None:
    first = PteFile.read(tiny[1].read_bytes(), PACKAGE)
    second = PteFile.read(first.written(), PACKAGE)
    assert second.program == first.program and second.segments == first.segments


def test_a_product_quantized_on_the_fly_is_no_island_beside_a_static_convolution() -> None:
    static = Executed("conv", "XNNConv2d", (), "XnnpackBackend", "int8")
    dynamic = Executed("fc", "XNNConvert+XNNFullyConnected", (), "XnnpackBackend", "float32")
    alone = Executed("norm", "XNNFullyConnected", (), "XnnpackBackend", "float32")
    assert [placement.category for placement in ExecuTorch().place([static, dynamic, alone])] == [Category.FAST, Category.FAST, Category.FLOAT_ISLAND]
