"""Reader: a `tf.data.Dataset` of (x, y) or (x, y, w), in batches or one by one."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tfxfer.data.items import Reading
from tfxfer.data.values import as_images, as_labels, reading_of, refuse_unit_range
from tfxfer.errors import InputError


def reads(data: Any) -> bool:
    """Whether `data` walks like a tf.data.Dataset; told without importing TensorFlow."""
    return hasattr(data, "element_spec") and hasattr(data, "as_numpy_iterator")


def read(data: Any, class_names: Sequence[str] | None = None) -> Reading:
    """Go through the data set once and keep its images as uint8.

    Args:
        data: Of (image, label[, weight]); images (H, W, C) or (N, H, W, C), uint8 or float in 0..255; labels
            numbers, names or one-hot. Endless data sets must be cut with `take` first.
        class_names: Names of the labels 0, 1, 2 ...; by default what `image_dataset_from_directory` leaves in
            `.class_names`, else the numbers.

    Raises:
        InputError: Where the elements are something else, or the data set is endless.
    """
    names = class_names or getattr(data, "class_names", None)
    spec = data.element_spec
    if not isinstance(spec, tuple) or len(spec) not in (2, 3):
        raise InputError(f"The tf.data.Dataset holds {spec}; expected (image, label) or (image, label, weight).")
    if int(data.cardinality()) == -1:
        raise InputError("The tf.data.Dataset is endless (`repeat()`); cut it with `take` first.")
    images: list[np.ndarray] = []
    labels: list[str] = []
    weights: list[float] = []
    highest: list[Any] = []  # over all batches: one dark batch does not prove that floats span 0..1
    for x, y, *w in data.as_numpy_iterator():
        if not _is_batch(x, y):
            x, y = x[None], np.asarray(y)[None]
        highest.append(x.max(initial=0))
        images += list(as_images(x, check_range=False))
        labels += as_labels(y, names)
        weights += np.asarray(w[0], np.float64).reshape(-1).tolist() if w else []
    refuse_unit_range(highest)
    return reading_of(images, labels, weights or None, names)


def _is_batch(x: np.ndarray, y: Any) -> bool:
    """Whether (x, y) is a batch: (N, H, W, C), or (N, H, W) grey with several labels."""
    return x.ndim == 4 or (x.ndim == 3 and np.ndim(y) > 0 and x.shape[-1] not in (1, 2, 3, 4))
