"""H-score: how far the classes' mean features lie apart, in units of how the features spread."""

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from tfxfer.errors import InputError
from tfxfer.features.rows import row_blocks
from tfxfer.select.scores.inputs import checked_features, one_hot, turned


def h_score(features: ArrayLike, labels: ArrayLike, *, shrinkage: float | None = None) -> float:
    """`tr(cov(f)^-1 (1 - a) cov(E[f | y]))` with `cov(f)` shrunk by a towards a multiple of the identity.

    Without shrinkage, of no more images than features, every source would reach K - 1, the largest value. So the
    covariance is `(1 - a) cov(f) + a tr(cov(f)) / D`, with the share a of Ledoit and Wolf, as Ibrahim et al. have it.
    With `shrinkage=0` it is Bao et al.'s score, with the pseudo-inverse where the covariance is singular.

    Turning or shifting the features, or multiplying all by one number, changes nothing; without shrinkage nor does any
    other invertible linear map.

    Args:
        features: (N, D) float, of N below or above D.
        labels: (N,) int, at least 0, of two classes or more; classes that do not occur do not count.
        shrinkage: a, in 0..1; default None, as Ledoit and Wolf estimate it.

    Returns:
        The score, from 0 to K - 1; higher is better. Features that never move score 0.

    Raises:
        InputError: Where shapes or ranges do not fit, a feature is not finite, or there is one class only.

    Example:
        >>> features, labels = [[0.0], [2.0], [4.0], [6.0]], [0, 0, 1, 1]
        >>> round(h_score(features, labels, shrinkage=0), 6)  # means 2 from the middle: 4 of a variance of 5
        0.8

    Reference:
        Bao, Li, Huang, Zhang, Zheng, Zamir, Guibas. An Information-Theoretic Approach to Transferability in Task
        Transfer Learning. ICIP 2019. Ibrahim, Ponomareva, Mazumder. Newer is not always better: Rethinking
        transferability metrics, their peculiarities, stability and performance. ECML PKDD 2022. Ledoit, Wolf. A
        well-conditioned estimator for large-dimensional covariance matrices. Journal of Multivariate Analysis 2004.
    """
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise InputError(f"shrinkage must be in 0..1, or None to have it estimated, not {shrinkage}.")
    table, classes = checked_features(features, labels)
    width = table.shape[1]
    covariance, means, fourth = _moments(turned(table), one_hot(classes))
    share = _ledoit_wolf(covariance, fourth, len(table), width) if shrinkage is None else shrinkage
    values, axes = scipy.linalg.eigh(covariance, overwrite_a=True, driver="evd")
    spread = (1 - share) * values + share * max(values.sum(), 0) / width
    eps = np.finfo(np.float64).eps
    rounding = width * (len(table) * eps * max(float(table.max()), -float(table.min()))) ** 2
    kept = spread > max(rounding, max(len(table), width) * eps * spread[-1])
    frequency = np.bincount(classes) / len(table)
    between = frequency @ (means @ axes[:, kept]) ** 2
    return float((1 - share) * (between / spread[kept]).sum())


def _moments(table: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Covariance (D, D), the classes' means (K, D) and the mean fourth power of the length, about the common mean."""
    num, width = table.shape
    centre = table.mean(0, dtype=np.float64)
    covariance, totals, fourth = np.zeros((width, width)), np.zeros((targets.shape[1], width)), 0.0
    for block in row_blocks(num, width):
        moved = table[block] - centre
        covariance += moved.T @ moved
        totals += targets[block].T @ moved
        fourth += float((np.einsum("nd,nd->n", moved, moved) ** 2).sum())
    return covariance / num, totals / targets.sum(0)[:, None], fourth / num


def _ledoit_wolf(covariance: np.ndarray, fourth: float, num: int, width: int) -> float:
    """The share in 0..1 by which to shrink: the covariance's sampling error over its distance from the identity.

    Both are sums over all entries, so they follow from the covariance's norm and the images' lengths, and stay the
    same in fewer coordinates. With one feature there is nothing to shrink towards.
    """
    norm = float((covariance**2).sum())
    distance = norm - float(np.trace(covariance)) ** 2 / width
    if distance <= np.finfo(np.float64).eps * norm:
        return 0.0
    return float(np.clip((fourth - norm) / num / distance, 0.0, 1.0))
