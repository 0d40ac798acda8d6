"""Every reader gives the same data set for the same images, and no two claim the same data."""

import csv

import numpy as np
import pytest

import tfxfer
from tfxfer.data import READERS

NAMES = ("zero", "one", "two")


def as_folder(arrays, folder):
    return folder


def as_table(arrays, folder):
    rows = [(str(file.relative_to(folder)), file.parent.name) for file in sorted(folder.rglob("*.png"))]
    path = folder / "photos.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    return path


def as_arrays(arrays, folder):
    return arrays


def as_tf_data(arrays, folder):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(arrays).batch(5)


def as_hugging_face(arrays, folder):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(NAMES))})
    files = sorted(folder.rglob("*.png"), key=lambda file: file.name)
    rows = {"image": [str(file) for file in files], "label": [NAMES.index(file.parent.name) for file in files]}
    return datasets.Dataset.from_dict(rows, features=features)


# A new reader brings a line here.
SAMPLES = {
    "arrays": as_arrays,
    "folder": as_folder,
    "hugging_face": as_hugging_face,
    "table": as_table,
    "tf_data": as_tf_data,
}


@pytest.fixture
def folder(digit_folder, tmp_path):
    import shutil

    return shutil.copytree(digit_folder, tmp_path / "digits")


def test_every_reader_has_a_sample():
    assert set(SAMPLES) == set(READERS)


@pytest.mark.parametrize("name", READERS)
def test_one_reader_claims_the_sample(name, digit_arrays, folder):
    data = SAMPLES[name](digit_arrays, folder)
    assert [other for other, reader in READERS.items() if reader().reads(data)] == [name]


@pytest.mark.parametrize("name", READERS)
def test_nothing_is_lost_and_pixels_keep_their_class(name, digit_arrays, folder):
    images, labels = digit_arrays
    data = tfxfer.load_data(SAMPLES[name](digit_arrays, folder), image_size=8, class_names=NAMES)
    assert data.class_names == NAMES and data.quarantined == () and data.leaks == ()
    assert list(data.parts) == ["train", "val", "test"] and len(data) == len(labels)
    wanted = {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    for part in data.parts:
        pixels = data.pixels(part, 8)
        assert pixels.dtype == np.uint8
        found = [wanted.pop(image.tobytes()) for image in pixels]  # each image in one part, unchanged
        assert found == data.part(part).labels.tolist()
        assert set(found) == {0, 1, 2}, "every class is in every part"
    assert not wanted


@pytest.mark.parametrize("name", READERS)
def test_the_same_data_is_split_the_same_way(name, digit_arrays, folder):
    first, again, other = (
        tfxfer.load_data(SAMPLES[name](digit_arrays, folder), seed=seed, class_names=NAMES) for seed in (0, 0, 1)
    )
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert {part: first.part(part).ids for part in first.parts} == {part: again.part(part).ids for part in again.parts}
