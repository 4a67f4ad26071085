"""Model -> verified artifact: lowered, run in its own runtime in a fresh process, and compared with the step before."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgesmith.compiler.cache import key_of, versions_key
from edgesmith.compiler.diagnostics import Diagnostic, Severity, errors
from edgesmith.compiler.errors import NumericsError, UnsupportedError
from edgesmith.compiler.files import translated, write_text
from edgesmith.compiler.fingerprint import file_hash
from edgesmith.compiler.instruments import compare_outputs, flat_outputs
from edgesmith.compiler.model import Model
from edgesmith.compiler.profile.session import open_session
from edgesmith.compiler.quiet import quiet
from edgesmith.compiler.simulate import DynamicGrid, simulated
from edgesmith.compiler.target import Artifact, Target

FLOAT_TOLERANCE = 1e-4
"""Of the largest output: the order of sums differs between runtimes, in float32."""
PLAN_TOLERANCE = 2.0
"""An INT8 file may differ from the plan's simulation by this many times the error that the plan itself makes (root mean square): a target
that honours nothing differs by once the plan's error, one that rounds otherwise by as much again."""


def refuse_unsupported(model: Model, target: Target) -> None:
    """Raise what ``target.unsupported`` says, as one error that names the first operator.

    Raises:
        UnsupportedError: the target cannot run the model.
    """
    reasons = errors(target.unsupported(model))
    if reasons:
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        raise UnsupportedError(f"target {target.name!r} cannot run this model", where=reasons[0].where, why=reasons[0].message + more, hint=reasons[0].hint)


@dataclass(frozen=True)
class Lowering:
    """Lowers models with a cache of artifacts in ``folder``; ``inputs`` (arrays of N samples) are what outputs are compared on."""

    folder: Path
    inputs: tuple[torch.Tensor, ...]

    def artifact(self, model: Model, target: Target) -> Artifact:
        """The verified artifact of ``model``; from the cache where it is known.

        Raises:
            UnsupportedError: the target cannot run the model.
            NumericsError: the file's outputs are not those of the model.
        """
        key = key_of(model.fingerprint, target.name, versions_key(), [x.shape for x in self.inputs])
        known = self._read(key)
        if known is not None:
            return known
        refuse_unsupported(model, target)
        with translated(self.folder):
            scratch = self.folder / f".{key}.{os.getpid()}"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        try:
            with quiet():
                artifact = target.lower(model, scratch)
            self._verify(model, artifact, target)
            with translated(self.folder):
                place = artifact.path.replace(self.folder / f"{key}{target.suffix}")
            artifact = replace(artifact, path=place)
            write_text(self.folder / f"{key}.json", json.dumps(artifact_to_json(artifact)))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return artifact

    def _read(self, key: str) -> Artifact | None:
        note = self.folder / f"{key}.json"
        if not note.is_file():
            return None
        artifact = artifact_from_json(json.loads(note.read_text()))
        return artifact if artifact.path.is_file() and file_hash(artifact.path) == artifact.sha256 else None

    def _verify(self, model: Model, artifact: Artifact, target: Target) -> None:
        """Compare the file's outputs with the model's.

        Raises:
            UnsupportedError: the runtime has no kernel for something that its converter wrote.
            NumericsError: they differ by more than float32 arithmetic, or the plan's own error, explains.
        """
        try:
            with open_session(artifact.path, target.runner, 1, extra=target.extra) as session:
                ran = tuple(torch.from_numpy(np.array(o)) for o in session.run(tuple(x.numpy() for x in self.inputs)))
        except UnsupportedError as error:
            hint = "replace the layer that this comes from, or leave the target out"
            raise UnsupportedError(f"target {target.name!r} cannot run this model", why=error.why, hint=hint) from error
        graph = flat_outputs(model, self.inputs)
        try:
            if model.quant is None or not model.quant.ops:
                compare_outputs(graph, ran, FLOAT_TOLERANCE)
            else:
                compare_outputs(graph, ran, None)
                compare_with_plan(graph, _simulated(model, self.inputs, target.dynamic_grid), ran)
        except NumericsError as error:
            raise NumericsError(f"lowering to {target.name!r} broke the numbers", why=error.what) from error


def _simulated(model: Model, inputs: tuple[torch.Tensor, ...], dynamic: DynamicGrid) -> tuple[torch.Tensor, ...]:
    """The plan's outputs, one sample at a time as the file runs: a dynamic grid may be that of a whole tensor."""
    run = simulated(model, dynamic)
    step = model.inputs[0].at_batch(1)[0]
    parts = []
    with torch.no_grad():
        for start in range(0, len(inputs[0]), step):
            outputs = run(*(x[start : start + step] for x in inputs))
            parts.append(outputs if isinstance(outputs, tuple) else (outputs,))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def compare_with_plan(graph: tuple[torch.Tensor, ...], plan: tuple[torch.Tensor, ...], ran: tuple[torch.Tensor, ...]) -> None:
    """Refuse a file whose outputs ``ran`` are further from ``plan`` than the plan is from the float ``graph``, times ``PLAN_TOLERANCE``.

    Raises:
        NumericsError: saying which output, and by how much.
    """
    for number, (exact, wanted, seen) in enumerate(zip(graph, plan, ran, strict=True)):
        if not exact.is_floating_point():
            continue
        scale = float(exact.double().square().mean().sqrt()) or 1.0
        allowed = PLAN_TOLERANCE * float((exact.double() - wanted.double()).square().mean().sqrt()) / scale + FLOAT_TOLERANCE
        found = float((seen.double() - wanted.double()).square().mean().sqrt()) / scale
        if found > allowed:
            raise NumericsError(
                f"output {number} differs from what the quantization plan says by {found:.2g} of its root mean square; {allowed:.2g} is allowed"
            )


def artifact_to_json(artifact: Artifact) -> dict[str, Any]:
    """The artifact as plain data."""
    data = {**asdict(replace(artifact, built_with={})), "path": str(artifact.path), "built_with": dict(artifact.built_with)}
    data["diagnostics"] = [{**asdict(d), "severity": d.severity.value} for d in artifact.diagnostics]
    return data


def artifact_from_json(data: Mapping[str, Any]) -> Artifact:
    """The inverse of ``artifact_to_json``."""
    diagnostics = tuple(Diagnostic(**{**d, "severity": Severity(d["severity"])}) for d in data["diagnostics"])
    return Artifact(**{**data, "path": Path(data["path"]), "diagnostics": diagnostics})
