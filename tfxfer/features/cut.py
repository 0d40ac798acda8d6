"""Cut a model at its freeze boundary into a frozen prefix and a trainable suffix that share its layers."""

import dataclasses

import keras

from tfxfer.model.blocks import backbone_of, list_blocks, program_of
from tfxfer.model.graph import tensor_behind


@dataclasses.dataclass(frozen=True)
class Cut:
    """A model in two parts, `suffix(prefix(images)) == model(images)`.

    Attributes:
        depth: Number of blocks in the prefix.
        prefix: Images (N, S, S, 3) in 0..255 to the one tensor that crosses the cut.
        tail: That tensor to the backbone's features (N, D); None where nothing of the backbone is left.
        suffix: That tensor to the logits (before the softmax); layers and head are the model's own.
    """

    depth: int
    prefix: keras.Model
    tail: keras.Model | None
    suffix: keras.Model


def cut_model(model: keras.Model, depth: int) -> Cut | None:
    """Cut a model of `build_model` behind its first `depth` blocks.

    Args:
        model: Of `build_model`; a nested backbone between preprocessing and head.
        depth: Blocks in the prefix, 0 to all.

    Returns:
        The cut, or None where more than one tensor crosses it (a skip connection over the boundary).
    """
    backbone = backbone_of(model)
    blocks = list_blocks(backbone)
    if program_of(backbone) is not None and 0 < depth < len(blocks):
        return None  # nothing inside a loaded program can be reached
    if depth == len(blocks):
        crossing = backbone.output
    elif depth:
        crossing = tensor_behind(backbone, [layer for block in blocks[:depth] for layer in block.layers])
    else:
        crossing = backbone.input
    if crossing is None:
        return None
    try:
        front = keras.Model(backbone.input, crossing, name=backbone.name) if depth else None
        back = keras.Model(crossing, backbone.output, name=backbone.name) if depth < len(blocks) else None
    except ValueError:  # Keras: the graph is disconnected, so another tensor crosses
        return None
    size = backbone.input_shape[1]
    images = keras.Input((size, size, 3), name="images", dtype="float32")
    x = model.get_layer("normalise")(model.get_layer("adapt_image")(images))
    prefix = keras.Model(images, front(x) if front else x, name="prefix")
    activations = keras.Input(crossing.shape[1:], name="activations", dtype="float32")
    x = back(activations) if back else activations
    x = model.get_layer("logits")(model.get_layer("dropout")(x))
    return Cut(depth, prefix, back, keras.Model(activations, x, name="suffix"))
