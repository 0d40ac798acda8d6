import keras
import numpy as np
import pytest
from small_networks import norm_model, pictures

from tfxfer.features import reuse
from tfxfer.features.cache import FeatureCache
from tfxfer.features.cut import cut_model
from tfxfer.features.extract import FrozenPrefix, extract

PARTS = (pictures(40, seed=1), pictures(9, seed=2))


def prefix_of(depth=1, seed=0) -> FrozenPrefix:
    keras.utils.set_random_seed(seed)
    return FrozenPrefix(cut_model(norm_model(), depth), 16)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(reuse, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(reuse, "WORTH_TIMES", 0.0)
    return FeatureCache(tmp_path / "features", "50MB")


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("view", ["plain", "mirror"])
def test_what_is_found_is_what_is_computed_to_the_bit(cache, depth, view, monkeypatch):
    prefix = prefix_of(depth)
    expected = extract(prefix, PARTS, (view,))
    first, decision = reuse.extract_once(prefix, PARTS, view, cache=cache)
    assert decision.used == "kept" and decision.compute_seconds > 0 and decision.disk_seconds > 0
    monkeypatch.setattr(reuse, "extract", None)  # nothing is computed again
    second, found = reuse.extract_once(prefix_of(depth), PARTS, view, cache=cache)
    assert found.used == "found"
    for one in (first, second):
        np.testing.assert_array_equal(one.activations, expected.activations)
        np.testing.assert_array_equal(one.features, expected.features)
        assert one.views == (view,) and (one.activations is one.features) == (depth == 3)


def test_other_images_views_weights_and_blocks_are_other_entries(cache):
    def used(prefix, parts=PARTS, view="plain"):
        return reuse.extract_once(prefix, parts, view, cache=cache)[1].used

    assert used(prefix_of()) == "kept" and used(prefix_of()) == "found"
    changed = (PARTS[0].copy(), PARTS[1])
    changed[0][3, 2, 1, 0] ^= 1
    assert used(prefix_of(), changed) == "kept"
    assert used(prefix_of(), view="mirror") == "kept"
    assert used(prefix_of(2)) == "kept"
    cut = cut_model(norm_model(), 1)
    layer = next(layer for layer in cut.prefix.layers if layer.weights)
    values = layer.get_weights()
    layer.set_weights([values[0] + 1e-6, *values[1:]])
    assert used(FrozenPrefix(cut, 16)) == "kept"
    assert used(prefix_of()) == "found"


def test_what_takes_no_time_to_compute_or_is_quicker_computed_is_not_kept(tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path / "features", "50MB")
    _, decision = reuse.extract_once(prefix_of(), PARTS, "plain", cache=cache)
    assert decision.used == "not kept" and "less than 2 s" in decision.why
    monkeypatch.setattr(reuse, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(reuse, "WORTH_TIMES", 1e9)
    _, decision = reuse.extract_once(prefix_of(), PARTS, "plain", cache=cache)
    assert decision.used == "not kept" and "as long as computing" in decision.why
    assert cache.summary()["entries"] == 0


def test_a_cache_that_is_full_or_off_costs_nothing_but_time(tmp_path, monkeypatch):
    monkeypatch.setattr(reuse, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(reuse, "WORTH_TIMES", 0.0)
    expected = extract(prefix_of(), PARTS, ("plain",))
    for size in ("1KB", 0):
        found, decision = reuse.extract_once(prefix_of(), PARTS, "plain", cache=FeatureCache(tmp_path / "f", size))
        assert decision.used == "not kept" and decision.why
        np.testing.assert_array_equal(found.activations, expected.activations)
