"""The build file: what it says, and what it says of mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgesmith.compiler import schema
from edgesmith.compiler.budget import AccuracyGoal, Budget
from edgesmith.compiler.buildfile import BuildSpec, InputSpec, read
from edgesmith.compiler.errors import BuildFileError, SpecError
from edgesmith.compiler.toml_places import line_of

GOOD = """\
# a comment
[model]
source = "net.py:net"
weights = "net.safetensors"
inputs = [
  {name = "ids", shape = [16], dtype = "int64"},
  {name = "mask", shape = [16], dtype = "int64"},
]

[data]
source = "photos"
size = 96
mean = [0.5, 0.5, 0.5]
std = [0.2, 0.2, 0.2]
augment = ["flip"]

[accuracy]
max_drop = 0.01

[budget]
latency_ms = 5
memory_mb = 50.0

[[target]]
name = "litert"

[[target]]
name = "onnxruntime"
threads = 2
budget = {latency_ms = 8}

[pipeline]
passes = ["prune{ratio=0.3}", "quantize"]
seed = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text("")
    (tmp_path / "net.safetensors").write_text("")
    (tmp_path / "photos").mkdir()
    (tmp_path / "edgesmith.toml").write_text(GOOD)
    return tmp_path


def changed(folder: Path, old: str, new: str) -> BuildSpec:
    """Read the good file with ``old`` replaced, which must be there."""
    assert old in GOOD
    (folder / "edgesmith.toml").write_text(GOOD.replace(old, new))
    return read(folder / "edgesmith.toml")


def test_everything_is_read(folder: Path) -> None:
    spec = read(folder / "edgesmith.toml")
    assert spec.model.source.path == folder / "net.py"
    assert spec.model.source.function == "net"
    assert spec.model.weights == folder / "net.safetensors"
    assert spec.model.inputs == (InputSpec((16,), "int64", "ids"), InputSpec((16,), "int64", "mask"))
    assert spec.data is not None
    assert (spec.data.source.path, spec.data.size, spec.data.augment) == (folder / "photos", (96, 96), ("flip",))
    assert spec.accuracy == AccuracyGoal("top1", 0.01, None)
    assert [(t.name, t.device, t.threads) for t in spec.targets] == [("litert", "host", 1), ("onnxruntime", "host", 2)]
    assert (spec.passes, spec.seed, spec.root) == (("prune{ratio=0.3}", "quantize"), 3, folder)


def test_a_target_keeps_what_its_own_budget_leaves_out(folder: Path) -> None:
    litert, ort = read(folder / "edgesmith.toml").targets
    assert litert.budget == Budget(latency_ms=5.0, percentile=90, memory_mb=50.0)
    assert ort.budget == Budget(latency_ms=8.0, percentile=90, memory_mb=50.0)


@pytest.mark.parametrize(
    "inputs", ['{ids = {shape = [16], dtype = "int64"}}', '{name = "ids", shape = [16], dtype = "int64"}', '[{name = "ids", shape = [16], dtype = "int64"}]']
)
def test_inputs_may_be_a_list_or_a_table(folder: Path, inputs: str) -> None:
    block = GOOD[GOOD.index("inputs") : GOOD.index("]\n\n[data]") + 1]
    assert changed(folder, block, f"inputs = {inputs}").model.inputs == (InputSpec((16,), "int64", "ids"),)


