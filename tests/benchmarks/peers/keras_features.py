"""The cached peer in Keras: `predict` gives the features once, a Dense head is trained on them.

python tests/benchmarks/peers/keras_features.py DATA OUT --seed 0
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import keras_parts
import numpy as np
from keras import layers
from peer import Clock, arguments, leave


def main() -> int:
    options = arguments(__doc__, image_size_px=224)
    clock = Clock(options.cpu_seconds)
    clock.mark("imports")
    keras.utils.set_random_seed(options.seed)
    base = keras_parts.load_base(options.image_size)
    base.trainable = False
    inputs = keras.Input(base.input_shape[1:])
    pooled = layers.GlobalAveragePooling2D()(base(keras_parts.normalisation()(inputs), training=False))
    extractor = keras.Model(inputs, pooled)

    features, labels = {}, {}
    for name in ("train", "val"):
        part = keras_parts.read_part(options.data / name, options.image_size)
        features[name] = extractor.predict(part, verbose=0)
        labels[name] = np.concatenate([numbers for _, numbers in part])
    num_classes = len(part.class_names)

    head = keras.Sequential(
        [keras.Input(features["train"].shape[1:]), layers.Dropout(0.2), layers.Dense(num_classes, activation="softmax")]
    )
    head.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    stop = keras.callbacks.EarlyStopping("val_loss", patience=10, restore_best_weights=True)
    history = head.fit(
        features["train"], labels["train"], validation_data=(features["val"], labels["val"]),
        epochs=max(1, round(200 * options.epochs_scale)), verbose=0, callbacks=[stop, keras_parts.Cut(clock)],
    )  # fmt: skip
    keras.Model(inputs, head(pooled)).save(options.out / "model.keras")
    clock.mark("model")

    found = keras_parts.predict_test(options.out / "model.keras", options.data / "test", options.image_size)
    settings = {"image_size": options.image_size, "epochs": len(history.history["loss"])}
    leave(options.out, clock, settings, *found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
