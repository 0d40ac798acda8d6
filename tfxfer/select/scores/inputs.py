"""What the scores share: features and labels checked once, and fewer images than features made square."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tfxfer.errors import InputError


def checked_features(features: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Features in float32 or float64, and labels numbered anew, from 0 without a gap.

    Args:
        features: (N, D) numbers; float16 becomes float32, whole numbers float64.
        labels: (N,) int, at least 0, of two classes or more; classes that do not occur are left out.

    Returns:
        (N, D) float, not copied where that is not needed, and (N,) int in 0..K-1.

    Raises:
        InputError: Where shapes, types or ranges do not fit, a value is not finite, or there is one class only.

    Example:
        >>> checked_features([[1, 2], [3, 4]], [7, 2])[1].tolist()
        [1, 0]
    """
    table = np.asarray(features)
    if table.ndim != 2 or 0 in table.shape:
        raise InputError(f"features must be (N, D), an image a row, not {table.shape}; pool or flatten maps first.")
    if table.dtype.kind not in "fiub":
        raise InputError(f"features must be numbers, not {table.dtype}.")
    if table.dtype not in (np.float32, np.float64):
        table = table.astype(np.float32 if table.dtype == np.float16 else np.float64)
    classes = checked_classes(labels, len(table), "features")
    finite = np.isfinite(table).all(1)
    if not finite.all():
        raise InputError(
            f"Row {int(finite.argmin())} of the features holds a value that is not finite "
            f"({int((~finite).sum())} of {len(table)} rows do); leave these images out, or another source."
        )
    return table, classes


def checked_classes(labels: ArrayLike, num_images: int, what: str) -> np.ndarray:
    """(N,) labels numbered anew, from 0 without a gap.

    Args:
        labels: (N,) int, at least 0.
        num_images: N.
        what: The plural noun for what has a row an image, for the error.

    Raises:
        InputError: Where they are not N whole numbers of at least 0, or all the same.
    """
    given = np.asarray(labels)
    if given.shape != (num_images,):
        raise InputError(f"{num_images} rows of {what} need labels ({num_images},), one for each, not {given.shape}.")
    if given.dtype.kind not in "iub":
        raise InputError(f"labels must be whole numbers, not {given.dtype}; give each class its number.")
    if given.min() < 0:
        raise InputError(f"labels must be at least 0; label {int(given.argmin())} is {given.min()}.")
    names, classes = np.unique(given, return_inverse=True)
    if len(names) < 2:
        raise InputError(f"All {num_images} labels are {names[0]}; a source can only be judged on two classes or more.")
    return classes


def one_hot(classes: np.ndarray) -> np.ndarray:
    """(N, K) float64, 1 where an image is of a class.

    Example:
        >>> one_hot(np.array([1, 0])).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    return np.eye(int(classes.max()) + 1)[classes]


def turned(features: np.ndarray) -> np.ndarray:
    """The same images in at most N coordinates: lengths, angles and means stay, directions without images go.

    Args:
        features: (N, D) float.

    Returns:
        (N, min(N, D)); of fewer features than images, the features themselves.

    Example:
        >>> np.abs(turned(np.array([[3.0, 4.0]]))).round(6).tolist()
        [[5.0]]
    """
    num, width = features.shape
    return triangle_of(features.T.astype(np.float64)).T if num < width else features


def triangle_of(matrix: np.ndarray) -> np.ndarray:
    """(min(n, m), m) the upper triangle of a QR decomposition of (n, m): the same inner products of columns."""
    triangle: Any = np.linalg.qr(matrix, mode="r")
    return triangle
