"""ONNX: the format of onnxruntime, Triton, OpenVINO, and of everything that has no TensorFlow."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import keras
import onnx
import tensorflow as tf
import tf2onnx

from tfxfer import __version__
from tfxfer.exporters.serving import channels_of, facts, probabilities_of, servable
from tfxfer.features.convert import OP_HANDLERS, OPSET, quiet_converters

ARTIFACT = Path("model.onnx")


def export_onnx(model: keras.Model, folder: Path, *, class_names: Sequence[str], metadata: Mapping[str, str]) -> Path:
    """Write `folder/model.onnx`.

    `images` uint8 (N, H, W, 3) to `probabilities` float32 (N, K) and `classes` string (N); N, H and W are free.
    Class names and preprocessing facts are in the model's metadata_props, all of them text; class_names is JSON.

    Args:
        model: Images (N, H, W, C) in 0..255 to probabilities (N, K).
        folder: Where exports go; made if missing.
        class_names: K names, in the order of the outputs.
        metadata: Further facts, text to text.

    Returns:
        The artifact's path relative to `folder`.

    Raises:
        InputError: Where the model's input is not an image.
    """
    served, size_px = servable(model)

    def serve(images):
        return {"probabilities": probabilities_of(served, images)}

    channels = channels_of(served)
    signature = [tf.TensorSpec((None, None, None, channels), tf.uint8, name="images")]
    with quiet_converters():
        function = tf.function(serve, autograph=False, input_signature=signature)
        proto, _ = tf2onnx.convert.from_function(
            function, input_signature=signature, opset=OPSET, custom_op_handlers=OP_HANDLERS
        )
    _name_shapes(proto.graph, len(class_names), channels)
    _add_classes(proto.graph, class_names)
    proto.producer_name, proto.producer_version = "tfxfer", __version__
    onnx.helper.set_model_props(proto, facts(size_px, class_names, metadata, channels))
    target = Path(folder) / ARTIFACT
    target.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(proto, str(target))
    return ARTIFACT


def _name_shapes(graph: onnx.GraphProto, num_classes: int, channels: int) -> None:
    """Readable names for the free dimensions instead of unk__737."""
    values = {value.name: value for value in [*graph.input, *graph.output]}
    shapes = {"images": ("batch", "height", "width", channels), "probabilities": ("batch", num_classes)}
    for name, shape in shapes.items():
        value = values[name]
        kind = value.type.tensor_type.elem_type
        value.CopyFrom(onnx.helper.make_tensor_value_info(name, kind, shape))


def _add_classes(graph: onnx.GraphProto, class_names: Sequence[str]) -> None:
    """The name of the first class as a second output; onnxruntime and OpenVINO have string tensors."""
    names = [name.encode() for name in class_names]
    graph.initializer.append(onnx.helper.make_tensor("class_names", onnx.TensorProto.STRING, [len(names)], names))
    graph.node.extend(
        [
            onnx.helper.make_node("ArgMax", ["probabilities"], ["first_class"], axis=1, keepdims=0),
            onnx.helper.make_node("Gather", ["class_names", "first_class"], ["classes"], axis=0),
        ]
    )
    graph.output.append(onnx.helper.make_tensor_value_info("classes", onnx.TensorProto.STRING, ["batch"]))
