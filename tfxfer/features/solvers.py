"""Convex heads on frozen features: a regularised multinomial logistic regression solved to its optimum."""

import copy
import dataclasses
from collections.abc import Sequence

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.special
import threadpoolctl

from tfxfer.features.rows import room_for, row_blocks
from tfxfer.features.standardise import Standardised, add_gram, scale_of

STRENGTHS = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4, 3e-5, 1e-5)
# Blocks of coordinates held in memory while a problem is solved; more are read from their file in each step.
KEPT_BLOCKS = 4


@dataclasses.dataclass(frozen=True)
class LinearHead:
    """A Dense head `features @ kernel + bias`, logits.

    Attributes:
        kernel: (D, K) float32.
        bias: (K,) float32.
        strength: The regularisation it was solved with.
        log_loss: Of the probabilities it was chosen by (out of fold, or on the validation part).
    """

    kernel: np.ndarray
    bias: np.ndarray
    strength: float
    log_loss: float

    def logits(self, features: np.ndarray) -> np.ndarray:
        return features @ self.kernel + self.bias

    def logits_of(self, features, rows) -> np.ndarray:
        """(n, K) of some rows of features, which may lie on disk."""
        blocks = row_blocks(len(rows), features.shape[1])
        found = [self.logits(features[rows[block]]) for block in blocks]
        return np.concatenate(found) if found else np.zeros((0, len(self.bias)), np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class Anchor:
    """A head from before, towards which a new one is drawn instead of towards zero.

    Attributes:
        kernel: (D, K) float32, on the plain features.
        bias: (K,) float32.
        known: (K,) bool, the classes that it was trained on; the columns of the others are only a start.
    """

    kernel: np.ndarray
    bias: np.ndarray
    known: np.ndarray


def moving_features(features) -> np.ndarray:
    """Which features move by more than float32 rounds them; the others would only amplify noise at serving time.

    Args:
        features: (N, D) float, perhaps on disk.

    Returns:
        (D,) bool.

    Example:
        >>> moving_features(np.array([[1.0, 5.0, 1e-3], [2.0, 5.000001, 2e-3]])).tolist()
        [True, False, True]
    """
    return scale_of(features)[1] > 0


class LogisticPath(Standardised):
    """Logistic regressions of many strengths on the same features, standardised and rotated once.

    Minimises `mean_i w_i * cross_entropy_i + strength / 2 * ||kernel||^2` in standardised features (the bias is
    free). The penalty does not change under rotation, so the problem is solved along the principal axes of the
    features, found once for all folds and strengths: with fewer images than features that makes it smaller, and
    along them the curvature is nearly diagonal, so that L-BFGS scaled by it needs a few dozen steps, not hundreds.

    With an anchor the penalty is `strength / 2 * sum_k stiffness_k * ||kernel_k - anchor_k||^2`, so that strong
    regularisation leads back to the head from before; where the stiffness is infinite the column stays as it is.

    Args:
        features: (N, D) float, perhaps on disk; read in blocks.
        labels: (N,) int in 0..num_classes-1.
        num_classes: K.
        weights: (N,) non-negative, mean one; None for equal ones.
        anchor: The head from before.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = np.concatenate([rng.normal(-2, 1, (20, 3)), rng.normal(2, 1, (20, 3))])
        >>> path = LogisticPath(x, np.repeat([0, 1], 20), 2)
        >>> head = path.solve(0.01)
        >>> float((head.logits(x).argmax(1) == np.repeat([0, 1], 20)).mean())
        1.0
    """

    def __init__(self, features, labels, num_classes: int, weights=None, anchor: Anchor | None = None):
        super().__init__(features, labels, num_classes, weights)
        self.anchor, self.stiffness = anchor, np.ones(num_classes)
        num, width = features.shape
        rows = np.arange(num)
        if num < width:
            standard = self.rows(rows)
            values, vectors = scipy.linalg.eigh(standard @ standard.T, overwrite_a=True, driver="evd")
            keep = values > 1e-6 * max(float(values[-1]), 1e-30)
            self.rotation = standard.T @ (vectors[:, keep] / np.sqrt(values[keep]))
        else:
            gram = np.zeros((width, width), np.float32)
            for _, x in self.blocks(rows):
                add_gram(gram, x)
            values, self.rotation = scipy.linalg.eigh(gram.T, overwrite_a=True, driver="evd")
            keep = values > 1e-6 * max(float(values[-1]), 1e-30)
            self.rotation = self.rotation[:, keep]
        self.variances = (values[keep] / num).astype(np.float64)
        self.coordinates = room_for((num, self.rotation.shape[1]))
        self.offsets = None if anchor is None else np.empty((num, num_classes), np.float32)
        for block, x in self.blocks(rows):
            self.coordinates.write(block.start, x @ self.rotation)
            if anchor is not None and self.offsets is not None:
                self.offsets[block] = np.asarray(features[rows[block]]) @ anchor.kernel + anchor.bias

    def stiffened(self, ratio: float) -> "LogisticPath":
        """The same problem, with the columns of known classes held so many times as hard as those of the others.

        Args:
            ratio: Above 0, infinity for columns that stay; 0 forgets the anchor, for a head drawn towards zero.
        """
        assert self.anchor is not None
        path = copy.copy(self)
        if not ratio:
            path.anchor = path.offsets = None
            return path
        path.stiffness = np.where(self.anchor.known, ratio, 1.0)
        return path

    def solve(self, strength: float, *, rows=None, start=None, tolerance: float = 1e-6) -> LinearHead:
        """The optimum at one strength, as a Dense head on the plain features."""
        return self.to_head(self.optimum(strength, rows=rows, start=start, tolerance=tolerance), strength, float("nan"))

    def optimum(self, strength: float, *, rows=None, start=None, tolerance: float = 1e-6, max_steps: int = 300):
        """(R + 1, K) weights in rotated coordinates, bias in the last row; `rows` selects the images used."""
        rows = np.arange(len(self.labels)) if rows is None else np.asarray(rows)
        labels = self.labels[rows]
        weights = (self.weights[rows] / self.weights[rows].sum()).astype(np.float32)
        width = self.coordinates.shape[1]
        shape = (width + 1, self.num_classes)
        gradient = np.empty(shape, np.float32)
        blocks = list(row_blocks(len(rows), width))
        # What is in memory need not be read in each step; the rest comes from the system's cache of the file.
        kept = [self.coordinates[rows[block]] for block in blocks[:KEPT_BLOCKS]]
        offsets = None if self.offsets is None else self.offsets[rows]
        free = np.isfinite(self.stiffness)
        if not free.any():
            return np.zeros(shape)
        # The curvature of cross-entropy is p (1 - p) times the variance along an axis; 0.1 stands for p (1 - p).
        pull = strength if self.anchor is None else strength * np.where(free, self.stiffness, 0.0)
        curvature = np.add.outer(0.1 * self.variances, np.atleast_1d(pull))
        step = 1.0 / np.sqrt(np.concatenate([curvature, np.full((1, curvature.shape[1]), 0.1)]))

        def objective(flat):
            theta = (flat.reshape(shape) * step).astype(np.float32)
            squares = (theta[:-1] ** 2).sum(axis=None if np.isscalar(pull) else 0)
            loss = float(np.sum(pull / 2 * squares))
            gradient[:-1], gradient[-1] = pull * theta[:-1], 0.0
            for number, block in enumerate(blocks):
                x = kept[number] if number < len(kept) else self.coordinates[rows[block]]
                logits = x @ theta[:-1] + theta[-1]
                if offsets is not None:
                    logits += offsets[block]
                target = np.arange(len(x)), labels[block]
                logits -= logits.max(1, keepdims=True)
                picked = logits[target]
                np.exp(logits, out=logits)
                total = logits.sum(1, keepdims=True)
                loss += float(weights[block] @ (np.log(total[:, 0]) - picked))
                logits /= total
                logits[target] -= 1
                logits *= weights[block, None]
                gradient[:-1] += x.T @ logits
                gradient[-1] += logits.sum(0)
            if not free.all():
                gradient[:, ~free] = 0
            return loss, (gradient * step).ravel()

        begin = np.zeros(shape) if start is None else start / step
        # Hundreds of small products: starting a second BLAS thread for each costs more than it brings.
        with threadpoolctl.threadpool_limits(1, "blas"):
            found = scipy.optimize.minimize(
                objective, begin.ravel(), jac=True, method="L-BFGS-B", options={"gtol": tolerance, "maxiter": max_steps}
            )
        return found.x.reshape(shape) * step

    def to_head(self, theta, strength: float, log_loss: float) -> LinearHead:
        """Undo rotation and standardisation: the same function as an ordinary Dense layer."""
        kernel = (self.rotation @ theta[:-1].astype(np.float32)) * self.scale[:, None]
        bias = theta[-1].astype(np.float32) - self.mean @ kernel
        if self.anchor is not None:
            kernel, bias = self.anchor.kernel + kernel, self.anchor.bias + bias
        return LinearHead(kernel.astype(np.float32), bias.astype(np.float32), strength, log_loss)

    def log_probabilities(self, theta, rows) -> np.ndarray:
        kernel, bias = theta[:-1].astype(np.float32), theta[-1].astype(np.float32)
        found = []
        for block in row_blocks(len(rows), self.coordinates.shape[1]):
            logits = self.coordinates[rows[block]] @ kernel + bias
            found.append(log_softmax(logits if self.offsets is None else logits + self.offsets[rows[block]]))
        return np.concatenate(found)


def choose_strength(
    path: LogisticPath | Sequence[LogisticPath], folds, strengths=STRENGTHS
) -> tuple[float, np.ndarray]:
    """Choose the strength by log loss on held-out rows, never by accuracy, which is too coarse for few images.

    Args:
        path: The problem, or one for each fold on the same images, where they differ in their features.
        folds: Pairs (train rows, held-out rows).
        strengths: Candidates, from strong to weak; a fold stops once its loss has risen well above its best.

    Returns:
        The strength, and (N, K) held-out log probabilities at it (NaN for rows never held out).
    """
    losses = np.full((len(folds), len(strengths)), np.inf)
    kept: dict[int, np.ndarray] = {}
    paths = [path] * len(folds) if isinstance(path, LogisticPath) else path
    for fold, ((train, held), path) in enumerate(zip(folds, paths, strict=True)):
        theta = None
        for index, strength in enumerate(strengths):
            theta = path.optimum(strength, rows=train, start=theta, tolerance=1e-4)
            scores = path.log_probabilities(theta, held)
            all_scores = kept.setdefault(index, np.full((len(path.labels), path.num_classes), np.nan, np.float32))
            all_scores[held] = scores
            weights = path.weights[held]
            losses[fold, index] = -float(np.average(scores[np.arange(len(held)), path.labels[held]], weights=weights))
            if losses[fold, index] > 1.25 * losses[fold].min():
                break
    best = int(np.argmin(losses.mean(0)))
    return strengths[best], kept[best]


def weighted_log_loss(log_probabilities, labels, weights=None) -> float:
    """Mean of -log p of the true class."""
    return -float(np.average(log_probabilities[np.arange(len(labels)), labels], weights=weights))


def best_temperature(logits, labels, weights=None) -> tuple[float, float]:
    """The temperature between 1/148 and 148 at which `softmax(logits / temperature)` has the least log loss.

    Args:
        logits: (N, K), or log probabilities.
        labels: (N,) int.
        weights: (N,) non-negative.

    Returns:
        Temperature and log loss.

    Reference:
        Guo, Pleiss, Sun, Weinberger. On Calibration of Modern Neural Networks. ICML 2017.
    """
    logits = np.asarray(logits, np.float64)

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return weighted_log_loss(log_softmax(scaled), labels, weights)

    found = scipy.optimize.minimize_scalar(loss, bounds=(-5.0, 5.0), method="bounded", options={"xatol": 1e-3})
    return float(np.exp(found.x)), float(found.fun)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(N, K) log probabilities of logits."""
    return logits - scipy.special.logsumexp(logits, axis=1, keepdims=True)
