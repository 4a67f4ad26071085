"""A folder or zip of class folders of images -> Data.

Either ``<class>/image.jpg``, or ``train/<class>/...`` with ``val/`` (or ``validation/``, ``valid/``) and ``test/`` beside it where there are such
parts. Classes are numbered in the alphabetical order of the training folders. Images are decoded once, turned upright, resized by
their shorter side, cropped to the centre and kept as uint8 [sample, height, width, channel]; a model input is float32
[batch, channel, height, width], ``(value / 255 - mean) / std``. A zip is read where it lies and never unpacked.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from edgesmith.compiler.buildfile import DataSpec
from edgesmith.compiler.data import Array, Data, Split
from edgesmith.compiler.errors import DataError
from edgesmith.compiler.frontends.splits import complete
from edgesmith.compiler.suggest import did_you_mean
from edgesmith.compiler.toml_places import shown

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".gif", ".tif", ".tiff"})
PART_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test", "testing": "test"}
MAX_FILE_BYTES = 200_000_000


@dataclass(frozen=True)
class Normalise:
    """Stored uint8 [batch, height, width, channel] -> float32 [batch, channel, height, width], ``(value / 255 - mean) / std``."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        """One array in, one out."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        scaled = (arrays[0].astype(np.float32) / 255 - mean) / std
        return (np.ascontiguousarray(scaled.transpose(0, 3, 1, 2)),)


@dataclass(frozen=True)
class Augment:
    """Random changes of stored images: ``flip`` (left and right, every second image), ``shift`` (up to an eighth, the edge repeated)."""

    kinds: tuple[str, ...]

    def __call__(self, arrays: tuple[Array, ...], rng: np.random.Generator) -> tuple[Array, ...]:
        """A new array; the stored one is left alone."""
        (images,) = arrays
        for kind in self.kinds:
            images = _AUGMENTATIONS[kind](images, rng)
        return (images,)


def _flip(images: Array, rng: np.random.Generator) -> Array:
    chosen = rng.random(len(images)) < 0.5
    return np.where(chosen[:, None, None, None], images[:, :, ::-1], images)


