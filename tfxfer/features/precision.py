"""Whether activations may be kept as float16: measured on a sample of them."""

import numpy as np
from numpy.typing import ArrayLike

FLOAT16_HEADROOM = 8  # values yet to come may be so many times as large as the largest of the sample
TOLERANCE = 1e-3


def choose_dtype(sample: ArrayLike, tolerance: float = TOLERANCE) -> str:
    """Whether float16 is good enough for values like these; halves what a store takes on disk.

    The rule, measured on the sample, channel by channel (the last axis): the root mean square error of rounding to
    float16 is at most `tolerance` of the channel's standard deviation, since what a channel tells is how it varies,
    not its level. A channel that does not move (by a millionth of the most moving one) is measured against the most
    moving one. And no value passes an eighth of float16's largest, 65504, so that images outside the sample may have
    larger ones. What is not finite asks for float32.

    Args:
        sample: (n, ...) real numbers, from rows of different images.
        tolerance: Above 0. Rounding alone gives about 2e-4 of a value, so that the default 1e-3 admits channels
            whose level is up to about four times their deviation.

    Returns:
        "float16" or "float32".

    Example:
        >>> rng = np.random.default_rng(0)
        >>> features = rng.normal(size=(100, 8))
        >>> choose_dtype(features), choose_dtype(features + 100), choose_dtype(features * 1e5)
        ('float16', 'float32', 'float32')
    """
    values = np.asarray(sample, np.float64)
    if not values.size or not np.isfinite(values).all():
        return "float32"
    if np.abs(values).max() * FLOAT16_HEADROOM > np.finfo(np.float16).max:
        return "float32"
    channels = values.reshape(-1, values.shape[-1] if values.ndim > 1 else 1)
    error = np.sqrt(((channels - channels.astype(np.float16)) ** 2).mean(0))
    spread = channels.std(0)
    scale = np.where(spread > 1e-6 * spread.max(), spread, spread.max())
    return "float16" if bool((error <= tolerance * scale).all()) else "float32"
