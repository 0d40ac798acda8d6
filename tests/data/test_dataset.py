"""What a Dataset offers once it is loaded, and loading for a test alone."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from tfxfer.data import load_data, load_test_data
from tfxfer.errors import InputError
from tfxfer.runtime.files import write_json
from tfxfer.runtime.images import ImageError, decode_image


@pytest.fixture
def folder(tmp_path, make_classes):
    make_classes(tmp_path / "pets", {"cat": 24, "dog": 16})
    (tmp_path / "pets" / "cat" / "broken.jpg").write_bytes(b"")
    return tmp_path / "pets"


def test_counts_fingerprint_and_summary(folder, tmp_path):
    data = load_data(folder, seed=3)
    counts = data.counts()
    assert {name: sum(counts[part][name] for part in counts) for name in ("cat", "dog")} == {"cat": 24, "dog": 16}
    assert counts["val"]["dog"] == sum(id.startswith("dog/") for id in data.part("val").ids)
    lines = sorted(
        f"{name}\t{id.split('/')[0]}\t{hashlib.sha256((folder / id).read_bytes()).hexdigest()}"
        for name, part in data.parts.items()
        for id in part.ids
    )
    assert data.fingerprint == hashlib.sha256("\n".join(["cat", "dog", "", *lines]).encode()).hexdigest()
    write_json(tmp_path / "data.json", data.summary())
    summary = json.loads((tmp_path / "data.json").read_text())
    assert summary["quarantined"] == [{"path": "cat/broken.jpg", "reason": "the file is empty (0 bytes)"}]
    assert summary["counts"] == counts and summary["fingerprint"] == data.fingerprint
    assert summary["split"]["seed"] == 3 and summary["split"]["fractions"] == {"val": 0.2, "test": 0.2}
    assert summary["groups"]["train"] == len(data.part("train"))


def test_pixels_are_decoded_once_at_the_loaded_size_and_held(folder):
    data = load_data(folder, image_size=20)
    for path in folder.rglob("*.png"):
        path.rename(path.with_suffix(".gone"))
    for name in data.parts:
        pixels = data.pixels(name, 20)
        rows = data.pixel_rows(name, 20)
        assert data.pixel_rows(name, 20) is rows and rows.shape == pixels.shape
        np.testing.assert_array_equal(rows[[2, 0, 0]], pixels[[2, 0, 0]])
        expected = [decode_image(path.with_suffix(".gone"), 20) for path in data.part(name).paths]
        assert np.array_equal(pixels, np.stack(expected))
    with pytest.raises(ImageError, match="no such file"):
        data.pixels("train", 12)


def test_progress_counts_every_file(folder):
    seen = []
    load_data(folder, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 41) for done in range(1, 42)]


def test_unknown_part(folder):
    with pytest.raises(InputError, match="has no part 'validation'"):
        load_data(folder).pixels("validation", 8)


def test_loaded_data_is_not_loaded_again(folder):
    with pytest.raises(InputError, match="loaded already"):
        load_data(load_data(folder))


def test_pixels_at_another_size_are_decoded_when_they_are_read(folder):
    data = load_data(folder, image_size=20)
    rows = data.pixel_rows("train", 12)
    paths = data.part("train").paths
    np.testing.assert_array_equal(rows[[1, 4]], np.stack([decode_image(paths[row], 12) for row in (1, 4)]))
    for row in (1, 4):
        paths[row].rename(paths[row].with_suffix(".gone"))
    assert rows[4].shape == (12, 12, 3) and rows[1:2].shape == (1, 12, 12, 3)  # once only
    paths[0].rename(paths[0].with_suffix(".gone"))
    with pytest.raises(ImageError, match="no such file"):
        rows[:3]


def test_the_digest_of_pixels_follows_the_files_and_the_size(folder):
    one, two = load_data(folder, image_size=20), load_data(folder)
    assert one.pixel_rows("train", 20).digest == two.pixel_rows("train", 20).digest  # decoded or not
    assert (
        len({data.pixel_rows(name, size).digest for data in (one, two) for name in one.parts for size in (20, 12)}) == 6
    )


def test_load_test_data_takes_everything_or_the_test_part(folder, tmp_path, make_classes):
    names = ("bird", "cat", "dog")
    data = load_test_data(folder, names, image_size=16)
    assert list(data.parts) == ["test"] and len(data.part("test")) == 40 and len(data.quarantined) == 1
    assert data.class_names == names and set(data.part("test").labels.tolist()) == {1, 2}
    assert data.pixels("test", 16).shape == (40, 16, 16, 3)
    make_classes(tmp_path / "parts" / "train", {"cat": 5, "dog": 5}, start=200)
    make_classes(tmp_path / "parts" / "test", {"cat": 3, "dog": 3}, start=300)
    assert len(load_test_data(tmp_path / "parts", names).part("test")) == 6
    with pytest.raises(InputError, match="class 'dog', which is not among those known here"):
        load_test_data(folder, ("cat", "cow"))
    for path in (tmp_path / "parts" / "test").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(
        InputError, match=r"No image of parts can be read; the first, test/cat/0300\.png: the file is empty"
    ):
        load_test_data(tmp_path / "parts", names)


def test_one_audit_serves_any_size(tmp_path, make_picture):
    """Groups and split do not hang on the size that was asked for."""
    for name in "ab":
        (tmp_path / name).mkdir()
        for seed in range(15):
            image = make_picture(seed + 100 * (name == "b"), 700, 600)
            image.save(tmp_path / name / f"{seed}.jpg", quality=92)
            image.resize((350, 300), Image.Resampling.LANCZOS).save(tmp_path / name / f"{seed}-small.jpg", quality=85)
    loaded = [load_data(tmp_path, image_size=size) for size in (None, 16, 224)]
    assert len(loaded[0].near_duplicates) == 30
    assert all(data.near_duplicates == loaded[0].near_duplicates for data in loaded)
    assert all(data.fingerprint == loaded[0].fingerprint for data in loaded)


def test_classes_in_another_order_keep_their_images(tmp_path, make_classes):
    data = load_data(make_classes(tmp_path, {"a": 8, "b": 9, "c": 10}), image_size=16)
    other = data.with_classes(["c", "a", "b"])
    assert other.class_names == ("c", "a", "b") and other.counts()["train"] == data.counts()["train"]
    for name, part in data.parts.items():
        ids = dict(zip(other.parts[name].ids, other.parts[name].labels, strict=True))
        assert all(other.class_names[ids[id]] == id[0] for id in part.ids)
        np.testing.assert_array_equal(other.pixels(name, 16), data.pixels(name, 16))
    assert other.fingerprint != data.fingerprint
