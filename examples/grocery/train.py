"""Fine-tune one of the two networks on photos of products, and write its weights beside this file.

    python train.py efficientnet [PHOTOS]     # about six minutes on two cores
    python train.py transformer [PHOTOS]

PHOTOS is a folder or zip of train/<product>/, val/ and test/; the Grocery Store Dataset (Klasson et al., WACV 2019, MIT licence) at 112x112 if not given.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import numpy as np
import torch
from model import EFFICIENTNET, TRANSFORMER, ShelfTransformer, pretrained
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from edgesmith.compiler.buildfile import DataSpec, Source
from edgesmith.compiler.data import Data, Split
from edgesmith.compiler.frontends.images import read_images
from edgesmith.compiler.profile.devices import environment

HERE = Path(__file__).parent
BATCH, SEED = 32, 0
FAST_BFLOAT16 = "amx_bf16" in environment()["cpu_features"]
RECIPES = {"efficientnet": (12, 1e-3, 5e-3, EFFICIENTNET), "transformer": (60, 2e-3, 2e-3, TRANSFORMER)}
"""Epochs, peak learning rate of the body, of the head, and where the weights go."""


def accuracy(network: nn.Module, split: Split) -> float:
    """Fraction of ``split`` that ``network`` gets right."""
    network.eval()
    with torch.no_grad():
        right = [network(torch.from_numpy(x)).argmax(1).numpy() == y for (x,), y in split.batches(64)]
    return float(np.concatenate(right).mean())


def train(network: nn.Module, data: Data, epochs: int, body_lr: float, head_lr: float) -> None:
    """AdamW, one cycle, bfloat16 where the processor is fast at it."""
    rng = np.random.default_rng(SEED)
    head = [p for name, p in network.named_parameters() if name.startswith(("_fc.", "head."))]
    body = [p for name, p in network.named_parameters() if not name.startswith(("_fc.", "head."))]
    optimizer = torch.optim.AdamW([{"params": body, "lr": body_lr}, {"params": head, "lr": head_lr}], weight_decay=0.02)
    steps = len(data.train) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [body_lr, head_lr], total_steps=epochs * steps, pct_start=0.2)
    for epoch in range(epochs):
        network.train()
        for index in rng.permutation(len(data.train))[: steps * BATCH].reshape(-1, BATCH):
            (images,) = data.train.batch(index, rng)
            with torch.autocast("cpu", torch.bfloat16, enabled=FAST_BFLOAT16):
                logits = network(torch.from_numpy(images).contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), torch.from_numpy(data.train.labels[index]), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}/{epochs}: validation {accuracy(network, data.validation):.4f}", flush=True)


def main() -> None:
    """Train what the command line names."""
    name, *photos = sys.argv[1:]
    table = tomllib.loads((HERE / f"{name}.toml").read_text())["data"]
    source = Path(photos[0]) if photos else HERE / table["source"]
    form = {key: tuple(table[key]) for key in ("mean", "std", "augment")}
    spec = DataSpec(Source(source.resolve()), size=(table["size"],) * 2, rename=tuple(table["rename"].items()), **form)
    data = read_images(spec, SEED)
    classes = int(data.train.labels.max()) + 1
    epochs, body_lr, head_lr, weights = RECIPES[name]
    torch.manual_seed(SEED)
    network = pretrained(classes) if name == "efficientnet" else ShelfTransformer(classes)
    train(network, data, epochs, body_lr, head_lr)
    print(f"test {accuracy(network, data.test):.4f} of {len(data.test)} photos")
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, weights)


if __name__ == "__main__":
    main()
