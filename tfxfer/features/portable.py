"""An engine as bytes, for another process."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tfxfer.features.engines import OnnxPrefix
from tfxfer.features.extract import Engine, FrozenPrefix, padded


def pack(engine: Engine) -> tuple[dict[str, Any], np.ndarray]:
    """What JSON can hold of an engine, and its content as uint8."""
    if isinstance(engine, OnnxPrefix):
        return {"kind": "onnx", "batch_size": engine.batch_size}, np.frombuffer(engine.content, np.uint8)
    assert isinstance(engine, FrozenPrefix)  # there are no others
    function = engine.function
    content = function.graph.as_graph_def().SerializeToString()
    facts = {
        "kind": "graph",
        "batch_size": engine.batch_size,
        "inputs": [tensor.name for tensor in function.inputs],
        "outputs": [tensor.name for tensor in function.outputs],
    }
    return facts, np.frombuffer(content, np.uint8)


def unpack(facts: Mapping[str, Any], content: np.ndarray) -> Engine:
    """What `pack` was given, to be run here."""
    if facts["kind"] == "onnx":
        return OnnxPrefix(facts["batch_size"], content.tobytes())
    graph = tf.compat.v1.GraphDef.FromString(content.tobytes())
    whole = tf.compat.v1.wrap_function(lambda: tf.graph_util.import_graph_def(graph, name=""), [])
    function = whole.prune(facts["inputs"], facts["outputs"])

    def compute(images: np.ndarray) -> tuple[np.ndarray, ...]:
        found = function(tf.constant(padded(images, facts["batch_size"])))
        return tuple(values.numpy()[: len(images)] for values in found)

    return compute
