"""Means, norms, softmax and attention over the elements that are alive.

Each function takes the operator, its arguments by name (dead elements zero) and the masks of those that have dead elements; it returns the value and its mask.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, sqrt
from typing import Any

import torch

aten = torch.ops.aten

Given = dict[str, Any]
Masks = dict[str, torch.Tensor]


def _filled(x: torch.Tensor, alive: torch.Tensor, value: float) -> torch.Tensor:
    return torch.where(alive, x, torch.full((), value, dtype=x.dtype, device=x.device))


def _dims(given: Given, rank: int) -> list[int]:
    dim = given.get("dim")
    if dim is None or dim == []:
        return list(range(rank))
    return [d % rank for d in (dim if isinstance(dim, (list, tuple)) else [dim])]


def _any(alive: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    return alive.to(torch.float32).amax(dims, keepdim=keepdim) > 0.5


def _mask_of(given: Given, masks: Masks, name: str) -> torch.Tensor:
    return masks[name] if name in masks else torch.ones(given[name].shape, dtype=torch.bool)


def softmax(target: Any, given: Given, masks: Masks) -> tuple[Any, Any]:
    """Over what is alive."""
    alive = masks["self"]
    rest = {name: value for name, value in given.items() if name not in {"self"}}
    value = target(_filled(given["self"], alive, -inf), **rest)
    return _filled(value, alive, 0.0), alive


_FILL = {
    aten.amax.default: -inf,
    aten.amin.default: inf,
    aten.max.dim: -inf,
    aten.min.dim: inf,
    aten.max.default: -inf,
    aten.min.default: inf,
    aten.argmax.default: -inf,
    aten.argmin.default: inf,
    aten.logsumexp.default: -inf,
    aten.sum.dim_IntList: 0.0,
    aten.sum.default: 0.0,
    aten.linalg_vector_norm.default: 0.0,
    aten.norm.ScalarOpt_dim: 0.0,
    aten.norm.ScalarOpt_dim_dtype: 0.0,
    aten.norm.Scalar: 0.0,
    aten.frobenius_norm.dim: 0.0,
    aten.prod.dim_int: 1.0,
    aten.any.dim: 0.0,
    aten.any.dims: 0.0,
    aten.all.dim: 1.0,
}


def reduction(target: Any, given: Given, masks: Masks) -> tuple[Any, Any]:
    """Dead elements become what does not count."""
    alive = masks["self"]
    rest = {name: value for name, value in given.items() if name != "self"}
    value = target(_filled(given["self"], alive, _FILL[target]), **rest)
    left = _any(alive, _dims(given, alive.dim()), bool(given.get("keepdim", False)))
    if isinstance(value, (tuple, list)):
        return [_filled(v, left, 0) for v in value], [left] * len(value)
    return _filled(value, left, 0), left


def mean(target: Any, given: Given, masks: Masks) -> tuple[Any, Any]:
    """Sum over count."""
    alive, x = masks["self"], given["self"]
    dims, keepdim = _dims(given, x.dim()), bool(given.get("keepdim", False))
    left = _any(alive, dims, keepdim)
    return x.sum(dims, keepdim=keepdim) / alive.sum(dims, keepdim=keepdim).clamp(min=1), left


def variance(target: Any, given: Given, masks: Masks) -> tuple[Any, Any]:
    """Squared distance from the mean of what is alive; its root for a standard deviation."""
    alive, x = masks["self"], given["self"]
    dims, keepdim = _dims(given, x.dim()), bool(given.get("keepdim", False))
    correction = given["correction"] if "correction" in given else given.get("unbiased", True)
    correction = 1 if correction is None else correction
    count = alive.sum(dims, keepdim=True)
    centre = x.sum(dims, keepdim=True) / count.clamp(min=1)
    squares = _filled((x - centre) ** 2, alive, 0.0).sum(dims, keepdim=keepdim)
    shape = squares.shape
    value = squares / (count.reshape(shape) - float(correction)).clamp(min=1)
    if target in {aten.std.dim, aten.std.correction}:
        value = value.sqrt()
    left = _any(alive, dims, keepdim)
    if target is aten.var_mean.correction:
        return [_filled(value, left, 0.0), _filled(centre.reshape(shape), left, 0.0)], [left, left]
    return _filled(value, left, 0.0), left


def _standardised(x: torch.Tensor, alive: torch.Tensor, dims: list[int], eps: float, *, centred: bool = True) -> torch.Tensor:
    count = alive.sum(dims, keepdim=True).clamp(min=1)
    if centred:
        x = _filled(x - x.sum(dims, keepdim=True) / count, alive, 0.0)
    return x * torch.rsqrt((x * x).sum(dims, keepdim=True) / count + eps)


def layer_norm(target: Any, given: Given, masks: Masks) -> tuple[Any, Any]:
    """Mean and variance (or mean square) over what is alive of the last dimensions."""
    x, alive = given["input"], _mask_of(given, masks, "input")
    for name in ("weight", "bias"):
        if name in masks:
            alive = alive & masks[name]
    dims = list(range(-len(given["normalized_shape"]), 0))
    eps = torch.finfo(x.dtype).eps if given["eps"] is None else given["eps"]
    y = _standardised(_filled(x, alive, 0.0), alive, dims, eps, centred=target is aten.layer_norm.default)
    y = y if given["weight"] is None else y * given["weight"]
    y = y if given.get("bias") is None else y + given["bias"]
    return _filled(y, alive, 0.0), alive


def group_norm(target: Any, given: Given, masks: Masks) -> tuple[Any, Any]:
    """Mean and variance over what is alive of each group."""
    x, alive = given["input"], _mask_of(given, masks, "input")
    per_channel = (-1, *[1] * (x.dim() - 2))
    for name in ("weight", "bias"):
        if name in masks:
            alive = alive & masks[name].view(per_channel)
    grouped = (x.shape[0], given["num_groups"], -1)
    y = _standardised(_filled(x, alive, 0.0).reshape(grouped), alive.reshape(grouped), [-1], given["eps"]).reshape(x.shape)
    y = y if given["weight"] is None else y * given["weight"].view(per_channel)
    y = y if given["bias"] is None else y + given["bias"].view(per_channel)
    return _filled(y, alive, 0.0), alive


def channel_norm(target: Any, given: Given, masks: Masks) -> tuple[Any, Any]:
    """Batch and instance norm: with the input's own statistics those of what is alive, else plain arithmetic per channel."""
    x, alive = given["input"], _mask_of(given, masks, "input")
    per_channel = (-1, *[1] * (x.dim() - 2))
    for name in ("weight", "bias", "running_mean", "running_var"):
        if name in masks:
            alive = alive & masks[name].view(per_channel)
    of_input = given["training"] if target is aten.batch_norm.default else given["use_input_stats"]
    if not of_input:
        return _filled(target(**given), alive, 0.0), alive
    dims = [d for d in range(x.dim()) if d != 1 and (d > 1 or target is aten.batch_norm.default)]
    y = _standardised(_filled(x, alive, 0.0), alive, dims, given["eps"])
    y = y if given["weight"] is None else y * given["weight"].view(per_channel)
    y = y if given["bias"] is None else y + given["bias"].view(per_channel)
    return _filled(y, alive, 0.0), alive


