"""A Hugging Face folder (config.json and safetensors) -> module and inputs. Nothing is downloaded, and no code in the folder runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from edgesmith.compiler.buildfile import InputSpec
from edgesmith.compiler.errors import MissingExtraError, SourceError
from edgesmith.compiler.suggest import did_you_mean
from edgesmith.compiler.toml_places import shown


def read_folder(folder: Path) -> tuple[nn.Module, tuple[InputSpec, ...]]:
    """The model that ``config.json`` names under ``architectures``, and its inputs where the config knows them (images).

    Raises:
        SourceError: no config, no safetensors, pickled weights, a class of the folder's own, missing or unexpected weights.
        MissingExtraError: transformers is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise MissingExtraError("transformers", "huggingface") from error
    config_file = folder / "config.json"
    name = _architecture(config_file)
    _check_files(folder)
    model_class = getattr(transformers, name, None)
    if model_class is None:
        known = [n for n in dir(transformers) if n.startswith(name[:3]) and "For" in n]
        hint = did_you_mean(name, known) if known else "is it newer than the installed transformers?"
        raise SourceError(f"transformers {transformers.__version__} has no class {name!r}", where=shown(config_file), hint=hint)
    module = _load(model_class, folder)
    return module, _image_input(module)


def _architecture(config_file: Path) -> str:
    if not config_file.is_file():
        raise SourceError("there is no config.json", where=shown(config_file.parent), hint="give a folder that save_pretrained() wrote")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SourceError("not valid JSON", where=shown(config_file), why=str(error)) from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise SourceError("does not say its model_type", where=shown(config_file), hint="give a folder that save_pretrained() wrote")
    if "auto_map" in config:
        raise SourceError("needs code of its own (auto_map), which is not run", where=shown(config_file), hint="use 'file.py:function' that builds the module")
    names = config.get("architectures") or []
    if len(names) != 1:
        raise SourceError("does not name one class under 'architectures'", where=shown(config_file), why=f"it has {names}")
    return str(names[0])


def _check_files(folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        raise SourceError("holds an adapter", where=shown(folder), hint="merge it first: model.merge_and_unload().save_pretrained(...)")
    if (folder / "model.safetensors").exists() or (folder / "model.safetensors.index.json").exists():
        return
    if list(folder.glob("*.bin")):
        raise SourceError(
            "has pickled weights only, which could execute code", where=shown(folder), hint="save it again: model.save_pretrained(folder) writes safetensors"
        )
    raise SourceError("there is no model.safetensors", where=shown(folder), hint="save it again: model.save_pretrained(folder)")


def _load(model_class: Any, folder: Path) -> nn.Module:
    import torch
    from safetensors import SafetensorError

    from edgesmith.compiler.quiet import quiet

    try:
        with quiet():
            module, info = model_class.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
    except SafetensorError as error:
        raise SourceError("not a safetensors file, or a truncated one", where=shown(folder), why=str(error)) from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise SourceError(f"{model_class.__name__} cannot be loaded", where=shown(folder), why=str(error).strip().split("\n", 1)[0]) from error
    for problem, what in (("missing_keys", "is missing"), ("unexpected_keys", "is not part of the model"), ("mismatched_keys", "has another shape")):
        if info[problem]:
            names = sorted(map(str, info[problem]))
            raise SourceError(f"weight {names[0]!r} {what} ({len(names)} in all)", where=shown(folder), hint="is this the fine-tuned model, head included?")
    module.config.use_cache = False
    assert isinstance(module, nn.Module)
    return module


def _image_input(module: Any) -> tuple[InputSpec, ...]:
    config, size = module.config, getattr(module.config, "image_size", None)
    if module.main_input_name != "pixel_values" or size is None:
        return ()
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return (InputSpec((config.num_channels, height, width), "float32", "pixel_values"),)
