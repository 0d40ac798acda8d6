"""What crosses a cut, computed from pixels when it is asked for; kept nowhere where the cut is before every block."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from tfxfer.features.cut import Cut
from tfxfer.features.rows import Stacked
from tfxfer.features.views import View, view_function
from tfxfer.runtime.store import Rows

Compute = Callable[[np.ndarray], tuple[np.ndarray, ...]]


def crossing_of(cut: Cut) -> Compute:
    """What crosses a cut, without the features at the backbone's end; with the weights of the first call."""

    @functools.cache
    def function():
        prefix = tf.function(
            lambda images: tf.nest.flatten(cut.prefix(tf.cast(images, "float32"), training=False)), jit_compile=False
        )
        concrete = prefix.get_concrete_function(tf.TensorSpec((None, *cut.prefix.input_shape[1:]), "uint8"))
        return convert_variables_to_constants_v2(concrete)

    return lambda pixels: tuple(values.numpy() for values in function()(tf.constant(pixels)))


class Normalised:
    """Rows of a view's normalised pixels: read as uint8, a quarter of the bytes, and normalised then.

    Args:
        compute: `crossing_of` a cut before the first block, which one tensor crosses.
        parts: (n, S, S, 3) uint8 arrays or rows in files; their images are numbered through.
        view: Of the images.
        shape: Of one image behind the normalisation.

    Attributes:
        nbytes: 0, since nothing is stored beside the pixels.
    """

    dtype = stored_dtype = np.dtype(np.float32)
    nbytes = 0

    def __init__(self, compute: Compute, parts: Sequence[Rows], view: View, shape: Sequence[int]):
        self._compute, self._pixels, self._view = compute, Stacked(parts), view_function(view)
        self.shape = (len(self._pixels), *shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """float32 rows by an int, a slice, or an array of ints."""
        numbers = np.arange(len(self))[rows]
        with tf.device("/CPU:0"):  # beside a step that trains
            (found,) = self._compute(self._view(self._pixels[np.atleast_1d(numbers)]))
        return found if np.ndim(numbers) else found[0]
