"""Runs a file as its own target's runner does, and then waits for a share of the time that took: a slowdown of a known size.

Beside ``model.onnx`` lies ``model.onnx.about``, JSON: ``runner``, the target's runner file, and ``share`` (0.05 is 5 % slower).
"""

import importlib.util
import json
import sys
import time
from pathlib import Path


class Session:
    def __init__(self, path, threads):
        about = json.loads(Path(f"{path}.about").read_text())
        spec = importlib.util.spec_from_file_location("edgesmith_inner_runner", about["runner"])
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.inner = module.Session(path, threads)
        self.share = about["share"]
        self.runtime_version, self.inputs, self.outputs = self.inner.runtime_version, self.inner.inputs, self.inner.outputs

    def run(self, inputs):
        clock = time.perf_counter_ns
        began = clock()
        outputs = self.inner.run(inputs)
        now = clock()
        end = now + self.share * (now - began)
        while now < end:
            now = clock()
        return outputs
