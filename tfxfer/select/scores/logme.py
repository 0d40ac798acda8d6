"""LogME: how probable the labels are under a linear model of the features, its weights integrated out."""

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike

from tfxfer.select.scores.inputs import checked_features, one_hot, triangle_of, turned

TOLERANCE = 1e-8  # of log(alpha / beta); the evidence is flat at its maximum, so it is exact to many digits more
# Of alpha / beta, as a multiple of the largest squared singular value. The evidence has no maximum in between where no
# feature helps (it still rises towards infinity) or where the features give a class without any noise (towards 0).
MIN_RATIO, MAX_RATIO = 1e-12, 1e8

_STEPS, _FREE_STEPS = 80, 40  # those after the free ones only halve the bracket, which ends surely


def logme_score(features: ArrayLike, labels: ArrayLike) -> float:
    """Log of the maximum evidence an image, mean over the classes.

    Each class is a regression of 0 and 1 on the features, without a bias, weights drawn from N(0, 1/alpha) and noise
    from N(0, 1/beta). The evidence is the probability density of its targets with the weights integrated out, at the
    alpha and beta that make it largest. One singular value decomposition serves all classes. Beta follows from
    alpha / beta, and this one from the paper's fixed-point iteration, which starts where the evidence is largest on a
    grid, since it may have several peaks, and is quickened by secants, until its logarithm moves by less than
    `TOLERANCE`. The ratio is kept within `MIN_RATIO` and `MAX_RATIO`, at whose ends the evidence of a class without
    noise or without signal is read.

    Turning the features, or multiplying all by one number, changes nothing; shifting them does.

    Args:
        features: (N, D) float, of N below or above D; read in blocks of rows where N is large.
        labels: (N,) int, at least 0, of two classes or more; classes that do not occur do not count.

    Returns:
        The score, in nats an image; any sign, higher is better. Comparable on the same labels only.

    Raises:
        InputError: Where shapes or ranges do not fit, a feature is not finite, or there is one class only.

    Example:
        >>> labels = np.arange(6) % 2
        >>> told = np.stack([labels, 1 - labels], axis=1) + 0.1 * np.eye(6)[:, :2]
        >>> logme_score(told, labels) > logme_score(told[::-1], labels)
        True

    Reference:
        You, Liu, Wang, Long. LogME: Practical Assessment of Pre-trained Models for Transfer Learning. ICML 2021.
        The iteration in alpha / beta: You, Liu, Zhang, Wang, Jordan, Long. Ranking and Tuning Pre-trained Models: A New
        Paradigm for Exploiting Model Hubs. JMLR 2022.
    """
    table, classes = checked_features(features, labels)
    squares, inside, outside = _spectrum(table, one_hot(classes))
    return float(_maximum_evidence(squares, inside, outside, len(table)).mean())


def _spectrum(table: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Squared singular values (R,), squares of the targets along their left vectors (R, K), and of the rest (K,).

    The triangle of (features, targets) has all of that in it, and is had block by block; a Gram matrix would be
    quicker and lose the small half of the digits.
    """
    table = turned(table)
    num, width = table.shape
    step = max(2048, 2 * (width + targets.shape[1]))
    triangle = np.zeros((0, width + targets.shape[1]))
    for start in range(0, num, step):
        block = np.hstack([table[start : start + step], targets[start : start + step]])
        triangle = triangle_of(np.vstack([triangle, block]))
    vectors, values, _ = scipy.linalg.svd(triangle[:, :width], full_matrices=False, overwrite_a=True)
    vectors = vectors[:, values > values[0] * max(num, width) * np.finfo(np.float64).eps]
    along = vectors.T @ triangle[:, width:]
    rest = triangle[:, width:] - vectors @ along
    return values[: len(along)] ** 2, along**2, (rest**2).sum(0)


def _maximum_evidence(squares: np.ndarray, inside: np.ndarray, outside: np.ndarray, num: int) -> np.ndarray:
    """(K,) log evidence an image at the best alpha and beta of each class."""
    squares = squares / (squares.max(initial=0) or 1)
    grid = np.arange(np.log(MIN_RATIO), np.log(MAX_RATIO) + 0.25, 0.5)
    noise, _ = _shares(squares, grid)
    coarse = _evidence(np.log(noise).sum(0)[:, None], noise.T @ inside + outside, num)
    best = coarse.argmax(0)
    bracket = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, len(grid) - 1)]
    found = _fixed_points(squares, inside, outside, num, grid[best], bracket)
    noise, _ = _shares(squares, found)
    return np.maximum(_evidence(np.log(noise).sum(0), (noise * inside).sum(0) + outside, num), coarse.max(0))


def _evidence(log_noise: np.ndarray, energy: np.ndarray, num: int) -> np.ndarray:
    """Log evidence an image, with beta at its best, N over the energy that alpha / beta leaves unexplained."""
    return -(np.log(2 * np.pi * energy / num) + 1 - log_noise / num) / 2


def _fixed_points(squares, inside, outside, num, start, bracket) -> np.ndarray:
    """(K,) log of the alpha / beta that the paper's iteration gives back unchanged, within a bracket of each class.

    The iteration always steps towards larger evidence, so each step narrows the bracket. It converges slowly where
    the evidence is flat, so a secant through the last two steps is taken where it stays inside.
    """
    (low, high), at = bracket, start
    before, gain_before = np.full_like(at, np.nan), np.full_like(at, np.nan)
    for step in range(_STEPS):
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = _iterated(squares, inside, outside, num, at) - at
            low, high = np.where(gain > 0, at, low), np.where(gain > 0, high, at)
            aim = at - gain * (at - before) / (gain - gain_before)
        for other in (at + gain, (low + high) / 2):
            aim = np.where((aim > low) & (aim < high) & (step < _FREE_STEPS), aim, other)
        before, gain_before, at = at, gain, aim
        if np.abs(at - before).max() < TOLERANCE:
            break
    return at


def _iterated(squares, inside, outside, num, log_ratio) -> np.ndarray:
    """One step of the paper's iteration: (K,) log of the new alpha / beta."""
    noise, signal = _shares(squares, log_ratio)
    # alpha = gamma / |m|^2 and beta = (N - gamma) / |y - F m|^2; `weights` is |m|^2 alpha / beta.
    gamma, free = signal.sum(0), num - len(squares) + noise.sum(0)
    weights, residual = (signal * noise * inside).sum(0), (noise**2 * inside).sum(0) + outside
    return log_ratio + np.log(gamma * residual) - np.log(free * weights)


def _shares(squares: np.ndarray, log_ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(R, n) what noise explains along each left vector, ratio / (ratio + squared singular value), and what signal."""
    strength = np.multiply.outer(squares, np.exp(-log_ratio))
    noise = 1 / (1 + strength)
    return noise, strength * noise
