"""Runs nothing, for times that are known: a file of milliseconds (JSON), one of which is drawn for every call."""

import json
import os
import random
import time
from pathlib import Path


class Session:
    runtime_version = "1"

    def __init__(self, path, threads):
        self.inputs = self.outputs = [{"name": "x", "shape": [1], "dtype": "float32"}]
        self.times_ns = [1e6 * ms for ms in json.loads(Path(path).read_text())]
        self.random = random.Random(os.getpid())

    def run(self, inputs):
        clock = time.perf_counter_ns
        end = clock() + self.random.choice(self.times_ns)
        while clock() < end:
            pass
        return inputs
