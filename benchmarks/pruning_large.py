"""What pruning a large model takes: ``python benchmarks/pruning_large.py``.

A ViT-L/16 of 304 M parameters with 128 images of 224 x 224, with reconstruction, on two cores: at most 15 minutes, and 12 GB of resident memory at the peak
of the whole process. Random weights and images: neither time nor memory depends on them. Each case has a process of its own. The exit code is 1 if a bar is
missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np
import torch
from memory_models import vit_of
from quantizing import memory, normalised

from edgesmith.compiler.data import Data, Split
from edgesmith.compiler.frontends.model_source import only_logits
from edgesmith.compiler.model import Model
from edgesmith.compiler.passbase import PassContext
from edgesmith.compiler.pipeline import Pipeline
from edgesmith.compiler.profile.devices import environment
from edgesmith.compiler.testing import randomise_norms

WIDTH, DEPTH, HEADS, IMAGES = 1024, 24, 16, 128
LONGEST_S, MOST_BYTES = 900.0, 12e9
CASES = tuple(f"prune{{{how},reconstruct=true,samples={IMAGES}}}" for how in ("ratio=0.4,importance=obs", "ratio=0.4", "macs=0.5,importance=obs"))


def pruned(passes: str) -> dict[str, float]:
    """Seconds of ``passes``, bytes that the process held at most, and what is left of the model."""
    torch.manual_seed(0)
    module = randomise_norms(vit_of(WIDTH, DEPTH, HEADS)).eval()
    model = only_logits(Model.from_module(module, (torch.randn(2, 3, 224, 224),)))
    del module
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, 3, 224, 224), np.uint8)
    split = Split((images,), np.zeros(IMAGES, np.int64), normalised)
    started = time.monotonic()
    result = Pipeline.parse(passes).run(model, PassContext(data=Data(split, split, split).for_passes()))
    seconds = time.monotonic() - started
    return {"seconds": seconds, "peak": memory("VmHWM"), "parameters": model.params, "left": result.params / model.params, "macs": result.macs / model.macs}


def main() -> int:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", help="these passes alone, in this process, as JSON")
    wanted = parser.parse_args().case
    if wanted:
        print(json.dumps(pruned(wanted)))
        return 0
    machine = environment()
    print(f"{machine['cpu']}, {machine['os']}, load {machine['load_average']}; two threads.\n")
    print("| passes | parameters | seconds | peak of the process | parameters left | multiply-accumulates left |\n| --- | --- | --- | --- | --- | --- |")
    missed = sum([row(passes) for passes in CASES])
    print(f"\n{missed} of {len(CASES)} cases missed a bar" if missed else "\nall bars met")
    return 1 if missed else 0


def row(passes: str) -> bool:
    """Print one line; whether it missed a bar."""
    command = [sys.executable, __file__, "--case", passes]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    found = json.loads(done.stdout)
    seconds, peak, parameters = found["seconds"], found["peak"], found["parameters"]
    print(f"| `{passes}` | {parameters / 1e6:.0f} M | {seconds:.0f} | {peak / 1e9:.2f} GB | {found['left']:.2f} | {found['macs']:.2f} |", flush=True)
    return seconds > LONGEST_S or peak > MOST_BYTES


if __name__ == "__main__":
    sys.exit(main())
