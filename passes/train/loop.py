"""The one training loop: AdamW on a captured graph with linear warm-up and cosine decay; the best checkpoint wins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import fx, nn

from edgesmith.compiler import graph as graphs
from edgesmith.compiler.data import Array
from edgesmith.compiler.errors import DataError
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.passes.train.forward import as_tensors, batch_size, flat
from edgesmith.passes.train.objective import Objective

Score = tuple[float, float]
"""(what ``evaluate`` says, minus the validation loss): compared in that order, higher is better."""

_BF16_FROM_MACS = {"amx_bf16": 20_000_000, "avx512_bf16": 40_000_000}
"""Below so many multiply-accumulates a sample, a step is made of small operators that casts slow down: with vector units a transformer of 30 M took 1.06
times as long, a residual network of 100 M half as long, a transformer of 170 M two thirds."""
_THREADS_FROM_MACS = 1_000_000_000
"""Below this many multiply-accumulates a batch, waking a second thread for each operator takes longer than it saves: with waiting threads asleep,
a step of a digits transformer (0.5 G) took 0.10 s on one thread and 0.15 s on two."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast. ``lr`` is the peak, after ``warmup`` (a share of all steps); ``checks`` is how often the validation split is looked at."""

    epochs: int
    lr: float
    batch_size: int = 64
    weight_decay: float = 0.02
    warmup: float = 0.05
    clip_norm: float = 1.0
    checks: int = 10
    dropout: bool = False
    """Whether dropouts are active: a teacher's outputs regularise enough, and without them fewer epochs do."""
    bf16: bool | None = None
    """Forward, that of a teacher too, and backward in bfloat16; None: where the processor has units for it and the model is large enough to gain."""


@dataclass(frozen=True)
class Trained:
    """The best model seen, its score and that of the model that came in. ``best_epoch`` 0 is that model itself: nothing was better.

    ``diverged`` says that the loss became infinite or undefined and training stopped there.
    """

    model: Model
    score: Score
    before: Score
    best_epoch: int
    diverged: bool


def train(model: Model, objective: Objective, schedule: Schedule, ctx: PassContext) -> Trained:
    """``model`` with every floating-point parameter trained, frozen ones too: what was cut away, all weights make up for.

    Of ``ctx`` the seed, ``evaluate`` and ``progress`` are used. The same arguments give the same bits on one machine with one thread count, and a small
    model is trained on one thread; the global random state is left as it was.
    """
    score = _scorer(objective, ctx.evaluate)
    with torch.random.fork_rng(devices=[]), _threads(model.macs * schedule.batch_size):
        best = Trained(model, before := score(model), before, 0, diverged=False)
        torch.manual_seed(ctx.seed)
        for epoch, candidate in _checkpoints(model, objective, schedule, ctx):
            if candidate is None:
                return replace(best, diverged=True)
            if (reached := score(candidate)) > best.score:
                best = Trained(candidate, reached, before, epoch, diverged=False)
    return best if best.best_epoch == 0 else replace(best, model=model.with_graph(best.model.graph))


def bf16_pays(model: Model) -> bool:
    """Whether training in bfloat16 is faster here: matrix or vector units for it, and a model that is not all overhead."""
    here = torch.cpu.get_capabilities()
    return any(here.get(unit, False) and model.macs >= macs for unit, macs in _BF16_FROM_MACS.items())


@contextmanager
def _threads(macs: int) -> Iterator[None]:
    """As many threads of torch's as ``macs`` multiply-accumulates at a time are worth."""
    before = torch.get_num_threads()
    if macs < _THREADS_FROM_MACS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _scorer(objective: Objective, evaluate: Callable[[Model], float] | None) -> Callable[[Model], Score]:
    def score(model: Model) -> Score:
        loss = objective.on_validation(model)
        return (evaluate(model) if evaluate else 0.0, -loss if math.isfinite(loss) else -math.inf)

    return score


def _checkpoints(model: Model, objective: Objective, schedule: Schedule, ctx: PassContext) -> Iterator[tuple[int, Model | None]]:
    """Train, and give (epochs done, model in eval mode) at each check; None and the end where the loss is no longer a number."""
    rng = np.random.default_rng(ctx.seed)
    graph = model.edit(tensors=True)
    for parameter in graph.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    graphs.set_training(graph, True, noise=schedule.dropout)
    samples = len(objective.data.train)
    size = batch_size(model, min(schedule.batch_size, samples))
    if size > samples:
        raise DataError(f"the model runs batches of {size} alone and there are {samples} training samples")
    per_epoch = samples // size
    total = schedule.epochs * per_epoch
    optimizer, scheduler = _optimizer(graph, schedule, total)
    bf16 = bf16_pays(model) if schedule.bf16 is None else schedule.bf16
    check_every = max(1, schedule.epochs // schedule.checks)
    for epoch in range(1, schedule.epochs + 1):
        for step, index in enumerate(rng.permutation(samples)[: per_epoch * size].reshape(per_epoch, size), 1):
            loss = _step(graph, objective, index, rng, bf16=bf16)
            if not math.isfinite(loss):
                yield epoch, None
                return
            nn.utils.clip_grad_norm_(graph.parameters(), schedule.clip_norm)
            optimizer.step()
            scheduler.step()
            ctx.progress((epoch - 1) * per_epoch + step, total, f"epoch {epoch}/{schedule.epochs}, loss {loss:.3f}")
        if epoch % check_every == 0 or epoch == schedule.epochs:
            yield epoch, _in_eval_mode(model, graph)


def _step(graph: fx.GraphModule, objective: Objective, index: Array, rng: np.random.Generator, *, bf16: bool) -> float:
    """Gradients of one batch; its loss."""
    inputs = as_tensors(objective.data.train.batch(index, rng))
    graph.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        outputs, wanted = flat(graph(*inputs)), objective.wanted(inputs, index)
    loss = objective.on_train(outputs, wanted, index)
    loss.backward()
    return float(loss.detach())


def _optimizer(graph: fx.GraphModule, schedule: Schedule, total: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    parameters = list(graph.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=schedule.lr)
    warm = max(1, round(schedule.warmup * total))
    ramp = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / (warm + 1), total_iters=warm)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, total - warm))
    return optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, [ramp, decay], [warm])


def _in_eval_mode(model: Model, graph: fx.GraphModule) -> Model:
    """``model`` with a copy of the tensors of ``graph``, which goes on training; frozen parameters are marked frozen again."""
    snapshot = graphs.copied(graph, tensors=True)
    graphs.set_training(snapshot, False)
    for node in snapshot.graph.find_nodes(op="get_attr"):
        graphs.tensor(snapshot, str(node.target)).requires_grad_(graphs.tensor(model.graph, str(node.target)).requires_grad)
    return replace(model, graph=snapshot, quant=None)
