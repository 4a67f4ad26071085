"""``[data]`` of a build file -> Data, checked against the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from edgesmith.compiler.buildfile import DataSpec
from edgesmith.compiler.data import Data, Split
from edgesmith.compiler.errors import DataError
from edgesmith.compiler.frontends.arrays import from_arrays, make_split, read_npz
from edgesmith.compiler.frontends.splits import complete
from edgesmith.compiler.frontends.user_code import Running, call
from edgesmith.compiler.model import Model
from edgesmith.compiler.toml_places import shown

_CHUNK = 256


def load_data(spec: DataSpec, model: Model, seed: int = 0, *, classification: bool = True) -> Data:
    """The samples that a build file names, each part checked against the inputs and outputs of ``model``.

    A part that the source lacks is split off from its training samples (see splits.py). With ``classification``, labels
    must be class numbers below the width of the model's first output.

    Raises:
        DataError: unreadable, empty, of the wrong shape or dtype, not finite, or labels out of range; naming part and sample.
    """
    path = spec.source.path
    names = tuple(i.name for i in model.inputs)
    if spec.source.function:
        data = _from_result(call(spec.source, DataError), spec, names, seed)
    elif path.suffix == ".npz":
        data = read_npz(path, names, seed)
    else:
        from edgesmith.compiler.frontends.images import read_images

        data = read_images(spec, seed)
    if spec.source.function:
        with Running(path, DataError):  # transforms are the user's too
            check_data(data, model, shown(path), classification=classification)
    else:
        check_data(data, model, shown(path), classification=classification)
    return _with_int64_labels(data) if classification else data


def _with_int64_labels(data: Data) -> Data:
    return Data(*(replace(split, labels=split.labels.astype(np.int64)) for split in (data.train, data.validation, data.test)))


def _from_result(result: Any, spec: DataSpec, names: tuple[str, ...], seed: int) -> Data:
    """What a user's function may return: Data, a dict of arrays, or (train, test), each a Split or (inputs, labels)."""
    where = f"{shown(spec.source.path)}: {spec.source.function}()"
    if isinstance(result, Data):
        return result
    if isinstance(result, Mapping):
        return from_arrays(result, names, seed, where)
    if isinstance(result, tuple) and len(result) in {2, 3}:
        parts = [
            _as_split(part, f"{where}: {name}")
            for part, name in zip(result, ("train", "validation", "test") if len(result) == 3 else ("train", "test"), strict=True)
        ]
        return complete(parts[0], parts[1] if len(parts) == 3 else None, parts[-1], seed, where)
    raise DataError(
        f"returned {type(result).__name__}",
        where=where,
        hint="return edgesmith.Data, (train, test), (train, validation, test), or a dict with x_train, y_train ...",
    )


def _as_split(part: Any, where: str) -> Split:
    if isinstance(part, Split):
        return part
    if not (isinstance(part, tuple) and len(part) == 2):
        raise DataError(f"{type(part).__name__} is not a Split or a pair (inputs, labels)", where=where)
    inputs, labels = part
    return make_split(list(inputs) if isinstance(inputs, tuple) else [inputs], labels, where)


def check_data(data: Data, model: Model, where: str = "data", *, classification: bool = True) -> None:
    """Look at every sample as the model would be given it; of samples stored as integers (images) only the first few are tried.

    Raises:
        DataError: wrong number of inputs, shape or dtype; a value that is not finite; labels that are no class numbers.
    """
    for name, split in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        place = f"{where}: {name}"
        if classification:
            _check_labels(split, model, place)
        _check_form(split, model, place)
        made_of_floats = any(stored.dtype.kind == "f" for stored in split.inputs)
        for start in range(0, len(split) if made_of_floats else 1, _CHUNK):
            _check_finite(split, start, model, place)


def _check_labels(split: Split, model: Model, where: str) -> None:
    labels, classes = split.labels, model.outputs[0].shape[-1]
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(f"labels are {labels.dtype} of shape {labels.shape}", where=where, hint="one integer per sample: the number of its class, from 0")
    assert classes is not None
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        bad = low if low < 0 else high
        raise DataError(
            f"label {bad} of sample {int(np.argmax(labels == bad))} is out of range",
            where=where,
            why=f"the model has {classes} outputs, so that labels go from 0 to {classes - 1}",
        )


def _check_form(split: Split, model: Model, where: str) -> None:
    arrays = split.batch(slice(0, 1))
    if len(arrays) != len(model.inputs):
        raise DataError(f"samples have {len(arrays)} inputs, the model takes {len(model.inputs)}", where=where, why=", ".join(i.name for i in model.inputs))
    for array, spec in zip(arrays, model.inputs, strict=True):
        given, wanted = tuple(array.shape[1:]), tuple(spec.shape[1:])
        if given != wanted:
            raise DataError(f"samples of input {spec.name!r} have shape {given}, the model takes {wanted}", where=where)
        if str(array.dtype) != spec.dtype:
            raise DataError(
                f"samples of input {spec.name!r} are {array.dtype}, the model takes {spec.dtype}", where=where, hint=f"convert them: .astype({spec.dtype!r})"
            )


def _check_finite(split: Split, start: int, model: Model, where: str) -> None:
    for array, spec in zip(split.batch(slice(start, start + _CHUNK)), model.inputs, strict=True):
        finite = np.isfinite(array.reshape(len(array), -1)).all(axis=1) if array.dtype.kind == "f" else np.ones(len(array), dtype=bool)
        if not finite.all():
            raise DataError(f"sample {start + int(np.argmin(finite))} of input {spec.name!r} holds NaN or infinite values", where=where)
