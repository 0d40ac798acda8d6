"""Small networks in the shapes that users' files have, for Keras 3 and, by `tf_keras`, for Keras 2."""

import keras
import numpy as np


def backbone(library=keras, size_px=32, channels=3, name="mini"):
    """A MobileNet-like backbone: stem, a depthwise block with a skip, a pointwise convolution; rank-4 output."""
    layers = library.layers
    inputs = library.Input((size_px, size_px, channels))
    x = layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False, name="stem_conv")(inputs)
    x = layers.BatchNormalization(name="stem_bn")(x)
    x = layers.ReLU(6.0, name="stem_relu")(x)
    y = layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="block_1_depthwise")(x)
    y = layers.BatchNormalization(name="block_1_bn")(y)
    x = layers.Add(name="block_1_add")([x, y])
    x = layers.Conv2D(12, 1, name="block_2_conv")(x)
    x = layers.BatchNormalization(name="block_2_bn")(x)
    x = layers.ReLU(name="block_2_relu")(x)
    return library.Model(inputs, x, name=name)


def nested(library=keras, num_classes=4, size_px=32, augment=True):
    """As the transfer tutorials have it: augmentation, rescaling, backbone, pooling, dropout, softmax."""
    layers = library.layers
    inputs = library.Input((size_px, size_px, 3))
    x = inputs
    if augment:
        x = library.Sequential([layers.RandomFlip("horizontal"), layers.RandomRotation(0.1)], name="augment")(x)
    x = layers.Rescaling(1 / 127.5, offset=-1, name="rescale")(x)
    x = backbone(library, size_px)(x, training=False)
    x = layers.GlobalAveragePooling2D(name="pooling")(x)
    x = layers.Dropout(0.2, name="drop")(x)
    return library.Model(inputs, layers.Dense(num_classes, activation="softmax", name="out")(x), name="whole")


def flat(names=("a", "b", "c"), num_classes=4, channels=3, library=keras):
    """A plain convolutional classifier."""
    layers = library.layers
    stack = [
        library.Input((16, 16, channels)),
        layers.Conv2D(4, 3, name=f"{names[0]}_conv"),
        layers.DepthwiseConv2D(3, name=f"{names[0]}_depthwise"),
        layers.BatchNormalization(name=f"{names[0]}_bn"),
        layers.Conv2D(6, 3, name=names[1]),
        layers.GlobalAveragePooling2D(name="pooling"),
        layers.Dense(num_classes, name=names[2]),
    ]
    return library.Sequential(stack, name="flat")


def with_values(model, seed=0):
    """Every variable gets values of its own; variances stay positive."""
    random = np.random.default_rng(seed)
    model.set_weights([
        random.uniform(0.5, 1.5, value.shape) if "variance" in weight.name else random.normal(0, 0.4, value.shape)
        for weight, value in zip(model.weights, model.get_weights(), strict=True)
    ])  # fmt: skip
    return model


def photos(count=3, size_px=32, channels=3):
    return np.random.default_rng(1).integers(0, 256, (count, size_px, size_px, channels)).astype("float32")


def normalised(card, images):
    """What `assemble` puts before a backbone."""
    images = images[..., ::-1] if card.channel_order == "bgr" else images
    return (images * np.array(card.scale) + np.array(card.offset)).astype("float32")
