"""Scores that say, without fine-tuning, how well a source suits a target. Pure functions; no TensorFlow.

Adding one is a file here and its line below. A score is `f(labels, *, features, probabilities, groups) -> float`, of
which it takes what it needs; higher is better. Scores compare sources on the same labelled images only.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from numpy.typing import ArrayLike


def _h_score(labels: ArrayLike, *, features: ArrayLike, **_: Any) -> float:
    from tfxfer.select.scores.hscore import h_score

    return h_score(features, labels)


def _knn(labels: ArrayLike, *, features: ArrayLike, groups: Sequence[Hashable] | None = None, **_: Any) -> float:
    from tfxfer.select.scores.knn import knn_score

    return knn_score(features, labels, groups=groups)


def _leep(labels: ArrayLike, *, probabilities: ArrayLike, **_: Any) -> float:
    from tfxfer.select.scores.leep import leep_score

    return leep_score(probabilities, labels)


def _logme(labels: ArrayLike, *, features: ArrayLike, **_: Any) -> float:
    from tfxfer.select.scores.logme import logme_score

    return logme_score(features, labels)


SCORES: dict[str, Callable[..., float]] = {
    "h_score": _h_score,
    "knn": _knn,
    "leep": _leep,  # of the source's old output, which not every source has
    "logme": _logme,
}
