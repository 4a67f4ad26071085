"""Model sources: functions, .pt2 files, Hugging Face folders, and the weights that go into them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgesmith.compiler.buildfile import InputSpec, ModelSpec, Source
from edgesmith.compiler.errors import CaptureError, EdgesmithError, SourceError, UnsupportedError
from edgesmith.compiler.frontends.model_source import load_model
from edgesmith.compiler.frontends.weights import load_weights, read_weights
from edgesmith.compiler.model import Model

NET = """\
from torch import nn
from layers import Head

def net():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Head(6, 3))

def with_inputs():
    import torch
    return net(), torch.zeros(1, 4)

def pair():
    return Two()

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 2)
    def forward(self, ids, mask=None, kinds=None):
        return self.head((self.embed(ids) * mask[..., None].float()).sum(1))

def broken():
    return 1 / 0

def numbers():
    return 3

def greedy(size):
    return net()

def branching():
    return Branching()

class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x
"""
LAYERS = "from torch import nn\n\nclass Head(nn.Linear):\n    pass\n"
X = (InputSpec((4,), "float32", "input"),)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "layers.py").write_text(LAYERS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spec(folder: Path, function: str, inputs: tuple[InputSpec, ...] = X, weights: Path | None = None) -> ModelSpec:
    return ModelSpec(Source(folder / "net.py", function), weights, inputs)


def weights_of_net() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"0.weight": (6, 4), "0.bias": (6,), "2.weight": (3, 6), "2.bias": (3,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def by_hand(x: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
    return nn.functional.linear(nn.functional.linear(x, w["0.weight"], w["0.bias"]).relu(), w["2.weight"], w["2.bias"])


def test_a_function_and_its_weights(folder: Path) -> None:
    weights = weights_of_net()
    save_file(weights, folder / "net.safetensors")
    model = load_model(spec(folder, "net", weights=folder / "net.safetensors"))
    x = torch.randn(5, 4)
    torch.testing.assert_close(model(x), by_hand(x, weights))
    assert model.inputs[0].shape == (None, 4)


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w, "epoch": 3}], ids=["bare", "checkpoint"])
def test_torch_files_without_pickled_objects_are_weights_too(folder: Path, wrap) -> None:
    weights = weights_of_net()
    torch.save(wrap(weights), folder / "net.pth")
    x = torch.randn(5, 4)
    torch.testing.assert_close(load_model(spec(folder, "net", weights=folder / "net.pth"))(x), by_hand(x, weights))


def test_a_function_may_bring_its_example_inputs(folder: Path) -> None:
    assert load_model(spec(folder, "with_inputs", ())).inputs[0].shape == (None, 4)


def test_two_folders_with_modules_of_the_same_name_do_not_mix(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "net.py").write_text("from layers import Head\n\ndef net():\n    return Head(4, 7)\n")
    (other / "layers.py").write_text("from torch import nn\n\ndef Head(a, b):\n    return nn.Linear(a, b + 1)\n")
    for _ in range(2):
        assert load_model(spec(folder, "net")).outputs[0].shape == (None, 3)
        assert load_model(spec(other, "net")).outputs[0].shape == (None, 8)


def test_inputs_are_put_in_the_order_of_forward(folder: Path) -> None:
    mask, ids = InputSpec((5,), "float32", "mask"), InputSpec((5,), "int64", "ids")
    assert [(i.name, i.dtype) for i in load_model(spec(folder, "pair", (mask, ids))).inputs] == [("ids", "int64"), ("mask", "float32")]


@pytest.mark.parametrize(
    ("function", "inputs", "message"),
    [
        ("nett", X, "net.py: there is no function 'nett'\n  hint: did you mean 'net'?"),
        ("broken", X, "net.py:23 in broken(): ZeroDivisionError: division by zero"),
        ("numbers", X, "net.py: numbers() returned int, not a torch module"),
        ("greedy", X, "net.py: greedy() needs arguments: size"),
        ("net", (), "net.py: the inputs of the model are not known"),
        ("net", (InputSpec((5,), "float32", "input"),), "Sequential cannot be captured as one graph"),
        ("net", (InputSpec((4,), "float32", "imput"),), "net.py: Sequential.forward(input) has no input 'imput'\n  hint: did you mean 'input'?"),
        ("pair", (InputSpec((4,), "int64", "ids"), InputSpec((4,), "int64", "kinds")), "net.py: Two.forward(ids, mask, kinds) takes 'mask' before 'kinds'"),
        ("branching", (InputSpec((4,), "float32", "x"),), "net.py:36 in forward(): Branching cannot be captured as one graph"),
    ],
)
def test_what_is_wrong_with_a_function_is_said_with_its_line(folder: Path, function: str, inputs: tuple[InputSpec, ...], message: str) -> None:
    with pytest.raises((SourceError, CaptureError, UnsupportedError)) as caught:
        load_model(spec(folder, function, inputs))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import torch\ndef net(:\n", "net.py:2: SyntaxError: "),
        ("import torch\nimport no_such_thing\n", "net.py:2: ModuleNotFoundError: No module named 'no_such_thing'\n  hint: install no_such_thing"),
        ("import sys\nsys.exit(3)\n", "net.py:2: SystemExit: 3"),
        ("def a():\n    raise ValueError('first\\nsecond')\na()\n", "net.py:2 in a(): ValueError: first"),
        ("x = 3\n", "net.py: there is no function 'net'"),
    ],
)
def test_a_file_that_does_not_import(folder: Path, text: str, message: str) -> None:
    (folder / "net.py").write_text(text)
    with pytest.raises(SourceError) as caught:
        load_model(spec(folder, "net"))
    assert str(caught.value).startswith(message)
    assert caught.value.__cause__ is not None or "function" in message


def _without(name: str):
    return lambda w: {k: v for k, v in w.items() if k != name}


def _with(**tensors: torch.Tensor):
    return lambda w: {**w, **{k.replace("_", "."): v for k, v in tensors.items()}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("2.bias"), "'2.bias' is missing"),
        (lambda w: {k.replace("2.weight", "2.weigth"): v for k, v in w.items()}, "'2.weight' is missing\n  hint: for '2.weight', did you mean '2.weigth'?"),
        (_with(**{"3_bias": torch.zeros(3)}), "the model has no '3.bias'\n  hint: for '3.bias', did you mean '"),
        (_with(**{"2_bias": torch.zeros(4)}), "'2.bias' has shape (4,), the model wants (3,)"),
        (_with(**{"2_bias": torch.tensor([0.0, float("nan"), 0.0])}), "'2.bias' holds NaN or infinite values"),
        (
            _with(**{"2_bias": torch.tensor([0.0, float("inf"), 0.0]), "0_bias": torch.full((6,), float("nan"))}),
            "'0.bias', '2.bias' hold NaN or infinite values",
        ),
        (lambda w: {}, "holds no weights"),
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_every_weight_is_accounted_for_by_name(folder: Path, change, message: str, suffix: str) -> None:
    file = folder / f"w.{suffix}"
    changed = change(weights_of_net())
    save_file(changed, file) if suffix == "safetensors" else torch.save(changed, file)
    with pytest.raises(SourceError) as caught:
        load_model(spec(folder, "net", weights=file))
    assert str(caught.value).startswith(f"w.{suffix}: {message}")


class Executes:
    """An object whose unpickling makes a file."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pt", lambda f: torch.save({"0.weight": Executes()}, f), "refused: it holds pickled objects"),
        ("w.pt", lambda f: torch.save(nn.Linear(1, 1), f), "refused: it holds pickled objects"),
        ("w.pt", lambda f: f.write_bytes(b"not a torch file at all"), "refused: it is not a torch file"),
        ("w.pt", lambda f: torch.save([1, 2], f), "does not hold a state dict"),
        ("w.pt", lambda f: f.write_bytes(b""), "not a torch file, or a truncated one"),
        ("w.safetensors", lambda f: f.write_bytes(b""), "not a safetensors file, or a truncated one"),
        ("w.safetensors", lambda f: f.write_bytes(b"\xff" * 64), "not a safetensors file, or a truncated one"),
    ],
)
def test_files_that_are_no_weights(folder: Path, name: str, content, message: str) -> None:
    content(folder / name)
    with pytest.raises(SourceError) as caught:
        read_weights(folder / name)
    assert str(caught.value).startswith(f"{name}: {message}")
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_weight_file_cut_at_any_length_is_refused(folder: Path, suffix: str) -> None:
    file = folder / f"w.{suffix}"
    weights = weights_of_net()
    save_file(weights, file) if suffix == "safetensors" else torch.save(weights, file)
    whole = file.read_bytes()
    for length in range(0, len(whole) - 1, max(1, len(whole) // 23)):
        file.write_bytes(whole[:length])
        with pytest.raises(SourceError):
            read_weights(file)


def test_tied_weights_may_be_stored_once(folder: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    module[1].weight = module[0].weight
    save_file({"0.weight": torch.ones(4, 4)}, folder / "w.safetensors")
    load_weights(module, folder / "w.safetensors")
    assert bool((module[1].weight == 1).all())


def test_a_pt2_is_a_model(folder: Path) -> None:
    made = load_model(spec(folder, "net"))
    made.save(folder / "net.pt2")
    read = load_model(ModelSpec(Source(folder / "net.pt2")))
    x = torch.randn(2, 4)
    torch.testing.assert_close(read(x), made(x))


def test_nan_in_a_pt2_is_refused_by_name(folder: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    nn.init.constant_(net[0].bias, float("nan"))
    Model.from_module(net, (torch.zeros(1, 4),)).save(folder / "net.pt2")
    with pytest.raises(SourceError, match=r"net\.pt2: '0\.bias' holds NaN"):
        load_model(ModelSpec(Source(folder / "net.pt2")))


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, image_size=16, patch_size=8, num_labels=5, num_channels=1
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def hf(folder: Path, inputs: tuple[InputSpec, ...] = ()) -> Model:
    return load_model(ModelSpec(Source(folder), None, inputs))


def test_a_hugging_face_folder_of_images_knows_its_inputs(vit: Path) -> None:
    import transformers

    model = hf(vit)
    assert [(i.name, i.shape) for i in model.inputs] == [("pixel_values", (None, 1, 16, 16))]
    assert [(o.name, o.shape) for o in model.outputs] == [("logits", (None, 5))]
    x = torch.randn(3, 1, 16, 16)
    source = transformers.ViTForImageClassification.from_pretrained(vit).eval()
    torch.testing.assert_close(model(x), source(x).logits.detach())


def test_a_hugging_face_folder_of_text_is_given_its_inputs(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, num_labels=2, output_hidden_states=True
    )
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    inputs = tuple(InputSpec((7,), "int64", name) for name in ("attention_mask", "input_ids"))
    model = hf(tmp_path / "bert", inputs)
    assert [i.name for i in model.inputs] == ["input_ids", "attention_mask"]
    assert [(o.name, o.shape) for o in model.outputs] == [("logits", (None, 2))]
    with pytest.raises(UnsupportedError, match="inputs of the model are not known"):
        hf(tmp_path / "bert")


def _edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": Executes()}, folder / "pytorch_model.bin")


def _without_head(folder: Path) -> None:
    save_file({k: v for k, v in read_weights(folder / "model.safetensors").items() if "classifier" not in k}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_only_pickles, "vit: has pickled weights only"),
        (_without_head, "vit: weight 'classifier.bias' is missing (2 in all)"),
        (lambda f: (f / "model.safetensors").unlink(), "vit: there is no model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:999]), "vit: not a safetensors file, or a truncated one"),
        (lambda f: (f / "config.json").unlink(), "vit: there is no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "vit/config.json: not valid JSON"),
        (lambda f: _edit_config(f, architectures=["ViTForImageClasification"]), "vit/config.json: transformers "),
        (lambda f: _edit_config(f, auto_map={"AutoModel": "own.py--Net"}), "vit/config.json: needs code of its own"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "vit: holds an adapter"),
    ],
)
def test_a_spoilt_hugging_face_folder(vit: Path, monkeypatch: pytest.MonkeyPatch, spoil, message: str) -> None:
    monkeypatch.chdir(vit.parent)
    spoil(vit)
    with pytest.raises(EdgesmithError) as caught:
        hf(vit)
    assert str(caught.value).startswith(message)
    assert caught.value.exit_code == 2
    assert not Path("executed").exists()
