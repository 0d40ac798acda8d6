"""Views against NumPy: what is drawn, what each operation does, and that neither depends on anything else."""

import hashlib

import keras
import numpy as np
import pytest
from scipy.ndimage import map_coordinates
from small_networks import around, norm_model, skip_backbone

from tfxfer.features import reuse, views
from tfxfer.features.cache import FeatureCache
from tfxfer.features.crossing import crossing_of
from tfxfer.features.cut import cut_model
from tfxfer.features.engines import Engines
from tfxfer.features.extract import FrozenPrefix, extract, join_views
from tfxfer.features.fresh import ENDLESS, FreshViews, ViewsDecision, decide_views, features_of
from tfxfer.features.views import OPERATIONS, RandView, augmented, draw

IMAGES = np.random.default_rng(5).integers(0, 256, (12, 16, 16, 3), np.uint8)
PARTS = (IMAGES[:7], IMAGES[7:])


def alone(name: str, image: np.ndarray, sign: int) -> np.ndarray:
    """One operation, in float."""
    operation = dict(zip(OPERATIONS, views._operations(), strict=True))[name]
    return np.asarray(operation(image[None].astype(np.float32), np.float32(sign)))[0]


def moved(image, x_of, y_of):
    """Bilinear, mirrored at the edges: pixel (x, y) is taken from (x_of(x, y), y_of(x, y))."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]].astype(float)
    places = [y_of(x, y), x_of(x, y)]
    channels = [map_coordinates(image[..., c].astype(float), places, order=1, mode="reflect") for c in range(3)]
    return np.stack(channels, -1)


def turned(image, sign):
    angle, middle = sign * np.deg2rad(9), 7.5
    cos, sin = np.cos(angle), np.sin(angle)
    return moved(
        image,
        lambda x, y: middle + cos * (x - middle) - sin * (y - middle),
        lambda x, y: middle + sin * (x - middle) + cos * (y - middle),
    )


def equalised(image, sign):
    found = np.empty(image.shape)
    for channel in range(3):
        values = image[..., channel]
        below = np.cumsum(np.bincount(values.ravel(), minlength=256))
        low = below[np.flatnonzero(below)[0]]
        found[..., channel] = np.round((below - low) * 255 / (below[-1] - low))[values]
    return found


def stretched(image, sign):
    low, high = image.min((0, 1)).astype(float), image.max((0, 1)).astype(float)
    return (image - low) * 255 / (high - low)


def sharpened(image, sign):
    padded = np.pad(image.astype(float), ((1, 1), (1, 1), (0, 0)))
    near = sum(padded[i : i + 16, j : j + 16] for i in range(3) for j in range(3))
    smooth = (near + 4 * image.astype(float)) / 13
    return np.clip(smooth + (1 + 0.27 * sign) * (image - smooth), 0, 255)


def with_contrast(image, sign):
    mean = image.mean((0, 1))
    return np.clip((image - mean) * (1 + 0.27 * sign) + mean, 0, 255)


GREY = np.array([0.2989, 0.587, 0.114])
EXPECTED = {
    "identity": lambda image, sign: image,
    "shear_x": lambda image, sign: moved(image, lambda x, y: x + 0.09 * sign * y, lambda x, y: y),
    "shear_y": lambda image, sign: moved(image, lambda x, y: x, lambda x, y: y + 0.09 * sign * x),
    "translate_x": lambda image, sign: moved(image, lambda x, y: x + 0.135 * 16 * sign, lambda x, y: y),
    "translate_y": lambda image, sign: moved(image, lambda x, y: x, lambda x, y: y + 0.135 * 16 * sign),
    "rotate": turned,
    "auto_contrast": stretched,
    "equalize": equalised,
    "solarize": lambda image, sign: np.where(image < 178.5, image, 255.0 - image),
    "posterize": lambda image, sign: image & 0b11111110,
    "color": lambda image, sign: image + 0.27 * ((image @ GREY)[..., None] - image),
    "contrast": with_contrast,
    "brightness": lambda image, sign: np.clip(image + 255 * 0.27 * sign, 0, 255),
    "sharpness": sharpened,
}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_does_what_its_formula_says(name, sign):
    for image in IMAGES[:3]:
        np.testing.assert_allclose(alone(name, image, sign), EXPECTED[name](image, sign), atol=0.02)


def expected_draw(seed, number, image):
    words = np.frombuffer(hashlib.blake2b(image.tobytes(), digest_size=16).digest(), np.uint32)
    random = np.random.default_rng([seed, number, *map(int, words)])
    names = [OPERATIONS[index] for index in random.integers(14, size=2)]
    signs = [1 if bit == 0 else -1 for bit in random.integers(2, size=2)]
    return names, signs, bool(random.integers(2))


@pytest.mark.parametrize("view", [RandView(0, 1), RandView(0, 2), RandView(3, 1)])
def test_a_view_is_two_operations_drawn_by_seed_number_and_pixels(view):
    found = view(IMAGES)
    assert found.dtype == np.uint8
    for image, made in zip(IMAGES, found, strict=True):
        names, signs, mirrored = expected_draw(view.seed, view.number, image)
        expected = image[:, ::-1] if mirrored else image
        for name, sign in zip(names, signs, strict=True):
            expected = alone(name, expected, sign)
        np.testing.assert_array_equal(made, np.round(np.clip(expected, 0, 255)).astype(np.uint8))


def test_draws_are_even():
    random = np.random.default_rng(0)
    draws = [draw(1, 1, image) for image in random.integers(0, 256, (4000, 2, 2, 3), np.uint8)]
    counts = np.bincount([index for made in draws for index in made.operations], minlength=14)
    assert np.abs(counts - 8000 / 14).max() < 5 * (8000 / 14) ** 0.5
    assert abs(np.mean([made.mirrored for made in draws]) - 0.5) < 0.04
    assert abs(np.mean([made.signs for made in draws])) < 0.06


def test_neither_the_batch_nor_its_order_shows_in_a_view():
    view = RandView(0, 1)
    whole, order = view(IMAGES), np.random.default_rng(1).permutation(12)
    np.testing.assert_array_equal(view(IMAGES[order]), whole[order])
    np.testing.assert_array_equal(np.concatenate([view(IMAGES[row : row + 1]) for row in range(12)]), whole)
    mixed = augmented(IMAGES, 0, np.array([0, 1, 2] * 4))
    np.testing.assert_array_equal(mixed[0::3], IMAGES[0::3])
    np.testing.assert_array_equal(mixed[1::3], whole[1::3])
    np.testing.assert_array_equal(mixed[2::3], RandView(0, 2)(IMAGES)[2::3])
    assert (whole != RandView(1, 1)(IMAGES)).any() and (whole != RandView(0, 2)(IMAGES)).any()


def prefix_of(batch_size=4, depth=1):
    return FrozenPrefix(cut_model(norm_model(), depth), batch_size)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(reuse, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(reuse, "WORTH_TIMES", 0.0)
    return FeatureCache(tmp_path / "features", "50MB")


def kept(cache, view, prefix=None):
    features = reuse.Features(Engines(prefix or prefix_of(), cache=cache), PARTS, view, cache=cache)
    return features.compute(features.decide())


def test_what_is_kept_is_what_is_computed_from_augmented_pixels_to_the_bit(cache):
    view, prefix = RandView(0, 1), prefix_of()
    found, _ = kept(cache, view, prefix)
    pixels = np.concatenate([view(IMAGES[row : row + 1]) for row in range(12)])  # one by one
    for start in range(12):  # in other batches than those that were kept
        features, activations = prefix(pixels[start : start + 3])
        np.testing.assert_array_equal(found.activations[0, start : start + 3], activations)
        np.testing.assert_array_equal(found.features[0][start : start + 3], features)


def test_a_second_run_computes_nothing_and_other_seeds_and_numbers_are_other_entries(cache, monkeypatch):
    first, decision = kept(cache, RandView(0, 1))
    assert decision.used == "kept" and decision.compute_seconds > 0
    assert kept(cache, RandView(1, 1))[1].used == "kept"
    assert kept(cache, RandView(0, 2))[1].used == "kept"
    monkeypatch.setattr(reuse, "run_prefix", None)
    monkeypatch.setattr(views, "augmented", None)
    again, decision = kept(cache, RandView(0, 1))
    assert decision.used == "found"
    np.testing.assert_array_equal(again.activations[0, :], first.activations[0, :])
    monkeypatch.setattr(keras, "__version__", "9.9")
    with pytest.raises(TypeError):
        kept(cache, RandView(0, 1))  # another Keras may give other pixels: computed again


def test_joined_views_read_features_from_where_they_were_written():
    prefix, chosen = prefix_of(), ("plain", RandView(0, 1), RandView(0, 2))
    found = join_views(extract(prefix, PARTS), *(extract(prefix, PARTS, (view,)) for view in chosen[1:]))
    expected = extract(prefix, PARTS, chosen)
    assert found.views == expected.views == ("plain", "rand 1", "rand 2")
    tables, features = found.features, np.asarray(expected.features)
    assert tables.shape == features.shape and tables.flat.shape == (36, 5)
    for view in range(3):
        np.testing.assert_array_equal(found.activations[view, :], expected.activations[view, :])
        np.testing.assert_array_equal(tables[view], features[view])
    np.testing.assert_array_equal(
        found.features_by_view[np.array([2, 0]), np.array([3, 11])], features[[2, 0], [3, 11]]
    )
    flat = features.reshape(36, 5)
    for rows in (slice(3, 30), np.array([35, 0, 12, 12]), slice(None)):
        np.testing.assert_array_equal(tables.flat[rows], flat[rows])


@pytest.mark.parametrize("depth", [0, 1])
def test_fresh_views_are_the_prefix_of_augmented_pixels(depth):
    cut = cut_model(norm_model(), depth)
    plain = extract(FrozenPrefix(cut, 4), PARTS).activations
    fresh = FreshViews(crossing_of(cut), PARTS, plain, seed=2)
    assert len(fresh) == ENDLESS and fresh.shapes == plain.shapes and fresh.num_images == 12
    np.testing.assert_array_equal(fresh[0, :], plain[0, :])
    numbers, rows = np.array([7, 123456789, 0, 7]), np.array([11, 3, 6, 7])
    pixels = np.stack([augmented(IMAGES[r : r + 1], 2, np.array([n]))[0] for n, r in zip(numbers, rows, strict=True)])
    np.testing.assert_allclose(fresh[numbers, rows], cut.prefix.predict(pixels, verbose=0), atol=1e-5)
    assert 0 < fresh.seconds_an_image(4) < 10
    found = extract(FrozenPrefix(cut, 3), PARTS)
    made = FreshViews(features_of(FrozenPrefix(cut, 3)), PARTS, found.features.as_activations(), seed=2)
    np.testing.assert_array_equal(made[0, rows], found.features[0][rows])
    expected = extract(FrozenPrefix(cut, 3), (pixels,)).features[0]
    np.testing.assert_allclose(made[numbers, rows], expected, atol=1e-5)


def test_fresh_views_where_several_tensors_cross():
    cut = cut_model(around(skip_backbone()), 2)
    fresh = FreshViews(crossing_of(cut), PARTS, extract(FrozenPrefix(cut, 4), PARTS).activations, seed=0)
    found = fresh[np.array([1, 1]), np.array([2, 8])]
    expected = cut.prefix.predict(RandView(0, 1)(IMAGES[[2, 8]]), verbose=0)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_views_are_kept_where_that_is_quicker():
    def decided(missing, passes, disk=1.0, fresh=10.0):
        return decide_views(4, missing, passes, view_seconds=10.0, disk_seconds=disk, fresh_seconds=fresh)

    found = decided(3, 12)  # 3 x 11 + 12 x 1 against 12 x 10
    assert (found.how, found.num_views, found.cached_seconds, found.fresh_seconds) == ("cached", 4, 45.0, 120.0)
    assert decided(3, 3, fresh=11.4).how == "cached"  # 36 against 34.2: two seconds are not worth a choice
    found = decided(3, 3)  # 36 against 30
    assert (found.how, found.num_views) == ("fresh", 0) and "quicker" in found.why
    assert decided(0, 3).how == "cached"  # an earlier run has left them
    assert decided(3, 100, disk=11.0).how == "fresh"  # reading takes longer than computing
    assert ViewsDecision.from_dict(found.to_dict()) == found
