"""Heads in closed form on frozen features: ridge regression of one-hot labels, and class means (prototypes).

Both are exported as an ordinary Dense layer and see the features in blocks of rows, so that these may lie on disk.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.linalg

from tfxfer.features.rows import row_blocks
from tfxfer.features.solvers import LinearHead, best_temperature, log_softmax
from tfxfer.features.standardise import Standardised, add_gram

# Penalties as shares of the features' mean variance, from strong to weak.
RIDGE_STRENGTHS = (1000.0, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
DISTANCES = ("euclidean", "cosine")

Folds = Sequence[tuple[np.ndarray, np.ndarray]]


class _ClosedForm(Standardised):
    def plain(self, kernel, bias, strength: float, log_loss: float) -> LinearHead:
        """The head of standardised features as one of plain features."""
        kernel = kernel * self.scale[:, None]
        bias = bias - self.mean @ kernel
        return LinearHead(kernel.astype(np.float32), bias.astype(np.float32), strength, log_loss)

    def judge(self, scores: dict, folds: Folds) -> tuple[Any, float, float, np.ndarray]:
        """Of held-out scores by candidate the best: it, its temperature, log loss, and (N, K) log probabilities."""
        tested = np.concatenate([test for _, test in folds])
        labels, weights = self.labels[tested], self.weights[tested]
        found = {key: best_temperature(table, labels, weights) for key, table in scores.items()}
        best = min(found, key=lambda key: found[key][1])
        temperature, loss = found[best]
        table = np.full((len(self.labels), self.num_classes), np.nan, np.float32)
        table[tested] = log_softmax(scores[best] / temperature)
        return best, temperature, loss, table


class RidgePath(_ClosedForm):
    """Ridge regressions of one-hot labels, of many strengths by one decomposition.

    Minimises `sum_i w_i * ||y_i - x_i kernel - bias||^2 + strength * sum_i w_i * ||kernel||^2` in standardised
    features, the bias free. What a model without some images says of these follows from the one with all of them:
    the residuals left out are `(I - H_oo)^-1 r_o`, with H the matrix that turns targets into fitted values. So each
    fold costs a small system and no decomposition; the penalty stays that of all images. A temperature chosen on
    held-out scores makes probabilities of them, since a squared error leaves scores far too close to each other.

    Args:
        features: (N, D) float, perhaps on disk.
        labels: (N,) int in 0..num_classes-1.
        num_classes: K.
        weights: (N,) non-negative; None for equal ones.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> x = np.concatenate([rng.normal(-2, 1, (20, 3)), rng.normal(2, 1, (20, 3))])
        >>> path = RidgePath(x, np.repeat([0, 1], 20), 2)
        >>> head = path.head(np.arange(40), strength=0.1)
        >>> float((head.logits(x).argmax(1) == np.repeat([0, 1], 20)).mean())
        1.0

    Reference:
        Golub, Heath, Wahba. Generalized Cross-Validation as a Method for Choosing a Good Ridge Parameter.
        Technometrics 1979 (one image left out; here a fold).
    """

    def choose(self, folds: Folds, strengths: Sequence[float] = RIDGE_STRENGTHS) -> tuple[dict, np.ndarray]:
        """The strength and the temperature of least held-out log loss.

        Args:
            folds: Pairs (train rows, held-out rows).
            strengths: Candidates.

        Returns:
            `strength`, `temperature` and `log_loss`, and (N, K) held-out log probabilities (NaN for rows never held
            out).
        """
        base = np.unique(np.concatenate([train for train, _ in folds]))
        values, left, apply = self._decompose(base)
        root = np.sqrt(self.weights[base] / self.weights[base].sum())[:, None]
        targets = np.eye(self.num_classes)[self.labels[base]]
        mean_target = root[:, 0] ** 2 @ targets
        centred = root * (targets - mean_target)
        inside = np.zeros((len(values), self.num_classes))
        for block in row_blocks(len(base), self.features.shape[1]):
            inside += left(np.arange(block.start, block.stop)).T @ centred[block]
        scores: dict[float, list[np.ndarray]] = {strength: [] for strength in strengths}
        for train, test in folds:
            out = np.flatnonzero(~np.isin(base, train))
            if not np.isin(test, base).all():
                for block in row_blocks(len(test), self.features.shape[1]):
                    outside = apply(test[block])
                    for strength in strengths:
                        scores[strength].append(mean_target + outside @ (inside / (values + strength)[:, None]))
                continue
            place, vectors = np.searchsorted(base[out], test), left(out)
            for strength in strengths:
                shrunk = values / (values + strength)
                # In features and targets multiplied by the roots of the weights the bias is one more direction.
                hat = (vectors * shrunk) @ vectors.T + root[out] * root[out].T
                residuals = centred[out] - vectors @ (shrunk[:, None] * inside)
                lacking = np.linalg.solve(np.eye(len(out)) - hat, residuals) / root[out]
                scores[strength].append((targets[out] - lacking)[place])
        joined = {strength: np.concatenate(parts) for strength, parts in scores.items()}
        strength, temperature, loss, table = self.judge(joined, folds)
        return {"strength": strength, "temperature": temperature, "log_loss": loss}, table

    def head(self, rows, *, strength: float, temperature: float = 1.0, log_loss: float = float("nan")) -> LinearHead:
        """The head trained on some rows, as a Dense layer whose softmax gives the probabilities."""
        kernel, bias = self._solve(np.asarray(rows), strength)
        return self.plain(kernel / temperature, bias / temperature, strength, log_loss)

    def relevance(self, rows, strength: float) -> np.ndarray:
        """(D,) how much each feature weighs: the length of its row in the standardised kernel of some rows."""
        return np.linalg.norm(self._solve(np.asarray(rows), strength, np.float32)[0], axis=1)

    def _solve(self, rows: np.ndarray, strength: float, dtype: type = np.float64) -> tuple[np.ndarray, np.ndarray]:
        """Kernel (D, K) and bias (K,) on standardised features; the dtype is that of the system."""
        weights = self.weights[rows] / self.weights[rows].sum()
        targets = np.eye(self.num_classes)[self.labels[rows]]
        width = self.features.shape[1]
        centre, mean_target = self._centre(rows, weights), weights @ targets
        if len(rows) < width:
            standard = (self.rows(rows) - centre) * np.sqrt(weights)[:, None].astype(np.float32)
            gram = (standard @ standard.T).astype(dtype)
            gram[np.diag_indices_from(gram)] += strength
            solved = _solved(gram, np.sqrt(weights)[:, None] * (targets - mean_target))
            kernel = standard.T @ solved
        else:
            gram, crossed = self._gram(rows, weights, centre, dtype), np.zeros((width, self.num_classes))
            gram[np.diag_indices_from(gram)] += strength
            for block, x in self.blocks(rows):
                crossed += (x - centre).T @ (weights[block, None] * (targets[block] - mean_target))
            kernel = _solved(gram, crossed)
        return kernel, mean_target - centre @ kernel

    def _centre(self, rows, weights) -> np.ndarray:
        centre = np.zeros(self.features.shape[1])
        for block, x in self.blocks(rows):
            centre += weights[block] @ x
        return centre.astype(np.float32)

    def _gram(self, rows, weights, centre, dtype: type) -> np.ndarray:
        """(D, D) weighted covariance."""
        width = self.features.shape[1]
        gram = np.zeros((width, width), dtype)
        for block, x in self.blocks(rows):
            x -= centre
            x *= np.sqrt(weights[block])[:, None].astype(np.float32)
            add_gram(gram, x)
        return gram

    def _decompose(self, rows):
        """Eigenvalues (R,), and two functions.

        The first gives the left singular vectors (n, R) of the rows at these places, the second the coordinates of
        other rows times the values' roots: what multiplies `vectors.T @ targets / (values + strength)`.
        """
        weights = self.weights[rows] / self.weights[rows].sum()
        root = np.sqrt(weights)[:, None].astype(np.float32)
        centre, width = self._centre(rows, weights), self.features.shape[1]
        if len(rows) < width:
            standard = (self.rows(rows) - centre) * root
            values, vectors = scipy.linalg.eigh(standard @ standard.T, overwrite_a=True, driver="evd")
            kept = values > 1e-6 * max(float(values[-1]), 1e-30)
            values, vectors = values[kept].astype(np.float64), vectors[:, kept].astype(np.float64)
            axes = standard.T @ vectors  # principal axes times the roots of the values
        else:
            gram = self._gram(rows, weights, centre, np.float32)
            values, axes = scipy.linalg.eigh(gram.T, overwrite_a=True, driver="evd")
            kept = values > 1e-6 * max(float(values[-1]), 1e-30)
            vectors = None
            axes = axes[:, kept] * np.sqrt(values[kept])
            values = values[kept].astype(np.float64)

        def left(places) -> np.ndarray:
            if vectors is not None:
                return vectors[places]
            found = np.empty((len(places), len(values)))
            for block, x in self.blocks(rows[places]):
                found[block] = ((x - centre) * root[places[block]]) @ axes / values
            return found

        def apply(others) -> np.ndarray:
            found = np.empty((len(others), len(values)))
            for block, x in self.blocks(others):
                found[block] = (x - centre) @ axes
            return found

        return values, left, apply


def _solved(gram: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The solution of a symmetric positive system, which is overwritten; its transpose is as LAPACK wants it."""
    return scipy.linalg.solve(gram.T, targets.astype(gram.dtype), assume_a="pos", overwrite_a=True, overwrite_b=True)


