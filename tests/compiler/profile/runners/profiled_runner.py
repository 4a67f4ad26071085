"""A runner whose artifact is a script (JSON) of operators: names, kinds, sources, and the times that they take, in turn.

``slower``: how many times slower everything is every other tenth of a second · ``forget``: how many runs the last operator is not timed in ·
``die``: end in the first run, with a temporary file written.
"""

import json
import os
import tempfile
import time
from pathlib import Path


def slowness(script):
    return script["slower"] if "slower" in script and int(time.monotonic() * 10) % 2 else 1


class Session:
    def __init__(self, path, threads):
        self.script = json.loads(Path(path).read_text())
        self.runtime_version = "1.0"
        self.inputs = [{"name": "x", "shape": [1, 2], "dtype": "float32"}]
        self.outputs = [{"name": "y", "shape": [1, 2], "dtype": "float32"}]

    def run(self, inputs):
        time.sleep(1e-3 * slowness(self.script))
        return [inputs[0]]


class Profiler:
    method = "instrumented"

    def __init__(self, path, threads):
        self.script = json.loads(Path(path).read_text())
        self.slowness = []
        self.left = Path(tempfile.mkdtemp(), "half-written")
        self.left.write_text("")

    def run(self, inputs):
        if self.script.get("die"):
            Path(self.script["die"]).write_text(str(self.left))
            os.abort()
        self.slowness.append(slowness(self.script))
        time.sleep(1e-3 * self.slowness[-1])

    def operators(self):
        rows = [{**row, "ns": [row["ns"][i % len(row["ns"])] * slow for i, slow in enumerate(self.slowness)]} for row in self.script["operators"]]
        del rows[-1]["ns"][: self.script.get("forget", 0)]
        return rows
