"""The two-stage transfer-learning tutorial of Keras and TensorFlow, as the peer of time_to_accuracy.py.

    python tests/benchmarks/peers/keras_tutorial.py DATA OUT --seed 0

Of tfxfer it takes the ImageNet weights, so that both sides start from the same ones, and the clock. All else is plain
Keras, as the tutorials write it (tensorflow.org/tutorials/images/transfer_learning, keras.io/guides/transfer_learning):
`image_dataset_from_directory` with a validation split, augmentation layers in the model, first a frozen base, then its
last third unfrozen at a small rate. The clock stops when the model is saved; only then is the saved file opened again
and asked for the test part.

Both tutorials want BatchNorm in inference mode, by `base(x, training=False)`. In Keras 3 `fit` overrides that (keras
issue 20285): once unfrozen, the base trains with the statistics of its batches and moves the stored ones. So BatchNorm
is held by `trainable = False` as well, which gives the tutorial what it asks for; --as-written leaves that out.

Leaves in OUT: model.keras, timing.json, test.npz (paths, class_names, probabilities).
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import tfxfer
from tfxfer.runtime.process import seconds_since_start

SOURCE = "mobilenet_v2_imagenet"
IMAGE_SIZE_PX = 160
BATCH_SIZE = 32
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_datasets(folder: Path, seed: int) -> tuple[tf.data.Dataset, tf.data.Dataset, list[str]]:
    """Training part, validation part (a fifth of the images), names of the classes."""
    train, val = keras.utils.image_dataset_from_directory(
        folder, validation_split=0.2, subset="both", seed=seed, image_size=(IMAGE_SIZE_PX,) * 2, batch_size=BATCH_SIZE
    )
    return train.prefetch(tf.data.AUTOTUNE), val.prefetch(tf.data.AUTOTUNE), train.class_names


def load_base() -> keras.Model:
    """MobileNetV2 up to its last feature map."""
    backbone = tfxfer.load_backbone(SOURCE, image_size=IMAGE_SIZE_PX)
    return keras.Model(backbone.input, backbone.get_layer("top_relu").output, name="base")


def build(base: keras.Model, num_classes: int) -> keras.Model:
    """Augmentation, preprocessing, base, pooling, dropout, softmax."""
    inputs = keras.Input((IMAGE_SIZE_PX, IMAGE_SIZE_PX, 3))
    x = layers.RandomFlip("horizontal")(inputs)
    x = layers.RandomRotation(0.1)(x)
    scale = [1 / 255 / deviation for deviation in DEVIATION]
    offset = [-mean / deviation for mean, deviation in zip(MEAN, DEVIATION, strict=True)]
    x = layers.Rescaling(scale, offset)(x)
    x = base(x, training=False)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dropout(0.2)(x)
    return keras.Model(inputs, layers.Dense(num_classes, activation="softmax")(x))


def unfreeze_last_third(base: keras.Model, *, as_written: bool) -> None:
    base.trainable = True
    for index, layer in enumerate(base.layers):
        still = isinstance(layer, layers.BatchNormalization) and not as_written
        layer.trainable = index >= len(base.layers) * 2 // 3 and not still


def train(data: Path, out: Path, seed: int, epochs: tuple[int, int], *, as_written: bool) -> dict[str, float]:
    """Both stages; seconds from the start of the process to the end of each, and to the saved model."""
    keras.utils.set_random_seed(seed)
    seconds = {}
    train_part, val_part, class_names = load_datasets(data / "train", seed)
    base = load_base()
    model = build(base, len(class_names))

    base.trainable = False
    model.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    seconds["ready_to_fit"] = seconds_since_start()
    model.fit(train_part, validation_data=val_part, epochs=epochs[0], verbose=2)
    seconds["frozen"] = seconds_since_start()

    unfreeze_last_third(base, as_written=as_written)
    model.compile(keras.optimizers.RMSprop(1e-5), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(train_part, validation_data=val_part, epochs=sum(epochs), initial_epoch=epochs[0], verbose=2)
    model.save(out / "model.keras")
    seconds["model"] = seconds_since_start()
    return seconds


def predict_test(data: Path, out: Path) -> None:
    """Probabilities of the saved model for the test part, into test.npz."""
    test = keras.utils.image_dataset_from_directory(
        data / "test", shuffle=False, image_size=(IMAGE_SIZE_PX,) * 2, batch_size=BATCH_SIZE
    )
    model = keras.models.load_model(out / "model.keras")
    paths = [Path(path).relative_to(data / "test").as_posix() for path in test.file_paths]
    np.savez(
        out / "test.npz", paths=paths, class_names=test.class_names, probabilities=model.predict(test, verbose=0)
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with train/ and test/, each of class folders")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", default="10,5", help="of the two stages")
    parser.add_argument("--as-written", action="store_true", help="BatchNorm as Keras 3 runs the tutorial's own code")
    options = parser.parse_args()
    first, second = (int(number) for number in options.epochs.split(","))
    options.out.mkdir(parents=True, exist_ok=True)
    seconds = train(options.data, options.out, options.seed, (first, second), as_written=options.as_written)
    predict_test(options.data, options.out)
    (options.out / "timing.json").write_text(json.dumps(seconds), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
