"""What equalise and quantize take: ``python benchmarks/quantizing.py``.

A transformer of 22 M parameters with 256 images in at most 5 minutes, time in proportion to the model, and one of 86 M with 512 images in less than 3 GB
beyond its weights. Random weights and images: neither time nor memory depends on them. Each case has a process of its own. The exit code is 1 if a bar is
missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgesmith.compiler.data import Array, Data, Split
from edgesmith.compiler.profile.devices import environment

LONGEST_S, MOST_BYTES, PROPORTIONAL = 300.0, 3e9, 1.25


@dataclass(frozen=True)
class Case:
    """A ViT of patches of 16 pixels at 224 x 224, and calibration images."""

    width: int
    depth: int
    heads: int
    images: int


CASES = {"ViT of 11 M": Case(384, 6, 6, 256), "ViT of 22 M": Case(384, 12, 6, 256), "ViT of 86 M": Case(768, 12, 12, 512)}


def normalised(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """Bytes as floats of mean 0 and deviation 1."""
    return tuple((x.astype(np.float32) - 128) / 74 for x in arrays)


def quantized(case: Case) -> dict[str, float]:
    """Seconds of both passes, and bytes that the process held at most beyond what it held with the model alone."""
    import torch
    from memory_models import vit_of

    from edgesmith.compiler.frontends.model_source import only_logits
    from edgesmith.compiler.model import Model
    from edgesmith.compiler.passbase import PassContext
    from edgesmith.compiler.testing import randomise_norms
    from edgesmith.passes.quantize.equalise import Equalise
    from edgesmith.passes.quantize.quantize import Quantize

    module = randomise_norms(vit_of(case.width, case.depth, case.heads)).eval()
    model = only_logits(Model.from_module(module, (torch.randn(2, 3, 224, 224),)))
    del module
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    held = memory("VmRSS")
    images = np.random.default_rng(0).integers(0, 256, (case.images, 3, 224, 224), np.uint8)
    split = Split((images,), np.zeros(case.images, np.int64), normalised)
    ctx = PassContext(data=Data(split, split, split).for_passes())
    started = time.monotonic()
    equal = Equalise(samples=case.images).run(model, ctx).model
    result = Quantize(samples=case.images).run(equal, ctx).model
    assert result.quant is not None
    return {"seconds": time.monotonic() - started, "beyond": memory("VmHWM") - held, "parameters": model.params}


def memory(key: str) -> int:
    """Bytes of this process, by the kernel."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def main() -> int:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="this one alone, in this process, as JSON")
    wanted = parser.parse_args().case
    if wanted:
        print(json.dumps(quantized(CASES[wanted])))
        return 0
    machine = environment()
    print(f"{machine['cpu']}, {machine['os']}, load {machine['load_average']}; two threads.\n")
    print("| model | images | seconds | seconds a million parameters | peak beyond the model |\n| --- | --- | --- | --- | --- |")
    rows = {name: row(name) for name in CASES}
    small, large = (rows[name][0] for name in list(CASES)[:2])
    missed = [large > LONGEST_S, large > 2 * PROPORTIONAL * small, rows["ViT of 86 M"][1] > MOST_BYTES]
    print(f"\n{sum(missed)} of 3 bars missed" if any(missed) else "\nall bars met")
    return 1 if any(missed) else 0


def row(name: str) -> tuple[float, float]:
    """Print one line; seconds and bytes."""
    command = [sys.executable, __file__, "--case", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    found = json.loads(done.stdout)
    seconds, beyond = found["seconds"], found["beyond"]
    print(f"| {name} | {CASES[name].images} | {seconds:.0f} | {seconds / found['parameters'] * 1e6:.1f} | {beyond / 1e9:.2f} GB |", flush=True)
    return seconds, beyond


if __name__ == "__main__":
    sys.exit(main())
