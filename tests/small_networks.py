"""Small networks with what transfer goes wrong on: BatchNorm far from any batch, skips, a nested backbone."""

import dataclasses

import keras
import numpy as np

from tfxfer.model.build import assemble
from tfxfer.sources.catalog import get_source

SIZE_PX = 16
BLOCKS = ("a_conv", "b_conv", "c_conv")  # each with the BatchNorm and the ReLU behind it


def norm_backbone(seed: int = 0, size_px: int = SIZE_PX) -> keras.Model:
    """Three convolutions with BatchNorm whose gamma, beta and statistics are all their own."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((size_px, size_px, 3))
    x = inputs
    for name, width, stride in (("a", 4, 2), ("b", 6, 2), ("c", 5, 1)):
        x = keras.layers.Conv2D(width, 3, strides=stride, use_bias=False, name=f"{name}_conv")(x)
        x = keras.layers.BatchNormalization(name=f"{name}_bn")(x)
        x = keras.layers.ReLU(name=f"{name}_relu")(x)
    backbone = keras.Model(inputs, keras.layers.GlobalAveragePooling2D(name="pool")(x), name="norm_backbone")
    random = np.random.default_rng(seed)
    for name, width in (("a_bn", 4), ("b_bn", 6), ("c_bn", 5)):
        values = [random.uniform(0.5, 1.5, width), random.normal(0, 0.5, width)]  # gamma, beta
        values += [random.normal(0, 0.7, width), random.uniform(0.3, 3, width)]  # mean, variance
        backbone.get_layer(name).set_weights(values)
    return backbone


def skip_backbone() -> keras.Model:
    """Three convolutions; the first also feeds the sum behind the third, so two tensors cross behind the second."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((SIZE_PX, SIZE_PX, 3))
    first = keras.layers.Conv2D(4, 3, padding="same", activation="relu", name="block_1")(inputs)
    second = keras.layers.Conv2D(4, 3, padding="same", activation="relu", name="block_2")(first)
    third = keras.layers.Conv2D(4, 3, padding="same", name="block_3")(second)
    x = keras.layers.Add(name="sum")([first, third])
    return keras.Model(inputs, keras.layers.GlobalAveragePooling2D(name="pool")(x), name="skip_backbone")


def around(backbone: keras.Model, head=3, *, dropout: float = 0.0, logits: bool = False) -> keras.Model:
    """The backbone in a model as `build_model` makes it."""
    card = dataclasses.replace(get_source("digits_cnn"), name="small", image_size_px=SIZE_PX)
    return assemble(backbone, card, head, dropout=dropout, logits=logits)


def norm_model(head=3, *, seed: int = 0, dropout: float = 0.0) -> keras.Model:
    return around(norm_backbone(seed), head, dropout=dropout)


def pictures(count: int, seed: int = 0, size_px: int = SIZE_PX) -> np.ndarray:
    """(count, size, size, 3) uint8: patches of colour, all different."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)
    return np.repeat(np.repeat(coarse, size_px // 4, axis=1), size_px // 4, axis=2)


def values(model: keras.Model) -> dict[str, np.ndarray]:
    """Copies of all weights by path."""
    return {variable.path: variable.numpy().copy() for variable in model.weights}


def moved(before: dict[str, np.ndarray], model: keras.Model) -> set[str]:
    """Paths of the weights that are no longer bit-identical."""
    return {path for path, value in values(model).items() if value.tobytes() != before[path].tobytes()}


def spoil(extracted, row: int) -> None:
    """Make the activations of one image NaN, in the plain view."""
    for store in extracted.activations.views[0]:
        store.write(row, np.full((1, *store.shape[1:]), np.nan))
