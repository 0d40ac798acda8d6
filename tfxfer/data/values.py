"""Arrays of any numeric type to uint8 images and class names; shared by the readers of arrays and tf.data."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tfxfer.data.items import Item, Reading, order_of_classes
from tfxfer.errors import InputError


def reading_of(
    images: Sequence[np.ndarray], labels: Sequence[str], weights: Any, class_names: Sequence[str] | None
) -> Reading:
    """Items out of images, class names and weights that were checked."""
    if not len(images):
        raise InputError("The data holds no image.")
    items = tuple(
        Item(f"row {row}", label, image, weight=None if weights is None else float(weights[row]))
        for row, (image, label) in enumerate(zip(images, labels, strict=True))
    )
    return Reading("arrays", items, order_of_classes(set(labels), class_names))


def as_images(images: Any, check_range: bool = True) -> list[np.ndarray]:
    """Images as (H, W, C) uint8, one by one; arrays that are uint8 already are not copied.

    Args:
        images: (N, H, W), (N, H, W, C), or a list of (H, W) or (H, W, C) of differing sizes.
        check_range: Whether floats that never exceed 1 are refused, as they were surely divided by 255.

    Raises:
        InputError: Where the shape is not that of images or values lie outside 0..255.
    """
    if isinstance(images, list | tuple) and len({np.shape(image) for image in images}) > 1:
        if check_range:
            refuse_unit_range(images)
        return [as_images(np.asarray(image)[None], check_range=False)[0] for image in images]
    array = np.asarray(images)
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or array.shape[-1] not in (1, 2, 3, 4) or 0 in array.shape[1:]:
        raise InputError(
            f"The images have shape {array.shape}; expected (N, height, width, channels) with 1 to 4 channels last."
        )
    if array.dtype == np.uint8:
        return list(array)
    if array.dtype == bool:
        return list(array.astype(np.uint8) * np.uint8(255))
    if array.dtype.kind not in "iuf":
        raise InputError(f"The images have type {array.dtype}; expected uint8, or floats in 0..255.")
    if check_range:
        refuse_unit_range([array])
    low, high = (array.min(), array.max()) if array.size else (0, 0)
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0 or high > 255:
        raise InputError(f"The images hold values from {low} to {high}; expected 0..255 (before any normalisation).")
    return list(np.rint(array).astype(np.uint8))


def refuse_unit_range(images: Iterable[Any]) -> None:
    """Refuse floats in 0..1.

    Raises:
        InputError: Where there are float images and all lie in 0..1.
    """
    floats = [image for image in map(np.asarray, images) if image.dtype.kind == "f" and image.size]
    if floats and all(image.min() >= 0 and image.max() <= 1 for image in floats):
        raise InputError("The images hold values in 0..1; expected 0..255: multiply them by 255.")


def as_labels(labels: Any, class_names: Sequence[str] | None) -> list[str]:
    """Class names out of numbers, names or one-hot rows.

    Raises:
        InputError: Where a label is none of these or has no name.
    """
    array = np.asarray(labels)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim == 2:
        array = _from_one_hot(array)
    if array.ndim != 1:
        raise InputError(f"The labels have shape {array.shape}; expected (N,), or (N, classes) one-hot.")
    if array.dtype.kind in "OUS":
        return [label.decode() if isinstance(label, bytes) else str(label) for label in array.tolist()]
    numbers = array.astype(np.int64) if array.dtype.kind in "iubf" and np.isfinite(array).all() else None
    if numbers is None or (numbers != array).any():
        raise InputError(f"The labels have type {array.dtype}; expected whole numbers, names, or one-hot rows.")
    count = None if class_names is None else len(class_names)
    wrong = np.flatnonzero((numbers < 0) | (numbers >= (np.iinfo(np.int64).max if count is None else count)))
    if len(wrong):
        expected = "0 or more" if count is None else f"0..{count - 1}, as there are {count} class names"
        raise InputError(f"The label of row {wrong[0]} is {numbers[wrong[0]]}; expected {expected}.")
    return [str(number) if class_names is None else class_names[number] for number in numbers.tolist()]


def _from_one_hot(array: np.ndarray) -> np.ndarray:
    good = np.isin(array, (0, 1)).all(axis=1) & (array.sum(axis=1) == 1)
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        raise InputError(f"The label of row {row} is {array[row].tolist()}; expected one-hot, a single 1 among zeros.")
    return array.argmax(axis=1)
