"""Sums over groups of images from which every score follows, and the bootstrap's draws of the groups.

A score is a function of sums over images: hits, support and predictions of each class, log loss, calibration gaps.
The sums are kept for each group once; a draw is a weighting of the groups, and all draws are one sparse product.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse

from tfxfer.errors import InputError

CALIBRATION_BINS = 15
MIN_PROBABILITY = float(np.finfo(np.float32).eps)  # a float32 softmax saturates at 0; its log must stay finite
_BLOCK_SIZE = 2_000_000  # numbers held at once for the draws: 16 MB, and two arrays more of their size
_SUM_TOLERANCE = 0.01  # of the rows of probabilities; float16 outputs are that far off


class Tally:
    """What one model did on one part of the data, summed for each group.

    Args:
        labels: (N,) int64, as `checked` returns it.
        probabilities: (N, K) float64, likewise.
        group_of_image: (N,) int, from 0 without a gap; default: each image its own.
        weights: (N,) float, at least 0; default all 1.

    Attributes:
        num_groups: G, how many groups there are.
        num_classes: K.
        support: (K,) int, images of each class.
        stratum_of_group: (G,) int, the class of each group; of several, the commonest.
        all_or_none: Whether every image is right, or every one is wrong.
        sums: (3 K + 1 + bins, G) sparse.
    """

    def __init__(
        self,
        labels: np.ndarray,
        probabilities: np.ndarray,
        group_of_image: np.ndarray | None = None,
        weights: ArrayLike | None = None,
    ) -> None:
        num_images, size = probabilities.shape
        if group_of_image is None:
            group_of_image = np.arange(num_images)
        weights = checked_weights(weights, num_images)
        predictions = probabilities.argmax(1)
        right = predictions == labels
        self.num_classes, self.num_groups = size, int(group_of_image.max()) + 1
        self.support = np.bincount(labels, minlength=size)
        self.all_or_none = bool(right.all() or not right.any())
        images = sparse.coo_array((np.ones(num_images), (group_of_image, labels)), shape=(self.num_groups, size))
        self.stratum_of_group = images.tocsr().argmax(axis=1).ravel()
        bin_of_image, gaps = calibration_gaps(labels, probabilities, CALIBRATION_BINS)
        rows_and_terms = (
            (labels, right),
            (size + labels, np.ones(num_images)),
            (2 * size + predictions, np.ones(num_images)),
            (np.full(num_images, 3 * size), image_losses(labels, probabilities)),
            (3 * size + 1 + bin_of_image, gaps),
        )
        rows = np.concatenate([row for row, _ in rows_and_terms])
        terms = np.concatenate([weights * term for _, term in rows_and_terms])
        columns = np.tile(group_of_image, len(rows_and_terms))
        self.sums = sparse.csr_array((terms, (rows, columns)), shape=(3 * size + 1 + CALIBRATION_BINS, self.num_groups))

    def scores(self, counts: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Every score for D weightings of the groups, `counts` (G, D); default: one weighting, each group once."""
        hits, support, predicted, losses, gaps = self._totals(counts)
        total = support.sum(0)
        return {
            "accuracy": _ratio(hits.sum(0), total),
            "macro_f1": _mean_ratio(2 * hits, support + predicted),
            "balanced_accuracy": _mean_ratio(hits, support),
            "log_loss": _ratio(losses, total),
            "calibration_error": _ratio(np.abs(gaps).sum(0), total),
        }

    def per_class(self, class_names: Sequence[str]) -> list[dict[str, Any]]:
        """Precision, recall and F1 of each class, 0 where undefined, and its number of images."""
        hits, support, predicted = (rows[:, 0] for rows in self._totals(None)[:3])
        precision, recall = _ratio(hits, predicted).tolist(), _ratio(hits, support).tolist()
        f1 = _ratio(2 * hits, support + predicted).tolist()
        return [
            {
                "name": str(name),
                "precision": precision[k],
                "recall": recall[k],
                "f1": f1[k],
                "support": int(self.support[k]),
            }
            for k, name in enumerate(class_names)
        ]

    def effective_groups(self, metric: str) -> float:
        """How many groups of equal share would leave `metric` as uncertain: 1 over the sum of squared shares (Kish).

        In the accuracy a group has the share of its weight, in the others that share within its class, over K.
        """
        support = self.sums[self.num_classes : 2 * self.num_classes]
        per_class = np.asarray(support.sum(axis=1)).ravel()
        class_share = per_class / per_class.sum() if metric == "accuracy" else (per_class > 0) / (per_class > 0).sum()
        group_share = _ratio(class_share, per_class) @ support
        return float(1 / (group_share**2).sum())

    def _totals(self, counts: np.ndarray | None) -> tuple[np.ndarray, ...]:
        totals = self.sums @ (np.ones((self.num_groups, 1)) if counts is None else counts)
        hits, support, predicted = np.split(totals[: 3 * self.num_classes], 3)
        return hits, support, predicted, totals[3 * self.num_classes], totals[3 * self.num_classes + 1 :]