def _shift(images: Array, rng: np.random.Generator) -> Array:
    count, height, width, _ = images.shape
    reach = (height // 8, width // 8)
    rows = np.arange(height) + rng.integers(-reach[0], reach[0] + 1, (count, 1))
    columns = np.arange(width) + rng.integers(-reach[1], reach[1] + 1, (count, 1))
    shifted: Array = images[np.arange(count)[:, None, None], rows.clip(0, height - 1)[:, :, None], columns.clip(0, width - 1)[:, None, :]]
    return shifted


_AUGMENTATIONS = {"flip": _flip, "shift": _shift}


def read_images(spec: DataSpec, seed: int) -> Data:
    """The images under ``spec.source``.

    Raises:
        DataError: no images, a corrupt one (named), a class that training does not have, or sizes that differ with no ``size`` given.
    """
    path = spec.source.path
    with _files(path) as files:
        parts = _sorted_parts(files, path, dict(spec.rename))
        classes = sorted({label for label, _ in parts["train"]})
        number = {label: index for index, label in enumerate(classes)}
        splits: dict[str, Split] = {}
        for part, entries in parts.items():
            unknown = next((label for label, _ in entries if label not in number), None)
            if unknown is not None:
                raise DataError(
                    f"class {unknown!r} of {part!r} is not in 'train'", where=shown(path), hint=f"{did_you_mean(unknown, classes)} [data] rename can say so"
                )
            splits[part] = _split(spec, files, entries, number)
    shapes = {split.inputs[0].shape[1:3] for split in splits.values()}
    if len(shapes) > 1:
        raise DataError(f"images have different sizes: {sorted(shapes)}", where=shown(path), hint="give [data] size")
    return complete(splits["train"], splits.get("val"), splits.get("test"), seed, shown(path))


@contextmanager
def _files(path: Path) -> Iterator[Mapping[str, Any]]:
    """Every image below a folder or in a zip: its path within -> something with ``read_bytes()``."""
    if path.is_dir():
        yield {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*")) if p.suffix.lower() in SUFFIXES and p.is_file()}
        return
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError("not a zip file, or a truncated one", where=shown(path), why=str(error)) from error
    with archive:
        names = sorted(n for n in archive.namelist() if PurePosixPath(n).suffix.lower() in SUFFIXES and not n.startswith("__MACOSX/"))
        yield {name: _Member(archive, name) for name in names}


@dataclass(frozen=True)
class _Member:
    archive: zipfile.ZipFile
    name: str

    def read_bytes(self) -> bytes:
        if self.archive.getinfo(self.name).file_size > MAX_FILE_BYTES:
            raise OSError(f"larger than {MAX_FILE_BYTES} bytes unpacked")
        return self.archive.read(self.name)


def _sorted_parts(files: Mapping[str, Any], path: Path, rename: Mapping[str, str]) -> dict[str, list[tuple[str, str]]]:
    """Part -> (class, file) of each of its images. Folders above that all images share are passed over."""
    paths = {name: PurePosixPath(name).parts for name in files}
    if not paths:
        raise DataError("holds no images", where=shown(path), hint=f"put them in class folders, as {', '.join(sorted(SUFFIXES))}")
    while len({p[0] for p in paths.values()}) == 1 and min(map(len, paths.values())) > 2 and next(iter(paths.values()))[0].lower() not in PART_NAMES:
        paths = {name: p[1:] for name, p in paths.items()}
    in_parts = any(p[0].lower() in PART_NAMES and len(p) > 2 for p in paths.values())
    parts: dict[str, list[tuple[str, str]]] = {}
    for name, p in paths.items():
        if len(p) < (3 if in_parts else 2) or (in_parts and p[0].lower() not in PART_NAMES):
            raise DataError(
                f"{name} is in no class folder", where=shown(path), hint="the layout is <class>/image.jpg or train/<class>/image.jpg, val/..., test/..."
            )
        part, label = (PART_NAMES[p[0].lower()], p[1]) if in_parts else ("train", p[0])
        parts.setdefault(part, []).append((rename.get(label, label), name))
    if "train" not in parts:
        raise DataError("there is no 'train' folder", where=shown(path), hint=f"there is {', '.join(sorted(parts))}")
    return parts


def _split(spec: DataSpec, files: Mapping[str, Any], entries: list[tuple[str, str]], number: Mapping[str, int]) -> Split:
    mode = "L" if len(spec.mean or spec.std or (0, 0, 0)) == 1 else "RGB"
    channels = 1 if mode == "L" else 3
    images: list[Array] = []
    for _, name in entries:
        image = _decode(files[name], f"{shown(spec.source.path)}: {name}", mode, spec.size)
        if images and image.shape != images[0].shape:
            sizes = f"{images[0].shape[1]}x{images[0].shape[0]} and {image.shape[1]}x{image.shape[0]}"
            raise DataError(f"images have different sizes: {sizes}", where=f"{shown(spec.source.path)}: {name}", hint="give [data] size")
        images.append(image)
    labels = np.asarray([number[label] for label, _ in entries], dtype=np.int64)
    normalise = Normalise(spec.mean or (0.0,) * channels, spec.std or (1.0,) * channels)
    return Split((np.stack(images),), labels, normalise, Augment(spec.augment) if spec.augment else None)


def _decode(file: Any, where: str, mode: str, size: tuple[int, int] | None) -> Array:
    """uint8 [height, width, channel]."""
    try:
        with Image.open(BytesIO(file.read_bytes())) as opened:
            if size is not None:
                opened.draft(mode, (size[1] * 2, size[0] * 2))
            image = ImageOps.exif_transpose(opened).convert(mode)
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        zipfile.BadZipFile,
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        RuntimeError,
        zlib.error,
    ) as error:
        raise DataError("cannot be decoded as an image", where=where, why=str(error).split("<")[0].strip(), hint="repair it or take it away") from error
    if size is not None and image.size != (size[1], size[0]):
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR)
    pixels: Array = np.asarray(image, dtype=np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
