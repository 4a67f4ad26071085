"""Float .tflite files: the model's own inputs and outputs, in its order, under its names, and PyTorch's numbers."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from edgesmith.compiler.errors import OutputError, UnsupportedError
from edgesmith.compiler.fingerprint import file_hash
from edgesmith.compiler.model import Model
from edgesmith.compiler.profile.session import open_session
from edgesmith.compiler.testing import imported_by
from edgesmith.targets.litert import LiteRT


class ManyPorts(nn.Module):
    """Inputs that are told apart by value, one of them unused and one of integers; an output twice, one that is an input."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(3, 5)

    def forward(self, zeta, alpha, unused, count):
        hidden = torch.relu(self.a(zeta) - 2 * self.b(alpha))
        return {"hidden": hidden, "again": hidden, "zeta": zeta, "next": count + 1}


@pytest.fixture(scope="module")
def ports(tmp_path_factory):
    torch.manual_seed(0)
    inputs = (torch.randn(2, 4), torch.randn(2, 3), torch.randn(2, 2), torch.ones(2, 3, dtype=torch.int64))
    model = Model.from_module(ManyPorts(), inputs)
    return model, LiteRT().lower(model, tmp_path_factory.mktemp("ports"), "two")


def run(artifact, inputs):
    with open_session(artifact.path, LiteRT.runner, 1) as session:
        return session.loaded, session.run([x.numpy() for x in inputs])


def test_inputs_and_outputs_are_the_models_in_its_order(ports):
    model, artifact = ports
    inputs = model.example_inputs(3, seed=4)
    loaded, outputs = run(artifact, inputs)
    for there, here in zip((*loaded.inputs, *loaded.outputs), (*model.inputs, *model.outputs), strict=True):
        assert (tuple(there.shape), there.dtype) == (here.at_batch(1), here.dtype)
    assert [port.name for port in loaded.inputs] == ["zeta", "alpha", "unused", "count"]
    # The runtime lists names in alphabetical order, so that of two for one tensor it is not known which comes first.
    assert [port.name.replace("again", "hidden") for port in loaded.outputs] == ["hidden", "hidden", "zeta", "next"]
    for got, wanted in zip(outputs, model(*inputs), strict=True):
        # A dot product of four float32 terms is off by at most four roundings, 4 * 2**-24 of its terms' sizes.
        np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=1e-6 * float(wanted.abs().max()))


def test_the_artifact_describes_its_file(ports):
    model, artifact = ports
    assert artifact.path.name == "two.tflite"
    assert artifact.path.stat().st_size == artifact.size_bytes
    assert artifact.sha256 == file_hash(artifact.path)
    assert artifact.source_fingerprint == model.fingerprint
    assert {"litert-torch", "ai-edge-litert", "torch"} <= set(artifact.built_with)
    assert artifact.diagnostics == ()
    assert [p.name for p in artifact.path.parent.iterdir()] == ["two.tflite"]


def test_a_folder_that_cannot_be_made_is_refused_and_nothing_is_lost(ports, tmp_path):
    model, _ = ports
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OutputError):
        LiteRT().lower(model, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_the_converter_keeps_quiet(tmp_path):
    code = """if True:
        import sys, torch
        from pathlib import Path
        from edgesmith.compiler.model import Model
        from edgesmith.targets.litert import LiteRT
        LiteRT().lower(Model.from_module(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), Path(sys.argv[1]))
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_operator_that_the_converter_lacks_is_refused_by_its_layer(tmp_path):
    class Layer(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)

    model = Model.from_module(nn.Sequential(nn.Linear(2, 2), Layer()), (torch.ones(1, 2),))
    with pytest.raises(UnsupportedError, match=r"^1: .*special_bessel_j0"):
        LiteRT().lower(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_importing_the_target_imports_no_converter_and_no_runtime():
    assert not imported_by("import edgesmith.targets.litert") & {"litert_torch", "jax", "ai_edge_litert", "ai_edge_quantizer", "litert_converter"}
