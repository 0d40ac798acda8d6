"""Scores of a classifier with bootstrap intervals, and the paired difference of two classifiers. No TensorFlow."""

from collections.abc import Hashable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tfxfer.errors import InputError
from tfxfer.registry import lookup
from tfxfer.specs import METRICS
from tfxfer.tally import (
    CALIBRATION_BINS,
    Tally,
    calibration_gaps,
    checked,
    checked_weights,
    draw_counts,
    group_numbers,
    image_losses,
)

SCORES = (*METRICS, "log_loss", "calibration_error")
_FEW_GROUPS = 5  # below, intervals cover less than they say, by simulation 0.87 to 0.91 for 0.95


class SplitMismatchWarning(UserWarning):
    """The intervals on the validation and the test part do not overlap: the two differ in kind, or one leaks."""


def log_loss(labels: ArrayLike, probabilities: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean negative log of the probability given to the right class; lower is better.

    Args:
        labels: (N,) int, in 0..K-1.
        probabilities: (N, K) float, rows sum to 1; values below 1.2e-7 count as that.
        weights: (N,) float, at least 0; default all 1.

    Returns:
        The loss in nats, from 0 to 15.95.

    Raises:
        InputError: Where shapes or ranges do not fit.

    Example:
        >>> round(log_loss([0, 1], [[0.5, 0.5], [0.25, 0.75]]), 4)
        0.4904
    """
    losses = per_image_log_loss(labels, probabilities)
    return float(np.average(losses, weights=checked_weights(weights, len(losses))))


def per_image_log_loss(labels: ArrayLike, probabilities: ArrayLike) -> np.ndarray:
    """Negative log of the probability given to the right class, for each image.

    Args:
        labels: (N,) int, in 0..K-1.
        probabilities: (N, K) float, rows sum to 1; values below 1.2e-7 count as that.

    Returns:
        (N,) float64, in nats.

    Raises:
        InputError: Where shapes or ranges do not fit.
    """
    return image_losses(*checked(labels, probabilities))


def calibration_error(
    labels: ArrayLike, probabilities: ArrayLike, bins: int = CALIBRATION_BINS, weights: ArrayLike | None = None
) -> float:
    """Expected calibration error: mean gap of confidence and accuracy over bins of equal width in confidence.

    Args:
        labels: (N,) int, in 0..K-1.
        probabilities: (N, K) float, rows sum to 1.
        bins: How many, at least 1; default 15.
        weights: (N,) float, at least 0; default all 1.

    Returns:
        The error, in 0..1; lower is better. It is biased upwards on few images.

    Raises:
        InputError: Where shapes or ranges do not fit.

    Example:
        >>> round(calibration_error([0, 1], [[0.9, 0.1], [0.8, 0.2]], bins=10), 2)
        0.45

    Reference:
        Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, ICML 2017.
    """
    if bins < 1:
        raise InputError(f"bins must be at least 1, not {bins}.")
    truth, table = checked(labels, probabilities)
    share = checked_weights(weights, len(truth))
    bin_of_image, gaps = calibration_gaps(truth, table, bins)
    return float(np.abs(np.bincount(bin_of_image, weights=share * gaps)).sum() / share.sum())


def metric_value(
    name: str,
    labels: ArrayLike,
    probabilities: ArrayLike | None = None,
    predictions: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> float:
    """One metric of `tfxfer.specs.METRICS`, as scikit-learn defines it.

    Args:
        name: "accuracy", "macro_f1" (over the classes that occur or are predicted) or "balanced_accuracy".
        labels: (N,) int, from 0.
        probabilities: (N, K) float, of which the largest counts. Or give
        predictions: (N,) int.
        weights: (N,) float, at least 0; default all 1.

    Returns:
        The value, in 0..1; higher is better.

    Raises:
        InputError: Where the name is unknown, shapes do not fit, or not exactly one of the two is given.

    Example:
        >>> metric_value("balanced_accuracy", [0, 0, 0, 1], predictions=[0, 0, 0, 0])
        0.5
    """
    lookup(dict.fromkeys(METRICS), name, "metric")
    if (probabilities is None) == (predictions is None):
        raise InputError("metric_value takes either probabilities or predictions.")
    if probabilities is None:
        truth, chosen = np.asarray(labels), np.asarray(predictions)
        for name_of, numbers in (("labels", truth), ("predictions", chosen)):
            if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or not numbers.size or numbers.min() < 0:
                raise InputError(f"{name_of} must be class numbers from 0, (N,), not {numbers.dtype} {numbers.shape}.")
        probabilities = np.eye(int(max(truth.max(), chosen.max())) + 1)[chosen]
    return float(Tally(*checked(labels, probabilities), weights=weights).scores()[name][0])


def wilson_interval(share: float, num: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share.

    Args:
        share: As observed, in 0..1.
        num: Observations behind it, above 0; need not be whole.
        confidence: In (0, 1); default 0.95.

    Returns:
        Low and high end.

    Example:
        >>> [round(end, 4) for end in wilson_interval(1.0, 20)]
        [0.8389, 1.0]

    Reference:
        Wilson: Probable Inference, the Law of Succession, and Statistical Inference, JASA 1927.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * np.sqrt(share * (1 - share) / num + (z / (2 * num)) ** 2)
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def score(
    labels: ArrayLike,
    probabilities: ArrayLike,
    class_names: Sequence[str],
    *,
    groups: Sequence[Hashable] | None = None,
    weights: ArrayLike | None = None,
    draws: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Everything that a run reports about one part of the data, with bootstrap intervals.

    Groups are drawn with replacement within each class; a group of several classes goes with its commonest. Where
    every image is right, or every one is wrong, all draws are alike, and Wilson's interval stands in. The interval
    of the calibration error is mirrored at the value, since each draw repeats its upward bias.

    Args:
        labels: (N,) int, in 0..K-1.
        probabilities: (N, K) float, rows sum to 1.
        class_names: K names.
        groups: N names: images that are not independent share one. Default: each image its own.
        weights: (N,) float, at least 0; they count in every score, not in `support` and the confusion matrix.
        draws: Bootstrap draws, at least 100; default 2000.
        seed: Of the draws; default 0.
        confidence: Of the intervals, in (0, 1); default 0.95.

    Returns:
        What JSON can hold: num_images, num_groups; accuracy, macro_f1, balanced_accuracy, log_loss,
        calibration_error, each {value, low, high}; per_class [{name, precision, recall, f1, support}];
        confusion_matrix (rows are the right classes); interval and covers, two captions.

    Raises:
        InputError: Where shapes or ranges do not fit.

    Example:
        >>> scores = score([0, 0, 1, 1], [[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.1, 0.9]], ["cat", "dog"])
        >>> scores["accuracy"]["value"], scores["confusion_matrix"]
        (0.75, [[2, 0], [1, 1]])

    Reference:
        Efron, Tibshirani: An Introduction to the Bootstrap, Chapman & Hall 1993.
    """
    truth, table = checked(labels, probabilities)
    size = table.shape[1]
    if len(class_names) != size:
        raise InputError(f"{len(class_names)} class names were given for probabilities of {size} classes.")
    tally = Tally(truth, table, group_numbers(groups, len(truth)), weights)
    drawn = [tally.scores(block) for block in draw_counts(tally.stratum_of_group, draws, np.random.default_rng(seed))]
    values = tally.scores()
    unit = "image" if tally.num_groups == len(truth) else "group"
    wilson = "; Wilson's for shares of 0 and 100 %" if tally.all_or_none else ""
    return {
        "num_images": len(truth),
        "num_groups": tally.num_groups,
        **{
            name: _with_ends(tally, name, float(values[name][0]), np.concatenate([d[name] for d in drawn]), confidence)
            for name in SCORES
        },
        "per_class": tally.per_class(class_names),
        "confusion_matrix": np.bincount(truth * size + table.argmax(1), minlength=size**2).reshape(size, -1).tolist(),
        "interval": f"{100 * confidence:g} % bootstrap, {draws} draws, by {unit}, stratified by class{wilson}",
        "covers": _caption(tally, class_names, unit),
    }


def paired_difference(
    probabilities_a: ArrayLike,
    probabilities_b: ArrayLike,
    labels: ArrayLike,
    *,
    metric: str = "accuracy",
    groups: Sequence[Hashable] | None = None,
    weights: ArrayLike | None = None,
    draws: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, float]:
    """How much higher a scores than b on the same images, by a bootstrap that draws the same groups for both.

    Where the two are right on the same images, all draws are alike; then as much difference is allowed for as
    Wilson's interval leaves to a share of 0.

    Args:
        probabilities_a: (N, K) float, or (S, N, K) for S trainings with different seeds, which are then drawn too.
        probabilities_b: Likewise; the number of seeds may be another.
        labels: (N,) int, in 0..K-1.
        metric: One of `SCORES`; default "accuracy". For log_loss and calibration_error less is better.
        groups, weights, draws, seed, confidence: As in `score`.

    Returns:
        difference (a minus b), low, high, standard_error.

    Raises:
        InputError: Where the metric is unknown or shapes do not fit.

    Example:
        >>> a, b = [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]
        >>> paired_difference(a, b, [0, 1])["difference"]
        0.5
    """
    lookup(dict.fromkeys(SCORES), metric, "metric")
    sides = [_stacked(probabilities_a), _stacked(probabilities_b)]
    if sides[0].shape[1:] != sides[1].shape[1:]:
        raise InputError(f"The two models gave shapes {sides[0].shape[1:]} and {sides[1].shape[1:]}; they must agree.")
    group_of_image = group_numbers(groups, sides[0].shape[1])
    tallies = [[Tally(*checked(labels, one), group_of_image, weights) for one in side] for side in sides]
    first = tallies[0][0]
    rng = np.random.default_rng(seed)
    blocks = [
        [np.stack([tally.scores(counts)[metric] for tally in side]) for side in tallies]
        for counts in draw_counts(first.stratum_of_group, draws, rng)
    ]
    drawn_a, drawn_b = (_seed_mean(np.concatenate(side, axis=1), rng) for side in zip(*blocks, strict=True))
    value_a, value_b = (float(np.mean([tally.scores()[metric][0] for tally in side])) for side in tallies)
    difference, drawn = value_a - value_b, drawn_a - drawn_b
    low, high = _percentiles(drawn, confidence)
    if metric in METRICS and np.ptp(drawn) < 1e-12:
        unseen = wilson_interval(0.0, first.effective_groups(metric), confidence)[1]
        low, high = max(-1.0, difference - unseen), min(1.0, difference + unseen)
    return {
        "difference": difference,
        "low": min(low, difference),
        "high": max(high, difference),
        "standard_error": float(drawn.std(ddof=1)),
    }


def intervals_overlap(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    """Whether two intervals, mappings with `low` and `high`, share a point.

    Example:
        >>> intervals_overlap({"low": 0.1, "high": 0.4}, {"low": 0.4, "high": 0.9})
        True
    """
    return max(a["low"], b["low"]) <= min(a["high"], b["high"])


def split_warning(validation_scores: Mapping[str, Any], test_scores: Mapping[str, Any], metric: str) -> str | None:
    """The text for a `SplitMismatchWarning`, or None where the intervals on validation and test overlap.

    Args:
        validation_scores: What `score` gave for the validation part.
        test_scores: What `score` gave for the test part.
        metric: One of `SCORES`.

    Returns:
        Two sentences, or None.
    """
    lookup(dict.fromkeys(SCORES), metric, "metric")
    validation, test = validation_scores[metric], test_scores[metric]
    if intervals_overlap(validation, test):
        return None
    told = " and ".join(
        f"{part['value']:.3f} ({part['low']:.3f} to {part['high']:.3f}) on the {name} part"
        for name, part in (("validation", validation), ("test", test))
    )
    return (
        f"Validation and test disagree: {metric} is {told}, and the intervals do not overlap. The two parts differ in "
        "kind, or copies of one thing lie on both sides of the validation split (--group-by keeps them together)."
    )


def _with_ends(tally: Tally, name: str, value: float, drawn: np.ndarray, confidence: float) -> dict[str, float]:
    low, high = _percentiles(drawn, confidence)
    if name in METRICS and tally.all_or_none:
        low, high = wilson_interval(round(value), tally.effective_groups(name), confidence)
    elif name == "calibration_error":
        low, high = max(0.0, 2 * value - high), min(1.0, 2 * value - low)
    return {"value": value, "low": min(low, value), "high": max(high, value)}


def _percentiles(drawn: np.ndarray, confidence: float) -> tuple[float, float]:
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, not {confidence}.")
    low, high = np.quantile(drawn, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def _stacked(probabilities: ArrayLike) -> np.ndarray:
    """(S, N, K) of (N, K) or (S, N, K)."""
    table = np.asarray(probabilities, np.float64)
    if table.ndim not in (2, 3) or not table.size:
        raise InputError(f"Probabilities must be (N, K), or (seeds, N, K), not {table.shape}.")
    return table[None] if table.ndim == 2 else table


def _seed_mean(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mean over seeds of (S, D) values; for each draw S - 1 seeds are drawn, for the reason in `draw_counts`."""
    num_seeds, draws = values.shape
    chosen = rng.integers(num_seeds, size=(max(1, num_seeds - 1), draws))
    return values[chosen, np.arange(draws)].mean(0)


def _caption(tally: Tally, class_names: Sequence[str], unit: str) -> str:
    text = "This trained model over new images like these; not retraining, and not images of another kind."
    groups_of_class = np.bincount(tally.stratum_of_group, minlength=tally.num_classes)
    few = [f"{name} ({num})" for name, num in zip(class_names, groups_of_class, strict=True) if 0 < num < _FEW_GROUPS]
    if few:
        text += f" Few {unit}s stand behind {', '.join(few)}: the intervals are too narrow there."
    return text
