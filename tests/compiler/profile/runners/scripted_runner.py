"""A runner whose artifact is a script (JSON): what to do while loading and at which call.

``sleep_ms``: times that calls take, in turn · ``load`` and ``run``: "die", "hang", "raise" or "import" ·
``touch_mb``: memory that loading takes · ``pid_file``: where to write the process's id.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np


class Session:
    def __init__(self, path, threads):
        self.script = json.loads(Path(path).read_text())
        if "pid_file" in self.script:
            Path(self.script["pid_file"]).write_text(str(os.getpid()))
        misbehave(self.script.get("load"))
        self.held = np.ones(int(self.script.get("touch_mb", 0) * 1e6), np.uint8)
        self.calls = 0
        self.runtime_version = "1.0"
        self.inputs = [{"name": "x", "shape": [1, 2], "dtype": "float32"}]
        self.outputs = [{"name": "y", "shape": [1, 2], "dtype": "float32"}]

    def run(self, inputs):
        misbehave(self.script.get("run"))
        times = self.script.get("sleep_ms", [0])
        time.sleep(times[self.calls % len(times)] / 1e3)
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
