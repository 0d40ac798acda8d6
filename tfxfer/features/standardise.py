"""Features and labels of a problem, standardised block by block: they may lie on disk."""

from collections.abc import Iterator

import numpy as np

from tfxfer.features.rows import row_blocks


def scale_of(features) -> tuple[np.ndarray, np.ndarray]:
    """Mean, and one over the standard deviation, of each feature; 0 for those that move by no more than rounding.

    Args:
        features: (N, D) float, in memory or on disk; read twice in blocks.

    Returns:
        (D,) float32 each.

    Example:
        >>> mean, scale = scale_of(np.array([[1.0, 5.0], [3.0, 5.0]]))
        >>> mean.tolist(), scale.tolist()
        ([2.0, 5.0], [1.0, 0.0])
    """
    num, width = features.shape
    total, level = np.zeros(width), np.zeros(width)
    for block in row_blocks(num, width):
        part = np.asarray(features[block], np.float32)
        total += part.sum(0, dtype=np.float64)
        level = np.maximum(level, np.abs(part).max(0))
    mean = total / num
    squares = np.zeros(width)
    for block in row_blocks(num, width):
        part = np.asarray(features[block], np.float32) - mean
        squares += np.square(part, out=part).sum(0)
    spread = np.sqrt(squares / num)
    moves = (spread > 1e-6 * max(float(spread.max()), 1e-30)) & (spread > 1e-5 * level)
    return mean.astype(np.float32), np.where(moves, 1.0 / np.maximum(spread, 1e-30), 0.0).astype(np.float32)


def add_gram(gram: np.ndarray, x: np.ndarray) -> None:
    """Add `x.T @ x`, some rows of it at a time: the whole product would take as much memory again.

    Example:
        >>> gram = np.ones((2, 2))
        >>> add_gram(gram, np.array([[1.0, 2.0]]))
        >>> gram.tolist()
        [[2.0, 3.0], [3.0, 5.0]]
    """
    for strip in row_blocks(len(gram), len(gram)):
        gram[strip] += x[:, strip].T @ x


class Standardised:
    """A problem whose standardised features are made when they are asked for.

    Args:
        features: (N, D) float, perhaps on disk; anything with a shape that gives (n, D) for rows.
        labels: (N,) int in 0..num_classes-1.
        num_classes: K.
        weights: (N,) non-negative; None for equal ones.
    """

    def __init__(self, features, labels, num_classes: int, weights=None):
        self.features, self.labels, self.num_classes = features, np.asarray(labels), num_classes
        self.weights = np.ones(len(self.labels)) if weights is None else np.asarray(weights, np.float64)
        self.mean, self.scale = scale_of(features)

    def rows(self, rows) -> np.ndarray:
        found = np.asarray(self.features[rows], np.float32) - self.mean
        found *= self.scale
        return found

    def blocks(self, rows) -> Iterator[tuple[slice, np.ndarray]]:
        """Where in `rows`, and the standardised features there."""
        for block in row_blocks(len(rows), self.features.shape[1]):
            yield block, self.rows(rows[block])
