"""Arrays, tf.data and dicts of parts."""

import numpy as np
import pytest

from tfxfer.data import load_data
from tfxfer.errors import InputError
from tfxfer.runtime.images import resize_image


@pytest.fixture(scope="module")
def arrays():
    random = np.random.default_rng(0)
    return random.integers(0, 256, (60, 20, 24, 3), np.uint8), np.arange(60) % 3


def rows(part) -> np.ndarray:
    return np.array([int(id.split("row ")[1]) for id in part.ids])


def test_every_row_keeps_its_image_and_label(arrays):
    x, y = arrays
    data = load_data(arrays, image_size=12)
    assert data.class_names == ("0", "1", "2") and len(data) == 60
    for name, part in data.parts.items():
        assert np.array_equal(part.labels, y[rows(part)]) and part.paths is None
        assert np.array_equal(data.pixels(name, 12), np.stack([resize_image(x[row], 12) for row in rows(part)]))
        assert np.array_equal(data.pixels(name, 7), np.stack([resize_image(x[row], 7) for row in rows(part)]))
    assert load_data((x.copy(), y)).fingerprint == data.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: (x.astype(np.float32) + 0.3, y),
        lambda x, y: (x.astype(np.float32) - 0.3, y),
        lambda x, y: (x, np.eye(3)[y]),
        lambda x, y: (x, y[:, None].astype(float)),
        lambda x, y: (list(x), y.tolist()),
        lambda x, y: (x.astype(np.int64), y.astype(str)),
    ],
)
def test_other_spellings_of_the_same_data(arrays, change):
    x, y = np.clip(arrays[0], 1, 254), arrays[1]
    assert load_data(change(x, y)).fingerprint == load_data((x, y)).fingerprint


def test_names_weights_and_grey(arrays):
    x, y = arrays
    data = load_data((x[..., 0], y, np.linspace(0, 2, 60)), class_names=("rock", "paper", "scissors"), image_size=20)
    assert data.class_names == ("rock", "paper", "scissors")
    for name, part in data.parts.items():
        assert np.allclose(part.weights, np.linspace(0, 2, 60)[rows(part)])
        pixels = data.pixels(name, 20)
        assert (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all()
    sizes = [x[row, : 10 + row % 5] for row in range(60)]
    assert len(load_data((sizes, y))) == 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x / 255, y), r"values in 0..1; expected 0..255: multiply them by 255"),
        (lambda x, y: (x / 127.5 - 1, y), r"values from -1.0 to 1.0; expected 0..255"),
        (lambda x, y: (np.where(x < 9, np.nan, x), y), "values from nan"),
        (lambda x, y: (x.reshape(60, -1), y), r"shape \(60, 1440\); expected \(N, height, width, channels\)"),
        (lambda x, y: (np.moveaxis(x, -1, 1), y), r"with 1 to 4 channels last"),
        (lambda x, y: (x, y[:50]), "60 images and 50 labels"),
        (lambda x, y: (x, y, np.ones(3)), "60 images and 3 weights"),
        (lambda x, y: (x, y, -np.ones(60)), "weights hold values that are negative"),
        (lambda x, y: (x, y - 1), "label of row 0 is -1; expected 0 or more"),
        (lambda x, y: (x, y + 0.5), "expected whole numbers, names, or one-hot rows"),
        (lambda x, y: (x, np.full((60, 3), 1 / 3)), r"row 0 is .* expected one-hot"),
        (lambda x, y: (x[:0], y[:0]), "holds no image"),
        (lambda x, y: (x, np.zeros(60, int)), "one class, '0'"),
        (lambda x, y: (x, np.eye(4)[y][:, :3]), None),
    ],
)
def test_bad_arrays(arrays, change, message):
    if message is None:
        assert load_data(change(*arrays)).num_classes == 3
        return
    with pytest.raises(InputError, match=message):
        load_data(change(*arrays))


def test_label_without_a_name(arrays):
    with pytest.raises(InputError, match=r"label of row 2 is 2; expected 0..1, as there are 2 class names"):
        load_data(arrays, class_names=("a", "b"))


