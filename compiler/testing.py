"""The contract of passes and targets as tests, and small models to run them on: for our own tests and for authors of plugins.

from edgesmith.testing import check_pass

def test_contract(tmp_path):
    check_pass(MyPass(k=2), folder=tmp_path)
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgesmith.compiler.bench import Bench, Cost, Paired
from edgesmith.compiler.budget import Interval
from edgesmith.compiler.data import Data, Split
from edgesmith.compiler.diagnostics import errors
from edgesmith.compiler.errors import UnsupportedError
from edgesmith.compiler.instruments import Contract, NumericsCheck, compare_outputs, flat_outputs
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import Numerics, Pass, PassContext, PassResult
from edgesmith.compiler.profile.operator_types import OperatorProfile
from edgesmith.compiler.spec import format_pass, parse_pass
from edgesmith.compiler.target import Artifact, Target

MS_PER_MAC = 1e-6


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))
        out: torch.Tensor = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        return out


class TinyTransformer(nn.Module):
    """Images [batch, 1, 8, 8] -> logits [batch, 4]: two pre-norm blocks of four heads, fused qkv, GELU."""

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.positions = nn.Parameter(torch.randn(1, 4, width) * 0.1)
        self.blocks = nn.Sequential(*(_Block(width, 4) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the mean token."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        out: torch.Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return out


class TinyConvNet(nn.Module):
    """Images [batch, 1, 8, 8] -> logits [batch, 4]: convolution, batch norm, a depthwise residual block with squeeze and excite."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.expand, self.expand_norm = nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.depthwise, self.depthwise_norm = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False), nn.BatchNorm2d(2 * width)
        self.squeeze, self.excite = nn.Conv2d(2 * width, 8, 1), nn.Conv2d(8, 2 * width, 1)
        self.project, self.project_norm = nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the mean pixel."""
        x = torch.relu(self.norm(self.stem(x)))
        y = nn.functional.relu6(self.expand_norm(self.expand(x)))
        y = nn.functional.relu6(self.depthwise_norm(self.depthwise(y)))
        y = y * torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        x = x + self.project_norm(self.project(y))
        out: torch.Tensor = self.head(x.mean((2, 3)))
        return out


def tiny_model(kind: type[nn.Module] = TinyTransformer, seed: int = 0) -> Model:
    """``kind`` with random weights, captured; norms are randomised so that nothing can be folded away."""
    torch.manual_seed(seed)
    module = randomise_norms(kind())
    return Model.from_module(module, (torch.randn(2, 1, 8, 8),))


def randomise_norms(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every normalisation layer random gains, shifts and statistics, in place: a zero gain would hide a whole branch."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        for name, low, high in (("weight", 0.5, 1.5), ("bias", -0.3, 0.3), ("running_mean", -0.3, 0.3), ("running_var", 0.5, 1.5)):
            value = getattr(layer, name, None)
            if "norm" in type(layer).__name__.lower() and isinstance(value, torch.Tensor):
                with torch.no_grad():
                    value.copy_(torch.rand(value.shape, generator=generator) * (high - low) + low)
    return module


def randomise_weights(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights with a gain above 1, so that no branch fades away and a wrong cut anywhere reaches the output; random norms and statistics.

    Returns:
        ``module`` itself, in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 1.5 / (parameter.numel() / max(len(parameter), 1)) ** 0.5 if parameter.dim() > 1 else 0.5 + 0.3 * noise)
        for name, buffer in module.named_buffers():
            if "running" in name:
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return module.eval()


def tiny_data(samples: int = 96, seed: int = 0) -> Data:
    """Four classes of 8x8 images that a tiny model can learn: which quarter of the image is bright."""
    rng = np.random.default_rng(seed)

    def split(count: int) -> Split:
        labels = rng.integers(0, 4, count)
        images = rng.normal(0, 0.5, (count, 1, 8, 8)).astype(np.float32)
        for image, label in zip(images, labels, strict=True):
            row, column = divmod(int(label), 2)
            image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.5
        return Split((images,), labels.astype(np.int64))

    return Data(split(samples), split(samples // 2), split(samples // 2))


class CountedBench(Bench):
    """A bench for tests that measures nothing: a parameter takes 1 byte, a multiply-accumulate 1 ns."""

    def cost(self, model: Model) -> Cost:
        """Counted."""
        return Cost(model.params, model.macs * MS_PER_MAC, model.macs * MS_PER_MAC)

    def paired(self, base: Model, new: Model) -> Paired:
        """Counted."""
        return Paired(Interval.exact(new.macs / base.macs), Interval.exact(base.macs * MS_PER_MAC))

    def operators(self, model: Model) -> OperatorProfile:
        """Refused.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("a counted bench times no operators")


