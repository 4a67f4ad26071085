"""``edgesmith.toml`` -> BuildSpec. Every error names file, line, key and the nearest valid name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from edgesmith.compiler import schema
from edgesmith.compiler.budget import AccuracyGoal, Budget
from edgesmith.compiler.errors import BuildFileError, UserError
from edgesmith.compiler.suggest import did_you_mean
from edgesmith.compiler.toml_places import Key, nearest_line, override, parse, place, shown

_NAMED = "--target"
_FUNCTION = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)")


@dataclass(frozen=True)
class Source:
    """A file or folder, and the function in it where it is a Python file. ``path`` is absolute."""

    path: Path
    function: str | None = None

    def __str__(self) -> str:
        return f"{self.path}:{self.function}" if self.function else str(self.path)


@dataclass(frozen=True)
class InputSpec:
    """One model input: its ``shape`` is that of one sample, without the batch; ``dtype`` is torch's name."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    name: str | None = None


@dataclass(frozen=True)
class ModelSpec:
    """Where the model comes from. Without ``inputs`` the source itself must know them."""

    source: Source
    weights: Path | None = None
    inputs: tuple[InputSpec, ...] = ()


@dataclass(frozen=True)
class DataSpec:
    """Where samples come from. The rest is for images: (height, width), per channel of 0 to 1, (class folder, class that it means)."""

    source: Source
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class TargetSpec:
    """One artifact to make and measure. ``key`` is its place in the build file; it has none if ``--target`` alone names it."""

    name: str
    device: str = "host"
    threads: int = 1
    budget: Budget = field(default_factory=Budget)
    key: Key = field(default=(_NAMED,), repr=False, compare=False)


@dataclass(frozen=True)
class BuildSpec:
    """Everything that a build is asked for. ``file`` is the build file it was read from."""

    model: ModelSpec
    data: DataSpec | None = None
    accuracy: AccuracyGoal = field(default_factory=AccuracyGoal)
    targets: tuple[TargetSpec, ...] = ()
    passes: tuple[str, ...] = ()
    seed: int = 0
    file: Path | None = None
    overridden: frozenset[Key] = field(default=frozenset(), repr=False, compare=False)

    @property
    def root(self) -> Path:
        """The folder that relative paths, and the passes' own ``file.py:Class``, are relative to."""
        return self.file.parent if self.file else Path.cwd()

    def where(self, *key: str | int) -> str:
        """The place of a key, for messages: ``edgesmith.toml:12: pipeline.passes``."""
        if key[:1] == (_NAMED,):
            return _NAMED
        text = self.file.read_text(encoding="utf-8") if self.file else ""
        return place(self.file, text, key, self.overridden)

    @contextmanager
    def at(self, *key: str | int) -> Iterator[None]:
        """While open, an error about what the build file says at ``key`` gets that place in front of its own."""
        try:
            yield
        except UserError as error:
            error.where = f"{self.where(*key)}: {error.where}" if error.where else self.where(*key)
            raise


def read(path: str | Path, overrides: Sequence[str] = (), targets: Sequence[str] = ()) -> BuildSpec:
    """Read a build file.

    Args:
        path: the file; paths in it are relative to its folder.
        overrides: ``budget.latency_ms=5``: a dotted key and a TOML value (a bare word is a string). ``target.litert.threads=2``
            or ``target.0.threads=2`` reaches into a list.
        targets: names of the only targets to build; one that the file does not list has default settings.

    Raises:
        BuildFileError: the file is missing or malformed, a key is unknown, a value is of the wrong type or out of range,
            or a file that it names does not exist.
    """
    reader, parsed = _parsed(Path(path), overrides)
    return reader.spec(parsed, tuple(dict.fromkeys(targets)))


def model_spec(text: str) -> ModelSpec:
    """The model that a build file names, or a source as ``[model]`` takes it: a ``.pt2`` file, a Hugging Face folder, ``file.py:function``.

    Raises:
        BuildFileError: as of ``read``; or ``text`` is none of these.
    """
    if text.endswith(".toml"):
        reader, parsed = _parsed(Path(text))
        return reader.model(parsed.model)
    match = _FUNCTION.fullmatch(text)
    path = Path(match["file"] if match else text).absolute()
    if not path.exists():
        raise BuildFileError("does not exist", where=shown(path))
    if not (match or path.suffix == ".pt2" or path.is_dir()):
        raise BuildFileError("is no model", where=shown(path), hint=f"a build file, {A_MODEL}")
    return ModelSpec(Source(path, match["function"] if match else None))