MISTAKES = [
    ("latency_ms = 5", "latency = 5", "edgesmith.toml:21: budget.latency: unknown key", "did you mean 'latency_ms'?"),
    ("[budget]", "[budgets]", "edgesmith.toml:20: budgets: unknown key", "did you mean 'budget'?"),
    ("[budget]", "max_dorp = 0.2\n[budget]", "edgesmith.toml:20: accuracy.max_dorp: unknown key", "did you mean 'max_drop'?"),
    ('source = "photos"', 'source = "photos"\nthreads = 2', "edgesmith.toml:12: data.threads: unknown key", "'threads' belongs to [target]"),
    ("threads = 2", 'threads = "2"', "edgesmith.toml:29: target.1.threads: must be a valid integer, not '2'", ""),
    ("threads = 2", "threads = 0", "edgesmith.toml:29: target.1.threads: must be greater than or equal to 1, not 0", ""),
    ("latency_ms = 8", "latency = 8", "edgesmith.toml:30: target.1.budget.latency: unknown key", "did you mean 'latency_ms'?"),
    ("memory_mb = 50.0", "memory_mb = -1", "edgesmith.toml:22: budget.memory_mb: must be greater than 0, not -1", ""),
    ("memory_mb = 50.0", "memory_mb = nan", "edgesmith.toml:22: budget.memory_mb: must be a finite number, not nan", ""),
    ("max_drop = 0.01", "max_drop = 1", "edgesmith.toml:18: accuracy.max_drop: 1.0 is not a fraction: one point of top1 is 0.01", ""),
    ("max_drop = 0.01", "floor = 90", "edgesmith.toml:18: accuracy.floor: 90.0 is not a fraction", ""),
    ("std = [0.2, 0.2, 0.2]", "std = [0.2]", "edgesmith.toml:14: data.std: has 1 channels but mean has 3", ""),
    ('"flip"', '"flop"', "edgesmith.toml:15: data.augment.0: 'flop' is not known", "did you mean 'flip'?"),
    ('dtype = "int64"},\n]', 'dtype = "int46"},\n]', "edgesmith.toml:5: model.inputs.1.dtype: 'int46' is not known", "did you mean 'int64'?"),
    ("net.safetensors", "net.safetensor", "edgesmith.toml:4: model.weights: there is no ", "did you mean 'net.safetensors'?"),
    ("net.py:net", "nt.py:net", "edgesmith.toml:3: model.source: there is no ", "did you mean 'net.py'?"),
    ("net.py:net", "net.py", "edgesmith.toml:3: model.source: 'net.py' does not say which function", "write net.py:function"),
    ('source = "photos"', 'source = "fotos"', "edgesmith.toml:11: data.source: there is no ", "did you mean 'photos'?"),
    ('source = "photos"', 'source = "net.safetensors"', "edgesmith.toml:11: data.source: 'net.safetensors' is no data", ".npz"),
    ('name = "onnxruntime"\nthreads = 2', 'name = "litert"', "edgesmith.toml:28: target.1.name: 'litert' is listed twice", ""),
    ('name = "litert"\n', "", "edgesmith.toml:24: target.0.name: 'name' is missing", ""),
    ("[model]", "[modul]", "edgesmith.toml:2: modul: unknown key", "did you mean 'model'?"),
    ("max_drop = 0.01", "max_drop = 0.01\nmetric = 'top5'", "edgesmith.toml:19: accuracy.metric: 'top5' is not known", "did you mean 'top1'?"),
    ("max_drop = 0.01", "max_drop = ", "edgesmith.toml:18: not valid TOML: Invalid value, in 'max_drop ='", ""),
    ("[[target]]\nname", "[[target]\nname", "edgesmith.toml:24: not valid TOML", ""),
    ('"quantize"]', '"quantize"', "edgesmith.toml:34: not valid TOML", "seed = 3"),
]


@pytest.mark.parametrize(("old", "new", "message", "hint"), MISTAKES, ids=[m[2].split(": ", 1)[1][:60] for m in MISTAKES])
def test_a_mistake_is_named_with_file_line_key_and_nearest_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, message: str, hint: str
) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(BuildFileError) as caught:
        changed(folder, old, new)
    assert str(caught.value).startswith(message)
    assert hint in str(caught.value)
    assert caught.value.exit_code == 2


def test_the_first_mistake_of_the_file_is_told(folder: Path) -> None:
    with pytest.raises(BuildFileError, match=r":3: model\.surce"):
        changed(folder, GOOD, GOOD.replace("source =", "surce =", 1).replace("seed", "sead"))


def test_no_target_at_all_is_refused_unless_the_caller_names_one(folder: Path) -> None:
    without = GOOD[: GOOD.index("[[target]]")] + GOOD[GOOD.index("[pipeline]") :]
    with pytest.raises(BuildFileError, match=r"no \[\[target\]\]"):
        changed(folder, GOOD, without)
    (named,) = read(folder / "edgesmith.toml", targets=["executorch"]).targets
    assert (named.name, named.budget.latency_ms) == ("executorch", 5.0)