def test_dict_of_parts(arrays):
    x, y = arrays
    data = load_data({"train": (x[:40], y[:40]), "test": (x[40:], y[40:])})
    assert list(data.parts) == ["train", "val", "test"]
    assert list(data.part("test").ids) == [f"test/row {n}" for n in range(20)]
    assert {id.split("/")[0] for id in data.part("val").ids} == {"train"}
    leaky = load_data({"train": (x[:40], y[:40]), "validation": (x[36:48], y[36:48]), "test": (x[45:], y[45:])})
    assert sorted(len(leak["dropped"]) for leak in leaky.leaks) == [1] * 7
    assert {id for leak in leaky.leaks for id in leak["dropped"]} == {f"train/row {n}" for n in range(36, 40)} | {
        f"validation/row {n}" for n in range(9, 12)
    }


@pytest.mark.parametrize("data", [5, None, {"left": 1}, "nowhere", (1, 2, 3, 4)])
def test_what_is_no_data(data):
    with pytest.raises(InputError):
        load_data(data)


def test_tf_data_in_batches_or_single(arrays):
    tf = pytest.importorskip("tensorflow")
    x, y = arrays
    expected = load_data(arrays).fingerprint
    single = tf.data.Dataset.from_tensor_slices((x, y))
    assert load_data(single).fingerprint == expected
    assert load_data(single.batch(16)).fingerprint == expected
    one_hot = single.map(lambda x, y: (tf.cast(x, tf.float32), tf.one_hot(y, 3))).batch(7)
    assert load_data(one_hot).fingerprint == expected
    weighted = load_data(tf.data.Dataset.from_tensor_slices((x, y, np.arange(60.0))).batch(9))
    assert all(np.array_equal(part.weights, rows(part)) for part in weighted.parts.values())
    grey = tf.data.Dataset.from_tensor_slices((x[..., 0], y))
    assert load_data(grey).fingerprint == load_data(grey.batch(8)).fingerprint
    assert list(load_data({"train": single.take(40), "test": single.skip(40)}).parts) == ["train", "val", "test"]


def test_tf_data_that_cannot_be_used(arrays):
    tf = pytest.importorskip("tensorflow")
    single = tf.data.Dataset.from_tensor_slices(arrays)
    with pytest.raises(InputError, match="endless"):
        load_data(single.repeat())
    with pytest.raises(InputError, match=r"expected \(image, label\)"):
        load_data(single.map(lambda x, y: x))
    with pytest.raises(InputError, match="multiply them by 255"):
        load_data(single.map(lambda x, y: (tf.cast(x, tf.float32) / 255, y)))


def test_tf_data_of_a_directory_brings_its_class_names(tmp_path, make_classes):
    keras = pytest.importorskip("keras")
    make_classes(tmp_path, {"cat": 12, "dog": 12})
    read = keras.utils.image_dataset_from_directory(tmp_path, image_size=(40, 40), batch_size=5, seed=0, verbose=0)
    data = load_data(read)
    assert data.class_names == ("cat", "dog") and len(data) == 24


@pytest.mark.parametrize("weighted", [False, True])
def test_as_tf_yields_the_parts(arrays, weighted):
    pytest.importorskip("tensorflow")
    data = load_data((*arrays, np.arange(60.0)) if weighted else arrays, image_size=10)
    part = data.part("train")
    batches = list(data.as_tf("train", batch_size=8).as_numpy_iterator())
    assert [len(batch[0]) for batch in batches[:-1]] == [8] * (len(batches) - 1)
    assert batches[0][0].dtype == np.float32 and batches[0][0].shape[1:] == (10, 10, 3)
    assert np.array_equal(np.concatenate([batch[0] for batch in batches]), data.pixels("train", 10))
    assert np.array_equal(np.concatenate([batch[1] for batch in batches]), part.labels)
    if weighted:
        assert np.array_equal(np.concatenate([batch[2] for batch in batches]), part.weights)
    shuffled = data.as_tf("train", image_size=6, batch_size=8, shuffle=True, seed=1)
    orders = [np.concatenate([batch[1] for batch in shuffled.as_numpy_iterator()]).tolist() for _ in range(2)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == sorted(part.labels.tolist())
