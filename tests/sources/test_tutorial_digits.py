"""The classic tutorial, step by step, on real digits: rebuild the network, load the .h5, freeze, fine-tune on USPS."""

import os
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

from tfxfer.sources.legacy_h5 import load_matching_weights, weights_path

DATA = Path(os.environ.get("TFXFER_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
DIGITS_H5 = weights_path("digits_cnn", "digits_cnn.h5")
SEEDS = (0, 1)
IMAGES_A_CLASS = 10
EPOCHS = 40


def tutorial_network(num_classes=10):
    """As anybody rebuilds it, without names."""
    return keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(num_classes),
        ]
    )


@pytest.fixture(scope="module")
def digits():
    path = DATA / "mnist_usps" / "mnist_usps.npz"
    if not path.is_file():
        pytest.skip(f"no data in {path}")
    with np.load(path) as file:
        return {name: file[name] for name in ("mnist_test_x", "mnist_test_y")} | {
            f"usps_{part}_{axis}": file[f"usps_{part}_{axis}"] for part in ("train", "test") for axis in "xy"
        }


def prepared(images):
    resized = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)) for image in images]
    return np.repeat(np.stack(resized)[..., None], 3, axis=-1).astype("float32") / 255


def accuracy(model, images, labels):
    return float(np.mean(model.predict(images, batch_size=512, verbose=0).argmax(axis=1) == labels))


def trained_accuracy(digits, num_classes, seed, *, transfer):
    """Accuracy on USPS' test part after training on a few images a class, with and without the source's weights."""
    keras.utils.set_random_seed(seed)
    model = tutorial_network(num_classes)
    if transfer:
        load_matching_weights(model, DIGITS_H5)
        for layer in model.layers[:4]:  # both convolutions with their pooling
            layer.trainable = False
    rng = np.random.default_rng(seed)
    labels = digits["usps_train_y"]
    picks = [rng.choice(np.flatnonzero(labels == digit), IMAGES_A_CLASS, replace=False) for digit in range(num_classes)]
    chosen = np.concatenate(picks)
    steps = EPOCHS * -(-len(chosen) // 32)
    model.compile(
        optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-3, steps)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(prepared(digits["usps_train_x"][chosen]), labels[chosen], batch_size=32, epochs=EPOCHS, verbose=0)
    test = digits["usps_test_y"] < num_classes
    return accuracy(model, prepared(digits["usps_test_x"][test]), digits["usps_test_y"][test])


def test_the_source_knows_mnist(digits):
    model = tutorial_network()
    model.load_weights(DIGITS_H5)  # Keras' own loader takes the file as well
    assert accuracy(model, prepared(digits["mnist_test_x"]), digits["mnist_test_y"]) >= 0.98


def test_five_digits_list_the_output_that_does_not_fit():
    report = load_matching_weights(tutorial_network(5), DIGITS_H5)
    assert len(report.loaded) == 4
    (skipped,) = report.skipped.values()
    assert skipped == "kernel (64, 10), bias (10,) in the file; kernel (64, 5), bias (5,) in the model"
    with pytest.raises(ValueError, match=r"shape"):
        tutorial_network(5).load_weights(DIGITS_H5)


# Seen: ten digits 0.95 against 0.81, digits 0 to 4 0.97 against 0.91.
@pytest.mark.parametrize(("num_classes", "margin", "at_least"), [(10, 0.08, 0.92), (5, 0.03, 0.94)])
def test_transfer_beats_training_from_scratch_on_few_images(digits, num_classes, margin, at_least):
    transferred, scratch = (
        np.array([trained_accuracy(digits, num_classes, seed, transfer=transfer) for seed in SEEDS])
        for transfer in (True, False)
    )
    print(f"{num_classes} digits: transferred {transferred}, from scratch {scratch}")
    assert scratch.mean() > 0.7  # the rival has learnt
    assert transferred.mean() >= at_least
    assert transferred.mean() - scratch.mean() >= margin
