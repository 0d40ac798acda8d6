"""Convex heads on frozen features: a regularised multinomial logistic regression solved to its optimum."""

import dataclasses

import numpy as np
import scipy.linalg
import scipy.optimize
import scipy.special
import threadpoolctl

STRENGTHS = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 3e-4, 1e-4, 3e-5, 1e-5)


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


def moving_features(features: np.ndarray) -> np.ndarray:
    """Which features move by more than float32 rounds them; the others would only amplify noise at serving time.

    Args:
        features: (N, D) float.

    Returns:
        (D,) bool.

    Example:
        >>> moving_features(np.array([[1.0, 5.0, 1e-3], [2.0, 5.000001, 2e-3]])).tolist()
        [True, False, True]
    """
    spread, level = features.std(0), np.abs(features).max(0)
    return (spread > 1e-6 * max(float(spread.max()), 1e-30)) & (spread > 1e-5 * level)


class LogisticPath:
    """Logistic regressions of many strengths on the same features, standardised and rotated once.

    Minimises `mean_i w_i * cross_entropy_i + strength / 2 * ||kernel||^2` in standardised features (the bias is
    free). The penalty does not change under rotation, so the problem is solved along the principal axes of the
    features, found once for all folds and strengths: with fewer images than features that makes it smaller, and
    along them the curvature is nearly diagonal, so that L-BFGS scaled by it needs a few dozen steps, not hundreds.

    Args:
        features: (N, D) float.
        labels: (N,) int in 0..num_classes-1.
        num_classes: K.
        weights: (N,) non-negative, mean one; None for equal ones.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = np.concatenate([rng.normal(-2, 1, (20, 3)), rng.normal(2, 1, (20, 3))])
        >>> path = LogisticPath(x, np.repeat([0, 1], 20), 2)
        >>> head = path.solve(0.01)
        >>> float((head.logits(x).argmax(1) == np.repeat([0, 1], 20)).mean())
        1.0
    """

    def __init__(self, features, labels, num_classes: int, weights=None):
        features = np.asarray(features, np.float32)
        self.labels = np.asarray(labels)
        self.num_classes = num_classes
        self.weights = np.ones(len(features)) if weights is None else np.asarray(weights, np.float64)
        self.mean = features.mean(0)
        moves = moving_features(features)
        self.scale = np.where(moves, 1.0 / np.maximum(features.std(0), 1e-30), 0.0).astype(np.float32)
        standard = (features - self.mean) * self.scale
        if len(standard) < standard.shape[1]:
            values, vectors = scipy.linalg.eigh(standard @ standard.T, overwrite_a=True, driver="evd")
            keep = values > 1e-6 * max(float(values[-1]), 1e-30)
            self.rotation = standard.T @ (vectors[:, keep] / np.sqrt(values[keep]))
        else:
            values, self.rotation = scipy.linalg.eigh(standard.T @ standard, overwrite_a=True, driver="evd")
            keep = values > 1e-6 * max(float(values[-1]), 1e-30)
            self.rotation = self.rotation[:, keep]
        self.variances = (values[keep] / len(standard)).astype(np.float64)
        self.coordinates = (standard @ self.rotation).astype(np.float32)

    def solve(self, strength: float, *, rows=None, start=None, tolerance: float = 1e-6) -> LinearHead:
        """The optimum at one strength, as a Dense head on the plain features."""
        return self.to_head(self.optimum(strength, rows=rows, start=start, tolerance=tolerance), strength, float("nan"))

    def optimum(self, strength: float, *, rows=None, start=None, tolerance: float = 1e-6, max_steps: int = 300):
        """(R + 1, K) weights in rotated coordinates, bias in the last row; `rows` selects the images used."""
        x = self.coordinates if rows is None else self.coordinates[rows]
        labels = self.labels if rows is None else self.labels[rows]
        weights = self.weights if rows is None else self.weights[rows]
        weights = (weights / weights.sum()).astype(np.float32)
        shape = (x.shape[1] + 1, self.num_classes)
        target = np.arange(len(x)), labels
        gradient = np.empty(shape, np.float32)
        # The curvature of cross-entropy is p (1 - p) times the variance along an axis; 0.1 stands for p (1 - p).
        curvature = np.append(0.1 * self.variances + strength, 0.1)
        step = (1.0 / np.sqrt(curvature))[:, None]

        def objective(flat):
            theta = (flat.reshape(shape) * step).astype(np.float32)
            logits = x @ theta[:-1] + theta[-1]
            logits -= logits.max(1, keepdims=True)
            picked = logits[target]
            np.exp(logits, out=logits)
            total = logits.sum(1, keepdims=True)
            loss = float(weights @ (np.log(total[:, 0]) - picked)) + strength / 2 * float((theta[:-1] ** 2).sum())
            logits /= total
            logits[target] -= 1
            logits *= weights[:, None]
            np.matmul(x.T, logits, out=gradient[:-1])
            gradient[:-1] += strength * theta[:-1]
            gradient[-1] = logits.sum(0)
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
        return LinearHead(kernel.astype(np.float32), bias.astype(np.float32), strength, log_loss)

    def log_probabilities(self, theta, rows) -> np.ndarray:
        logits = self.coordinates[rows] @ theta[:-1].astype(np.float32) + theta[-1].astype(np.float32)
        return log_softmax(logits)


def choose_strength(path: LogisticPath, folds, strengths=STRENGTHS) -> tuple[float, np.ndarray]:
    """Choose the strength by log loss on held-out rows, never by accuracy, which is too coarse for few images.

    Args:
        path: The problem.
        folds: Pairs (train rows, held-out rows).
        strengths: Candidates, from strong to weak; a fold stops once its loss has risen well above its best.

    Returns:
        The strength, and (N, K) held-out log probabilities at it (NaN for rows never held out).
    """
    losses = np.full((len(folds), len(strengths)), np.inf)
    kept: dict[int, np.ndarray] = {}
    for fold, (train, held) in enumerate(folds):
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
