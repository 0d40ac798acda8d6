"""Whether one model beats another on the same images: a word that follows from an interval and a margin."""

from collections.abc import Hashable, Sequence
from typing import Any

from numpy.typing import ArrayLike

from tfxfer.errors import InputError
from tfxfer.metrics import paired_difference
from tfxfer.registry import lookup
from tfxfer.specs import METRICS

VERDICTS = ("positive", "equivalent", "inconclusive", "negative")


def judge(low: float, high: float, margin: float = 0.01) -> str:
    """The verdict on an interval of (model minus baseline).

    Equivalence is asked first: with many images a difference of a third of a point is certain and still not worth a
    pretrained model, nor a failed run where it points the other way.

    Args:
        low, high: Ends of the interval.
        margin: Largest difference that does not matter, at least 0; default 0.01.

    Returns:
        "equivalent" where the interval lies within the margin on both sides; otherwise "positive" where it lies above
        0, "negative" where it lies below 0, and "inconclusive" where it holds 0.

    Raises:
        InputError: Where the margin is negative or the ends are in the wrong order.

    Example:
        >>> [judge(*ends) for ends in ((0.02, 0.3), (0.001, 0.008), (-0.02, 0.03), (-0.3, -0.004))]
        ['positive', 'equivalent', 'inconclusive', 'negative']

    Reference:
        Schuirmann: A comparison of the two one-sided tests procedure and the power approach for assessing the
        equivalence of average bioavailability, J. Pharmacokinet. Biopharm. 1987.
    """
    if not margin >= 0:
        raise InputError(f"The margin must be at least 0, not {margin}.")
    if not low <= high:
        raise InputError(f"The interval must run from low to high, not from {low} to {high}.")
    if -margin <= low and high <= margin:
        return "equivalent"
    if low > 0:
        return "positive"
    if high < 0:
        return "negative"
    return "inconclusive"


def verdict(
    probabilities_model: ArrayLike,
    probabilities_baseline: ArrayLike,
    labels: ArrayLike,
    *,
    groups: Sequence[Hashable] | None = None,
    weights: ArrayLike | None = None,
    metric: str = "accuracy",
    margin: float = 0.01,
    draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare a model with a baseline on the same test images, by a paired 95 % bootstrap interval and a margin.

    Args:
        probabilities_model: (N, K) float, or (S, N, K) for S trainings with different seeds, which are drawn too.
        probabilities_baseline: Likewise; the number of seeds may be another.
        labels: (N,) int, in 0..K-1.
        groups: N names: images that are not independent share one. Default: each image its own.
        weights: (N,) float, at least 0; default all 1.
        metric: One of `tfxfer.specs.METRICS`; default "accuracy".
        margin: Largest difference that does not matter, at least 0; default 0.01.
        draws: Bootstrap draws, at least 100; default 2000.
        seed: Of the draws; default 0.

    Returns:
        verdict (see `judge`), metric, difference (model minus baseline), low, high, standard_error, margin.

    Raises:
        InputError: Where the metric is unknown, the margin negative, or shapes do not fit.

    Example:
        >>> import numpy as np
        >>> labels = np.arange(200) % 2
        >>> right, wrong = np.eye(2)[labels], np.eye(2)[1 - labels]
        >>> verdict(right, wrong, labels)["verdict"], verdict(wrong, right, labels)["verdict"]
        ('positive', 'negative')
    """
    lookup(dict.fromkeys(METRICS), metric, "metric")
    found = paired_difference(
        probabilities_model,
        probabilities_baseline,
        labels,
        metric=metric,
        groups=groups,
        weights=weights,
        draws=draws,
        seed=seed,
    )
    return {"verdict": judge(found["low"], found["high"], margin), "metric": metric, **found, "margin": margin}