class Prototypes(_ClosedForm):
    """A class is the mean of its images' standardised features; the nearest one wins, by distance or by angle.

    As a Dense layer: `-||x - c||^2 / 2` is `x c - ||c||^2 / 2` up to what all classes share, and the greatest cosine is
    the greatest `x c / ||c||`. The temperature is chosen on held-out scores.

    Args:
        features, labels, num_classes, weights: As `RidgePath` takes them.

    Example:
        >>> x = np.array([[0.0, 1.0], [1.0, 1.0], [0.0, 5.0], [1.0, 5.0]])
        >>> path = Prototypes(x, [0, 0, 1, 1], 2)
        >>> path.head(np.arange(4), distance="euclidean").logits(x).argmax(1).tolist()
        [0, 0, 1, 1]

    Reference:
        Snell, Swersky, Zemel. Prototypical Networks for Few-shot Learning. NeurIPS 2017.
    """

    def choose(self, folds: Folds, distances: Sequence[str] = DISTANCES) -> tuple[dict, np.ndarray]:
        """The distance and the temperature of least held-out log loss; arguments and results as `RidgePath.choose`."""
        scores: dict[str, list[np.ndarray]] = {distance: [] for distance in distances}
        for train, test in folds:
            means = self._means(train)
            for distance in distances:
                kernel, bias = _of_means(means, distance)
                scores[distance].append(np.concatenate([x @ kernel + bias for _, x in self.blocks(test)]))
        joined = {distance: np.concatenate(parts) for distance, parts in scores.items()}
        distance, temperature, loss, table = self.judge(joined, folds)
        return {"distance": distance, "temperature": temperature, "log_loss": loss}, table

    def head(self, rows, *, distance: str, temperature: float = 1.0, log_loss: float = float("nan")) -> LinearHead:
        """The head of the means of some rows, as a Dense layer whose softmax gives the probabilities."""
        kernel, bias = _of_means(self._means(np.asarray(rows)), distance)
        return self.plain(kernel / temperature, bias / temperature, 0.0, log_loss)

    def _means(self, rows) -> np.ndarray:
        """(K, D); a class without rows is at the mean of everything."""
        total, mass = np.zeros((self.num_classes, self.features.shape[1])), np.zeros(self.num_classes)
        for block, x in self.blocks(rows):
            part = rows[block]
            weighted = np.zeros((self.num_classes, len(part)))
            weighted[self.labels[part], np.arange(len(part))] = self.weights[part]
            total += weighted @ x
            mass += weighted.sum(1)
        return total / np.maximum(mass, 1e-30)[:, None]


def _of_means(means, distance: str) -> tuple[np.ndarray, np.ndarray]:
    """Kernel (D, K) and bias (K,) of scores by class means."""
    lengths = np.linalg.norm(means, axis=1)
    if distance == "euclidean":
        return means.T, -(lengths**2) / 2
    return (means / np.maximum(lengths, 1e-30)[:, None]).T, np.zeros(len(means))
