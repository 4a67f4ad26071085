"""Architectures that nobody here has chosen: ``python benchmarks/architectures.py [--lower] [--kinds KIND ...]``.

Every configuration of transformers that can be built small by one recipe and given one kind of input. 40 % of each group of its axes go, heads
included; the removal is proved in float64, trains a step, is saved and loaded. With ``--lower`` it is also run by each runtime, to 1e-4. Each has a
process of its own. The exit code is 1 if anything was wrong that was not refused with a message.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from edgesmith.compiler import registry
from edgesmith.compiler.axes import Axes, prove, remove
from edgesmith.compiler.errors import EdgesmithError
from edgesmith.compiler.instruments import fixed_inputs
from edgesmith.compiler.lowering import Lowering
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.pipeline import Pipeline
from edgesmith.compiler.profile.devices import environment
from edgesmith.compiler.testing import randomise_weights

SHARE, TOLERANCE = 0.4, 1e-12
COVERED = 0.95
LONGEST_S = 240.0
MOST_PARAMETERS = 60_000_000
CLASSES = (
    "ImageClassification",
    "SequenceClassification",
    "AudioClassification",
    "SemanticSegmentation",
    "DepthEstimation",
    "CausalLM",
)
OUTPUTS = ("logits", "predicted_depth", "last_hidden_state", "pooler_output", "feature_maps", "encoder_last_hidden_state")
SMALL: Mapping[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd", "emb_dim", "embed_dim", "text_dim", "attention_hidden_size", "decoder_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "mlp_dim", "dim_ff"), 48),
    **dict.fromkeys(("ffn_hidden_size", "decoder_intermediate_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "linear_num_value_heads", "num_attention_groups"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "attention_head_size"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "patch_size", "attention_window"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_state", "ssm_num_heads", "ssm_state_size", "state_size", "rotary_dim", "num_conv_pos_embedding_groups"), 4),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "embedding_size", "projection_dim", "num_mel_bins", "mamba_d_head", "sliding_window"), 16),
    **dict.fromkeys(("first_k_dense_replace", "n_group", "topk_group", "n_groups"), 1),
    **dict.fromkeys(("image_size", "max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("max_source_positions", "lru_width"), 32),
    "num_experts_per_tok": 2,
    "num_labels": 5,
    "vocab_size": 100,
    "num_conv_pos_embeddings": 16,
}


@dataclass(frozen=True)
class Row:
    """What became of one configuration: ``ok``, ``unbuilt``, ``refused``, or what went wrong."""

    kind: str
    found: str
    name: str = ""
    parameters: int = 0
    nodes: int = 0
    covered: float = 0.0
    left: float = 0.0
    difference: float = 0.0
    why: str = ""
    seconds: float = 0.0


class UnbuiltError(Exception):
    """The recipe does not fit this configuration."""


class Named(nn.Module):
    """Positional inputs under the names that the model gives them; its first tensor is the output."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The first of the outputs that are looked for."""
        out = self.model(**dict(zip(self.names, inputs, strict=True)))
        value = next(out[key] for key in OUTPUTS if key in out and out[key] is not None)
        tensor: torch.Tensor = value[-1] if isinstance(value, (tuple, list)) else value
        return tensor


def shrunk(config: Any, depth: int = 0) -> Any:
    """``config`` with small numbers where it has known names, and so for the configurations inside."""
    for key, value in list(vars(config).items()):
        if key in SMALL and type(value) is int:
            setattr(config, key, SMALL[key])
        elif key == "use_cache":
            config.use_cache = False
        elif key == "image_size" and isinstance(value, (list, tuple)):
            config.image_size = [SMALL[key]] * 2
        elif key.endswith("_token_id") and isinstance(value, int):
            setattr(config, key, min(value, 2))
        elif key == "pad_token_id" and value is None:
            config.pad_token_id = 0
        elif key == "layer_types" and isinstance(value, list):
            config.layer_types = [value[0], next((other for other in value if other != value[0]), value[0])]
        elif isinstance(value, transformers.PretrainedConfig) and depth < 2:
            shrunk(value, depth + 1)
    return config


