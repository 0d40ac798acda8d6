"""Cut a model at its freeze boundary into a frozen prefix and a trainable suffix that share its layers."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfxfer.model.blocks import backbone_of, list_blocks, program_of
from tfxfer.model.graph import tensors_behind
from tfxfer.specs import Block


@dataclasses.dataclass(frozen=True)
class Cut:
    """A model in two parts, `suffix(prefix(images)) == model(images)`.

    Where several tensors cross (a skip connection over the boundary), prefix and tail and suffix give and take tuples.

    Attributes:
        depth: Number of blocks in the prefix.
        prefix: Images (N, S, S, 3) in 0..255 to what crosses the cut.
        tail: That to the backbone's features (N, D); None where nothing of the backbone is left.
        suffix: That to the logits (before the softmax); layers and head are the model's own.
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
        The cut, or None where nothing inside the backbone can be reached (a loaded program, a subclassed model), or its
        blocks are tangled so that one before the cut needs one behind it.
    """
    backbone = backbone_of(model)
    blocks = list_blocks(backbone)
    if program_of(backbone) is not None and 0 < depth < len(blocks):
        return None
    crossing = _crossing(backbone, blocks, depth)
    if not crossing:
        return None
    size = backbone.input_shape[1]
    images = keras.Input((size, size, 3), name="images", dtype="float32")
    x = model.get_layer("normalise")(model.get_layer("adapt_image")(images))
    front = keras.Model(backbone.input, _one_or_all(crossing), name=backbone.name) if depth else None
    back = keras.Model(_one_or_all(crossing), backbone.output, name=backbone.name) if depth < len(blocks) else None
    prefix = keras.Model(images, front(x) if front else x, name="prefix")
    inputs = _one_or_all(
        [keras.Input(tensor.shape[1:], name=f"activations_{n}", dtype="float32") for n, tensor in enumerate(crossing)]
    )
    features = back(inputs) if back else inputs
    logits = model.get_layer("logits")(model.get_layer("dropout")(features))
    return Cut(depth, prefix, back, keras.Model(inputs, logits, name="suffix"))


def middle_of(model: keras.Model, first: int, second: int) -> Callable[[Any], list] | None:
    """What lies between two cuts: what crosses behind `first` blocks, as it is stored, to what crosses behind `second`.

    Returns:
        A function of tensors, as in prediction; or None where it cannot be cut at both.
    """
    backbone = backbone_of(model)
    blocks = list_blocks(backbone)
    if program_of(backbone) is not None:
        return None
    before, behind = (_crossing(backbone, blocks, depth) for depth in (first, second))
    if not before or not behind:
        return None
    places = {id(tensor): place for place, tensor in enumerate(before)}
    made = [tensor for tensor in behind if id(tensor) not in places]  # the others cross both cuts
    inner = keras.Model(_one_or_all(before), made, name="middle")

    def compute(crossing: Any) -> list:
        given = crossing if isinstance(crossing, tuple) else (crossing,)
        found = iter(tf.nest.flatten(inner(crossing, training=False)))
        return [given[places[id(tensor)]] if id(tensor) in places else next(found) for tensor in behind]

    return compute


def _crossing(backbone: keras.Model, blocks: Sequence[Block], depth: int) -> list | None:
    if depth == len(blocks):
        return [backbone.output]
    if depth:
        return tensors_behind(backbone, {layer for block in blocks[:depth] for layer in block.layers})
    return [backbone.input]


def _one_or_all(tensors: list):
    return tensors[0] if len(tensors) == 1 else tuple(tensors)
