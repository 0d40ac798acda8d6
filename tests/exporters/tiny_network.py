"""A small network with everything that exports go wrong on."""

import keras
import numpy as np
import tensorflow as tf

from tfxfer.model.preprocess import AdaptImage

SIZE_PX = 24
NAMES = ("ångström", "bee", "c/d", "d")
METADATA = {"source": "tiny", "licence": "Apache-2.0"}


def tiny_backbone() -> keras.Model:
    """Two convolutions with BatchNorm whose statistics are far from those of any batch."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((SIZE_PX, SIZE_PX, 3))
    x = keras.layers.Conv2D(8, 3, strides=2, use_bias=False, name="stem_conv")(inputs)
    x = keras.layers.BatchNormalization(name="stem_bn")(x)
    x = keras.layers.ReLU(6.0, name="stem_relu")(x)
    x = keras.layers.DepthwiseConv2D(3, padding="same", use_bias=False, name="top_conv")(x)
    x = keras.layers.BatchNormalization(name="top_bn")(x)
    x = keras.layers.GlobalAveragePooling2D(name="top_pool")(x)
    backbone = keras.Model(inputs, x, name="backbone")
    rng = np.random.default_rng(4)
    for name in ("stem_bn", "top_bn"):
        count = 8
        backbone.get_layer(name).set_weights(
            [
                rng.uniform(0.5, 1.5, count),
                rng.normal(0, 0.5, count),
                rng.normal(0, 0.7, count),
                rng.uniform(0.2, 3, count),
            ]
        )
    return backbone


def assemble(backbone, head, *, softmax=True) -> keras.Model:
    """What build_model makes."""
    inputs = keras.Input((None, None, None), name="images", dtype="float32")
    x = AdaptImage(SIZE_PX, name="adapt_image")(inputs)
    x = keras.layers.Rescaling([1 / 58, 1 / 61, 1 / 47], [-2.1, -1.8, -1.6], name="normalise")(x)
    x = head(keras.layers.Dropout(0.2)(backbone(x)))
    if softmax:
        x = keras.layers.Activation("softmax", dtype="float32", name="probabilities")(x)
    return keras.Model(inputs, x, name="tiny")


def _batch_norm_in_training_mode(model, images):
    x = tf.cast(images, tf.float32)
    for layer in model.layers[1:]:
        x = layer(x, training=True) if layer.name == "backbone" else layer(x)
    return x


def _channels_in_the_wrong_order(model, images):
    return model(tf.cast(images, tf.float32)[..., ::-1], training=False)


def _softmax_twice(model, images):
    return tf.nn.softmax(model(tf.cast(images, tf.float32), training=False))


# What an exporter may do wrong, in the place of `tfxfer.exporters.serving.probabilities_of`.
FAULTS = {
    "BatchNorm in training mode": _batch_norm_in_training_mode,
    "channels in the wrong order": _channels_in_the_wrong_order,
    "softmax twice": _softmax_twice,
}
