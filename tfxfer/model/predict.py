"""Outputs of a model for images that lie on disk."""

from typing import Any

import keras
import numpy as np

BATCH_SIZE = 64


def predict_in_batches(model: keras.Model, images: Any) -> np.ndarray:
    """What `model.predict` gives, for anything that slices give arrays of.

    Args:
        model: One input, one output.
        images: (N, ...) array, or rows in a file.

    Returns:
        (N, ...) float32.

    Example:
        >>> net = keras.Sequential([keras.Input((2,)), keras.layers.Rescaling(2.0)])
        >>> predict_in_batches(net, np.ones((3, 2), "float32")).tolist()
        [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    """
    starts = range(0, len(images), BATCH_SIZE)
    found = [model.predict_on_batch(images[start : start + BATCH_SIZE]) for start in starts]
    return np.concatenate(found) if found else np.zeros((0, *model.output_shape[1:]), np.float32)
