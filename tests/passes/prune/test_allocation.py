"""Limits on time and on counts are met at the least loss; time is that of a bench whose kernels are known, and work in steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx

from edgesmith import Model, PassContext, Pipeline
from edgesmith.compiler import graph as graphs
from edgesmith.compiler.axes import Axes, PruneGroup, remove
from edgesmith.compiler.axes.axes import Axis
from edgesmith.compiler.axes.widths import Counts, Step
from edgesmith.compiler.bench import Bench, Cost, Paired
from edgesmith.compiler.budget import Interval
from edgesmith.compiler.errors import NumericsError, SpecError, UnsupportedError
from edgesmith.compiler.profile.latency_model import LatencyModel, Measured, fit
from edgesmith.compiler.profile.operator_types import Category, OperatorProfile, OperatorTime
from edgesmith.compiler.testing import TinyConvNet, TinyTransformer, tiny_data, tiny_model
from edgesmith.compiler.weighted import weighted
from edgesmith.passes.prune.allocation import FILES, Goal, Problem, Variable, allocate
from edgesmith.passes.prune.branches import inside, prove_without, residual_branches, without
from edgesmith.passes.prune.cutter import Cutter
from edgesmith.passes.prune.losses import Curve


def padded(count: int, tile: int) -> int:
    return -(-count // tile) * tile


def kernel_ms(node: fx.Node, misfit: float = 0.0, narrow: float | None = None) -> float:
    """A constant, and a price for each multiply-accumulate: outputs in steps of 8, inputs of 4, and ``misfit`` times more where inputs are no whole steps.

    ``narrow``: outputs are in steps of 32, and fewer take a kernel of 16, so many times slower.
    """
    kind = weighted(node)
    if not isinstance(node.meta["val"], torch.Tensor):
        return 0.0
    if kind is None:
        return 0.01 + 1e-6 * node.meta["val"][:1].numel()
    weight = kind.argument(node, kind.weight)
    assert weight is not None
    shape = weight.meta["val"].shape
    positions = node.meta["val"][:1].numel() // shape[kind.axis] * (shape.numel() // shape[0] // shape[1])
    more, outputs = misfit if shape[1 - kind.axis] % 4 else 0.0, float(padded(shape[kind.axis], 8))
    if narrow is not None:
        outputs = padded(shape[kind.axis], 32) if shape[kind.axis] >= 32 else padded(shape[kind.axis], 16) * (1 + narrow)
    return 0.002 + 1e-5 * positions * outputs * padded(shape[1 - kind.axis], 4) * (1 + more)


@dataclass
class KnownBench(Bench):
    """``whole`` is what a call takes, from what its operators do; ``moods`` are factors on the times that one measurement after the other shows.

    ``fused``: a convolution is told by its batch norm.
    """

    whole: float = 1.0
    moods: tuple[float, ...] = (1.0,)
    misfit: float = 0.0
    narrow: float | None = None
    fused: bool = False
    paired_with: list[float] = field(default_factory=list)
    timed: int = 0

    def ms(self, model: Model) -> float:
        return sum(kernel_ms(node, self.misfit, self.narrow) for node in graphs.operators(model.graph)) ** self.whole

    def cost(self, model: Model) -> Cost:
        return Cost(model.params, self.ms(model), self.ms(model))

    def paired(self, base: Model, new: Model) -> Paired:
        share = self.ms(new) / self.ms(base)
        self.paired_with.append(share)
        return Paired(Interval.exact(share), Interval.exact(self.ms(base)))

    def operators(self, model: Model) -> OperatorProfile:
        mood = self.moods[self.timed % len(self.moods)]
        self.timed += 1
        times = [(node, kernel_ms(node, self.misfit, self.narrow) * mood) for node in graphs.operators(model.graph)]
        total = sum(ms for _, ms in times)
        rows = tuple(OperatorTime(n.name, str(n.target), (self.told(n),), "", ms, ms / total, Category.FAST) for n, ms in times)
        return OperatorProfile("instrumented", total, total, 10, 1, "1", rows)

    def told(self, node: fx.Node) -> str:
        """The source path that is said of ``node``."""
        reader = next(iter(node.users))
        return graphs.source(reader if self.fused and "batch_norm" in str(reader.target) else node)


def context(bench: Bench | None = None) -> PassContext:
    return PassContext(data=tiny_data(64).for_passes(), benches={} if bench is None else {"known": bench})


def narrowed(axes: Axes, widths: dict[str, int]) -> Model:
    return remove(axes.model, {name: range(width, axes.group(name).size) for name, width in widths.items()}, axes=axes)


def random_widths(groups: Sequence[PruneGroup], rng: np.random.Generator) -> dict[str, int]:
    return {g.name: int(rng.integers(max(1, g.size // 4), g.size + 1)) for g in groups}


def fitted(bench: KnownBench, axes: Axes, groups: Sequence[PruneGroup], rng: np.random.Generator) -> LatencyModel:
    """To the model as it is and twelve files of random widths."""
    files = [{g.name: g.size for g in groups}, *(random_widths(groups, rng) for _ in range(12))]
    models = [narrowed(axes, widths) for widths in files]
    measured = [
        Measured({axes.group(n).axis: w for n, w in widths.items()}, bench.operators(one), bench.ms(one) / bench.ms(axes.model))
        for widths, one in zip(files, models, strict=True)
    ]
    return fit(Counts(axes, {g.axis for g in groups}), measured)


@pytest.mark.parametrize(
    ("kind", "kernel", "fused"), [(TinyTransformer, "linear", False), (TinyConvNet, "convolution", False), (TinyConvNet, "convolution", True)]
)
@pytest.mark.parametrize("misfit", [0.0, 0.5])
def test_the_latency_model_finds_the_steps_and_predicts_widths_it_has_not_seen(kind: type, kernel: str, fused: bool, misfit: float) -> None:
    model = tiny_model(kind)
    axes, bench = Axes.of(model), KnownBench(moods=(1.0, 1.3, 0.9, 1.1), misfit=misfit, fused=fused)
    groups = [g for g in axes.groups if g.kind in {"hidden", "channels", "heads", "residual"}]
    rng = np.random.default_rng(0)
    found = fitted(bench, axes, groups, rng)
    assert found.steps[kernel] == (Step(8), Step(4, misfit))
    for _ in range(5):
        widths = random_widths(groups, rng)
        assert found.ms({axes.group(n).axis: w for n, w in widths.items()}) == pytest.approx(bench.ms(narrowed(axes, widths)), rel=0.03)


def test_the_latency_model_finds_kernels_for_narrow_layers() -> None:
    """Wide layers in steps of 32, and below 32 a kernel of 16 that is slower."""
    model, bench = tiny_model(Wide), KnownBench(narrow=0.3)
    axes, rng = Axes.of(model), np.random.default_rng(0)
    groups = [g for g in axes.groups if g.kind in {"hidden", "residual"}]
    found = fitted(bench, axes, groups, rng)
    assert found.steps["linear"][0] == Step(32, narrow=0.3)


class Wide(TinyTransformer):
    """Wide enough for steps of eight to be fine ones."""

    def __init__(self) -> None:
        super().__init__(width=64, depth=3)


@pytest.mark.parametrize("share", [0.8, 0.6, 0.4])
@pytest.mark.parametrize("whole", [1.0, 1.2], ids=["as predicted", "not as predicted"])
def test_a_share_of_the_latency_is_met_within_three_rounds(share: float, whole: float) -> None:
    bench, model = KnownBench(whole), tiny_model(Wide)
    after = Pipeline.parse(f"prune{{latency={share},kinds=[hidden,heads,residual],importance=l2}}").run(model, context(bench))
    assert bench.ms(after) / bench.ms(model) == pytest.approx(share, rel=0.03)
    assert len(bench.paired_with) <= FILES + 3


def test_where_steps_are_coarse_the_nearest_below_is_taken() -> None:
    """Of 32 channels in steps of eight, 24 take more than four fifths of the time."""
    bench, model = KnownBench(), tiny_model(TinyConvNet)
    after = Pipeline.parse("prune{latency=0.8,include=[expand],importance=l2}").run(model, context(bench))
    assert {g.name: g.size for g in Axes.of(after).groups}["expand"] == 16
    assert bench.ms(after) < 0.7 * bench.ms(model)
    (said,) = (d for d in after.history[-1].diagnostics if d.code == "prune.latency")
    assert "widths that keep more are too slow" in said.message
    assert len(bench.paired_with) == FILES + 1


def test_milliseconds_are_met(tmp_path: Path) -> None:
    bench, model = KnownBench(), tiny_model()
    wanted = 0.7 * bench.ms(model)
    after = Pipeline.parse(f"prune{{latency_ms={wanted},importance=l2}}").run(model, context(bench))
    assert bench.ms(after) == pytest.approx(wanted, rel=0.03)
    unchanged = Pipeline.parse(f"prune{{latency_ms={bench.ms(model) * 1.1},importance=l2}}").run(model, context(bench))
    assert unchanged.fingerprint == model.fingerprint


@pytest.mark.parametrize("resource", ["macs", "params"])
@pytest.mark.parametrize("kind", [TinyTransformer, TinyConvNet])
def test_counts_are_met(resource: str, kind: type) -> None:
    model = tiny_model(kind)
    after = Pipeline.parse(f"prune{{{resource}=0.6,importance=l2,kinds=[channels,hidden,heads,residual]}}").run(model, context())
    assert 0.5 <= getattr(after, resource) / getattr(model, resource) <= 0.6 + 1e-9


def test_what_reads_is_fitted_anew_where_losses_are_measured_with_it() -> None:
    model = tiny_model()
    after = Pipeline.parse("prune{macs=0.7,importance=obs,reconstruct=true}").run(model, context())
    assert after.macs <= 0.7 * model.macs
    assert "prune.reconstructed" in {d.code for d in after.history[-1].diagnostics}


def test_several_limits_hold_together() -> None:
    bench, model = KnownBench(), tiny_model()
    after = Pipeline.parse("prune{latency=0.8,params=0.5,importance=l2,kinds=[channels,hidden,heads,residual]}").run(model, context(bench))
    assert after.params <= 0.5 * model.params
    assert bench.ms(after) <= 0.83 * bench.ms(model)


def test_the_choice_is_that_of_least_loss_among_all() -> None:
    """Two hidden groups and a limit on multiply-accumulates, small enough to try every pair of widths."""
    model = tiny_model()
    axes = Axes.of(model)
    groups = [g for g in axes.groups if g.kind == "hidden"]
    losses = (0.1, 0.2, 2.0), (0.01, 0.5, 0.6)
    variables = {g.name: Variable(g.axis, g.size, Curve((20, 40, 60), values, 60)) for g, values in zip(groups, losses, strict=True)}
    problem = Problem(axes, variables, lambda widths: model, lambda widths: 0.0)

    def macs(widths: dict[str, int]) -> float:
        at = {axis: np.float64(width) for axis, width in problem.by_axis(widths).items()}
        return sum(float(volume.of(at)) for volume in problem.counts.macs())

    def loss(widths: dict[str, int]) -> float:
        return sum(float(variables[g.name].curve.at(np.array([g.size - widths[g.name]]))[0]) for g in groups)

    assert macs(problem.present) == model.macs
    for share in (0.9, 0.8, 0.7):
        found = allocate(problem, Goal(macs=share), None).widths
        every = ({g.name: w for g, w in zip(groups, pair, strict=True)} for pair in product(range(4, 65), repeat=2))
        best = min(loss(widths) for widths in every if macs(widths) <= share * model.macs)
        assert loss(found) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("together", [0.01, 5.0], ids=["as the sum says", "more than the sum says"])
def test_a_kind_that_loses_more_together_than_alone_is_left_alone(together: float) -> None:
    """Two hidden groups, said to be of two kinds, of which the first seems to lose nothing; what both lose is measured."""
    model = tiny_model()
    axes = Axes.of(model)
    first, second = [g for g in axes.groups if g.kind == "hidden"]
    curves = {first.name: Curve((60,), (0.01,), 60), second.name: Curve((60,), (1.0,), 60)}
    variables = {g.name: Variable(g.axis, g.size, curves[g.name], kind) for g, kind in ((first, "cheap"), (second, "dear"))}
    problem = Problem(axes, variables, lambda widths: model, lambda widths: together if widths[first.name] < first.size else 1.0)
    found = allocate(problem, Goal(macs=0.9), None).widths
    cheap, dear = found[first.name] < first.size, found[second.name] < second.size
    assert (cheap, dear) == ((True, False) if together < 1 else (False, True))


class SlowerThanToldBench(KnownBench):
    """Narrowed models take a tenth more than their operators do."""

    def paired(self, base: Model, new: Model) -> Paired:
        found = super().paired(base, new)
        return replace(found, share=Interval.exact(1.1 * found.share.value))


def test_what_only_a_later_round_takes_is_measured_together_with_the_rest() -> None:
    """The first round takes hidden units; the second wants more, and of two blocks the one that seems to lose less loses most."""
    model, bench = tiny_model(), SlowerThanToldBench()
    axes = Axes.of(model)
    first, _, second, _ = residual_branches(model)
    gates = {"cheap": Axis(1), "dear": Axis(1)}
    hidden = [g for g in axes.groups if g.kind == "hidden"]
    variables = {g.name: Variable(g.axis, g.size, Curve((60,), (0.0001,), 60), g.kind) for g in hidden}
    variables |= {name: Variable(gates[name], 1, Curve((1,), (loss,), 1), name) for name, loss in (("cheap", 0.01), ("dear", 0.02))}
    cutter = Cutter(axes, {g.name: torch.arange(float(g.size)) for g in hidden}, {"cheap": first, "dear": second})
    behind = {node: (gate,) for branch, gate in ((first, gates["cheap"]), (second, gates["dear"])) for node in inside(model, branch)}
    problem = Problem(axes, variables, cutter.model, lambda widths: 0.1 if widths["cheap"] else 5.0, behind)
    found = allocate(problem, Goal(latency=0.95), bench).widths
    assert len(bench.paired_with) == FILES + 2
    assert (found["cheap"], found["dear"]) == (1, 0)


@pytest.mark.parametrize(("option", "asked"), [("macs", 0.01), ("params", 0.01), ("latency", 0.02), ("latency_ms", 0.03)])
def test_what_no_width_can_meet_is_refused_with_the_nearest_that_can_be_met(option: str, asked: float) -> None:
    model, bench = tiny_model(), KnownBench()
    with pytest.raises(UnsupportedError, match=rf"no widths meet {option}={asked}") as refused:
        Pipeline.parse(f"prune{{{option}={asked},importance=l2}}").run(model, context(bench))
    nearest = float(refused.value.hint.split(f"{option}=")[1].split()[0])
    after = Pipeline.parse(f"prune{{{option}={nearest},importance=l2}}").run(model, context(bench))
    if option in {"macs", "params"}:
        assert getattr(after, option) <= nearest * getattr(model, option)
    else:
        assert bench.ms(after) <= 1.03 * nearest * (bench.ms(model) if option == "latency" else 1.0)


def test_time_needs_a_target_and_loss_needs_data() -> None:
    with pytest.raises(UnsupportedError, match="needs a target to measure on"):
        Pipeline.parse("prune{latency=0.5,importance=l2}").run(tiny_model(), context())
    with pytest.raises(UnsupportedError, match="no target 'litret'") as wrong:
        Pipeline.parse("prune{latency=0.5,importance=l2,target=litret}").run(tiny_model(), replace(context(), benches={"litert": KnownBench()}))
    assert "litert" in wrong.value.hint
    with pytest.raises(UnsupportedError, match="needs data"):
        Pipeline.parse("prune{macs=0.5,importance=l2}").run(tiny_model(), PassContext())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("latency=0.5,ratio=0.3", "give one kind"),
        ("latency=0.5,latency_ms=3", "give one"),
        ("macs=0", "above 0 and at most 1"),
        ("latency=1.5", "above 0 and at most 1"),
        ("macs=0.5,target=litert", "target is where latency is measured"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        Pipeline.parse(f"prune{{{options}}}")


def test_a_group_that_matters_less_gives_more() -> None:
    """The second block's hidden units are made to count for nothing: they go first."""
    model = tiny_model()
    graph = model.edit(tensors=True)
    name = "blocks.1.fc2.weight"
    graphs.set_tensor(graph, name, graphs.tensor(graph, name).detach() * 1e-3)
    model = model.with_graph(graph)
    after = Pipeline.parse("prune{macs=0.85,importance=l2}").run(model, context())
    sizes = {g.name: g.size for g in Axes.of(after).groups}
    assert sizes["blocks.0.fc1"] == 64
    assert sizes.get("blocks.1.fc1", 1) < 32


