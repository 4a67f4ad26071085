"""Runs a file otherwise than its own target's runner does.

Beside ``model.onnx`` lies ``model.onnx.about``, JSON: ``runner``, the target's runner file, and one of two. ``share``: wait for that share of the time
that a run took (0.05 is 5 % slower). ``bare``: if true, the calls that the runtime's documentation shows, on one random input, with no code of ours.
A runtime is imported by its name when it is needed, because the process that runs this file imports beforehand whatever its functions import.
"""

import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np


def onnxruntime_call(path):
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {i.name: np.random.default_rng(0).standard_normal(i.shape).astype(np.float32) for i in session.get_inputs()}
    return lambda: session.run(None, feed)


def litert_call(path):
    interpreter = importlib.import_module("ai_edge_litert.interpreter").Interpreter(model_path=path, num_threads=1)
    interpreter.allocate_tensors()
    (detail,) = interpreter.get_input_details()
    (out,) = interpreter.get_output_details()
    value = np.random.default_rng(0).standard_normal(detail["shape"]).astype(np.float32)

    def call():
        interpreter.set_tensor(detail["index"], value)
        interpreter.invoke()
        return interpreter.get_tensor(out["index"])

    return call


def executorch_call(path):
    torch, _portable_lib = importlib.import_module("torch"), importlib.import_module("executorch.extension.pybindings._portable_lib")
    _portable_lib._unsafe_reset_threadpool(1)
    program = _portable_lib._load_program(path)
    method = program.load_method("forward")
    value = torch.randn(tuple(method.method_meta().input_tensor_meta(0).sizes()))
    return lambda: (method([value]), program)


CALLS = {".onnx": onnxruntime_call, ".tflite": litert_call, ".pte": executorch_call}


def slowed(run, share):
    clock = time.perf_counter_ns

    def call(inputs):
        began = clock()
        outputs = run(inputs)
        now = clock()
        end = now + share * (now - began)
        while now < end:
            now = clock()
        return outputs

    return call


class Session:
    def __init__(self, path, threads):
        about = json.loads(Path(f"{path}.about").read_text())
        spec = importlib.util.spec_from_file_location("edgesmith_inner_runner", about["runner"])
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        inner = module.Session(path, threads)
        self.runtime_version, self.inputs, self.outputs = inner.runtime_version, inner.inputs, inner.outputs
        if "share" in about:
            self.run = slowed(inner.run, about["share"])
        elif about["bare"]:
            del inner
            call = CALLS[Path(path).suffix](path)
            self.run = lambda inputs: call()
        else:
            self.run = inner.run
