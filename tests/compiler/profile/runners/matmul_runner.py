"""A runner of its own tiny format: an .npz that holds a matrix ``w``; the output is ``x @ w``. It chatters as runtimes do."""

import os

import numpy as np


class Session:
    def __init__(self, path, threads):
        os.write(1, b"native chatter on standard output\n")
        print("chatter on standard output")
        self.w = np.load(path)["w"]
        self.runtime_version = np.__version__
        self.inputs = [{"name": "x", "shape": [1, self.w.shape[0]], "dtype": "float32"}]
        self.outputs = [{"name": "y", "shape": [1, self.w.shape[1]], "dtype": "float32"}]
        self.threads = [os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")]
        print("threads", self.threads, threads)
        self.result = np.empty((1, self.w.shape[1]), np.float32)

    def run(self, inputs):
        np.matmul(inputs[0], self.w, out=self.result)
        return [self.result]
