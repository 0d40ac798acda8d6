"""Reopen an ONNX file as a serving engine would: onnxruntime alone, no TensorFlow, no tfxfer. See reopen.py."""

import json

import numpy as np

ABSENT = ("tfxfer", "tensorflow", "keras", "onnx", "tf2onnx")


def import_runtime():
    import onnxruntime

    return onnxruntime


def open_artifact(onnxruntime, path):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # TensorFlow works beside it
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def predict(batch):
        probabilities, classes = session.run(["probabilities", "classes"], {"images": np.ascontiguousarray(batch)})
        return probabilities, np.array(list(classes), dtype=str)

    metadata = session.get_modelmeta().custom_metadata_map
    return f"onnxruntime {onnxruntime.__version__}", json.loads(metadata["class_names"]), {"images": predict}
