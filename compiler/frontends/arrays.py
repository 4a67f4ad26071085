"""Named arrays (an ``.npz``, or a dict from a user's function) -> Data.

Keys are ``x_train``, ``y_train`` and, where there are such parts, ``x_val``, ``y_val``, ``x_test``, ``y_test``. A model with several
inputs has one array for each, under its name: ``input_ids_train``, ``attention_mask_train``. Arrays hold what the model takes,
samples first; labels are integers.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgesmith.compiler.data import Array, Data, Split
from edgesmith.compiler.errors import DataError
from edgesmith.compiler.frontends.splits import complete
from edgesmith.compiler.suggest import did_you_mean
from edgesmith.compiler.toml_places import shown

PARTS = ("train", "val", "test")


def read_npz(path: Path, names: tuple[str, ...], seed: int) -> Data:
    """The data in an ``.npz``; ``names`` are those of the model's inputs.

    Raises:
        DataError: not an ``.npz``, damaged, with pickled arrays, or without the keys above.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except ValueError as error:
        why = "an array holds Python objects, whose loading could execute code" if "allow_pickle" in str(error) or "Object arrays" in str(error) else str(error)
        raise DataError("cannot be read", where=shown(path), why=why, hint="save numbers only, with numpy.savez") from error
    except (zipfile.BadZipFile, EOFError, OSError, KeyError) as error:
        raise DataError("not an .npz file, or a truncated one", where=shown(path), why=str(error)) from error
    return from_arrays(arrays, names, seed, shown(path))


def from_arrays(arrays: Mapping[str, Any], names: tuple[str, ...], seed: int, where: str) -> Data:
    """Data from arrays by key; see the module's docstring.

    Raises:
        DataError: a key is missing or unknown, or an array is not of numbers.
    """
    inputs = _input_names(arrays, names, where)
    known = {f"{name}_{part}" for part in PARTS for name in (*inputs, "y")}
    for key in arrays:
        if key not in known:
            raise DataError(f"unknown key {key!r}", where=where, hint=did_you_mean(str(key), known))
    parts = {part: _part(arrays, inputs, part, where) for part in PARTS if f"y_{part}" in arrays or any(f"{n}_{part}" in arrays for n in inputs)}
    return complete(parts["train"], parts.get("val"), parts.get("test"), seed, where)


def _input_names(arrays: Mapping[str, Any], names: tuple[str, ...], where: str) -> tuple[str, ...]:
    """What the inputs are called in the keys, in the order of the model's inputs."""
    if len(names) <= 1 and "x_train" in arrays:
        return ("x",)
    wanted = names or ("x",)
    missing = [f"{name}_train" for name in (*wanted, "y") if f"{name}_train" not in arrays]
    if missing:
        hint = did_you_mean(missing[0], map(str, arrays)) if arrays else "it is empty"
        raise DataError(f"there is no {missing[0]!r}", where=where, hint=hint)
    return wanted


def _part(arrays: Mapping[str, Any], inputs: tuple[str, ...], part: str, where: str) -> Split:
    for name in (*inputs, "y"):
        if f"{name}_{part}" not in arrays:
            raise DataError(f"there is no '{name}_{part}', though there is other {part!r} data", where=where)
    return make_split([arrays[f"{name}_{part}"] for name in inputs], arrays[f"y_{part}"], f"{where}: {part}")


def make_split(inputs: list[Any], labels: Any, where: str) -> Split:
    """A split of plain arrays.

    Raises:
        DataError: not arrays of numbers, empty, or of different lengths.
    """
    arrays = tuple(_numbers(value, where) for value in inputs)
    try:
        return Split(arrays, _numbers(labels, where))
    except DataError as error:
        raise DataError(error.what, where=where, why=error.why, hint=error.hint) from error


def _numbers(value: Any, where: str) -> Array:
    try:
        array: Array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError("not an array", where=where, why=str(error)) from error
    if array.dtype.kind not in "biuf" or array.ndim == 0:
        raise DataError(f"an array of {array.dtype} and shape {array.shape} is not samples of numbers", where=where)
    return array
