"""A logistic head on several blocks at once: all features of the last one, and the most relevant of the others."""

import numpy as np

from tfxfer.features.closed_form import Folds, RidgePath
from tfxfer.features.rows import Picked
from tfxfer.features.solvers import STRENGTHS, LinearHead, LogisticPath, choose_strength, weighted_log_loss
from tfxfer.features.standardise import Standardised

# Of the features before the last block. With all of them few images are fitted by chance; with this share held-out log
# loss was least on three data sets (see tests/benchmarks/RESULTS.md).
SHARE = 0.3
# Of the ridge regression that tells how relevant a feature is, as a share of the features' summed variance.
RELEVANCE_STRENGTH = 0.003


class MultiBlock(Standardised):
    """Logistic regressions on the last block's features and the share of the others with the largest weights.

    How relevant a feature is, is the length of its row in the kernel of a ridge regression on all of them: what a group
    lasso over rows would keep. It is found anew on the training rows of each fold, so that held-out images have no
    part in it.

    Args:
        features: (N, D) float, the last block's features last; perhaps on disk.
        labels, num_classes, weights: As `LogisticPath` takes them.
        num_last: Features of the last block.
        near: The best strength for the last block alone; those about it are tried, all by default.

    Reference:
        Evci, Dumoulin, Larochelle, Mozer. Head2Toe: Utilizing Intermediate Representations for Better Transfer
        Learning. ICML 2022.
    """

    def __init__(self, features, labels, num_classes: int, weights=None, *, num_last: int, near: float | None = None):
        super().__init__(features, labels, num_classes, weights)
        self.num_last = num_last
        place = STRENGTHS.index(near) if near is not None else None
        # With more features the best strength is the same or greater; weak ones take long.
        self.strengths = STRENGTHS if place is None else STRENGTHS[max(place - 2, 0) : place + 2]
        self._ridge = RidgePath(features, labels, num_classes, weights)

    def columns(self, rows) -> np.ndarray:
        """The features used where these rows are trained on, in order."""
        width = self.features.shape[1]
        others = width - self.num_last
        relevance = self._ridge.relevance(rows, RELEVANCE_STRENGTH * width)[:others]
        best = np.argsort(-relevance, kind="stable")[: round(SHARE * others)]
        return np.concatenate([np.sort(best), np.arange(others, width)])

    def choose(self, folds: Folds) -> tuple[dict, np.ndarray]:
        """`strength` and `log_loss` of least held-out log loss; and (N, K) held-out log probabilities."""
        paths = [self._path(self.columns(train)) for train, _ in folds]
        strength, scores = choose_strength(paths, folds, self.strengths)
        tested = np.concatenate([test for _, test in folds])
        loss = weighted_log_loss(scores[tested], self.labels[tested], self.weights[tested])
        return {"strength": strength, "log_loss": loss}, scores

    def head(self, rows, *, strength: float, log_loss: float = float("nan")) -> LinearHead:
        """The head trained on some rows, as a Dense layer on all features: rows of unused ones are zero."""
        columns = self.columns(rows)
        path = self._path(columns)
        found = path.to_head(path.optimum(strength, rows=rows), strength, log_loss)
        kernel = np.zeros((self.features.shape[1], self.num_classes), np.float32)
        kernel[columns] = found.kernel
        return LinearHead(kernel, found.bias, strength, log_loss)

    def _path(self, columns: np.ndarray) -> LogisticPath:
        return LogisticPath(Picked(self.features, columns=columns), self.labels, self.num_classes, self.weights)
