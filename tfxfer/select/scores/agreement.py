"""How well a score orders sources, against what fine-tuning them really gave."""

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike

from tfxfer.errors import InputError


def rank_agreement(scores: ArrayLike, accuracies: ArrayLike) -> float:
    """Kendall's tau of two orders, in which pairs among the best count most.

    A pair of sources weighs 1 / rank of the one plus 1 / rank of the other. Ranks are taken once by score and once by
    accuracy, the greatest first, and both results averaged.

    Args:
        scores: (M,) float, of M sources, at least 2; higher is better.
        accuracies: (M,) float, of the same sources after fine-tuning; higher is better.

    Returns:
        From -1, the opposite order, to 1, the same. `(tau + 1) / 2` is the weighted share of pairs in the right order.

    Raises:
        InputError: Where there are not two numbers or more in each, one is not finite, or one side is all the same.

    Example:
        >>> [round(rank_agreement([0.1, 0.5, 0.9], found), 6) for found in ([70, 80, 90], [90, 80, 70])]
        [1.0, -1.0]

    Reference:
        Vigna. A Weighted Correlation Index for Rankings with Ties. WWW 2015. For sources as in You et al., ICML 2021.
    """
    ours, theirs = np.asarray(scores, np.float64), np.asarray(accuracies, np.float64)
    if ours.ndim != 1 or ours.shape != theirs.shape or len(ours) < 2:
        raise InputError(
            f"A score and an accuracy are needed for each of two sources or more, not {ours.shape} and {theirs.shape}."
        )
    for values, name in ((ours, "score"), (theirs, "accuracy")):
        if not np.isfinite(values).all():
            raise InputError(f"The {name} of source {int(np.isfinite(values).argmin())} is not finite; leave it out.")
        if (values == values[0]).all():
            raise InputError(f"Every source has the {name} {values[0]:g}, which orders nothing; compare other sources.")
    return float(scipy.stats.weightedtau(ours, theirs).statistic)
