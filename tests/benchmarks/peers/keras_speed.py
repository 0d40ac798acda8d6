"""Plain Keras and TensorFlow for throughput.py: `predict`, a `tf.function`, and `fit` with blocks frozen.

Of tfxfer only the network with its converted weights is taken, and which layers are its blocks.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import keras_parts
import numpy as np
import tensorflow as tf
from keras import layers
from speed import BatchTimes, in_batches, repeated, serve

import tfxfer

NUM_CLASSES = 10


def make(told):
    keras.utils.set_random_seed(0)
    pixels = np.load(told["pixels"])
    base = tfxfer.load_backbone(told["source"], image_size=told["image_size"])
    arms = {"predict": predict, "function": function, "fit": fit}
    return arms[told["arm"]](told, base, pixels), {"tensorflow": tf.__version__, "keras": keras.__version__}


def extractor(base: keras.Model) -> keras.Model:
    base.trainable = False
    inputs = keras.Input(base.input_shape[1:])
    return keras.Model(inputs, base(keras_parts.normalisation()(inputs), training=False))


def predict(told, base, pixels):
    model = extractor(base)
    if told.get("export"):
        model.predict(pixels[: told["batch_size"]], verbose=0)  # only a called model can be exported
        model.export(told["export"], format="onnx", verbose=False)

    def step() -> int:
        model.predict(pixels, batch_size=told["batch_size"], verbose=0)
        return len(pixels)

    return repeated(step)


def function(told, base, pixels):
    model = extractor(base)
    compute = tf.function(lambda images: model(tf.cast(images, "float32"), training=False), jit_compile=False)
    batches = in_batches(pixels, told["batch_size"])
    at = 0

    def step() -> int:
        nonlocal at
        compute(tf.constant(batches[at % len(batches)])).numpy()
        at += 1
        return told["batch_size"]

    return repeated(step)


def fit(told, base, pixels):
    """`fit` of the recipe that tfxfer's step has: AdamW, smoothed labels, the gradient's norm clipped."""
    freeze_blocks(base, told["freeze_depth"], train_batch_norm=told["batch_norm"] == "train")
    inputs = keras.Input(base.input_shape[1:])
    x = layers.Dropout(0.2)(base(keras_parts.normalisation()(inputs)))
    model = keras.Model(inputs, layers.Dense(NUM_CLASSES, activation="softmax")(x))
    model.compile(
        keras.optimizers.AdamW(1e-5, weight_decay=0.01, global_clipnorm=1.0),
        keras.losses.CategoricalCrossentropy(label_smoothing=0.1), metrics=["accuracy"],
    )  # fmt: skip
    size = told["batch_size"]
    labels = np.eye(NUM_CLASSES, dtype="float32")[np.arange(len(pixels)) % NUM_CLASSES]
    data = tf.data.Dataset.from_tensor_slices((pixels, labels)).shuffle(len(pixels)).repeat()
    data = data.batch(size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    times = BatchTimes(size)

    class Note(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = times.end_of_batch()

    def work(wanted: float):
        times.begin(wanted)
        while True:  # stop_training is looked at between epochs
            model.fit(data, steps_per_epoch=told["steps"], epochs=1, verbose=0, callbacks=[Note()])
            if model.stop_training:
                return times.found()

    work(0.0)
    return work


def freeze_blocks(base: keras.Model, depth, *, train_batch_norm: bool) -> None:
    """The leading blocks, by number, "all" or the last one's name; BatchNorm everywhere unless it trains."""
    blocks = tfxfer.list_blocks(base)
    names = [block.name for block in blocks]
    count = len(blocks) if depth == "all" else names.index(depth) + 1 if isinstance(depth, str) else depth
    frozen = {name for block in blocks[:count] for name in block.layers}
    for layer in base.layers:
        held = isinstance(layer, layers.BatchNormalization) and not train_batch_norm
        layer.trainable = layer.name not in frozen and not held


if __name__ == "__main__":
    sys.exit(serve(make))
