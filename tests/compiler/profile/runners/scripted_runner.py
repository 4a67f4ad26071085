"""A runner whose artifact is a script (JSON): what to do while loading and at which call.

``sleep_ms``: times that calls take, in turn · ``sweeps``: how often a call goes over an array · ``load`` and ``run``: "die", "hang", "raise" or "import" ·
``touch_mb``: memory that loading takes, ``burst_mb`` for a moment only, ``run_mb`` the first call · ``map``: maps and reads the script itself ·
``warm_mb``: memory that the process takes once · ``pid_file``: where to write the process's id.
"""

import json
import mmap
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

WARM = []
SWEPT = np.ones(1 << 13, np.float32)
RESULT = np.empty_like(SWEPT)


class Session:
    def __init__(self, path, threads):
        self.script = json.loads(Path(path).read_text())
        self.script.pop("padding", None)
        if "pid_file" in self.script:
            Path(self.script["pid_file"]).write_text(str(os.getpid()))
        misbehave(self.script.get("load"))
        WARM or WARM.append(self.touched("warm_mb"))
        self.touched("burst_mb")
        self.held = [self.touched("touch_mb")]
        if "map" in self.script:
            with Path(path).open("rb") as file:
                self.held.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            sum(self.held[-1][::4096])
        self.calls = 0
        self.runtime_version = "1.0"
        self.inputs = [{"name": "x", "shape": [1, 2], "dtype": "float32"}]
        self.outputs = [{"name": "y", "shape": [1, 2], "dtype": "float32"}]

    def touched(self, key):
        return np.ones(int(self.script.get(key, 0) * 1e6), np.uint8)

    def run(self, inputs):
        misbehave(self.script.get("run"))
        times = self.script.get("sleep_ms", [0])
        if "sweeps" in self.script:
            for _ in range(self.script["sweeps"]):
                np.multiply(SWEPT, 1.0001, out=RESULT)
        else:
            time.sleep(times[self.calls % len(times)] / 1e3)
        if self.calls == 0:
            self.held.append(self.touched("run_mb"))
        self.calls += 1
        return [inputs[0]]


def misbehave(how):
    if how == "die":
        print("about to touch address zero", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    elif how == "hang":
        time.sleep(3600)
    elif how == "raise":
        raise ValueError("flatbuffer verification failed")
    elif how == "import":
        import no_such_runtime  # noqa: F401
