"""Reader: arrays (x, y) or (x, y, w)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tfxfer.data.items import Reading
from tfxfer.data.values import as_images, as_labels, reading_of
from tfxfer.errors import InputError


def reads(data: Any) -> bool:
    """Whether `data` is a tuple or list of two or three things that can be arrays."""
    return isinstance(data, tuple | list) and len(data) in (2, 3) and not any(isinstance(x, str) for x in data)


def read(data: Any, class_names: Sequence[str] | None = None) -> Reading:
    """One item a row, named "row 0", "row 1" ...

    Args:
        data: Images (N, H, W) or (N, H, W, 1..4), uint8 or float in 0..255, or a list of images of differing
            sizes; labels (N,) of class numbers or names, or (N, K) one-hot; weights (N,), if any.
        class_names: Names of the labels 0, 1, 2 ...; by default the numbers.

    Raises:
        InputError: Where shapes, types or values cannot be images and their labels.
    """
    images = as_images(data[0])
    labels = as_labels(data[1], class_names)
    weights = None if len(data) == 2 else np.asarray(data[2], np.float64).reshape(-1)
    for what, values in (("labels", labels), ("weights", weights)):
        if values is not None and len(values) != len(images):
            raise InputError(f"There are {len(images)} images and {len(values)} {what}; expected one for each image.")
    if weights is not None and not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise InputError("The weights hold values that are negative or not finite.")
    return reading_of(images, labels, weights, class_names)
