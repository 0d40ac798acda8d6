import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.svm import SVC

from tfxfer import metrics
from tfxfer.errors import InputError
from tfxfer.select import pixels
from tfxfer.select.pixels import PIXEL_SIZE_PX, pixel_baselines

DATA = Path(os.environ.get("TFXFER_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
NAMES = ["majority class", "logistic regression on pixels", "SVC on pixels"]


def digits(per_class: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    loaded = load_digits()
    side = (PIXEL_SIZE_PX, PIXEL_SIZE_PX)
    grey = [
        Image.fromarray((16 * one).clip(0, 255).astype("uint8")).resize(side, Image.BILINEAR) for one in loaded.images
    ]
    images = np.repeat(np.stack([np.asarray(one) for one in grey])[..., None], 3, axis=-1)
    rng = np.random.default_rng(0)
    train = np.concatenate([rng.permutation(np.flatnonzero(loaded.target == k))[:per_class] for k in range(10)])
    test = np.setdiff1d(np.arange(len(images)), train)
    return images[train], loaded.target[train], images[test], loaded.target[test]


def test_digits_reach_what_is_known_of_them():
    train, labels, test, test_labels = digits(10)
    found = pixel_baselines(train, labels, test, num_classes=10)
    assert list(found) == NAMES
    for table in found.values():
        assert table.shape == (len(test), 10)
        np.testing.assert_allclose(table.sum(1), 1)
    accuracy = {name: metrics.metric_value("accuracy", test_labels, table) for name, table in found.items()}
    assert accuracy["majority class"] < 0.12
    assert 0.86 <= accuracy["logistic regression on pixels"] <= 0.93
    assert 0.90 <= accuracy["SVC on pixels"] <= 0.95
    # The probabilities mean something: their log loss is near that of the best single temperature, and calibrated.
    for name in NAMES[1:]:
        assert metrics.log_loss(test_labels, found[name]) < 0.5
        assert metrics.calibration_error(test_labels, found[name]) < 0.1


def test_svc_gives_the_classes_of_scikit_learns_own_on_the_same_components(monkeypatch):
    monkeypatch.setattr(pixels, "_SVC_STRENGTHS", (3.0,))
    train, labels, test, _ = digits(15)
    found = pixel_baselines(train, labels, test, num_classes=10)["SVC on pixels"].argmax(1)
    flat, flat_test = (x.reshape(len(x), -1) / 255 for x in (train, test))
    analysis = PCA(100, svd_solver="full").fit(flat)
    svc = SVC(C=3, gamma="scale", break_ties=True).fit(analysis.transform(flat), labels)
    assert (svc.predict(analysis.transform(flat_test)) == found).mean() > 0.999


def test_majority_class_is_the_weighted_share():
    train, labels, test, _ = digits(3)
    weights = np.where(labels == 4, 5.0, 1.0)
    table = pixel_baselines(train, labels, test, num_classes=11, sample_weight=weights)["majority class"]
    expected = np.bincount(labels, weights, minlength=11) / weights.sum()
    np.testing.assert_allclose(table, np.tile(expected, (len(test), 1)))
    assert (table.argmax(1) == 4).all()


def test_weights_reach_the_classifiers():
    train, labels, test, test_labels = digits(10)
    rows = np.isin(test_labels, [3, 8])
    weights = np.where(labels == 8, 1e-3, 1.0)
    plain = pixel_baselines(train, labels, test[rows], num_classes=10)
    skewed = pixel_baselines(train, labels, test[rows], num_classes=10, sample_weight=weights)
    for name in NAMES[1:]:
        assert (skewed[name].argmax(1) == 8).mean() < 0.5 * (plain[name].argmax(1) == 8).mean()


def test_copies_of_one_thing_stay_in_one_fold():
    groups = np.repeat(np.arange(20), 6)
    labels = groups % 2
    kept = np.random.default_rng(3).permutation(120)
    folds = pixels._folds(labels, groups, kept)
    for group in range(20):
        assert len(set(folds[groups[kept] == group])) == 1
    for fold in range(3):
        assert abs((labels[kept][folds == fold] == 1).mean() - 0.5) <= 0.1


def test_grouped_folds_do_not_believe_what_copies_seem_to_prove():
    rng = np.random.default_rng(5)
    groups = np.repeat(np.arange(40), 8)
    noise = rng.integers(0, 256, (40, 4, 4, 3))[groups] + rng.integers(-3, 4, (320, 4, 4, 3))
    train, labels = noise.clip(0, 255).astype("uint8"), groups % 2  # nothing to learn but the copies themselves
    test, test_labels = rng.integers(0, 256, (400, 4, 4, 3)).astype("uint8"), np.arange(400) % 2
    fooled = pixel_baselines(train, labels, test, num_classes=2)
    grouped = pixel_baselines(train, labels, test, num_classes=2, groups=groups)
    assert metrics.log_loss(test_labels, fooled["SVC on pixels"]) > 0.9
    assert metrics.log_loss(test_labels, grouped["SVC on pixels"]) < 0.72


@pytest.mark.parametrize("per_class", [1, 2])
def test_very_few_images_still_give_an_answer(per_class):
    train, labels, test, test_labels = digits(per_class)
    found = pixel_baselines(train, labels, test, num_classes=10)
    for name in NAMES[1:]:
        assert metrics.metric_value("accuracy", test_labels, found[name]) > 0.35


def test_a_class_never_seen_gets_no_probability_and_equal_pixels_do_not_break_it():
    flat = np.full((6, 4, 4, 3), 7, "uint8")
    found = pixel_baselines(flat, np.array([0, 0, 0, 0, 2, 2]), flat, num_classes=3)
    for table in found.values():
        assert (table[:, 1] == 0).all() and np.isfinite(table).all()
        assert (table.argmax(1) == 0).all()


def test_it_repeats_with_its_seed():
    train, labels, test, _ = digits(4)
    first, second = (pixel_baselines(train, labels, test, num_classes=10, seed=3) for _ in range(2))
    for name in NAMES:
        np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.skipif(not (DATA / "mnist_usps").is_dir(), reason=f"needs mnist_usps in {DATA}")
def test_two_thousand_images_take_seconds():
    loaded = np.load(DATA / "mnist_usps" / "mnist_usps.npz")
    train, test = (
        np.repeat(loaded[f"usps_{part}_x"][:2000].reshape(-1, 16, 16, 1), 3, axis=-1) for part in ("train", "test")
    )
    labels, test_labels = (loaded[f"usps_{part}_y"][:2000].astype(int) for part in ("train", "test"))
    begin = time.process_time()
    found = pixel_baselines(train, labels, test, num_classes=10)
    assert time.process_time() - begin < 10
    assert metrics.metric_value("accuracy", test_labels, found["SVC on pixels"]) > 0.92


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train_pixels": np.zeros((4, 12), "uint8")}, "(N, S, S, C)"),
        ({"test_pixels": np.zeros((4, 3, 3, 3), "uint8")}, "one size"),
        ({"train_pixels": np.zeros((4, 2, 2, 3))}, "uint8"),
        ({"train_labels": [0, 1, 1]}, "4 whole-number labels"),
        ({"train_labels": [1, 1, 1, 1]}, "two classes"),
        ({"train_labels": [0, 1, 1, 2]}, "0..1"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(change, says):
    black = np.zeros((4, 2, 2, 3), "uint8")
    given = {"train_pixels": black, "train_labels": [0, 1, 0, 1], "test_pixels": black, "num_classes": 2, **change}
    with pytest.raises(InputError) as caught:
        pixel_baselines(**given)
    assert says in str(caught.value)
