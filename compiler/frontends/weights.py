"""Weight files into modules. Nothing in a file is executed, and every tensor is accounted for by name."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgesmith.compiler.errors import SourceError
from edgesmith.compiler.suggest import did_you_mean
from edgesmith.compiler.toml_places import shown

_NESTED = ("state_dict", "model_state_dict", "model")
_SHOWN = 3


def load_weights(module: nn.Module, path: Path) -> None:
    """Copy the tensors of ``path`` (.safetensors, or a torch file that loads with ``weights_only``) into ``module``.

    Raises:
        SourceError: the file is damaged or pickled; or a tensor is missing, unexpected, of another shape or not finite.
    """
    given = read_weights(path)
    wanted = module.state_dict()
    _same_names(given, wanted, path)
    for name, value in given.items():
        if value.shape != wanted[name].shape:
            raise SourceError(f"{name!r} has shape {tuple(value.shape)}, the model wants {tuple(wanted[name].shape)}", where=shown(path))
    check_finite(given.items(), shown(path))
    module.load_state_dict(given, strict=False)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a weight file by name.

    Raises:
        SourceError: the file is damaged, pickled, or holds something else than tensors.
    """
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not tensors:
        raise SourceError("holds no weights", where=shown(path))
    return tensors


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], where: str) -> None:
    """Refuse NaN and infinite weights.

    Raises:
        SourceError: naming the tensors.
    """
    bad = [name for name, value in tensors if value.is_floating_point() and not torch.isfinite(value.detach()).all()]
    if bad:
        raise SourceError(
            f"{_some(bad)} {'holds' if len(bad) == 1 else 'hold'} NaN or infinite values", where=where, hint="the training that wrote them diverged"
        )


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise SourceError("not a safetensors file, or a truncated one", where=shown(path), why=str(error)) from error
    except OSError as error:
        raise SourceError("cannot be read", where=shown(path), why=str(error)) from error


def _read_torch(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = not zipfile.is_zipfile(path) and "Unsupported operand" in str(error)
        why = "it is not a torch file" if foreign else "it holds pickled objects, which could execute code"
        raise SourceError(
            "refused", where=shown(path), why=why, hint="save the state dict alone: safetensors.torch.save_file(module.state_dict(), ...)"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, UnicodeDecodeError, OSError) as error:
        raise SourceError("not a torch file, or a truncated one", where=shown(path), why=str(error).split("\n", 1)[0]) from error
    return _state_dict(content, path)


def _state_dict(content: Any, path: Path) -> dict[str, torch.Tensor]:
    nested = next((content[key] for key in _NESTED if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)), content)
    if not isinstance(nested, Mapping) or not all(isinstance(v, torch.Tensor) for v in nested.values()):
        raise SourceError("does not hold a state dict", where=shown(path), hint="save module.state_dict(), tensors by name")
    return {str(name): value for name, value in nested.items()}


def _same_names(given: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], path: Path) -> None:
    stored = {(v.data_ptr(), v.shape) for name, v in wanted.items() if name in given and v.numel()}
    missing = [name for name, v in wanted.items() if name not in given and (v.data_ptr(), v.shape) not in stored]
    unexpected = [name for name in given if name not in wanted]
    if missing:
        near = did_you_mean(missing[0], unexpected) if unexpected else ""
        hint = f"for {missing[0]!r}, {near}" if near.startswith("did") else "does the file belong to this model?"
        raise SourceError(f"{_some(missing)} {'is' if len(missing) == 1 else 'are'} missing", where=shown(path), hint=hint)
    if unexpected:
        near = did_you_mean(unexpected[0], wanted)
        hint = f"for {unexpected[0]!r}, {near}" if near.startswith("did") else "does the file belong to this model?"
        raise SourceError(f"the model has no {_some(unexpected)}", where=shown(path), hint=hint)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more
