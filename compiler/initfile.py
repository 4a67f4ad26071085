"""A commented build file to begin with."""

from __future__ import annotations

from pathlib import Path

from edgesmith.compiler.errors import OutputError
from edgesmith.compiler.files import write_text
from edgesmith.compiler.toml_places import shown

TEMPLATE = """\
#:schema ./edgesmith.schema.json
# What edgesmith is to build. Paths are relative to this file. `edgesmith check` looks at everything that can be refused cheaply.
# For completion in an editor: edgesmith init --schema > edgesmith.schema.json

[model]
source = "model.py:model"             # a function without arguments that returns the fine-tuned torch module,
                                      # or a .pt2 file, or a Hugging Face folder (config.json and model.safetensors)
# weights = "model.safetensors"       # for a function: the state dict, as safetensors or a torch file without pickled objects
inputs = [                            # one sample each, without the batch; a .pt2 file and image models of Hugging Face know theirs
  { name = "x", shape = [3, 224, 224], dtype = "float32" },
]

[data]
source = "photos"                     # a folder or .zip of class folders of images (train/, val/ and test/ above them where there are such parts),
                                      # or "data.py:data", a function that returns edgesmith.Data, or an .npz with x_train, y_train, x_val ...
size = 224                            # for images: shorter side, then centre crop; [height, width] works too
mean = [0.485, 0.456, 0.406]          # for images: on a scale of 0 to 1
std = [0.229, 0.224, 0.225]
augment = ["flip", "shift"]           # for images, while training

[accuracy]
metric = "top1"                       # or "file.py:function" of (outputs, labels); higher is better
max_drop = 0.01                       # at most one point below the model that came in
# floor = 0.90                        # and at least this much

[budget]                              # for every target, unless it has its own; leave out what does not matter
latency_ms = 20.0                     # of one sample
percentile = 90
memory_mb = 150                       # what the model adds to the memory of the process
size_mb = 20                          # 1 MB is 1 000 000 bytes

[[target]]                            # `edgesmith targets` lists them
name = "onnxruntime"
device = "host"
threads = 1

[[target]]
name = "litert"
# budget = { latency_ms = 30.0 }      # what differs from [budget]

[[target]]
name = "executorch"

[pipeline]
seed = 0
passes = [                            # in this order; `edgesmith passes` lists them with their options
  "prune{ratio=0.3}",                 # channels, hidden units and attention heads that matter least
  "recover",                          # right after pruning: learns the lost accuracy back from the model that came in
  "fold-batch-norm",                  # after training, which needs the statistics as they are
  "fold-constants",
  "equalise",                         # right before quantizing: scales that one grid fits
  "quantize",                         # last: its grid is that of the final weights
]
"""


def write_build_file(path: Path) -> Path:
    """Write the template to ``path`` (a folder gets ``edgesmith.toml``); the file written.

    Raises:
        OutputError: the file is there already, or cannot be written.
    """
    file = path / "edgesmith.toml" if path.is_dir() else path
    if file.exists():
        raise OutputError("is there already", where=shown(file), hint="give another name: edgesmith init NAME.toml")
    write_text(file, TEMPLATE)
    return file
