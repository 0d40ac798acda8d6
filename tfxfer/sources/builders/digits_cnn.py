"""The small CNN of the classic tutorial: three convolutions and a hidden Dense layer, for 32 px images."""

import keras
from keras import layers


def build(image_size_px: int = 32, *, include_top: bool = False, seed: int | None = None) -> keras.Model:
    """The network with random weights.

    Args:
        image_size_px: Side of the input, at least 18; the hidden Dense layer fits one side only, so weights trained
            at 32 px need 32.
        include_top: End with the logits of the ten digits; otherwise with the 64 hidden features.
        seed: Of the initial kernels; None: Keras' global seed.

    Returns:
        A functional model, (N, S, S, 3) float32 in 0..1 to (N, 64) features or (N, 10) logits.

    Example:
        >>> build(32).output_shape
        (None, 64)
    """

    def start(number: int) -> keras.initializers.Initializer:
        return keras.initializers.GlorotUniform(seed=None if seed is None else seed * 1000 + number)

    images = keras.Input((image_size_px, image_size_px, 3), name="images")
    x = layers.Conv2D(32, 3, activation="relu", kernel_initializer=start(0), name="conv1")(images)
    x = layers.MaxPooling2D(2, name="conv1_pool")(x)
    x = layers.Conv2D(64, 3, activation="relu", kernel_initializer=start(1), name="conv2")(x)
    x = layers.MaxPooling2D(2, name="conv2_pool")(x)
    x = layers.Conv2D(64, 3, activation="relu", kernel_initializer=start(2), name="conv3")(x)
    x = layers.Flatten(name="conv3_flatten")(x)
    x = layers.Dense(64, activation="relu", kernel_initializer=start(3), name="dense1")(x)
    if include_top:
        x = layers.Dense(10, kernel_initializer=start(4), name="logits")(x)
    return keras.Model(images, x, name="digits_cnn")
