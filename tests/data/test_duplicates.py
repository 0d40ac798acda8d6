"""Near-duplicates: copies are found, different pictures are not, in photos and in drawings; leaks across parts."""

import io
import time

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from tfxfer.data import load_data
from tfxfer.data.duplicates import candidate_pairs, linked_groups, near_duplicate_pairs
from tfxfer.runtime.images import hamming_distances, image_of_array, small_look


def recompressed(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=30)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


COPIES = {
    "recompressed": recompressed,
    "halved": lambda image: image.resize((image.width // 2, image.height // 2)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "more contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.2),
    "cropped by 1 %": lambda image: image.crop((2, 2, image.width - 2, image.height - 2)),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_found_and_nothing_else(make_picture, name):
    originals = [make_picture(seed, 240, 200) for seed in range(60)]
    pictures = originals + [COPIES[name](image) for image in originals]
    pairs = near_duplicate_pairs(np.stack([small_look(p) for p in pictures]), np.array([min(p.size) for p in pictures]))
    expected = {(n, n + 60) for n in range(60)}
    found = set(map(tuple, pairs.tolist()))
    assert found <= expected
    assert len(found) >= (36 if name.startswith("cropped") else 57)  # a crop moves every patch: the limit of the method


def test_banded_search_finds_what_comparing_all_finds():
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**63, 300, dtype=np.uint64)
    for row in range(150, 300):  # half are near one of the others, by 0 to 9 flipped bits
        flips = random.choice(64, random.integers(0, 10), replace=False)
        hashes[row] = hashes[row - 150] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64), initial=0)
    near = np.argwhere(np.triu(hamming_distances(hashes[:, None], hashes[None]) <= 6, k=1))
    assert len(near) > 80
    assert candidate_pairs(hashes, 6).tolist() == near.tolist()


def test_a_hundred_thousand_hashes_are_feasible():
    hashes = np.random.default_rng(0).integers(0, 2**63, 100_000, dtype=np.uint64)
    hashes[50_000:60_000] = hashes[:10_000] ^ np.uint64(0b10001)
    started = time.process_time()
    pairs = candidate_pairs(hashes, 6)
    assert time.process_time() - started < 30
    assert {(n, n + 50_000) for n in range(10_000)} <= set(map(tuple, pairs.tolist())) and len(pairs) < 10_100


def test_linked_groups_are_the_connected_components():
    random = np.random.default_rng(1)
    pairs = random.integers(0, 200, (120, 2))
    scipy_graph = pytest.importorskip("scipy.sparse.csgraph")
    from scipy.sparse import coo_array

    graph = coo_array((np.ones(120), pairs.T), (200, 200))
    _, expected = scipy_graph.connected_components(graph, directed=False)
    found = np.array(linked_groups(200, pairs.tolist()))
    assert np.array_equal(found[:, None] == found[None], expected[:, None] == expected[None])


@pytest.mark.parametrize("size_px", [8, 32, 128])
def test_small_digits_are_not_merged(size_px):
    from sklearn.datasets import load_digits

    digits = load_digits()
    values = (digits.images * 255 / 16).round().astype(np.uint8)
    pictures = [image_of_array(x).resize((size_px, size_px), Image.Resampling.BILINEAR) for x in values]
    looks = np.stack([small_look(picture) for picture in pictures])
    pairs = near_duplicate_pairs(looks, np.full(len(looks), size_px))
    assert len(pairs) <= 3
    assert all(digits.target[a] == digits.target[b] for a, b in pairs)


def test_plain_pictures_are_left_alone():
    looks = np.stack([np.full((32, 32, 3), value, np.uint8) for value in (0, 0, 100, 255, 255)])
    assert len(near_duplicate_pairs(looks, np.full(5, 500))) == 0


def test_near_duplicates_are_listed_and_stay_together(tmp_path, make_classes, make_picture):
    make_classes(tmp_path, {"a": 30, "b": 30})
    for seed in range(12):
        make_picture(seed).save(tmp_path / "a" / f"copy{seed:02d}.jpg", quality=80)
    (tmp_path / "a" / "0005-broken.png").write_bytes(b"")  # what is refused must not shift the rest
    data = load_data(tmp_path)
    assert set(data.near_duplicates) == {(f"a/{n:04d}.png", f"a/copy{n:02d}.jpg") for n in range(12)}
    where = {
        id: (name, group) for name, part in data.parts.items() for id, group in zip(part.ids, part.groups, strict=True)
    }
    for pair in data.near_duplicates:
        assert where[pair[0]] == where[pair[1]] and where[pair[0]][1] == pair[0]
    assert where["b/0040.png"][1] == "b/0040.png"
    assert data.summary()["near_duplicates_across_parts"] == []
    apart = load_data(tmp_path, near_duplicates=False)
    assert apart.near_duplicates == ()
    parts = {id: name for name, part in apart.parts.items() for id in part.ids}
    assert any(parts[a] != parts[b] for a, b in data.near_duplicates)


def test_leaks_across_given_parts_are_reported_and_removed_from_training(tmp_path, make_classes, make_picture):
    train = make_classes(tmp_path / "train", {"a": 20, "b": 20})
    test = make_classes(tmp_path / "test", {"a": 5, "b": 5}, start=100)
    (test / "a" / "leak.png").write_bytes((train / "a" / "0003.png").read_bytes())
    make_picture(7).save(test / "a" / "similar.jpg", quality=85)
    data = load_data(tmp_path)
    (leak,) = data.leaks
    assert leak["kept"] == ["test/a/leak.png"] and leak["dropped"] == ["train/a/0003.png"]
    ids = {name: set(part.ids) for name, part in data.parts.items()}
    assert "test/a/leak.png" in ids["test"] and all("train/a/0003.png" not in found for found in ids.values())
    assert len(data) + len(leak["dropped"]) == 52
    summary = data.summary()
    assert summary["leaks"] == [leak]
    assert summary["near_duplicates_across_parts"] == [["test/a/similar.jpg", "train/a/0007.png"]]


def test_identical_content_under_two_classes_is_reported(tmp_path, make_classes):
    make_classes(tmp_path, {"a": 20, "b": 20})
    (tmp_path / "b" / "same.png").write_bytes((tmp_path / "a" / "0000.png").read_bytes())
    data = load_data(tmp_path, near_duplicates=False)
    (conflict,) = data.conflicts
    assert conflict["ids"] == ["a/0000.png", "b/same.png"] and conflict["labels"] == ["a", "b"]
    where = {id: name for name, part in data.parts.items() for id in part.ids}
    assert where["a/0000.png"] == where["b/same.png"]
