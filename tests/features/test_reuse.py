import keras
import numpy as np
import pytest
from small_networks import norm_model, pictures

from tfxfer.features import reuse
from tfxfer.features.cache import FeatureCache
from tfxfer.features.cut import cut_model
from tfxfer.features.engines import Engines
from tfxfer.features.extract import FrozenPrefix, extract

PARTS = (pictures(40, seed=1), pictures(9, seed=2))


def prefix_of(depth=1, seed=0) -> FrozenPrefix:
    keras.utils.set_random_seed(seed)
    return FrozenPrefix(cut_model(norm_model(), depth), 16)


def extract_once(prefix, parts, view, cache):
    features = reuse.Features(Engines(prefix, cache=cache), parts, view, cache=cache)
    return features.compute(features.decide())


def features_of(prefix, cache):
    return reuse.Features(Engines(prefix, cache=cache), PARTS, "plain", cache=cache)


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
    first, decision = extract_once(prefix, PARTS, view, cache)
    assert decision.used == "kept" and decision.compute_seconds > 0 and decision.disk_seconds > 0
    monkeypatch.setattr(reuse, "run_prefix", None)  # nothing is computed again
    second, found = extract_once(prefix_of(depth), PARTS, view, cache)
    assert found.used == "found"
    for one in (first, second):
        np.testing.assert_array_equal(one.activations[0, :], expected.activations[0, :])
        np.testing.assert_array_equal(one.features, expected.features)
        assert one.views == (view,)


def test_other_images_views_weights_and_blocks_are_other_entries(cache):
    def used(prefix, parts=PARTS, view="plain"):
        return extract_once(prefix, parts, view, cache)[1].used

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
    _, decision = extract_once(prefix_of(), PARTS, "plain", cache)
    assert decision.used == "not kept" and "less than 2 s" in decision.why
    monkeypatch.setattr(reuse, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(reuse, "WORTH_TIMES", 1e9)
    _, decision = extract_once(prefix_of(), PARTS, "plain", cache)
    assert decision.used == "not kept" and "as long as computing" in decision.why
    assert cache.summary()["entries"] == 0


@pytest.mark.parametrize("limit", ["50MB", 0])
def test_what_is_written_to_time_the_disk_has_no_name_that_a_kill_could_leave(tmp_path, monkeypatch, limit):
    """Whoever dies while the second array is written leaves what the folders hold then."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    cache = FeatureCache(tmp_path / "features", limit)
    assert cache.available == bool(limit)  # its folder is there from now on
    features = features_of(prefix_of(), cache)
    before, seen = sorted(tmp_path.rglob("*")), []

    outputs = [np.zeros((4, *shape[1:])) for shape, _ in features.prefix.stores(4, "float32").values()]

    class Written:
        def __init__(self, values):
            self.values = values

        def __len__(self):
            return len(self.values)

        def __array__(self, dtype=None, copy=None):
            seen.append(sorted(tmp_path.rglob("*")))
            return self.values

    assert features._time_on_disk([Written(values) for values in outputs], "float32") > 0
    assert len(seen) == len(outputs) > 1 and all(names == before for names in seen)


def test_a_cache_that_is_full_or_off_costs_nothing_but_time(tmp_path, monkeypatch):
    monkeypatch.setattr(reuse, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(reuse, "WORTH_TIMES", 0.0)
    expected = extract(prefix_of(), PARTS, ("plain",))
    for size in ("1KB", 0):
        found, decision = extract_once(prefix_of(), PARTS, "plain", FeatureCache(tmp_path / "f", size))
        assert decision.used == "not kept" and decision.why
        np.testing.assert_array_equal(found.activations[0, :], expected.activations[0, :])


def test_float16_where_size_matters_and_the_values_bear_it(cache, monkeypatch):
    prefix = prefix_of(2)
    assert features_of(prefix, cache).decide().dtype == "float32"  # 19 kB
    monkeypatch.setattr(reuse, "WORTH_FLOAT16_BYTES", 0)
    # A channel behind the first block has a mean of 12 times its deviation: rounding is 0.2 % of what it tells.
    assert features_of(prefix_of(1), cache).decide().dtype == "float32"
    first, decision = extract_once(prefix, PARTS, "plain", cache)
    assert (decision.used, decision.dtype) == ("kept", "float16")
    again, decision = extract_once(prefix_of(2), PARTS, "plain", cache)
    assert (decision.used, decision.dtype) == ("found", "float16")
    expected = extract(prefix, PARTS, dtype="float16").activations[0, :]
    for one in (first, again):  # the run that computes sees what later runs see
        np.testing.assert_array_equal(one.activations[0, :], expected)


@pytest.mark.parametrize("used", ["kept", "not kept"])
def test_a_value_beyond_float16_that_the_sample_did_not_show_gives_float32(cache, used):
    cut = cut_model(norm_model(), 1)
    layer = next(layer for layer in cut.prefix.get_layer("norm_backbone").layers if layer.name == "a_bn")
    layer.set_weights([values * 1e6 if place == 1 else values for place, values in enumerate(layer.get_weights())])
    features = features_of(FrozenPrefix(cut, 16), cache)
    found, decision = features.compute(reuse.Decision(used, "as measured", "float16"))
    assert (decision.used, decision.dtype) == (used, "float32") and np.abs(found.activations[0, :]).max() > 65504


def test_an_entry_that_has_gone_since_it_was_found_is_computed_again_as_was_decided(cache):
    extract_once(prefix_of(), PARTS, "plain", cache)
    features = features_of(prefix_of(), cache)
    decision = features.decide()
    assert decision.used == "found"
    cache.clear()
    found, decision = features.compute(decision)
    assert decision.used == "kept"
    np.testing.assert_array_equal(found.features, extract(prefix_of(), PARTS).features)
