"""Odd but sound files of Keras 2, made by tf_keras."""

import numpy as np
import tf_keras
from tf_keras import layers


def saved(build):
    def write(folder):
        build().save(folder / "odd.h5", save_format="h5")
        return folder / "odd.h5"

    return write


def nested():
    backbone = tf_keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, include_top=False, weights=None)
    model = tf_keras.Sequential([backbone, layers.GlobalAveragePooling2D(), layers.Dense(3, activation="softmax")])
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy", tf_keras.metrics.AUC()])
    return model


def operators():
    x = layers.Input((8, 8, 3))
    y = layers.Conv2D(3, 3, padding="same")(x)
    y = layers.Multiply()([layers.ReLU(6.0)(y + 3.0) * (1.0 / 6.0), y])[:, 1:, ::2]
    return tf_keras.Model(x, layers.Flatten()(y))


def hard_swish():
    return tf_keras.applications.MobileNetV3Small(
        (32, 32, 3), alpha=0.75, weights=None, classes=3, include_preprocessing=True
    )


def recurrent():
    return tf_keras.Sequential(
        [
            layers.Input((5, 4)),
            layers.Masking(),
            layers.Bidirectional(layers.LSTM(3, return_sequences=True)),
            layers.TimeDistributed(layers.Dense(2, kernel_regularizer=tf_keras.regularizers.l2(0.1))),
            layers.GRU(2, recurrent_activation="hard_sigmoid", reset_after=False),
        ]
    )


def fitted():
    model = tf_keras.Sequential([layers.Input((4,)), layers.BatchNormalization(), layers.Dense(2, "sigmoid")])
    model.compile(
        tf_keras.optimizers.SGD(0.1, momentum=0.9), tf_keras.losses.BinaryCrossentropy(label_smoothing=0.1), ["mae"]
    )
    model.fit(np.ones((4, 4)), np.zeros((4, 2)), verbose=0)
    return model


def policy():
    return tf_keras.Sequential(
        [layers.Input((4,)), layers.Dense(2, dtype="mixed_float16"), layers.Softmax(dtype="float32")]
    )


def weights_only(folder):
    nested().save_weights(folder / "odd.h5")
    return folder / "odd.h5"


LEGACY = {
    "h5_of_keras_2_nested": saved(nested),
    "h5_of_keras_2_operators": saved(operators),
    "h5_of_keras_2_hard_swish": saved(hard_swish),
    "h5_of_keras_2_recurrent": saved(recurrent),
    "h5_of_keras_2_fitted": saved(fitted),
    "h5_of_keras_2_policy": saved(policy),
    "h5_of_keras_2_weights": weights_only,
}
