import numpy as np
import pytest
from small_networks import norm_model, pictures

from tfxfer.features import extract as extract_module
from tfxfer.features.cut import cut_model
from tfxfer.features.extract import Extracted, FrozenPrefix, allocate, extract, join_views
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
    assert found.activations.dtype == found.features.dtype == np.float32
    np.testing.assert_allclose(found.activations[0], cut.prefix.predict(images, verbose=0), atol=1e-5)
    np.testing.assert_allclose(found.features[0], backbone_features(model, images), atol=1e-5)
    assert found.views == ("plain",) and found.images_per_second > 0


def test_a_real_network_with_real_weights_too(digits):
    images = digits[0][:70]
    model = build_model("digits_cnn", 10)
    cut = cut_model(model, 2)
    found = extract(FrozenPrefix(cut), (images,))  # 64 and 6
    backbone = model.get_layer("digits_cnn")
    np.testing.assert_allclose(found.features[0], backbone.predict(images / np.float32(255), verbose=0), atol=1e-4)
    logits = cut.suffix.predict(found.activations[0], verbose=0)
    scores = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(scores / scores.sum(1, keepdims=True), model.predict(images, verbose=0), atol=1e-5)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_last_batch_that_is_not_full_is_padded_and_cut_again(count):
    _, cut = cut_at(1)
    prefix = FrozenPrefix(cut, batch_size=4)
    activations, features = prefix(PARTS[0][:count])
    assert len(activations) == len(features) == count
    np.testing.assert_allclose(activations, cut.prefix.predict(PARTS[0][:count], verbose=0), atol=1e-5)


def test_the_weights_are_those_at_the_time_of_making():
    model, cut = cut_at(1)
    prefix = FrozenPrefix(cut)
    before = prefix(PARTS[0])[1]
    layer = model.get_layer("norm_backbone").get_layer("a_conv")
    layer.set_weights([layer.get_weights()[0] + 1])
    np.testing.assert_array_equal(prefix(PARTS[0])[1], before)
    assert np.abs(FrozenPrefix(cut)(PARTS[0])[1] - before).max() > 1e-3


def test_the_mirrored_view_is_of_mirrored_images():
    _, cut = cut_at(1)
    prefix = FrozenPrefix(cut, batch_size=4)
    both = extract(prefix, PARTS, ("plain", "mirror"))
    turned = extract(prefix, [part[:, :, ::-1] for part in PARTS])
    assert both.views == ("plain", "mirror")
    np.testing.assert_allclose(both.activations[1], turned.activations[0], atol=1e-6)
    np.testing.assert_allclose(both.features[1], turned.features[0], atol=1e-6)
    assert np.abs(both.features[1] - both.features[0]).max() > 1e-2


@pytest.mark.parametrize("depth", [1, 3])
def test_views_join_and_part(depth):
    _, cut = cut_at(depth)
    prefix = FrozenPrefix(cut)
    both = extract(prefix, PARTS, ("plain", "mirror"))
    joined = join_views(extract(prefix, PARTS), extract(prefix, PARTS, ("mirror",)))
    assert joined.views == both.views
    np.testing.assert_array_equal(joined.activations, both.activations)
    np.testing.assert_array_equal(joined.features, both.features)
    assert (joined.activations is joined.features) == (depth == 3)  # features are not held twice
    plain = both.with_views(1)
    assert isinstance(plain, Extracted) and plain.views == ("plain",)
    np.testing.assert_array_equal(plain.features, both.features[:1])


def test_progress_counts_every_view_of_every_image():
    _, cut = cut_at(3)
    seen = []
    extract(
        FrozenPrefix(cut, 4), PARTS, ("plain", "mirror"), on_progress=lambda done, total: seen.append((done, total))
    )
    assert [done for done, _ in seen] == [4, 8, 9, 12, 13, 17, 21, 22, 25, 26]
    assert {total for _, total in seen} == {26}


def test_what_passes_the_memory_limit_goes_to_a_file_that_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(extract_module.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(extract_module, "IN_MEMORY_BYTES", 100)
    small, large = allocate((5, 5)), allocate((5, 6))
    assert not isinstance(small, np.memmap) and isinstance(large, np.memmap)
    assert not large.any()
    _, cut = cut_at(1)
    found = extract(FrozenPrefix(cut), PARTS)
    assert isinstance(found.activations, np.memmap)
    monkeypatch.undo()
    np.testing.assert_array_equal(found.activations, extract(FrozenPrefix(cut), PARTS).activations)
    assert list(tmp_path.iterdir()) == []