def test_targets_can_be_chosen(folder: Path) -> None:
    (only,) = read(folder / "edgesmith.toml", targets=["onnxruntime"]).targets
    assert (only.name, only.threads) == ("onnxruntime", 2)


def test_overrides_are_values_or_bare_words(folder: Path) -> None:
    file = folder / "edgesmith.toml"
    spec = read(file, ["budget.latency_ms=7.5", "target.litert.threads=2", "target.1.device=phone", 'pipeline.passes=["quantize"]', "accuracy.floor = 0.9"])
    assert [(t.threads, t.device, t.budget.latency_ms) for t in spec.targets] == [(2, "host", 7.5), (2, "phone", 8.0)]
    assert (spec.passes, spec.accuracy.floor) == (("quantize",), 0.9)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("budget.latency=5", "--set budget.latency: unknown key\n  hint: did you mean 'latency_ms'?"),
        ("budget.latency_ms=fast", "--set budget.latency_ms: must be a valid number, not 'fast'"),
        ("budget", "--set: 'budget' is not KEY=VALUE"),
        ("target.litret.threads=2", "--set target.litret.threads: there is no entry 'litret'\n  hint: did you mean 'litert'?"),
        ("budget.latency_ms.x=1", "--set budget.latency_ms.x: budget.latency_ms is not a table"),
        ("model.weights=gone.pt", "--set model.weights: there is no "),
    ],
)
def test_a_wrong_override_is_named_as_such(folder: Path, assignment: str, message: str) -> None:
    with pytest.raises(BuildFileError) as caught:
        read(folder / "edgesmith.toml", [assignment])
    assert str(caught.value).startswith(message)


def test_missing_folder_and_undecodable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BuildFileError, match="no such build file\n  hint: 'edgesmith init'"):
        read("edgesmith.toml")
    with pytest.raises(BuildFileError, match="is a folder"):
        read(tmp_path)
    Path("latin.toml").write_bytes(b"# caf\xe9\n")
    with pytest.raises(BuildFileError, match="not UTF-8"):
        read("latin.toml")
    with pytest.raises(BuildFileError, match=r"did you mean 'latin\.toml'"):
        read("latn.toml")


def test_the_place_of_a_key_is_known_after_reading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert read("edgesmith.toml").where("pipeline", "passes", 1) == "edgesmith.toml:33: pipeline.passes.1"


def test_errors_about_names_get_their_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    spec = read("edgesmith.toml", ["pipeline.seed=1"], targets=["onnxruntime", "other"])
    for keys, where in {
        (*spec.targets[0].key, "name"): "edgesmith.toml:28: target.1.name: in there",
        (*spec.targets[1].key, "name"): "--target: in there",
        ("pipeline", "passes", 0): "edgesmith.toml:33: pipeline.passes.0: in there",
        ("pipeline", "seed"): "--set pipeline.seed: in there",
    }.items():
        with pytest.raises(SpecError) as caught, spec.at(*keys):
            raise SpecError("no such thing", where="in there")
        assert str(caught.value) == f"{where}: no such thing"


def test_lines_of_keys_in_every_form_of_toml() -> None:
    text = 'a.b = 1\n[t]\nlong = """\n[x]\ny = 1\n"""\n"quoted key" = [\n  1,\n  2,\n]\n[[l]]\n[[l]]\nz = 1\n'
    assert [line_of(text, key) for key in (("a", "b"), ("t",), ("t", "long"), ("t", "quoted key", 1), ("l", 1), ("l", 1, "z"), ("x",))] == [
        1,
        2,
        3,
        7,
        12,
        13,
        None,
    ]


def test_the_schema_knows_every_key_and_closes_every_table() -> None:
    made = json.loads(json.dumps(schema.json_schema()))
    tables = [made, *(t for t in made["$defs"].values() if t.get("type") == "object")]
    assert all(t["additionalProperties"] is False for t in tables)
    assert set(made["properties"]) == {"model", "data", "accuracy", "budget", "target", "pipeline"}
    assert made["$defs"]["BudgetTable"]["properties"].keys() == Budget.__dataclass_fields__.keys()


def test_reading_a_build_file_imports_no_torch(folder: Path) -> None:
    code = "import sys; from edgesmith.compiler.buildfile import read; read(sys.argv[1]); assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(folder / "edgesmith.toml")], check=True)
