"""LEEP: how well the source's own classes predict the target's labels."""

import numpy as np
from numpy.typing import ArrayLike

from tfxfer.errors import InputError
from tfxfer.select.scores.inputs import checked_classes, one_hot

_SUM_TOLERANCE = 0.01  # of the rows of probabilities; float16 outputs are that far off


def leep_score(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean log probability of the labels when each is drawn by way of the source's classes.

    The source gives an image a distribution over its own Z classes, and from the joint distribution of these with the
    labels follows how each of them predicts a label. No training, and nothing inside the network is looked at.

    Args:
        probabilities: (N, Z) float, of the source's old output on the target's images; rows sum to 1.
        labels: (N,) int, at least 0, of two classes or more, the target's.

    Returns:
        The score, in nats: 0 where the labels follow for sure; higher is better. It is never below minus the labels'
        entropy, which is what a source scores that sees the same in all images.

    Raises:
        InputError: Where shapes or ranges do not fit, rows do not sum to 1, or there is one class only.

    Example:
        >>> round(leep_score([[1, 0], [1, 0], [0.5, 0.5], [0, 1]], [0, 0, 1, 1]), 4)  # by hand in the tests
        -0.2393

    Reference:
        Nguyen, Hassner, Seeger, Archambeau. LEEP: A New Measure to Evaluate Transferability of Learned Representations.
        ICML 2020.
    """
    table = _checked(probabilities)
    classes = checked_classes(labels, len(table), "probabilities")
    joint = one_hot(classes).T @ table
    seen = joint.sum(0)
    conditional = np.divide(joint, seen, out=np.zeros_like(joint), where=seen > 0)
    return float(np.log(np.einsum("nz,nz->n", table, conditional[classes])).mean())


def _checked(probabilities: ArrayLike) -> np.ndarray:
    """(N, Z) float64 whose rows sum to 1 exactly."""
    table = np.asarray(probabilities, np.float64)
    if table.ndim != 2 or 0 in table.shape:
        raise InputError(f"probabilities must be (N, Z), an image a row, not {table.shape}.")
    if not np.isfinite(table).all():
        row = int(np.isfinite(table).all(1).argmin())
        raise InputError(f"Row {row} of the probabilities holds a value that is not finite; leave such images out.")
    sums = table.sum(1)
    if table.min() < 0 or np.abs(sums - 1).max() > _SUM_TOLERANCE:
        raise InputError(
            "The probabilities must be at least 0 and sum to 1 in each row; pass the source's softmax, not logits, "
            "and no independent labels."
        )
    return table / sums[:, None]
