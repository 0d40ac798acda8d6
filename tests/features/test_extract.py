import tempfile

import numpy as np
import pytest
from small_networks import around, norm_model, pictures, skip_backbone

from tfxfer.features.cut import cut_model
from tfxfer.features.extract import Extracted, FrozenPrefix, extract, join_views
from tfxfer.model.build import build_model
from tfxfer.model.freeze import freeze

PARTS = (pictures(9, seed=1), pictures(3, seed=2), pictures(1, seed=3))


def cut_at(depth: int, state: str = "frozen"):
    model = freeze(norm_model(), depth, batch_norm=state)
    return model, cut_model(model, depth)


def backbone_features(model, images):
    normal = model.get_layer("normalise")(images.astype(np.float32)).numpy()
    return model.get_layer("norm_backbone").predict(normal, verbose=0)


@pytest.mark.parametrize("state", ["frozen", "train"])
@pytest.mark.parametrize(("depth", "batch_size"), [(0, 4), (1, 64), (3, 4)])
def test_the_frozen_function_computes_what_predict_computes(depth, batch_size, state):
    model, cut = cut_at(depth, state)
    found = extract(FrozenPrefix(cut, batch_size), PARTS)
    images = np.concatenate(PARTS)
    assert found.activations[0, :].dtype == found.features.dtype == np.float32
    np.testing.assert_allclose(found.activations[0, :], cut.prefix.predict(images, verbose=0), atol=1e-5)
    np.testing.assert_allclose(found.features[0], backbone_features(model, images), atol=1e-5)
    assert found.views == ("plain",) and found.images_per_second > 0


