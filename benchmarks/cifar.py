"""Small networks for CIFAR-10, trained here: ``python benchmarks/cifar.py [{resnet,mobile,vit,wide-resnet,wide-vit}...] [--data ZIP]``.

ZIP holds class folders of images under train/ and val/. ``out/benchmark-cifar`` gets the images, and what training needs to go on where it was stopped;
``benchmarks/weights`` the weights (safetensors). A quarter of an hour to an hour a network on two cores; without a name only the images are unpacked.
The last 5 000 training images in a shuffled order are for choosing, val/ is what other benchmarks judge on: ``python benchmarks/int8.py
benchmarks/cifar-{resnet,mobile,vit}.toml``. Forward and backward are in bfloat16 (the first three were trained before that, in float32).
"""

from __future__ import annotations

import argparse
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from cifar_networks import NETWORKS, WEIGHTS
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from edgesmith.compiler.data import Data, Split

DATA = Path(__file__).parents[2] / "shared" / "data" / "cifar10.zip"
FOLDER = Path(__file__).parents[1] / "out" / "benchmark-cifar"
CHOOSING = 5_000
BATCH = 128
MEAN, STD = (np.array(values, np.float32).reshape(3, 1, 1) for values in ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)))


SCHEDULES = {"resnet": (12, 4e-3), "mobile": (12, 4e-3), "vit": (10, 2e-3), "wide-resnet": (16, 4e-3), "wide-vit": (14, 1.5e-3)}
"""Epochs and peak learning rate of each."""


def data() -> Data:
    """Training images, shifted and flipped where they are trained on, those for choosing, and val/ as the test split."""
    with np.load(FOLDER / "images.npz") as file:
        (x, y), test = (file["train_x"], file["train_y"]), (file["val_x"], file["val_y"])
    order = np.random.default_rng(0).permutation(len(x))
    some, rest = order[-CHOOSING:], order[:-CHOOSING]
    return Data(Split((x[rest],), y[rest], normalised, shifted), Split((x[some],), y[some], normalised), Split((test[0],), test[1], normalised))


def _read(source: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, 3, 32, 32) bytes and labels of one part of the archive."""
    with zipfile.ZipFile(source) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith(f"{part}/") and name.endswith(".jpg"))
        classes = sorted({name.split("/")[1] for name in names})
        images = [np.asarray(Image.open(BytesIO(archive.read(name))).convert("RGB")).transpose(2, 0, 1) for name in names]
    return np.stack(images), np.array([classes.index(name.split("/")[1]) for name in names], np.int64)


def normalised(arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """Bytes as floats of mean 0 and deviation 1."""
    return tuple((x.astype(np.float32) / 255 - MEAN) / STD for x in arrays)


def shifted(arrays: tuple[np.ndarray, ...], rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Every second image mirrored, each moved by up to four pixels."""
    (x,) = arrays
    x = np.where(rng.random(len(x))[:, None, None, None] < 0.5, x[..., ::-1], x)
    padded = np.pad(x, ((0, 0), (0, 0), (4, 4), (4, 4)), mode="edge")
    corners = rng.integers(0, 9, (len(x), 2))
    return (np.stack([image[:, top : top + 32, left : left + 32] for image, (top, left) in zip(padded, corners, strict=True)]),)


def accuracy(module: nn.Module, split: Split) -> float:
    """Fraction of ``split`` that ``module`` gets right."""
    module.eval()
    with torch.no_grad():
        return float(np.concatenate([module(torch.from_numpy(x)).argmax(1).numpy() == y for (x,), y in split.batches(250)]).mean())


def unpack(source: Path) -> None:
    """Keep the images of the archive as arrays."""
    kept = FOLDER / "images.npz"
    if not kept.is_file():
        FOLDER.mkdir(parents=True, exist_ok=True)
        np.savez(kept, **{f"{part}_{key}": value for part in ("train", "val") for key, value in zip("xy", _read(source, part), strict=True)})


def train(name: str) -> None:
    """AdamW, one cycle; goes on after the last epoch that was finished."""
    epochs, rate = SCHEDULES[name]
    found = data()
    torch.manual_seed(0)
    module = NETWORKS[name]().to(memory_format=torch.channels_last)
    steps = len(found.train) // BATCH
    optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps, pct_start=0.25)
    state, first = FOLDER / f"{name}.state", 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first = saved["epoch"]
    for epoch in range(first, epochs):
        rng = np.random.default_rng(epoch)
        module.train()
        for index in rng.permutation(len(found.train))[: steps * BATCH].reshape(-1, BATCH):
            (x,) = found.train.batch(index, rng)
            with torch.autocast("cpu", torch.bfloat16):
                logits = module(torch.from_numpy(x).contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits.float(), torch.from_numpy(found.train.labels[index]), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "epoch": epoch + 1}, f"{state}.new")
        Path(f"{state}.new").replace(state)
        print(f"{name} epoch {epoch + 1}/{epochs}: {accuracy(module, found.validation):.4f}", flush=True)
    save_file({key: value.contiguous() for key, value in module.state_dict().items()}, WEIGHTS / f"cifar-{name}.safetensors")
    print(f"{name}: {accuracy(module, found.test):.4f} of {len(found.test)} images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*SCHEDULES, []])
    parser.add_argument("--data", type=Path, default=DATA)
    wanted = parser.parse_args()
    unpack(wanted.data)
    for name in wanted.names:
        train(name)


if __name__ == "__main__":
    main()