def inputs(model: Any) -> Iterator[tuple[tuple[str, ...], tuple[torch.Tensor, ...]]]:
    """Names and values that may suit ``model``, by what it calls its main input."""
    main = model.main_input_name
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "pixel_values": ((2, 3, 64, 64), (2, 3, 224, 224), (2, 8, 3, 64, 64), (2, 16, 3, 64, 64), (2, 1, 64, 64)),
        "pixel_values_videos": ((2, 8, 3, 64, 64),),
        "input_values": ((2, 4000), (2, 64, 16), (2, 1, 4000)),
        "input_features": ((2, 16, 64), (2, 64, 16), (2, 64, 160), (2, 80, 3000)),
        "past_values": ((2, getattr(model.config, "context_length", 512), getattr(model.config, "num_input_channels", 1)),),
    }
    for shape in shapes.get(main, ()):
        yield (main,), (torch.randn(shape),)
    words, other = torch.randint(3, 90, (2, 16)), torch.randint(3, 90, (2, 12))
    yield ("input_ids", "attention_mask"), (words, torch.ones_like(words))
    yield ("input_ids",), (words,)
    yield ("input_ids", "decoder_input_ids"), (words, other)
    yield ("inputs",), (words,)


def built(kind: str) -> tuple[str, nn.Module, tuple[torch.Tensor, ...]]:
    """The first model class of the configuration that runs on some input, with random weights."""
    try:
        config = shrunk(CONFIG_MAPPING[kind]())
    except Exception as error:
        raise UnbuiltError(str(error)) from error
    reason = "no model class"
    for auto in (*(getattr(transformers, f"AutoModelFor{name}") for name in CLASSES), transformers.AutoModel, transformers.AutoBackbone):
        if type(config) not in auto._model_mapping:
            continue
        torch.manual_seed(0)
        try:
            model = auto.from_config(config).float()
            if sum(p.numel() for p in model.parameters()) > MOST_PARAMETERS:
                reason = "too large"
                continue
            randomise_weights(model)
        except Exception as error:  # noqa: BLE001 - any author's own
            reason = str(error)
            continue
        for names, values in inputs(model):
            module = Named(model, names).eval()
            try:
                with torch.no_grad():
                    output = module(*values)
            except Exception as error:  # noqa: BLE001 - an input that does not suit
                reason = str(error)
                continue
            if output.numel() and bool(output.isfinite().all()):
                return type(model).__name__, module, values
    raise UnbuiltError(reason)


def trial(kind: str, *, lower: bool) -> Row:
    """Everything that is asked of one configuration."""
    started = time.monotonic()
    try:
        name, module, values = built(kind)
    except Exception as error:  # noqa: BLE001 - any author's own
        return Row(kind, "unbuilt", why=str(error)[:200])
    row = Row(kind, "refused", name, sum(p.numel() for p in module.parameters()))
    try:
        model = Model.from_module(module, values)
        axes = Axes.of(model)
        row = Row(kind, "refused", name, model.params, len(model.graph.graph.nodes), covered(axes))
        chosen = random.Random(0)
        removals = {g.name: chosen.sample(range(g.size), max(1, int(SHARE * g.size))) for g in axes.groups if g.size > 1}
        pruned = remove(model, removals, axes=axes)
        difference = prove(model, pruned, removals, axes=axes, tolerance=TOLERANCE)
        graph = pruned.edit(tensors=True)
        graph(*pruned.example_inputs()).float().square().mean().backward()
        with tempfile.TemporaryDirectory() as folder:
            pruned.save(Path(folder) / "model.pt2")
            loaded = Model.load(Path(folder) / "model.pt2")
            same = _with_noise(loaded, model), _with_noise(pruned, model)
            if lower:
                _lower(pruned, Path(folder))
        found = "ok" if torch.equal(*same) else "differs when loaded"
        row = Row(kind, found, name, model.params, row.nodes, row.covered, pruned.params / model.params, difference)
    except EdgesmithError as error:
        found = "refused" if error.exit_code == 2 else "wrong"
        row = replace(row, found=found, why=f"{error.what}: {error.where} {error.why}"[:400])
    except Exception:  # noqa: BLE001 - what this is here to find
        row = replace(row, found="crashed", why=traceback.format_exc()[-1500:])
    return replace(row, seconds=time.monotonic() - started)


