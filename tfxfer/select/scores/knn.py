"""k nearest neighbours: whether images that a source sees alike have the same label."""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from tfxfer.errors import InputError
from tfxfer.select.scores.inputs import checked_features
from tfxfer.tally import group_numbers

BLOCK_SIZE = 2_000_000  # similarities held at once: 8 MB in float32, and 20 MB more to order them


def knn_score(features: ArrayLike, labels: ArrayLike, *, k: int = 5, groups: Sequence[Hashable] | None = None) -> float:
    """Share of images that the k most similar others, by cosine, give the right label.

    Each image is judged by all others, but never by those of its own group (crops, frames, duplicates, one patient).
    Of classes with equally many neighbours the one that is nearer in sum wins. Turning the features, or multiplying
    those of any image, changes nothing; an image whose features are all 0 is equally far from all others.

    Args:
        features: (N, D) float.
        labels: (N,) int, at least 0, of two classes or more.
        k: Neighbours asked, at least 1; default 5. Where fewer images stand outside a group, all of them are.
        groups: N names; images that share one do not judge each other. Default: each image its own.

    Returns:
        The accuracy, in 0..1; higher is better.

    Raises:
        InputError: Where shapes or ranges do not fit, a feature is not finite, or there is one class or group only.

    Example:
        >>> features, labels = [[1.0, 0.0], [3.0, 0.1], [0.0, 1.0], [0.1, 2.0]], [0, 0, 1, 1]
        >>> knn_score(features, labels, k=1), knn_score(features, labels, k=1, groups=["a", "a", "b", "c"])
        (1.0, 0.5)

    Reference:
        Wu, Xiong, Yu, Lin. Unsupervised Feature Learning via Non-Parametric Instance Discrimination. CVPR 2018 (the
        cosine k-NN as a test of frozen features).
    """
    table, classes = checked_features(features, labels)
    if k < 1:
        raise InputError(f"k must be at least 1, not {k}.")
    numbers = group_numbers(groups, len(table))
    group_of_image = np.arange(len(table)) if numbers is None else numbers
    if not group_of_image.max():
        raise InputError(f"All {len(table)} images are of one group, so that none may judge another; give others.")
    directions = _directions(table)
    right = 0
    for rows in _blocks(len(table)):
        similarity = directions[rows] @ directions.T
        similarity[group_of_image[rows, None] == group_of_image] = -np.inf
        right += int((_predicted(similarity, classes, k) == classes[rows]).sum())
    return right / len(table)


def _directions(table: np.ndarray) -> np.ndarray:
    """Rows of length 1; divided by their largest number first, so that no square overflows or vanishes."""
    largest = np.abs(table).max(1, keepdims=True)
    scaled = np.divide(table, largest, out=np.zeros_like(table), where=largest > 0)
    length = np.linalg.norm(scaled, axis=1, keepdims=True)
    return np.divide(scaled, length, out=scaled, where=length > 0)


def _blocks(num: int) -> Iterator[slice]:
    step = max(1, BLOCK_SIZE // num)
    for start in range(0, num, step):
        yield slice(start, start + step)


def _predicted(similarity: np.ndarray, classes: np.ndarray, k: int) -> np.ndarray:
    """(n,) classes by the votes of the k most similar; -inf marks who may not vote."""
    num = similarity.shape[1]
    k = min(k, num)
    near = np.argpartition(similarity, num - k, axis=1)[:, num - k :]
    close = np.take_along_axis(similarity, near, axis=1).astype(np.float64)
    # Similarities sum to no more than k, so a fraction of them decides between equal votes and no others.
    votes = np.where(np.isneginf(close), 0, 1 + close / (4 * k))
    table = np.zeros((len(similarity), int(classes.max()) + 1))
    np.add.at(table, (np.arange(len(similarity))[:, None], classes[near]), votes)
    return table.argmax(1)
