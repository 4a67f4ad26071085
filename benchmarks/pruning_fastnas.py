"""What ModelOpt's FastNAS makes of a network: ``PYTHON pruning_fastnas.py FILE.py:FUNCTION SAMPLES.npz SHARE PRUNED.pt2``.

PYTHON has nvidia-modelopt, in an environment of its own; nothing of edgesmith is imported. SAMPLES holds ``calibration`` inputs, and ``inputs`` with ``labels``
to score by; SHARE is what is left of the multiply-accumulates. Scores are kept beside SAMPLES for the next share.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import modelopt.torch.prune as mtp
import numpy as np
import torch
from modelopt.torch.prune.fastnas import FastNASConfig
from torch import nn

BATCH = 250
DIVISOR = 8


def main(function: str, samples: str, share: str, result: str) -> None:
    """Prune by FastNAS's defaults, but with finer steps of width: its own of 32 are too wide for networks of 16 to 128 channels."""
    path, _, name = function.rpartition(":")
    sys.path.insert(0, str(Path(path).parent))
    spec = importlib.util.spec_from_file_location("network", path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    module: nn.Module = getattr(found, name)()
    with np.load(samples) as file:
        calibration, inputs, labels = (torch.from_numpy(file[key]) for key in ("calibration", "inputs", "labels"))

    def score(candidate: nn.Module) -> float:
        candidate.eval()
        with torch.no_grad():
            right = [(candidate(inputs[start : start + BATCH]).argmax(1) == labels[start : start + BATCH]).sum() for start in range(0, len(inputs), BATCH)]
        return float(sum(right)) / len(inputs)

    config = FastNASConfig().model_dump()
    for rules in config.values():
        for rule in rules.values() if rules else ():
            if rule:
                rule |= {key: DIVISOR for key in rule if key.endswith("divisor")}
    example = calibration[:2]
    settings = {
        "data_loader": [(batch,) for batch in calibration.split(BATCH)],
        "score_func": score,
        "checkpoint": str(Path(samples).with_suffix(".fastnas")),
        "collect_func": lambda batch: batch[0],
    }
    pruned, _ = mtp.prune(module, [("fastnas", config)], {"flops": f"{100 * float(share):.2f}%"}, example, settings)
    batch = torch.export.Dim("batch", min=1)
    torch.export.save(torch.export.export(pruned.eval(), (example,), dynamic_shapes=({0: batch},)), result)


if __name__ == "__main__":
    main(*sys.argv[1:])