def covered(axes: Axes) -> float:
    """The share of the parameters that some group has a part of, or that are bound to an output, which is never narrowed."""
    bound = {member.name for group in axes.groups for member in group.members} | {pin.where for pin in axes.pinned if pin.reason == "an output of the model"}
    sizes = {name: axes.state.tensor(name).numel() for name in {p.where for p in axes.pinned} | bound}
    return sum(sizes[name] for name in bound) / sum(sizes.values())


def _with_noise(model: Model, source: Model) -> torch.Tensor:
    torch.manual_seed(0)
    value = model(*source.example_inputs())
    assert isinstance(value, torch.Tensor)
    return value


def _lower(pruned: Model, folder: Path) -> None:
    """Run by each runtime, which is compared with the graph."""
    model = Pipeline.parse("fold-batch-norm,fold-constants").run(pruned)
    lowering = Lowering(folder, fixed_inputs(model, PassContext(), 4))
    for target in registry.target_names():
        lowering.artifact(model, registry.target(target))


def _send(connection: Connection, kind: str, lower: bool) -> None:
    connection.send(trial(kind, lower=lower))


def apart(kind: str, *, lower: bool) -> Row:
    """The trial in a process of its own, that may take ``LONGEST_S``."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, kind, lower))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(LONGEST_S) else Row(kind, "took too long")
    except EOFError:
        return Row(kind, "died")
    finally:
        process.kill()
        process.join()


def main() -> int:
    """Print the tables in Markdown; each row goes to stderr as JSON as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lower", action="store_true", help="run each in the three runtimes, too")
    parser.add_argument("--kinds", nargs="+", default=list(CONFIG_MAPPING), help="the names of configurations (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time")
    wanted = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    with ThreadPoolExecutor(wanted.jobs) as pool:
        for row in pool.map(partial(apart, lower=wanted.lower), wanted.kinds):
            rows.append(row)
            print(json.dumps(asdict(row)), file=sys.stderr, flush=True)
    return report(rows)


def report(rows: list[Row]) -> int:
    """Print the tables; 1 if anything was wrong."""
    machine = environment()
    print(f"{machine['cpu']}, {machine['os']}, transformers {transformers.__version__}, torch {torch.__version__}.\n")
    counts = Counter(row.found for row in rows)
    print("| " + " | ".join(counts) + " |\n" + "| --- " * len(counts) + "|\n| " + " | ".join(map(str, counts.values())) + " |\n")
    ok = [row for row in rows if row.found == "ok"]
    if ok:
        print(f"Largest difference {max(row.difference for row in ok):.1e}; parameters left: median {sorted(row.left for row in ok)[len(ok) // 2]:.2f}.\n")
    print("| model | parameters | what | why |\n| --- | --- | --- | --- |")
    for row in rows:
        if row.found not in {"ok", "unbuilt"}:
            print(f"| {row.name or row.kind} | {row.parameters} | {row.found} | {' '.join(row.why.split())[-300:]} |")
        elif row.found == "ok" and row.covered < COVERED:
            print(f"| {row.name} | {row.parameters} | covered {row.covered:.2f} | |")
    return 1 if counts.keys() - {"ok", "unbuilt", "refused"} else 0


if __name__ == "__main__":
    sys.exit(main())