def check_pass(step: Pass, *, folder: Path, model: Model | None = None, ctx: PassContext | None = None) -> PassResult:
    """Assert what every pass promises, on ``model`` (a tiny transformer if left out); the result, for further checks.

    The pass is a frozen dataclass whose text form reads back; it leaves its input alone, tells the truth about ``changed``, gives
    the same result for the same seed, keeps outputs as close as its ``numerics`` says, keeps every node's source path, and its result
    saves, loads and takes a training step.

    Raises:
        AssertionError, DefectError, NumericsError: a broken promise.
    """
    model = model or tiny_model()
    ctx = dataclasses.replace(ctx or PassContext(data=tiny_data().for_passes()), workdir=folder)
    ctx = dataclasses.replace(ctx, teacher=ctx.teacher or model)
    parameters = getattr(type(step), "__dataclass_params__", None)
    assert parameters is not None and parameters.frozen, "a pass is a frozen dataclass"
    assert step.numerics in Numerics, "a pass declares its numerics"
    if step.name in _registered():
        assert parse_pass(format_pass(step)) == step, "the text form reads back"
    results = [NumericsCheck().around(step, model, ctx, lambda: Contract().around(step, model, ctx, lambda: step.run(model, ctx))) for _ in range(2)]
    first, second = results
    assert first.model.fingerprint == second.model.fingerprint, "the same seed gives the same result"
    assert all("source" in node.meta for node in first.model.graph.graph.nodes), "every node keeps its source path"
    path = folder / "saved.pt2"
    first.model.save(path)
    assert Model.load(path).fingerprint == first.model.fingerprint, "the result saves and loads"
    trained = first.model.edit(tensors=True)
    output = trained(*first.model.example_inputs())
    (output if isinstance(output, torch.Tensor) else output[0]).square().sum().backward()
    assert any(p.grad is not None for p in trained.parameters()), "the result trains"
    return first


def _registered() -> tuple[str, ...]:
    from edgesmith.compiler.registry import pass_names

    return pass_names()


def check_target(target: Target, *, folder: Path, model: Model | None = None) -> Artifact:
    """Assert what every target promises, on ``model`` (a tiny transformer if left out); the artifact, for further checks.

    It says what it cannot run within a second; it writes one whole file; the file runs in a fresh process with the model's own inputs and outputs
    and agrees with the graph to 1e-4 of its largest output.

    Raises:
        AssertionError, NumericsError: a broken promise.
    """
    from edgesmith.compiler.profile.session import open_session

    model = model or tiny_model()
    started = time.perf_counter()
    assert errors(target.unsupported(model)) == (), "the target runs the model"
    assert time.perf_counter() - started < 1, "a target says why not within a second"
    artifact = target.lower(model, folder)
    assert artifact.path.stat().st_size == artifact.size_bytes, "the size is the file's"
    assert artifact.source_fingerprint == model.fingerprint, "the artifact knows what it was made from"
    assert [p.name for p in folder.iterdir()] == [artifact.path.name], "nothing else is left behind"
    inputs = model.example_inputs(2, seed=1)
    with open_session(artifact.path, target.runner, 1, log=folder / "runner.log") as session:
        outputs = session.run(tuple(x.numpy() for x in inputs))
    compare_outputs(flat_outputs(model, inputs), tuple(torch.from_numpy(np.array(o)) for o in outputs), 1e-4)
    return artifact


def imported_by(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after ``statement``: for tests of what stays lazy."""
    import subprocess

    code = f"import sys; {statement}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603 - our own interpreter and code
    return set(done.stdout.split())
