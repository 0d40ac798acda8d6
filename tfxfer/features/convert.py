"""A frozen TensorFlow function as an ONNX file, in a third of the time that tf2onnx's own way takes."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

OPSET = 18  # the highest that tf2onnx writes
CONVERTER = f"tf2onnx 1, opset {OPSET}"  # raise the number where the same graph would be converted to another
# What onnxruntime does not do by itself when it loads the file.
_OPTIMIZERS = ("optimize_transpose", "fold_constants")


def convert_graph(function: Any) -> bytes:
    """Convert a function without variables; it keeps the order of its outputs.

    TensorFlow folds constants first: tf2onnx would start a session for each BatchNorm. Of its optimizers only those are
    run that onnxruntime lacks, without the copies it takes in case one fails.

    Args:
        function: Of `convert_variables_to_constants_v2`.

    Raises:
        Exception: Of any type, where an operation has no counterpart.
    """
    from tf2onnx import tf_loader  # here: the import takes a second
    from tf2onnx.optimizer import _get_optimizers, optimize_graph
    from tf2onnx.tfonnx import process_tf_graph

    inputs = [tensor.name for tensor in function.inputs]
    outputs = [tensor.name for tensor in function.outputs]
    with quiet_converters():
        with tf.Graph().as_default():
            folded = tf_loader.tf_optimize(inputs, outputs, function.graph.as_graph_def())
        with tf.Graph().as_default() as graph:
            tf.import_graph_def(folded, name="")
            converted = process_tf_graph(
                graph, input_names=inputs, output_names=outputs, opset=OPSET, custom_op_handlers=OP_HANDLERS
            )
            known = _get_optimizers()
            chosen = {name: known[name] for name in _OPTIMIZERS}
            converted = optimize_graph(converted, catch_errors=False, optimizers=chosen)
            return converted.make_model("prefix").SerializeToString()


def _erfc(context, node, name, arguments) -> None:
    """1 - Erf: exact GELU computes with Erfc, which tf2onnx does not know."""
    node.type = "Erf"
    one = context.make_const(f"{name}_one", np.array(1, np.float32)).output[0]
    difference = context.insert_new_node_on_output("Sub", node.output[0], name=f"{name}_sub")
    context.replace_inputs(difference, [one, node.output[0]])


OP_HANDLERS: dict[str, Any] = {"Erfc": (_erfc, [])}


@contextlib.contextmanager
def quiet_converters() -> Iterator[None]:
    """Hold back the converters' chatter (deprecations inside TensorFlow, "Assets written"), not errors."""
    loggers = [logging.getLogger(name) for name in ("tensorflow", "absl", "tf2onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
