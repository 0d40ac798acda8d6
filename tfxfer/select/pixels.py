"""Baselines that see small raw pixels and nothing else: what a pretrained model must beat to be worth having."""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import eigh
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from threadpoolctl import threadpool_limits

from tfxfer.errors import InputError
from tfxfer.features.solvers import best_temperature
from tfxfer.tally import checked_weights, group_numbers

PIXEL_SIZE_PX = 16  # 24 and 32 gave the same accuracies to a point on photos and digits, for 2 to 4 times the numbers
NUM_COMPONENTS = 100
NUM_FOLDS = 3
MAX_TUNING_IMAGES = 2000
MAX_SVC_IMAGES = 5000  # its time grows with the square

_LOGISTIC_STRENGTHS = (0.01, 0.1, 1.0, 10.0)
_SVC_STRENGTHS = (1.0, 3.0, 10.0, 30.0)


def pixel_baselines(
    train_pixels: np.ndarray,
    train_labels: ArrayLike,
    test_pixels: np.ndarray,
    *,
    num_classes: int,
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
    sample_weight: ArrayLike | None = None,
    classifiers: bool = True,
) -> dict[str, np.ndarray]:
    """Train the quick baselines on raw pixels and give their probabilities for the test images.

    Pixels go through a principal component analysis to at most 100 numbers. The strength of each classifier and the
    temperature of its outputs are those of the least log loss in 3-fold cross-validation inside the training part.

    Args:
        train_pixels: (N, S, S, C) uint8, best of `PIXEL_SIZE_PX` a side.
        train_labels: (N,) int, in 0..num_classes-1, of at least two classes.
        test_pixels: (M, S, S, C) uint8.
        num_classes: K, at least 2.
        seed: Of the folds; default 0.
        groups: N names; images that share one stay in one fold. Default: each image its own.
        sample_weight: (N,) float, at least 0; default all 1.
        classifiers: Whether there are any beside the majority class, which takes no time.

    Returns:
        "majority class", "logistic regression on pixels", "SVC on pixels" (RBF kernel, at most 5000 images), each
        (M, K) float64 probabilities.

    Raises:
        InputError: Where shapes do not fit or there are fewer than two classes.

    Example:
        >>> pixels = np.repeat(np.array([0, 9, 250, 255], "uint8"), 12).reshape(4, 2, 2, 3)
        >>> found = pixel_baselines(pixels, [0, 0, 1, 1], pixels, num_classes=2)
        >>> found["SVC on pixels"].argmax(1)
        array([0, 0, 1, 1])
    """
    labels = _checked(train_pixels, train_labels, test_pixels, num_classes)
    weights = checked_weights(sample_weight, len(labels))
    numbers = group_numbers(groups, len(labels))
    group_of_image = np.arange(len(labels)) if numbers is None else numbers
    rng = np.random.default_rng(seed)
    prior = np.bincount(labels, weights=weights, minlength=num_classes) / weights.sum()
    found = {"majority class": np.tile(prior, (len(test_pixels), 1))}
    if not classifiers:
        return found
    kept = rng.permutation(np.flatnonzero(weights))
    # One thread: the products are small, and where cores are shared BLAS threads that wait for each other made the
    # same fits a hundred times slower.
    with threadpool_limits(1):
        train, test = _components(train_pixels, test_pixels)
        for name, make, strengths, most in (
            ("logistic regression on pixels", _logistic, _LOGISTIC_STRENGTHS, len(kept)),
            ("SVC on pixels", _svc, _SVC_STRENGTHS, MAX_SVC_IMAGES),
        ):
            data = (train, labels, weights, num_classes)
            strength, temperature = _tuned(make, strengths, data, group_of_image, kept[:MAX_TUNING_IMAGES])
            outputs = _outputs(make(strength), data, kept[:most], test)
            found[name] = softmax(outputs / temperature, axis=1)
    return found


def _logistic(strength: float) -> Any:
    return LogisticRegression(C=strength, max_iter=1000, tol=1e-3)


def _svc(strength: float) -> Any:
    return SVC(C=strength, gamma="scale", cache_size=50)