def draw_counts(stratum_of_group: np.ndarray, draws: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """How much each group counts in each draw: blocks (G, D) that together hold all draws.

    Of a stratum's n groups, n - 1 are drawn with replacement, each counting n / (n - 1): the sum stays n and the
    variance is the unbiased one, which plain draws of n miss by a factor (n - 1) / n. A group alone always counts 1.

    Raises:
        InputError: Where there are fewer than 100 draws.

    Reference:
        Rao, Wu: Resampling Inference with Complex Survey Data, JASA 1988.
    """
    if draws < 100:
        raise InputError(f"draws must be at least 100, not {draws}.")
    order = np.argsort(stratum_of_group, kind="stable")
    strata = np.split(order, np.flatnonzero(np.diff(stratum_of_group[order])) + 1)
    num_groups = len(stratum_of_group)
    block = max(1, _BLOCK_SIZE // num_groups)
    for start in range(0, draws, block):
        num = min(block, draws - start)
        counts = np.ones((num_groups, num))
        for members in strata:
            size = len(members)
            if size > 1:
                drawn = rng.integers(size, size=(num, size - 1)) + size * np.arange(num)[:, None]
                tallied = np.bincount(drawn.ravel(), minlength=num * size).reshape(num, size)
                counts[members] = tallied.T * (size / (size - 1))
        yield counts


def group_numbers(groups: Sequence[Hashable] | None, num_images: int) -> np.ndarray | None:
    """Groups as numbers from 0 in the order they come in; None stays None.

    Raises:
        InputError: Where there is not one for each image.
    """
    if groups is None:
        return None
    if len(groups) != num_images:
        raise InputError(f"{len(groups)} groups were given for {num_images} images.")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups])


def image_losses(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """(N,) negative log of the probability of the right class, of what `checked` returned."""
    return -np.log(np.clip(probabilities[np.arange(len(labels)), labels], MIN_PROBABILITY, 1.0))


def calibration_gaps(labels: np.ndarray, probabilities: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """(N,) bin of each image by its confidence, (low, high], and (N,) confidence minus correctness."""
    confidence = probabilities.max(1)
    bin_of_image = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return bin_of_image, confidence - (probabilities.argmax(1) == labels)


def checked(labels: ArrayLike, probabilities: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Labels as (N,) int64 and probabilities as (N, K) float64.

    Raises:
        InputError: Where a shape, a type or a range does not fit.
    """
    truth, table = np.asarray(labels), np.asarray(probabilities, np.float64)
    if truth.ndim != 1 or table.ndim != 2 or len(truth) != len(table) or not len(truth):
        raise InputError(f"labels (N,) and probabilities (N, K) are needed, not {truth.shape} and {table.shape}.")
    if truth.dtype.kind not in "iub":
        raise InputError(f"labels must be whole numbers, not {truth.dtype}.")
    if truth.min() < 0 or truth.max() >= table.shape[1]:
        raise InputError(f"labels must lie in 0..{table.shape[1] - 1}; they span {truth.min()}..{truth.max()}.")
    if not np.isfinite(table).all():
        raise InputError("The probabilities hold a value that is not finite.")
    if table.min() < 0 or np.abs(table.sum(1) - 1).max() > _SUM_TOLERANCE:
        raise InputError("The probabilities must be at least 0 and sum to 1 in each row; were logits passed?")
    return truth.astype(np.int64), table


def checked_weights(weights: ArrayLike | None, num_images: int) -> np.ndarray:
    """Weights as (N,) float64, default all 1.

    Raises:
        InputError: Where they are not N finite numbers of at least 0, one of them above 0.
    """
    if weights is None:
        return np.ones(num_images)
    given = np.asarray(weights, np.float64)
    if given.shape != (num_images,) or not np.isfinite(given).all() or given.min() < 0 or given.sum() <= 0:
        raise InputError(f"weights must be {num_images} finite numbers of at least 0, and not all 0.")
    return given


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """over / under, 0 where the denominator is 0."""
    return np.divide(over, under, out=np.zeros(np.shape(under)), where=under > 0)


def _mean_ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """Mean over the rows whose denominator is not 0."""
    return _ratio(_ratio(over, under).sum(0), (under > 0).sum(0))