def faint(model: Model, *names: str) -> Model:
    """``model`` with the named layers' weights and biases made next to nothing."""
    graph = model.edit(tensors=True)
    for name in names:
        for tensor in (f"{name}.weight", f"{name}.bias"):
            graphs.set_tensor(graph, tensor, graphs.tensor(graph, tensor).detach() * 1e-4)
    return model.with_graph(graph)


@pytest.mark.parametrize("reconstruct", ["true", "false"])
def test_blocks_that_do_nothing_go_first(reconstruct: str) -> None:
    model = faint(tiny_model(), "blocks.0.proj", "blocks.1.fc2")
    after = Pipeline.parse(f"prune{{macs=0.6,kinds=[blocks],reconstruct={reconstruct}}}").run(model, context())
    left = {name.rpartition(".")[0] for name, _ in after.graph.named_parameters()}
    assert {"blocks.0.fc2", "blocks.1.proj"} <= left
    assert not {"blocks.0.proj", "blocks.0.qkv", "blocks.1.fc2", "blocks.1.fc1"} & left
    assert after.macs <= 0.6 * model.macs
    (said,) = (d.message for d in after.history[-1].diagnostics if "blocks removed" in d.message)
    assert said == "2 of 4 blocks removed: blocks.0.proj, blocks.1.fc2"


