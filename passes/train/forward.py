"""A model's outputs over a split, and what of them is fit to learn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from edgesmith.compiler.data import Array, Split
from edgesmith.compiler.model import Model

Tensors = tuple[torch.Tensor, ...]


def as_tensors(arrays: Sequence[Array]) -> Tensors:
    """A batch of arrays as tensors that share their memory where they can."""
    return tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays)


def flat(outputs: torch.Tensor | Tensors) -> Tensors:
    """A graph's outputs as a tuple, also where there is one."""
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def batch_size(model: Model, wanted: int) -> int:
    """``wanted``, or the one batch size that a model without a dynamic batch runs."""
    fixed = model.inputs[0].shape[0]
    return wanted if fixed is None else fixed


def outputs_of(model: Model, split: Split, size: int) -> Iterator[tuple[slice, Tensors]]:
    """All of ``split`` in order, ``size`` samples at a time: (which samples, every output of them), without gradients.

    A model with a fixed batch gets its last batch filled up with samples from the start, whose outputs are dropped.
    """
    size = batch_size(model, size)
    for start in range(0, len(split), size):
        stop = min(start + size, len(split))
        index = np.arange(start, stop if model.dynamic_batch else start + size) % len(split)
        yield slice(start, stop), tuple(o[: stop - start] for o in flat(model(*as_tensors(split.batch(index)))))


def learnable(model: Model) -> tuple[int, ...]:
    """Positions of the outputs that a distance of logits fits: floating, with at least one dimension beside the batch."""
    return tuple(i for i, spec in enumerate(model.outputs) if spec.torch_dtype.is_floating_point and len(spec.shape) >= 2)


def rows(output: torch.Tensor) -> torch.Tensor:
    """``output`` as [rows, classes]: classes are the last of two or three dimensions, else the second (as maps of logits have them)."""
    if output.dim() > 3:
        output = output.movedim(1, -1)
    return output.reshape(-1, output.shape[-1]).float()


def label_output(model: Model, labels: Array) -> int | None:
    """Position of the first output [batch, classes] that ``labels`` are class numbers of; None where they teach nothing: all the same, or no classes."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or labels.min() == labels.max() or labels.min() < 0:
        return None
    fits = (i for i in learnable(model) if len(model.outputs[i].shape) == 2 and labels.max() < (model.outputs[i].shape[1] or 0))
    return next(fits, None)