def test_a_real_network_with_real_weights_too(digits):
    images = digits[0][:70]
    model = build_model("digits_cnn", 10)
    cut = cut_model(model, 2)
    found = extract(FrozenPrefix(cut), (images,))  # 64 and 6
    backbone = model.get_layer("digits_cnn")
    np.testing.assert_allclose(found.features[0], backbone.predict(images / np.float32(255), verbose=0), atol=1e-4)
    logits = cut.suffix.predict(found.activations[0, :], verbose=0)
    scores = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(scores / scores.sum(1, keepdims=True), model.predict(images, verbose=0), atol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_last_batch_that_is_not_full_is_padded_and_cut_again(count):
    _, cut = cut_at(1)
    prefix = FrozenPrefix(cut, batch_size=4)
    features, activations = prefix(PARTS[0][:count])
    assert len(activations) == len(features) == count
    np.testing.assert_allclose(activations, cut.prefix.predict(PARTS[0][:count], verbose=0), atol=1e-5)


def test_the_weights_are_those_at_the_time_of_making():
    model, cut = cut_at(1)
    prefix = FrozenPrefix(cut)
    before = prefix(PARTS[0])[0]
    layer = model.get_layer("norm_backbone").get_layer("a_conv")
    layer.set_weights([layer.get_weights()[0] + 1])
    np.testing.assert_array_equal(prefix(PARTS[0])[0], before)
    assert np.abs(FrozenPrefix(cut)(PARTS[0])[0] - before).max() > 1e-3


def test_the_mirrored_view_is_of_mirrored_images():
    _, cut = cut_at(1)
    prefix = FrozenPrefix(cut, batch_size=4)
    both = extract(prefix, PARTS, ("plain", "mirror"))
    turned = extract(prefix, [part[:, :, ::-1] for part in PARTS])
    assert both.views == ("plain", "mirror")
    np.testing.assert_allclose(both.activations[1, :], turned.activations[0, :], atol=1e-6)
    np.testing.assert_allclose(both.features[1], turned.features[0], atol=1e-6)
    assert np.abs(both.features[1][:] - both.features[0][:]).max() > 1e-2


@pytest.mark.parametrize("depth", [1, 3])
def test_views_join_and_part(depth):
    _, cut = cut_at(depth)
    prefix = FrozenPrefix(cut)
    both = extract(prefix, PARTS, ("plain", "mirror"))
    joined = join_views(extract(prefix, PARTS), extract(prefix, PARTS, ("mirror",)))
    assert joined.views == both.views
    rows = np.array([4, 12, 0])
    for view in (0, 1, np.array([1, 0, 1])):
        np.testing.assert_array_equal(joined.activations[view, rows], both.activations[view, rows])
    np.testing.assert_array_equal(joined.features, both.features)
    plain = both.with_views(1)
    assert len(joined.activations) == 2 and len(plain.activations) == 1
    assert isinstance(plain, Extracted) and plain.views == ("plain",)
    np.testing.assert_array_equal(plain.features, both.features.first(1))


def test_progress_counts_every_view_of_every_image():
    _, cut = cut_at(3)
    seen = []
    extract(
        FrozenPrefix(cut, 4), PARTS, ("plain", "mirror"), on_progress=lambda done, total: seen.append((done, total))
    )
    assert [done for done, _ in seen] == [4, 8, 9, 12, 13, 17, 21, 22, 25, 26]
    assert {total for _, total in seen} == {26}


def test_activations_are_in_files_that_leave_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    _, cut = cut_at(1)
    found = extract(FrozenPrefix(cut), PARTS)
    assert "temporary file" in repr(found.activations.views[0][0]) and list(tmp_path.iterdir()) == []


def test_before_the_first_block_pixels_are_read_and_normalised_when_asked_for_and_nothing_is_kept():
    """To the bit what the layers give that normalise; by rows in any order, slices and views."""
    _, cut = cut_at(0)
    prefix = FrozenPrefix(cut, 4)
    assert list(prefix.stores(13, "float32")) == ["features"]
    found = extract(prefix, PARTS, ("plain", "mirror"), dtype="float16")
    assert found.activations.nbytes == 0
    images = np.concatenate(PARTS)
    plain, mirror = (np.asarray(cut.prefix(seen.astype(np.float32))) for seen in (images, images[:, :, ::-1]))
    assert plain.std() > 0.1 and not np.array_equal(plain, images)
    np.testing.assert_array_equal(found.activations[0, :], plain)
    np.testing.assert_array_equal(found.activations[1, 9:13], mirror[9:13])
    np.testing.assert_array_equal(found.activations[1, 12], mirror[12])
    rows, views = np.array([12, 3, 3, 0]), np.array([0, 1, 0, 1])
    expected = np.where(views[:, None, None, None] == 1, mirror[rows], plain[rows])
    np.testing.assert_array_equal(found.activations[views, rows], expected)
    assert found.activations[views, rows].dtype == np.float32
    np.testing.assert_allclose(found.features[1][:], cut.tail.predict(mirror, verbose=0), atol=1e-5)


def test_float16_activations_are_those_of_float32_rounded_once():
    _, cut = cut_at(1)
    prefix = FrozenPrefix(cut, 4)
    exact, half = extract(prefix, PARTS), extract(prefix, PARTS, dtype="float16")
    assert half.activations.nbytes * 2 == exact.activations.nbytes
    expected = exact.activations[0, :].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(half.activations[0, :], expected)
    np.testing.assert_array_equal(half.features, exact.features)  # what solvers see is not rounded


def test_several_tensors_cross_a_skip():
    model = around(skip_backbone())
    cut = cut_model(model, 2)
    found = extract(FrozenPrefix(cut, 4), PARTS, ("plain", "mirror"))
    images = np.concatenate(PARTS)
    expected = [cut.prefix.predict(images, verbose=0), cut.prefix.predict(images[:, :, ::-1], verbose=0)]
    rows, views = np.array([12, 3, 3, 0]), np.array([0, 1, 0, 1])
    for number, tensor in enumerate(found.activations[views, rows]):
        for place, (row, view) in enumerate(zip(rows, views, strict=True)):
            np.testing.assert_allclose(tensor[place], expected[view][number][row], atol=1e-5)
    logits = cut.suffix.predict(found.activations[0, :], verbose=0)
    scores = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(scores / scores.sum(1, keepdims=True), model.predict(images, verbose=0), atol=1e-5)