def _parsed(file: Path, overrides: Sequence[str] = ()) -> tuple[_Reader, schema.BuildFile]:
    text = _text(file)
    raw = parse(file, text)
    overridden = frozenset(override(raw, assignment) for assignment in overrides)
    reader = _Reader(file.absolute(), text, overridden)
    try:
        return reader, schema.BuildFile.model_validate(raw)
    except ValidationError as error:
        raise reader.translate(error) from error


def _text(file: Path) -> str:
    if file.is_dir():
        raise BuildFileError("is a folder", where=shown(file), hint=f"give the file: {shown(file / 'edgesmith.toml')}")
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        there = [p.name for p in file.absolute().parent.glob("*.toml")]
        raise BuildFileError(
            "there is no such build file", where=shown(file), hint=did_you_mean(file.name, there) if there else "'edgesmith init' writes one"
        ) from error
    except UnicodeDecodeError as error:
        raise BuildFileError("not UTF-8 text", where=shown(file), why=f"byte {error.start}: {error.reason}") from error
    except OSError as error:
        raise BuildFileError("cannot be read", where=shown(file), why=str(error.strerror)) from error


A_MODEL = "'file.py:function', a .pt2 file or a Hugging Face folder"
_OWN_WORDS = {"fraction", "channels", "std"}
"""Error types of schema.py that tables raise about one of their keys; their messages hold the value already."""