def test_time_is_met_with_blocks() -> None:
    """An attention branch takes more than two fifths of this bench's time, and more than was predicted from files that all have it."""
    model, bench = faint(tiny_model(), "blocks.0.proj"), KnownBench()
    after = Pipeline.parse("prune{latency=0.6,kinds=[blocks]}").run(model, context(bench))
    assert 0.5 * bench.ms(model) < bench.ms(after) <= 0.6 * bench.ms(model)
    assert "blocks.0.proj.weight" not in dict(after.graph.named_parameters())
    assert len(bench.paired_with) <= FILES + 3


def test_a_share_of_the_blocks_goes_by_their_influence() -> None:
    model = faint(tiny_model(), "blocks.1.proj")
    after = Pipeline.parse("prune{ratio=0.25,kinds=[blocks]}").run(model, context())
    left = {name.rpartition(".")[0] for name, _ in after.graph.named_parameters()}
    assert {"blocks.0.proj", "blocks.0.fc2", "blocks.1.fc2"} <= left
    assert "blocks.1.proj" not in left and "blocks.1.qkv" not in left


def test_counts_fall_with_blocks_as_the_model_does() -> None:
    model = tiny_model()
    axes = Axes.of(model)
    for branch in residual_branches(model):
        gate = Axis(1)
        counts = Counts(axes, {gate}, dict.fromkeys(inside(model, branch), (gate,)))
        for there, cut in ((1.0, model), (0.0, without(model, [branch]))):
            at = {gate: np.array(there)}
            assert sum(float(v.of(at)) for v in counts.macs()) == cut.macs
            assert sum(float(v.of(at)) for v in counts.parameters()) == cut.params


def test_a_block_too_many_is_seen() -> None:
    model = tiny_model()
    first, second, *_ = residual_branches(model)
    assert prove_without(model, without(model, [first]), [first]) < 1e-12
    with pytest.raises(NumericsError, match="without the removed blocks"):
        prove_without(model, without(model, [first, second]), [first])
