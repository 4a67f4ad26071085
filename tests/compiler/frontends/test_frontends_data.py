"""Data sources: functions, arrays, image folders and zips, and the checks against a model."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from edgesmith.compiler.buildfile import DataSpec, Source
from edgesmith.compiler.data import Data, Split
from edgesmith.compiler.errors import DataError
from edgesmith.compiler.frontends.data_source import check_data, load_data
from edgesmith.compiler.frontends.images import Augment, read_images
from edgesmith.compiler.frontends.splits import split_off
from edgesmith.compiler.model import Model


@pytest.fixture(scope="module")
def linear() -> Model:
    return Model.from_module(nn.Sequential(nn.Linear(4, 3)), (torch.zeros(1, 4),))


@pytest.fixture(scope="module")
def pictures() -> Model:
    return Model.from_module(nn.Sequential(nn.Conv2d(3, 2, 8), nn.Flatten()), (torch.zeros(1, 3, 8, 8),))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arrays(count: int = 60, part: str = "train") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(count)
    return {f"x_{part}": rng.normal(size=(count, 4)).astype(np.float32), f"y_{part}": np.arange(count) % 3}


def function(here: Path, body: str) -> DataSpec:
    (here / "data.py").write_text(f"import numpy as np\n\ndef data():\n{body}\n")
    return DataSpec(Source(here / "data.py", "data"))


X = "np.zeros((60, 4), np.float32)"
Y = "np.arange(60) % 3"


@pytest.mark.parametrize(
    "body",
    [
        f"    return {{'x_train': {X}, 'y_train': {Y}, 'x_test': {X}[:7], 'y_test': ({Y})[:7]}}",
        f"    return ({X}, {Y}), ({X}[:7], ({Y})[:7])",
        f"    return (({X},), {Y}), (({X}[:7],), ({Y})[:7])",
        f"    from edgesmith.compiler.data import Split\n    return Split(({X},), {Y}), Split(({X}[:7],), ({Y})[:7])",
    ],
    ids=["dict", "pairs", "pairs of tuples", "splits"],
)
def test_a_function_may_return_several_forms(here: Path, linear: Model, body: str) -> None:
    data = load_data(function(here, body), linear)
    assert (len(data.train), len(data.validation), len(data.test)) == (51, 9, 7)
    assert np.bincount(data.validation.labels).tolist() == [3, 3, 3]
    assert data.train.labels.dtype == np.int64


def test_data_as_it_is(here: Path, linear: Model) -> None:
    body = f"    from edgesmith.compiler.data import Data, Split\n    s = Split(({X},), {Y})\n    return Data(s, s.take(np.arange(5)), s.take(np.arange(6)))"
    data = load_data(function(here, body), linear)
    assert (len(data.train), len(data.validation), len(data.test)) == (60, 5, 6)


def test_an_npz(here: Path, linear: Model) -> None:
    np.savez(here / "d.npz", **arrays(60), **arrays(12, "val"), **arrays(9, "test"))
    data = load_data(DataSpec(Source(here / "d.npz")), linear)
    assert (len(data.train), len(data.validation), len(data.test)) == (60, 12, 9)
    np.testing.assert_array_equal(data.test.inputs[0], arrays(9, "test")["x_test"])


def test_several_inputs_go_by_their_names(here: Path) -> None:
    class Two(nn.Module):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return ids.float() * mask

    model = Model.from_module(Two(), (torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3)))
    named = {"y_train": np.arange(60) % 3, "mask_train": np.ones((60, 3), np.float32), "ids_train": np.zeros((60, 3), np.int64)}
    np.savez(here / "d.npz", **named)
    data = load_data(DataSpec(Source(here / "d.npz")), model)
    assert [a.dtype for a in data.train.inputs] == [np.int64, np.float32]
    np.savez(here / "d.npz", **{k.replace("mask", "msk"): v for k, v in named.items()})
    with pytest.raises(DataError, match=r"there is no 'mask_train'\n  hint: did you mean 'msk_train'"):
        load_data(DataSpec(Source(here / "d.npz")), model)


def bad(part: str = "train", **changes: object) -> dict[str, object]:
    return {**arrays(60), **arrays(12, "test"), **{f"{key}_{part}": value for key, value in changes.items()}}


NAN = arrays(60)["x_train"].copy()
NAN[41, 2] = np.nan
WRONG = [
    (bad(x=np.zeros((60, 5), np.float32)), "d.npz: train: samples of input 'input' have shape (5,), the model takes (4,)"),
    (
        bad(x=np.zeros((60, 4), np.float64)),
        "d.npz: train: samples of input 'input' are float64, the model takes float32\n  hint: convert them: .astype('float32')",
    ),
    (bad(x=NAN), "d.npz: train: sample 35 of input 'input' holds NaN or infinite values"),
    (bad(y=np.arange(60) % 4), "d.npz: train: label 3 of sample "),
    (bad("test", y=np.arange(12) - 1), "d.npz: test: label -1 of sample 0 is out of range: the model has 3 outputs, so that labels go from 0 to 2"),
    (bad(y=np.zeros(60)), "d.npz: train: labels are float64 of shape (51,)"),
    (bad(y=np.zeros((60, 3), np.int64)), "d.npz: train: labels are int64 of shape (51, 3)"),
    (bad(y=np.arange(59) % 3), "d.npz: train: input 0 holds 60 samples but there are 59 labels"),
    (bad(x=np.zeros((0, 4), np.float32), y=np.zeros(0, int)), "d.npz: train: a split holds no samples"),
    (bad(x=np.array(["a"] * 60)), "d.npz: train: an array of <U1 and shape (60,) is not samples of numbers"),
    (bad(x=np.array([None] * 60)), "d.npz: cannot be read: an array holds Python objects, whose loading could execute code"),
    ({**arrays(60), "x_tset": np.zeros(3)}, "d.npz: unknown key 'x_tset'\n  hint: did you mean 'x_test'?"),
    ({**arrays(60), "x_test": np.zeros((3, 4), np.float32)}, "d.npz: there is no 'y_test', though there is other 'test' data"),
    ({"x": np.zeros(3)}, "d.npz: there is no 'input_train'"),
    (arrays(3), "d.npz: test: 3 training samples are too few to split some off"),
]


@pytest.mark.parametrize(("content", "message"), WRONG, ids=[m[7:50] for _, m in WRONG])
def test_wrong_arrays_are_named(here: Path, linear: Model, content: dict[str, np.ndarray], message: str) -> None:
    np.savez(here / "d.npz", **content)
    with pytest.raises(DataError) as caught:
        load_data(DataSpec(Source(here / "d.npz")), linear)
    assert str(caught.value).startswith(message)


def test_a_truncated_npz(here: Path, linear: Model) -> None:
    np.savez(here / "d.npz", **arrays(60))
    whole = (here / "d.npz").read_bytes()
    for length in range(0, len(whole) - 1, len(whole) // 19):
        (here / "d.npz").write_bytes(whole[:length])
        with pytest.raises(DataError):
            load_data(DataSpec(Source(here / "d.npz")), linear)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    return 1 / 0", "data.py:4 in data(): ZeroDivisionError: division by zero"),
        ("    return None", "data.py: data(): returned NoneType"),
        (f"    return {X}, {Y}", "data.py: data(): train: ndarray is not a Split or a pair (inputs, labels)"),
        ("    return ([[1, 2], [3]], [0, 1]), ([], [])", "data.py: data(): train: not an array"),
        (
            f"    from edgesmith.compiler.data import Split\n    s = Split(({X},), {Y}, lambda a: (a[0] @ np.zeros((5, 4)),))\n    return s, s",
            "data.py:5 in <lambda>(): ValueError: matmul",
        ),
        (
            f"    from edgesmith.compiler.data import Split\n    s = Split(({X},), {Y}, lambda a: (np.log(a[0] - 1),))\n    return s, s",
            "data.py: train: sample 0 of input 'input' holds NaN",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_wrong_functions_are_named_with_their_line(here: Path, linear: Model, body: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_data(function(here, body), linear)
    assert str(caught.value).startswith(message)


def test_every_float_sample_is_looked_at(linear: Model) -> None:
    good = Split((np.zeros((600, 4), np.float32),), np.zeros(600, np.int64))
    x = good.inputs[0].copy()
    x[577, 3] = np.inf
    with pytest.raises(DataError, match="data: test: sample 577 of input 'input' holds NaN or infinite"):
        check_data(Data(good, good, Split((x,), good.labels)), linear)


def test_labels_of_other_tasks_are_left_alone(linear: Model) -> None:
    split = Split((np.zeros((9, 4), np.float32),), np.linspace(-1, 1, 9))
    check_data(Data(split, split, split), linear, classification=False)
    with pytest.raises(DataError, match="labels are float64"):
        check_data(Data(split, split, split), linear)


def test_splitting_off_is_stratified_disjoint_and_seeded() -> None:
    split = Split((np.arange(100)[:, None],), np.repeat([0, 1, 2], [50, 49, 1]))
    kept, taken = split_off(split, 0.2, 7, "test")
    ids = [set(part.inputs[0][:, 0].tolist()) for part in (kept, taken)]
    assert ids[0] | ids[1] == set(range(100))
    assert not ids[0] & ids[1]
    assert np.bincount(taken.labels, minlength=3).tolist() == [10, 10, 0]
    assert set(split_off(split, 0.2, 7, "test")[1].inputs[0][:, 0].tolist()) == ids[1]
    assert set(split_off(split, 0.2, 8, "test")[1].inputs[0][:, 0].tolist()) != ids[1]


def image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


RED, GREEN = (255, 0, 0), (0, 255, 0)


@pytest.fixture
def photos(here: Path) -> Path:
    for part, count in (("train", 6), ("val", 2), ("test", 3)):
        for i in range(count):
            image(here / "photos" / part / "green" / f"{i}.png", GREEN)
            image(here / "photos" / part / "red" / f"{i}.png", RED)
    return here / "photos"


def zipped(folder: Path, above: str = "") -> Path:
    target = folder.with_suffix(".zip")
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, f"{above}{file.relative_to(folder)}")
    return target


@pytest.mark.parametrize("form", [lambda p: p, zipped, lambda p: zipped(p, "download/photos/")], ids=["folder", "zip", "zip with folders above"])
def test_images_in_parts_and_classes(photos: Path, pictures: Model, form) -> None:
    data = load_data(DataSpec(Source(form(photos)), mean=(0.5, 0.5, 0.25), std=(0.5, 0.5, 0.25)), pictures)
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 4, 6)
    assert data.train.labels.tolist() == [0] * 6 + [1] * 6
    stored, (batch,) = data.test.inputs[0], data.test.batch(slice(3, 4))
    assert (stored.dtype, stored.shape[1:]) == (np.uint8, (8, 8, 3))
    np.testing.assert_allclose(batch, np.broadcast_to(np.float32([1, -1, -1])[None, :, None, None], (1, 3, 8, 8)))
    assert batch.dtype == np.float32


def test_class_folders_alone_are_split(here: Path) -> None:
    for i in range(20):
        image(here / "flat" / "a" / f"{i}.png", (i, 0, 0))
        image(here / "flat" / "b" / f"{i}.png", (i, 9, 0))
    data = read_images(DataSpec(Source(here / "flat")), seed=3)
    assert [np.bincount(s.labels).tolist() for s in (data.train, data.validation, data.test)] == [[14, 14], [2, 2], [4, 4]]


def test_images_are_resized_by_the_shorter_side_and_cropped(here: Path) -> None:
    for i in range(10):
        wide = Image.new("RGB", (40, 16), RED)
        wide.paste(GREEN, (12, 0, 28, 16))
        (here / "w" / "a").mkdir(parents=True, exist_ok=True)
        wide.save(here / "w" / "a" / f"{i}.png")
    (stored,) = read_images(DataSpec(Source(here / "w"), size=(8, 8)), 0).train.inputs
    assert stored.shape[1:] == (8, 8, 3)
    np.testing.assert_array_equal(stored[0, :, 1:-1], np.broadcast_to(np.uint8(GREEN), (8, 6, 3)))


def test_photographs_are_turned_upright_and_grey_where_one_channel_is_asked(here: Path) -> None:
    (here / "p" / "a").mkdir(parents=True)
    for i in range(10):
        lying = Image.new("L", (4, 2))
        lying.putpixel((0, 0), 255)
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
        lying.save(here / "p" / "a" / f"{i}.png", exif=exif)
    (stored,) = read_images(DataSpec(Source(here / "p"), mean=(0.5,)), 0).train.inputs
    assert stored.shape[1:] == (4, 2, 1)
    assert np.argwhere(stored[0, :, :, 0]).tolist() == [[0, 1]]


def test_augmentation_is_for_training_moves_and_flips(photos: Path) -> None:
    data = read_images(DataSpec(Source(photos), augment=("flip", "shift")), 0)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (64, 16, 16, 3), dtype=np.uint8)
    kept = images.copy()
    (flipped,) = Augment(("flip",))((images,), rng)
    same = (flipped == images).all(axis=(1, 2, 3))
    assert 16 < same.sum() < 48
    np.testing.assert_array_equal(flipped[~same], images[~same][:, :, ::-1])
    (shifted,) = Augment(("shift",))((images,), rng)
    inner = shifted[:, 4:12, 4:12]
    moves = [(r, c) for r in range(-2, 3) for c in range(-2, 3)]
    assert all(any((image[4 + r : 12 + r, 4 + c : 12 + c] == found).all() for r, c in moves) for image, found in zip(images, inner, strict=True))
    assert len({(image[4:12, 4:12] == found).all() for image, found in zip(images, inner, strict=True)}) == 2
    np.testing.assert_array_equal(images, kept)
    assert data.train.augment is not None
    assert data.train.batch(slice(0, 4), rng)[0].shape == (4, 3, 8, 8)


def _corrupt(photos: Path) -> None:
    file = photos / "val" / "red" / "1.png"
    file.write_bytes(file.read_bytes()[:50])


def _no_class(photos: Path) -> None:
    image(photos / "train" / "loose.png", RED)


def _other_class(photos: Path) -> None:
    (photos / "test" / "red").rename(photos / "test" / "rde")


SPOILT = [
    (_corrupt, "photos: val/red/1.png: cannot be decoded as an image"),
    (_no_class, "photos: train/loose.png is in no class folder"),
    (_other_class, "photos: class 'rde' of 'test' is not in 'train'\n  hint: did you mean 'red'? [data] rename can say so"),
    (
        lambda p: image(p / "train" / "red" / "7.png", RED, (9, 8)),
        "photos: train/red/7.png: images have different sizes: 8x8 and 9x8\n  hint: give [data] size",
    ),
    (lambda p: (p / "train").rename(p / "tren"), "photos: tren/green/0.png is in no class folder"),
    (lambda p: [f.unlink() for f in p.rglob("*.png")], "photos: holds no images"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILT, ids=[m[8:40] for _, m in SPOILT])
def test_spoilt_image_folders(photos: Path, spoil, message: str) -> None:
    spoil(photos)
    with pytest.raises(DataError) as caught:
        read_images(DataSpec(Source(photos)), 0)
    assert str(caught.value).startswith(message)


def test_a_class_may_be_renamed(photos: Path) -> None:
    _other_class(photos)
    data = read_images(DataSpec(Source(photos), rename=(("rde", "red"),)), 0)
    assert np.bincount(data.test.labels).tolist() == [3, 3]


def test_a_truncated_zip_and_one_with_a_damaged_image(photos: Path) -> None:
    archive = zipped(photos)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"photos\.zip: not a zip file, or a truncated one"):
        read_images(DataSpec(Source(archive)), 0)
    at = whole.index(b"IDAT") + 6
    archive.write_bytes(whole[:at] + b"\xff\xff\xff" + whole[at + 3 :])
    with pytest.raises(DataError, match=r"photos\.zip: test/green/0\.png: cannot be decoded"):
        read_images(DataSpec(Source(archive)), 0)


def test_a_zip_is_never_unpacked_to_the_paths_it_names(here: Path) -> None:
    image(here / "one.png", RED)
    with zipfile.ZipFile(here / "evil.zip", "w") as archive:
        for i in range(10):
            archive.write(here / "one.png", f"../evil/a/{i}.png")
    before = sorted(here.parent.rglob("*"))
    assert len(read_images(DataSpec(Source(here / "evil.zip")), 0).train) > 0
    assert sorted(here.parent.rglob("*")) == before
