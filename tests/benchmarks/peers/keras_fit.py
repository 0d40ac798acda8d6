"""What `tfxfer train` does, as a good user writes it in plain Keras: a head first, then the last 30 % tuned.

    python tests/benchmarks/peers/keras_fit.py DATA OUT --seed 0

AdamW with warm-up and cosine, label smoothing, mirrored images, BatchNorm held, the best epoch by validation kept.
Decoded images are kept in memory; features are not.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import keras_parts
import numpy as np
import tensorflow as tf
from keras import layers
from peer import Clock, arguments, leave

EPOCHS = (15, 10)
PEAKS = (3e-3, 3e-4)


def compile_for(model: keras.Model, peak: float, steps: int) -> None:
    warmup = max(1, steps // 10)
    rate = keras.optimizers.schedules.CosineDecay(
        peak / 10, steps - warmup, alpha=0.0, warmup_target=peak, warmup_steps=warmup
    )
    optimizer = keras.optimizers.AdamW(rate, weight_decay=1e-4)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    model.compile(optimizer, keras.losses.CategoricalCrossentropy(label_smoothing=0.1), metrics=["accuracy"])


def read(folder, size_px: int, seed: int | None = None) -> tuple[tf.data.Dataset, int, int]:
    """Batches with one-hot labels from memory, how many batches, how many classes."""
    part = keras_parts.read_part(folder, size_px)
    num_classes, num_images = len(part.class_names), len(part.file_paths)
    part = part.unbatch().cache()
    if seed is not None:
        part = part.shuffle(num_images, seed=seed)
    part = part.batch(keras_parts.BATCH_SIZE).map(lambda x, y: (x, tf.one_hot(y, num_classes)))
    return part.prefetch(tf.data.AUTOTUNE), -(-num_images // keras_parts.BATCH_SIZE), num_classes


def main() -> int:
    options = arguments(__doc__, image_size_px=192)
    clock = Clock(options.cpu_seconds)
    clock.mark("imports")
    keras.utils.set_random_seed(options.seed)
    train, steps, num_classes = read(options.data / "train", options.image_size, options.seed)
    val, _, _ = read(options.data / "val", options.image_size)
    base = keras_parts.load_base(options.image_size)
    model = keras_parts.build(base, [layers.RandomFlip("horizontal")], num_classes)

    # So few steps an epoch leave a small set untrained: twice the epochs where there are under ten.
    epochs = [max(1, round(number * options.epochs_scale * (2 if steps < 10 else 1))) for number in EPOCHS]
    best = -1.0
    for stage, (number, peak) in enumerate(zip(epochs, PEAKS, strict=True)):
        if clock.over():
            break
        if stage == 0:
            base.trainable = False
        else:
            keras_parts.unfreeze(base, 0.3)
        compile_for(model, peak, steps * number)
        keep = keras.callbacks.ModelCheckpoint(
            options.out / "best.weights.h5", "val_accuracy", mode="max", save_best_only=True, save_weights_only=True,
            initial_value_threshold=best if stage else None,
        )  # fmt: skip
        history = model.fit(
            train, validation_data=val, epochs=number, verbose=2, callbacks=[keep, keras_parts.Cut(clock)]
        )
        best = float(np.max([best, *history.history.get("val_accuracy", [])]))
        model.load_weights(options.out / "best.weights.h5")
    model.save(options.out / "model.keras")
    clock.mark("model")

    found = keras_parts.predict_test(options.out / "model.keras", options.data / "test", options.image_size)
    leave(options.out, clock, {"image_size": options.image_size, "epochs": epochs, "validation": best}, *found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
