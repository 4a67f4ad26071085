"""Samples for looking at a model, in batches that it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from edgesmith.compiler.data import Split
from edgesmith.compiler.errors import DataError
from edgesmith.compiler.model import Model

BATCH = 16


def calibration_batches(model: Model, split: Split, samples: int, seed: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Model inputs of ``samples`` samples drawn without replacement by ``seed``; all of them where there are fewer.

    A model with a fixed batch gets whole batches, the last one filled up with samples from the front.

    Raises:
        DataError: the data does not fit the model's inputs.
    """
    index = np.random.default_rng(seed).permutation(len(split))[:samples]
    size = BATCH if model.dynamic_batch else max(1, model.inputs[0].shape[0] or 1) if model.inputs[0].shape else 1
    if not model.dynamic_batch:
        index = np.resize(index, -(-len(index) // size) * size)
    for start in range(0, len(index), size):
        yield _checked(model, split.batch(index[start : start + size]))


def told(batches: Iterable[tuple[torch.Tensor, ...]], done: Callable[[int], None]) -> Iterator[tuple[torch.Tensor, ...]]:
    """``batches``, with ``done`` told the number of samples after each."""
    count = 0
    for batch in batches:
        yield batch
        count += len(batch[0])
        done(count)


def _checked(model: Model, arrays: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    if len(arrays) != len(model.inputs):
        raise DataError(f"the data has {len(arrays)} inputs, the model {len(model.inputs)}", where="calibration data")
    batch = []
    for array, spec in zip(arrays, model.inputs, strict=True):
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        fits = tensor.dim() == len(spec.shape) and all(want in {None, got} for want, got in zip(spec.shape, tensor.shape, strict=True))
        if not fits or tensor.dtype != spec.torch_dtype:
            what = f"input {spec.name!r} is {tensor.dtype} {tuple(tensor.shape)}, the model takes {spec.dtype} {spec.shape}"
            raise DataError(what, where="calibration data")
        batch.append(tensor)
    return tuple(batch)
