"""Turned, mirrored and shifted copies are found by their local patterns; other pictures of the same kind are not."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from tfxfer.data import load_data
from tfxfer.data.duplicates import linked_groups, near_duplicate_pairs
from tfxfer.data.turned import local_patterns, turned_pairs
from tfxfer.errors import InputError
from tfxfer.runtime.images import map_threads, small_look


def cells(seed: int) -> Image.Image:
    """A pale ground with forty rings and discs, as a microscope would show."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (320, 240), (225, 222, 214))
    draw = ImageDraw.Draw(image)
    for _ in range(40):
        x, y, radius = random.uniform(0, 320), random.uniform(0, 240), random.uniform(8, 20)
        colour = tuple(int(value) for value in random.integers((170, 90, 90), (220, 160, 200)))
        draw.ellipse((x - radius, y - 0.8 * radius, x + radius, y + 0.8 * radius), fill=colour)
        draw.ellipse((x - radius / 3, y - radius / 3, x + radius / 4, y + radius / 4), fill=(235, 215, 215))
    return image


COPIES = [
    lambda image: image.rotate(14, Image.Resampling.BILINEAR),
    lambda image: ImageOps.mirror(image).rotate(-20, Image.Resampling.BILINEAR),
    lambda image: image.rotate(170, Image.Resampling.BILINEAR, translate=(15, -10)),
]


def pairs_of(images, labels=None):
    points, descriptions = (np.stack(values) for values in zip(*map(local_patterns, images), strict=True))
    return turned_pairs(points, descriptions, labels or ["a"] * len(images))


def test_copies_are_found_and_nothing_else():
    originals = [cells(seed) for seed in range(12)]
    copies = [COPIES[n % 3](image) for n, image in enumerate(originals)]
    found = {tuple(pair) for pair in pairs_of(originals + copies).tolist()}
    assert found == {(n, n + 12) for n in range(12)}
    looks = np.stack([small_look(image) for image in originals + copies])
    assert len(near_duplicate_pairs(looks, np.full(24, 240))) == 0  # what the perceptual hash alone cannot see


def test_bright_things_on_black_are_matched_too():
    originals = [ImageOps.invert(cells(seed)).point(lambda value: max(0, value - 40)) for seed in range(4)]
    assert pairs_of([*originals, *(COPIES[0](image) for image in originals)]).tolist() == [[n, n + 4] for n in range(4)]


def test_only_within_a_class():
    assert pairs_of([cells(0), COPIES[0](cells(0)), COPIES[1](cells(0))], ["a", "b", "a"]).tolist() == [[0, 2]]


@pytest.mark.parametrize("size", [(1, 1), (40, 9), (300, 200)])
def test_pictures_without_patterns(size):
    plain = [Image.new("RGB", size, (200, 30, 90))] * 3
    points, descriptions = local_patterns(plain[0])
    assert points.shape == (60, 2) and np.isnan(points).all() and not descriptions.any()
    assert len(pairs_of(plain)) == 0


def test_load_data_keeps_them_together(tmp_path):
    for number in range(24):
        folder = tmp_path / "ab"[number % 2]
        folder.mkdir(exist_ok=True)
        cells(number).save(folder / f"{number}-0.png")
        for place, copy in enumerate(COPIES, start=1):
            copy(cells(number)).save(folder / f"{number}-{place}.png")
    data = load_data(tmp_path, near_duplicates="turned", image_size=32)
    assert sorted(len(ids) for ids in data.near_duplicates) == [4] * 24
    for ids in data.near_duplicates:
        assert len({id.split("-")[0] for id in ids}) == 1
    assert data.summary()["near_duplicates_across_parts"] == []
    plain = load_data(tmp_path, image_size=32)
    assert len(plain.near_duplicates) == 0
    with pytest.raises(InputError, match="must be True, False or 'turned', not 'rotated'"):
        load_data(tmp_path, near_duplicates="rotated")


def test_blood_cells_by_their_originals(shared_data):
    """SOURCE.txt counts the originals of the test part; the number in a file's name is no original's."""
    files = sorted((shared_data("bloodcells") / "test").glob("*/*.jpeg"))
    labels = [path.parent.name for path in files]
    patterns = list(map_threads(lambda path: local_patterns(Image.open(path).convert("RGB")), files))
    points, descriptions = (np.stack(values) for values in zip(*patterns, strict=True))
    groups = linked_groups(len(files), turned_pairs(points, descriptions, labels).tolist())
    count = {
        name: len({group for group, label in zip(groups, labels, strict=True) if label == name}) for name in labels
    }
    assert {name: count[name] for name in ("eosinophil", "lymphocyte", "monocyte")} == {
        "eosinophil": 13,
        "lymphocyte": 6,
        "monocyte": 4,
    }
    assert 30 <= count["neutrophil"] <= 40  # of 48, as 60 draws reach about 34
    numbers = [path.name.split("_")[1] for path in files]
    together = [
        groups[a] == groups[b]
        for a in range(len(files))
        for b in range(a)
        if labels[a] == labels[b] == "eosinophil" and numbers[a] == numbers[b]
    ]
    assert sum(together) / len(together) < 0.2  # by chance 0.08