@dataclass(frozen=True)
class _Reader:
    """One build file: turns what was parsed into a BuildSpec, and what was wrong into an error with its place."""

    file: Path
    text: str
    overridden: frozenset[Key]

    def error(self, key: Key, what: str, *, hint: str = "") -> BuildFileError:
        return BuildFileError(what, where=place(self.file, self.text, key, self.overridden), hint=hint)

    def translate(self, error: ValidationError) -> BuildFileError:
        """The first of the errors, in the order of the file, as our own. A missing key comes last: an unknown one may be meant for it."""
        first = min(error.errors(include_url=False), key=lambda e: (e["type"] == "missing", nearest_line(self.text, e["loc"])))
        key, kind, value = first["loc"], first["type"], first["input"]
        if kind in _OWN_WORDS:
            key = (*key, first["ctx"]["key"])
        if kind == "extra_forbidden":
            return self._unknown(key)
        if kind == "missing":
            what = f"{key[-1]!r} is missing" if len(key) > 1 else f"the table [{key[-1]}] is missing"
            return self.error(key, what, hint="'edgesmith init' writes a commented example")
        message = (first["msg"][0].lower() + first["msg"][1:]).replace("input should be", "must be")
        given = "" if kind in _OWN_WORDS or isinstance(value, (dict, list)) else f", not {value!r}"
        if kind == "literal_error":
            return self.error(key, f"{value!r} is not known", hint=did_you_mean(str(value), re.findall(r"'([^']+)'", message)))
        return self.error(key, message + given)

    def _unknown(self, key: Key) -> BuildFileError:
        table = tuple(str(part) for part in key[:-1] if not isinstance(part, int))
        name = str(key[-1])
        hint = did_you_mean(name, schema.keys_of(table))
        elsewhere = schema.tables_with(name)
        return self.error(key, "unknown key", hint=f"{name!r} belongs to [{elsewhere[0]}]" if elsewhere and not hint.startswith("did") else hint)

    def spec(self, parsed: schema.BuildFile, wanted: tuple[str, ...]) -> BuildSpec:
        """The parsed file with paths resolved, files looked for, and budgets merged."""
        if parsed.data is None and (parsed.accuracy.max_drop is not None or parsed.accuracy.floor is not None):
            raise self.error(("accuracy",), "accuracy cannot be judged without data", hint="add [data]")
        return BuildSpec(
            model=self.model(parsed.model),
            data=None if parsed.data is None else self._data(parsed.data),
            accuracy=AccuracyGoal(self._metric(parsed.accuracy.metric), parsed.accuracy.max_drop, parsed.accuracy.floor),
            targets=self._targets(parsed, wanted),
            passes=parsed.pipeline.passes,
            seed=parsed.pipeline.seed,
            file=self.file,
            overridden=self.overridden,
        )

    def model(self, table: schema.ModelTable) -> ModelSpec:
        """The source with its weights and inputs."""
        source = self._source(("model", "source"), table.source)
        if not (source.function or source.path.suffix == ".pt2" or source.path.is_dir()):
            raise self.error(("model", "source"), f"{table.source!r} is no model", hint=A_MODEL)
        for key, given in (("weights", table.weights), ("inputs", table.inputs)):
            if given and source.path.suffix == ".pt2":
                raise self.error(("model", key), f"a .pt2 file brings its own {key}", hint=f"leave {key} out")
        if table.weights is not None and source.path.is_dir():
            raise self.error(("model", "weights"), "a Hugging Face folder brings its own weights", hint="leave weights out")
        weights = None if table.weights is None else self._existing(("model", "weights"), table.weights)
        return ModelSpec(source, weights, tuple(InputSpec(i.shape, i.dtype, i.name) for i in table.inputs))

    def _data(self, table: schema.DataTable) -> DataSpec:
        source = self._source(("data", "source"), table.source)
        images = source.path.is_dir() or source.path.suffix == ".zip"
        if not (source.function or images or source.path.suffix == ".npz"):
            raise self.error(
                ("data", "source"), f"{table.source!r} is no data", hint="'file.py:function', a folder or .zip of class folders of images, or an .npz file"
            )
        for key in ("size", "mean", "std", "augment", "rename"):
            if getattr(table, key) and not images:
                raise self.error(("data", key), f"{key!r} is for a folder or .zip of images", hint="let the source give arrays as the model takes them")
        return DataSpec(source, table.size, table.mean, table.std, table.augment, tuple(table.rename.items()))

    def _metric(self, text: str) -> str:
        if text == "top1":
            return text
        if not _FUNCTION.fullmatch(text):
            raise self.error(("accuracy", "metric"), f"{text!r} is not known", hint=did_you_mean(text, ["top1", "file.py:function"]))
        return str(self._source(("accuracy", "metric"), text))

    def _targets(self, parsed: schema.BuildFile, wanted: tuple[str, ...]) -> tuple[TargetSpec, ...]:
        listed: list[TargetSpec] = []
        for index, table in enumerate(parsed.target):
            spec = TargetSpec(table.name, table.device, table.threads, _budget(parsed.budget, table.budget), ("target", index))
            if any((t.name, t.device, t.threads) == (spec.name, spec.device, spec.threads) for t in listed):
                raise self.error(("target", index, "name"), f"{spec.name!r} is listed twice with the same device and threads")
            listed.append(spec)
        if wanted:
            names = [spec.name for spec in listed]
            return tuple(s for s in listed if s.name in wanted) + tuple(TargetSpec(n, budget=_budget(parsed.budget)) for n in wanted if n not in names)
        if not listed:
            raise self.error(
                ("target",), "there is no [[target]]", hint="add [[target]] with a name, such as onnxruntime, litert or executorch; or give --target"
            )
        return tuple(listed)

    def _source(self, key: Key, text: str) -> Source:
        match = _FUNCTION.fullmatch(text)
        if text.endswith(".py"):
            raise self.error(key, f"{text!r} does not say which function", hint=f"write {text}:function")
        return Source(self._existing(key, match["file"] if match else text), match["function"] if match else None)

    def _existing(self, key: Key, text: str) -> Path:
        path = Path(self.file.parent / text).absolute()
        if path.exists():
            return path
        folder = next(parent for parent in path.parents if parent.is_dir())
        missing = path.relative_to(folder).parts[0]
        there = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        near = did_you_mean(missing, there) if there else f"{shown(folder)} is empty"
        raise self.error(
            key, f"there is no {shown(path)}", hint=near if near.startswith("did") or len(there) <= 8 else f"{shown(folder)} has nothing of that name"
        )


def _budget(general: schema.BudgetTable, own: schema.BudgetTable | None = None) -> Budget:
    """The general budget, with what a target has of its own in its place."""
    given = {**general.model_dump(exclude_none=True), **(own.model_dump(exclude_none=True) if own else {})}
    return Budget(**given)
