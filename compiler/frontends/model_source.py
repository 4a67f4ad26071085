"""``[model]`` of a build file -> Model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from edgesmith.compiler.blame import line_below
from edgesmith.compiler.buildfile import InputSpec, ModelSpec
from edgesmith.compiler.errors import CaptureError, SourceError, UnsupportedError
from edgesmith.compiler.frontends.huggingface import read_folder
from edgesmith.compiler.frontends.user_code import Running, call
from edgesmith.compiler.frontends.weights import check_finite, load_weights
from edgesmith.compiler.model import Model
from edgesmith.compiler.quiet import quiet
from edgesmith.compiler.suggest import did_you_mean
from edgesmith.compiler.toml_places import shown

_BATCH = 2


def load_model(spec: ModelSpec) -> Model:
    """The fine-tuned model that a build file names, captured, with finite weights.

    Raises:
        SourceError: it cannot be read; with the user's own file and line where their code raised.
        CaptureError: it cannot be captured as one graph.
        UnsupportedError: its inputs are not known.
    """
    path = spec.source.path
    if path.suffix == ".pt2":
        model = Model.load(path)
    elif spec.source.function:
        model = _from_function(spec)
    else:
        module, inputs = read_folder(path)
        examples = _examples(module, spec.inputs or inputs, shown(path))
        with quiet():
            model = only_logits(Model.from_module(module, examples))
    check_finite(model.graph.state_dict().items(), shown(spec.weights or path))
    return model


def _from_function(spec: ModelSpec) -> Model:
    where = str(spec.source.function)
    result = call(spec.source)
    module, inputs = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if isinstance(module, Model):
        return module
    if not isinstance(module, nn.Module):
        raise SourceError(
            f"{where}() returned {type(result).__name__}, not a torch module",
            where=shown(spec.source.path),
            hint="return the module, or (module, example_inputs)",
        )
    if spec.weights is not None:
        load_weights(module, spec.weights)
    check_finite(module.state_dict().items(), shown(spec.weights or spec.source.path))
    given = _given(inputs, shown(spec.source.path)) if inputs is not None and not spec.inputs else None
    examples = given or _examples(module, spec.inputs, shown(spec.source.path))
    try:
        with Running(spec.source.path, CaptureError), quiet():
            return Model.from_module(module, examples)
    except CaptureError as error:
        if error.where or error.__cause__ is None:
            raise
        line = line_below(error.__cause__, spec.source.path.resolve().parent)
        raise CaptureError(error.what, where=line, why=error.why, hint=error.hint) from error


def _given(inputs: Any, where: str) -> tuple[torch.Tensor, ...]:
    """Example inputs as the user's function returned them: one tensor, or a sequence of them."""
    given = (inputs,) if isinstance(inputs, torch.Tensor) else inputs
    if not isinstance(given, Sequence) or not given or not all(isinstance(x, torch.Tensor) for x in given):
        raise SourceError("its example inputs are not tensors", where=where, hint="return (module, (tensor, ...)), batch first")
    return tuple(given)


def _examples(module: nn.Module, inputs: tuple[InputSpec, ...], where: str) -> tuple[torch.Tensor, ...]:
    """Inputs of the given shapes with a batch in front: normal floats, integers 0 or 1 (valid as ids and as masks)."""
    if not inputs:
        raise UnsupportedError(
            "the inputs of the model are not known", where=where, hint='give [model] inputs = [{name = "x", shape = [3, 224, 224]}], without the batch'
        )
    generator = torch.Generator().manual_seed(0)
    examples = []
    for spec in _in_order(module, inputs, where):
        dtype, shape = getattr(torch, spec.dtype), (_BATCH, *spec.shape)
        normal = dtype.is_floating_point
        examples.append((torch.randn(shape, generator=generator) if normal else torch.randint(0, 2, shape, generator=generator)).to(dtype))
    return tuple(examples)


def _in_order(module: nn.Module, inputs: tuple[InputSpec, ...], where: str) -> tuple[InputSpec, ...]:
    """``inputs`` in the order of the parameters of ``forward``: by their names if they have any."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters) or not any(i.name for i in inputs):
        return inputs
    accepted = [p.name for p in parameters if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}]
    forward = f"{type(module).__name__}.forward({', '.join(accepted)})"
    for spec in inputs:
        if spec.name not in accepted:
            raise SourceError(f"{forward} has no input {spec.name!r}", where=where, hint=did_you_mean(str(spec.name), accepted))
    by_name = {spec.name: spec for spec in inputs}
    first = accepted[: len(inputs)]
    if set(first) != set(by_name):
        skipped = next(name for name in first if name not in by_name)
        raise SourceError(
            f"{forward} takes {skipped!r} before {inputs[-1].name!r}",
            where=where,
            hint=f"give {skipped!r} too, or wrap the module in one that does not take it",
        )
    return tuple(by_name[name] for name in first)


def only_logits(model: Model) -> Model:
    """``model`` with its output ``logits`` alone, where it has that one among others."""
    names = [spec.name for spec in model.outputs]
    if len(names) == 1 or "logits" not in names:
        return model
    graph = model.edit()
    (output,) = graph.graph.find_nodes(op="output")
    output.args = (output.args[0][names.index("logits")],)
    result = model.with_graph(graph)
    return replace(result, outputs=(replace(result.outputs[0], name="logits"),))
