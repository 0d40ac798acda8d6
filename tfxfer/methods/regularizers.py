"""Penalties on how far weights go, as pure functions of tensors."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras

from tfxfer.errors import InputError
from tfxfer.model.blocks import backbone_of


def l2_sp_penalty(
    weights: Sequence[Any],
    start_weights: Sequence[Any],
    alpha: float,
    head_weights: Sequence[Any] = (),
    beta: float = 0.01,
):
    """Half the squared distance of the weights from where they started, and half the squared size of new ones.

    `alpha / 2 ||w - w0||^2 + beta / 2 ||w_head||^2`. Added to the loss; it takes the place of weight decay, which pulls
    towards zero instead. The paper trains with SGD: Adam rescales this gradient like any other.

    Args:
        weights: Tensors or variables w that came from the source; see `l2_sp_groups`.
        start_weights: Their values w0 before training, in the same order and shapes.
        alpha: Strength of the pull back to the start, at least 0.
        head_weights: What is new.
        beta: Strength of the pull to zero on it, at least 0.

    Returns:
        A scalar.

    Raises:
        InputError: Where the two lists do not fit together, or a strength is negative.

    Example:
        >>> float(l2_sp_penalty([[3.0, 1.0]], [[1.0, 1.0]], 0.5, head_weights=[[4.0]], beta=0.25))
        3.0

    Reference:
        Li, Grandvalet, Davoine. Explicit Inductive Bias for Transfer Learning with Convolutional Networks. ICML 2018
        (equation 3).
    """
    if not (alpha >= 0 and beta >= 0):
        raise InputError(f"alpha and beta must be at least 0, not {alpha} and {beta}.")
    moved, start, new = ([_wide(value) for value in group] for group in (weights, start_weights, head_weights))
    shapes = [[tuple(value.shape) for value in group] for group in (moved, start)]
    if shapes[0] != shapes[1]:  # broadcasting would hide it
        raise InputError(
            f"start_weights must be the weights before training, shape by shape: {shapes[1]}, {shapes[0]}."
        )
    away = [keras.ops.sum((w - keras.ops.cast(w0, w.dtype)) ** 2) for w, w0 in zip(moved, start, strict=True)]
    size = [keras.ops.sum(w**2) for w in new]
    zero = keras.ops.zeros((), (away + size)[0].dtype if away + size else "float32")
    return alpha / 2 * sum(away, zero) + beta / 2 * sum(size, zero)


class L2SPGroups(NamedTuple):
    """The trainable variables of a model, parted for `l2_sp_penalty`.

    Attributes:
        shared: Those of the backbone.
        head: All others.
    """

    shared: tuple[keras.Variable, ...]
    head: tuple[keras.Variable, ...]


def l2_sp_groups(model: keras.Model) -> L2SPGroups:
    """Which variables are pulled to their start and which to zero.

    All that train count, as in the paper, where w is every parameter shared with the source: kernels, biases, gamma and
    beta of normalisations. What is frozen cannot move, and statistics of BatchNorm are no parameters: neither counts.

    Args:
        model: Of `build_model`, after `freeze`.

    Raises:
        InputError: Where no backbone is nested in the model, so that nothing tells old from new.

    Example:
        >>> groups = l2_sp_groups(model)  # doctest: +SKIP
        >>> start = [keras.ops.copy(variable) for variable in groups.shared]  # doctest: +SKIP
        >>> l2_sp_penalty(groups.shared, start, 0.1, groups.head)  # doctest: +SKIP
    """
    backbone = backbone_of(model)
    if backbone is model:
        raise InputError(
            f"Model {model.name!r} has no backbone nested in it, so nothing tells its head from what came from the "
            "source; use build_model, or pass the variables to l2_sp_penalty yourself."
        )
    inside = {id(variable) for variable in backbone.variables}
    shared = tuple(v for v in model.trainable_variables if id(v) in inside)
    return L2SPGroups(shared, tuple(v for v in model.trainable_variables if id(v) not in inside))


def _wide(value):
    """As a tensor of at least 32 bits."""
    value = keras.ops.convert_to_tensor(value)
    return value if value.dtype in ("float32", "float64") else keras.ops.cast(value, "float32")