def prelu(target: Any, given: Given, masks: Masks) -> tuple[Any, Any]:
    """Slopes along dimension 1."""
    x, alive = given["self"], _mask_of(given, masks, "self")
    if "weight" in masks:
        alive = alive & masks["weight"].view(-1, *[1] * (x.dim() - 2))
    return _filled(target(x, given["weight"]), alive, 0.0), alive


def weight_norm(target: Any, given: Given, masks: Masks) -> tuple[Any, Any]:
    """Dead elements are zero and add nothing to the norm."""
    alive = _mask_of(given, masks, "v") & _mask_of(given, masks, "g")
    return _filled(target(given["v"], given["g"], given["dim"]), alive, 0.0), alive


def glu(target: Any, given: Given, masks: Masks) -> tuple[Any, Any]:
    """Both halves must be alive."""
    first, second = masks["self"].chunk(2, given["dim"])
    alive = first & second
    return _filled(target(given["self"], given["dim"]), alive, 0.0), alive


def attention(target: Any, given: Given, masks: Masks) -> tuple[Any, Any]:
    """Written out: a softmax over the keys that are alive, scaled for the head size that was."""
    query, key, value = given["query"], given["key"], given["value"]
    alive = {name: _mask_of(given, masks, name).to(torch.float32) for name in ("query", "key", "value")}
    if given["enable_gqa"]:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
        alive["key"], alive["value"] = alive["key"].repeat_interleave(times, -3), alive["value"].repeat_interleave(times, -3)
    scale = 1 / sqrt(query.shape[-1]) if given["scale"] is None else given["scale"]
    scores = query @ key.transpose(-2, -1) * scale
    present = (alive["query"] @ alive["key"].transpose(-2, -1)) > 0.5
    bias = given["attn_mask"]
    if "attn_mask" in masks:
        present = present & masks["attn_mask"]
    seen = present
    if bias is not None and bias.dtype == torch.bool:
        seen = seen & bias
    elif bias is not None:
        scores = scores + bias
    if given["is_causal"]:
        seen = seen & torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    weights = torch.nan_to_num(_filled(scores, seen, -inf).softmax(-1), nan=0.0)
    left = (present.to(torch.float32) @ alive["value"]) > 0.5
    return _filled(weights @ value, left, 0.0), left


TABLE: dict[Any, Callable[[Any, Given, Masks], tuple[Any, Any]]] = {
    **dict.fromkeys((aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default), softmax),
    **dict.fromkeys(_FILL, reduction),
    **dict.fromkeys((aten.mean.dim, aten.mean.default), mean),
    **dict.fromkeys((aten.var.dim, aten.var.correction, aten.std.dim, aten.std.correction, aten.var_mean.correction), variance),
    **dict.fromkeys((aten.layer_norm.default, aten.rms_norm.default), layer_norm),
    **dict.fromkeys((aten.batch_norm.default, aten.instance_norm.default), channel_norm),
    aten.group_norm.default: group_norm,
    aten.prelu.default: prelu,
    aten._weight_norm.default: weight_norm,
    aten.glu.default: glu,
    aten.scaled_dot_product_attention.default: attention,
}
