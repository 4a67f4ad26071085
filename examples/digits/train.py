"""Train the digits transformer from nothing and write ``digits.safetensors``: a few minutes on two cores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from data import data
from model import model
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from edgesmith import Split

EPOCHS, BATCH, PEAK_LR, WEIGHT_DECAY, SMOOTHING, AVERAGE_OVER_STEPS, SEED = 200, 50, 2e-3, 0.05, 0.05, 200, 0
WEIGHTS = Path(__file__).with_name("digits.safetensors")


def accuracy(network: nn.Module, split: Split) -> float:
    """Fraction of ``split`` that ``network`` gets right."""
    network.eval()
    with torch.no_grad():
        right = [network(torch.from_numpy(x)).argmax(1).numpy() == y for (x,), y in split.batches(200)]
    return float(np.concatenate(right).mean())


def train() -> nn.Module:
    """The moving average of the weights after ``EPOCHS`` passes over the training split."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    splits, network = data(), model()
    steps = EPOCHS * (len(splits.train) // BATCH)
    average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(1 - 1 / AVERAGE_OVER_STEPS))
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps, pct_start=0.1)
    for epoch in range(EPOCHS):
        network.train()
        for index in rng.permutation(len(splits.train)).reshape(-1, BATCH):
            (images,) = splits.train.batch(index, rng)
            loss = F.cross_entropy(network(torch.from_numpy(images)), torch.from_numpy(splits.train.labels[index]), label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(network)
        if epoch % 20 == 19:
            print(f"epoch {epoch + 1}/{EPOCHS}: validation {accuracy(average.module, splits.validation):.4f}", flush=True)
    print(f"test {accuracy(average.module, splits.test):.4f} of {len(splits.test)} images")
    return average.module


if __name__ == "__main__":
    save_file(train().state_dict(), WEIGHTS)
    print(f"wrote {WEIGHTS.name}, {WEIGHTS.stat().st_size} bytes")
