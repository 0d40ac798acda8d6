"""The forward pass in onnxruntime alone: f of the goal of throughput.py."""

import sys

import numpy as np
import onnxruntime
from speed import in_batches, repeated, serve


def make(told):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = told["threads"]
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(told["model"], options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    pixels = np.load(told["pixels"], mmap_mode="r")
    dtype = np.uint8 if "uint8" in given.type else np.float32
    batches = [np.ascontiguousarray(batch, dtype) for batch in in_batches(pixels, told["batch_size"])]
    at = 0

    def step() -> int:
        nonlocal at
        session.run(None, {given.name: batches[at % len(batches)]})
        at += 1
        return told["batch_size"]

    return repeated(step), {"onnxruntime": onnxruntime.__version__}


if __name__ == "__main__":
    sys.exit(serve(make))
