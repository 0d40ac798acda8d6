"""Averages of weights over the steps of training: exponential, or uniform as in SWA."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfxfer.errors import InputError


def kept_share(step, decay: float = 0.999, *, uniform: bool = False):
    """The share of the average that an update keeps.

    `min(decay, (1 + step) / (10 + step))`: a young average forgets the start weights fast. Uniform:
    `step / (step + 1)`, so that the average is the mean of all weights given and the start does not count.

    Args:
        step: Number of updates before this one; int or scalar tensor.
        decay: In [0, 1).
        uniform: All weights count alike, and decay does not.

    Example:
        >>> [round(float(kept_share(step, 0.5)), 3) for step in (0, 2, 1000)]
        [0.1, 0.25, 0.5]
        >>> [round(float(kept_share(step, uniform=True)), 3) for step in (0, 1, 2)]
        [0.0, 0.5, 0.667]
    """
    step = keras.ops.cast(step, "float32")
    return step / (step + 1) if uniform else keras.ops.minimum(decay, (1 + step) / (10 + step))


def start_average(weights: Sequence[Any]) -> list[Any]:
    """The average before any update: the weights themselves, floats as float32 (float64 stays).

    Example:
        >>> [value.dtype.name for value in start_average([np.ones(2, np.float16), np.arange(3)])]
        ['float32', 'int64']
    """
    return [keras.ops.cast(value, _kept_dtype(value)) for value in map(keras.ops.convert_to_tensor, weights)]


def update_average(
    average: Sequence[Any], weights: Sequence[Any], step, decay: float = 0.999, *, uniform: bool = False
) -> list[Any]:
    """The average one step on; what is no float (seeds, counters) is taken as it is.

    `average + (1 - kept) (weights - average)`, so weights that stand still are kept bit for bit.

    Args:
        average: Of `start_average` or of the last update.
        weights: Of now, in the same order.
        step: Number of updates before this one; int or scalar tensor.
        decay: See `kept_share`.
        uniform: See `kept_share`.

    Example:
        >>> average = update_average(start_average([np.zeros(1)]), [np.ones(1)], 0)
        >>> round(float(average[0][0]), 6)
        0.9

    Reference:
        Polyak, Juditsky. Acceleration of Stochastic Approximation by Averaging. SIAM Journal on Control and
        Optimization, 1992.
        Izmailov, Podoprikhin, Garipov, Vetrov, Wilson. Averaging Weights Leads to Wider Optima and Better
        Generalization (SWA). UAI 2018.
    """
    new = 1 - kept_share(step, decay, uniform=uniform)
    updated = []
    for old, value in zip(average, start_average(weights), strict=True):
        floating = keras.backend.is_float_dtype(value.dtype)
        updated.append(old + keras.ops.cast(new, value.dtype) * (value - old) if floating else value)
    return updated


class WeightAverage:
    """A running average of variables, in variables of its own: float32, whatever the dtype of the weights.

    Statistics of BatchNorm are averaged with the rest; the authors of SWA estimate them anew (`adapt_batch_norm`).

    Args:
        variables: Whose average it is, in an order that stays. Make it inside the strategy's scope that they are of.
        decay: See `kept_share`.
        uniform: See `kept_share`.

    Example:
        >>> weight = keras.Variable([0.0], dtype="float16")
        >>> average = WeightAverage([weight], uniform=True)
        >>> for step, value in enumerate((1.0, 2.0, 6.0)):
        ...     _ = weight.assign([value])
        ...     average.update(step)
        >>> average.state()[0].tolist()
        [3.0]
    """

    def __init__(self, variables: Sequence[keras.Variable], decay: float = 0.999, *, uniform: bool = False):
        if not 0 <= decay < 1:
            raise InputError(f"decay must lie in [0, 1), not {decay}.")
        self.variables, self.decay, self.uniform = tuple(variables), decay, uniform
        # Without an aggregation: each replica moves its own copy, all alike, so that `update` may stand in a tf.cond.
        self.averages = tuple(
            keras.Variable(
                keras.ops.convert_to_numpy(variable),
                dtype=_kept_dtype(variable),
                trainable=False,
                autocast=False,
                name=f"{variable.name}_average",
            )
            for variable in self.variables
        )
        # One call a step instead of several for each variable: 160 small ones took 84 ms, and take 3.
        self._graph = tf.function(
            self._update, input_signature=[tf.TensorSpec((), tf.int64)], autograph=False, jit_compile=False
        )

    def update(self, step) -> None:
        """Take the present weights in; inside a `tf.function` `step` must be a tensor, or each is traced anew."""
        in_replica = tf.distribute.has_strategy() and not tf.distribute.in_cross_replica_context()
        if tf.executing_eagerly() and not in_replica:  # a replica moves its own copies, one by one
            self._graph(tf.cast(step, tf.int64))
        else:
            self._update(step)

    def _update(self, step) -> None:
        updated = update_average(self.averages, self.variables, step, self.decay, uniform=self.uniform)
        for average, value in zip(self.averages, updated, strict=True):
            average.assign(value)

    def copy_to_variables(self) -> None:
        """Set the variables to their averages, in their own dtypes; read them out before, if training goes on."""
        for variable, average in zip(self.variables, self.averages, strict=True):
            variable.assign(keras.ops.cast(average, variable.dtype))

    def state(self) -> list[np.ndarray]:
        """Copies of the averages, in the order of the variables: with the number of updates all there is to save."""
        return [average.numpy().copy() for average in self.averages]

    def restore(self, state: Sequence[np.ndarray]) -> None:
        """Go on from a `state`, bit for bit.

        Raises:
            InputError: Where it is one of other variables.
        """
        shapes = [tuple(np.shape(value)) for value in state], [tuple(average.shape) for average in self.averages]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"The state has the shapes {shapes[0]}, the variables {shapes[1]}: it is of another model."
            )
        for average, value in zip(self.averages, state, strict=True):
            average.assign(value)


def _kept_dtype(value) -> str:
    dtype = keras.backend.standardize_dtype(value.dtype)
    return "float32" if keras.backend.is_float_dtype(dtype) and dtype != "float64" else dtype
