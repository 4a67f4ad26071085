"""Three small networks for CIFAR-10, trained here: ``python benchmarks/cifar.py [{resnet,mobile,vit}...] [--data ZIP]``.

ZIP holds class folders of images under train/ and val/. ``out/benchmark-cifar`` gets the images, and what training needs to go on where it was stopped;
``benchmarks/weights`` the weights (safetensors). Half an hour to an hour a network on two cores; without a name only the images are unpacked.
The last 5 000 training images in a shuffled order are for choosing, val/ is what other benchmarks judge on: ``python benchmarks/int8.py
benchmarks/cifar-*.toml``.
"""

from __future__ import annotations

import argparse
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from edgesmith.compiler.data import Data, Split

DATA = Path(__file__).parents[2] / "shared" / "data" / "cifar10.zip"
FOLDER = Path(__file__).parents[1] / "out" / "benchmark-cifar"
WEIGHTS = Path(__file__).parent / "weights"
CHOOSING = 5_000
BATCH = 128
MEAN, STD = (np.array(values, np.float32).reshape(3, 1, 1) for values in ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)))


class Basic(nn.Module):
    """Two convolutions with a residual path (He et al., CVPR 2016)."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.second, self.norm2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        self.skip = nn.Sequential() if stride == 1 and inner == outer else nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm2(self.second(F.relu(self.norm1(self.first(x))))) + self.skip(x))


class Inverted(nn.Module):
    """Expand, filter depthwise, project (Sandler et al., CVPR 2018)."""

    def __init__(self, inner: int, outer: int, stride: int, factor: int = 4) -> None:
        super().__init__()
        wide = inner * factor
        expand = [nn.Conv2d(inner, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
        depthwise = [nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
        self.body = nn.Sequential(*expand, *depthwise, nn.Conv2d(wide, outer, 1, bias=False), nn.BatchNorm2d(outer))
        self.residual = stride == 1 and inner == outer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class Block(nn.Module):
    """A pre-norm transformer block (Dosovitskiy et al., ICLR 2021)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    """64 patches of 4x4, a convolutional stem."""

    def __init__(self, width: int = 96, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, width, 3, 2, 1))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


def staged(block: type[nn.Module], widths: tuple[int, ...], depth: int, head: int) -> nn.Module:
    """A stem, three stages of ``depth`` blocks, each but the first at half the resolution of the one before, and a head."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    inner = widths[0]
    for stage, outer in enumerate(widths):
        for number in range(depth):
            layers.append(block(inner, outer, 2 if stage and not number else 1))
            inner = outer
    if head:
        layers += [nn.Conv2d(inner, head, 1, bias=False), nn.BatchNorm2d(head), nn.ReLU6()]
        inner = head
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inner, 10))


NETWORKS = {
    "resnet": (lambda: staged(Basic, (16, 32, 64), 3, 0), 12, 4e-3),
    "mobile": (lambda: staged(Inverted, (16, 32, 64), 3, 256), 12, 4e-3),
    "vit": (Transformer, 10, 2e-3),
}
"""How each is made, its epochs, its peak learning rate."""


def _trained(name: str) -> nn.Module:
    module = NETWORKS[name][0]()
    module.load_state_dict(load_file(WEIGHTS / f"cifar-{name}.safetensors"))
    return module.eval()


def resnet() -> nn.Module:
    """The trained ResNet, for a build file."""
    return _trained("resnet")


def mobile() -> nn.Module:
    """The trained network of depthwise convolutions, for a build file."""
    return _trained("mobile")


def vit() -> nn.Module:
    """The trained transformer, for a build file."""
    return _trained("vit")


def data(augmented: bool = False) -> Data:
    """Training images (``augmented``: shifted and flipped), those for choosing, and val/ as the test split."""
    with np.load(FOLDER / "images.npz") as file:
        (x, y), test = (file["train_x"], file["train_y"]), (file["val_x"], file["val_y"])
    order = np.random.default_rng(0).permutation(len(x))
    some, rest = order[-CHOOSING:], order[:-CHOOSING]
    train = Split((x[rest],), y[rest], normalised, shifted if augmented else None)
    return Data(train, Split((x[some],), y[some], normalised), Split((test[0],), test[1], normalised))


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
    make, epochs, rate = NETWORKS[name]
    found = data(augmented=True)
    torch.manual_seed(0)
    module = make()
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
            loss = F.cross_entropy(module(torch.from_numpy(x)), torch.from_numpy(found.train.labels[index]), label_smoothing=0.1)
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
    parser.add_argument("names", nargs="*", choices=[*NETWORKS, []])
    parser.add_argument("--data", type=Path, default=DATA)
    wanted = parser.parse_args()
    unpack(wanted.data)
    for name in wanted.names:
        train(name)


if __name__ == "__main__":
    main()