def _components(train_pixels: np.ndarray, test_pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels in 0..1 projected on the training part's leading principal components."""
    num_pixels = int(np.prod(train_pixels.shape[1:]))
    total = np.zeros(num_pixels)
    for block in _blocks(train_pixels):
        total += block.sum(0, dtype=np.float64)
    mean = (total / len(train_pixels)).astype(np.float32)
    scatter = np.zeros((num_pixels, num_pixels), np.float32)
    for block in _blocks(train_pixels):
        scatter += (block - mean).T @ (block - mean)
    num = min(NUM_COMPONENTS, num_pixels, max(1, len(train_pixels) - 1))
    _, axes = eigh(scatter, subset_by_index=[num_pixels - num, num_pixels - 1])
    train, test = (
        np.concatenate([np.zeros((0, num)), *((block - mean) @ axes for block in _blocks(pixels))])
        for pixels in (train_pixels, test_pixels)
    )
    return train, test


def _blocks(pixels: np.ndarray) -> Iterator[np.ndarray]:
    """Some hundreds of images at a time as (n, numbers) in 0..1."""
    for start in range(0, len(pixels), 512):
        yield pixels[start : start + 512].reshape(-1, int(np.prod(pixels.shape[1:]))).astype(np.float32) / 255


def _tuned(
    make: Callable[[float], Any],
    strengths: tuple[float, ...],
    data: tuple[np.ndarray, np.ndarray, np.ndarray, int],
    group_of_image: np.ndarray,
    kept: np.ndarray,
) -> tuple[float, float]:
    """Strength and temperature of the least log loss in cross-validation over the images `kept`."""
    features, labels, weights, _ = data
    fold_of_image = _folds(labels, group_of_image, kept)
    pairs = [(kept[fold_of_image != fold], kept[fold_of_image == fold]) for fold in range(NUM_FOLDS)]
    pairs = [(fit, held) for fit, held in pairs if len(held) and len(np.unique(labels[fit])) > 1]
    if not pairs:
        return strengths[len(strengths) // 2], 1.0
    held_out = np.concatenate([held for _, held in pairs])
    best = (np.inf, strengths[0], 1.0)
    for strength in strengths:
        outputs = np.concatenate([_outputs(make(strength), data, fit, features[held]) for fit, held in pairs])
        temperature, loss = best_temperature(outputs, labels[held_out], weights[held_out])
        best = min(best, (loss, strength, temperature))
    return best[1], best[2]


def _folds(labels: np.ndarray, group_of_image: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The fold of each image of `kept`: groups are dealt out in turn, class by class, in the order they come in."""
    groups, first, group_of_kept = np.unique(group_of_image[kept], return_index=True, return_inverse=True)
    in_turn = np.lexsort((first, labels[kept][first]))
    fold_of_group = np.empty(len(groups), int)
    fold_of_group[in_turn] = np.arange(len(groups)) % NUM_FOLDS
    return fold_of_group[group_of_kept]


def _outputs(
    classifier: Any, data: tuple[np.ndarray, np.ndarray, np.ndarray, int], fit: np.ndarray, features: np.ndarray
) -> np.ndarray:
    """(M, K) decision values for `features` after training on the images `fit`; -inf for a class it never saw."""
    train, labels, weights, num_classes = data
    classifier.fit(train[fit], labels[fit], sample_weight=weights[fit])
    values = classifier.decision_function(features)
    if values.ndim == 1:
        values = np.stack([-values / 2, values / 2], axis=1)
    outputs = np.full((len(features), num_classes), -np.inf)
    outputs[:, classifier.classes_] = values
    return outputs


def _checked(
    train_pixels: np.ndarray, train_labels: ArrayLike, test_pixels: np.ndarray, num_classes: int
) -> np.ndarray:
    labels = np.asarray(train_labels)
    if train_pixels.ndim != 4 or train_pixels.shape[1:] != test_pixels.shape[1:]:
        raise InputError(f"Pixels must be (N, S, S, C) of one size, not {train_pixels.shape} and {test_pixels.shape}.")
    if train_pixels.dtype != np.uint8 or test_pixels.dtype != np.uint8:
        raise InputError(f"Pixels must be uint8, not {train_pixels.dtype} and {test_pixels.dtype}.")
    if labels.shape != train_pixels.shape[:1] or labels.dtype.kind not in "iu":
        raise InputError(f"{len(train_pixels)} whole-number labels are needed, not {labels.dtype} {labels.shape}.")
    if len(np.unique(labels)) < 2 or labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(f"Labels must be of two classes or more and lie in 0..{num_classes - 1}.")
    return labels.astype(np.int64)
