"""The two-stage transfer-learning tutorial of Keras and TensorFlow, as a peer of time_to_accuracy.py.

    python tests/benchmarks/peers/keras_tutorial.py DATA OUT --seed 0

Plain Keras, as the tutorials write it (tensorflow.org/tutorials/images/transfer_learning,
keras.io/guides/transfer_learning): `image_dataset_from_directory`, augmentation layers in the model, ten epochs with a
frozen base, then ten with its last third unfrozen at a small rate.

Both tutorials want BatchNorm in inference mode, by `base(x, training=False)`. In Keras 3 `fit` overrides that (keras
issue 20285): once unfrozen, the base trains with the statistics of its batches and moves the stored ones. So BatchNorm
is held by `trainable = False` as well, which gives the tutorial what it asks for.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import keras_parts
import tensorflow as tf
from keras import layers
from peer import Clock, arguments, leave

EPOCHS = 10


def main() -> int:
    options = arguments(__doc__, image_size_px=160)
    clock = Clock(options.cpu_seconds)
    clock.mark("imports")
    keras.utils.set_random_seed(options.seed)
    epochs = max(1, round(EPOCHS * options.epochs_scale))

    train = keras_parts.read_part(options.data / "train", options.image_size, options.seed)
    val = keras_parts.read_part(options.data / "val", options.image_size).prefetch(tf.data.AUTOTUNE)
    num_classes = len(train.class_names)
    train = train.prefetch(tf.data.AUTOTUNE)
    base = keras_parts.load_base(options.image_size)
    model = keras_parts.build(base, [layers.RandomFlip("horizontal"), layers.RandomRotation(0.1)], num_classes)

    fit = {"validation_data": val, "verbose": 2, "callbacks": [keras_parts.Cut(clock)]}
    base.trainable = False
    model.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(train, epochs=epochs, **fit)
    clock.mark("frozen")

    keras_parts.unfreeze(base, 1 / 3)
    model.compile(keras.optimizers.RMSprop(1e-5), "sparse_categorical_crossentropy", metrics=["accuracy"])
    if not clock.over():
        model.fit(train, epochs=2 * epochs, initial_epoch=epochs, **fit)
    model.save(options.out / "model.keras")
    clock.mark("model")

    found = keras_parts.predict_test(options.out / "model.keras", options.data / "test", options.image_size)
    leave(options.out, clock, {"image_size": options.image_size, "epochs": [epochs, epochs]}, *found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
