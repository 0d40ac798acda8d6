"""What every export format shares: the model as it is served, and the facts about it that travel with the artifact."""

import json
from collections.abc import Mapping, Sequence

import keras
import tensorflow as tf

from tfxfer import __version__
from tfxfer.errors import InputError
from tfxfer.model.preprocess import AdaptImage


def servable(model: keras.Model) -> tuple[keras.Model, int]:
    """The model as it is served, which takes images of any height and width, and the side it resizes them to.

    Args:
        model: Images (N, H, W, C) in 0..255 to probabilities (N, K). One that takes a single fixed square size
            gets an `AdaptImage` in front.

    Returns:
        The model and its size in pixels.

    Raises:
        InputError: Where the model has no `AdaptImage` and its input is not a square image of fixed size.
    """
    for layer in model.layers:
        if isinstance(layer, AdaptImage):
            return model, layer.size_px
    shape = model.input_shape
    if not isinstance(shape, tuple) or len(shape) != 4 or shape[1] is None or shape[1] != shape[2] or shape[3] != 3:
        raise InputError(
            f"Cannot export {model.name!r}: its input is {shape}, and images of any size cannot be fitted to it. "
            "Build it with tfxfer.build_model, or give it one input of shape (S, S, 3)."
        )
    images = keras.Input((None, None, None), name="images", dtype="float32")
    return keras.Model(images, model(AdaptImage(shape[1])(images)), name=model.name), shape[1]


def channels_of(served: keras.Model) -> int:
    """How many channels the images of a model of `servable` have."""
    return next(layer.channels for layer in served.layers if isinstance(layer, AdaptImage))


def probabilities_of(model: keras.Model, images: tf.Tensor) -> tf.Tensor:
    """(N, H, W, 3) uint8 or float to (N, K) float32; every layer in inference mode, whatever its default."""
    return tf.cast(model(tf.cast(images, tf.float32), training=False), tf.float32)


def facts(size_px: int, class_names: Sequence[str], metadata: Mapping[str, str], channels: int = 3) -> dict[str, str]:
    """What an artifact says about itself: the caller's metadata, class names as JSON, and how to feed it.

    Example:
        >>> facts(160, ["cat", "dog"], {"licence": "Apache-2.0"})["class_names"]
        '["cat", "dog"]'
    """
    return {
        **{key: str(value) for key, value in metadata.items()},
        "class_names": json.dumps(list(class_names), ensure_ascii=False),
        "image_size": str(size_px),
        "input": (
            f"images: uint8, (N, H, W, {channels}), {'RGB ' if channels == 3 else ''}in 0..255, any height and width; "
            "no scaling by the caller"
        ),
        "preprocessing": (
            f"inside the artifact: resized to {size_px} x {size_px} without cropping, bilinear with a triangle filter "
            "that widens when shrinking (Pillow's BILINEAR), then the source's own normalisation"
        ),
        "exif_orientation": "not honoured: turn the pixels upright before sending them",
        "tfxfer_version": __version__,
    }
