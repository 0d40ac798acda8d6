"""Losses as pure functions of tensors: one value an image, so weights and means stay with the caller."""

import keras
import numpy as np

from tfxfer.errors import InputError


def label_smoothed_cross_entropy(targets, logits, smoothing: float = 0.1):
    """Cross-entropy with a share of every target spread evenly over the classes.

    `-sum_k q_k log p_k` with `p = softmax(logits)` and `q = (1 - smoothing) targets + smoothing / K`.

    Args:
        targets: (N, K), rows that sum to one: one-hot or mixed.
        logits: (N, K).
        smoothing: Share spread, in [0, 1).

    Returns:
        (N,).

    Example:
        >>> loss = label_smoothed_cross_entropy([[1.0, 0.0]], [[0.0, 0.0]])
        >>> round(float(loss[0]), 4)  # log 2, however much is spread
        0.6931

    Reference:
        Szegedy, Vanhoucke, Ioffe, Shlens, Wojna. Rethinking the Inception Architecture for Computer Vision. CVPR 2016
        (section 7).
    """
    if not 0 <= smoothing < 1:
        raise InputError(f"smoothing must lie in [0, 1), not {smoothing}.")
    logits = _wide(logits)
    targets = keras.ops.cast(targets, logits.dtype)
    return _cross_entropy((1 - smoothing) * targets + smoothing / logits.shape[-1], logits)


def knowledge_retention_loss(recorded_logits, logits, temperature: float = 2.0):
    """What an old head gives now against what it gave before training, both softened: learning without forgetting.

    `-sum_i y'_i log p'_i` with `y'_i = y_i^(1/T) / sum_j y_j^(1/T)` of the recorded probabilities y, and p' likewise of
    the present ones p (equations 2 to 4). As in the paper there is no factor T^2, so the gradient is `(p' - y') / T`.

    Args:
        recorded_logits: (N, K) of the old head, recorded before training; log probabilities give the same. No gradient
            flows into them.
        logits: (N, K) of the old head now.
        temperature: T > 0; the paper's is 2.

    Returns:
        (N,); at best the entropy of y', not zero.

    Example:
        >>> loss = knowledge_retention_loss([[0.0, 0.0]], [[3.0, 3.0]])
        >>> round(float(loss[0]), 4)
        0.6931

    Reference:
        Li, Hoiem. Learning without Forgetting. ECCV 2016.
    """
    if not temperature > 0:
        raise InputError(f"temperature must be above 0, not {temperature}.")
    logits = _wide(logits)
    recorded = keras.ops.stop_gradient(keras.ops.cast(recorded_logits, logits.dtype))
    return _cross_entropy(keras.ops.softmax(recorded / temperature, axis=-1), logits / temperature)


def co_tuning_loss(targets, source_logits, relationship):
    """Cross-entropy of the source's own head with the source classes that go with an image's target class.

    `-sum_s p(y_s | y_t) log softmax(source_logits)_s`. The paper adds it, times a trade-off, to the loss of the new
    head; both heads stand on one backbone.

    Args:
        targets: (N, K) over the target classes, one-hot or mixed; a mixture of classes has the mixture of their rows.
        source_logits: (N, S) of the source's head, which trains along.
        relationship: (K, S), p(source class | target class); see `category_relationship`.

    Returns:
        (N,).

    Example:
        >>> loss = co_tuning_loss([[1.0, 0.0]], [[0.0, 0.0]], [[0.9, 0.1], [0.2, 0.8]])
        >>> round(float(loss[0]), 4)
        0.6931

    Reference:
        You, Kou, Long, Wang. Co-Tuning for Transfer Learning. NeurIPS 2020.
    """
    source_logits = _wide(source_logits)
    targets = keras.ops.cast(targets, source_logits.dtype)
    relationship = keras.ops.cast(relationship, source_logits.dtype)
    return soft_cross_entropy(keras.ops.matmul(targets, relationship), source_logits)


def soft_cross_entropy(targets, logits):
    """Cross-entropy with targets that are shares of the classes: `-sum_s q_s log softmax(logits)_s`.

    Args:
        targets: (N, S), q; no gradient is needed of them.
        logits: (N, S).

    Returns:
        (N,).

    Example:
        >>> round(float(soft_cross_entropy([[0.25, 0.75]], [[0.0, 0.0]])[0]), 4)
        0.6931
    """
    logits = _wide(logits)
    return _cross_entropy(keras.ops.cast(targets, logits.dtype), logits)


def category_relationship(source_probabilities, labels, num_classes: int) -> np.ndarray:
    """p(source class | target class): the mean of the source's probabilities over the images of each target class.

    This is the paper's direct way, which needs no training. It wants calibrated probabilities: divide the source's
    logits by the temperature that minimises its log loss on held-out images of the source before the softmax. Where
    there are none, T = 1 is the direct way uncalibrated. The paper's other way, the reverse one, fits a calibrated
    p(target class | source class) by logistic regression and turns it around by Bayes' rule; it is not here.

    Args:
        source_probabilities: (N, S) of the source's original head on target images; rows sum to one.
        labels: (N,) int target classes in [0, num_classes).
        num_classes: K.

    Returns:
        (K, S) float32; rows sum to one.

    Raises:
        InputError: Where rows are no probabilities, a label is out of range or a class has no image.

    Example:
        >>> category_relationship([[0.75, 0.25], [0.25, 0.75], [0.0, 1.0]], [0, 0, 1], 2).tolist()
        [[0.5, 0.5], [0.0, 1.0]]

    Reference:
        You, Kou, Long, Wang. Co-Tuning for Transfer Learning. NeurIPS 2020.
    """
    probabilities, labels = np.asarray(source_probabilities, np.float64), np.asarray(labels)
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1]:
        raise InputError(
            f"Expected (N, S) probabilities and (N,) labels, got the shapes {probabilities.shape} and {labels.shape}."
        )
    if not (np.all(probabilities >= 0) and np.allclose(probabilities.sum(axis=1), 1, atol=1e-3)):
        raise InputError("source_probabilities must be rows that sum to one; pass a softmax, not logits.")
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise InputError(f"Labels must lie in [0, {num_classes}), found {labels.min()} to {labels.max()}.")
    counts = np.bincount(labels.astype(int), minlength=num_classes)
    if not counts.all():
        raise InputError(f"Target class {int(counts.argmin())} has no image, so nothing is known of its relationship.")
    sums = np.eye(num_classes)[labels].T @ probabilities
    return (sums / sums.sum(axis=1, keepdims=True)).astype(np.float32)


def _cross_entropy(targets, logits):
    return -keras.ops.sum(targets * keras.ops.log_softmax(logits, axis=-1), axis=-1)


def _wide(logits):
    """As a tensor of at least 32 bits: sums of 16-bit log probabilities are not worth having."""
    logits = keras.ops.convert_to_tensor(logits)
    return logits if logits.dtype in ("float32", "float64") else keras.ops.cast(logits, "float32")
