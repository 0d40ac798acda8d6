"""Whether a model that goes on from another one should take its place."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tfxfer.metrics import metric_value, paired_difference
from tfxfer.select.verdict import verdict

MARGIN = 0.01
VERDICTS = ("promote", "keep", "unclear")


def in_classes(probabilities: ArrayLike, names: Sequence[str], wanted: Sequence[str]) -> np.ndarray:
    """What a model says of other classes than its own.

    Classes that it does not know have probability 0; those that are no longer wanted are left out and the rest scaled
    to sum to one, as anybody would mask them.

    Args:
        probabilities: (N, K) float.
        names: K, its own classes.
        wanted: L names.

    Returns:
        (N, L) float64; a row where nothing is left is even over the classes it knows.

    Example:
        >>> in_classes([[0.5, 0.3, 0.2]], ["hat", "shirt", "shoe"], ["shirt", "shoe", "skirt"]).round(3).tolist()
        [[0.6, 0.4, 0.0]]
    """
    theirs = np.asarray(probabilities, np.float64)
    found = np.zeros((len(theirs), len(wanted)))
    known = [column for column, name in enumerate(wanted) if name in names]
    found[:, known] = theirs[:, [list(names).index(wanted[column]) for column in known]]
    total = found.sum(1, keepdims=True)
    found[:, known] = np.where(total > 0, found[:, known] / np.where(total > 0, total, 1.0), 1 / max(len(known), 1))
    return found


def judge_promotion(
    new: ArrayLike,
    old: ArrayLike,
    labels: ArrayLike,
    *,
    known: ArrayLike,
    class_names: Sequence[str],
    groups: Sequence[Hashable] | None = None,
    weights: ArrayLike | None = None,
    metric: str = "accuracy",
    margin: float = MARGIN,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare two models on the same test images: over all of them, and over those of classes that both know.

    Over all images the old model cannot be right where a class is new. Over those of known classes the new one is
    taken as it will be used: calling an old class by a new name is an error.

    Args:
        new: (N, K) probabilities.
        old: (N, K), see `in_classes`.
        labels: (N,) int.
        known: (K,) bool, the classes that both know.
        class_names: K names.
        groups: N names: images that are not independent share one. Default: each image its own.
        weights: (N,) float, at least 0; default all 1.
        metric: One of `tfxfer.specs.METRICS`. Where there are new classes, "macro_f1" compares the known ones by
            balanced accuracy: a class that is never right and answered once would count as a whole class.
        margin: Largest difference that does not matter; default 0.01.
        seed: Of the bootstrap.

    Returns:
        verdict ("keep" where the new model is surely worse over all images or no difference matters; "promote" where
        it is surely better and the known classes as a whole do not surely lose; otherwise "unclear"), reason, `all`
        and `known` (num_images, metric, new, old, difference, low, high, standard_error, margin, verdict),
        `per_class` of the known classes (name, images, old and new recall, difference, low, high), and `losses`,
        those of them whose recall fell, the largest fall first, with `sure`: whether the interval excludes 0.

    Example:
        >>> labels = np.arange(300) % 3
        >>> old = np.eye(3)[np.where(labels == 2, 0, labels)]  # knows two classes of three
        >>> found = judge_promotion(np.eye(3)[labels], old, labels, known=[1, 1, 0], class_names=["a", "b", "c"])
        >>> found["verdict"], found["known"]["verdict"], round(found["all"]["difference"], 3)
        ('promote', 'inconclusive', 0.333)
    """
    new, old, labels = np.asarray(new), np.asarray(old), np.asarray(labels)
    known = np.asarray(known, bool)

    def compared(rows: np.ndarray, name: str) -> dict[str, Any]:
        of_rows = None if weights is None else np.asarray(weights)[rows]
        named = None if groups is None else [groups[row] for row in rows]
        found = verdict(
            new[rows], old[rows], labels[rows], groups=named, weights=of_rows, metric=name, margin=margin, seed=seed
        )
        scores = {
            key: metric_value(name, labels[rows], table[rows], weights=of_rows)
            for key, table in (("new", new), ("old", old))
        }
        return {"num_images": len(rows), **found, **scores}

    rows = np.flatnonzero(known[labels])
    over_all = compared(np.arange(len(labels)), metric)
    on_known = over_all if known.all() else compared(rows, "balanced_accuracy" if metric == "macro_f1" else metric)
    per_class = [
        {"name": str(class_names[k]), **_recalls(new, old, labels, k, groups, weights, seed)}
        for k in np.flatnonzero(known).tolist()
    ]
    word, reason = _promotion(over_all["verdict"], on_known["verdict"], bool(known.all()))
    fell = sorted((row for row in per_class if row["difference"] < 0), key=lambda row: row["difference"])
    return {
        "verdict": word,
        "reason": reason,
        "all": over_all,
        "known": on_known,
        "per_class": per_class,
        "losses": [{**row, "sure": row["high"] < 0} for row in fell],
    }


def _promotion(over_all: str, on_known: str, nothing_new: bool) -> tuple[str, str]:
    if over_all == "negative":
        return "keep", "the new model is surely worse over all test images"
    if over_all == "equivalent":
        return "keep", "no difference that matters over all test images"
    if over_all == "inconclusive":
        return "unclear", "which one is better over all test images cannot be told from so few"
    if on_known == "negative":
        return "unclear", "surely better over all test images, surely worse on the classes that both know"
    if nothing_new:
        return "promote", "surely better on the test images"
    return "promote", "surely better over all test images, and not surely worse on the classes that both know"


def _recalls(new, old, labels, k: int, groups, weights, seed: int) -> dict[str, Any]:
    rows = np.flatnonzero(labels == k)
    of_rows = None if weights is None else np.asarray(weights)[rows]
    if not len(rows) or (of_rows is not None and not of_rows.any()):
        return {"images": len(rows), "old": 0.0, "new": 0.0, "difference": 0.0, "low": 0.0, "high": 0.0}
    found = paired_difference(
        new[rows], old[rows], labels[rows],
        groups=None if groups is None else [groups[row] for row in rows], weights=of_rows, seed=seed,
    )  # fmt: skip
    before, now = (metric_value("accuracy", labels[rows], table[rows], weights=of_rows) for table in (old, new))
    return {
        "images": len(rows),
        "old": before,
        "new": now,
        **{key: found[key] for key in ("difference", "low", "high")},
    }
