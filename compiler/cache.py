"""Content-addressed results: a step whose inputs are known is answered from disk, so that a killed build continues where it was.

Every entry is written whole or not at all. The key of a result is a hash of everything that it depends on: the input's fingerprint, the
pass in its text form, the seed, the data, and the versions of all that is installed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesmith.compiler.files import write_text

if TYPE_CHECKING:
    from edgesmith.compiler.buildfile import BuildSpec
    from edgesmith.compiler.instruments import Step
    from edgesmith.compiler.model import Model
    from edgesmith.compiler.passbase import Pass, PassContext, PassResult


def key_of(*parts: Any) -> str:
    """Hex SHA-256 of ``parts`` (plain data, paths and frozen dataclasses)."""
    return hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()


@cache
def versions_key() -> str:
    """Hash of every installed distribution's version and of edgesmith's own source."""
    installed = sorted(f"{d.name}=={d.version}" for d in importlib.metadata.distributions())
    package = Path(__file__).resolve().parent.parent
    sources = [path for room in ("compiler", "passes", "targets", "kernels") for path in sorted((package / room).rglob("*.py"))]
    return key_of(installed, [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources])


def files_key(path: Path) -> str:
    """Hash of a file's bytes; of every file below a folder; for a Python file, of all Python files beside it too."""
    if path.is_dir():
        return key_of([(str(p.relative_to(path)), _bytes_key(p)) for p in sorted(path.rglob("*")) if p.is_file()])
    if path.suffix == ".py":
        return key_of([(p.name, _bytes_key(p)) for p in sorted(path.parent.glob("*.py"))])
    return _bytes_key(path)


def build_key(spec: BuildSpec) -> str:
    """Hash of everything that a build's result depends on, without loading model or data: settings, files, versions."""
    return key_of(spec, [files_key(path) for path in sorted(set(_paths(spec)))], versions_key())


def _paths(spec: BuildSpec) -> Iterator[Path]:
    yield spec.model.source.path
    if spec.model.weights:
        yield spec.model.weights
    if spec.data:
        yield spec.data.source.path
    for text in (spec.accuracy.metric, *spec.passes):
        file, colon, _ = text.partition(".py:")
        if colon:
            yield spec.root / f"{file}.py"


def _bytes_key(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class PassCache:
    """An instrument that answers for a pass whose result is known.

    ``folder`` holds the entries; ``context_key`` stands for what a pass may look at beside the model and the seed.
    """

    folder: Path
    context_key: str

    def around(self, step: Pass, model: Model, ctx: PassContext, proceed: Step) -> PassResult:
        """The stored result, or that of running the step, stored."""
        from edgesmith.compiler.spec import format_pass

        teacher = ctx.teacher.fingerprint if ctx.teacher else ""
        key = key_of(model.fingerprint, format_pass(step), _code_key(step), teacher, ctx.seed, self.context_key, versions_key())
        known = self._read(key, model)
        if known is not None:
            return known
        result = proceed()
        self._write(key, step, result)
        return result

    def _read(self, key: str, before: Model) -> PassResult | None:
        from edgesmith.compiler.errors import SourceError
        from edgesmith.compiler.model import Model
        from edgesmith.compiler.passbase import PassResult
        from edgesmith.compiler.storage import record_from_json

        note = self.folder / f"{key}.json"
        if not note.is_file():
            return None
        record = record_from_json(json.loads(note.read_text()))
        try:
            model = Model.load(self.folder / f"{key}.pt2") if record.changed else before
        except (SourceError, zipfile.BadZipFile):
            return None
        if model.fingerprint != record.fingerprint:
            return None
        return PassResult(replace(model, history=before.history), record.changed, record.diagnostics, record.candidates, record.seconds)

    def _write(self, key: str, step: Pass, result: PassResult) -> None:
        from edgesmith.compiler.model import PassRecord
        from edgesmith.compiler.storage import record_to_json

        if result.changed:
            result.model.save(self.folder / f"{key}.pt2")
        record = PassRecord(step.name, result.seconds, result.changed, 0, 0, result.model.fingerprint, result.diagnostics, result.candidates)
        write_text(self.folder / f"{key}.json", json.dumps(record_to_json(record)))


def _code_key(step: Pass) -> str:
    """A user's pass is its code, too."""
    import inspect

    file = inspect.getsourcefile(type(step))
    return _bytes_key(Path(file)) if file else ""
